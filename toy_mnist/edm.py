"""The toy's network and its EDM conventions (Karras et al., arXiv 2206.00364), turned into ladd's in one place.

EDM noises by x = x0 + sigma * eps and asks a denoiser D(x, sigma) for x0. ladd noises by x_t = (1-t) * x0 + t * eps and
asks for the velocity eps - x0. With sigma = t / (1-t) the two are one: x = x_t / (1-t). `EDMVelocity` is that change of
variables, written so that nothing divides by t or by 1-t.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import ladd

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0    # EDM, table 1
NULL_CLASS = 10                                 # the label that stands for "no condition" (classifier-free guidance)


def null_cond(label):
    """The label of no condition for each of the labels [B]: [B]"""
    return torch.full_like(label, NULL_CLASS)


# ---------------------------------------------------------------------------------------------------------------------
# The network: a conditional U-Net ("CUNet") that works on 2x2 pixel blocks, at 14x14 and 7x7
# ---------------------------------------------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the embedding scales and shifts the second norm (FiLM). [B,C,H,W] -> [B,D,H,W]"""

    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.film = nn.Linear(emb, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)     # [B, c_out, 1, 1] each
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the H*W places of a map, residual. [B,C,H,W] -> [B,C,H,W]"""

    def __init__(self, c, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, c)
        self.qkv, self.out = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)     # [B, heads, HW, HW]: 49 places are too
        y = attention @ v                                                   # few for torch's fused kernel to pay on a CPU
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class Stage(nn.Module):
    """A ResBlock and, where asked, attention: one module, so that it can be tapped by name."""

    def __init__(self, c_in, c_out, emb, attention=False):
        super().__init__()
        self.res, self.att = ResBlock(c_in, c_out, emb), Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        return self.att(self.res(x, emb))


class CUNet(nn.Module):
    """F(x, c_noise, label): x [B,3,28,28] -> [B,3,28,28]; c_noise [B] = ln(sigma)/4; label [B] in 0..10, 10 = none."""

    def __init__(self, width=48, emb=192):
        super().__init__()
        a, b = width, 2 * width
        self.config = {"width": width, "emb": emb}
        self.register_buffer("freqs", torch.exp(torch.linspace(math.log(0.5), math.log(64.0), 32)), persistent=False)
        self.embed = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(NULL_CLASS + 1, emb)
        self.stem = nn.Conv2d(12, a, 3, padding=1)
        self.enc = nn.ModuleList([Stage(a, a, emb), Stage(a, a, emb), Stage(b, b, emb), Stage(b, b, emb)])
        self.down = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.mid = nn.ModuleList([Stage(b, b, emb, attention=True), Stage(b, b, emb)])
        self.dec = nn.ModuleList([Stage(2 * b, b, emb), Stage(2 * b, b, emb),
                                  Stage(2 * a, a, emb), Stage(2 * a, a, emb)])
        self.up = nn.Conv2d(b, a, 3, padding=1)
        self.norm, self.out = nn.GroupNorm(8, a), nn.Conv2d(a, 12, 3, padding=1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x, c_noise, label):
        phase = 2 * math.pi * c_noise[:, None] * self.freqs
        emb = F.silu(self.embed(torch.cat([phase.cos(), phase.sin()], 1)) + self.label(label))   # [B, emb]
        h = self.stem(F.pixel_unshuffle(x, 2))                              # [B, a, 14, 14]
        e0 = self.enc[0](h, emb)
        e1 = self.enc[1](e0, emb)
        e2 = self.enc[2](self.down(e1), emb)                                # [B, b, 7, 7]
        e3 = self.enc[3](e2, emb)
        h = self.mid[1](self.mid[0](e3, emb), emb)
        h = self.dec[0](torch.cat([h, e3], 1), emb)
        h = self.dec[1](torch.cat([h, e2], 1), emb)
        h = self.up(F.interpolate(h, scale_factor=2, mode="nearest"))       # [B, a, 14, 14]
        h = self.dec[2](torch.cat([h, e1], 1), emb)
        h = self.dec[3](torch.cat([h, e0], 1), emb)
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), 2)           # [B, 3, 28, 28]


# ---------------------------------------------------------------------------------------------------------------------
# EDM's preconditioning in ladd's time: the toy's one adapter
# ---------------------------------------------------------------------------------------------------------------------

class EDMVelocity(nn.Module):
    """velocity(x_t [B,3,28,28], t [B], label [B]) -> v [B,3,28,28], float32: a CUNet in EDM's preconditioning (table 1).

    With sigma = t/(1-t) and r^2 = t^2 + sigma_d^2 (1-t)^2, EDM's c_in * x is x_t / r and D = c_skip x + c_out F gives

        v = (x_t - D) / t = ((t - sigma_d^2 (1-t)) / r^2) x_t - (sigma_d / r) F(x_t / r, ln(sigma_c) / 4)

    exactly, with no division by t or 1-t. sigma_c is sigma clamped to [0.002, 80], the range the network was trained on;
    at t = 1 the limit is v = x_t - sigma_d F(x_t, ln(80) / 4).
    """

    def __init__(self, net, sigma_data):
        super().__init__()
        self.net, self.sigma_data = net, float(sigma_data)

    def forward(self, x_t, t, label):
        sd = self.sigma_data
        t = ladd.expand(t, x_t)                                             # [B, 1, 1, 1]
        r = (t ** 2 + sd ** 2 * (1 - t) ** 2).sqrt()
        log_sigma = (t.log() - torch.log1p(-t)).clamp(math.log(SIGMA_MIN), math.log(SIGMA_MAX)).flatten()   # [B]
        with ladd.autocast(x_t.device, enabled=x_t.dtype == torch.float32):
            f = self.net(x_t / r, log_sigma / 4, label)
        return (t - sd ** 2 * (1 - t)) / r ** 2 * x_t - sd / r * f.to(x_t.dtype)


def sigma_grid(n, dtype=torch.float64):
    """EDM eq. 5: n noise levels from sigma_max = 80 down to sigma_min = 0.002, rho = 7; the sampler ends on 0. [n]"""
    if n == 1:
        return torch.tensor([SIGMA_MAX], dtype=dtype)
    i = torch.arange(n, dtype=dtype) / (n - 1)
    return (SIGMA_MAX ** (1 / RHO) + i * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO


def time_grid(n):
    """The same grid in ladd's time, t = sigma / (1 + sigma): a list of n floats, the first 80/81. See `ladd.sample_euler`."""
    return [float(s / (1 + s)) for s in sigma_grid(n)]


