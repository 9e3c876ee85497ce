"""The toy world: what `python ladd.py --toy` gives to the method, and what it draws and writes at the end."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image
from tqdm import tqdm

import ladd
from ladd import note
from toy_mnist import report, variants
from toy_mnist.edm import CUNet, EDMVelocity, null_cond, time_grid
from toy_mnist.judge import WEIGHTS, Judge, describes

NAME = "toy"
SHAPE = (3, 28, 28)
CHUNK = 250                 # images sampled at once
PART = 500                  # images of the teacher's between two writes of its cache


@dataclasses.dataclass(frozen=True)
class ToyRecipe(ladd.Recipe):
    """The core's recipe, the teacher's samples, and what `variants.py` adds to the paper's losses (off by default)."""

    samples: int = note(3000, "samples of the teacher to learn from", 2, 10 ** 7)
    samples_seed: int = note(1, "keys the noise and the labels of those samples", 0, 2 ** 31)
    teacher_steps: int = note(50, "Euler steps of the teacher on EDM's grid", 1, 1000)
    guidance: float = note(1.3, "its classifier-free guidance w (1 = none)", 0, 100)
    guidance_low: float = note(0.2, "guidance holds from this t ...", 0, 1)
    guidance_high: float = note(0.8, "... to this t", 0, 1)
    loss: str = note("hinge", "the adversarial game", choices=tuple(variants.LOSSES))
    gradient_penalty: float = note(0.0, "weight of the gradient penalty of loss = wasserstein", 0, 1e6)
    distill_weight: float = note(0.0, "weight of the squared error to x0, the sample that the stored noise led to", 0, 1e6)
    distill_below: float = note(0.99, "... for times t up to this one (1 = all: that needs paired_share or distill_fresh)", 0, 1)
    distill_power: float = note(0.0, "... divided by t to this power (2 = the squared error of the velocity)", 0, 4)
    distill_fresh: int = note(0, "... and for fresh noise to where the teacher goes from the student's first step, by Euler steps of at most 1 / this (0 = no such target)", 0, 1000)
    approximate_r1: float = note(0.0, "weight of approximate R1 on the re-noised sample", 0, 1e6)
    approximate_r1_std: float = note(0.01, "noise of approximate R1", 1e-6, 1)
    misaligned: float = note(0.0, "weight of real samples with a wrong condition as fakes", 0, 1e6)
    score_weight: float = note(0.0, "weight of ADD's score distillation", 0, 1e6)
    score_weighting: str = note("exponential", "its weighting over t", choices=("exponential", "sds", "nfsd"))
    backward_simulation: bool = note(False, "train t < 1 on what the student itself makes on its way down")

    def __post_init__(self):
        super().__post_init__()
        if self.distill_weight and self.distill_below >= 1 and not (self.paired_share or self.distill_fresh):
            raise ladd.UserError(f"distill_below = {self.distill_below}: at t = 1 a fresh noise says nothing of x0; give 0.99, a paired_share or distill_fresh")
        if self.distill_fresh and not (self.distill_weight and self.backward_simulation and len(self.times) > 1):
            raise ladd.UserError(f"distill_fresh = {self.distill_fresh}: it needs a distill_weight, backward_simulation, which takes the student's first step, "
                                 "and a second time to take it to; or give distill_fresh 0, for none")
        if self.guidance_low > self.guidance_high:
            raise ladd.UserError(f"guidance_low = {self.guidance_low}, guidance_high = {self.guidance_high}: guidance would hold nowhere; "
                                 f"for none, give guidance 1")
        if self.loss == "wasserstein" and not self.gradient_penalty:
            raise ladd.UserError("loss = wasserstein: it has no bound without gradient_penalty; give that a weight, say 1")


TAPS = ("enc.1", "enc.3", "mid.1", "dec.1", "dec.3")
LENGTH = dict(iterations=500, batch=64, warmup=50, taps=TAPS)     # the paper's warm-up of 500 would be all of so short a run

# The paper's method: hinge, its times and probabilities, t-hat ~ LogitNormal(1, 1) drawn for each side by itself, and the
# adversarial loss alone. Learning rates, heads and the average are ours: the paper gives none.
PAPER = ToyRecipe(**LENGTH, share_noise=False)

