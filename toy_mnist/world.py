"""The toy world: what `python ladd.py --toy` distils, and how its student is judged."""

import dataclasses
import functools
import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from torchvision.utils import save_image

import ladd
from toy_mnist import progress, report
from toy_mnist.data import ColorMNIST, load_mnist
from toy_mnist.edm import CUNet, EDMVelocity, null_cond, time_grid
from toy_mnist.judge import WEIGHTS, Judge, load_file

SHAPE = (3, 28, 28)
CHUNK = 250  # images sampled at once
PART = 500  # samples of the teacher between two writes of the cache
CURVE = 1000  # images behind each judged point of a run's curve
UNSEEN = 22_000  # `--real data` shows MNIST's digits from here on; the judge has those before


@dataclasses.dataclass(frozen=True)
class ToyRecipe(ladd.Recipe):
    """The core's recipe, and what the teacher's samples are made of."""

    samples: int = ladd.field(3000, "samples of the teacher to learn from", least=2)
    samples_seed: int = ladd.field(1, "keys the noise and the labels of those samples")
    teacher_steps: int = ladd.field(50, "Euler steps of the teacher on EDM's grid", least=1)
    guidance: float = ladd.field(1.3, "its classifier-free guidance w (1 = none)")
    guidance_low: float = ladd.field(0.2, "guidance holds from this t")
    guidance_high: float = ladd.field(0.8, "guidance holds up to this t")
    real: str = ladd.field("teacher", "shown as real: its samples or MNIST's", ("teacher", "data"))


TAPS = ("enc.1", "enc.3", "mid.1", "dec.1", "dec.3")
OWN = {"taps": TAPS, "renoise_mean": 0.0, "head_width": 128, "head_lr": 2e-3}
OWN["ema_half_life"] = 20_000.0

# The default. The README says what each departure from the paper is for.
TOY = ToyRecipe(**ladd.GAME, **ladd.TARGETS, **OWN, iterations=850, student_lr=2e-4)
# LADD proper: the game and the anchor, without stored noise or regression to a sample.
MORE = {"iterations": 1500, "samples": 10_000, "student_lr": 1e-4, "lr_decay": "both"}
RECIPES = {"toy": TOY, "ladd": ToyRecipe(**ladd.GAME, **OWN, **MORE)}
OPTIONS = ladd.Options()


def add_arguments(group):
    add = group.add_argument
    add("--judge-samples", type=int, default=2000, help="images behind a row (%(default)s)")
    add("--gif", action="store_true", help="make training.gif of the sample grids of the run")
    add("--data-root", metavar="DIR", help="of MNIST/raw, for real = data (else LADD_DATA, ./data)")
    add("--weights", default=WEIGHTS, metavar="DIR", help="folder of teacher and judge")


def make_world(recipe, options, device):
    ladd.check(ladd.world_size() == 1, "--toy: it trains in one process; leave torchrun out")
    world = ToyWorld(recipe, options, device)
    noise, label = world.draw_noise(1, "taps")  # unknown taps are refused now, not after sampling
    world.features(noise.to(device), torch.ones(1, device=device), label.to(device))
    return world


def load_teacher(folder, device, dtype=torch.float32):
    """(EDMVelocity, about) of folder/teacher.safetensors, frozen. dtype: for its network."""
    tensors, about = load_file(folder, "teacher")
    config = about["config"]
    net = CUNet(config["width"], config["emb"])
    net.load_state_dict(tensors)
    velocity = EDMVelocity(net, config["sigma_data"], dtype)
    return velocity.to(device).eval().requires_grad_(False), about


class Samples(NamedTuple):
    """Samples of the teacher, on the CPU."""

    x0: torch.Tensor  # [n, 3, 28, 28] in [-1, 1]
    label: torch.Tensor  # [n]
    noise: torch.Tensor  # [n, 3, 28, 28] that each x0 was made from
    cost: dict  # {"nfe", "ms_per_image"}


