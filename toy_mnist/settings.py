"""What the benchmark runs: its settings, and the losses and worlds that they need beyond ladd.py.

What the core's recipe can't say is a field of `Ablation`. `heads_loss` and `student_loss` act on
it; `ladd.train` takes them in place of its own.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

import ladd
from toy_mnist import progress
from toy_mnist.edm import null_cond, sample_dpm, sample_heun, time_grid
from toy_mnist.judge import conv
from toy_mnist.world import RECIPES, TAPS, TOY, ToyRecipe, ToyWorld

# The heads' loss of a real and a fake logit, and the student's.
ladd.LOSSES["relativistic"] = (  # R3GAN, arXiv 2501.05441, eq. 2
    lambda real, fake: F.softplus(fake - real),
    lambda real, fake: F.softplus(real - fake),
)
ladd.LOSSES["nonsaturating"] = (  # arXiv 1406.2661
    lambda real, fake: F.softplus(-real) + F.softplus(fake),
    lambda real, fake: F.softplus(-fake),
)
# arXiv 1701.07875; unbounded without a gradient penalty
ladd.LOSSES["wasserstein"] = (lambda real, fake: fake - real, lambda real, fake: -fake)


@dataclasses.dataclass(frozen=True)
class Ablation(ToyRecipe):
    """The toy's recipe, and what only ablations ask for: off by default."""

    loss: str = ladd.field("hinge", "the adversarial game", tuple(ladd.LOSSES))
    exact_r1: float = ladd.field(0.0, "weight of exact R1 on the heads' input features")
    gradient_penalty: float = ladd.field(0.0, "weight of the gradient penalty")
    score_weight: float = ladd.field(0.0, "weight of ADD's score distillation")
    score_weighting: str = ladd.field("exponential", "over t", ("exponential", "sds", "nfsd"))
    adv_warmup: int = ladd.field(0, "iterations over which adv_weight rises from 0")


def exact_r1(state, world, recipe, b, real, fake):
    """R1 (arXiv 1801.04406, eq. 9) on the heads' input features of real samples. A scalar.

    Per head: the gradient of the sum of its logits with respect to its map [B, C, H, W], squared,
    summed over channels, averaged over samples and places. (To average the logits first would
    shrink the penalty by the square of the number of patches.)
    """
    maps = [m.detach().requires_grad_() for m in real]
    sums = [k.sum() for k in state.heads(maps, b.t_real, world.head_cond(b.cond), b.t)]
    grads = torch.autograd.grad(sums, maps, create_graph=True)
    return ladd.mean_over_heads(lambda g: g.square().sum(1), grads)


def gradient_penalty(state, world, recipe, b, real, fake):
    """WGAN-GP (arXiv 1704.00028, eq. 3) on maps between real and fake: (|gradient| - 1)^2.

    As in `exact_r1` the norm is taken per place, of the gradient of a head's summed logits.
    """
    mix = uniform(recipe, b, "gradient penalty")
    pairs = zip(real, fake, strict=True)
    maps = [ladd.interpolate(r, f.float(), mix).requires_grad_() for r, f in pairs]
    logits = state.heads(maps, b.t_hat, world.head_cond(b.cond), b.t)
    grads = torch.autograd.grad([k.sum() for k in logits], maps, create_graph=True)
    norms = [(g.square().sum(1) + 1e-12).sqrt() for g in grads]
    return ladd.mean_over_heads(lambda norm: (norm - 1).square(), norms)


def uniform(recipe, b, name):
    """A keyed number between 0 and 1 for each sample of the batch. [B]"""
    noise = ladd.keyed_noise(b.index, (1,), recipe.seed, b.iteration, name)
    return torch.special.ndtr(noise[:, 0]).to(b.t)


def heads_loss(state, world, recipe, b, real, fake):
    """`ladd.heads_loss`, and the terms that have a weight."""
    loss, metrics = ladd.heads_loss(state, world, recipe, b, real, fake)
    real = [m.float() for m in real]
    for term in (exact_r1, gradient_penalty):
        if weight := getattr(recipe, term.__name__):
            dtype = state.heads.dtype
            state.heads.dtype = torch.float32  # the term compares small differences
            loss = loss + weight * term(state, world, recipe, b, real, fake)
            state.heads.dtype = dtype
    return loss, metrics


