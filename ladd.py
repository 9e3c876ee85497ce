"""ladd: Latent Adversarial Diffusion Distillation (LADD, Sauer et al., arXiv 2403.12015), one file.

LADD turns a many-step diffusion or flow teacher into a student that needs 1 to 4 steps. The student
guesses the clean sample x0 in one step. The guess (fake) and a sample of the teacher (real) get
noise again, up to a random time t_hat, because the teacher knows noised inputs only. The frozen
teacher is run on both. Small heads read its inner layers, the taps, and learn to tell real from
fake; the student learns to fool them. Much noise leaves only layout to judge, little noise leaves
detail too. Nothing is decoded to pixels.

    python ladd.py --toy            distil the shipped Color-MNIST teacher, and print a table
    python ladd.py --toy --help     every option, with its meaning
    torchrun --nproc_per_node=8 ladd.py --zimage --data DIR     distil Z-Image (6B)

This file is the method. A world (toy_mnist/, zimage/ or your own) brings teacher, data and
evaluation: see `World`. DEPARTURE marks where we leave the paper; the README says why.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import typing
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP says so in one process


class UserError(Exception):
    """Bad input: one line that names the field, the value and the way out."""


def check(ok, message):
    if not ok:
        raise UserError(message)


# ---- 1. Flow matching ----------------------------------------------------------------------------
# One convention holds everywhere; each world converts its model in one place:
#        t in [0, 1], 0 = clean, 1 = noise;   x_t = (1 - t) x0 + t eps;   v = eps - x0.
#    A model is velocity(x_t [B, ...], t [B], cond) -> v [B, ...], float32.


def expand(t, like):
    """t [B] -> [B, 1, ..., 1], to broadcast over like [B, ...]. ValueError on another shape."""
    if t.shape != like.shape[:1]:
        raise ValueError(f"t has shape {list(t.shape)}; it must be [{len(like)}]")
    return t.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x0, eps, t):
    """x_t = (1 - t) x0 + t eps (rectified flow, arXiv 2209.03003). x0, eps [B, ...], t [B]."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * eps


def velocity_to_x0(x_t, v, t):
    """The clean sample that x_t and v point to: x0 = x_t - t v. x_t, v [B, ...], t [B]."""
    return x_t - expand(t, x_t) * v


def guided(velocity, null_cond, w, interval=(0.0, 1.0)):
    """Classifier-free guidance (arXiv 2207.12598) as a velocity: neg + w (pos - neg).

    pos is the velocity under cond, neg that under null_cond(cond). Guidance is applied for t in the
    interval (arXiv 2404.07724). If no sample lies in it, or w = 1, one pass is made instead of two.
    Under FSDP all ranks must make the same calls: leave the interval at its default there.
    """
    low, high = interval[0] - 1e-6, interval[1] + 1e-6  # t is float32: allow for rounding

    def guided_velocity(x_t, t, cond):
        pos, inside = velocity(x_t, t, cond), (t >= low) & (t <= high)
        if w == 1 or not inside.any():
            return pos
        neg = velocity(x_t, t, null_cond(cond))
        return torch.where(expand(inside, pos), neg + w * (pos - neg), pos)

    return guided_velocity


# ---- 2. Sampling: one evaluation for each time; the last step goes to t = 0 ----------------------


@torch.no_grad()
def sample_euler(velocity, noise, times, cond, renoise=None):
    """Euler steps along the ODE. noise [B, ...] of unit variance -> x0 [B, ...].

    times fall and stay above 0, like [1, 0.75, 0.5, 0.25]; sampling starts at times[0] * noise.
    renoise(k) -> noise [B, ...] for step k = 1, 2, ...: each step then guesses x0 and noises it
    afresh to the next time (consistency sampling, arXiv 2303.01469, algorithm 1).
    """
    x = times[0] * noise
    for k, (t, t_next) in enumerate(zip(times, [*times[1:], 0.0], strict=True), 1):
        v = velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), cond)
        if renoise and t_next > 0:
            x = (1 - t_next) * (x - t * v) + t_next * renoise(k).to(x)
        else:
            x = x + (t_next - t) * v
    return x


