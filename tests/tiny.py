"""A made-up world for the tests: three small blocks as teacher, a table of random samples, everything keyed by a seed."""

import types

import torch
import torch.nn.functional as F
from torch import nn

import ladd

SHAPE, COND, N = (4, 8, 8), 3, 48


class Block(nn.Module):
    """Convolution plus a bias per sample from (t, cond)."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv, self.told = nn.Conv2d(inside, outside, 3, stride, 1), nn.Linear(COND + 1, outside)

    def forward(self, x, told):
        return self.conv(x) + self.told(told)[:, :, None, None]


class Net(nn.Module):
    """velocity(x_t [B, 4, 8, 8], t [B], cond [B, 3]); `first` gives maps [B, 8, 8, 8], `second` [B, 16, 4, 4]."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.first, self.second = Block(SHAPE[0], 8, 1), Block(8, 16, 2)
            self.third = Block(16, 8, 1)
            self.out = nn.Conv2d(8, SHAPE[0], 3, 1, 1)

    def forward(self, x, t, cond):
        told = torch.cat([t[:, None].to(cond), cond], 1)
        a = torch.tanh(self.first(x, told))
        b = torch.tanh(self.third(torch.tanh(self.second(a, told)), told))
        return self.out(a + F.interpolate(b, scale_factor=2.0))


class World(ladd.World):
    """Samples whose condition names them: cond[:, 0] is the sample's index in the table, divided by N."""

    shape, cond_dim = SHAPE, COND
    NAME = "tiny"

    def __init__(self, seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.teacher = Net(seed).eval().requires_grad_(False)
        self.tap_root = self.teacher
        self.x0 = torch.randn(N, *SHAPE, generator=gen) * 0.5 + torch.randn(N, SHAPE[0], 1, 1, generator=gen)
        self.noise = torch.randn(N, *SHAPE, generator=gen)
        k = torch.arange(N).to(self.x0) / N
        self.cond = torch.stack([k, (6 * k).sin(), (9 * k).cos()], 1)
        self.seed, self.reads, self.watched = seed, [], []
        self.extra = ladd.Terms()

    def head_cond(self, cond):
        return 2 * cond - 1

    def read(self, start, count):
        self.reads.append((start, count))
        index, _ = ladd.reader_indices(N, start, count, self.seed)
        return self.x0[index], self.cond[index], self.noise[index]

    def terms(self):
        return self.extra

    def watch(self, model, path):
        """A judged point that draws from the global generator, as a careless judge would."""
        x = ladd.sample_euler(model, torch.randn(4, *SHAPE), [1, 0.5], self.cond[:4])
        self.watched.append(path)
        return {"spread": float(x.std())}

    def score(self, point):
        return point["spread"]

    def save_student(self, path, student, **about):
        ladd.save_weights(path, student.state_dict(), {"kind": "tiny student", **about})


TAPS = ("first", "second")


def recipe(**changes):
    """A short recipe with taps; changes are fields."""
    fields = dict(iterations=100, batch=16, taps=TAPS, head_width=8, warmup=2, lr_warmup=0, lr_decay="none")
    return ladd.Recipe(**{**fields, **changes})


def state(world, r):
    return ladd.State(world, r, torch.device("cpu"))


def micro(world, r, i, rows=slice(None)):
    """Iteration i's joint batch as the core's `gradients` takes it."""
    x0, cond, noise = world.read(i * r.batch, r.batch)
    joint = {**ladd.draw(r, i, world.shape), "x0": x0, "cond": cond, "noise": noise}
    return ladd.Pass(**{k: v[rows] for k, v in joint.items()})


def run_steps(s, world, r, iterations, terms=None, micro_batch=None):
    """Some iterations; the metrics of each."""
    return [ladd.step(s, world, r, terms or world.terms(), i, torch.device("cpu"), micro_batch) for i in iterations]


def weights(module):
    """A copy of a module's parameters, flat."""
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def grads(module):
    return [None if p.grad is None else p.grad.detach().clone() for p in module.parameters()]


def everything(s):
    """All that a state holds, as a flat dict of tensors: student, heads, average, both optimizers."""
    out = {}
    for name in ("student", "heads"):
        module, opt = getattr(s, name), getattr(s, name + "_opt")
        out |= {f"{name}.{k}": v.detach().clone() for k, v in module.state_dict().items()}
        for k, p in module.named_parameters():
            out |= {f"{name}_opt.{k}.{word}": torch.as_tensor(v).detach().clone() for word, v in opt.state.get(p, {}).items()}
    return out | {f"ema.{k}": v.clone() for k, v in enumerate(s.ema.mean)}


def same(a, b):
    """Two such dicts are equal bit for bit."""
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])] == []


def options(**changes):
    """What `ladd.train` reads of the command line."""
    return types.SimpleNamespace(**{**dict(log=None, resume=False, compile=False, micro_batch=None, log_every=1, evaluate_every=0,
                                           checkpoint_every=2, keep=2, least_diversity=0.0, stop_on_collapse=False), **changes})