def student_loss(state, world, recipe, b, fake, x0_hat):
    """`ladd.student_loss`, and what else the recipe asks for."""
    if recipe.adv_warmup:
        share = min(1.0, (b.iteration + 1) / recipe.adv_warmup)
        recipe = dataclasses.replace(recipe, adv_weight=share * recipe.adv_weight)
    loss, metrics = ladd.student_loss(state, world, recipe, b, fake, x0_hat)
    if recipe.score_weight:
        metrics["score_loss"] = score_loss(world, recipe, b, x0_hat)
        loss = loss + recipe.score_weight * metrics["score_loss"]
    return loss, metrics


def score_loss(world, recipe, b, x0_hat):
    """ADD's score distillation (arXiv 2311.17042): c(t) |x0_hat - target|^2 at a random t. +1 F.

    target: the teacher's guess from the noised x0_hat, without gradient. exponential: c = 1 - t.
    sds: c = t (1 - t) / 2, for the gradient of SDS (arXiv 2209.14988) with w = t^2. nfsd (arXiv
    2310.17590, +2 F): c = 1, and the target is x0_hat moved along the teacher's direction towards
    the condition, and for t < 0.2 along that to its guess without condition.
    """
    t = uniform(recipe, b, "score")
    with torch.no_grad():
        x_t = ladd.interpolate(x0_hat, b.eps_hat, t)
        target = ladd.velocity_to_x0(x_t, world.teacher(x_t, t, b.cond), t)
        if recipe.score_weighting == "nfsd":
            free = ladd.velocity_to_x0(x_t, world.teacher(x_t, t, null_cond(b.cond)), t)
            low = ladd.expand((t < 0.2).float(), x_t)
            target = x0_hat + (target - free) + low * (free - x0_hat)
    c = {"exponential": 1 - t, "sds": t * (1 - t) / 2, "nfsd": 1}[recipe.score_weighting]
    return (c * (x0_hat - target).square().flatten(1).mean(1)).mean()


# ---- Worlds --------------------------------------------------------------------------------------