class ToyWorld(ladd.World):
    """Teacher, samples and judge of Color-MNIST. A condition is a label, 0 to 9."""

    reference = TOY

    def __init__(self, recipe, options, device):
        n = options.judge_samples
        ladd.check(n >= 200, f"--judge-samples {n}: give at least 200, for 128 features")
        self.options, self.device = options, torch.device(device)
        dtype = getattr(torch, options.dtype)
        teacher, self.about = load_teacher(options.weights, self.device, dtype)
        super().__init__(teacher, recipe)
        self.judge = Judge(options.weights, self.device)

    def features(self, x_t, t, cond):
        return ladd.tapped(self.teacher.net, self.recipe.taps, lambda: self.teacher(x_t, t, cond))

    def anchor(self, x_t, t, label):
        return self.guide(self.teacher)(x_t, t, label)

    def head_cond(self, label):
        return F.one_hot(label, 10).float()

    def batch(self, start, count):
        x0, label, noise, _ = self.samples
        index, _ = ladd.reader_indices(len(x0), start, count, self.recipe.seed)
        real = x0[index] if self.recipe.real == "teacher" else self.digits(start, label[index])
        return x0[index], label[index], noise[index], real

    def digits(self, start, label):
        """For each label [B] one of MNIST's digits, by the place in the reader, painted once."""
        found = self.data.label[UNSEEN:]
        keys = range(start, start + len(label)), found.shape, self.recipe.seed, "digit"
        scores = ladd.keyed_noise(*keys).masked_fill(label[:, None] != found, -torch.inf)
        return self.data.batch(UNSEEN + scores.argmax(1), epoch=0)[0]

    def guide(self, velocity):
        """A velocity under the recipe's guidance."""
        r = self.recipe
        return ladd.guided(velocity, null_cond, r.guidance, (r.guidance_low, r.guidance_high))

    def fingerprint(self):
        """What the samples are made of. Equal fingerprints: equal samples, but for rounding."""
        names = [f.name for f in dataclasses.fields(ToyRecipe)]
        own = {k: getattr(self.recipe, k) for k in names if not hasattr(ladd.Recipe, k)}
        del own["real"]  # which no sample depends on
        shares = self.judge.class_share  # the labels are drawn by them
        return {"teacher": self.about["sha256"], "class_share": shares, **own}

    @functools.cached_property
    def samples(self):
        """What the student learns from: made, or read from the cache, at the first batch."""
        if self.recipe.real == "data":  # only training needs MNIST, and misses it before sampling
            self.data = ColorMNIST(*load_mnist(self.options.data_root), self.recipe.samples_seed)
        return self.teacher_samples("samples", self.recipe.samples)

    def draw_noise(self, n, *key):
        """Keyed unit noise [n, 3, 28, 28], and labels [n] as frequent as in MNIST."""
        gen = ladd.generator(*key)
        shares = torch.tensor(self.judge.class_share)
        return torch.randn(n, *SHAPE, generator=gen), shares.multinomial(n, True, generator=gen)

    def sample_teacher(self, velocity, noise, label, index=None):
        times = time_grid(self.recipe.teacher_steps)
        return ladd.sample_euler(self.guide(velocity), noise, times, label)

    def cache_path(self, name):
        """The folder of samples, named by what decides them."""
        made_of = {**self.fingerprint(), "device": self.device.type, "dtype": self.options.dtype}
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return Path(self.options.out).expanduser() / "cache" / f"{name}-{digest[:16]}"

    def teacher_samples(self, name, n):
        """n `Samples` of the teacher. name keys their noise, and is part of the cache's folder.

        They are made and cached part by part, so a kill loses one part at most. Of two runs that
        need them at once, one makes them and the other waits.
        """
        folder = self.cache_path(name)
        folder.mkdir(parents=True, exist_ok=True)
        noise, label = self.draw_noise(n, self.recipe.samples_seed, name)
        parts = []
        with FileLock(folder / ".lock"):
            for index in progress(torch.arange(n).split(PART), "sample the teacher"):
                path = folder / f"{int(index[0]):07d}.safetensors"
                if not path.exists():
                    sampler, own = self.sample_teacher, (noise[index], label[index])
                    x0, cost = self.run_sampler(sampler, self.teacher, *own, "part")
                    ladd.save_weights(path, {"x0": x0}, {"kind": "toy samples", "cost": cost})
                tensors, about = ladd.load_weights(path, "toy samples")
                parts.append((tensors["x0"], about["cost"]))
        cost = {k: sum(len(x) * c[k] for x, c in parts) / n for k in ("nfe", "ms_per_image")}
        return Samples(torch.cat([x for x, _ in parts]), label, noise, cost)

    def run_sampler(self, sampler, velocity, noise, label, name):
        """sampler(velocity, noise, label, index), chunk by chunk: images on the CPU, cost."""
        images, passes, began = [], [], time.time()

        def counted(x_t, t, cond):
            passes.append(len(x_t))  # a guided step makes two
            return velocity(x_t, t, cond)

        for index in progress(torch.arange(len(noise)).split(CHUNK), name, leave=False):
            z, y = noise[index].to(self.device), label[index].to(self.device)
            images.append(sampler(counted, z, y, index).clamp(-1, 1).cpu())
        ms = (time.time() - began) / len(noise) * 1e3
        return torch.cat(images), {"nfe": sum(passes) / len(noise), "ms_per_image": ms}

    def reported_steps(self):
        return [s for s in (4, 2, 1) if s <= len(self.recipe.times)]

    def sample_student(self, steps):
        """The student's sampler with so many steps, for `run_sampler`."""
        return lambda v, z, y, index: ladd.sample_student(v, self.recipe, z, y, steps, index)

    def sample_grid(self, velocity, sampler, rows=6, key="grid"):
        """Ten columns, one per digit: images [10 rows, 3, 28, 28], always from the same noise."""
        noise = torch.randn(10 * rows, *SHAPE, generator=ladd.generator(self.recipe.seed, key))
        return self.run_sampler(sampler, velocity, noise, torch.arange(10 * rows) % 10, key)[0]

    def evaluate(self, student, run, step):
        """Judge 1,000 images per number of steps, on noise and real images that no report uses."""
        n = min(CURVE, self.options.judge_samples)
        noise, label = self.draw_noise(n, self.recipe.seed, "curve")
        metrics, grids = {}, []
        for steps in self.reported_steps():
            sampler = self.sample_student(steps)
            x, _ = self.run_sampler(sampler, student, noise, label, "judge")
            figures = self.judge(x, label, curve=True)
            metrics |= {f"{k}@{steps}": v for k, v in figures.items()}
            grids.append(self.sample_grid(student, sampler, rows=2))
        draw(torch.cat(grids), run / "samples" / f"{step:07d}.png")
        ladd.print0(f"iteration {step}  " + "  ".join(f"{k} {v:.3g}" for k, v in metrics.items()))
        distances = [v for k, v in metrics.items() if k.startswith("fid@")]
        most = self.reported_steps()[0]  # one step may be poor for long
        least = {f"hue_entropy@{most}": 0.95 * self.judge.hue_entropy, f"accuracy@{most}": 0.8}
        low = {k: v for k, v in least.items() if metrics[k] < v}
        signs = [f"{k} {metrics[k]:.3f} is under {v:.3f}" for k, v in low.items()]
        return {**metrics, "score": sum(distances) / len(distances), "collapse": signs}

    def save(self, student, run, name="student"):
        about = {"kind": "toy student", "config": self.about["config"]}
        about["recipe"] = dataclasses.asdict(self.recipe)
        ladd.save_weights(run / f"{name}.safetensors", student.net.state_dict(), about)

    def finish(self, student, run):
        self.save(student, run)
        report.write(self, run, student)

    def sample(self, run, steps):
        """--sample: a grid from a finished run."""
        done = (run / "student.safetensors").exists()
        ladd.check(done, f"--sample: {run} holds no finished student; train it, or --resume it")
        tensors, about = ladd.load_weights(run / "student.safetensors", "toy student")
        same = about["config"] == self.about["config"]
        ladd.check(same, f"--weights: {run} was trained from another teacher")
        student = self.make_student().eval()
        student.net.load_state_dict(tensors)
        picture = run / f"sample-{steps}.png"
        draw(self.sample_grid(student, self.sample_student(steps), key="sample"), picture)
        print(picture)


def draw(images, path):
    """Images [N, 3, 28, 28] in [-1, 1] as a PNG of ten columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path, nrow=10, normalize=True, value_range=(-1, 1))
