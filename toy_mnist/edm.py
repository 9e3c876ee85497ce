"""The toy's network and its EDM conventions (Karras et al., arXiv 2206.00364), in ladd's time.

EDM noises by x = x0 + sigma * eps and asks a denoiser D(x, sigma) for x0. ladd noises by
x_t = (1-t) * x0 + t * eps and asks for the velocity eps - x0. With sigma = t / (1-t) the two are
one: x = x_t / (1-t). `EDMVelocity` is that change of variables; nothing in it divides by t or 1-t.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import ladd

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # EDM, table 1
NULL_CLASS = 10  # the label that stands for "no condition" (classifier-free guidance)


def null_cond(label):
    """The label of no condition for each of the labels [B]: [B]"""
    return torch.full_like(label, NULL_CLASS)


def zeroed(module):
    """The module with weights of zero: what it adds begins at nothing."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """Twice GroupNorm, SiLU, convolution, residual. The embedding [B,E] scales and shifts the
    second norm (FiLM). [B,C,H,W] -> [B,D,H,W]"""

    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.film = nn.Linear(emb, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)  # [B, D, 1, 1] each
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the H*W places of a map, residual. [B,C,H,W] -> [B,C,H,W]"""

    def __init__(self, c, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = zeroed(nn.Conv2d(c, c, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # [B, heads, HW, c] each
        # Written out: on a CPU 49 places are too few for torch's fused attention to pay.
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return x + self.out((attention @ v).transpose(-1, -2).reshape(b, c, h, w))


class Stage(nn.Module):
    """A ResBlock and, where asked, attention: one module, so that it can be tapped by name."""

    def __init__(self, c_in, c_out, emb, attention=False):
        super().__init__()
        self.res = ResBlock(c_in, c_out, emb)
        self.att = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        return self.att(self.res(x, emb))


class CUNet(nn.Module):
    """F(x [B,3,28,28], c_noise [B] = ln(sigma)/4, label [B] in 0..10, 10 = none) -> [B,3,28,28]

    A U-Net on blocks of 2x2 pixels, at 14x14 and 7x7."""

    def __init__(self, width=48, emb=192):
        super().__init__()
        a, b = width, 2 * width  # channels at 14x14 and at 7x7
        self.config = {"width": width, "emb": emb}
        freqs = torch.exp(torch.linspace(math.log(0.5), math.log(64.0), 32))
        self.register_buffer("freqs", freqs, persistent=False)
        self.embed = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(NULL_CLASS + 1, emb)
        self.stem = nn.Conv2d(12, a, 3, padding=1)
        self.enc = nn.ModuleList(Stage(c, c, emb) for c in (a, a, b, b))
        self.down = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.mid = nn.ModuleList([Stage(b, b, emb, attention=True), Stage(b, b, emb)])
        self.dec = nn.ModuleList(Stage(2 * c, c, emb) for c in (b, b, a, a))
        self.up = nn.Conv2d(b, a, 3, padding=1)
        self.norm = nn.GroupNorm(8, a)
        self.out = zeroed(nn.Conv2d(a, 12, 3, padding=1))

    def forward(self, x, c_noise, label):
        phase = 2 * math.pi * c_noise[:, None] * self.freqs
        emb = F.silu(self.embed(torch.cat([phase.cos(), phase.sin()], 1)) + self.label(label))
        h = self.stem(F.pixel_unshuffle(x, 2))  # [B, a, 14, 14]
        e0 = self.enc[0](h, emb)
        e1 = self.enc[1](e0, emb)
        e2 = self.enc[2](self.down(e1), emb)  # [B, b, 7, 7]
        e3 = self.enc[3](e2, emb)
        h = self.mid[1](self.mid[0](e3, emb), emb)
        h = self.dec[0](torch.cat([h, e3], 1), emb)
        h = self.dec[1](torch.cat([h, e2], 1), emb)
        h = self.up(F.interpolate(h, scale_factor=2, mode="nearest"))  # [B, a, 14, 14]
        h = self.dec[2](torch.cat([h, e1], 1), emb)
        h = self.dec[3](torch.cat([h, e0], 1), emb)
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), 2)  # [B, 3, 28, 28]


class EDMVelocity(nn.Module):
    """velocity(x_t [B,3,28,28], t [B], label [B]) -> v [B,3,28,28], by EDM's preconditioning.

    With sd = sigma_data and r^2 = t^2 + sd^2 (1-t)^2, c_in x is x_t / r, and D = c_skip x + c_out F
    (table 1) gives

        v = (x_t - D) / t = ((t - sd^2 (1-t)) / r^2) x_t - (sd / r) F(x_t / r, ln(sigma_c) / 4)

    exactly. sigma_c is sigma clamped to [0.002, 80], the range that F was trained on. At t = 1 the
    limit is v = x_t - sd F(x_t, ln(80) / 4). With dtype bfloat16, F alone is computed in it.
    """

    def __init__(self, net, sigma_data, dtype=torch.float32):
        super().__init__()
        self.net = net
        self.sigma_data = float(sigma_data)
        self.dtype = dtype

    def forward(self, x_t, t, label):
        sd = self.sigma_data
        t = ladd.expand(t, x_t)  # [B, 1, 1, 1]
        r = (t**2 + sd**2 * (1 - t) ** 2).sqrt()
        log_sigma = t.log() - torch.log1p(-t)
        log_sigma = log_sigma.clamp(math.log(SIGMA_MIN), math.log(SIGMA_MAX)).flatten()  # [B]
        with ladd.autocast(x_t.device, self.dtype):
            f = self.net(x_t / r, log_sigma / 4, label)
        return (t - sd**2 * (1 - t)) / r**2 * x_t - sd / r * f.to(x_t.dtype)


def sigma_grid(n):
    """EDM eq. 5: n noise levels sigma from 80 to 0.002, float64 [n]. A sampler then ends on 0."""
    i = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    return (SIGMA_MAX ** (1 / RHO) + i * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO


def time_grid(n):
    """The same levels in ladd's time, t = sigma / (1 + sigma): n floats, the first 80/81."""
    return [float(s / (1 + s)) for s in sigma_grid(n)]


def denoise(velocity, x, sigma, label):
    """D(x, sigma), EDM's denoiser, by the velocity: x [B,...], sigma a float -> x0 [B,...]"""
    t = torch.full((len(x),), sigma / (1 + sigma), dtype=x.dtype, device=x.device)
    x_t = x / (1 + sigma)
    return ladd.velocity_to_x0(x_t, velocity(x_t, t, label), t)


@torch.no_grad()
def sample_heun(velocity, noise, n, label):
    """EDM's algorithm 1 (deterministic), 2n - 1 evaluations. In t it would be another sampler."""
    sigmas = [*sigma_grid(n).tolist(), 0.0]
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = (x - denoise(velocity, x, sigma, label)) / sigma
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d_next = (x_next - denoise(velocity, x_next, sigma_next, label)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
    return x


@torch.no_grad()
def sample_dpm(velocity, noise, n, label):
    """DPM-Solver++(2M) (arXiv 2211.01095) on EDM's levels: n evaluations, noise -> x0 [B,...]"""
    sigmas = [*sigma_grid(n).tolist(), 0.0]
    x = before = noise * sigmas[0]
    for k, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x0 = target = denoise(velocity, x, sigma, label)
        if 0 < k < n - 1:  # the first step and the last are Euler's
            ratio = math.log(sigma / sigma_next) / math.log(sigmas[k - 1] / sigma)
            target = x0 + ratio / 2 * (x0 - before)
        x, before = target + sigma_next / sigma * (x - target), x0
    return x