def step_times(times, n):
    """The n times of an n-step sampler, about evenly among the student's: 2 of 4 are [1, 0.5]."""
    check(1 <= n <= len(times), f"--steps {n}: give 1 to {len(times)}, the student's own steps")
    return [times[k * len(times) // n] for k in range(n)]


def sample_student(velocity, recipe, noise, cond, steps, index=None):
    """noise [B, ...] -> x0 [B, ...] in so many steps. index [B] keys the sampler's fresh noise."""
    cond = noise.new_zeros(len(noise), 0) if cond is None else cond  # as `read_batch` has it
    index = range(len(noise)) if index is None else index

    def renoise(k):
        return keyed_noise(index, noise.shape[1:], recipe.seed, "re-noise", k)

    fresh = renoise if recipe.sampler == "renoise" else None
    return sample_euler(velocity, noise, step_times(recipe.times, steps), cond, fresh)


# ---- 3. Taps: read a network's inner features without touching its code --------------------------


class LastTap(Exception):
    """Ends a forward pass after its last tapped module: what lies deeper is not needed."""


def tapped(root, names, forward, early_exit=True):
    """Run forward() and return the outputs of root's modules `names`, in that order.

    Of a module that runs twice the first output is kept. With early_exit the pass ends at the last
    tap. UserError names a module that does not exist or does not run.
    """
    modules, outputs = dict(root.named_modules()), {}
    check(names, "taps = (): name the modules of the teacher that the heads read")

    def hook(module, inputs, output):
        outputs.setdefault(module, output)
        if early_exit and len(outputs) == len(names):
            raise LastTap

    with contextlib.ExitStack() as stack, contextlib.suppress(LastTap):
        for name in names:
            check(name in modules, f"taps: {name!r} is no module of the teacher")
            stack.enter_context(modules[name].register_forward_hook(hook))
        forward()
    for name in names:
        check(modules[name] in outputs, f"taps: {name!r} is never run by the teacher")
    return [outputs[modules[name]] for name in names]


# ---- 4. Heads: one small discriminator per tap (the paper does not spell them out) ---------------


def fourier(t, n=32):
    """Cosines and sines of t [B] in [0, 1] at n frequencies, 1/4 to 64 turns. [B, 2n]"""
    phase = 2 * math.pi * t[:, None] * torch.logspace(-2, 6, n, base=2, device=t.device)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class Head(nn.Module):
    """A feature map [B, C, H, W] and an embedding [B, E] -> one logit per patch [B, h, w].

    DEPARTURE: the mean and deviation of maps f of real samples standardise each channel. They stay
    fixed. A normalisation layer such as GroupNorm would weaken the discriminator (R3GAN, arXiv
    2501.05441) and remove each sample's own mean and contrast. A stride halves a map over 8 wide.
    """

    def __init__(self, f, width, emb):
        super().__init__()
        self.register_buffer("mean", f.mean((0, 2, 3), keepdim=True)[0])
        self.register_buffer("std", f.std((0, 2, 3), keepdim=True)[0] + 1e-3)
        stride = 2 if max(f.shape[2:]) > 8 else 1
        self.conv1 = nn.Conv2d(f.shape[1], width, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(emb, 4 * width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, f, emb):
        scale1, shift1, scale2, shift2 = self.film(emb)[:, :, None, None].chunk(4, dim=1)
        h = self.conv1((f - self.mean) / self.std)  # [B, width, h, w]
        h = F.leaky_relu(h * (1 + scale1) + shift1, 0.2)
        h = F.leaky_relu(h + self.conv2(h) * (1 + scale2) + shift2, 0.2)
        return self.out(h)[:, 0]


class Heads(nn.Module):
    """One head per tap. Each is conditioned on t_hat and on the sample's condition.

    DEPARTURE: with see_t each is conditioned on the student's own t too.
    maps: of real samples, for the constants of `Head`. cond_dim: the length of a condition vector.
    dtype: what the heads compute in; their weights are float32. head: the class of each head.
    """

    def __init__(self, maps, cond_dim, width=64, see_t=False, dtype=torch.float32, head=Head):
        super().__init__()
        self.see_t, self.dtype = see_t, dtype
        told, emb = 64 * (1 + see_t) + cond_dim, 2 * width
        self.embed = nn.ModuleList(
            nn.Sequential(nn.Linear(told, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
            for _ in maps
        )
        self.heads = nn.ModuleList(head(f.float(), width, emb) for f in maps)

    def forward(self, maps, t_hat, cond, t):
        """maps [B, C, H, W] per tap, t_hat [B], cond [B, D], t [B] -> logits [B, h, w] per tap."""
        told = torch.cat([fourier(t_hat), cond, *([fourier(t)] if self.see_t else [])], dim=1)
        each = zip(self.heads, self.embed, maps, strict=True)
        with autocast(t.device, self.dtype):
            return [head(f, embed(told)).float() for head, embed, f in each]


def autocast(device, dtype):
    """bfloat16 where dtype says so. No weight cache: in a caller's autocast it goes stale."""
    return torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16, cache_enabled=False)


# ---- 5. Losses -----------------------------------------------------------------------------------
# Each is averaged over samples and patches, then over heads: a larger map counts no more.


def mean_over_heads(loss, *logits):
    """mean_k mean(loss(a_k, b_k, ...)) over lists of logits of equal length. A scalar."""
    return torch.stack([loss(*k).mean() for k in zip(*logits, strict=True)]).mean()


LOSSES = {  # name: (loss of the heads, loss of the student), each of (real logit, fake logit)
    "hinge": (lambda real, fake: F.relu(1 - real) + F.relu(1 + fake), lambda real, fake: -fake),
}


def gradient_penalty(state, recipe, b, maps, logits, told, side):
    """DEPARTURE: approximate R1 (real) or R2 (fake), APT, arXiv 2501.08316, on features. Scalar.

    mean (D(f + noise) - D(f))^2: logits should not jump when features get a little noise, of
    penalty_std times each channel's deviation. The teacher is not run again.
    told: the heads' arguments besides the maps. side: "real" or "fake", a key of the noise.
    """
    shaken = []
    for k, (head, f) in enumerate(zip(state.heads.heads, maps, strict=True)):
        key = (recipe.seed, b.iteration, "penalty", side, k)
        noise = keyed_noise(b.index, f.shape[1:], *key, device=f.device)
        shaken.append(f + recipe.penalty_std * head.std * noise)
    return mean_over_heads(lambda d, near: (d - near).square(), logits, state.heads(shaken, *told))


# ---- 6. The recipe -------------------------------------------------------------------------------


def field(default, help, choices=None, least=0.0, most=math.inf):
    """A dataclass field with its help (meaning, unit, source) and limits, which `typed` checks."""
    metadata = {"help": help, "choices": choices, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run computes. The defaults are the paper's where it gives a number.

    F is one forward pass of the teacher. An iteration costs 3 F: the student, the teacher on real
    and on fake. A student update adds 3 F: backward through the teacher 1 (inputs only), through
    the student 2 (inputs and weights). "+1 F" in a field's help: it adds about so much. UserError
    where a value makes no sense.
    """

    iterations: int = field(2000, "iterations; each updates the heads", least=1)
    batch: int = field(64, "samples per iteration, over all ranks and micro-batches", least=1)
    seed: int = field(0, "keys every random draw of the run", most=2**63 - 1)
    times: tuple[float, ...] = field((1.0, 0.75, 0.5, 0.25), "the student's times t (LADD)")
    time_probs: tuple[float, ...] = field((0.7, 0.1, 0.1, 0.1), "probability of each time (LADD)")
    warmup_probs: tuple[float, ...] = field((0.0, 0.0, 0.5, 0.5), "during the warm-up (LADD)")
    warmup: int = field(500, "iterations that use warmup_probs (LADD: 500)")
    renoise_mean: float = field(1.0, "m of the re-noising time t_hat (LADD: 1)", least=-math.inf)
    renoise_std: float = field(1.0, "s of t_hat ~ LogitNormal(m, s) (LADD: 1)")
    share_noise: bool = field(True, "same t_hat and noise for real and fake (DEPARTURE)")
    student_lr: float = field(1e-4, "peak learning rate of the student")
    head_lr: float = field(1e-3, "peak learning rate of the heads")
    lr_warmup: int = field(50, "iterations over which both learning rates rise from 0")
    lr_decay: str = field("cosine", "cosine: the student's lr decays", ("none", "cosine", "both"))
    beta1: float = field(0.0, "first moment of both AdamW optimizers", most=0.9999)
    beta2: float = field(0.99, "second moment of both AdamW optimizers", most=0.9999)
    gen_every: int = field(1, "update the student every so many iterations", least=1)
    clip: float = field(1.0, "largest gradient norm of the student, and of the heads")
    loss: str = field("hinge", "the adversarial game (LADD: hinge)", tuple(LOSSES))
    adv_weight: float = field(1.0, "weight of the adversarial loss of the student")
    penalty_weight: float = field(0.0, "weight of R1 and R2 on the heads' input features")
    penalty_std: float = field(0.1, "noise of that penalty, in standard deviations of a feature")
    misaligned_weight: float = field(0.0, "weight of misaligned pairs, `misaligned_loss`, +1 F")
    anchor_weight: float = field(0.0, "weight of the pull to the teacher's v at t < 1, +1 F")
    paired_share: float = field(0.0, "share that starts from the noise that made x0", most=1)
    distill_weight: float = field(0.0, "weight of the squared error to a known target")
    distill_power: float = field(0.0, "divide that error by t to this power (2: an error of v)")
    distill_own: bool = field(False, "unpaired at t = 1: aim at the student's own sample, +1 F")
    backward_simulation: bool = field(False, "at t < 1 start where its own steps lead, +1 F")
    ema_half_life: float = field(10_000.0, "half-life of the average, in samples (0 = no average)")
    ema_ramp: float = field(0.1, "half-life: at most this share of the samples so far", least=1e-6)
    taps: tuple[str, ...] = field((), "modules of the teacher that the heads read")
    head_width: int = field(64, "channels of the heads", least=1, most=8192)
    heads_see_t: bool = field(False, "condition the heads on the student's t too (DEPARTURE)")
    sampler: str = field("euler", "sampler of the student", ("euler", "renoise"))

    def __post_init__(self):
        type_fields(self)
        times = list(self.times)
        falling = times[:1] == [1] and times == sorted(set(times), reverse=True) and times[-1] > 0
        check(falling, f"times = {times}: give times that fall from 1 and stay above 0")
        for name in ("time_probs", "warmup_probs"):
            p = getattr(self, name)
            ok = len(p) == len(times) and abs(sum(p) - 1) < 1e-6
            check(ok, f"{name} = {p}: give one probability per time; together they are 1")


# What the worlds' recipes share. `ladd` and `zimage-ladd` use the game and the anchor, GAME.
GAME = {"warmup": 0, "time_probs": (0.5, 0.2, 0.15, 0.15), "renoise_std": 1.5}
GAME |= {"penalty_weight": 5.0, "misaligned_weight": 0.25, "anchor_weight": 1.0}
GAME |= {"backward_simulation": True, "heads_see_t": True}
# `toy` and `zimage` use TARGETS too, which halve the weight of the game.
TARGETS = {"adv_weight": 0.5, "paired_share": 0.5}
TARGETS |= {"distill_weight": 1.0, "distill_power": 2.0, "distill_own": True}


# ---- 7. Draws: keyed by what they are for, made on the CPU, except the penalty's noise -----------
# No random state is saved (use no dropout). All ranks together draw what one alone would draw.


def generator(*key, device="cpu"):
    """A generator that depends on the words and numbers of `key`, and on the kind of device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def keyed_noise(index, shape, *key, device="cpu"):
    """Unit noise [len(index), *shape]. Sample k is keyed by (*key, index[k])."""
    keyed = [generator(*key, int(k), device=device) for k in index]
    return torch.stack([torch.randn(*shape, generator=gen, device=device) for gen in keyed])


@dataclasses.dataclass
class Batch:
    """A micro-batch of B samples, on the device of the run."""

    iteration: int
    index: torch.Tensor  # [B] each sample's place in the joint batch, on the CPU
    x0: torch.Tensor  # [B, ...] samples of the teacher
    cond: typing.Any  # their conditions, in the world's own form
    real: torch.Tensor  # [B, ...] what the heads are shown as real: x0, or other samples
    t: torch.Tensor  # [B] the student's time
    eps: torch.Tensor  # [B, ...] the noise of its input
    paired: torch.Tensor  # [B] is eps the stored noise, from which the teacher made x0?
    t_hat: torch.Tensor  # [B] the time to which the guess is re-noised
    eps_hat: torch.Tensor  # [B, ...] and the noise
    t_real: torch.Tensor  # [B] the time to which the real sample is re-noised
    eps_real: torch.Tensor  # [B, ...] and the noise
    x_t: torch.Tensor | None = None  # [B, ...] the student's input, filled in by `train_step`
    real_logits: list | None = None  # [B, h, w] per tap, of the heads before their step


def draw(recipe, iteration, index, shape):
    """The random draws of samples `index` of an iteration's joint batch, as fields of `Batch`.

    The draws of sample k are keyed by (seed, iteration, k). Paired samples lie evenly in the batch.
    t_hat = sigmoid(m + s z) for standard normal z (SD3, arXiv 2403.03206, section 3.1).
    """
    sides = 1 if recipe.share_noise else 2
    probs = recipe.warmup_probs if iteration < recipe.warmup else recipe.time_probs
    gens = [generator(recipe.seed, iteration, k, "draw") for k in index.tolist()]
    which = [torch.multinomial(torch.tensor(probs), 1, generator=gen) for gen in gens]
    t = torch.tensor(recipe.times)[torch.cat(which)]  # [B]
    z = torch.stack([torch.randn(sides, generator=gen) for gen in gens])
    t_hat = torch.sigmoid(recipe.renoise_mean + recipe.renoise_std * z)  # [B, sides]
    noise = torch.stack([torch.randn(1 + sides, *shape, generator=gen) for gen in gens])
    # With shared noise there are two noises: the last is both eps_hat and eps_real.
    eps, eps_hat, eps_real = (noise[:, k] for k in (0, 1, -1))  # [B, ...]
    paired = ((index + 1) * recipe.paired_share).floor() > (index * recipe.paired_share).floor()
    draws = {"t": t, "eps": eps, "paired": paired, "t_hat": t_hat[:, 0], "eps_hat": eps_hat}
    return {**draws, "t_real": t_hat[:, -1], "eps_real": eps_real}


def read_batch(world, recipe, iteration, start, count, device):
    """Samples start .. start + count - 1 of an iteration's joint batch, with their draws."""
    x0, cond, noise, real = world.batch(iteration * recipe.batch + start, count)
    index = torch.arange(start, start + count)
    draws = draw(recipe, iteration, index, x0.shape[1:])
    if recipe.paired_share:
        check(noise is not None, "paired_share: this world stores no noise; give 0")
        draws["eps"] = torch.where(expand(draws["paired"], noise), noise, draws["eps"])
    cond = torch.zeros(count, 0) if cond is None else cond
    tensors = {"x0": x0, "cond": cond, "real": real, **draws}
    return Batch(iteration, index, **{k: v.to(device) for k, v in tensors.items()})


# ---- 8. One iteration ----------------------------------------------------------------------------


def train_step(state, world, recipe, i, micro_batch=None, losses=None):
    """Iteration i: a step of the heads, then a step of the student against these newer heads.

    DEPARTURE: the heads step first. The gradients of micro-batches add up to those of the batch.
    One micro-batch: both steps use one guess. Several: to keep their graphs would take too much
    memory, so the student's step guesses again, for 2 F. Returns metrics.
    losses: yours, in place of `heads_loss` (which sets b.real_logits) and `student_loss`.
    """
    loss_of_heads, loss_of_student = losses or (heads_loss, student_loss)
    student_turn = updates_student(recipe, i)
    n = recipe.batch // world_size()  # this rank's part of the joint batch
    size, metrics = micro_batch or n, {}

    def backward(loss, values):
        (loss * size / n).backward()
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0) + value.detach() * size / n

    starts = range(rank() * n, (rank() + 1) * n, size)
    batches = [read_batch(world, recipe, i, start, size, state.device) for start in starts]
    for b in batches:  # with only one, its graph is kept for the student's step
        b.x_t = student_input(state.student, recipe, b)
        x0_hat, fake = guess(state.student, world, b, student_turn and size == n)
        with torch.no_grad():
            real = world.features(interpolate(b.real, b.eps_real, b.t_real), b.t_real, b.cond)
        backward(*loss_of_heads(state, world, recipe, b, real, [f.detach() for f in fake]))
    norms = {"heads_grad_norm": clip_and_step(state, recipe, i, "heads")}
    if student_turn:
        state.heads.requires_grad_(False)
        for b in batches:
            if size < n:  # of several micro-batches no graph was kept
                x0_hat, fake = guess(state.student, world, b, True)
            backward(*loss_of_student(state, world, recipe, b, fake, x0_hat))
        state.heads.requires_grad_(True)
        norms["student_grad_norm"] = clip_and_step(state, recipe, i, "student")
    return {**metrics, **norms, "skipped": count_skipped(state, i, norms)}


def guess(student, world, b, grad):
    """The student's guess x0_hat [B, ...], and the teacher's maps of it, re-noised."""
    with torch.set_grad_enabled(grad):
        x0_hat = velocity_to_x0(b.x_t, student(b.x_t, b.t, b.cond), b.t)
        return x0_hat, world.features(interpolate(x0_hat, b.eps_hat, b.t_hat), b.t_hat, b.cond)


@torch.no_grad()
def student_input(student, recipe, b):
    """The student's input x_t [B, ...]: the noised x0, or where its own steps arrive at t.

    DEPARTURE: backward simulation (DMD2, arXiv 2405.14867, section 4.5) takes Euler steps from the
    noise to each sample's t. So the student trains on inputs that it meets in Euler sampling.
    """
    if not recipe.backward_simulation:
        return interpolate(b.x0, b.eps, b.t)
    x = b.eps
    for t, t_next in itertools.pairwise(recipe.times):
        mask = b.t < t
        rows = rows_of(mask)
        v = student(x[rows], torch.full_like(b.t[rows], t), b.cond[rows])
        moved = x.index_copy(0, rows, x[rows] + (t_next - t) * v)
        x = torch.where(expand(mask, x), moved, x)
    return x


def rows_of(mask):
    """The indices where mask [B] is true; if there are none, [0]: FSDP needs a call anyway."""
    return mask.nonzero()[:, 0] if mask.any() else mask.new_zeros(1, dtype=torch.long)


def heads_loss(state, world, recipe, b, real, fake):
    """Loss of the heads, and metrics. real, fake: maps [B, C, H, W] per tap, without gradient."""
    cond = world.head_cond(b.cond)
    told_real, told_fake = (b.t_real, cond, b.t), (b.t_hat, cond, b.t)  # real gets the fake's t
    real_logits, fake_logits = state.heads(real, *told_real), state.heads(fake, *told_fake)
    b.real_logits = [r.detach() for r in real_logits]
    loss = mean_over_heads(LOSSES[recipe.loss][0], real_logits, fake_logits)
    metrics = {"heads_loss": loss, **diagnostics(recipe, real, fake, real_logits, fake_logits)}
    if recipe.penalty_weight:
        r1 = gradient_penalty(state, recipe, b, real, real_logits, told_real, "real")
        r2 = gradient_penalty(state, recipe, b, fake, fake_logits, told_fake, "fake")
        metrics["penalty"] = r1 + r2
        loss = loss + recipe.penalty_weight * metrics["penalty"]
    if recipe.misaligned_weight:
        metrics["misaligned_loss"] = misaligned_loss(state, world, recipe, b, real_logits)
        loss = loss + recipe.misaligned_weight * metrics["misaligned_loss"]
    return loss, metrics


def misaligned_loss(state, world, recipe, b, real_logits):
    """DEPARTURE: softplus(wrong - right). Under another sample's condition real should score less.

    This ties the heads to the condition (misaligned pairs, SANA-Sprint, arXiv 2503.09641). Places 0
    and 1, 2 and 3, ... of the joint batch exchange their conditions. The teacher gets the wrong
    condition too: otherwise its features would show the right one, whatever the sample is.
    """
    wrong = b.cond[torch.arange(len(b.index)) ^ 1]  # a micro-batch starts at an even place
    wrong_cond = world.head_cond(wrong)
    differs = (wrong_cond != world.head_cond(b.cond)).any(1)  # [B]
    with torch.no_grad():
        maps = world.features(interpolate(b.real, b.eps_real, b.t_real), b.t_real, wrong)
    logits = state.heads(maps, b.t_real, wrong_cond, b.t)
    return mean_over_heads(lambda w, r: F.softplus(w - r) * expand(differs, w), logits, real_logits)


def student_loss(state, world, recipe, b, fake, x0_hat):
    """Loss of the student, and metrics. fake: maps [B, C, H, W], with gradient to x0_hat."""
    logits = state.heads(fake, b.t_hat, world.head_cond(b.cond), b.t)
    metrics = {"student_loss": mean_over_heads(LOSSES[recipe.loss][1], b.real_logits, logits)}
    loss = recipe.adv_weight * metrics["student_loss"]
    if recipe.distill_weight:
        metrics["distill_loss"] = distillation_loss(state.student, recipe, b, x0_hat)
        loss = loss + recipe.distill_weight * metrics["distill_loss"]
    if recipe.anchor_weight:
        metrics["anchor_loss"] = anchor_loss(world, b, x0_hat)
        loss = loss + recipe.anchor_weight * metrics["anchor_loss"]
    return loss, metrics


def distillation_loss(student, recipe, b, x0_hat):
    """DEPARTURE: squared error of the guess to a known target, divided by t^distill_power.

    Paired (stored noise): the target is x0, the teacher's sample that was made from it.
    Unpaired at t = 1: with distill_own where all its Euler steps lead; else none.
    Unpaired at t < 1: the x0 that the noise was added to; with backward simulation none.
    """
    known = b.paired | ((b.t < 1) & (not recipe.backward_simulation))
    target = b.x0
    if recipe.distill_own:
        fresh = ~b.paired & (b.t == 1)
        rows = rows_of(fresh)
        own = sample_euler(student, b.x_t[rows], recipe.times, b.cond[rows])
        target = torch.where(expand(fresh, target), target.index_copy(0, rows, own), target)
        known = known | fresh
    error = (x0_hat - target).square().flatten(1).mean(1) / b.t**recipe.distill_power  # [B]
    return (error * known).mean()


def anchor_loss(world, b, x0_hat):
    """DEPARTURE: (1 - t) times the squared error to the teacher's velocity, for t < 1.

    At small t the untrained student, a copy of the teacher, is almost right, and the game would
    move it away. At t = 1 the weight is 0: there the teacher's guess is only an average.
    """
    rows = rows_of(b.t < 1)
    v = (b.x_t - x0_hat) / expand(b.t, b.x_t)
    with torch.no_grad():
        v_teacher = v.index_copy(0, rows, world.anchor(b.x_t[rows], b.t[rows], b.cond[rows]))
    return ((1 - b.t) * (v - v_teacher).square().flatten(1).mean(1)).mean()


@torch.no_grad()
def diagnostics(recipe, real, fake, real_logits, fake_logits):
    """What to watch of the heads.

    accuracy/TAP: how often the real sample's logit is above the fake's at the same place; 0.5 is
    chance. diversity: how far neighbours in the batch lie apart at the last tap, fakes divided by
    reals. 1 is healthy, less is a sign of collapse.
    """
    last = [maps[-1].float().flatten(1) for maps in (fake, real)]
    fakes, reals = ((f - f.roll(1, 0)).norm(dim=1).mean().clamp(min=1e-12) for f in last)
    metrics = {"diversity": fakes / reals}
    for name, r, f in zip(recipe.taps or range(len(real)), real_logits, fake_logits, strict=True):
        metrics[f"accuracy/{name}"] = ((r > f).float() + (r == f).float() / 2).mean()
    return metrics


def updates_student(recipe, i):
    """Does iteration i (from 0) update the student? Never the first: the heads know nothing yet."""
    return i > 0 and (i + 1) % recipe.gen_every == 0


def learning_rate(recipe, i, student):
    """The learning rate of iteration i: both rise over lr_warmup, and may decay by a cosine."""
    scale = min(1.0, (i + 1) / max(recipe.lr_warmup, 1))
    if recipe.lr_decay == "both" or (student and recipe.lr_decay == "cosine"):
        scale *= 0.5 + 0.5 * math.cos(math.pi * i / recipe.iterations)
    return scale * (recipe.student_lr if student else recipe.head_lr)


def clip_and_step(state, recipe, i, name):
    """Clip and step the "heads" or the "student", if finite on all ranks. Returns the norm."""
    model, opt = getattr(state, name), getattr(state, f"{name}_opt")
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    mean_over_ranks_([g for g in grads if not hasattr(g, "full_tensor")])  # FSDP averages its own
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    opt.param_groups[0]["lr"] = learning_rate(recipe, i, name == "student")
    if math.isfinite(norm):
        opt.step()
        if name == "student":
            state.ema.update(model, (i + 1) * recipe.batch, recipe.gen_every * recipe.batch)
    opt.zero_grad(set_to_none=True)
    return norm


def count_skipped(state, i, norms):
    """Was a step left out? 1.0 or 0.0. UserError at the third such iteration in a row."""
    finite = all(map(math.isfinite, norms.values()))
    if not finite or "student_grad_norm" in norms:  # an update of the heads alone clears nothing
        state.skipped = 0 if finite else state.skipped + 1
    way_out = "start a new run with a lower student_lr or head_lr"
    check(state.skipped < 3, f"iteration {i + 1}: three non-finite gradients in a row: {way_out}")
    return float(not finite)


# ---- 9. World, what a run is given, and State, what it changes -----------------------------------


def reader_indices(n, start, count, seed):
    """Positions start .. start + count - 1 of an endless shuffled reader of n samples.

    Returns index [count], epoch [count]. The order of an epoch is keyed by (seed, epoch).
    """
    position = torch.arange(start, start + count)
    epoch, index = position // n, torch.empty(count, dtype=torch.long)
    for e in epoch.unique().tolist():
        order = torch.randperm(n, generator=generator(seed, e, "reader"))
        index[epoch == e] = order[position[epoch == e] % n]
    return index, epoch


class World:
    """Teacher, data, evaluation; its recipe is `train`'s. Your own must define `batch` and taps."""

    reference = None  # the recipe that config.json lists the differences from (None: Recipe())
    head = Head  # the class of each head: one built and called like `Head`

    def __init__(self, teacher, recipe):
        """teacher: nn.Module velocity(x_t [B, ...], t [B], cond) -> v [B, ...], float32."""
        self.teacher, self.recipe = teacher, recipe

    def make_student(self):
        """The network to train. Keep its weights float32: coarser ones would lose small updates."""
        return copy.deepcopy(self.teacher).requires_grad_(True).train()

    def features(self, x_t, t, cond):
        """The teacher's features of x_t, one map [B, C, H, W] per tap. Gradients flow to x_t."""
        maps = tapped(self.teacher, self.recipe.taps, lambda: self.teacher(x_t, t, cond))
        return [f[:, :, None, None] if f.ndim == 2 else f for f in maps]

    def anchor(self, x_t, t, cond):
        """The velocity that anchor_loss pulls the student to. Override it if samples are guided."""
        return self.teacher(x_t, t, cond)

    def head_cond(self, cond):
        """The condition as the heads see it: vectors [B, D]."""
        return cond.float().reshape(len(cond), -1)

    def batch(self, start, count):
        """Samples start .. start + count - 1 of an endless reader: x0, cond, noise, real.

        The same start gives the same samples. x0 [B, ...]: samples of the teacher. cond: anything
        that can be indexed by a tensor and has `.to`, or None: the networks then get zeros [B, 0].
        noise [B, ...]: what each x0 was made from, or None. real [B, ...]: what the heads are shown
        as real, x0 or other samples of the same conditions.
        """
        raise NotImplementedError

    def fingerprint(self):
        """What teacher and data were made of, for JSON: a run is resumed only with the same."""
        return {}

    def evaluate(self, student, run, step):
        """Metrics of a student, and a grid as run/samples/STEP.png. Every rank calls it.

        "score" (lower is better) chooses the best student: it must fall by more than "score_error"
        (default 0). "collapse" lists signs of collapse.
        """
        return {}

    def save(self, student, run, name="student"):
        """Write the student into the folder `run` by that name. Every rank calls it."""
        save_weights(Path(run) / f"{name}.safetensors", student.state_dict(), {"kind": "student"})

    def finish(self, student, run):
        """After `train`, by the command line on every rank: save the student, report on it."""
        self.save(student, run)


class State:
    """What changes while a run trains: student, heads, optimizers, average, skips, best score."""

    def __init__(self, world, recipe, device, dtype=torch.float32):
        self.device = device
        b = read_batch(world, recipe, 0, 0, min(recipe.batch, 32), device)
        x_t = interpolate(b.real, b.eps_real, b.t_real)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(recipe.seed)  # keys the initial weights
            self.student = world.make_student()
            parts = []  # two samples at a time take no more of a GPU than training does
            for k in b.index.split(2):
                parts.append([m.cpu() for m in world.features(x_t[k], b.t_real[k], b.cond[k])])
            taps = range(len(parts[0]))
            maps = [torch.cat([part.pop(0) for part in parts]) for _ in taps]  # frees as it goes
            for m in maps:
                check(m.ndim == 4, f"taps: one gives {list(m.shape)}, not a map [B, C, H, W]")
            settings = (world.head_cond(b.cond).shape[1], recipe.head_width, recipe.heads_see_t)
            self.heads = Heads(maps, *settings, dtype, world.head).to(device)
            # All ranks take rank 0's heads: devices may differ in the rounding of constants.
            for v in self.heads.state_dict().values() if world_size() > 1 else ():
                dist.broadcast(v, 0)
        self.student_opt = adamw(self.student, recipe)
        self.heads_opt = adamw(self.heads, recipe)
        self.ema = EMA(self.student, recipe.ema_half_life, recipe.ema_ramp)
        self.skipped = 0  # iterations in a row with a step left out, for non-finite gradients
        self.best = math.inf  # the best score so far

    @contextlib.contextmanager
    def averaged(self):
        """Inside, weights and average trade places, in eval mode: no third copy is needed."""
        self.ema.swap(self.student)
        try:
            yield self.student.eval()
        finally:
            self.ema.swap(self.student.train())


def adamw(model, recipe):
    """AdamW with a state from the start; else `get_state_dict` would take a step to make it."""
    fused = next(model.parameters()).is_cuda or None  # on a GPU the default makes large temporaries
    betas = (recipe.beta1, recipe.beta2)
    opt = torch.optim.AdamW(model.parameters(), 0.0, betas, weight_decay=0.0, fused=fused)
    for p in model.parameters():
        opt.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
        opt.state[p]["step"] = torch.zeros((), device=p.device if fused else "cpu")
    return opt


class EMA:
    """Exponential moving average of a model's parameters. half_life in samples; 0: no average.

    The half-life is at most `ramp` of the samples seen so far (EDM, arXiv 2206.00364). Otherwise a
    short run's average would be mostly its first weights.
    """

    def __init__(self, model, half_life, ramp):
        self.half_life, self.ramp = half_life, ramp
        self.mean = [p.detach().clone() for p in model.parameters() if half_life]

    @torch.no_grad()
    def update(self, model, seen, new):
        """After a step: `seen` samples in all, `new` of them per update."""
        for mean, p in zip(self.mean, model.parameters(), strict=False):
            keep = 0.5 ** (new / min(self.half_life, self.ramp * seen))
            mean.lerp_(p, 1 - keep)

    @torch.no_grad()
    def swap(self, model):
        """Exchange the model's weights and their average."""
        for mean, p in zip(self.mean, model.parameters(), strict=False):
            weights = p.clone()
            p.copy_(mean)
            mean.copy_(weights)


# ---- 10. Training --------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """How a run is carried out."""

    resume: bool = field(False, "go on from the newest checkpoint, or start if there is none")
    micro_batch: int = field(0, "samples per pass and rank (0: batch / ranks)")
    evaluate_every: int = field(200, "iterations between evaluations; not after the last (0: none)")
    checkpoint_every: int = field(200, "iterations between checkpoints", least=1)
    keep: int = field(2, "checkpoints to keep", least=1)
    log_every: int = field(20, "iterations averaged in a line of metrics.jsonl", least=1)
    stop_on_collapse: bool = field(False, "end the run at the first sign of collapse")
    dtype: str = field("float32", "of networks; command line: the fastest", ("bfloat16", "float32"))

    def __post_init__(self):
        type_fields(self)


def train(world, recipe, run, options=None, losses=None):
    """Distil into the folder `run`, which is made, or resumed. Returns the finished `State`.

    Works from a script, a notebook or a thread. UserError where the run can't start or go on.
    losses: as in `train_step`. Freezes the world's teacher. Sets TF32: on for bfloat16 alone.
    """
    options, run = options or Options(), Path(os.path.expanduser(run))
    with contextlib.ExitStack() as stack:
        config = describe(world, recipe)
        on_rank0(lambda: claim(run, config, options.resume, stack))
        part = recipe.batch / world_size()
        size = options.micro_batch or part
        check(part % 2 == 0, f"batch = {recipe.batch}: give each rank an even number of samples")
        ok = part % size == 0 and size % 2 == 0  # misaligned pairs are neighbours
        check(ok, f"--micro-batch {size:g}: give an even part of batch / ranks = {part:g}")
        world.teacher.eval().requires_grad_(False)
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            backend.allow_tf32 = options.dtype == "bfloat16"  # float32 that is asked for is exact
        device = next(world.teacher.parameters()).device
        state = State(world, recipe, device, getattr(torch, options.dtype))
        on_rank0(lambda: write_json(run / "config.json", config))
        first = restore(state, run) if options.resume else 0
        window = []
        for i in range(first, recipe.iterations):
            began, done, collapsed = time.time(), i + 1, False
            metrics = train_step(state, world, recipe, i, options.micro_batch, losses)
            window.append({**metrics, "seconds": time.time() - began})
            last = done == recipe.iterations
            if done % options.log_every == 0 or last:
                metrics, window = mean_metrics(window), []
                metrics["samples_per_second"] = recipe.batch / metrics["seconds"]
                if device.type == "cuda":  # of rank 0, since the last line
                    metrics["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
                    torch.cuda.reset_peak_memory_stats(device)
                log_metrics(run, done, metrics)
                words = [f"{k} {v:.3f}" for k, v in metrics.items() if "/" not in k]
                print0(f"iteration {done} of {recipe.iterations}: {', '.join(words)}")
            if options.evaluate_every and done % options.evaluate_every == 0 and not last:
                collapsed = evaluate(state, world, run, done) and options.stop_on_collapse
            if done % options.checkpoint_every == 0 or last or collapsed:
                save_checkpoint(run, done, snapshot(state), options.keep)
            check(not collapsed, f"collapsed at iteration {done}: look at {run / 'samples'}")
    return state


def describe(world, recipe):
    """The content of config.json. Prints how the recipe differs from the reference."""
    config = {"recipe": dataclasses.asdict(recipe), "data": world.fingerprint()}
    config["diff"] = diff(recipe, world.reference or Recipe())
    config |= {"command": shlex.join(["python", *sys.argv]), "torch": torch.__version__}
    words = ", ".join(f"{k} = {new} (not {old})" for k, (old, new) in config["diff"].items())
    print0(f"differs from the reference recipe: {words or 'nothing'}")
    return json.loads(json.dumps(config))  # tuples become lists


def claim(run, config, resume, stack):
    """Make and lock the folder of a run until `stack` ends; a run in it must fit `config`."""
    run.mkdir(parents=True, exist_ok=True)
    new = not any(run.iterdir())
    try:
        stack.enter_context(FileLock(run / ".lock", blocking=False))
    except Timeout:
        raise UserError(f"--name {run.name}: another process is training {run}") from None
    if new:  # the folder is deleted if the run can't start
        stack.callback(lambda: (run / "config.json").exists() or shutil.rmtree(run))
    if (run / "config.json").exists():
        way_out = "give another name, or --resume it (in Python: Options(resume=True))"
        check(resume, f"--name {run.name}: {run} exists; {way_out}")
        old, asked = json.loads((run / "config.json").read_text()), config["recipe"]["iterations"]
        changed = diff(config["recipe"], old["recipe"]) | diff(config["data"], old["data"])
        changed.pop("iterations", None)  # a run may be made longer
        words = ", ".join(f"{k} = {new} (was {was})" for k, (was, new) in changed.items())
        check(not words, f"--resume: {run} was made otherwise: {words}; start a new run")
        done = max(checkpoints(run), default=0)
        check(done <= asked, f"iterations = {asked}: {run} has done {done}")
    for part in list(run.rglob(".*.part")):  # left by a killed process, in samples/ too
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def diff(new, old):
    """The fields in which two dataclasses or dicts differ: {name: (old value, new value)}."""
    new, old = (dataclasses.asdict(r) if dataclasses.is_dataclass(r) else r for r in (new, old))
    return {k: (old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k)}


def evaluate(state, world, run, step):
    """Let the world judge the averaged student; keep the best. Returns whether it collapsed."""
    with state.averaged() as student:
        metrics = world.evaluate(student, run, step)
        signs = metrics.pop("collapse", [])
        score = metrics.get("score", math.inf)
        if any_rank(score < state.best - metrics.get("score_error", 0.0)):
            state.best = score
            world.save(student, run, "best")
    log_metrics(run, step, {**metrics, "collapsed": float(bool(signs))})
    if signs:
        print0(f"WARNING: collapse? {'; '.join(signs)}; see {run / 'samples'}")
    return any_rank(signs)


def mean_metrics(window):
    """The mean of each metric over a window of iterations, and over the ranks."""
    names = dict.fromkeys(name for metrics in window for name in metrics)
    values = [[float(m[name]) for m in window if name in m] for name in names]
    means = [torch.tensor(v, dtype=torch.float64).mean() for v in values]
    mean_over_ranks_(means)
    return dict(zip(names, map(float, means), strict=True))


def log_metrics(run, step, metrics):
    """Add a line to run/metrics.jsonl, on rank 0."""
    if rank() == 0:
        with open(run / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"iteration": step, **metrics}) + "\n")


# ---- 11. Ranks: under torchrun each process has its own part of every joint batch ----------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*words, file=None):
    """Print, on rank 0 alone."""
    if rank() == 0:
        print(*words, flush=True, file=file)


def on_rank0(make):
    """make() on rank 0 alone; its result on every rank."""
    box = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def any_rank(flag):
    """Is flag true on any rank? Ranks must agree on what ends or changes a run."""
    votes = torch.tensor(float(bool(flag)))
    mean_over_ranks_([votes])
    return bool(votes > 0)


def mean_over_ranks_(tensors):
    """Replace each tensor by its mean over the ranks."""
    for t in tensors if world_size() > 1 else ():
        dist.all_reduce(t)
        t.div_(world_size())


# ---- 12. Files: written under another name, then renamed, so a kill never leaves half a file -----
# metrics.jsonl and checkpoints are written in place. A checkpoint with .metadata is complete.


@contextlib.contextmanager
def replacing(path):
    """A Path beside `path` to write a file or folder to; at the end it takes path's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.umask(mask := os.umask(0))  # reading the mask means setting it
        for p in (part, *part.rglob("*")):  # safetensors writes files that others can't read
            p.chmod((0o777 if p.is_dir() else 0o666) & ~mask)
        old = part.with_suffix(".old.part")
        os.replace(path, old) if path.is_dir() else None  # whole, should a kill come now
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def save_weights(path, tensors, about):
    """Write tensors as safetensors; `about`, a dict with a "kind", goes into the file's header."""
    # Each has storage of its own: safetensors refuses a shared one.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with replacing(path) as part:
        save_file(tensors, part, {"about": json.dumps(about)})


def load_weights(path, kind):
    """(tensors, about) of a file by `save_weights`; UserError where it is damaged or foreign."""
    try:
        with safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {}).get("about", "{}"))
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); restore it") from error
    check(about.get("kind") == kind, f"{path}: holds {about.get('kind')!r}, not {kind!r}")
    return tensors, about