def train_classifier(x0, label, device, steps=600, width=48):
    """A network of images: the maps of its modules 0 to 4 have the shapes of the toy's taps.

    It is trained to name the digits of x0 [N, 3, 28, 28] by label [N], and is never the judge.
    """
    torch.manual_seed(0)
    w = 2 * width
    sizes = (3, width, 2), (width, width, 1), (width, w, 2), (w, w, 1), (w, w, 1)
    blocks = [conv(*size) for size in sizes]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 10))
    opt = torch.optim.AdamW(net.to(device).parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for i in progress(range(steps), "train the classifier"):
        index, _ = ladd.reader_indices(len(x0), 64 * i, 64, seed=0)
        opt.zero_grad()
        F.cross_entropy(net(x0[index].to(device)), label[index].to(device)).backward()
        opt.step()
        schedule.step()
    return net.eval().requires_grad_(False)


class AddWorld(ToyWorld):
    """The toy with ADD's features (arXiv 2311.17042), of a network that never saw noise."""

    def __init__(self, recipe, options, device):
        super().__init__(recipe, options, device)
        self.classifier = train_classifier(self.samples.x0, self.samples.label, device)

    def features(self, x_t, t, cond):
        return ladd.tapped(self.classifier, "01234", lambda: self.classifier(x_t))


class NormedHead(ladd.Head):
    """A head as in most implementations: GroupNorm, not constants; SiLU; no residual."""

    def __init__(self, f, width, emb):
        super().__init__(f, width, emb)
        self.norm0 = nn.GroupNorm(math.gcd(8, f.shape[1]), f.shape[1])
        self.norm1 = nn.GroupNorm(8, width, affine=False)
        self.norm2 = nn.GroupNorm(8, width, affine=False)

    def forward(self, f, emb):
        scale1, shift1, scale2, shift2 = self.film(emb)[:, :, None, None].chunk(4, dim=1)
        h = F.silu(self.norm1(self.conv1(self.norm0(f))) * (1 + scale1) + shift1)
        h = F.silu(self.norm2(self.conv2(h)) * (1 + scale2) + shift2)
        return self.out(h)[:, 0]


class NormedWorld(ToyWorld):
    """The toy with such heads."""

    head = NormedHead


WORLDS = {"toy": ToyWorld, "add": AddWorld, "normed": NormedWorld}
SAMPLERS = {  # of the teacher; a setting with one of them as its world trains nothing
    "Euler on EDM's grid": lambda v, z, n, y: ladd.sample_euler(v, z, time_grid(n), y),
    "Euler evenly": lambda v, z, n, y: ladd.sample_euler(v, z, [1 - k / n for k in range(n)], y),
    "Heun": sample_heun,
    "DPM-Solver++": sample_dpm,
}

# ---- Settings ------------------------------------------------------------------------------------

GROUPS = {
    "ablations": "Most make one change from the baseline.",
    "experiments": "The six experiments of a report on LADD with Color-MNIST (1 to 5 collapsed in "
    "colour, 6 did not) as far as a recipe can say them, with fewer iterations (there 20,000) and "
    "samples (2 and 6), and for each the change likeliest to save it: every noise paired, which "
    "lets the squared error reach t = 1 (6 has that, and gets heads ten times as fast as the "
    "student). Not rebuilt: the third, which changes the teacher's pooling. Left open by the "
    "report: batch, optimizer, whether the squared error of 1 to 5 was taken at t = 1 (here: not).",
    "peers": "Other ways to few steps, on the same network, data and judge.",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    name: str
    group: str
    changes: dict  # of the recipe, from BASE
    note: str = ""
    world: str = "toy"  # a key of WORLDS, or one of SAMPLERS
    against: str = "baseline"  # the setting that the tables compare it with
    steps: tuple = (8, 4, 2, 1)  # of a sampler

    def make_world(self, recipe, options):
        return WORLDS.get(self.world, ToyWorld)(recipe, options, options.device)


def recipe_for(setting, budget, seed):
    """BASE with the budget's fields, then the setting's: no more samples than its run reads."""
    fields = {name: value for name, value in budget.items() if hasattr(BASE, name)}
    recipe = dataclasses.replace(BASE, **{**fields, **setting.changes, "seed": seed})
    most = recipe.iterations * recipe.batch if "samples" in setting.changes else recipe.samples
    return dataclasses.replace(recipe, samples=min(recipe.samples, most))


def departures(recipe):
    """The fields in which a recipe differs from TOY, but for the budget's."""
    budget = ("iterations", "samples", "samples_seed")
    return {k: new for k, (_, new) in ladd.diff(recipe, TOY).items() if k not in budget}


BASE = Ablation(**vars(TOY))  # the validated recipe
SWEEPS = {  # field: {name of the setting: value}
    "misaligned_weight": {"no-misaligned-pairs": 0.0},
    "anchor_weight": {"no-anchor": 0.0},
    "penalty_weight": {"no-penalty": 0.0},
    "renoise_mean": {"renoise-low": -1.0, "renoise-high": 1.0},
    "renoise_std": {"renoise-narrow": 1.0},
    "backward_simulation": {"no-backward-simulation": False},  # x0 is then noised
    "heads_see_t": {"heads-not-told-t": False},
    "share_noise": {"noise-not-shared": False},
    "paired_share": {"paired-0": 0.0, "paired-1": 1.0},  # at 0 nothing is left to the squared error
    "distill_own": {"no-own-target": False},
    "adv_weight": {"adversarial-0": 0.0, "adversarial-1": 1.0},
    "loss": {"relativistic": "relativistic", "non-saturating": "nonsaturating"},
    "head_width": {"heads-narrow": 64},
    "head_lr": {"lr-ratio-2": 2 * TOY.student_lr, "lr-ratio-20": 20 * TOY.student_lr},
    "time_probs": {"times-uniform": (0.25,) * 4},
    "taps": {"taps-encoder": TAPS[:2], "taps-middle": TAPS[2:3], "taps-decoder": TAPS[3:]},
    "samples": {"samples-1000": 1000, "samples-50000": 50_000},
    "guidance": {"guidance-1": 1.0, "guidance-4": 4.0},
    "gen_every": {"gen-every-3": 3, "gen-every-5": 5},  # as many iterations: fewer updates
    "batch": {"batch-2": 2, "batch-16": 16},  # as many iterations: fewer samples, and less time
    "ema_half_life": {"no-average": 0.0},
    "real": {"real-data": "data"},  # it needs MNIST
    "exact_r1": {"exact-r1": 0.1},  # an iteration takes thrice as long
}
CHANGES = {name: {k: v} for k, values in SWEEPS.items() for name, v in values.items()}
CHANGES |= {"wasserstein": {"loss": "wasserstein", "gradient_penalty": 1.0}}
CHANGES["ladd"] = departures(RECIPES["ladd"])
# The paper's method: hinge, its times and probabilities, t_hat ~ LogitNormal(1, 1) drawn for each
# side by itself, the adversarial loss alone. The paper gives no learning rates, heads or average.
PAPER = departures(ToyRecipe(taps=TAPS, warmup=50, share_noise=False))
ABLATIONS = [
    Setting("baseline", "ablations", {}, "the validated recipe"),
    *[Setting(name, "ablations", changes) for name, changes in CHANGES.items()],
    Setting("heads-normed", "ablations", {}, "GroupNorm, SiLU, no residual in the heads", "normed"),
    Setting("paper", "ablations", PAPER, "the paper's method", "normed"),
]

# What the report states for all of its experiments, and the samples of 1; else the paper's method.
REPORT = {**PAPER, "guidance": 4.0, "guidance_low": 0.0, "guidance_high": 1.0, "samples": 10_000}
REPORT |= {"student_lr": 1e-4, "head_lr": 5e-5, "adv_weight": 0.1, "distill_weight": 1.0}
NINE = ("enc.0", "enc.1", "enc.2", "enc.3", "mid.1", "dec.0", "dec.1", "dec.2", "dec.3")
NOTES = {  # on each experiment: what is kept, what is not, what the report leaves open
    1: "kept: five small heads on early features; not kept: 1x1 convolutions with pooling",
    2: "kept: four heads of 7.6M in all (there 7.4M), a warm-up of adv_weight; open: taps, warm-up",
    4: "kept: nine heads of 5.0M in all (there 5.1M); not kept: spectral norm; open: samples, taps",
    5: "as 4, with five heads (2.8M, on the baseline's taps)",
    6: "kept: noise stored and given to the student, heads of 2.5M (there 2.6M); open: their taps",
}


def experiment(number, rescue=("paired_share", 1.0), **changes):
    """An experiment of the report, and the same with one change to save it."""
    name, changes = f"experiment-{number}", {**REPORT, **changes}
    yield Setting(name, "experiments", changes, NOTES[number], "normed")
    rescued = {**changes, rescue[0]: rescue[1]}
    yield Setting(f"{name}-rescue", "experiments", rescued, "", "normed", name)


EXPERIMENTS = [
    *experiment(1, taps=("stem", *NINE[:4]), head_width=16),
    *experiment(2, taps=TAPS[:4], head_width=280, adv_warmup=75),
    *experiment(4, taps=NINE, head_width=144),
    *experiment(5, head_width=144),
    *experiment(6, ("head_lr", 1e-3), head_width=136, paired_share=1.0),
]

CLEAN = {"renoise_mean": -10.0, "renoise_std": 0.0}  # t_hat = sigmoid(-10): no noise
ADD = {**PAPER, **CLEAN, "exact_r1": 1e-5, "warmup": 0, "time_probs": (0.25,) * 4}
ADD |= {"student_lr": TOY.student_lr, "head_lr": TOY.head_lr, "score_weight": 2.5}
PEERS = [
    Setting("teacher@50", "peers", {}, "on students' noise", "Euler on EDM's grid", steps=(50,)),
    *[Setting(f"teacher, {name}", "peers", {}, world=name) for name in SAMPLERS],
    Setting("regression", "peers", {"adv_weight": 0.0, "paired_share": 1.0}, "no adversarial loss"),
    Setting("add", "peers", ADD, "ADD, with the baseline's learning rates", "add", "paper"),
    Setting("add-sds", "peers", {**ADD, "score_weighting": "sds"}, "", "add", "add"),
    Setting("add-nfsd", "peers", {**ADD, "score_weighting": "nfsd"}, "", "add", "add"),
    Setting("classifier-heads", "peers", CLEAN, "the baseline on ADD's features", "add"),
]

SETTINGS = {setting.name: setting for setting in (*ABLATIONS, *EXPERIMENTS, *PEERS)}