def denoise(velocity, x, sigma, label):
    """D(x, sigma), EDM's denoiser, through the velocity: x [B,...] at noise level sigma (a float) -> x0 [B,...]."""
    t = torch.full((len(x),), sigma / (1 + sigma), dtype=x.dtype, device=x.device)
    x_t = x / (1 + sigma)
    return ladd.velocity_to_x0(x_t, velocity(x_t, t, label), t)


@torch.no_grad()
def sample_heun(velocity, noise, n, label):
    """EDM's algorithm 1 (deterministic): 2n - 1 evaluations, in sigma, because Heun's rule does not carry over to t."""
    sigmas = [*sigma_grid(n).tolist(), 0.0]
    x = noise * sigmas[0]
    for a, b in zip(sigmas, sigmas[1:]):
        d = (x - denoise(velocity, x, a, label)) / a
        x_next = x + (b - a) * d
        if b > 0:
            d2 = (x_next - denoise(velocity, x_next, b, label)) / b
            x_next = x + (b - a) * (d + d2) / 2
        x = x_next
    return x


@torch.no_grad()
def sample_dpm(velocity, noise, n, label, sd=0.5):
    """DPM-Solver++(2M) by diffusers' own EDM scheduler on EDM's grid: n evaluations. noise [B,...], unit variance.

    sd: the scheduler's sigma_data; any value gives the same samples, because D is put into its preconditioning below.
    """
    from diffusers import EDMDPMSolverMultistepScheduler
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=sd, rho=RHO,
                                               solver_order=2, prediction_type="epsilon")
    scheduler.set_timesteps(n)
    x = noise * SIGMA_MAX
    for i, step in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        d = denoise(velocity, x, sigma, label)
        # Put in what the scheduler's own preconditioning turns back into d: c_skip * x + c_out * output = d.
        c_skip, c_out = sd ** 2 / (sigma ** 2 + sd ** 2), sigma * sd / math.sqrt(sigma ** 2 + sd ** 2)
        x = scheduler.step((d - c_skip * x) / c_out, step, x).prev_sample
    return x