def checkpoints(run):
    """{step: folder} of a run's complete checkpoints, in order. DCP writes .metadata last."""
    found = sorted(Path(run).glob("checkpoints/step-*/.metadata"))
    return {int(path.parent.name[5:]): path.parent for path in found}


def save_checkpoint(run, step, state_dict, keep=2):
    """Write nested dicts of tensors and numbers to run/checkpoints/step-N; keep the newest ones."""
    path = Path(run) / "checkpoints" / f"step-{step:07d}"
    on_rank0(lambda: shutil.rmtree(path, ignore_errors=True))  # a cut-off one of this step
    dcp.save(state_dict, checkpoint_id=path, no_dist=not dist.is_initialized())
    for old in list(checkpoints(run).values())[:-keep] if rank() == 0 else []:
        shutil.rmtree(old)


def load_checkpoint(run, state_dict):
    """(state_dict, step), filled in from the run's newest checkpoint; step 0 if there is none."""
    step, newest = on_rank0(lambda: max(checkpoints(run).items(), default=(0, None)))
    for path in Path(run).glob("checkpoints/step-*"):
        if newest is None or path > newest:
            print0(f"{path}: cut off, passed over", file=sys.stderr)
    print0(f"going on from {newest}" if newest else "no complete checkpoint: training starts")
    if newest:
        dcp.load(state_dict, checkpoint_id=newest, no_dist=not dist.is_initialized())
    return state_dict, step


