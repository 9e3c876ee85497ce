"""What goes beyond the LADD paper, each piece a few lines that plug into `ladd.step` through `ladd.Terms`.

Everything here is off unless a recipe turns it on. A term is a function (Pass, State) -> scalar; see `ladd.Pass`.
"""

import math

import torch
import torch.nn.functional as F

import ladd
from ladd import mean_over_heads
from toy_mnist.edm import null_cond

# ---------------------------------------------------------------------------------------------------------------------
# The adversarial game: name -> (loss of the heads, loss of the student), both of (real logits, fake logits)
# ---------------------------------------------------------------------------------------------------------------------


def nonsaturating_heads(real, fake):
    """Non-saturating GAN (arXiv 1406.2661): softplus(-real) + softplus(fake)."""
    return mean_over_heads(lambda r, f: F.softplus(-r) + F.softplus(f), real, fake)


def nonsaturating_student(real, fake):
    return mean_over_heads(lambda f: F.softplus(-f), fake)


def relativistic_heads(real, fake):
    """Relativistic pairing (arXiv 1807.00734; R3GAN, arXiv 2501.05441): softplus(fake - real). Real and fake of a pair share
    condition, t-hat and noise, so patch is compared with patch."""
    return mean_over_heads(lambda r, f: F.softplus(f - r), real, fake)


def relativistic_student(real, fake):
    return mean_over_heads(lambda r, f: F.softplus(r - f), real, fake)


def wasserstein_heads(real, fake):
    """Wasserstein critic (arXiv 1701.07875): fake - real. It needs `gradient_penalty`."""
    return mean_over_heads(lambda r, f: f - r, real, fake)


LOSSES = {"hinge": (ladd.hinge_heads, ladd.hinge_student),
          "nonsaturating": (nonsaturating_heads, nonsaturating_student),
          "relativistic": (relativistic_heads, relativistic_student),
          "wasserstein": (wasserstein_heads, ladd.hinge_student)}


# ---------------------------------------------------------------------------------------------------------------------
# Terms of the heads' loss
# ---------------------------------------------------------------------------------------------------------------------

def gradient_penalty(recipe):
    """WGAN-GP (arXiv 1704.00028, eq. 3) on the heads' input features: (|grad| - 1)^2 between real and fake maps.

    As in `ladd.r1_penalty` the norm is taken per place, of the gradient of the sum of a head's logits.
    """
    def term(p, state):
        gen = ladd.generator("gradient penalty", *p.key)
        mix = torch.rand(len(p.x0), generator=gen).to(p.x0)
        maps = [ladd.interpolate(a.float(), b.detach().float(), mix).requires_grad_() for a, b in zip(p.real_maps, p.fake_maps)]
        grads = torch.autograd.grad([k.sum() for k in state.heads(maps, p.t_hat, p.head_cond, p.t)], maps, create_graph=True)
        return recipe.gradient_penalty * torch.stack([((g.square().sum(1) + 1e-12).sqrt() - 1).square().mean() for g in grads]).mean()
    return term


def approximate_r1(recipe, world):
    """Approximate R1 (APT, arXiv 2501.08316) on the re-noised sample at the same t-hat: |D(x_t) - D(x_t + s eps)|^2. +1F."""
    def term(p, state):
        noise = torch.randn(p.real_t.shape, generator=ladd.generator("approximate R1", *p.key)).to(p.real_t)
        with torch.no_grad():
            maps = ladd.features(world, p.real_t + recipe.approximate_r1_std * noise, p.t_real, p.cond, recipe.taps)
        told = (p.t_real, p.head_cond, p.t)
        clean, shaken = state.heads([m.float() for m in p.real_maps], *told), state.heads([m.float() for m in maps], *told)
        return recipe.approximate_r1 * mean_over_heads(lambda a, b: (a - b).square(), clean, shaken)
    return term


def misaligned(recipe, world):
    """Real samples under another sample's condition, labelled fake (SANA-Sprint, arXiv 2503.09641, and AMD's few-step models).

    The teacher is given the wrong condition too (+1F): otherwise the heads would merely compare two conditions.
    """
    def term(p, state):
        wrong = p.cond.roll(1, 0)
        differs = (wrong != p.cond).reshape(len(wrong), -1).any(1).float()
        with torch.no_grad():
            maps = ladd.features(world, p.real_t, p.t_real, wrong, recipe.taps)
        logits = state.heads([m.float() for m in maps], p.t_real, world.head_cond(wrong), p.t)
        return recipe.misaligned * mean_over_heads(lambda f: F.relu(1 + f) * ladd.expand(differs, f), logits)
    return term


# ---------------------------------------------------------------------------------------------------------------------
# Terms of the student's loss, and its input
# ---------------------------------------------------------------------------------------------------------------------

def way_down(t, steps):
    """Times from t on, evenly, for Euler steps no longer than 1 / steps."""
    n = math.ceil(steps * t - 1e-9)
    return [t * (1 - k / n) for k in range(n)]