# The validated recipe. Its departures from the paper: the README says what each of them is for.
TOY = ToyRecipe(**LENGTH, time_probs=(0.5, 0.2, 0.15, 0.15), student_lr=2e-4, head_lr=2e-3, heads_see_t=True,
                loss="relativistic", adv_weight=0.5, paired_share=0.5, distill_weight=1.0, distill_below=1.0, distill_power=2.0, distill_fresh=5,
                backward_simulation=True)
RECIPES = {"toy": TOY, "paper": PAPER}
REFERENCE = TOY


def add_arguments(group):
    group.add_argument("--judge-samples", type=int, default=2000, metavar="N", help="images behind each row of the table (default %(default)s)")
    group.add_argument("--fid", default="judge", choices=("judge", "inception"), help="whose features: the toy's judge, or clean-fid's Inception (downloads its weights; needs MNIST)")
    group.add_argument("--data-root", help="folder that holds MNIST/raw, for --fid inception (else LADD_DATA, else a download)")
    group.add_argument("--weights", default=str(WEIGHTS), metavar="DIR", help="folder of teacher and judge (default: the shipped ones)")


def make_world(recipe, options, device):
    return ToyWorld(recipe, options, device)


def load_teacher(folder, device):
    """(EDMVelocity, about) of the shipped teacher."""
    path = Path(folder) / "teacher.safetensors"
    tensors, about = ladd.load_weights(path, "toy teacher", "config")
    with describes(path):
        config = about["config"]
        velocity = EDMVelocity(CUNet(config["width"], config["emb"]), config["sigma_data"])
    ladd.fill(velocity.net, tensors, path)
    return velocity.to(device).eval().requires_grad_(False), about


class Counted:
    """A velocity that counts the images it is evaluated on; a guided pass shows each twice."""

    def __init__(self, velocity):
        self.velocity, self.images = velocity, 0

    def __call__(self, x_t, t, cond):
        self.images += len(x_t)
        return self.velocity(x_t, t, cond)