def snapshot(state):
    """Everything that a run needs to go on, as nested dicts."""
    student, student_opt = get_state_dict(state.student, state.student_opt)
    heads, heads_opt = get_state_dict(state.heads, state.heads_opt)
    models = {"student": student, "heads": heads, "ema": dict(enumerate(state.ema.mean))}
    optimizers = {"student_opt": student_opt, "heads_opt": heads_opt}
    return {**models, **optimizers, "skipped": state.skipped, "best": state.best}


def restore(state, run):
    """Fill state from the run's newest checkpoint, if any. Returns the iterations done."""
    saved, done = load_checkpoint(run, snapshot(state))  # fills state.ema.mean in place
    for name in ("student", "heads") if done else ():
        dicts = {"model_state_dict": saved[name], "optim_state_dict": saved[f"{name}_opt"]}
        set_state_dict(getattr(state, name), getattr(state, f"{name}_opt"), **dicts)
    state.skipped, state.best = saved["skipped"], saved["best"]
    log = run / "metrics.jsonl"  # loses a cut-off line, and those from after the checkpoint
    if rank() == 0 and log.exists():
        lines = log.read_text().splitlines(keepends=True)
        kept = [x for x in lines if x.endswith("}\n") and json.loads(x)["iteration"] <= done]
        with replacing(log) as part:
            part.write_text("".join(kept))
    return done


