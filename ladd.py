"""ladd: Latent Adversarial Diffusion Distillation (LADD, Sauer et al., arXiv 2403.12015) in one file.

LADD turns a many-step diffusion or flow teacher into a student that needs 1 to 4 steps. The student guesses the clean
sample x0 in one step from any of a few noise levels; real samples (here: the teacher's own) and guesses are noised again and
shown to the frozen teacher; small heads on the teacher's inner features learn to tell the two apart, and the student learns
to leave them no difference to find. Nothing is decoded to pixels, and the discriminator's body is the teacher itself.

    python ladd.py --toy                 distil the shipped Color-MNIST teacher on this machine, and print an honest table
    python ladd.py --toy --help          every option, with its meaning
    torchrun --nproc_per_node=8 ladd.py --zimage --data DIR      distil Z-Image (6B) on data that zimage.precompute made

This file is the method; a world (toy_mnist/, zimage/) brings teacher, data and judge: see `World`. Read it from top to bottom: flow
maths, samplers, taps, heads, losses, recipe, draws, ranks, one iteration, files, loop, command line. Where the core itself departs from the
paper the line says DEPARTURE; what a world's recipe adds stands in that world. The README lists all of it.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class UserError(Exception):
    """Bad input: one line that names the field, the value and the way out. The command line prints it and exits with 2."""


class Stopped(UserError):
    """Ended by Ctrl-C or SIGTERM, and saved. The command line exits with 130."""


class Diverged(UserError):
    """Three updates in a row had a non-finite gradient."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Flow matching. Conventions, stated once and used everywhere:
#    t in [0, 1], 0 = clean, 1 = noise;   x_t = (1-t) x0 + t eps;   v = eps - x0.
#    A model is velocity(x_t [B, ...], t [B], cond) -> v [B, ...], float32. Every other convention is converted in a world.
#    t is the time at which the student guesses; t-hat the one to which its guess, and a real sample, are noised again for the heads.
# ---------------------------------------------------------------------------------------------------------------------

def expand(t, like):
    """t [B] -> [B, 1, ..., 1], to broadcast over like [B, ...]. ValueError on any other shape."""
    if t.ndim != 1 or len(t) != len(like):
        raise ValueError(f"t must have shape [{len(like)}], one time per sample, but has {list(t.shape)}")
    return t.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x0, eps, t):
    """x_t = (1-t) x0 + t eps (rectified flow, arXiv 2209.03003). x0, eps [B, ...], t [B] -> [B, ...]"""
    t = expand(t, x0)
    return (1 - t) * x0 + t * eps


def velocity_to_x0(x_t, v, t):
    """The clean sample that x_t and v point to: x0 = x_t - t v. [B, ...], t [B]"""
    return x_t - expand(t, x_t) * v


def velocity_to_noise(x_t, v, t):
    """The noise that x_t and v point to: eps = x_t + (1-t) v. [B, ...], t [B]"""
    return x_t + (1 - expand(t, x_t)) * v


def x0_to_velocity(x_t, x0, t):
    """v = (x_t - x0) / t, for t > 0: the inverse of `velocity_to_x0`. [B, ...], t [B]"""
    return (x_t - x0) / expand(t, x_t)


def logit_normal(z, mean, std):
    """t = sigmoid(mean + std z) for standard normal z [B]: LADD's distribution of t-hat (SD3, arXiv 2403.03206)."""
    return torch.sigmoid(mean + std * z)


def guided(velocity, null_cond, w, interval=(0.0, 1.0)):
    """Classifier-free guidance (arXiv 2207.12598): a velocity that gives neg + w (pos - neg) by two passes; w = 1 is none, by one.

    null_cond(cond) -> the condition that stands for none. interval: guidance holds for t in [low, high] alone (limited
    interval, arXiv 2404.07724); outside it one conditional pass is made. Within a call all t must be equal (a sampler's are).
    """
    def velocity_w(x_t, t, cond):
        if w == 1 or not interval[0] - 1e-6 <= float(t[0]) <= interval[1] + 1e-6:      # t is float32
            return velocity(x_t, t, cond)
        pos, neg = velocity(x_t, t, cond), velocity(x_t, t, null_cond(cond))
        return neg + w * (pos - neg)
    return velocity_w


# ---------------------------------------------------------------------------------------------------------------------
# 2. Samplers: N times in, exactly N evaluations, and the last step lands on t = 0 (x0 itself, no noise left)
# ---------------------------------------------------------------------------------------------------------------------

def check_times(times):
    times = [float(t) for t in times]
    if not times or not all(0 < b < a <= 1 for a, b in zip(times, times[1:] + [times[-1] / 2])):
        raise ValueError(f"times must fall from at most 1 and stay above 0, got {times}")
    return times


@torch.no_grad()
def sample_euler(velocity, noise, times, cond):
    """Euler along the flow's ODE. noise [B, ...] of unit variance; times, say [1, .75, .5, .25]; -> x0 [B, ...]

    Starts at x_t = t noise for t = times[0]: at t = 1 that is the noise; EDM's grid starts at 80/81.
    """
    times = check_times(times)
    x = times[0] * noise
    for t, t_next in zip(times, times[1:] + [0.0]):
        v = velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), cond)
        x = x + (t_next - t) * v
    return x


@torch.no_grad()
def sample_renoise(velocity, noise, times, cond, renoise):
    """Consistency-style sampling (arXiv 2303.01469, algorithm 1): guess x0, noise it afresh to the next time, guess again.

    renoise: function of the step's number 1 .. N-1 -> fresh noise [B, ...].
    """
    times = check_times(times)
    x = times[0] * noise
    for k, t in enumerate(times):
        t = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        if k:
            x = interpolate(x0, renoise(k).to(x), t)
        x0 = velocity_to_x0(x, velocity(x, t, cond), t)
    return x0