class ToyWorld(ladd.World):
    shape, cond_dim, early_exit, reference = SHAPE, 10, True, REFERENCE
    watched = 1000              # images of a judged point, for each of `watched_steps`

    def __init__(self, recipe, options, device):
        if not 200 <= options.judge_samples <= 10 ** 6:
            raise ladd.UserError(f"--judge-samples {options.judge_samples}: give 200 (fewer say nothing of 128 features) to 1,000,000")
        self.recipe, self.options, self.device = recipe, options, device
        self.teacher, self.about = load_teacher(options.weights, device)
        self.tap_root = self.teacher.net
        self.judge = Judge(options.weights, device, options.fid, options.data_root)
        self.class_share = self.judge.class_share

    # ---- what the method asks for ------------------------------------------------------------------------------------

    def head_cond(self, label):
        return F.one_hot(label, 10).float()

    def read(self, start, count):
        index, _ = ladd.reader_indices(self.recipe.samples, start, count, self.recipe.seed)
        return self.x0[index], self.labels[index], self.noise[index]

    def terms(self):
        return variants.terms(self.recipe, self)

    def fingerprint(self):
        """What the samples were made of: equal fingerprints, equal samples, but for the rounding of another kind of device."""
        keys = ("samples", "samples_seed", "teacher_steps", "guidance", "guidance_low", "guidance_high")
        return {"teacher": self.about["sha256"], "class_share": self.class_share, **{k: getattr(self.recipe, k) for k in keys}}

    # ---- the teacher's samples ---------------------------------------------------------------------------------------

    def draw_noise(self, n, *key):
        """n keyed pairs of unit noise [n, 3, 28, 28] and labels [n], these as frequent as in MNIST."""
        gen = ladd.generator(*key)
        return torch.randn(n, *SHAPE, generator=gen), torch.multinomial(torch.tensor(self.class_share), n, True, generator=gen)

    def sample_teacher(self, velocity, noise, label):
        return ladd.sample_euler(self.guide(velocity), noise, time_grid(self.recipe.teacher_steps), label)

    def guide(self, velocity):
        """The velocity under the recipe's guidance."""
        r = self.recipe
        return ladd.guided(velocity, null_cond, r.guidance, (r.guidance_low, r.guidance_high))

    def prepare(self):
        """The teacher's samples, from the cache or made now; the time that the run will take is printed first."""
        self.print_budget(cached=self.cache_path("samples").with_suffix(".json").exists())
        n, judged = self.recipe.samples, self.options.judge_samples
        self.x0, self.labels, self.noise, self.teacher_cost = self.teacher_samples("samples", n)
        self.more = self.teacher_samples(f"samples-{n}-{judged}", judged - n)[:2] if judged > n else None

    def teacher_samples(self, name, n):
        """n of the teacher's samples: x0 [n, ...], labels [n], noise [n, ...] that each was made from, {nfe, ms_per_image}.

        Cached under `name` by a fingerprint of what made them; name keys their noise too.
        """
        path, made_of = self.cache_path(name), {**self.made_of(), "samples": n}
        noise, labels = self.draw_noise(n, self.recipe.samples_seed, name)

        def read(path, count):
            tensors, about = ladd.load_weights(path, "toy samples", "made_of", "cost")
            with describes(path):
                x0, cost = tensors["x0"].float(), {k: float(about["cost"][k]) for k in ("nfe", "ms_per_image")}
            if about["made_of"] != made_of or x0.shape != (count, *SHAPE):
                raise ladd.UserError(f"{path}: made by other settings than this run's; delete it to have it made again")
            return x0, cost
        if path.with_suffix(".json").exists():
            x0, cost = read(path, n)
            return x0, labels, noise, cost
        parts, files = [], []
        for i in tqdm(range(0, n, PART), desc="sample teacher"):    # part by part, so that a kill loses one at most
            files.append(path.with_name(f"{path.stem}.part-{i}-{min(n, i + PART)}.safetensors"))
            if not files[-1].with_suffix(".json").exists():
                x0, cost = self.run_sampler(self.sample_teacher, self.teacher, noise[i:i + PART], labels[i:i + PART], "part")
                ladd.save_weights(files[-1], {"x0": x0}, {"kind": "toy samples", "made_of": made_of, "cost": cost})
            parts.append(read(files[-1], min(n, i + PART) - i))
        x0 = torch.cat([x for x, _ in parts])
        cost = {k: sum(len(x) * c[k] for x, c in parts) / n for k in parts[0][1]}
        ladd.save_weights(path, {"x0": x0}, {"kind": "toy samples", "made_of": made_of, "cost": cost})
        for file in files:
            file.with_suffix(".json").unlink(), file.unlink()
        return x0, labels, noise, cost

    def made_of(self):
        """The fingerprint and the kind of device: so a cache never changes what a run on this device computes."""
        return {**self.fingerprint(), "device": self.device.type}

    def cache_path(self, name):
        digest = hashlib.sha256(json.dumps(self.made_of(), sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.options.out) / "cache" / f"{name}-{digest}.safetensors"

    def run_sampler(self, sampler, velocity, noise, label, desc):
        """sampler(velocity, noise, label) over all noise, in chunks: images [N, 3, 28, 28] on the CPU, {nfe, ms_per_image}."""
        counted, parts, began = Counted(velocity), [], time.time()
        for i in tqdm(range(0, len(noise), CHUNK), desc=desc, leave=False):
            parts.append(sampler(counted, noise[i:i + CHUNK].to(self.device), label[i:i + CHUNK].to(self.device)).cpu())
        n = len(noise)
        return torch.cat(parts).clamp(-1, 1), {"nfe": round(counted.images / n, 2), "ms_per_image": (time.time() - began) / n * 1e3}

    def print_budget(self, cached):
        """Time one pass of the network and say how long each stage should take on this machine."""
        noise, label = self.draw_noise(64, 0, "budget")
        x, t, label = noise.to(self.device), torch.full((64,), 0.5, device=self.device), label.to(self.device)
        with torch.no_grad():
            self.teacher(x, t, label)
            began = time.time()
            for _ in range(3):
                float(self.teacher(x, t, label).sum())
        f, r = (time.time() - began) / 3 / 64, self.recipe
        more = max(0, self.options.judge_samples - r.samples)
        passes = lambda times: len(times) + sum(r.guidance != 1 and r.guidance_low <= t <= r.guidance_high for t in times)
        further = (1 - r.paired_share) * passes(variants.way_down(r.times[1], r.distill_fresh)) if r.distill_fresh else 0
        stages = {"teacher's samples": f * (more + (0 if cached else r.samples)) * passes(time_grid(r.teacher_steps)),
                  "distillation": f * r.iterations * r.batch * (6 + (6.5 + further) / r.gen_every),    # 12.5: heads included, as measured
                  "judging": f * self.options.judge_samples * 40 + 20}
        print("expected here: " + ", ".join(f"{k} {v / 60:.1f} min" for k, v in stages.items())
              + f"; together about {sum(stages.values()) / 60:.0f} min")

    # ---- samples of the student, judged ------------------------------------------------------------------------------

    def sample_student(self, steps):
        return ladd.student_sampler(self.recipe, steps)

    def sample_grid(self, student, steps, key="grid"):
        """Ten columns, one per digit, six rows: images [60, 3, 28, 28]."""
        noise = torch.randn(60, *SHAPE, generator=ladd.generator(self.recipe.seed, key))
        return self.run_sampler(self.sample_student(steps), student, noise, torch.arange(60) % 10, "grid")[0]

    def watch(self, student, path):
        """A judged point of the run's curve, on noise and references that no report uses, and a grid."""
        noise, label = self.draw_noise(min(self.watched, self.options.judge_samples), self.recipe.seed, "curve")
        point = {}
        for steps in self.watched_steps():
            x, _ = self.run_sampler(self.sample_student(steps), student, noise, label, "judge")
            figures = self.judge(x, label, watch=True)
            point |= {f"{k}@{steps}": figures[k] for k in ("fid", "accuracy", "hue_entropy")}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.cat([self.sample_grid(student, s)[:20] for s in self.watched_steps()]), path, nrow=10, normalize=True, value_range=(-1, 1))
        tqdm.write(f"real {self.judge.watch_floor:.3g}  " + "  ".join(f"{k} {v:.3g}" for k, v in point.items() if not k.startswith("accuracy")))
        return point

    def signs(self, point):
        """Collapse as this world shows it, at the most steps reported: hues missing, or digits that cannot be read."""
        most = self.reported_steps()[0]
        limits = {f"hue_entropy@{most}": 0.95 * self.judge.hue_entropy, f"accuracy@{most}": 0.8}
        return [f"{k} {point[k]:.3f} is under {low:.3f}" for k, low in limits.items() if point[k] < low]

    def reported_steps(self):
        return [s for s in (4, 2, 1) if s <= len(self.recipe.times)]

    def watched_steps(self):
        return self.reported_steps()

    def draw_sample(self, run, steps):
        """--sample: a grid from a finished run."""
        path = run / "student.safetensors"
        if not path.exists():
            raise ladd.UserError(f"{path}: this run has no student yet; finish it by --resume --name {run.name}")
        student, _ = load_teacher(self.options.weights, self.device)
        ladd.fill(student.net, ladd.load_weights(path, "toy student")[0], path)
        target = run / f"sample-{steps}.png"
        save_image(self.sample_grid(student, steps, "sample"), target, nrow=10, normalize=True, value_range=(-1, 1))
        print(target)
        return 0

    def save_student(self, path, student, **about):
        ladd.save_weights(path, student.net.state_dict(), {"kind": "toy student", "config": self.about["config"],
                                                           "recipe": dataclasses.asdict(self.recipe), **about})

    def score(self, point):
        """How good a judged point is, less is better: the mean FID over the step counts."""
        return sum(v for k, v in point.items() if k.startswith("fid@")) / len(self.reported_steps())

    def draw_start(self, path):
        report.draw_start(self, path)

    def finish(self, run, student, changed):
        """The end of a run: the student's weights, the table, report.json, report.md and report.png."""
        self.save_student(run / "student.safetensors", student)
        report.write(self, run, student, changed)