# ---- 13. Command line: an option for each field of Options and of the world's recipe -------------


def type_fields(instance):
    """Check and convert every field of a dataclass instance by `typed`."""
    for f in dataclasses.fields(instance):
        object.__setattr__(instance, f.name, typed(f, getattr(instance, f.name)))


def typed(f, value):
    """value as dataclass field f declares it, parsed where it is text. UserError if it can't be."""
    is_tuple = typing.get_origin(f.type) is tuple
    meta, kind = f.metadata, typing.get_args(f.type)[0] if is_tuple else f.type
    if is_tuple and isinstance(value, str):
        value = [v for v in value.split(",") if v]
    items = value if is_tuple and isinstance(value, (tuple, list)) else [value]
    parse = {"true": True, "false": False}.__getitem__ if kind is bool else kind
    try:
        items = [parse(v) if isinstance(v, str) else v for v in items]
    except (ValueError, KeyError):
        raise UserError(f"{f.name} = {value!r}: give {kind.__name__}") from None
    for v in items:
        ok = type(v) is kind or kind is float and type(v) is int
        check(ok, f"{f.name} = {v!r}: give {kind.__name__}")
        if kind in (int, float):
            ok = math.isfinite(v) and meta["least"] <= v <= meta["most"]
            check(ok, f"{f.name} = {v!r}: give a number from {meta['least']} to {meta['most']}")
        ok = not meta["choices"] or v in meta["choices"]
        check(ok, f"{f.name} = {v!r}: choose from {meta['choices']}")
    return tuple(map(kind, items)) if is_tuple else kind(items[0])