def continued(world, x_t, t, cond, steps):
    """Where the teacher goes from x_t [B, ...], at one time t for all, on its `way_down`: x0 [B, ...], guided and clamped as its samples are."""
    return ladd.sample_euler(world.guide(world.teacher), x_t / t, way_down(t, steps), cond).clamp(-1, 1)     # the sampler begins at x_t = t noise


def distillation(recipe, world):
    """Squared error of the student's guess to a target of the teacher's, divided by t^`distill_power`, for times up to `distill_below`.

    The guess moves t times as far as the velocity that the network gives, so at power 0 a late step hardly learns; 2 is the velocity's squared error.
    The target of a stored noise is x0, the sample that it led to.

    A fresh noise has no such sample: the input says nothing of this very x0 at t = 1, nor at t < 1 under `backward_simulation`. It is left to the
    adversarial loss; or, with `distill_fresh`, its target at every t is where the teacher goes from the student's own first step, from 1 to times[1].
    (Not from the student's x_t at t: at .75 a trained student's way is still such that the teacher ends on samples as good as its own, at .5 it was
    found not to be. Training on the student's own way down, with the teacher to say where to: Imagine Flash, arXiv 2405.05224.)
    """
    def term(p, state):
        target, tied = p.x0, p.paired | ((p.t < 1) & (not recipe.backward_simulation))
        if recipe.distill_fresh and not p.paired.all():
            fresh, s = (~p.paired).nonzero()[:, 0], recipe.times[1]
            now = ladd.interpolate(p.x0_hat.detach(), p.eps, torch.full_like(p.t, s))           # at t = 1 this guess is the first step
            first = torch.where(ladd.expand(p.t < 1, p.eps), p.first_step, now)                 # at t < 1 `backward_simulation` took it
            target, tied = p.x0.clone(), torch.ones_like(p.paired)                              # a noise is stored or fresh: all have a target
            target[fresh] = continued(world, first[fresh], s, p.cond[fresh], recipe.distill_fresh)
        error = (p.x0_hat - target).square().flatten(1).mean(1) / p.t ** recipe.distill_power
        return recipe.distill_weight * (error * (tied & (p.t <= recipe.distill_below))).mean()
    term.__name__ = "distill_loss"
    return term


def score_distillation(recipe, world):
    """ADD's score distillation (arXiv 2311.17042): the noised guess is shown to the teacher, whose own guess, without gradient,
    is the target: c(t) |x0_hat - target|^2. +1F (NFSD: +2F).

    exponential: c = alpha = 1 - t. sds: c = alpha w / (2 sigma) with w = sigma^2, so t (1 - t) / 2; its gradient is that of SDS
    (arXiv 2209.14988). nfsd (arXiv 2310.17590) is an objective of its own, c = 1: the target is the guess, moved along the
    teacher's direction towards the condition and, for t < 0.2, along its correction without condition.
    """
    def term(p, state):
        x_t, t = p.fake_t.detach(), p.t_hat
        null = null_cond(p.cond)
        with torch.no_grad():
            guess = ladd.velocity_to_x0(x_t, world.teacher(x_t, t, p.cond), t)
            if recipe.score_weighting == "nfsd":
                free = ladd.velocity_to_x0(x_t, world.teacher(x_t, t, null), t)
                low = ladd.expand((t < 0.2).float(), x_t)
                guess = p.x0_hat + (guess - free) + low * (free - p.x0_hat)
        weight = {"exponential": 1 - t, "sds": t * (1 - t) / 2, "nfsd": torch.ones_like(t)}[recipe.score_weighting]
        return recipe.score_weight * (weight * (p.x0_hat - guess).square().flatten(1).mean(1)).mean()
    term.__name__ = "score_loss"
    return term


def backward_simulation(recipe):
    """DMD2 (arXiv 2405.14867): for t < 1 the input is what the student itself makes on its way down from the noise.

    Euler steps, as at inference, for every sample down to its own t; without graph. p.first_step: after the first of them, for t < 1.
    """
    def student_input(p, student):
        x = p.eps.clone()
        with torch.no_grad():
            for t, t_next in zip(recipe.times, recipe.times[1:]):
                on = (p.t < t).nonzero()[:, 0]
                if len(on):
                    v = student(x[on], torch.full((len(on),), t, device=x.device), p.cond[on])
                    x[on] = x[on] + (t_next - t) * v
                if t == recipe.times[0]:
                    p.first_step = x.clone()
        return x
    return student_input


def terms(recipe, world):
    """The `ladd.Terms` that a toy recipe asks for."""
    heads_loss, student_loss = LOSSES[recipe.loss]
    add_heads = [f for on, f in ((recipe.gradient_penalty, lambda: gradient_penalty(recipe)),
                                 (recipe.approximate_r1, lambda: approximate_r1(recipe, world)),
                                 (recipe.misaligned, lambda: misaligned(recipe, world))) if on]
    add_student = [f for on, f in ((recipe.distill_weight, lambda: distillation(recipe, world)),
                                   (recipe.score_weight, lambda: score_distillation(recipe, world))) if on]
    return ladd.Terms(heads_loss, student_loss, backward_simulation(recipe) if recipe.backward_simulation else None,
                      tuple(f() for f in add_heads), tuple(f() for f in add_student))
