"""A made-up world for the tests: three small blocks as teacher, a table of random samples."""

import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ladd

SHAPE, COND, N = (4, 8, 8), 3, 48
TAPS = ("first", "second")
CPU = torch.device("cpu")


class Block(nn.Module):
    """A convolution plus a bias per sample, made from (t, cond)."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, 1)
        self.bias = nn.Linear(COND + 1, outside)

    def forward(self, x, embedding):
        return self.conv(x) + self.bias(embedding)[:, :, None, None]


class Net(nn.Module):
    """velocity(x_t [B, 4, 8, 8], t [B], cond [B, 3]); taps: [B, 8, 8, 8] and [B, 16, 4, 4]."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.first = Block(SHAPE[0], 8, 1)
            self.second = Block(8, 16, 2)
            self.third = Block(16, 8, 1)
            self.out = nn.Conv2d(8, SHAPE[0], 3, 1, 1)

    def forward(self, x, t, cond):
        embedding = torch.cat([t[:, None].to(cond), cond], 1)
        a = torch.tanh(self.first(x, embedding))
        b = torch.tanh(self.third(torch.tanh(self.second(a, embedding)), embedding))
        return self.out(a + F.interpolate(b, scale_factor=2.0))


class World(ladd.World):
    """Samples whose condition names them: cond[:, 0] is the place in the table, divided by N."""

    def __init__(self, recipe=None, seed=0):
        super().__init__(Net(seed).eval().requires_grad_(False), recipe or make_recipe())
        gen = torch.Generator().manual_seed(seed)
        blobs = torch.randn(N, SHAPE[0], 1, 1, generator=gen)
        self.x0 = torch.randn(N, *SHAPE, generator=gen) * 0.5 + blobs
        self.noise = torch.randn(N, *SHAPE, generator=gen)
        self.real = self.x0
        k = torch.arange(N).to(self.x0) / N
        self.cond = torch.stack([k, (6 * k).sin(), (9 * k).cos()], 1)
        self.seed = seed
        self.reads = []
        self.collapse = []

    def head_cond(self, cond):
        return 2 * cond - 1

    def batch(self, start, count):
        self.reads.append((start, count))
        index, _ = ladd.reader_indices(N, start, count, self.seed)
        noise = None if self.noise is None else self.noise[index]
        return self.x0[index], self.cond[index], noise, self.real[index]

    def fingerprint(self):
        return {"tiny": self.seed}

    def evaluate(self, student, run, step):
        """An evaluation that changes the global generator, as a careless one would."""
        torch.manual_seed(step)
        x = ladd.sample_euler(student, torch.randn(4, *SHAPE), [1, 0.5], self.cond[:4])
        ladd.write_json(run / f"samples/{step}.json", x.tolist())  # in the place of a grid
        return {"spread": float(x.std()), "score": float(x.std()), "collapse": self.collapse}


class Recorder:
    """A velocity that keeps what it was called with."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def __call__(self, x, t, cond):
        self.calls.append((x.clone(), t.clone(), cond))
        return self.velocity(x, t, cond)

    def times(self):
        assert all(len(set(t.tolist())) == 1 and len(t) == len(x) for x, t, _ in self.calls)
        return [float(t[0]) for _, t, _ in self.calls]


def make_recipe(**changes):
    """A short recipe with taps; changes are fields."""
    fields = dict(iterations=100, batch=16, taps=TAPS, head_width=8, warmup=2, lr_warmup=0)
    return ladd.Recipe(**{**fields, "lr_decay": "none", **changes})


def make_state(world, recipe):
    return ladd.State(world, recipe, CPU, torch.float32)


def normal(seed, *shape, **options):
    """Unit noise by a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **options)


def rows(cond):
    """The places in the table that conditions [B, 3] name."""
    return (cond[:, 0] * N).round().long()