class Parser(argparse.ArgumentParser):
    """A bad option is a UserError. Options can't be abbreviated."""

    def __init__(self, *args, **settings):
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, allow_abbrev=False, formatter_class=shape, **settings)

    def error(self, message):
        raise UserError(message)


def parse(argv):
    """(the world's module, options, recipe) of a command line. Its fields override the recipe's."""
    module = importlib.import_module("zimage.world" if "--zimage" in argv else "toy_mnist.world")
    parser = Parser("ladd.py", description=__doc__.split("This file")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--toy", action="store_true", help="distil the Color-MNIST teacher")
    which.add_argument("--zimage", action="store_true", help="distil Z-Image")
    group = parser.add_argument_group("the run")
    group.add_argument("--name", default="", help="a folder in --out (default: the next number)")
    group.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (runs)")
    group.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    group.add_argument("--sample", action="store_true", help="draw from the finished run (toy)")
    group.add_argument("--steps", type=int, default=0, help="steps of --sample (default: all)")
    add_fields(group, module.OPTIONS)
    names, default = ", ".join(module.RECIPES), next(iter(module.RECIPES.values()))
    group = parser.add_argument_group(f"the recipe, one of {names}")
    group.add_argument("--recipe", default="", help="by name, or another run's config.json")
    add_fields(group, default)
    module.add_arguments(parser.add_argument_group("this world"))
    options = parser.parse_args(argv or ["--help"])
    plain = options.name == Path(options.name).name and options.name != ".."
    check(plain, f"--name {options.name}: give a plain folder name")
    options.out = Path(os.path.expanduser(options.out))
    options.run = options.out / options.name if options.name else None
    runs = sorted(path.parent.name for path in options.out.glob("*/config.json"))
    ok = options.run or not (options.sample or options.resume)
    check(ok, f"--name: say which run; {options.out} holds {', '.join(runs) or 'none'}")
    recipe = module.RECIPES.get(options.recipe, default)  # else that of a file, or of the run
    config = Path(options.recipe or options.out / options.name / "config.json")
    known = options.recipe in ("", *module.RECIPES) or config.is_file()
    check(known, f"--recipe {options.recipe}: give {names}, or a run's config.json")
    if options.recipe not in module.RECIPES and config.is_file():
        recipe = recipe_from(type(recipe), config)
    return module, options, dataclasses.replace(recipe, **given(options, type(recipe)))


def add_fields(group, defaults):
    """An option per field of a dataclass instance, with its value as the default in --help."""
    for f in dataclasses.fields(defaults):
        settings = {"metavar": "|".join(f.metadata["choices"] or "X")}
        settings |= {"nargs": "?", "const": True} if f.type is bool else {}
        value = getattr(defaults, f.name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        help = f"{f.metadata['help']} ({shown})".replace("%", "%%")
        group.add_argument(f"--{f.name.replace('_', '-')}", help=help, **settings)


def given(options, cls):
    """The fields of dataclass cls that the command line gives."""
    names = [f.name for f in dataclasses.fields(cls)]
    return {k: getattr(options, k) for k in names if getattr(options, k) is not None}


def recipe_from(cls, path):
    """The recipe in a run's config.json, as class cls. UserError names an unknown field."""
    try:
        return cls(**json.loads(path.read_text())["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no recipe of this world ({error})") from error


def numbered_folder(out):
    """Make the next free folder out/001, out/002, ... Two runs started at once get two."""
    out.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (out / f"{number:03d}").mkdir()
            return out / f"{number:03d}"


def pick_device(name):
    """The device by name, or the best one here. Under torchrun each rank has a GPU of its own."""
    if torch.cuda.is_available() and name in (None, "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = name or ("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # by what is missing: a driver, a module, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name}: not here ({reason}); leave it out") from error
    return torch.device(name)


def default_dtype(device):
    """bfloat16 where the device computes it faster than float32."""
    cpu = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bfloat16" if device.type == "cuda" or cpu else "float32"


def distil(argv):
    """Parse, build, train, finish."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # under torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    module, options, recipe = parse(argv)
    device = pick_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL
    options.dtype = options.dtype or default_dtype(device)
    run_options = dataclasses.replace(module.OPTIONS, **given(options, Options))
    world = module.make_world(recipe, options, device)
    if options.sample:
        return world.sample(options.run, options.steps or len(recipe.times))
    run = options.run or on_rank0(lambda: numbered_folder(options.out))
    state = train(world, recipe, run, run_options)
    with state.averaged() as student:
        world.finish(student, run)


def run_command_line(work, argv=None):
    """work(argv), its errors as one line on stderr. Returns the exit code.

    2: bad input, a run that can't go on, no room on disk or GPU. 130: Ctrl-C or SIGTERM.
    """
    no_room = SafetensorError, dcp.CheckpointException, torch.OutOfMemoryError
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a notebook's, or closed
            stream.reconfigure(errors="backslashreplace")  # a console may lack a letter
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)  # a KeyboardInterrupt
        work(sys.argv[1:] if argv is None else argv)
        code = 0
    except (KeyboardInterrupt, UserError, OSError, *no_room) as error:
        if isinstance(error, dcp.CheckpointException):  # it wraps what a rank has met
            error = next(iter(error.failures.values()))[0]
        stopped = isinstance(error, KeyboardInterrupt)
        words = "stopped; what is finished is kept" if stopped else str(error)
        print(f"ladd: {' '.join(words.split())}", file=sys.stderr)
        code = 130 if stopped else 2
    if peak := torch.cuda.max_memory_allocated():
        print0(f"peak_gb {peak / 1e9:.3f}")
    if dist.is_initialized() and (code != 2 or world_size() == 1):
        dist.destroy_process_group()  # after an error it would wait for stuck ranks
    return code


def main(argv=None):
    """The command line of ladd.py. Returns the exit code."""
    return run_command_line(distil, argv)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    import ladd  # as __main__ and as ladd there would be two of each class

    sys.exit(ladd.main())