def step_times(times, n):
    """The n of the student's times that an n-step sampler uses, from the first (1) on, as evenly as n divides them: 2 of 4 are [1, .5]."""
    if not 1 <= n <= len(times):
        raise UserError(f"--steps {n}: this student knows {len(times)} times {list(times)}; give 1 .. {len(times)}")
    return [times[k * len(times) // n] for k in range(n)]


def student_sampler(recipe, steps):
    """The recipe's sampler with so many steps: a function (velocity, noise [B, ...], cond) -> x0 [B, ...]."""
    times = step_times(recipe.times, steps)

    def sampler(velocity, noise, cond):
        if recipe.sampler == "euler":
            return sample_euler(velocity, noise, times, cond)
        key = float(noise.flatten()[0])                 # the fresh noise is keyed by the noise that the batch starts from
        fresh = lambda k: torch.randn(noise.shape, generator=generator(recipe.seed, "re-noise", k, key))
        return sample_renoise(velocity, noise, times, cond, fresh)
    return sampler


# ---------------------------------------------------------------------------------------------------------------------
# 3. Taps: read a network's inner features without touching its code
# ---------------------------------------------------------------------------------------------------------------------

class _Deepest(Exception):
    """Raised by the hook of the last tap: what lies deeper need not be computed."""


def tapped(root, names, forward, early_exit=True):
    """Run forward() and return the outputs of the modules `names` of `root`, in their order.

    Hooks store references and compute nothing; the first write wins where a module runs twice. With
    early_exit the pass ends at its last tap. The hooks are removed whatever happens. UserError names an unknown module.
    """
    modules, store, handles = dict(root.named_modules()), {}, []

    def hook_for(name):
        def hook(module, inputs, output):
            store.setdefault(name, output)
            if early_exit and len(store) == len(names):
                raise _Deepest
        return hook
    try:
        for name in names:
            if name not in modules:
                raise UserError(f"--taps: there is no module {name!r} in the teacher")
            handles.append(modules[name].register_forward_hook(hook_for(name)))
        with contextlib.suppress(_Deepest):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in names if name not in store]:
        raise UserError(f"--taps: {missing[0]!r} is never run by this teacher")
    return [store[name] for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Heads: one small convolutional discriminator per tap (LADD does not spell them out: an interpretation)
# ---------------------------------------------------------------------------------------------------------------------

def fourier(t, n=32):
    """Sines and cosines of t [B] in [0, 1], n frequencies from 1/4 to 64 turns. [B, 2n]"""
    phase = 2 * math.pi * t[:, None] * torch.logspace(-2, 6, n, base=2, device=t.device)
    return torch.cat([phase.cos(), phase.sin()], 1)


class Head(nn.Module):
    """A feature map [B, C, H, W] and an embedding [B, E] -> one logit per patch [B, h, w] (h = H / stride)."""

    def __init__(self, channels, width, emb, stride):
        super().__init__()
        self.norm0 = nn.GroupNorm(math.gcd(8, channels), channels)          # tapped features differ in scale by orders
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(8, width, affine=False)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width, affine=False)
        self.film, self.out = nn.Linear(emb, 4 * width), nn.Conv2d(width, 1, 1)

    def forward(self, f, emb):
        scale1, shift1, scale2, shift2 = self.film(emb)[:, :, None, None].chunk(4, dim=1)        # FiLM, [B, width, 1, 1]
        h = F.silu(self.norm1(self.conv1(self.norm0(f))) * (1 + scale1) + shift1)
        h = F.silu(self.norm2(self.conv2(h)) * (1 + scale2) + shift2)
        return self.out(h)[:, 0]


class Heads(nn.Module):
    """Independent heads, one per tap, told t-hat, the condition and (DEPARTURE, `heads_see_t`) the student's own t.

    channels, sizes: C_k and max(H_k, W_k) of each tap. forward(maps, t_hat [B], cond [B, D], t [B]) -> [logits [B, h_k, w_k]].
    """

    def __init__(self, channels, sizes, cond_dim, width=64, see_t=False):
        super().__init__()
        self.see_t, emb = see_t, 2 * width
        self.embed = nn.ModuleList(nn.Sequential(nn.Linear(64 * (1 + see_t) + cond_dim, emb), nn.SiLU(), nn.Linear(emb, emb),
                                                 nn.SiLU()) for _ in channels)
        self.heads = nn.ModuleList(Head(c, width, emb, 2 if size > 8 else 1) for c, size in zip(channels, sizes))

    def forward(self, maps, t_hat, cond, t):
        told = torch.cat([fourier(t_hat), cond] + [fourier(t)] * self.see_t, 1)
        return [head(f, embed(told)).float() for head, embed, f in zip(self.heads, self.embed, maps)]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Losses. Logits come per head and per patch; a loss is the mean over heads of the mean over samples and patches,
#    so that no head counts for more because its map is larger (the paper does not say; other code sums pooled logits).
# ---------------------------------------------------------------------------------------------------------------------

def mean_over_heads(loss, *logits):
    """mean_k mean(loss(a_k, b_k, ...)) over lists of logits of equal length. A scalar."""
    return torch.stack([loss(*k).mean() for k in zip(*logits)]).mean()


def hinge_heads(real, fake):
    """Hinge loss of the discriminator (LADD, after arXiv 1705.02894): max(0, 1 - real) + max(0, 1 + fake)."""
    return mean_over_heads(lambda r, f: F.relu(1 - r) + F.relu(1 + f), real, fake)


def hinge_student(real, fake):
    """The student's side of the hinge game: -fake."""
    return mean_over_heads(lambda f: -f, fake)


def r1_penalty(maps, logits):
    """Exact R1 (arXiv 1801.04406, eq. 9) on the heads' input features, for real samples.

    Per head: the gradient of the sum of its logits with respect to its feature map [B, C, H, W], squared, summed over
    channels, averaged over samples and places; the mean over heads. (Averaging the logits first would shrink the penalty by
    the square of the number of patches.) maps must require grad. A scalar with graph.
    """
    grads = torch.autograd.grad([k.sum() for k in logits], maps, create_graph=True)
    return torch.stack([g.square().sum(1).mean() for g in grads]).mean()


# ---------------------------------------------------------------------------------------------------------------------
# 6. The recipe
# ---------------------------------------------------------------------------------------------------------------------

def note(default, text, low=None, high=None, choices=None):
    """A field of a recipe: its default, what it means (unit, source) and its range, ends included."""
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes. The defaults are the paper's where it gives a number, but for what is marked DEPARTURE."""

    iterations: int = note(2000, "iterations; each updates the heads, and every gen_every-th the student too", 1, 10 ** 9)
    batch: int = note(64, "samples per iteration, over all micro-batches", 1, 10 ** 6)
    seed: int = note(0, "keys every draw of the run", 0, 2 ** 31)
    times: tuple[float, ...] = note((1.0, 0.75, 0.5, 0.25), "the student's times t, falling from 1 (LADD)", 1e-4, 1)
    time_probs: tuple[float, ...] = note((0.7, 0.1, 0.1, 0.1), "probability of each time after the warm-up (LADD)", 0, 1)
    warmup_probs: tuple[float, ...] = note((0.0, 0.0, 0.5, 0.5), "probability of each time during it (LADD)", 0, 1)
    warmup: int = note(500, "the first iterations, which use warmup_probs (LADD: 500)", 0, 10 ** 9)
    renoise_mean: float = note(1.0, "m of t-hat ~ LogitNormal(m, s) (LADD: m = 1, s = 1)", -10, 10)
    renoise_std: float = note(1.0, "s of t-hat ~ LogitNormal(m, s)", 0, 10)
    share_noise: bool = note(True, "real and fake are noised again with the same t-hat and noise (DEPARTURE: less variance)")
    paired_share: float = note(0.0, "share of the batch whose x0 is noised with the noise that the teacher made it from, not afresh (DEPARTURE)", 0, 1)
    student_lr: float = note(1e-4, "peak learning rate of the student", 0, 1)
    head_lr: float = note(1e-3, "peak learning rate of the heads; must exceed student_lr", 0, 1)
    lr_warmup: int = note(50, "iterations over which both learning rates rise from 0", 0, 10 ** 9)
    lr_decay: str = note("cosine", "how the student's learning rate falls to 0 over the whole run, besides that warm-up", choices=("none", "linear", "cosine"))
    beta1: float = note(0.0, "first moment of both AdamW", 0, 0.9999)
    beta2: float = note(0.99, "second moment of both AdamW", 0, 0.99999)
    weight_decay: float = note(0.0, "weight decay of both AdamW", 0, 1)
    gen_every: int = note(1, "the student is updated on iterations i with (i + 1) mod gen_every = 0, never at i = 0", 1, 10 ** 6)
    adv_weight: float = note(1.0, "weight of the adversarial loss of the student", 0, 1e6)
    adv_warmup: int = note(0, "iterations over which that weight rises from 0", 0, 10 ** 9)
    r1_weight: float = note(0.0, "weight of R1 on the heads' input features, on real samples (0 = off)", 0, 1e6)
    r1_every: int = note(1, "R1 is taken every so many iterations, its weight times as many (arXiv 1912.04958)", 1, 10 ** 6)
    clip_student: float = note(1.0, "largest gradient norm of the student", 1e-6, 1e6)
    clip_heads: float = note(1.0, "largest gradient norm of the heads", 1e-6, 1e6)
    ema_half_life: float = note(10_000.0, "half-life of the student's weight average, in samples (0 = no average)", 0, 1e12)
    ema_ramp: float = note(0.1, "the half-life is at most this share of the samples seen so far", 0.001, 1)
    taps: tuple[str, ...] = note((), "modules of the teacher whose outputs the heads read, in order of depth")
    head_width: int = note(64, "channels of the heads, a multiple of 8", 8, 4096)
    heads_see_t: bool = note(False, "the heads are told the student's t too (DEPARTURE: holds the low-noise steps)")
    sampler: str = note("euler", "how the student is sampled with more than one step", choices=("euler", "renoise"))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        n = len(self.times)
        if not 1 <= n <= 8 or self.times[0] != 1 or list(self.times) != sorted(set(self.times), reverse=True):
            raise UserError(f"times = {list(self.times)}: give 1 to 8 times that fall from 1")
        for name in ("time_probs", "warmup_probs"):
            p = getattr(self, name)
            if len(p) != n or abs(sum(p) - 1) > 1e-6:
                raise UserError(f"{name} = {list(p)}: give {n} probabilities, one for each of times, that sum to 1")
        if self.head_width % 8:
            raise UserError(f"head_width = {self.head_width}: give a multiple of 8")
        if len(set(self.taps)) != len(self.taps):
            raise UserError(f"taps = {list(self.taps)}: name each module once")


def checked(field, value):
    """`value` as the type of the recipe's field, in its range; UserError with the field, the value and the range otherwise."""
    hint, meta = field.type, field.metadata
    kind = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint

    def one(v):
        if isinstance(v, bool) and kind is not bool or not isinstance(v, (int, float) if kind is float else kind):
            raise UserError(f"{field.name} = {value!r:.80}: give {'true or false' if kind is bool else kind.__name__ + ' values'}")
        try:
            v = kind(v)
        except OverflowError:
            v = math.inf                                # an integer too large for a float: out of any range
        if meta["choices"] and v not in meta["choices"]:
            raise UserError(f"{field.name} = {v!r:.80}: choose from {', '.join(meta['choices'])}")
        if meta["low"] is not None and not meta["low"] <= v <= meta["high"]:    # nan fails this too
            raise UserError(f"{field.name} = {v!r:.80}: give a value from {meta['low']} to {meta['high']}")
        return v
    if kind is hint:
        return one(value)
    if not isinstance(value, (tuple, list)):
        raise UserError(f"{field.name} = {value!r:.80}: give a list of {kind.__name__} values")
    return tuple(one(v) for v in value)


def override(recipe, changes):
    """A recipe with some fields changed; UserError names a field that does not exist."""
    known = {f.name for f in dataclasses.fields(recipe)}
    for name in changes:
        if name not in known:
            raise UserError(f"{name}: the recipe has no such field; it has {', '.join(sorted(known))}")
    return dataclasses.replace(recipe, **changes)


def drift(recipe, reference):
    """The fields in which recipe differs from reference, two recipes or two dicts: {field: (reference's, recipe's)}."""
    a, b = (dataclasses.asdict(r) if dataclasses.is_dataclass(r) else r for r in (reference, recipe))
    plain = lambda v: json.loads(json.dumps(v))         # as JSON stores it: a tuple is a list
    return {k: (a.get(k), b.get(k)) for k in {**a, **b} if plain(a.get(k)) != plain(b.get(k))}


def unlike(old, new):
    """`drift` of two dicts in words: each field as 'key = new (was old)'."""
    return [f"{k} = {b} (was {a})" for k, (a, b) in drift(new, old).items()]


# ---------------------------------------------------------------------------------------------------------------------
# 7. Draws: each is keyed by what it is for (an iteration's by seed and iteration) and made on the CPU, so there is no state to store
# ---------------------------------------------------------------------------------------------------------------------

def generator(*key):
    """A CPU generator keyed by the words and numbers of `key`: the same key, the same draws, whatever was drawn before."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def reader_indices(n, start, count, seed):
    """What an endless shuffled reader of n samples gives at positions start .. start + count - 1: index [count], epoch [count].

    The order is keyed by (seed, epoch): a reader has no state but its position.
    """
    position = torch.arange(start, start + count)
    epoch, place = position // n, position % n
    index = torch.empty(count, dtype=torch.long)
    for e in epoch.unique().tolist():
        order = torch.randperm(n, generator=generator(seed, e, "reader"))
        index[epoch == e] = order[place[epoch == e]]
    return index, epoch


def draw(recipe, iteration, shape):
    """The draws of one iteration's joint batch (all ranks and micro-batches together): t [B], eps [B, *shape], t_hat [B], eps_hat,
    the real side's own pair, and paired [B]: which of them take their sample's stored noise in place of eps, evenly spread over the batch."""
    gen, n = generator(recipe.seed, iteration, "iteration"), recipe.batch
    probs = recipe.warmup_probs if iteration < recipe.warmup else recipe.time_probs
    edges = torch.tensor(probs, dtype=torch.float64).cumsum(0)[:-1]
    which = torch.bucketize(torch.rand(n, generator=gen, dtype=torch.float64), edges, right=True)
    t = torch.tensor(recipe.times)[which]                                   # [B]
    draw_t_hat = lambda: logit_normal(torch.randn(n, generator=gen), recipe.renoise_mean, recipe.renoise_std)
    d = {"t": t, "eps": torch.randn(n, *shape, generator=gen), "t_hat": draw_t_hat(), "eps_hat": torch.randn(n, *shape, generator=gen)}
    d["t_real"], d["eps_real"] = ((d["t_hat"], d["eps_hat"]) if recipe.share_noise else
                                  (draw_t_hat(), torch.randn(n, *shape, generator=gen)))
    k = torch.arange(n)
    d["paired"] = ((k + 1) * recipe.paired_share).floor() > (k * recipe.paired_share).floor()
    return d


# ---------------------------------------------------------------------------------------------------------------------
# 8. Ranks. Under torchrun every process runs this file on its own part of each joint batch; without it there is one rank.
# ---------------------------------------------------------------------------------------------------------------------

def rank():
    """This process's number among `ranks()`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def say(*words):
    """Print, on the first rank alone."""
    if rank() == 0:
        print(*words, flush=True)


def from_first(make):
    """make() on the first rank alone; what it gave, on every rank."""
    box = [make() if rank() == 0 else None]
    if ranks() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def any_rank(flag):
    """Is flag true on any rank? Whatever ends or changes the run is decided so, or the others would wait for ever."""
    votes = torch.tensor(float(bool(flag)))
    if ranks() > 1:
        dist.all_reduce(votes)
    return bool(votes > 0)


def mean_over_ranks_(tensors):
    """Each tensor becomes its mean over the ranks, in one exchange."""
    if ranks() > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / ranks()).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def local(t):
    """This rank's part of a sharded tensor (a DTensor), or the tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def sharded_like(p, part):
    """`part`, this rank's part of something shaped as the parameter p, as a tensor sharded like p: so a checkpoint fits any
    number of ranks. It shares part's memory."""
    if p is local(p):
        return part
    from torch.distributed.tensor import DTensor, init_device_mesh
    mesh = p.device_mesh if part.device.type == p.device.type else init_device_mesh(part.device.type, tuple(p.device_mesh.shape))
    return DTensor.from_local(part, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


# ---------------------------------------------------------------------------------------------------------------------
# 9. One iteration
# ---------------------------------------------------------------------------------------------------------------------

class World:
    """What a world gives to the method: its contract, to subclass. `step` asks for no more than this class.

    The loop asks for watch(student, picture) -> dict and save_student(path, student, **about) too, and the command line for
    prepare, fingerprint, draw_start, draw_sample and finish: `toy_mnist/world.py` shows each.
    """

    teacher: nn.Module      # velocity(x_t [B, ...], t [B], cond) -> v, frozen
    tap_root: nn.Module     # the module in which the recipe's taps are looked up by name
    early_exit = True       # may the teacher's pass end, by an exception, at its last tap?
    cond_dim: int           # D, the length of the heads' condition vector
    ema_device = None       # where the student's average is kept (None: beside the student)
    config = {}             # what config.json should say of this world besides recipe and data

    def make_student(self):
        """The network to train, velocity(x_t, t, cond) -> v: a copy of the teacher, whose weights must be float32 or small updates are lost."""
        return copy.deepcopy(self.teacher).requires_grad_(True).train()

    def compile(self, student):
        """--compile. The teacher stays as it is: hooks and an early end break its graph."""
        student.compile()

    def tap_map(self, name, output, x_t):
        """A tapped module's output as a map [B, C, H, W]."""
        return output

    def head_cond(self, cond):
        """The condition as a vector for the heads: [B, D]."""
        raise NotImplementedError

    def read(self, start, count):
        """Samples start .. start + count - 1 of an endless reader: x0 [B, ...], cond [B, ...], noise [B, ...] or None."""
        raise NotImplementedError

    def terms(self):
        """Losses and inputs that replace or join the paper's."""
        return Terms()

    def score(self, point):
        """How good a judged point is, less is better: it chooses best.safetensors among the judged points. None: no judge here."""

    def watch_raw(self, student, picture):
        """A look at the weights as they are, before `watch` sees their average. Nothing by default."""

    def signs(self, point):
        """The world's own signs of collapse in a judged point: a list of phrases, empty when all is well."""
        return []


@dataclasses.dataclass
class Terms:
    """What a world may plug into the iteration. The defaults are the paper's: hinge, and nothing added."""

    heads_loss: typing.Callable = hinge_heads           # (real logits, fake logits) -> scalar
    student_loss: typing.Callable = hinge_student       # (real logits, fake logits) -> scalar
    student_input: typing.Callable | None = None        # (Pass, student) -> x_t in place of the noised x0
    add_heads: tuple = ()                               # (Pass, State) -> scalar, added to the heads' loss
    add_student: tuple = ()                             # (Pass, State) -> scalar, added to the student's loss
    before_student: typing.Callable | None = None       # (Pass, State), between the heads' gradient and the student's


class Pass(types.SimpleNamespace):
    """One micro-batch on its way through the iteration; terms read from it.

    x0, cond, noise (where it is stored), paired [B] (is eps that noise?), head_cond [B, D], the draws t, eps, t_hat, eps_hat,
    t_real, eps_real; x_t, x0_hat; real_t and fake_t (both noised again); real_maps, fake_maps (the teacher's features),
    real_logits; what a `student_input` leaves for the terms; key: the seed, the iteration and the place in the joint batch, by which a term keys draws of its own.
    """


class State:
    """What changes while a run trains: student, heads, both optimizers, the average."""

    def __init__(self, world, recipe, device):
        torch.manual_seed(recipe.seed)                  # the heads' initial weights; nothing later uses the global generator
        self.student = world.make_student()
        x, cond, _ = world.read(0, min(2, recipe.batch))
        maps = features(world, x.to(device), torch.full((len(x),), 0.5, device=device), cond.to(device), recipe.taps)
        self.heads = Heads([m.shape[1] for m in maps], [max(m.shape[2:]) for m in maps], world.cond_dim, recipe.head_width,
                           recipe.heads_see_t).to(device)
        self.student_opt, self.heads_opt = adamw(self.student, recipe), adamw(self.heads, recipe)
        self.ema = EMA(self.student, recipe.ema_half_life, recipe.ema_ramp, world.ema_device)
        self.skipped = 0                                # updates left out, one after another, for a non-finite gradient

    @contextlib.contextmanager
    def averaged(self):
        """The student with the averaged weights while the context lasts: they change places, so no third copy is needed."""
        self.ema.swap(self.student)
        try:
            yield self.student
        finally:
            self.ema.swap(self.student)


def adamw(model, recipe):
    """AdamW with its (zero) state from the start, so that saving a checkpoint cannot change the run: torch would make the state by
    an empty, counted step when a checkpoint first asks for it. `update` sets the learning rate."""
    fused = next(model.parameters()).is_cuda or None    # on a GPU the default makes temporaries of the weights' size
    opt = torch.optim.AdamW(model.parameters(), 0.0, (recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay, fused=fused)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    opt.zero_grad(set_to_none=True)
    for slot in opt.state.values():
        slot["step"].zero_()
    return opt


class EMA:
    """Exponential moving average of a model's parameters, float32; half-life in samples, 0 = none is kept: the last weights serve.

    The half-life is at most `ramp` of the samples seen so far (EDM, arXiv 2206.00364), or a short run's average would
    be mostly its start. Each rank keeps the average of its own part of a sharded model, on `device` or beside the weights.
    """

    def __init__(self, model, half_life, ramp, device=None):
        self.half_life, self.ramp = half_life, ramp
        self.mean = [local(p).detach().to(device, copy=True) for p in model.parameters()] if half_life else []

    @torch.no_grad()
    def update(self, model, seen, new):
        """After a step: `seen` samples in all, `new` of them since the last update."""
        for mean, p in zip(self.mean, model.parameters()):
            mean.lerp_(local(p).detach().to(mean.device), 1 - 0.5 ** (new / min(self.half_life, self.ramp * seen)))

    @torch.no_grad()
    def swap(self, model):
        """Exchange the model's weights and their average."""
        for mean, p in zip(self.mean, model.parameters()):
            weights = local(p).detach().clone()
            local(p).detach().copy_(mean)
            mean.copy_(weights)


def autocast(device, enabled=True):
    """bfloat16 where this device computes it faster. No weight cache: a cached cast could outlive an optimizer step."""
    kind = torch.device(device).type
    cpu = getattr(torch.cpu, "get_capabilities", dict)()             # older torch cannot tell: float32 then
    fast = kind == "cuda" or kind == "cpu" and cpu.get("avx512_bf16", False)
    return torch.autocast(kind, torch.bfloat16, enabled=enabled and fast, cache_enabled=False)


def features(world, x_t, t, cond, taps):
    """The frozen teacher's features of x_t at time t: one map [B, C_k, H_k, W_k] per tap. Gradients flow to x_t."""
    outputs = tapped(world.tap_root, taps, lambda: world.teacher(x_t, t, cond), world.early_exit)
    return [world.tap_map(name, out, x_t) for name, out in zip(taps, outputs)]


@contextlib.contextmanager
def frozen(module):
    """The module's weights take no gradient inside: a pass through it reaches its inputs alone."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def updates_student(recipe, i):
    """Does iteration i (from 0) update the student? Never the first: the heads know nothing yet."""
    return i > 0 and (i + 1) % recipe.gen_every == 0


def step(state, world, recipe, terms, i, device, micro_batch=None):
    """Iteration i: gradients of all micro-batches, then one step of each optimizer. Returns its metrics (floats).

    Both gradients come from the same heads, as they stood when it began, so that micro-batches can add up before either steps (to step
    the heads first is the usual alternative). k micro-batches of n give what one of k n gives, and so do k ranks (a world's added terms
    see one micro-batch at a time). Costs in teacher-sized forwards F: student 1, teacher 2; a student iteration adds 1 (backward through
    the teacher) and 2 (backward through the student) = 6F.
    """
    n = recipe.batch // ranks()                         # this rank's part of the joint batch
    first, micro_batch = rank() * n, micro_batch or n
    x0, cond, noise = world.read(i * recipe.batch + first, n)
    joint = {k: v[first:first + n] for k, v in draw(recipe, i, x0.shape[1:]).items()} | {"x0": x0, "cond": cond}
    if noise is not None:
        joint["noise"] = noise
    if recipe.paired_share:
        if noise is None:
            raise UserError(f"paired_share = {recipe.paired_share}: this world does not store the noise that its samples were made from; set it to 0")
        joint["eps"] = torch.where(expand(joint["paired"], noise), noise, joint["eps"])
    metrics, share = {}, micro_batch / n
    for start in range(0, n, micro_batch):
        p = Pass(key=(recipe.seed, i, first + start), **{k: v[start:start + micro_batch].to(device) for k, v in joint.items()})
        for name, value in gradients(p, state, world, recipe, terms, i, share).items():
            metrics[name] = metrics.get(name, 0.0) + share * float(value)
    metrics.update(update(state, recipe, i))
    return metrics


def gradients(p, state, world, recipe, terms, i, share):
    """Add one micro-batch's gradients to the heads' and, on its iterations, the student's. share: its part of the batch."""
    student_turn, device = updates_student(recipe, i), p.x0.device

    # The student's guess of x0, with graph only where it will be updated.
    p.x_t = interpolate(p.x0, p.eps, p.t)
    if terms.student_input:
        p.x_t = terms.student_input(p, state.student)
    with torch.set_grad_enabled(student_turn):
        p.x0_hat = velocity_to_x0(p.x_t, state.student(p.x_t, p.t, p.cond), p.t)

    # Both noised again; the teacher's features of both, the fake's with graph where the student will be updated.
    p.real_t, p.fake_t = interpolate(p.x0, p.eps_real, p.t_real), interpolate(p.x0_hat, p.eps_hat, p.t_hat)
    with torch.no_grad():
        p.real_maps = features(world, p.real_t, p.t_real, p.cond, recipe.taps)
    with torch.set_grad_enabled(student_turn):
        p.fake_maps = features(world, p.fake_t, p.t_hat, p.cond, recipe.taps)
    p.head_cond = world.head_cond(p.cond)

    # The heads' gradient, on detached features.
    r1 = recipe.r1_weight > 0 and i % recipe.r1_every == 0
    real_maps = [m.detach().float().requires_grad_() for m in p.real_maps] if r1 else p.real_maps
    with autocast(device, enabled=not r1):              # R1 differentiates twice: in float32
        real = state.heads(real_maps, p.t_real, p.head_cond, p.t)
    with autocast(device):
        fake = state.heads([m.detach() for m in p.fake_maps], p.t_hat, p.head_cond, p.t)
    heads_loss = terms.heads_loss(real, fake)
    metrics = {"heads_loss": heads_loss, "logit_gap": mean_over_heads(lambda a, b: a - b.mean(), real, fake)}
    if r1:
        metrics["r1"] = r1_penalty(real_maps, real)
        heads_loss = heads_loss + recipe.r1_weight * recipe.r1_every * metrics["r1"]
    for term in terms.add_heads:
        heads_loss = heads_loss + term(p, state)
    (heads_loss * share).backward()
    for name, a, b in zip(recipe.taps, real, fake):
        wins = (a > b).float() + (a == b).float() / 2   # of pairs, a tie counting half: not every loss has its border at zero
        metrics[f"accuracy/{name}"] = wins.mean()
    if len(p.x0) > 1:                                   # a single sample has no neighbour to differ from
        metrics["diversity"] = diversity(p.fake_maps[-1]) / diversity(p.real_maps[-1]).clamp(min=1e-12)

    # The student's gradient: the heads again, frozen, as they stood when the iteration began (or as `before_student` left them), on the
    # attached features.
    if student_turn:
        p.real_logits = [r.detach() for r in real]
        if terms.before_student:
            terms.before_student(p, state)
        with frozen(state.heads), autocast(device):
            fake = state.heads(p.fake_maps, p.t_hat, p.head_cond, p.t)
        adversarial = terms.student_loss(p.real_logits, fake)
        metrics["student_loss"] = adversarial
        student_loss = recipe.adv_weight * min(1.0, (i + 1) / max(recipe.adv_warmup, 1)) * adversarial
        for term in terms.add_student:
            extra = term(p, state)
            metrics[term.__name__] = extra
            student_loss = student_loss + extra
        (student_loss * share).backward()
    return {k: v.detach() for k, v in metrics.items()}


def diversity(maps):
    """Mean distance between neighbours in the batch, on features [B, C, H, W]: what collapses when the fakes grow alike."""
    f = maps.detach().float().flatten(1)
    return (f - f.roll(1, 0)).norm(dim=1).mean()


def lr_scale(recipe, i, student):
    """The factor on a learning rate at iteration i: the warm-up of both, then the student's decay."""
    scale = min(1.0, (i + 1) / max(recipe.lr_warmup, 1))
    if student and recipe.lr_decay != "none":
        done = i / recipe.iterations
        scale *= 1 - done if recipe.lr_decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    return scale


def update(state, recipe, i):
    """Clip and step both optimizers, then the average. A non-finite gradient leaves the whole update out; three in a row end the run."""
    parts = [(state.heads, state.heads_opt, recipe.head_lr, recipe.clip_heads, False, "heads")]
    if updates_student(recipe, i):
        parts.append((state.student, state.student_opt, recipe.student_lr, recipe.clip_student, True, "student"))
    norms = {}
    for model, _, _, clip, _, name in parts:            # FSDP averages what it shards; the rest is averaged here
        mean_over_ranks_([p.grad for p in model.parameters() if p.grad is not None and p.grad is local(p.grad)])
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        norms[f"{name}_grad_norm"] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    finite = all(map(math.isfinite, norms.values()))
    for _, opt, lr, _, student, _ in parts:
        for group in opt.param_groups:
            group["lr"] = lr * lr_scale(recipe, i, student)
        if finite:
            opt.step()
        opt.zero_grad(set_to_none=True)
    state.skipped = 0 if finite else state.skipped + 1
    if finite and updates_student(recipe, i):
        state.ema.update(state.student, (i + 1) * recipe.batch, recipe.gen_every * recipe.batch)
    if state.skipped == 3:
        raise Diverged(f"iteration {i}: the third non-finite gradient in a row, {norms}: lower student_lr or head_lr")
    return {**norms, "skipped": float(not finite)}


# ---------------------------------------------------------------------------------------------------------------------
# 10. Files. Weights, JSON and checkpoints are written beside their place and renamed into it: a kill leaves no half of one.
#    What is shared is safetensors and JSON; checkpoints are trusted local files (their metadata is a pickle).
# ---------------------------------------------------------------------------------------------------------------------

SCHEMA = 1      # of weights and caches


def write_json(path, value):
    part = Path(path).with_name(Path(path).name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def save_weights(path, tensors, about):
    """`tensors` as safetensors at path and, beside it with the ending .json, `about` with schema and checksum."""
    from safetensors.torch import save
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, data = path.with_name(path.name + ".part"), save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    part.write_bytes(data)
    path.with_suffix(".json").unlink(missing_ok=True)   # it is written last: weights without it are not there yet
    os.replace(part, path)
    write_json(path.with_suffix(".json"), {"schema": SCHEMA, "sha256": hashlib.sha256(data).hexdigest(), **about})


def load_weights(path, kind, *keys):
    """(tensors, about) of a file that `save_weights` wrote. UserError where it is missing, cut off, damaged, of another kind, or
    where `about` lacks one of keys."""
    from safetensors.torch import load
    path = Path(path)
    try:
        about, data = json.loads(path.with_suffix(".json").read_text()), path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: it or its .json can't be read ({error}): restore both files, or delete what is left of them to have a "
                        f"cache made again") from error
    if not isinstance(about, dict) or about.get("schema") != SCHEMA or about.get("kind") != kind or any(k not in about for k in keys):
        raise UserError(f"{path}: not a '{kind}' file of schema {SCHEMA}: restore or make it again")
    if hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise UserError(f"{path}: damaged or cut off ({len(data)} bytes, checksum differs from its .json): restore both files, or delete "
                        f"them to have a cache made again")
    return load(data), about


def fill(module, tensors, path):
    """Load tensors into module; UserError names a key or shape that does not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit this network ({str(error).splitlines()[-1].strip()})") from error


def save_checkpoint(run, step, state, keep=2):
    """state (nested dicts and lists of tensors and numbers) to run/checkpoints/step-N; the last `keep` stay."""
    import torch.distributed.checkpoint as dcp
    folder = Path(run) / "checkpoints"
    part, final = folder / f"part-{step:07d}", folder / f"step-{step:07d}"

    def clear():
        for leftover in (*folder.glob("part-*"), final):            # of saves that were killed, or ran out of disk
            shutil.rmtree(leftover, ignore_errors=True)

    def complete():
        write_json(part / "complete.json", {f.name: f.stat().st_size for f in part.iterdir()})
        os.replace(part, final)
        kept = [path for path in checkpoints(run) if step_of(path) <= step][-keep:]
        for path in checkpoints(run):                   # a later one was damaged, or this run would have gone on from it
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
    from_first(clear)
    try:
        dcp.save(state, checkpoint_id=part, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:            # no subclass of Exception; it holds one per rank
        raise UserError(f"{part}: can't be written ({next(iter(error.failures.values()))[0]})") from error
    from_first(complete)


def step_of(checkpoint):
    return int(checkpoint.name[5:])


def checkpoints(run):
    """A run's checkpoints, the oldest first."""
    found = (Path(run) / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name[5:].isdecimal()), key=step_of)


def newest_checkpoint(run):
    """The newest complete checkpoint of a run, or None; a cut-off one is passed over with a line that says so. Sizes are compared,
    not checksums: a large model's would take minutes."""
    for path in reversed(checkpoints(run)):
        try:
            sizes = json.loads((path / "complete.json").read_text())
            if sizes and all((path / name).stat().st_size == size for name, size in sizes.items()):
                return path
        except (OSError, ValueError, AttributeError):
            pass
        print(f"{path}: cut off, passed over", file=sys.stderr)
    return None


def load_checkpoint(path, state):
    """Fill `state`, of the shape that was saved, from a checkpoint, and return it. UserError where it is of another shape."""
    import torch.distributed.checkpoint as dcp
    try:
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        raise UserError(f"{path}: does not fit this run, or is damaged ({next(iter(error.failures.values()))[0]}): delete it, and --resume goes "
                        f"on from the one before") from error
    return state


# ---------------------------------------------------------------------------------------------------------------------
# 11. The loop
# ---------------------------------------------------------------------------------------------------------------------

def snapshot(state, iteration):
    """Everything a run needs to go on, as nested state dicts."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    student, student_opt = get_state_dict(state.student, state.student_opt)
    heads, heads_opt = get_state_dict(state.heads, state.heads_opt)
    return {"student": student, "student_opt": student_opt, "heads": heads, "heads_opt": heads_opt,
            "ema": {k: sharded_like(p, mean) for k, (p, mean) in enumerate(zip(state.student.parameters(), state.ema.mean))},
            "iteration": iteration, "skipped": state.skipped}


def restore(state, path):
    """Fill state from a checkpoint of `snapshot`; returns the iteration to go on with."""
    from torch.distributed.checkpoint.state_dict import set_state_dict
    s = load_checkpoint(path, snapshot(state, 0))
    set_state_dict(state.student, state.student_opt, model_state_dict=s["student"], optim_state_dict=s["student_opt"])
    set_state_dict(state.heads, state.heads_opt, model_state_dict=s["heads"], optim_state_dict=s["heads_opt"])
    state.skipped = s["skipped"]
    return s["iteration"]                               # the average was filled in place


def train(world, recipe, run, options, device):
    """Distil: the loop over `step`, with its log, pictures, judged points and checkpoints. Returns the finished State."""
    state, terms, log = State(world, recipe, device), world.terms(), open_log(options.log, run)
    count = lambda m: f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f}M"
    say(f"student {count(state.student)} parameters; {len(recipe.taps)} heads {count(state.heads)}")
    first, newest = 0, from_first(lambda: newest_checkpoint(run) if options.resume else None)
    if newest:
        first = restore(state, newest)
    if options.resume:
        say(f"going on from {newest}" if newest else "no whole checkpoint: training starts over")
    began = time.time() - (from_first(lambda: trim_metrics(run, first)) if options.resume else 0)
    if options.compile:
        world.compile(state.student)

    stop = []                                           # Ctrl-C and SIGTERM end the loop after the iteration in hand
    before = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    window = []
    try:
        with tqdm(range(first, recipe.iterations), initial=first, total=recipe.iterations, desc="distil", disable=rank() > 0) as bar:
            for i in bar:
                try:
                    window.append(step(state, world, recipe, terms, i, device, options.micro_batch))
                except Diverged as error:
                    raise Diverged(f"{error}; the last good checkpoint is {from_first(lambda: newest_checkpoint(run))}") from error
                done = i + 1
                if done % options.log_every == 0 or done == recipe.iterations:
                    mean = {k: torch.tensor(sum(m[k] for m in window if k in m) / sum(k in m for m in window), dtype=torch.float64)
                            for k in dict.fromkeys(k for m in window for k in m)}
                    mean_over_ranks_(list(mean.values()))
                    mean = {k: float(v) for k, v in mean.items()}
                    log(done, {**mean, "seconds": time.time() - began})
                    bar.set_postfix({k: f"{mean[k]:.2f}" for k in ("heads_loss", "student_loss", "diversity") if k in mean})
                    window = []
                collapsed = False
                if options.evaluate_every and done % options.evaluate_every == 0 and done < recipe.iterations:
                    signs = watch(state, world, recipe, run, options, done, log, device)
                    collapsed = options.stop_on_collapse and any_rank(signs)
                stopped = any_rank(stop)
                if done % options.checkpoint_every == 0 or done == recipe.iterations or stopped or collapsed:
                    save_checkpoint(run, done, snapshot(state, done), options.keep)
                if collapsed:
                    raise UserError(f"stopped on collapse after iteration {done}, saved in {run / 'checkpoints'}: look at {run / 'samples'}")
                if stopped and done < recipe.iterations:
                    raise Stopped(f"stopped after iteration {done}, saved: go on by the same command with --resume --name {run.name}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return state


@torch.no_grad()
def sample_diversity(world, student, recipe, device, micro_batch=None, pairs=256):
    """Collapse, seen from the teacher: the mean feature distance within pairs of the student's samples, divided by that within
    pairs of real ones of the same conditions, all four noised to t = 1/2 with one noise. Near 1 = healthy; it falls as the fakes grow alike.
    Each rank reads its part of the batch, or two samples where that is one; a batch of one has no pairs.
    """
    n, distance = max(2, recipe.batch // ranks()), torch.zeros(2)
    first = min(rank() * n, recipe.batch - n)
    for k in range(math.ceil(2 * pairs / recipe.batch)):                # a sample's partner lies half a part of the batch away
        x0, cond, _ = world.read(k * recipe.batch + first, n)
        x0, cond, gen = x0.to(device), cond.to(device), generator(recipe.seed, k, rank(), "diversity")
        start, noise = (torch.randn(x0.shape, generator=gen).to(device) for _ in range(2))
        noise[n // 2:2 * (n // 2)], half = noise[:n // 2].clone(), torch.full((n,), 0.5, device=device)
        sides = [[], []]                                # the deepest map of fakes and reals
        for at in range(0, n, micro_batch or n):        # no more at once than an iteration takes
            part = slice(at, at + (micro_batch or n))
            fake = student_sampler(recipe, len(recipe.times))(student, start[part], cond[part])
            for side, x in zip(sides, (fake, x0[part])):
                x_t = interpolate(x, noise[part], half[part])
                side += [m.float().flatten(1) for m in features(world, x_t, half[part], cond[part], recipe.taps[-1:])]
        for side, maps in enumerate(sides):
            f = torch.cat(maps)
            distance[side] += (f[:n // 2] - f[n // 2:2 * (n // 2)]).norm(dim=1).sum().cpu()
    mean_over_ranks_([distance])
    return float(distance[0] / distance[1].clamp(min=1e-12))


def watch(state, world, recipe, run, options, done, log, device):
    """A judged point of the curve and a grid, and the alarm for collapse, which is seen in samples and never in losses. Returns its signs."""
    picture, best, least = run / "samples" / f"{done:07d}.png", run / "best.safetensors", math.inf
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # none yet, or damaged
        least = float(json.loads(best.with_suffix(".json").read_text())["score"])
    world.watch_raw(state.student, picture.with_stem(f"{done:07d}-raw"))
    with state.averaged() as student:
        point = world.watch(student, picture)
        if recipe.batch > 1:
            point["sample_diversity"] = sample_diversity(world, student, recipe, device, options.micro_batch)
        score = world.score(point)                      # on noise and references that no report uses
        if score is not None and score < least and rank() == 0:
            world.save_student(best, student, iteration=done, score=score)
    signs = world.signs(point)
    if point.get("sample_diversity", math.inf) < options.least_diversity:
        signs.append(f"sample_diversity {point['sample_diversity']:.2f} is under {options.least_diversity}")
    log(done, {**point, "collapsed": float(bool(signs))})
    if signs and rank() == 0:
        tqdm.write(f"WARNING: iteration {done}: collapse? {'; '.join(signs)}; see {picture}")
    return signs


def trim_metrics(run, iteration):
    """Drop the log's lines from after the checkpoint, which the resumed run writes again, and what is no line of it. Returns the
    seconds that the run had taken by the last line that stays."""
    path, kept, seconds = run / "metrics.jsonl", [], 0.0
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            if line["iteration"] <= iteration:
                kept.append(text + "\n")
                seconds = float(line.get("seconds", seconds))
    part = path.with_name("metrics.jsonl.part")
    part.write_text("".join(kept))
    os.replace(part, path)
    return seconds


def open_log(which, run):
    """log(iteration, metrics): a line of run/metrics.jsonl, and TensorBoard or W&B where asked for and installed. By rank 0 alone."""
    if rank() > 0:
        return lambda iteration, metrics: None
    send = lambda i, m: None
    if which == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run)
        send = lambda i, m: [writer.add_scalar(k, v, i) for k, v in m.items()]
    elif which == "wandb":
        import wandb
        wandb.init(project="ladd", name=run.name, dir=run)
        send = lambda i, m: wandb.log(m, step=i)

    def log(iteration, metrics):
        with open(run / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"iteration": iteration, **metrics}) + "\n")
        send(iteration, metrics)
    return log


# ---------------------------------------------------------------------------------------------------------------------
# 12. The command line
# ---------------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parser_for(world_module):
    """Every option: the run's, the recipe's by its fields, the world's own."""
    recipe_class = type(world_module.REFERENCE) if world_module else Recipe
    parser = Parser(prog="ladd.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description=__doc__.split("This file is")[0])
    worlds = parser.add_argument_group("what to distil (one of these)")
    worlds.add_argument("--toy", action="store_true", help="the Color-MNIST teacher that ships with ladd")
    worlds.add_argument("--zimage", action="store_true", help="Z-Image, on data that python -m zimage.precompute made")
    run = parser.add_argument_group("the run")
    run.add_argument("--name", help="name of the run, a folder in --out (numbered by itself when absent)")
    run.add_argument("--out", default="runs", help="folder of the runs (default %(default)s)")
    run.add_argument("--device", help="cuda, mps (untested) or cpu (default: the first of these that is there)")
    run.add_argument("--resume", action="store_true", help="go on with the run --name from its newest checkpoint")
    run.add_argument("--sample", action="store_true", help="draw a grid from the finished run --name; see --steps")
    run.add_argument("--steps", type=int, help="steps of --sample (default: as many as the student knows)")
    run.add_argument("--evaluate-every", type=int, default=200, metavar="N", help="iterations between judged points and grids (default %(default)s; 0 = never)")
    run.add_argument("--checkpoint-every", type=int, default=200, metavar="N", help="iterations between checkpoints (default %(default)s)")
    run.add_argument("--keep", type=int, default=2, metavar="K", help="checkpoints to keep (default %(default)s)")
    run.add_argument("--log-every", type=int, default=20, metavar="N", help="iterations averaged in a line of metrics.jsonl (default %(default)s)")
    run.add_argument("--micro-batch", type=int, metavar="N", help="samples per pass and rank; ranks x N must divide the batch (default: batch / ranks)")
    run.add_argument("--log", choices=("tensorboard", "wandb"), help="log there too, where it is installed")
    run.add_argument("--least-diversity", type=float, default=0.8, metavar="X", help="warn of collapse where sample_diversity falls under this (default %(default)s)")
    run.add_argument("--stop-on-collapse", action="store_true", help="end the run at that warning")
    run.add_argument("--compile", action="store_true", help="torch.compile the student (Z-Image: the teacher too)")
    run.add_argument("--deterministic", action="store_true", help="equal runs bit for bit on a GPU too (slower; the CPU always is)")
    run.add_argument("--i-know", action="store_true", help="do what is refused as a known way to ruin a run")
    fields = parser.add_argument_group("the recipe (defaults: the recipe's own)")
    fields.add_argument("--recipe", default=None, metavar="NAME_OR_FILE", help="a recipe by name, or another run's config.json")
    for field in dataclasses.fields(recipe_class):
        text = field.metadata["help"].replace("%", "%%")
        if field.metadata["choices"]:
            text += f": {', '.join(field.metadata['choices'])}"
        if world_module:
            default = getattr(world_module.REFERENCE, field.name)
            text += f" (default {','.join(map(str, default)) if isinstance(default, tuple) else str(default).lower()})"
        fields.add_argument("--" + field.name.replace("_", "-"), dest="recipe_" + field.name, metavar="X", help=text)
    if world_module:
        world_module.add_arguments(parser.add_argument_group("this world"))
    return parser


def parse_value(field, text):
    """A recipe field's value from the command line; commas make a list. What cannot be read stays text, for `checked` to refuse."""
    kind = typing.get_args(field.type)[0] if typing.get_origin(field.type) is tuple else field.type

    def one(word):
        try:
            return {"true": True, "false": False}.get(word.lower(), word) if kind is bool else kind(word)
        except ValueError:
            return word
    return one(text) if kind is field.type else tuple(one(w.strip()) for w in text.split(",") if w.strip())


def read_config(path, *parts):
    """A run's config.json; UserError where it can't be read or does not hold parts, dicts by these names."""
    try:
        config = json.loads(Path(path).read_text())
        if not all(isinstance(config[part], dict) for part in parts):
            raise TypeError
        return config
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a run's config.json ({type(error).__name__})") from error


def resolve_recipe(world_module, options):
    """The recipe by name or file, with the command line's fields over it."""
    name = options.recipe or next(k for k, v in world_module.RECIPES.items() if v is world_module.REFERENCE)
    if name in world_module.RECIPES:
        recipe = world_module.RECIPES[name]
    else:
        try:
            stored = read_config(name, "recipe")["recipe"]
        except UserError as error:
            raise UserError(f"--recipe {error}, and none of {', '.join(world_module.RECIPES)}") from error
        recipe = override(type(world_module.REFERENCE)(), stored)       # a field newer than the file has its default: off
    fields = {f.name: f for f in dataclasses.fields(recipe)}
    given = {k[7:]: v for k, v in vars(options).items() if k.startswith("recipe_") and v is not None}
    return override(recipe, {k: parse_value(fields[k], v) for k, v in given.items()})


def refuse_known_ruin(recipe, micro_batch, i_know):
    """What has ruined published runs needs --i-know."""
    if recipe.batch < ranks() or recipe.batch % ranks():
        raise UserError(f"batch = {recipe.batch}: give a multiple of the {ranks()} ranks")
    if micro_batch < 1 or recipe.batch // ranks() % micro_batch:
        raise UserError(f"--micro-batch {micro_batch}: give a number that divides batch / ranks = {recipe.batch // ranks()}")
    if micro_batch < 2 and not i_know:
        raise UserError(f"batch = {recipe.batch}, micro-batch = {micro_batch}: one sample at a time leaves nothing to compare "
                        f"it with, and batches of one have ruined published runs; give at least 2, or --i-know")
    if recipe.head_lr <= recipe.student_lr and not i_know:
        raise UserError(f"head_lr = {recipe.head_lr}, student_lr = {recipe.student_lr}: heads that learn no faster than the "
                        f"student cannot lead it; raise head_lr, or --i-know")


def refuse_noise(x0, i_know):
    """Real samples [B, ...] whose mean is near 0, spread near 1 and neighbours uncorrelated are noise: a lost path once did that."""
    x = x0.float().flatten(1)
    if not x.isfinite().all():
        raise UserError("the real samples hold values that are not finite: check where they come from")
    neighbours = float((x[:, 1:] * x[:, :-1]).mean() / x.square().mean().clamp(min=1e-12))
    if abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05 and abs(neighbours) < 0.05 and not i_know:
        raise UserError("the real samples look like pure noise (mean 0, std 1, neighbours unrelated): check where they come from, or --i-know")


def pick_device(name):
    """The device by name, or the best one here; under torchrun each rank has the GPU of its own number."""
    if name in (None, "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("ladd knows cuda, mps and cpu")
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not here ({str(error).splitlines()[0]}); leave it out to have one chosen") from error
    if name == "mps":
        print("device mps: nobody has tested ladd on it yet")
    return torch.device(name)


def run_folder(options):
    """The run's folder, not yet made: a new one, or with --resume and --sample one that exists."""
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror}); name another folder") from error
    if options.name is None:
        if options.resume or options.sample:
            raise UserError("--name: say which run; these are there: " + ", ".join(sorted(p.parent.name for p in out.glob("*/config.json"))))
        taken = [int(p.name) for p in out.iterdir() if p.name.isdecimal()]
        return out / f"{max(taken, default=0) + 1:03d}"
    run = out / options.name
    if (run.parent != out or options.name in ("", ".", "..", "cache") or options.name.endswith(".part") or len(options.name) > 100
            or not options.name.isprintable()):
        raise UserError(f"--name {options.name[:100]!r}: give a plain folder name of at most 100 characters")
    if (options.resume or options.sample) and not (run / "config.json").exists():
        raise UserError(f"--name {options.name}: there is no such run in {out}")
    if run.exists() and not (options.resume or options.sample):
        raise UserError(f"--name {options.name}: {run} exists; choose another name, or --resume it")
    return run


def claim(run, numbered):
    """Make the folder that will become `run` when it is whole, run.part, and return run: with the next free number where another run
    has taken its own meanwhile."""
    part = run.with_name(run.name + ".part")
    if not numbered:
        shutil.rmtree(part, ignore_errors=True)         # of a start that was killed
        part.mkdir()
        return run
    with contextlib.suppress(FileExistsError):
        part.mkdir()                                    # of several that start at once one alone succeeds
        if not run.exists():
            return run
        part.rmdir()
    return claim(run.with_name(f"{int(run.name) + 1:03d}"), numbered)


def versions():
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10).stdout.strip()
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit or None}