def run_steps(state, world, recipe, iterations, micro_batch=None, losses=None):
    """Some iterations; the metrics of each, as floats."""
    made = [ladd.train_step(state, world, recipe, i, micro_batch, losses) for i in iterations]
    return [{k: float(v) for k, v in metrics.items()} for metrics in made]


class Spy:
    """Runs an iteration with the recipe's own losses, and keeps the batches that they are given."""

    def __init__(self):
        self.batches = []

    def heads_loss(self, state, world, recipe, b, real, fake):
        assert not any(m.requires_grad for m in [*real, *fake])
        self.batches.append(b)
        return ladd.heads_loss(state, world, recipe, b, real, fake)

    def step(self, state, world, recipe, i, micro_batch=None):
        losses = self.heads_loss, ladd.student_loss
        return run_steps(state, world, recipe, [i], micro_batch, losses)[0]

    def joint(self):
        """What the micro-batches held, put together: {field: tensor}."""
        fields = [vars(b) for b in self.batches]
        names = [k for k, v in fields[0].items() if torch.is_tensor(v)]
        return {k: torch.cat([f[k] for f in fields]) for k in names}


def not_finite(iterations, which=0, rank=0):
    """The recipe's losses: of the heads (0) or the student (1) not finite on a rank, at times."""
    losses = [ladd.heads_loss, ladd.student_loss]
    sound = losses[which]

    def poisoned(state, world, recipe, b, *maps):
        loss, metrics = sound(state, world, recipe, b, *maps)
        poison = ladd.rank() == rank and b.iteration in iterations
        return loss * (float("nan") if poison else 1.0), metrics

    losses[which] = poisoned
    return losses


def one_line(printed, *words):
    """The one line of what was printed that says what is wrong; it holds these words."""
    lines = [line for line in printed.splitlines() if line.startswith("ladd: ")]
    assert len(lines) == 1 and "Traceback" not in printed, printed
    assert all(word in lines[0] for word in words), lines[0]
    return lines[0]


def refused(capsys, code, *words):
    """Exit code 2, and one line alone on stderr, which holds these words."""
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    one_line(error, *words)


def start(main, *words):
    """The exit code of a command."""
    return ladd.run_command_line(main, [*map(str, words)])


def log_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kid_by_hand(x, y):
    """The unbiased squared MMD of features [n, D] under clean-fid's kernel (x.y / D + 1)^3."""
    n, apart = len(x), ~np.eye(len(x), dtype=bool)
    same = [((a @ a.T / a.shape[1] + 1) ** 3)[apart].sum() / (n * (n - 1)) for a in (x, y)]
    return sum(same) - 2 * ((x @ y.T / x.shape[1] + 1) ** 3).mean()


def as4d(t):
    return t.reshape(-1, 1, 1, 1)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def weights(module):
    """A copy of a module's parameters, flat."""
    return flat(module.parameters())


def grads(module):
    """A copy of each parameter's whole gradient, None where there is none."""
    found = [p.grad for p in module.parameters()]
    found = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
    return [None if g is None else g.detach().clone() for g in found]


def record_grads(state):
    """The gradients with which both optimizers step from here on, one list per step."""
    seen = {"heads": [], "student": []}
    for name, steps in seen.items():
        module, opt = getattr(state, name), getattr(state, name + "_opt")
        opt.register_step_pre_hook(lambda *_, m=module, steps=steps: steps.append(grads(m)))
    return seen


def everything(state):
    """All that a state holds, in one flat dict: student, heads, average, both optimizers."""
    out = {}
    for name in ("student", "heads"):
        module, opt = getattr(state, name), getattr(state, name + "_opt")
        out |= {f"{name}.{k}": v.detach().clone() for k, v in module.state_dict().items()}
        for k, p in module.named_parameters():
            slots = opt.state.get(p, {}).items()
            out |= {f"{name}_opt.{k}.{s}": torch.as_tensor(v).detach().clone() for s, v in slots}
    return out | {f"ema.{k}": v.clone() for k, v in enumerate(state.ema.mean)}


def same(a, b):
    """Are two such dicts equal bit for bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
