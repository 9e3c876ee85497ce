"""What the benchmark compares LADD with: ADD's discriminator, real digits in place of the teacher's samples, the teacher's own samplers.

ADD (Adversarial Diffusion Distillation, arXiv 2311.17042) reads the features of a network that knows images but not noise, so guess
and sample are shown clean. Here that network names the digit; it is trained on the teacher's samples, and is never the judge.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import ladd
from toy_mnist.data import ColorMNIST, load_mnist
from toy_mnist.edm import sample_dpm, sample_heun, time_grid
from toy_mnist.world import ToyWorld

STEPS, BATCH, SEED = 600, 64, 0         # of the classifier's training
HELD_OUT = 0.1                          # the share of the samples that only measures its accuracy
UNSEEN = 22_000                         # the judge compares with MNIST's first 22,000 training digits

# name -> sampler(velocity, noise, n, label)
SAMPLERS = {"Euler on EDM's grid": lambda v, z, n, y: ladd.sample_euler(v, z, time_grid(n), y),
            "Euler on 1 - k/n": lambda v, z, n, y: ladd.sample_euler(v, z, [1 - k / n for k in range(n)], y),
            "Heun": sample_heun,
            "DPM-Solver++": sample_dpm}


class Classifier(nn.Module):
    """x [B,3,28,28] -> digit logits [B,10]. The five maps of `body` have the channels and sizes of the toy's five taps."""

    def __init__(self, width=48):
        super().__init__()
        conv = lambda a, b, s: nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.GroupNorm(8, b), nn.SiLU())
        self.body = nn.Sequential(conv(3, width, 2), conv(width, width, 1), conv(width, 2 * width, 2),
                                  conv(2 * width, 2 * width, 1), conv(2 * width, 2 * width, 1))
        self.out = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.out(self.body(x).mean((2, 3)))


def train_classifier(x0, label, device):
    """A classifier of images x0 [N,3,28,28] and labels [N], and its accuracy on a tenth of them, held out."""
    torch.manual_seed(SEED)
    net, test = Classifier().to(device), max(1, int(HELD_OUT * len(x0)))
    opt = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=STEPS)
    for step in tqdm(range(STEPS), desc="classifier", mininterval=5):
        index, _ = ladd.reader_indices(len(x0) - test, step * BATCH, BATCH, SEED)
        loss = F.cross_entropy(net(x0[index].to(device)), label[index].to(device))
        opt.zero_grad(), loss.backward(), opt.step(), schedule.step()
    with torch.no_grad():
        right = torch.cat([net(x.to(device)).argmax(1).cpu() for x in x0[-test:].split(500)]) == label[-test:]
    return net, float(right.float().mean())


class ClassifierFirst(nn.Module):
    """The teacher's velocity, before which the classifier is shown the same x_t: where only its taps are read, the pass ends there."""

    def __init__(self, velocity, classifier):
        super().__init__()
        self.velocity, self.classifier = velocity, classifier

    def forward(self, x_t, t, cond):
        self.classifier(x_t)
        return self.velocity(x_t, t, cond)


class AddWorld(ToyWorld):
    """The toy with ADD's discriminator: the taps are the classifier's. The recipe keeps guess and sample clean (renoise_mean = -10)."""

    def __init__(self, recipe, options, device):
        super().__init__(recipe, options, device)
        self.tap_root = Classifier().to(device)
        self.teacher = ClassifierFirst(self.teacher, self.tap_root).eval().requires_grad_(False)

    def make_student(self):
        return copy.deepcopy(self.teacher.velocity).requires_grad_(True).train()

    def prepare(self):
        """The teacher's samples, then the classifier, cached by what made both."""
        super().prepare()
        path, made_of = self.cache_path("classifier"), {**self.fingerprint(), "training": [STEPS, BATCH, SEED]}
        if not path.with_suffix(".json").exists() or ladd.load_weights(path, "toy classifier", "made_of")[1]["made_of"] != made_of:
            net, accuracy = train_classifier(self.x0, self.labels, self.device)
            ladd.save_weights(path, net.state_dict(), {"kind": "toy classifier", "made_of": made_of, "accuracy": accuracy})
        tensors, about = ladd.load_weights(path, "toy classifier", "accuracy")
        ladd.fill(self.tap_root, tensors, path)
        print(f"classifier: accuracy {about['accuracy']:.3f} on samples held out")

    def terms(self):
        """Score distillation at a time of its own, uniform in (0, 1): the discriminator's t-hat is 0 here."""
        terms = super().terms()

        def at_own_time(term):
            def score_loss(p, state):
                t = torch.rand(len(p.x0), generator=ladd.generator("score", *p.key)).to(p.x0)
                return term(ladd.Pass(**{**vars(p), "t_hat": t, "fake_t": ladd.interpolate(p.x0_hat, p.eps_hat, t)}), state)
            return score_loss
        return dataclasses.replace(terms, add_student=tuple(at_own_time(f) if f.__name__ == "score_loss" else f for f in terms.add_student))


class HeadsFirstWorld(ToyWorld):
    """The toy with the heads stepped before the student's gradient is taken, which then comes from the new heads. For one micro-batch."""

    def terms(self):
        recipe = self.recipe

        def step_heads(p, state):
            """`ladd.update` finds no gradient of theirs afterwards; one that is not finite is left to it, to be skipped."""
            if torch.isfinite(nn.utils.clip_grad_norm_(state.heads.parameters(), recipe.clip_heads)):
                for group in state.heads_opt.param_groups:
                    group["lr"] = recipe.head_lr * ladd.lr_scale(recipe, p.key[1], student=False)
                state.heads_opt.step(), state.heads_opt.zero_grad(set_to_none=True)
                with torch.no_grad(), ladd.autocast(p.x0.device):
                    p.real_logits = state.heads(p.real_maps, p.t_real, p.head_cond, p.t)
        return dataclasses.replace(super().terms(), before_student=step_heads)


class DataWorld(ToyWorld):
    """The toy with digits of MNIST as the real samples, each painted once; they have no noise that they were made from."""

    def prepare(self):
        data, n = ColorMNIST(*load_mnist(self.options.data_root), seed=self.recipe.samples_seed), self.recipe.samples
        if UNSEEN + n > len(data):
            raise ladd.UserError(f"samples = {n}: MNIST has {max(0, len(data) - UNSEEN)} digits that the judge does not compare with")
        self.x0, self.labels = data.batch(torch.arange(UNSEEN, UNSEEN + n), torch.zeros(n, dtype=torch.long))
        self.more = None

    def read(self, start, count):
        index, _ = ladd.reader_indices(self.recipe.samples, start, count, self.recipe.seed)
        return self.x0[index], self.labels[index], None

    def fingerprint(self):
        return {**super().fingerprint(), "real": "MNIST"}

    def draw_start(self, path):
        """That picture shows the noise of each sample."""


WORLDS = {"toy": ToyWorld, "teacher": ToyWorld, "add": AddWorld, "data": DataWorld, "heads-first": HeadsFirstWorld}