def run_command(argv):
    if not argv:
        parser_for(None).print_help()
        return 2
    module = None
    if "--toy" in argv and "--zimage" in argv:
        raise UserError("--toy and --zimage: give one of them")
    if "--toy" in argv:
        from toy_mnist import world as module
    elif "--zimage" in argv:
        from zimage import world as module
    options = parser_for(module).parse_args(argv)
    options.command = "python ladd.py " + " ".join(argv)
    if module is None:
        raise UserError("say what to distil: --toy or --zimage (python ladd.py prints the help)")
    device = pick_device(options.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if options.toy:
            raise UserError("--toy: the toy runs in one process; leave torchrun out")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    run = from_first(lambda: run_folder(options))
    if options.resume or options.sample:
        options.recipe = options.recipe or str(run / "config.json")
    recipe = resolve_recipe(module, options)
    for name, low in (("evaluate_every", 0), ("checkpoint_every", 1), ("keep", 1), ("log_every", 1), ("least_diversity", 0)):
        if not getattr(options, name) >= low:           # nan is not
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {low}")
    if options.micro_batch is None:
        options.micro_batch = recipe.batch // ranks()
    refuse_known_ruin(recipe, options.micro_batch, options.i_know or options.resume or options.sample)    # then it was said once
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if options.log and importlib.util.find_spec(options.log) is None:
        raise UserError(f"--log {options.log}: it is not installed; pip install {options.log}, or leave the option out")
    world = module.make_world(recipe, options, device)
    unknown = [name for name in recipe.taps if name not in dict(world.tap_root.named_modules())]
    if unknown or not recipe.taps:
        raise UserError(f"taps = {list(recipe.taps)}: {unknown[0] if unknown else 'none given'!s} is no module of the teacher; "
                        f"the usual ones are {', '.join(module.REFERENCE.taps)}")
    if options.sample:
        return world.draw_sample(run, len(recipe.times) if options.steps is None else options.steps)

    if options.resume:
        stored = read_config(run / "config.json", "recipe", "data")
        if checkpoints(run) and step_of(checkpoints(run)[-1]) > recipe.iterations:
            raise UserError(f"iterations = {recipe.iterations}: run {run.name} has come to {checkpoints(run)[-1].name}; give at least that many")
        before = {**dataclasses.asdict(type(recipe)()), **stored["recipe"], **stored["data"], "iterations": 0}
        other = unlike(before, {**dataclasses.asdict(recipe), **world.fingerprint(), "iterations": 0})
        if other and not options.i_know:
            raise UserError(f"--resume: run {run.name} was made otherwise: {'; '.join(other)}; start a new run, or --i-know")
    changed = drift(recipe, module.REFERENCE)
    say("departs from the reference recipe in " + (", ".join(f"{k} = {b} (not {a})" for k, (a, b) in changed.items()) or "nothing"))
    world.prepare()
    refuse_noise(world.read(0, min(64, recipe.batch))[0], options.i_know or options.resume)
    if options.resume:                                  # a resumed run may be longer
        made_of = {"recipe": dataclasses.asdict(recipe), "drift": changed, "data": world.fingerprint()}
        from_first(lambda: write_json(run / "config.json", {**stored, **made_of}))
    else:                                               # made beside and renamed: a run's folder is whole or not there
        run = from_first(lambda: claim(run, options.name is None))
        part = run.with_name(run.name + ".part")
        from_first(lambda: write_json(part / "config.json", {"world": module.NAME, "recipe": dataclasses.asdict(recipe), "drift": changed,
                                                             "data": world.fingerprint(), **world.config, **versions()}))
        world.draw_start(part / "start.png")
        from_first(lambda: os.replace(part, run))
    say(f"run {run} on {device}{f', {ranks()} ranks' if ranks() > 1 else ''}")
    state = train(world, recipe, run, options, device)
    with state.averaged() as student:
        world.finish(run, student, changed)
    return 0


def main(argv=None):
    """The command line; returns the exit code: bad input is one line on stderr and 2, Ctrl-C and SIGTERM one line and 130."""
    together = False                                    # do all ranks come to this end?
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)      # as Ctrl-C
    try:
        code = run_command(sys.argv[1:] if argv is None else argv)
        together = True
        return code
    except KeyboardInterrupt:                           # outside the loop, which saves
        print("ladd: stopped; the same command goes on, with --resume --name NAME where the run's folder is there already", file=sys.stderr)
        return 130
    except (UserError, OSError, RuntimeError) as error:
        line = str(error).replace("\n", " ")
        if isinstance(error, RuntimeError):
            if "allocate" not in line:                  # torch has no other word for too little memory on a CPU
                raise
            line = f"out of memory ({line[:100]} ...): give a smaller --micro-batch, or --samples in the toy"
        print(f"ladd{f' (rank {rank()})' if ranks() > 1 else ''}: {line}", file=sys.stderr)
        together = isinstance(error, Stopped)
        return 130 if together else 2
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_available() and dist.is_initialized() and (together or ranks() == 1):
            dist.destroy_process_group()                # which would wait for ranks that wait for this one: torchrun ends those


if __name__ == "__main__":
    import ladd             # hand over to the imported module, so that no class exists twice
    sys.exit(ladd.main())
