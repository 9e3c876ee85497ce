"""The method itself, on the made-up world of tiny.py: every formula against a closed form or a number worked out by hand."""

import copy
import concurrent.futures
import dataclasses
import datetime
import errno
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import types
import typing

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ladd
import tiny
from ladd import Recipe, UserError

CPU = torch.device("cpu")


@pytest.fixture
def float64():
    """Double precision by default: draws, networks and heads follow it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def plain(monkeypatch):
    """No bfloat16, whatever this CPU offers."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})


@pytest.fixture
def world():
    return tiny.World()


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Flow maths
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, 1, 1, 1), torch.zeros(1)],
                         ids=lambda t: str(list(t.shape)))
def test_expand_refuses_anything_but_one_time_per_sample(t):
    with pytest.raises(ValueError, match="one time per sample"):
        ladd.expand(t, torch.zeros(2, 4, 8, 8))


def test_expand_broadcasts_over_the_sample():
    assert ladd.expand(f64(0.25, 0.5), torch.zeros(2, 4, 8, 8)).shape == (2, 1, 1, 1)
    assert ladd.expand(f64(0.25, 0.5), torch.zeros(2)).tolist() == [0.25, 0.5]


def test_flow_formulas_by_hand():
    x0, eps, t = f64(2, 4)[:, None], f64(-2, 10)[:, None], f64(0.25, 0.5)
    x_t = ladd.interpolate(x0, eps, t)
    assert x_t.flatten().tolist() == [0.75 * 2 - 0.25 * 2, 0.5 * 4 + 0.5 * 10]
    v = f64(-4, 6)[:, None]                                 # eps - x0
    assert ladd.velocity_to_x0(x_t, v, t).flatten().tolist() == [2, 4]
    assert ladd.velocity_to_noise(x_t, v, t).flatten().tolist() == [-2, 10]
    assert ladd.x0_to_velocity(x_t, x0, t).flatten().tolist() == [-4, 6]


def test_flow_ends_are_the_sample_and_the_noise():
    x0, eps = torch.randn(2, 5, 4, 3, 3, generator=ladd.generator("ends"))
    assert torch.equal(ladd.interpolate(x0, eps, torch.zeros(5)), x0)
    assert torch.equal(ladd.interpolate(x0, eps, torch.ones(5)), eps)


def test_flow_round_trips():
    gen = ladd.generator("round trips")
    x0, eps = torch.randn(2, 6, 4, 5, 3, generator=gen, dtype=torch.float64)
    t = torch.rand(6, generator=gen, dtype=torch.float64) * 0.9 + 0.1
    x_t, v = ladd.interpolate(x0, eps, t), eps - x0
    for got, want in ((ladd.velocity_to_x0(x_t, v, t), x0), (ladd.velocity_to_noise(x_t, v, t), eps),
                      (ladd.x0_to_velocity(x_t, x0, t), v), (ladd.interpolate(ladd.velocity_to_x0(x_t, v, t),
                                                                            ladd.velocity_to_noise(x_t, v, t), t), x_t)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_logit_normal_closed_form():
    for z, m, s in itertools.product((-2.0, 0.0, 0.7), (-1.0, 0.5), (0.0, 1.3)):
        assert float(ladd.logit_normal(f64(z), m, s)) == pytest.approx(1 / (1 + math.exp(-m - s * z)), abs=1e-15)


def largest_gap(values, law):
    """Largest distance between the empirical and a true distribution function (Kolmogorov), in units of 1 / sqrt(n)."""
    n, values = len(values), sorted(values)
    return max(max(abs(law.cdf(v) - k / n), abs(law.cdf(v) - (k + 1) / n)) for k, v in enumerate(values)) * math.sqrt(n)


@pytest.mark.parametrize("m, s", [(1.0, 1.0), (-0.4, 1.7)])
def test_t_hat_is_log_normal_in_sigma(m, s):
    t = ladd.draw(tiny.recipe(batch=20_000, renoise_mean=m, renoise_std=s), 0, ())["t_hat"].double()
    log_sigma = (t / (1 - t)).log().tolist()
    assert largest_gap(log_sigma, statistics.NormalDist(m, s)) < 1.8            # exceeded by chance 3 times in 1000
    assert largest_gap(log_sigma, statistics.NormalDist(m + 0.1, s)) > 1.8


# ---------------------------------------------------------------------------------------------------------------------
# Draws
# ---------------------------------------------------------------------------------------------------------------------

def shares(t, times):
    return [float((t == torch.tensor(v)).float().mean()) for v in times]


def test_draw_follows_the_probabilities():
    r = tiny.recipe(batch=1000, warmup=20)
    for iterations, probs in ((range(20), r.warmup_probs), (range(20, 60), r.time_probs)):
        t = torch.cat([ladd.draw(r, i, ())["t"] for i in iterations])
        got = shares(t, r.times)
        assert sum(got) == pytest.approx(1)                 # nothing but the recipe's times
        for share, p in zip(got, probs):
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / len(t))        # exactly 0 where p is 0


@pytest.mark.parametrize("gen_every", [1, 3])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_draw_leaves_the_warmup_at_exactly_its_iteration(warmup, gen_every):
    """It counts iterations, however few of them update the student."""
    r = tiny.recipe(batch=64, warmup=warmup, gen_every=gen_every, warmup_probs=(0, 0, 0, 1), time_probs=(1, 0, 0, 0))
    seen = [set(ladd.draw(r, i, ())["t"].tolist()) for i in range(10)]
    assert seen == [{0.25}] * warmup + [{1.0}] * (10 - warmup)


@pytest.mark.parametrize("n", range(1, 9))
def test_draw_with_one_to_eight_times(n):
    times, probs = tuple(1 - k / n for k in range(n)), tuple(1 / n for _ in range(n))
    r = tiny.recipe(batch=4000, warmup=0, times=times, time_probs=probs, warmup_probs=probs)
    got = shares(ladd.draw(r, 3, ())["t"], times)
    assert sum(got) == pytest.approx(1) and all(abs(g - 1 / n) < 5 * math.sqrt(1 / n / 4000) for g in got)


def test_draw_is_unit_noise_of_the_right_shape():
    d = ladd.draw(tiny.recipe(batch=512), 4, (4, 8, 8))
    for name in ("eps", "eps_hat"):
        assert d[name].shape == (512, 4, 8, 8)
        assert abs(float(d[name].mean())) < 0.02 and float(d[name].std()) == pytest.approx(1, abs=0.02)
    assert abs(float((d["eps"] * d["eps_hat"]).mean())) < 0.02                  # drawn apart from each other
    assert abs(float((d["eps"][:-1] * d["eps"][1:]).mean())) < 0.02             # and for every sample


def test_share_noise_on_and_off():
    on, off = (ladd.draw(tiny.recipe(share_noise=flag), 5, (4, 8, 8)) for flag in (True, False))
    assert torch.equal(on["t_real"], on["t_hat"]) and torch.equal(on["eps_real"], on["eps_hat"])
    assert not (off["t_real"] == off["t_hat"]).any() and not (off["eps_real"] == off["eps_hat"]).flatten(1).all(1).any()
    for name in ("t", "eps", "t_hat", "eps_hat"):           # the fake side does not depend on the switch
        assert torch.equal(on[name], off[name])


def test_draw_is_keyed_by_seed_and_iteration():
    r = tiny.recipe(batch=64, share_noise=False)
    first = ladd.draw(r, 7, (4,))
    torch.manual_seed(123)                                  # the global generator has no say
    again = ladd.draw(r, 7, (4,))
    assert all(torch.equal(first[k], again[k]) for k in first)
    for other in (ladd.draw(r, 8, (4,)), ladd.draw(ladd.override(r, {"seed": 1}), 7, (4,))):
        assert not any(torch.equal(first[k], other[k]) for k in first if k != "paired")


def test_draws_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    ladd.draw(tiny.recipe(), 3, (4,)), ladd.reader_indices(10, 5, 20, 0)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("n", [1, 7, 10])
def test_reader_gives_each_sample_once_an_epoch(n):
    index, epoch = ladd.reader_indices(n, 0, 5 * n, seed=3)
    assert epoch.tolist() == [e for e in range(5) for _ in range(n)]
    for part in index.reshape(5, n):
        assert sorted(part.tolist()) == list(range(n))


def test_reader_goes_on_from_any_position():
    whole = torch.stack(ladd.reader_indices(10, 0, 60, seed=3))
    for start in (0, 1, 9, 10, 11, 25, 39):
        for count in (1, 2, 10, 21):
            assert torch.equal(torch.stack(ladd.reader_indices(10, start, count, seed=3)), whole[:, start:start + count])


def test_reader_shuffles_anew_each_epoch_and_seed():
    a, b = ladd.reader_indices(50, 0, 100, seed=0)[0], ladd.reader_indices(50, 0, 100, seed=1)[0]
    assert not torch.equal(a[:50], a[50:]) and not torch.equal(a[:50], b[:50])
    assert not torch.equal(a[:50], torch.arange(50))


# ---------------------------------------------------------------------------------------------------------------------
# Guidance and samplers
# ---------------------------------------------------------------------------------------------------------------------

class Recorder:
    """A velocity that keeps what it was called with."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def __call__(self, x, t, cond):
        self.calls.append((x.clone(), t.clone(), cond.clone()))
        return self.velocity(x, t, cond)

    def times(self):
        assert all(len(set(t.tolist())) == 1 and len(t) == len(x) for x, t, _ in self.calls)
        return [float(t[0]) for _, t, _ in self.calls]


def guide(w, t=0.5, **options):
    """Guidance of v = 100 t + x + cond with conditions 2, 4 against none = -1, on x = 10, 20: (result, batch sizes)."""
    v = Recorder(lambda x, t, cond: 100 * t[:, None] + x + cond)
    out = ladd.guided(v, lambda cond: torch.full_like(cond, -1), w, **options)(f64(10, 20)[:, None], f64(t, t), f64(2, 4)[:, None])
    return out.flatten().tolist(), [len(x) for x, _, _ in v.calls]


@pytest.mark.parametrize("w, want, sizes", [
    (0, [59, 69], [2, 2]),                                  # none alone: 50 + 10 - 1, 50 + 20 - 1
    (1, [62, 74], [2]),                                     # the condition alone, one pass of the batch itself
    (3, [59 + 3 * 3, 69 + 3 * 5], [2, 2]),
    (-1, [59 - 3, 69 - 5], [2, 2]),
])
def test_guidance_by_hand(w, want, sizes):
    assert guide(w) == (want, sizes)


@pytest.mark.parametrize("t, holds", [(0.1, False), (0.2499, False), (0.25, True), (0.5, True), (0.75, True), (0.7501, False), (1, False)])
def test_guidance_holds_in_its_interval_alone(t, holds):
    out, sizes = guide(3, t, interval=(0.25, 0.75))
    none, given = [9 + 100 * t, 19 + 100 * t], [12 + 100 * t, 24 + 100 * t]
    assert out == pytest.approx([n + 3 * (g - n) for n, g in zip(none, given)] if holds else given)
    assert sizes == ([2, 2] if holds else [2])


def test_guidance_with_full_interval_holds_at_both_ends():
    assert guide(3, 1.0)[1] == guide(3, 0.0)[1] == [2, 2]


def grid(n):
    """n times in eighths, falling from 1."""
    return [1 - k / 8 for k in range(n)]


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("first", [1.0, 0.75])
def test_samplers_land_on_x0_with_a_perfect_velocity(n, first):
    gen = ladd.generator("perfect", n)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=gen, dtype=torch.float64)
    perfect = lambda x, t, cond: (x - cond) / t[:, None, None, None].double()
    times = [first * t for t in grid(n)]
    fresh = lambda k: torch.randn(x0.shape, generator=gen, dtype=torch.float64)
    for sampler, extra in ((ladd.sample_euler, ()), (ladd.sample_renoise, (fresh,))):
        v = Recorder(perfect)
        torch.testing.assert_close(sampler(v, noise, times, x0, *extra), x0, rtol=0, atol=1e-12)
        assert v.times() == times                           # exactly n evaluations, at the times asked for
        torch.testing.assert_close(v.calls[0][0], first * noise, rtol=0, atol=0)


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.75, 0.5, 0.25], [0.9, 0.4, 0.3, 0.05], [80 / 81, 0.6, 0.001]], ids=str)
def test_euler_equals_the_flow_match_euler_scheduler(times, world):
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=times)
    noise, cond = world.noise[:3], world.cond[:3]
    x = times[0] * noise
    for timestep in scheduler.timesteps:
        v = world.teacher(x, torch.full((3,), float(timestep) / 1000), cond)
        x = scheduler.step(v, timestep, x).prev_sample
    torch.testing.assert_close(ladd.sample_euler(world.teacher, noise, times, cond), x, rtol=0, atol=2e-6)


def test_euler_by_hand():
    # v = x on times 1, .5 from noise 8: x = 8 - .5 * 8 = 4, then 4 - .5 * 4 = 2
    assert ladd.sample_euler(lambda x, t, c: x, f64(8)[:, None], [1, 0.5], None).item() == 2


def test_renoise_by_hand_and_with_the_noise_it_is_given():
    # v = x: x0 = 8 - 1 * 8 = 0; at .5 with noise 6: x = 3, x0 = 3 - .5 * 3 = 1.5; at .25 with noise 10: x = .75 * 1.5 + 2.5
    asked, v = [], Recorder(lambda x, t, c: x)
    noises = {1: f64(6)[:, None], 2: f64(10)[:, None]}
    x0 = ladd.sample_renoise(v, f64(8)[:, None], [1, 0.5, 0.25], torch.zeros(1), lambda k: asked.append(k) or noises[k])
    assert asked == [1, 2] and [float(x) for x, _, _ in v.calls] == [8, 3, 3.625]
    assert float(x0) == 3.625 * 0.75


def test_samplers_keep_the_condition_and_no_graph(world):
    net = copy.deepcopy(world.teacher).requires_grad_(True)
    for sampler, extra in ((ladd.sample_euler, ()), (ladd.sample_renoise, (lambda k: world.noise[k:k + 3],))):
        v = Recorder(net)
        assert not sampler(v, world.noise[:3], [1, 0.5], world.cond[:3], *extra).requires_grad
        assert all(torch.equal(cond, world.cond[:3]) for _, _, cond in v.calls)


@pytest.mark.parametrize("times", [[], [0.0], [1.0, 0.0], [-0.5], [1.1], [1.0, 1.0], [0.5, 0.75], [1.0, 0.5, 0.5], [math.nan],
                                   [1.0, math.nan], [math.inf], [1.0, -0.1]], ids=str)
def test_samplers_refuse_times_that_do_not_fall(times):
    never = lambda *_: pytest.fail("evaluated")
    for sampler, extra in ((ladd.sample_euler, ()), (ladd.sample_renoise, (never,))):
        with pytest.raises(ValueError, match="times must fall"):
            sampler(never, torch.zeros(1, 4), times, None, *extra)


@pytest.mark.parametrize("n, want", [(1, [1]), (2, [1, 0.5]), (4, [1, 0.75, 0.5, 0.25])])
def test_step_times(n, want):
    assert ladd.step_times((1.0, 0.75, 0.5, 0.25), n) == want


def test_step_times_of_eight_start_at_the_first_and_number_n():
    times = tuple(grid(8))
    for n in range(1, 9):
        got = ladd.step_times(times, n)
        assert len(got) == n and got[0] == 1 and ladd.check_times(got) == got and set(got) <= set(times)


@pytest.mark.parametrize("n", [0, -1, 5])
def test_step_times_refuses_what_the_student_never_learned(n):
    with pytest.raises(UserError, match=f"--steps {n}"):
        ladd.step_times((1.0, 0.75, 0.5, 0.25), n)


# ---------------------------------------------------------------------------------------------------------------------
# Taps
# ---------------------------------------------------------------------------------------------------------------------

class Chain(nn.Module):
    """x -> 2x -> +1 -> squared, each step a module that counts its calls."""

    def __init__(self, fail=False):
        super().__init__()
        self.counts = {}
        for name, f in (("twice", lambda x: 2 * x), ("plus", lambda x: x + 1), ("square", lambda x: x * x)):
            self.add_module(name, Step(name, f, self.counts))
        self.fail = fail

    def forward(self, x):
        x = self.twice(x)
        if self.fail:
            raise KeyError("inside")
        return self.square(self.plus(x))


class Step(nn.Module):
    def __init__(self, name, f, counts):
        super().__init__()
        self.name, self.f, self.counts = name, f, counts

    def forward(self, x):
        self.counts[self.name] = self.counts.get(self.name, 0) + 1
        return self.f(x)


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_taps_come_in_the_order_asked():
    net = Chain()
    run = lambda names, **k: [float(v) for v in ladd.tapped(net, names, lambda: net(torch.tensor(3.0)), **k)]
    assert run(["twice", "plus", "square"]) == [6, 7, 49]
    assert run(["square", "twice", "plus"]) == [49, 6, 7]
    assert run(["plus", "twice"], early_exit=False) == [7, 6]
    assert hooks(net) == 0


@pytest.mark.parametrize("names, calls", [(["twice"], (1, 0, 0)), (["plus", "twice"], (1, 1, 0)), (["square"], (1, 1, 1))])
def test_the_pass_ends_at_the_deepest_tap(names, calls):
    net = Chain()
    ladd.tapped(net, names, lambda: net(torch.tensor(3.0)))
    assert tuple(net.counts.get(k, 0) for k in ("twice", "plus", "square")) == calls
    net = Chain()
    ladd.tapped(net, names, lambda: net(torch.tensor(3.0)), early_exit=False)
    assert tuple(net.counts.values()) == (1, 1, 1)


@pytest.mark.parametrize("early_exit", [True, False])
def test_the_first_write_to_a_tap_wins(early_exit):
    net = Chain()
    forward = lambda: (net(torch.tensor(3.0)), net(torch.tensor(5.0)))
    assert [float(v) for v in ladd.tapped(net, ["twice", "plus"], forward, early_exit)] == [6, 7]


def test_taps_are_gone_after_an_error_inside():
    net = Chain(fail=True)
    with pytest.raises(KeyError, match="inside"):
        ladd.tapped(net, ["twice", "square"], lambda: net(torch.tensor(3.0)))
    assert hooks(net) == 0


def test_an_unknown_tap_is_named_and_leaves_nothing_behind():
    net = Chain()
    with pytest.raises(UserError, match="'cube'"):
        ladd.tapped(net, ["twice", "cube"], lambda: net(torch.tensor(3.0)))
    assert hooks(net) == 0 and net.counts == {}


def test_taps_pass_the_gradient_on_and_change_nothing():
    net, x = Chain(), torch.tensor(3.0, requires_grad=True)
    ladd.tapped(net, ["plus"], lambda: net(x))[0].backward()
    assert float(x.grad) == 2
    out = []
    ladd.tapped(net, ["plus"], lambda: out.append(net(x)), early_exit=False)
    assert float(out[0].detach()) == 49


def test_features_are_the_maps_of_the_tapped_blocks(world):
    x, t, cond = world.x0[:3], torch.tensor([0.2, 0.5, 0.9]), world.cond[:3]
    told = torch.cat([t[:, None], cond], 1)
    first = world.teacher.first(x, told)
    second = world.teacher.second(torch.tanh(first), told)
    maps = ladd.features(world, x, t, cond, ("second", "first"))
    assert torch.equal(maps[0], second) and torch.equal(maps[1], first)
    world.tap_map = lambda name, output, x_t: (name, output.shape, x_t is x)
    assert ladd.features(world, x, t, cond, ("first",)) == [("first", first.shape, True)]


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------

CHANNELS, MAPS = (8, 6, 5, 16), ((16, 12), (8, 5), (3, 9), (1, 40))


def make_heads(see_t=False, width=8):
    torch.manual_seed(0)
    heads = ladd.Heads(CHANNELS, [max(m) for m in MAPS], cond_dim=3, width=width, see_t=see_t)
    gen = ladd.generator("heads")
    maps = [torch.randn(4, c, *m, generator=gen) for c, m in zip(CHANNELS, MAPS)]
    return heads, maps, torch.rand(4, generator=gen), torch.randn(4, 3, generator=gen), torch.rand(4, generator=gen)


@pytest.mark.parametrize("see_t", [False, True])
@pytest.mark.parametrize("width", [8, 24])
def test_heads_give_one_logit_per_patch_on_maps_of_any_shape(see_t, width):
    heads, *inputs = make_heads(see_t, width)
    logits = heads(*inputs)
    assert [tuple(k.shape) for k in logits] == [(4, 8, 6), (4, 8, 5), (4, 2, 5), (4, 1, 20)]
    assert all(k.dtype == torch.float32 and k.flatten(1).std(1).min() > 0 for k in logits)


def test_heads_give_float32_under_autocast():
    heads, *inputs = make_heads()
    with torch.autocast("cpu", torch.bfloat16):
        assert {k.dtype for k in heads(*inputs)} == {torch.float32}


@pytest.mark.parametrize("see_t", [False, True])
def test_heads_hear_the_students_t_only_when_asked(see_t):
    heads, maps, t_hat, cond, t = make_heads(see_t)
    with torch.no_grad():
        base = heads(maps, t_hat, cond, t)
        for k, (moved, hat, word) in enumerate(zip(heads(maps, t_hat, cond, t / 2), heads(maps, t_hat / 2, cond, t), heads(maps, t_hat, -cond, t))):
            assert torch.equal(base[k], moved) == (not see_t)
            assert not torch.equal(base[k], hat) and not torch.equal(base[k], word)


def test_heads_are_independent_of_one_another():
    heads, maps, *told = make_heads()
    maps = [m.requires_grad_() for m in maps]
    logits = heads(maps, *told)
    for k in range(len(maps)):
        grads = torch.autograd.grad(logits[k].sum(), maps, retain_graph=True, allow_unused=True)
        assert [g is not None for g in grads] == [j == k for j in range(len(maps))]
    with torch.no_grad():
        for p in [*heads.heads[1].parameters(), *heads.embed[1].parameters()]:
            p.add_(1)
        assert [torch.equal(a, b) for a, b in zip(logits, heads(maps, *told))] == [True, False, True, True]


def test_heads_judge_each_sample_by_itself():
    heads, maps, t_hat, cond, t = make_heads(see_t=True)
    with torch.no_grad():
        for whole, alone in zip(heads(maps, t_hat, cond, t), heads([m[1:3] for m in maps], t_hat[1:3], cond[1:3], t[1:3])):
            torch.testing.assert_close(whole[1:3], alone, rtol=0, atol=1e-5)


def test_heads_do_not_mind_the_scale_of_the_features():
    heads, maps, *told = make_heads()
    with torch.no_grad():
        for a, b in zip(heads(maps, *told), heads([1000 * m for m in maps], *told)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_fourier_by_formula():
    t = torch.tensor([0.0, 0.3, 1.0])
    got = ladd.fourier(t, 5)                                # 1/4, 1, 4, 16, 64 turns
    turns = [0.25, 1, 4, 16, 64]
    want = [[f(2 * math.pi * k * v) for f in (math.cos, math.sin) for k in turns] for v in (0.0, 0.3, 1.0)]
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-4)
    assert ladd.fourier(t).shape == (3, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------

REAL = [torch.tensor([[[2.0, 0.5], [-1.0, 1.0]]]), torch.tensor([[[3.0]], [[0.0]]])]        # 4 patches of 1, 1 patch of 2 samples
FAKE = [torch.tensor([[[-2.0, 0.0], [1.0, -0.5]]]), torch.tensor([[[-3.0]], [[2.0]]])]


def test_hinge_by_hand():
    # head 1: real 0, .5, 2, 0 and fake 0, 1, 2, .5 -> 6 / 4; head 2: real 0, 1 and fake 0, 3 -> 4 / 2; their mean
    assert float(ladd.hinge_heads(REAL, FAKE)) == (1.5 + 2) / 2
    # fake means -1.5 / 4 and -1 / 2
    assert float(ladd.hinge_student(REAL, FAKE)) == pytest.approx((0.375 + 0.5) / 2)


def test_hinge_weighs_heads_alike_whatever_the_size_of_their_maps():
    real = [torch.zeros(2, 16, 16), torch.full((2, 2, 2), 5.0)]
    fake = [torch.zeros(2, 16, 16), torch.full((2, 2, 2), -5.0)]
    assert float(ladd.hinge_heads(real, fake)) == 1 and float(ladd.hinge_student(real, fake)) == 2.5


def test_hinge_gradients_stop_at_the_margin():
    real, fake = torch.tensor([[[2.0, 0.5]]], requires_grad=True), torch.tensor([[[-2.0, 0.5]]], requires_grad=True)
    ladd.hinge_heads([real], [fake]).backward()
    assert real.grad.flatten().tolist() == [0, -0.5] and fake.grad.flatten().tolist() == [0, 0.5]
    fake.grad = None
    ladd.hinge_student([real], [fake]).backward()
    assert fake.grad.flatten().tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (8, 2)])
def test_r1_of_a_linear_head_is_its_squared_slope(size):
    slope = f64(1, -2, 3).requires_grad_()
    f = torch.randn(5, 3, *size, dtype=torch.float64, requires_grad=True)
    penalty = ladd.r1_penalty([f], [torch.einsum("c,bchw->bhw", slope, f)])
    assert float(penalty.detach()) == pytest.approx(1 + 4 + 9)       # whatever the number of patches
    assert torch.autograd.grad(penalty, slope)[0].tolist() == pytest.approx([2, -4, 6])


def test_r1_of_a_quadratic_head_and_the_mean_over_heads():
    a, b = (torch.randn(4, 3, *size, dtype=torch.float64, generator=ladd.generator(size)).requires_grad_() for size in ((6, 4), (2, 2)))
    logits = [a.square().sum(1) / 2, 10 * b.sum(1)]         # gradients: a itself, and 10 everywhere
    want = (a.detach().square().sum((1, 2, 3)).mean() / 24 + 300) / 2
    torch.testing.assert_close(ladd.r1_penalty([a, b], logits), want, rtol=1e-12, atol=0)


def test_r1_counts_places_that_a_strided_head_leaves_out():
    f = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert float(ladd.r1_penalty([f], [2 * f[:, :, ::2, ::2].sum(1)]).detach()) == pytest.approx(3 * 4 / 4)


# ---------------------------------------------------------------------------------------------------------------------
# Recipe
# ---------------------------------------------------------------------------------------------------------------------

def kind_of(field):
    return typing.get_args(field.type)[0] if typing.get_origin(field.type) is tuple else field.type


def bad_values(recipe=Recipe):
    """(field's name, value) for every field of a recipe: each must be refused."""
    for field in dataclasses.fields(recipe):
        kind, meta = kind_of(field), field.metadata
        bad = [None, object(), {"a": 1}, 1j, b"1"]
        bad += {int: ["1", 1.0, 1.5, True, math.nan, math.inf], float: ["1", True, math.nan, math.inf, -math.inf], bool: [0, 1, "true", math.nan],
                str: [1, True, math.nan]}[kind]
        if meta["low"] is not None:
            bad += [meta["low"] - 1, meta["high"] + 1, -10 ** 400, 10 ** 400]
            bad += [math.nextafter(meta["low"], -math.inf), meta["high"] * 1.0001 + 1e-9] if kind is float else []
        if meta["choices"]:
            bad += ["", "no such", meta["choices"][0].upper()]
        if kind is not field.type:
            count = max(1, len(field.default))
            bad = [[v] * count for v in bad] + [[*field.default[1:], v] for v in bad] + [3, "first", 0.5, None, math.nan]      # all, and the last alone
            bad += [[], list(field.default) * 3] if field.name != "taps" else [[[]]]
        for value in bad:
            yield field.name, value


@pytest.mark.parametrize("name, value", bad_values(), ids=lambda v: repr(v).split(" at 0x")[0][:40])
def test_recipe_refuses_and_names_the_field(name, value):
    with pytest.raises(UserError, match=name):
        Recipe(**{name: value})
    with pytest.raises(UserError, match=name):
        ladd.override(Recipe(), {name: value})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Recipe) if f.metadata["low"] is not None and kind_of(f) is f.type])
def test_recipe_takes_both_ends_of_a_range(name):
    field = next(f for f in dataclasses.fields(Recipe) if f.name == name)
    for end in (field.metadata["low"], field.metadata["high"]):
        assert getattr(Recipe(**{name: field.type(end)}), name) == end


@pytest.mark.parametrize("changes, word", [
    (dict(times=(0.25, 0.5, 0.75, 1.0)), "times"), (dict(times=(0.9, 0.75, 0.5, 0.25)), "times"), (dict(times=(1.0, 1.0, 0.5, 0.25)), "times"),
    (dict(times=tuple(1 - k / 9 for k in range(9)), time_probs=(1 / 9,) * 9, warmup_probs=(1 / 9,) * 9), "times"),
    (dict(time_probs=(0.7, 0.1, 0.1)), "time_probs"), (dict(time_probs=(0.7, 0.1, 0.1, 0.2)), "time_probs"),
    (dict(warmup_probs=(1.0,)), "warmup_probs"), (dict(warmup_probs=(0.0, 0.0, 0.0, 0.0)), "warmup_probs"),
    (dict(time_probs=(1.5, -0.5, 0.0, 0.0)), "time_probs"), (dict(times=(1.0,)), "time_probs"),
    (dict(head_width=12), "head_width"), (dict(taps=("a", "b", "a")), "taps"), (dict(taps=("a", 1)), "taps"),
])
def test_recipe_refuses_fields_that_do_not_agree(changes, word):
    with pytest.raises(UserError, match=f"^{word} = "):
        Recipe(**changes)


def test_recipe_turns_lists_and_whole_numbers_into_its_own_types():
    r = Recipe(times=[1, 0.5], time_probs=[1, 0], warmup_probs=[0.5, 0.5], student_lr=1, taps=["a"])
    assert r.times == (1.0, 0.5) and type(r.times[0]) is float and type(r.student_lr) is float and r.taps == ("a",)
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(r)))) == r


def test_recipe_defaults_are_the_papers():
    r = Recipe()
    assert (r.times, r.time_probs, r.warmup_probs, r.warmup) == ((1, .75, .5, .25), (.7, .1, .1, .1), (0, 0, .5, .5), 500)
    assert (r.renoise_mean, r.renoise_std, r.r1_weight) == (1, 1, 0)


def test_recipe_is_frozen_and_every_field_explained():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seed = 1
    assert all(len(f.metadata["help"]) > 8 for f in dataclasses.fields(Recipe))


def test_override_and_drift():
    a = Recipe()
    b = ladd.override(a, {"seed": 3, "times": [1.0, 0.75, 0.5, 0.3]})
    assert a == Recipe() and ladd.drift(a, a) == {}
    assert ladd.drift(b, a) == {"seed": (0, 3), "times": (a.times, (1.0, 0.75, 0.5, 0.3))}
    with pytest.raises(UserError, match="^sede: "):
        ladd.override(a, {"sede": 3})


# ---------------------------------------------------------------------------------------------------------------------
# The average
# ---------------------------------------------------------------------------------------------------------------------

def one_weight(value):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def average(half_life, ramp, updates, start=0.0, to=1.0):
    """The average that began at `start`, after (seen, new) updates of a model that stands at `to`."""
    ema = ladd.EMA(one_weight(start), half_life, ramp)
    for seen, new in updates:
        ema.update(one_weight(to), seen, new)
    return float(ema.mean[0])


@pytest.mark.parametrize("half_life, ramp, updates, want", [
    (10, 1, [(1000, 10)], 0.5),                             # one half-life in one update
    (10, 1, [(1000, 20)], 0.75),
    (64, 1, [(1000 + k, 8) for k in range(8)], 0.5),        # the same half-life in eight
    (1e9, 0.1, [(100, 10)], 0.5),                           # the ramp holds: a tenth of 100 seen
    (1e9, 0.1, [(100, 10), (200, 10)], 1 - 0.5 * 0.5 ** 0.5),
    (40, 0.1, [(100, 10), (800, 40)], 0.75),                # and lets go once a tenth of what was seen is more
], ids=str)
def test_average_by_hand(half_life, ramp, updates, want):
    assert average(half_life, ramp, updates) == pytest.approx(want, rel=1e-6)


def test_at_half_life_zero_no_copy_is_kept_and_the_last_weights_serve(world, tmp_path):
    r = tiny.recipe(ema_half_life=0.0, student_lr=0.01, head_lr=0.02)
    s = tiny.state(world, r)
    tiny.run_steps(s, world, r, range(3))
    last = tiny.weights(s.student)
    assert s.ema.mean == [] and not torch.equal(last, tiny.weights(world.teacher))
    with s.averaged() as student:
        assert torch.equal(tiny.weights(student), last)
    assert torch.equal(tiny.weights(s.student), last)
    ladd.save_checkpoint(tmp_path, 3, ladd.snapshot(s, 3), 1)
    other = tiny.state(tiny.World(5), r)
    assert ladd.restore(other, ladd.newest_checkpoint(tmp_path)) == 3 and tiny.same(tiny.everything(s), tiny.everything(other))


def test_average_holds_its_own_copy():
    model = one_weight(1.0)
    ema = ladd.EMA(model, 10, 1)
    nn.init.constant_(model.weight, 5.0)
    assert float(ema.mean[0]) == 1


@pytest.mark.parametrize("gen_every", [1, 2])
def test_step_updates_the_average_after_the_weights(world, gen_every):
    r = tiny.recipe(gen_every=gen_every, ema_half_life=40.0, ema_ramp=0.5, student_lr=0.01, head_lr=0.02)
    s = tiny.state(world, r)
    want = tiny.weights(s.student).double()
    for i in range(6):
        tiny.run_steps(s, world, r, [i])
        if i and (i + 1) % gen_every == 0:
            half_life = min(40, 0.5 * (i + 1) * 16)
            keep = 0.5 ** (gen_every * 16 / half_life)
            want = keep * want + (1 - keep) * tiny.weights(s.student).double()
        torch.testing.assert_close(torch.cat([m.flatten() for m in s.ema.mean]).double(), want, rtol=0, atol=1e-6)
    raw, mean = tiny.weights(s.student), torch.cat([m.flatten() for m in s.ema.mean])
    with s.averaged() as model:
        assert torch.equal(tiny.weights(model), mean) and not torch.equal(raw, mean)
    assert torch.equal(tiny.weights(s.student), raw)                        # and back, bit for bit
    assert torch.equal(torch.cat([m.flatten() for m in s.ema.mean]), mean)


def test_weights_change_back_after_an_error_in_the_judging(world):
    s = tiny.state(world, tiny.recipe(ema_half_life=40.0))
    tiny.run_steps(s, world, tiny.recipe(ema_half_life=40.0), range(4))
    raw = tiny.weights(s.student)
    with pytest.raises(ZeroDivisionError), s.averaged():
        1 / 0
    assert torch.equal(tiny.weights(s.student), raw)


# ---------------------------------------------------------------------------------------------------------------------
# One iteration
# ---------------------------------------------------------------------------------------------------------------------

def test_state_starts_from_the_teacher(world):
    s = tiny.state(world, tiny.recipe())
    assert torch.equal(tiny.weights(s.student), tiny.weights(world.teacher))
    assert all(p.requires_grad for p in s.student.parameters()) and s.student.training
    assert not any(p.requires_grad for p in world.teacher.parameters()) and not world.teacher.training
    a, b = s.heads.heads
    assert (a.conv1.in_channels, b.conv1.in_channels) == (8, 16)
    torch.manual_seed(99)
    assert torch.equal(tiny.weights(tiny.state(world, tiny.recipe()).heads), tiny.weights(s.heads))
    assert not torch.equal(tiny.weights(tiny.state(world, tiny.recipe(seed=1)).heads), tiny.weights(s.heads))


@pytest.mark.parametrize("gen_every, updated", [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 3, 5]), (3, [2, 5]), (7, [6]), (8, [])])
def test_schedule_of_the_students_updates(world, gen_every, updated):
    r = tiny.recipe(gen_every=gen_every, batch=4)
    s, changed = tiny.state(world, r), []
    for i in range(7):
        before, heads = tiny.weights(s.student), tiny.weights(s.heads)
        metrics, = tiny.run_steps(s, world, r, [i])
        changed += [i] if not torch.equal(before, tiny.weights(s.student)) else []
        assert not torch.equal(heads, tiny.weights(s.heads))
        assert ("student_loss" in metrics) == ("student_grad_norm" in metrics) == (i in updated)
    assert changed == updated == [i for i in range(7) if ladd.updates_student(r, i)]


def test_iteration_zero_leaves_student_and_average_alone(world):
    r = tiny.recipe(gen_every=1, ema_half_life=1e-3)
    s = tiny.state(world, r)
    tiny.run_steps(s, world, r, [0])
    assert torch.equal(tiny.weights(s.student), tiny.weights(world.teacher))
    assert torch.equal(torch.cat([m.flatten() for m in s.ema.mean]), tiny.weights(world.teacher))
    assert all(float(v["step"]) == 0 for v in s.student_opt.state.values())     # nor has its optimizer counted a step


def test_teacher_stays_bit_equal_and_without_gradient(world):
    r = tiny.recipe(r1_weight=0.1, student_lr=0.01, head_lr=0.02)
    before = {k: v.clone() for k, v in world.teacher.state_dict().items()}
    s = tiny.state(world, r)
    metrics = tiny.run_steps(s, world, r, range(4))
    assert all(torch.equal(v, before[k]) for k, v in world.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in world.teacher.parameters()) and not world.teacher.training
    assert hooks(world.teacher) == 0
    assert all(m["student_grad_norm"] > 0 for m in metrics[1:])
    assert not torch.equal(tiny.weights(s.student), tiny.weights(world.teacher))


def test_the_students_gradient_flows_through_the_teacher(world):
    r = tiny.recipe()
    s = tiny.state(world, r)
    ladd.gradients(tiny.micro(world, r, 1), s, world, r, ladd.Terms(), 1, 1.0)
    assert all(float(g.abs().max()) > 0 for g in tiny.grads(s.student))
    world.tap_map = lambda name, output, x_t: output.detach() + 0 * x_t.sum()
    s = tiny.state(world, r)
    ladd.gradients(tiny.micro(world, r, 1), s, world, r, ladd.Terms(), 1, 1.0)
    assert all(float(g.abs().max()) == 0 for g in tiny.grads(s.student))
    assert any(float(g.abs().max()) > 0 for g in tiny.grads(s.heads))


@pytest.mark.parametrize("share_noise, r1", [(True, 0.0), (False, 0.5)])
def test_forward_passes_per_iteration(world, share_noise, r1):
    r = tiny.recipe(gen_every=2, share_noise=share_noise, r1_weight=r1, batch=8)
    s, calls = tiny.state(world, r), []
    for name, module in (("teacher", world.teacher), ("student", s.student), ("deep", world.teacher.third)):
        module.register_forward_pre_hook(lambda m, inputs, name=name: calls.append((name, len(inputs[0]), torch.is_grad_enabled())))
    for i in range(4):
        calls.clear()
        tiny.run_steps(s, world, r, [i])
        turn = i in (1, 3)
        assert calls == [("student", 8, turn), ("teacher", 8, False), ("teacher", 8, turn)]


def own_iteration(world, s, r, i, bf16):
    """The student's and the heads' loss of iteration i, written out afresh with the state's networks as they are."""
    p, t4 = tiny.micro(world, r, i), lambda t: t[:, None, None, None]
    x_t = p.x0 * (1 - t4(p.t)) + p.eps * t4(p.t)
    x0_hat = x_t - t4(p.t) * s.student(x_t, p.t, p.cond)

    def judged(x0, t, eps):
        x, told = x0 * (1 - t4(t)) + eps * t4(t), torch.cat([t[:, None], p.cond], 1)
        first = world.teacher.first(x, told)
        maps = [first, world.teacher.second(torch.tanh(first), told)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            return s.heads(maps, t, 2 * p.cond - 1, p.t)
    fake = judged(x0_hat, p.t_hat, p.eps_hat)
    with torch.no_grad():
        real = judged(p.x0, p.t_real, p.eps_real)
        heads_loss = sum((torch.clamp(1 - a, min=0) + torch.clamp(1 + b, min=0)).mean() for a, b in zip(real, fake)) / 2
    return -(fake[0].mean() + fake[1].mean()) / 2, heads_loss


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("share_noise", [True, False])
def test_both_losses_use_the_heads_as_they_stood_when_the_iteration_began(world, monkeypatch, bf16, share_noise):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    r = tiny.recipe(head_lr=0.05, student_lr=0.01, clip_student=1e6, share_noise=share_noise, heads_see_t=True)
    s, seen = tiny.state(world, r), []
    s.student_opt.register_step_pre_hook(lambda *_: seen.append(tiny.grads(s.student)))
    for i in range(4):
        old = types.SimpleNamespace(student=copy.deepcopy(s.student), heads=copy.deepcopy(s.heads))
        metrics, = tiny.run_steps(s, world, r, [i])
        student_loss, heads_loss = own_iteration(world, old, r, i, bf16)
        assert metrics["heads_loss"] == pytest.approx(float(heads_loss), abs=1e-6)
        if i:
            assert metrics["student_loss"] == pytest.approx(float(student_loss.detach()), abs=1e-6)
            stale = types.SimpleNamespace(student=old.student, heads=s.heads)               # the heads after their step differ
            assert abs(float((own_iteration(world, stale, r, i, bf16)[0] - student_loss).detach())) > 1e-4
            want = torch.autograd.grad(student_loss, list(old.student.parameters()))
            for a, b in zip(seen[-1], want):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("r1", [0.0, 0.5])
def test_the_students_backward_leaves_the_heads_gradients_alone(world, r1):
    r, before = tiny.recipe(r1_weight=r1), []
    s = tiny.state(world, r)

    def student_loss(real, fake):                           # called between the two backward passes
        before.append(tiny.grads(s.heads))
        assert all(k.requires_grad for k in fake) and not any(k.requires_grad for k in real)
        return ladd.hinge_student(real, fake)
    ladd.gradients(tiny.micro(world, r, 1), s, world, r, ladd.Terms(student_loss=student_loss), 1, 1.0)
    after = tiny.grads(s.heads)
    assert len(before) == 1 and all(torch.equal(a, b) for a, b in zip(before[0], after))
    assert any(float(g.abs().max()) > 0 for g in after) and any(float(g.abs().max()) > 0 for g in tiny.grads(s.student))
    assert all(p.requires_grad for p in s.heads.parameters())
    ladd.update(s, r, 1)
    assert all(g is None for g in tiny.grads(s.heads) + tiny.grads(s.student))


def test_a_head_only_iteration_gives_the_student_no_gradient(world):
    r = tiny.recipe(gen_every=3)
    s = tiny.state(world, r)
    ladd.gradients(tiny.micro(world, r, 1), s, world, r, ladd.Terms(), 1, 1.0)
    assert all(g is None for g in tiny.grads(s.student)) and any(float(g.abs().max()) > 0 for g in tiny.grads(s.heads))


@pytest.mark.parametrize("micro_batch", [2, 8])
@pytest.mark.parametrize("changes", [{}, {"share_noise": False, "gen_every": 2, "heads_see_t": True, "beta1": 0.9}], ids=["plain", "other"])
def test_micro_batches_give_what_one_batch_gives(float64, plain, micro_batch, changes):
    world, r = tiny.World(), tiny.recipe(**changes)
    runs = []
    for size in (16, micro_batch):
        s = tiny.state(world, r)
        metrics = tiny.run_steps(s, world, r, range(5), micro_batch=size)
        runs.append((tiny.weights(s.student), tiny.weights(s.heads), metrics))
    (a, b, c), (x, y, z) = runs
    torch.testing.assert_close(x, a, rtol=0, atol=1e-9)
    torch.testing.assert_close(y, b, rtol=0, atol=1e-9)
    assert float((a - tiny.weights(world.teacher)).abs().max()) > 1e-5           # and there was something to compare
    for k in ("heads_loss", "student_loss", "student_grad_norm", "heads_grad_norm", "accuracy/second"):
        assert [m.get(k, -1) for m in z] == pytest.approx([m.get(k, -1) for m in c], rel=1e-6)


def test_micro_batches_with_r1_give_the_same_gradients(world, plain):
    r = tiny.recipe(r1_weight=2.0, share_noise=False)
    found = []
    for size in (16, 4):
        s = tiny.state(world, r)
        for start in range(0, 16, size):
            ladd.gradients(tiny.micro(world, r, 1, slice(start, start + size)), s, world, r, ladd.Terms(), 1, size / 16)
        found.append(tiny.grads(s.student) + tiny.grads(s.heads))
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-8)


def test_r1_is_taken_on_its_iterations_with_its_weight(world, plain):
    def heads_gradient(i, **changes):
        r = tiny.recipe(gen_every=100, **changes)
        s = tiny.state(world, r)
        metrics = ladd.gradients(tiny.micro(world, r, i), s, world, r, ladd.Terms(), i, 1.0)
        return torch.cat([g.flatten() for g in tiny.grads(s.heads)]), metrics
    assert ["r1" in heads_gradient(i, r1_weight=1.0, r1_every=4)[1] for i in range(9)] == [i in (0, 4, 8) for i in range(9)]
    base, _ = heads_gradient(4)
    once, metrics = heads_gradient(4, r1_weight=1.0)
    many, _ = heads_gradient(4, r1_weight=2.0, r1_every=4)
    torch.testing.assert_close(many - base, 8 * (once - base), rtol=1e-3, atol=1e-5 * float(many.abs().max()))
    assert float((once - base).abs().max()) > 1e-4

    r = tiny.recipe(gen_every=100)                          # the penalty itself, on the real samples, by finite differences
    s, p = tiny.state(world, r), tiny.micro(world, r, 4)
    maps = ladd.features(world, ladd.interpolate(p.x0, p.eps_real, p.t_real), p.t_real, p.cond, r.taps)
    heads, total = s.heads.double(), 0.0
    maps, told = [m.double().requires_grad_() for m in maps], (p.t_real.double(), (2 * p.cond - 1).double(), p.t.double())
    table = [head(m, embed(torch.cat([ladd.fourier(told[0]), told[1]], 1))) for head, embed, m in zip(heads.heads, heads.embed, maps)]
    for k, m in zip(table, maps):
        total += float(torch.autograd.grad(k.sum(), m)[0].square().sum()) / (16 * m.shape[2] * m.shape[3]) / 2
    assert float(metrics["r1"]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("decay, iterations, student, heads", [
    ("none", 100, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}, {0: 0.1, 4: 0.5, 9: 1, 99: 1}),
    ("linear", 100, {0: 0.1, 4: 0.5 * 0.96, 9: 0.91, 50: 0.5, 99: 0.01}, {0: 0.1, 4: 0.5, 50: 1, 99: 1}),
    ("cosine", 100, {0: 0.1, 25: 0.5 + 0.5 * math.sqrt(0.5), 50: 0.5, 75: 0.5 - 0.5 * math.sqrt(0.5)}, {4: 0.5, 50: 1, 99: 1}),
])
def test_learning_rate_table(decay, iterations, student, heads):
    for gen_every in (1, 3):                                # iterations count, not updates
        r = tiny.recipe(lr_warmup=10, lr_decay=decay, iterations=iterations, gen_every=gen_every)
        for table, who in ((student, True), (heads, False)):
            for i, want in table.items():
                assert ladd.lr_scale(r, i, who) == pytest.approx(want, abs=1e-12)
    assert ladd.lr_scale(tiny.recipe(lr_warmup=0, lr_decay="none"), 0, True) == 1


def test_both_optimizers_step_with_the_scaled_rate(world):
    r = tiny.recipe(lr_warmup=4, lr_decay="linear", iterations=8, student_lr=1e-3, head_lr=2e-3, batch=4)
    s, rates = tiny.state(world, r), {"student": [], "heads": []}
    for name, opt in (("student", s.student_opt), ("heads", s.heads_opt)):
        opt.register_step_pre_hook(lambda o, *_, name=name: rates[name].append([g["lr"] for g in o.param_groups]))
    tiny.run_steps(s, world, r, range(6))
    assert [x[0] for x in rates["heads"]] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3, 2e-3, 2e-3])
    assert [x[0] for x in rates["student"]] == pytest.approx([1e-3 * a * b for a, b in ((.5, 7 / 8), (.75, 6 / 8), (1, 5 / 8), (1, .5), (1, 3 / 8))])


@pytest.mark.parametrize("clip_student, clip_heads", [(1e-4, 3e-4), (1e-4, 1e6), (1e6, 3e-4), (1e6, 1e6)])
def test_gradient_clipping_scales_each_network_by_its_own_limit(world, clip_student, clip_heads):
    r = tiny.recipe(clip_student=clip_student, clip_heads=clip_heads)
    s, p, stepped = tiny.state(world, r), tiny.micro(world, r, 1), {}
    ladd.gradients(p, s, world, r, ladd.Terms(), 1, 1.0)
    raw = {name: torch.cat([g.flatten() for g in tiny.grads(getattr(s, name))]) for name in ("student", "heads")}
    for name, opt in (("student", s.student_opt), ("heads", s.heads_opt)):
        opt.register_step_pre_hook(lambda *_, name=name: stepped.update({name: torch.cat([g.flatten() for g in tiny.grads(getattr(s, name))])}))
    metrics = ladd.update(s, r, 1)
    for name, clip in (("student", clip_student), ("heads", clip_heads)):
        norm = float(raw[name].double().square().sum().sqrt())
        assert norm > 1e-3 and metrics[f"{name}_grad_norm"] == pytest.approx(norm, rel=1e-4)
        torch.testing.assert_close(stepped[name], raw[name] * min(1.0, clip / norm), rtol=1e-3, atol=0)


def poison(where, iterations):
    """Terms that make the gradient of one network nan or inf on some iterations; counts as `i` by itself."""
    turn = itertools.count()
    now = {"bad": False}

    def heads_loss(real, fake):
        now["bad"] = next(turn) in iterations
        return ladd.hinge_heads(real, fake) * (math.nan if now["bad"] and where == "heads" else 1.0)

    def student_loss(real, fake):
        return ladd.hinge_student(real, fake) * (math.inf if now["bad"] and where == "student" else 1.0)
    return ladd.Terms(heads_loss=heads_loss, student_loss=student_loss)


@pytest.mark.parametrize("where", ["heads", "student"])
def test_a_gradient_that_is_not_finite_skips_both_updates(world, where):
    r = tiny.recipe(head_lr=0.01, student_lr=0.005)
    s, terms = tiny.state(world, r), poison(where, {2, 3})
    for i in range(6):
        before = tiny.everything(s)
        metrics, = tiny.run_steps(s, world, r, [i], terms)
        assert metrics["skipped"] == (i in (2, 3)) and s.skipped == {2: 1, 3: 2}.get(i, 0)
        if i in (2, 3):
            assert tiny.same(before, tiny.everything(s))
        else:
            assert not torch.equal(torch.cat([v.flatten() for k, v in before.items() if k.startswith("heads.")]), tiny.weights(s.heads))
        assert all(g is None for g in tiny.grads(s.heads) + tiny.grads(s.student))
    assert all(v.isfinite().all() for v in tiny.everything(s).values())


@pytest.mark.parametrize("where", ["heads", "student"])
def test_three_in_a_row_end_the_run(world, where):
    r = tiny.recipe()
    s, terms = tiny.state(world, r), poison(where, {1, 2, 4, 5, 6})
    tiny.run_steps(s, world, r, range(6), terms)            # two, one good, two
    before = tiny.everything(s)
    with pytest.raises(UserError, match="iteration 6.*non-finite"):
        tiny.run_steps(s, world, r, [6], terms)
    assert tiny.same(before, tiny.everything(s))


def adamw(w, gradients, lr, beta1, beta2, decay):
    """AdamW (arXiv 1711.05101, algorithm 2) in float64, over the gradients of several steps."""
    w, m, v = w.double(), 0.0, 0.0
    for k, g in enumerate(gradients, 1):
        g = g.double()
        w = w - lr * decay * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w - lr * (m / (1 - beta1 ** k)) / ((v / (1 - beta2 ** k)).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("steps, beta1, decay", [(1, 0.0, 0.0), (4, 0.9, 0.0), (4, 0.0, 0.1)])
def test_tiny_steps_are_not_lost_to_rounding(world, steps, beta1, decay):
    r = tiny.recipe(student_lr=5e-6, beta1=beta1, weight_decay=decay)
    s, seen = tiny.state(world, r), []
    s.student_opt.register_step_pre_hook(lambda *_: seen.append(torch.cat([g.flatten() for g in tiny.grads(s.student)])))
    before = tiny.weights(s.student)
    tiny.run_steps(s, world, r, range(steps + 1))           # iteration 0 is the heads' alone
    after, want = tiny.weights(s.student), adamw(before, seen, 5e-6, beta1, 0.99, decay)
    loud = seen[0].abs() > 1e-3 * seen[0].abs().max()
    assert len(seen) == steps and loud.float().mean() > 0.5
    assert (after != before)[loud].float().mean() >= 0.99
    torch.testing.assert_close(after.double(), want, rtol=0, atol=steps * 6e-8)       # of steps of 5e-6 each


def test_samples_conditions_and_draws_stay_paired(world):
    r, seen = tiny.recipe(gen_every=2), {"student": [], "teacher": [], "heads": []}
    s = tiny.state(world, r)
    s.student.register_forward_pre_hook(lambda m, a: seen["student"].append(a))
    world.teacher.register_forward_pre_hook(lambda m, a: seen["teacher"].append(a))
    s.heads.register_forward_pre_hook(lambda m, a: seen["heads"].append(a))
    passes = []
    terms = ladd.Terms(add_heads=(lambda p, state: passes.append(p) or 0.0 * p.x0.sum(),))
    tiny.run_steps(s, world, r, range(4), terms, micro_batch=4)
    assert [len(seen[k]) for k in ("student", "teacher", "heads")] == [16, 32, 2 * 16 + 2 * 4]
    used = []
    for k, p in enumerate(passes):
        rows = (p.cond[:, 0] * tiny.N).round().long()       # the condition names the sample
        used += rows.tolist()
        assert torch.equal(p.x0, world.x0[rows]) and torch.equal(p.cond, world.cond[rows])
        x, t, cond = seen["student"][k]
        assert torch.equal(cond, p.cond) and torch.equal(t, p.t)
        torch.testing.assert_close((x - t[:, None, None, None] * p.eps) / (1 - t[:, None, None, None]).clamp(min=1e-9) * (t < 1)[:, None, None, None],
                                   p.x0 * (t < 1)[:, None, None, None], rtol=0, atol=1e-4)
        for (x, t, cond), x0 in zip(seen["teacher"][2 * k:2 * k + 2], (p.x0, p.x0_hat)):
            assert torch.equal(cond, p.cond) and torch.equal(t, p.t_hat)
            torch.testing.assert_close(x, torch.lerp(x0, p.eps_hat, t[:, None, None, None]), rtol=0, atol=1e-5)
        assert torch.equal(p.head_cond, 2 * p.cond - 1)
    for maps, t_hat, head_cond, t in seen["heads"]:
        p = next(p for p in passes if torch.equal(p.t_hat, t_hat))
        assert torch.equal(head_cond, p.head_cond) and torch.equal(t, p.t) and len(maps) == 2
    epochs = 16 * 4 // tiny.N
    assert sorted(used[:epochs * tiny.N]) == sorted(list(range(tiny.N)) * epochs)     # each sample once an epoch
    assert used == ladd.reader_indices(tiny.N, 0, 64, 0)[0].tolist()


@pytest.mark.parametrize("share, want", [(0.0, []), (0.25, [3, 7, 11, 15]), (0.5, [1, 3, 5, 7, 9, 11, 13, 15]), (1.0, list(range(16)))])
def test_paired_noise_is_the_noise_that_x0_was_made_from(world, share, want):
    r, passes = tiny.recipe(paired_share=share), []
    terms = ladd.Terms(add_heads=(lambda p, state: passes.append(p) or 0.0 * p.x0.sum(),))
    tiny.run_steps(tiny.state(world, r), world, r, [0], terms, micro_batch=8)
    for p in passes:
        rows = (p.cond[:, 0] * tiny.N).round().long()
        assert ((p.eps == world.noise[rows]).flatten(1).all(1) == p.paired).all()
        torch.testing.assert_close(p.x_t, torch.lerp(p.x0, p.eps, p.t[:, None, None, None]), rtol=0, atol=1e-6)
    assert torch.cat([p.paired for p in passes]).nonzero()[:, 0].tolist() == want    # evenly: every micro-batch has its share
    joint = ladd.draw(r, 0, tiny.SHAPE)
    assert torch.equal(torch.cat([p.eps_hat for p in passes]), joint["eps_hat"])      # the second noise stays a fresh one


def test_paired_noise_in_a_world_without_noise_is_refused(world):
    read, r = world.read, tiny.recipe(paired_share=0.5)
    world.read = lambda start, count: (*read(start, count)[:2], None)
    tiny.run_steps(tiny.state(world, tiny.recipe()), world, tiny.recipe(), [0])        # not needed: not missed
    with pytest.raises(UserError, match="paired_share"):
        tiny.run_steps(tiny.state(world, r), world, r, [0])


def test_terms_replace_the_input_and_join_the_losses(world):
    r = tiny.recipe(student_lr=0.01, head_lr=0.02)
    s, order = tiny.state(world, r), []

    def student_input(p, student):
        assert student is s.student
        return torch.full_like(p.x0, 0.25)

    def toward_zero(p, state):
        order.append("student")
        assert [k.shape[1:] for k in p.real_logits] == [(8, 8), (4, 4)] and state is s
        return p.x0_hat.square().mean()

    def calm(p, state):
        order.append("heads")
        assert len(p.real_maps) == len(p.fake_maps) == 2
        return sum(w.square().sum() for w in state.heads.parameters())
    world.extra = ladd.Terms(student_input=student_input, add_heads=(calm,), add_student=(toward_zero,))
    s.student.register_forward_pre_hook(lambda m, a: order.append(float(a[0].min() + a[0].max())))
    metrics = tiny.run_steps(s, world, r, range(2))
    assert order == [0.5, "heads", 0.5, "heads", "student"]
    assert "toward_zero" not in metrics[0] and metrics[1]["toward_zero"] > 0


def test_an_added_loss_of_the_student_has_its_gradient(world):
    r = tiny.recipe(adv_weight=0.0)
    s, p = tiny.state(world, r), tiny.micro(world, r, 1)
    squared = lambda p, state: p.x0_hat.square().mean()
    ladd.gradients(p, s, world, r, ladd.Terms(add_student=(squared,)), 1, 0.5)
    other, q = copy.deepcopy(s.student), tiny.micro(world, r, 1)
    x_t = torch.lerp(q.x0, q.eps, q.t[:, None, None, None])
    want = torch.autograd.grad(0.5 * (x_t - q.t[:, None, None, None] * other(x_t, q.t, q.cond)).square().mean(), list(other.parameters()))
    for a, b in zip(tiny.grads(s.student), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gen_every, adv_warmup, i, factor", [(1, 0, 1, 1), (1, 4, 1, 0.5), (1, 4, 2, 0.75), (1, 4, 3, 1), (1, 4, 9, 1), (2, 8, 3, 0.5), (3, 6, 5, 1)])
def test_weight_of_the_adversarial_loss(world, plain, gen_every, adv_warmup, i, factor):
    found = []
    for r in (tiny.recipe(gen_every=gen_every), tiny.recipe(adv_weight=3.0, adv_warmup=adv_warmup, gen_every=gen_every)):
        s = tiny.state(world, r)
        metrics = ladd.gradients(tiny.micro(world, r, i), s, world, r, ladd.Terms(), i, 1.0)
        found.append((torch.cat([g.flatten() for g in tiny.grads(s.student)]), float(metrics["student_loss"])))
    torch.testing.assert_close(found[1][0], 3 * factor * found[0][0], rtol=1e-4, atol=1e-8)
    assert found[0][1] == pytest.approx(found[1][1])        # logged without its weight


def test_metrics_of_an_iteration_by_hand(world, monkeypatch):
    real = [torch.tensor([[[2.0, -1.0]], [[3.0, 1.0]]]), torch.tensor([[[-1.0]], [[1.0]]])]
    fake = [torch.tensor([[[-2.0, 1.0]], [[-3.0, 0.5]]]), torch.tensor([[[-1.0]], [[-4.0]]])]
    r = tiny.recipe(batch=2)
    s, answers = tiny.state(world, r), itertools.cycle((real, fake))
    s.heads.forward = lambda *_: [k + 0 * s.heads.heads[0].out.bias for k in next(answers)]
    metrics = {k: float(v) for k, v in ladd.gradients(tiny.micro(world, r, 0), s, world, r, ladd.Terms(), 0, 1.0).items()}
    assert metrics["accuracy/first"] == 3 / 4 and metrics["accuracy/second"] == (1 / 2 + 1) / 2      # a tie counts half
    assert metrics["logit_gap"] == pytest.approx(((5 / 4 + 3.5 / 4) + (0 + 2.5)) / 2)
    assert metrics["heads_loss"] == pytest.approx(((2 / 4 + 3.5 / 4) + (2 / 2 + 0)) / 2)


def test_diversity_by_hand():
    maps = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 16.0], [3.0, 4.0]])[:, :, None, None]
    assert float(ladd.diversity(maps)) == pytest.approx((5 + 5 + 12 + 12) / 4)
    assert float(ladd.diversity(torch.ones(4, 2, 3, 3))) == 0


def test_a_run_repeats_bit_for_bit_and_does_not_use_the_global_generator(world):
    r, found = tiny.recipe(share_noise=False, r1_weight=0.1), []
    for seed in (0, 1):
        s = tiny.state(world, r)
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        tiny.run_steps(s, world, r, range(3))
        assert torch.equal(before, torch.random.get_rng_state())
        found.append(tiny.everything(s))
    assert tiny.same(*found)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "deep" / "net.safetensors"
    ladd.save_weights(path, tiny.Net(3).state_dict(), {"kind": "student", "figure": 1.5})
    return path


def test_weights_round_trip(saved):
    tensors, about = ladd.load_weights(saved, "student")
    net = tiny.Net(4)
    ladd.fill(net, tensors, saved)
    assert torch.equal(tiny.weights(net), tiny.weights(tiny.Net(3)))
    assert about["figure"] == 1.5 and about["kind"] == "student" and about["schema"] == ladd.SCHEMA
    assert sorted(p.name for p in saved.parent.iterdir()) == ["net.json", "net.safetensors"]       # no half-written leftovers


def test_weights_of_any_layout_round_trip(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": base.t(), "part": base[1:3, ::2], "param": nn.Parameter(base.clone()), "scalar": torch.tensor(3), "half": base.bfloat16()}
    ladd.save_weights(tmp_path / "a.safetensors", tensors, {"kind": "odd"})
    loaded, _ = ladd.load_weights(tmp_path / "a.safetensors", "odd")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) and loaded[k].dtype == tensors[k].dtype for k in tensors)


def test_saving_again_replaces_both_files(saved):
    ladd.save_weights(saved, tiny.Net(5).state_dict(), {"kind": "student"})
    net = tiny.Net(4)
    ladd.fill(net, ladd.load_weights(saved, "student")[0], saved)
    assert torch.equal(tiny.weights(net), tiny.weights(tiny.Net(5)))


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [
    lambda p: flip(p, -5), lambda p: flip(p, 12), lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(b""),
    lambda p: p.unlink(), lambda p: p.with_suffix(".json").unlink(), lambda p: p.with_suffix(".json").write_text('{"schema": 1,'),
    lambda p: p.with_suffix(".json").write_bytes(b"\xff\xfe"), lambda p: p.with_suffix(".json").write_text("[1]"),
    lambda p: p.with_suffix(".json").write_text('{"schema": 1, "kind": "student"}'),
    lambda p: p.with_suffix(".json").write_text(p.with_suffix(".json").read_text().replace('"schema": 1', '"schema": 99')),
    lambda p: p.unlink() or p.mkdir(),
], ids=["byte", "header", "cut", "empty", "gone", "no json", "cut json", "no text", "list", "no checksum", "schema", "folder"])
def test_damaged_weights_are_refused_by_name(saved, harm):
    harm(saved)
    with pytest.raises(UserError, match="net.safetensors"):
        ladd.load_weights(saved, "student")


def test_weights_of_another_kind_are_refused(saved):
    with pytest.raises(UserError, match="'judge'"):
        ladd.load_weights(saved, "judge")


@pytest.mark.parametrize("change, word", [
    (lambda d: d.update({"out.weight": torch.zeros(4, 9, 3, 3)}), "out.weight"), (lambda d: d.pop("out.bias"), "out.bias"),
    (lambda d: d.update({"extra": torch.zeros(1)}), "extra"),
])
def test_fill_names_what_does_not_fit(change, word):
    tensors = tiny.Net(3).state_dict()
    change(tensors)
    with pytest.raises(UserError, match=rf"some/file.*{word}"):
        ladd.fill(tiny.Net(3), tensors, "some/file")


def nested(n):
    return {"a": torch.full((5,), float(n)), "deep": {"b": [torch.arange(3) + n, torch.tensor(n)], "count": n}, "iteration": n}


def test_checkpoint_round_trip_keeps_the_newest(tmp_path):
    assert ladd.newest_checkpoint(tmp_path) is None
    for n in (1, 2, 10, 30):
        ladd.save_checkpoint(tmp_path, n, nested(n))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000010", "step-0000030"]
    newest = ladd.newest_checkpoint(tmp_path)
    assert newest.name == "step-0000030"
    got = ladd.load_checkpoint(newest, nested(0))
    assert torch.equal(got["a"], torch.full((5,), 30.0)) and got["iteration"] == 30 and got["deep"]["count"] == 30
    assert got["deep"]["b"][0].tolist() == [30, 31, 32] and int(got["deep"]["b"][1]) == 30


def test_checkpoint_keep_and_saving_the_same_step_again(tmp_path):
    for n, value in ((1, 1), (2, 2), (3, 3), (3, 7)):
        ladd.save_checkpoint(tmp_path, n, nested(value), keep=3)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert ladd.load_checkpoint(ladd.newest_checkpoint(tmp_path), nested(0))["iteration"] == 7


def cut(path):
    largest = max((f for f in path.iterdir() if f.name != "complete.json"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])


def listed(text):
    return lambda path: (path / "complete.json").write_text(text)


HARM = {"cut": cut, "metadata gone": lambda p: (p / ".metadata").unlink(),
        "data gone": lambda p: next(p.glob("*.distcp")).unlink(), "another's data": lambda p: next(p.glob("*.distcp")).write_bytes(b"stranger"),
        "unfinished": lambda p: (p / "complete.json").unlink(), "cut list": listed('{"a'), "empty list": listed(""), "no file listed": listed("{}"),
        "no list": listed("[1, 2]"), "null": listed("null"), "numbers": listed('{".metadata": 3}'), "no text": lambda p: (p / "complete.json").write_bytes(b"\xff"),
        "a byte of the list": lambda p: flip(p / "complete.json", 20), "a file in its place": lambda p: shutil.rmtree(p) or p.write_text("")}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_an_incomplete_checkpoint_is_passed_over_aloud(tmp_path, capsys, harm):
    for n in (1, 2):
        ladd.save_checkpoint(tmp_path, n, nested(n))
    (tmp_path / "checkpoints" / "step-notes").mkdir()       # a stranger among them
    assert ladd.newest_checkpoint(tmp_path).name == "step-0000002" and capsys.readouterr().err == ""
    harm(tmp_path / "checkpoints" / "step-0000002")
    assert ladd.newest_checkpoint(tmp_path).name == "step-0000001"
    assert "step-0000002: cut off" in capsys.readouterr().err
    harm(tmp_path / "checkpoints" / "step-0000001")
    assert ladd.newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("harm", [HARM["cut"], HARM["a file in its place"]], ids=["cut", "a file in its place"])
def test_a_damaged_later_checkpoint_does_not_outlive_the_next_good_one(tmp_path, harm, keep):
    for n in (9_999_999, 10_000_000):                       # one more digit
        ladd.save_checkpoint(tmp_path, n, nested(n), keep=2)
    harm(tmp_path / "checkpoints" / "step-10000000")
    ladd.save_checkpoint(tmp_path, 300, nested(1), keep=keep)           # of the run that has gone on from further back
    assert ladd.newest_checkpoint(tmp_path).name == "step-0000300"


def test_the_state_asks_a_reader_for_no_more_than_a_batch(world, monkeypatch):
    usual = world.read

    def read(start, count):
        assert count <= 1
        return usual(start, count)
    monkeypatch.setattr(world, "read", read)
    assert len(tiny.state(world, tiny.recipe(batch=1)).heads.heads) == 2


@pytest.mark.parametrize("saved", [tiny.recipe(head_width=16), tiny.recipe(heads_see_t=True), None], ids=["width", "input", "another schema"])
def test_a_checkpoint_of_another_shape_is_refused_in_one_line(world, tmp_path, saved):
    ladd.save_checkpoint(tmp_path, 3, ladd.snapshot(tiny.state(world, saved), 3) if saved else nested(3))
    with pytest.raises(UserError, match="step-0000003: does not fit this run") as error:
        ladd.restore(tiny.state(world, tiny.recipe()), ladd.newest_checkpoint(tmp_path))
    assert "\n" not in str(error.value)


def test_a_full_disk_ends_a_save_in_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp
    ladd.save_checkpoint(tmp_path, 1, nested(1))

    def full(self, *args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(UserError, match="part-0000002: can't be written .*No space left"):
        ladd.save_checkpoint(tmp_path, 2, nested(2))
    monkeypatch.undo()
    assert ladd.newest_checkpoint(tmp_path).name == "step-0000001"
    ladd.save_checkpoint(tmp_path, 2, nested(2))            # once there is space again
    assert ladd.newest_checkpoint(tmp_path).name == "step-0000002"


def test_a_checkpoint_in_the_making_is_no_checkpoint(tmp_path):
    ladd.save_checkpoint(tmp_path, 1, nested(1))
    (tmp_path / "checkpoints" / "step-0000001").rename(tmp_path / "checkpoints" / "part-0000002")
    assert ladd.newest_checkpoint(tmp_path) is None
    ladd.save_checkpoint(tmp_path, 2, nested(2))            # and is no hindrance to the next try
    assert ladd.newest_checkpoint(tmp_path).name == "step-0000002"


def test_checkpoints_beyond_seven_digits_stay_in_order(tmp_path):
    for n in (9_999_999, 10_000_000, 10_000_001):
        ladd.save_checkpoint(tmp_path, n, nested(n))
    assert ladd.load_checkpoint(ladd.newest_checkpoint(tmp_path), nested(0))["iteration"] == 10_000_001


def test_snapshot_holds_everything(world, tmp_path):
    r = tiny.recipe()
    s = tiny.state(world, r)
    tiny.run_steps(s, world, r, range(3))
    s.skipped = 2
    ladd.save_checkpoint(tmp_path, 3, ladd.snapshot(s, 3))
    other = tiny.state(tiny.World(5), tiny.recipe(seed=5))  # other weights everywhere
    assert not tiny.same(tiny.everything(s), {**tiny.everything(s), **tiny.everything(other)})
    assert ladd.restore(other, ladd.newest_checkpoint(tmp_path)) == 3 and other.skipped == 2
    assert tiny.same(tiny.everything(s), tiny.everything(other))


@pytest.mark.parametrize("changes", [{}, {"gen_every": 3, "beta1": 0.9, "ema_ramp": 0.5, "share_noise": False}], ids=["plain", "other"])
def test_one_more_step_after_restore_equals_the_run_that_went_on(world, tmp_path, changes):
    r = tiny.recipe(lr_warmup=6, lr_decay="cosine", student_lr=0.01, head_lr=0.02, **changes)
    s = tiny.state(world, r)
    tiny.run_steps(s, world, r, range(5))
    ladd.save_checkpoint(tmp_path, 5, ladd.snapshot(s, 5))
    a = tiny.run_steps(s, world, r, range(5, 8))
    other = tiny.state(world, r)
    b = tiny.run_steps(other, world, r, range(ladd.restore(other, ladd.newest_checkpoint(tmp_path)), 8))
    assert a == b and tiny.same(tiny.everything(s), tiny.everything(other))


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("gen_every", [1, 2, 4])
def test_taking_a_snapshot_does_not_change_the_run(world, at, gen_every):
    r, found = tiny.recipe(student_lr=0.01, head_lr=0.02, gen_every=gen_every, beta1=0.5), []
    for taken in (False, True):
        s = tiny.state(world, r)
        tiny.run_steps(s, world, r, range(at))
        if taken:
            ladd.snapshot(s, at)
        tiny.run_steps(s, world, r, range(at, 6))
        found.append(tiny.everything(s))
    assert tiny.same(*found)


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------

R = dict(iterations=7, batch=4, student_lr=0.01, head_lr=0.02, lr_warmup=3, lr_decay="cosine")


def lines(run):
    """The log without the clock."""
    return [{k: v for k, v in json.loads(l).items() if k != "seconds"} for l in (run / "metrics.jsonl").read_text().splitlines()]


def train(run, world=None, r=None, **changes):
    (run / "samples").mkdir(parents=True, exist_ok=True)
    return ladd.train(world or tiny.World(), r or tiny.recipe(**R), run, tiny.options(**changes), CPU)


@pytest.fixture
def few_pairs(monkeypatch):
    """A quick look at the diversity, where another thing is tested."""
    monkeypatch.setattr(ladd, "sample_diversity", functools.partial(ladd.sample_diversity, pairs=8))


class Killed(Exception):
    pass


def ends_at(world, iteration, how):
    """The world's reader, which ends the run while iteration (from 0) is being computed."""
    read = world.read

    def deadly(start, count):
        if start // R["batch"] == iteration and count == R["batch"] // ladd.ranks():
            how()
        return read(start, count)
    world.read = deadly
    return world


def crash():
    raise Killed


@pytest.mark.parametrize("killed_in", [1, 3, 4, 6])
def test_killed_and_resumed_equals_never_killed(tmp_path, killed_in):
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", ends_at(tiny.World(), killed_in, crash))
    world = tiny.World()
    again = train(tmp_path / "killed", world, resume=True)
    assert tiny.same(tiny.everything(whole), tiny.everything(again))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole") and [l["iteration"] for l in lines(tmp_path / "whole")] == list(range(1, 8))
    reads = [start for start, count in world.reads if count == 4]
    assert reads == [4 * i for i in range(killed_in - killed_in % 2, 7)]        # from the last checkpoint, every second iteration


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_iteration_with_a_checkpoint(tmp_path, which):
    before = signal.getsignal(which)
    with pytest.raises(ladd.Stopped, match="after iteration 4, saved.*--resume --name stopped"):
        train(tmp_path / "stopped", ends_at(tiny.World(), 3, lambda: os.kill(os.getpid(), which)), checkpoint_every=100)
    assert signal.getsignal(which) is before
    assert ladd.newest_checkpoint(tmp_path / "stopped").name == "step-0000004"
    again, whole = train(tmp_path / "stopped", resume=True, checkpoint_every=100), train(tmp_path / "whole", checkpoint_every=100)
    assert tiny.same(tiny.everything(whole), tiny.everything(again)) and lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_resume_passes_over_a_cut_off_checkpoint(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", ends_at(tiny.World(), 5, crash))
    cut(tmp_path / "killed" / "checkpoints" / "step-0000004")
    assert tiny.same(tiny.everything(whole), tiny.everything(train(tmp_path / "killed", resume=True)))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_resume_without_a_checkpoint_starts_afresh(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", ends_at(tiny.World(), 1, crash))
    assert ladd.newest_checkpoint(tmp_path / "killed") is None
    assert tiny.same(tiny.everything(whole), tiny.everything(train(tmp_path / "killed", resume=True)))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.mark.parametrize("changes", [dict(evaluate_every=1), dict(checkpoint_every=1), dict(log_every=3), dict(evaluate_every=2, checkpoint_every=3)],
                         ids=str)
def test_judging_logging_and_checkpoints_do_not_change_the_run(tmp_path, few_pairs, changes):
    assert tiny.same(tiny.everything(train(tmp_path / "a", checkpoint_every=100)), tiny.everything(train(tmp_path / "b", **{"checkpoint_every": 100, **changes})))


def test_judged_points_come_when_asked(tmp_path, few_pairs):
    world = tiny.World()
    train(tmp_path / "a", world, evaluate_every=2)
    assert [p.name for p in world.watched] == ["0000002.png", "0000004.png", "0000006.png"]
    assert [l["iteration"] for l in lines(tmp_path / "a") if "spread" in l] == [2, 4, 6]


class Known(nn.Module):
    """A velocity that lands on the world's own samples, moved by `f`; the condition names the sample."""

    def __init__(self, world, f=lambda x: x):
        super().__init__()
        self.world, self.f = world, f

    def forward(self, x, t, cond):
        x0 = self.f(self.world.x0[(cond[:, 0] * tiny.N).round().long()])
        return (x - x0) / t[:, None, None, None]


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_sample_diversity_is_one_for_the_real_samples_and_falls_as_they_grow_alike(world, sampler):
    r, world.x0 = tiny.recipe(sampler=sampler), 3 * world.x0
    got = [ladd.sample_diversity(world, Known(world, f), r, CPU, pairs=64) for f in (lambda x: x, lambda x: 0.7 * x, lambda x: 0 * x)]
    assert got[0] == pytest.approx(1, abs=1e-4) and 0.95 > got[1] > got[2]
    assert ladd.sample_diversity(world, Known(world, lambda x: 0 * x), r, CPU, pairs=64) == got[2]


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_the_students_sampler_makes_its_steps_and_repeats(world, sampler):
    r, v = tiny.recipe(sampler=sampler), Recorder(world.teacher)
    noise, cond = world.noise[:3], world.cond[:3]
    for steps, times in ((1, [1]), (2, [1, 0.5]), (4, [1, 0.75, 0.5, 0.25])):
        v.calls.clear()
        out = ladd.student_sampler(r, steps)(v, noise, cond)
        assert v.times() == times and torch.equal(out, ladd.student_sampler(r, steps)(world.teacher, noise, cond))
    euler = ladd.sample_euler(world.teacher, noise, times, cond)
    assert torch.equal(out, euler) == (sampler == "euler")


def test_collapse_is_called_out_and_ends_the_run_when_asked(tmp_path, few_pairs, capsys):
    world = tiny.World()
    world.signs = lambda point: ["all alike"] if point["spread"] < 1e9 else []
    train(tmp_path / "a", world, evaluate_every=3)
    assert [l["collapsed"] for l in lines(tmp_path / "a") if "spread" in l] == [1, 1]
    assert "iteration 3: collapse? all alike" in "".join(capsys.readouterr())
    train(tmp_path / "b", evaluate_every=3, stop_on_collapse=True)          # nothing to call out
    assert [l["collapsed"] for l in lines(tmp_path / "b") if "spread" in l] == [0, 0]
    with pytest.raises(UserError, match="collapse after iteration 3, saved in"):
        train(tmp_path / "c", evaluate_every=3, least_diversity=1e9, stop_on_collapse=True)
    assert ladd.newest_checkpoint(tmp_path / "c").name == "step-0000003"


class Gate(nn.Module):
    """A student that starts as the perfect velocity (`Known`) and can learn one thing: to move all of its guesses to one picture."""

    def __init__(self, world):
        super().__init__()
        self.gate, self.known = nn.Parameter(torch.zeros(1)), [Known(world)]

    def forward(self, x, t, cond):
        own = ladd.velocity_to_x0(x, self.known[0](x, t, cond), t)
        return ladd.x0_to_velocity(x, torch.lerp(own, self.known[0].world.x0[:1], self.gate), t)


def gated(collapses):
    """A world with that student, in whose game, if asked, nothing counts but that the guesses are alike."""
    def all_alike(p, state):
        return p.x0_hat.var(0).mean()
    world = tiny.World()
    world.x0 = 10 * world.x0                                # the samples, not their conditions, make the features differ
    world.make_student = lambda: Gate(world)
    world.extra = ladd.Terms(add_student=(all_alike,) if collapses else ())
    return world


def test_a_student_that_really_collapses_sets_off_the_alarm(tmp_path, capsys):
    r = tiny.recipe(iterations=10, student_lr=0.15, head_lr=0.2, adv_weight=0.0, ema_half_life=0.0)
    options = dict(evaluate_every=3, checkpoint_every=3, least_diversity=0.8)
    judged = lambda name: {l["iteration"]: l["sample_diversity"] for l in lines(tmp_path / name) if "sample_diversity" in l}
    train(tmp_path / "sound", gated(False), r, **options, stop_on_collapse=True)
    assert "collapse?" not in "".join(capsys.readouterr()) and judged("sound") == pytest.approx(dict.fromkeys((3, 6, 9), 1), abs=1e-3)
    train(tmp_path / "warned", gated(True), r, **options)
    seen, said = judged("warned"), "".join(capsys.readouterr())
    assert seen[3] > 0.8 > seen[6] > seen[9] < 0.5 and "iteration 3: c" not in said and "iteration 6: collapse? sample_diversity 0." in said
    with pytest.raises(UserError, match="stopped on collapse after iteration 6, saved in .*checkpoints"):
        train(tmp_path / "stopped", gated(True), r, **options, stop_on_collapse=True)
    assert [l["collapsed"] for l in lines(tmp_path / "stopped") if "collapsed" in l] == [0, 1]


def test_ranks_judge_diversity_from_noise_of_their_own_and_by_micro_batches(world, monkeypatch):
    r, starts = tiny.recipe(batch=16), {}
    monkeypatch.setattr(ladd, "ranks", lambda: 2)
    monkeypatch.setattr(ladd, "mean_over_ranks_", lambda tensors: None)
    for rank, micro_batch in ((0, None), (1, None), (1, 3)):
        monkeypatch.setattr(ladd, "rank", lambda: rank)
        seen = starts[rank, micro_batch] = []
        student = lambda x, t, cond: (seen.append(x[t == 1]), torch.zeros_like(x))[1]
        ladd.sample_diversity(world, student, r, CPU, micro_batch, pairs=8)
    alone, other, parts = (torch.cat([x for x in starts[key] if len(x)]) for key in starts)
    assert alone.shape == other.shape == (8, *tiny.SHAPE) and not torch.isclose(alone, other).any()
    assert torch.equal(other, parts) and [len(x) for x in starts[1, 3] if len(x)] == [3, 3, 2]


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batches_judge_the_same_diversity(world, micro_batch):
    world.x0 = 3 * world.x0
    r, student = tiny.recipe(batch=16), Known(world, lambda x: 0.5 * x)
    whole = ladd.sample_diversity(world, student, r, CPU, pairs=16)
    assert 0.2 < whole < 0.9 and ladd.sample_diversity(world, student, r, CPU, micro_batch, pairs=16) == pytest.approx(whole, rel=1e-4)


def test_a_batch_of_one_has_no_diversity_and_no_false_alarm(tmp_path):
    train(tmp_path, gated(False), tiny.recipe(iterations=4, batch=1), evaluate_every=2, least_diversity=0.8, stop_on_collapse=True)
    assert [l["collapsed"] for l in lines(tmp_path) if "spread" in l] == [0]
    assert not any("diversity" in k for l in lines(tmp_path) for k in l)


def test_a_run_that_diverges_names_its_last_checkpoint(tmp_path):
    world = tiny.World()
    world.extra = poison("heads", {4, 5, 6})
    with pytest.raises(UserError, match="iteration 6.*non-finite.*step-0000006"):
        train(tmp_path / "a", world)
    path = ladd.newest_checkpoint(tmp_path / "a")
    s = tiny.state(tiny.World(), tiny.recipe(**R))
    ladd.restore(s, path)
    assert s.skipped == 2 and all(v.isfinite().all() for v in tiny.everything(s).values())


def test_unlike_names_the_keys_that_differ():
    assert ladd.unlike({"a": 1, "b": [1, 2]}, {"a": 1, "b": (1, 2)}) == []              # as JSON, a tuple is a list
    assert ladd.unlike({"a": 1, "b": 2}, {"a": 3, "c": 4}) == ["a = 3 (was 1)", "b = None (was 2)", "c = 4 (was None)"]


def test_the_log_averages_each_window(tmp_path):
    train(tmp_path / "a", log_every=1), train(tmp_path / "b", log_every=3)
    single, grouped = lines(tmp_path / "a"), lines(tmp_path / "b")
    assert [l["iteration"] for l in grouped] == [3, 6, 7]
    for line, part in zip(grouped, (single[:3], single[3:6], single[6:])):
        for k in ("heads_loss", "student_loss"):            # the student's is missing at the first iteration
            values = [m[k] for m in part if k in m]
            assert line[k] == pytest.approx(sum(values) / len(values))


def test_trim_metrics_drops_later_and_half_written_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "seconds": 4.5}\n{"iteration": 2, "a": 0.5}\n{"iteration": 3, "seconds": 9}\n{"iterat')
    assert ladd.trim_metrics(tmp_path, 2) == 4.5
    assert path.read_text() == '{"iteration": 1, "seconds": 4.5}\n{"iteration": 2, "a": 0.5}\n'
    path.unlink()
    assert ladd.trim_metrics(tmp_path, 2) == 0
    assert path.read_text() == ""


def test_trim_metrics_drops_what_is_no_line_of_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n\x00\x00\xff\n3\n[]\n{"a": 1}\n{"iteration": "x"}\n\n{"iteration": 1.5, "b": NaN}\n')
    ladd.trim_metrics(tmp_path, 2)
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 1.5, "b": NaN}\n'


@pytest.mark.parametrize("damage", [b'{"score": ', b"[]", b'{"score": "low"}', b"{}", b"\xff\0"])
def test_a_run_whose_log_and_best_student_are_damaged_goes_on(tmp_path, few_pairs, damage):
    train(tmp_path / "whole", evaluate_every=3)
    with pytest.raises(Killed):
        train(tmp_path / "killed", ends_at(tiny.World(), 5, crash), evaluate_every=3)
    run = tmp_path / "killed"
    (run / "best.json").write_bytes(damage)
    with open(run / "metrics.jsonl", "ab") as log:
        log.write(damage + b"\n\0\xff\n{")
    train(run, resume=True, evaluate_every=3)
    without = lambda run: [{k: v for k, v in l.items() if k != "spread"} for l in lines(run)]       # this world's judge draws as it likes
    assert without(run) == without(tmp_path / "whole") and json.loads((run / "best.json").read_text())["iteration"] == 6
    ladd.load_weights(run / "best.safetensors", "tiny student")


def test_the_clock_goes_on_over_a_resume(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, ends_at(tiny.World(), 5, crash))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({**json.loads(l), "seconds": 1000.0 + k}) + "\n" for k, l in enumerate(path.read_text().splitlines())))
    train(tmp_path, resume=True)
    seconds = [json.loads(l)["seconds"] for l in path.read_text().splitlines()]
    assert seconds[:4] == [1000, 1001, 1002, 1003] and sorted(seconds) == seconds and 1003 < seconds[4] < 1100


# ---------------------------------------------------------------------------------------------------------------------
# --compile: with a backend that traces forward and backward but writes no code, which would take longer than all other tests
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def traced(monkeypatch):
    """The graphs that torch.compile has made so far."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def test_a_compiled_run_is_the_same_run_and_resumes(tmp_path, few_pairs, traced):
    plain = train(tmp_path / "plain", evaluate_every=3)
    assert not traced
    world = tiny.World()
    whole = train(tmp_path / "whole", world, evaluate_every=3, compile=True)
    assert traced and whole.student._compiled_call_impl and not world.teacher._compiled_call_impl
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "plain"), strict=True):     # losses, and the judged average
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(tiny.weights(whole.student), tiny.weights(plain.student), rtol=0, atol=1e-4)
    assert tiny.everything(whole).keys() == tiny.everything(plain).keys()
    with pytest.raises(Killed):
        train(tmp_path / "killed", ends_at(tiny.World(), 5, crash), compile=True)
    again = train(tmp_path / "killed", compile=True, resume=True)
    assert tiny.same(tiny.everything(whole), tiny.everything(again))
    assert lines(tmp_path / "killed") == [l for l in lines(tmp_path / "whole") if "spread" not in l]
    other = tiny.state(tiny.World(5), tiny.recipe(**R))     # and what it has saved is no compiled module's: any run can load it
    assert ladd.restore(other, ladd.newest_checkpoint(tmp_path / "killed")) == 7 and tiny.same(tiny.everything(whole), tiny.everything(other))
    assert not any("_orig_mod" in k for k in [*ladd.snapshot(again, 7)["student"], *again.student.state_dict()])


@pytest.mark.parametrize("early_exit", [True, False])
def test_taps_see_features_of_compiled_blocks(world, traced, early_exit):
    inputs, names, world.early_exit = (torch.tensor([0.2, 0.5, 0.9]), world.cond[:3]), ("first", "second"), early_exit
    want = ladd.features(world, world.x0[:3], *inputs, names)
    for block in (world.teacher.first, world.teacher.second, world.teacher.third):
        block.compile(fullgraph=not early_exit)             # an early end, by an exception, breaks the graph
    with torch.no_grad():
        world.teacher(world.x0[:3], *inputs)                # compiled before any hook is there
    for _ in range(2):
        x = world.x0[:3].clone().requires_grad_()
        maps = ladd.features(world, x, *inputs, names)
        for a, b in zip(maps, want):
            torch.testing.assert_close(a, b)
        assert float(torch.autograd.grad(maps[1].square().sum(), x)[0].abs().max()) > 0
    assert traced and hooks(world.teacher) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks, each with its half of every joint batch
# ---------------------------------------------------------------------------------------------------------------------

def as_rank(rank, ranks, folder, work):
    """One process of `ranks`; a rank that waits in vain fails after a while."""
    torch.set_num_threads(1)
    torch.cpu.get_capabilities = dict                       # no bfloat16, which rounds by the size of a batch
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60))
    try:
        torch.save(work(rank, folder), folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def ended(run, world, r=None, **changes):
    """Train; how it ended, in words."""
    try:
        train(run, world, r, **changes)
    except UserError as error:
        return str(error)
    return "well"


def at_rank_1(terms):
    return terms if ladd.rank() == 1 else ladd.Terms()


def two_ranks_work(rank, folder):
    """All that two ranks are asked, in one start of them: what they are given, a whole run, and four runs that must end on both."""
    found, r = {}, tiny.recipe(student_lr=0.01, head_lr=0.02, batch=8)
    given, world = [], tiny.World()
    s = tiny.state(world, r)
    terms = ladd.Terms(add_heads=(lambda p, state: given.append((p.key, p.cond, p.eps, p.eps_hat, p.t_hat)) or 0.0 * p.x0.sum(),))
    found["metrics"] = tiny.run_steps(s, world, r, range(3), terms, micro_batch=2)
    found |= {"given": given, "weights": tiny.weights(s.student), "heads": tiny.weights(s.heads)}

    world = tiny.World()
    world.extra = at_rank_1(poison("heads", {2}))
    s = tiny.state(world, r)
    found["skipped"] = [m["skipped"] for m in tiny.run_steps(s, world, r, range(5))]
    found["finite"] = all(v.isfinite().all() for v in tiny.everything(s).values())

    train(folder / "whole")
    world = tiny.World()
    world.extra = at_rank_1(poison("heads", {4, 5, 6}))
    found["diverged"] = ended(folder / "diverged", world)
    world = tiny.World()
    world.signs = lambda point: ["all alike"] * rank
    found["collapsed"] = ended(folder / "collapsed", world, evaluate_every=3, stop_on_collapse=True)
    stop = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 1 else (lambda: None)
    found["stopped"] = ended(folder / "stopped", ends_at(tiny.World(), 3, stop), checkpoint_every=100)

    world = tiny.World()                                    # a batch of one a rank
    world.x0 = 3 * world.x0
    found["diversity"] = [ladd.sample_diversity(world, Known(world, f), tiny.recipe(batch=2), CPU, pairs=16) for f in (lambda x: x, lambda x: 0 * x)]
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(as_rank, (2, folder, two_ranks_work), 2)
    return folder, [torch.load(folder / f"rank-{k}.pt", weights_only=False) for k in (0, 1)]


def test_two_ranks_are_given_the_halves_of_each_joint_batch(two_ranks):
    r, world = tiny.recipe(batch=8), tiny.World()
    for i in range(3):
        joint, cond = ladd.draw(r, i, tiny.SHAPE), world.read(8 * i, 8)[1]
        parts = [part for found in two_ranks[1] for part in found["given"][2 * i:2 * i + 2]]
        assert [part[0] for part in parts] == [(0, i, place) for place in (0, 2, 4, 6)]
        for k, want in enumerate((cond, joint["eps"], joint["eps_hat"], joint["t_hat"]), 1):
            assert torch.equal(torch.cat([part[k] for part in parts]), want)
        assert not torch.equal(parts[0][2], parts[2][2])    # no noise twice


def test_two_ranks_make_the_steps_of_one(two_ranks, plain):
    r, world = tiny.recipe(student_lr=0.01, head_lr=0.02, batch=8), tiny.World()
    s = tiny.state(world, r)
    alone = tiny.run_steps(s, world, r, range(3))
    a, b = two_ranks[1]
    assert torch.equal(a["weights"], b["weights"]) and torch.equal(a["heads"], b["heads"])
    assert a["metrics"][2]["heads_loss"] != b["metrics"][2]["heads_loss"]
    for i, one in enumerate(alone):
        for k in ("heads_loss", "student_loss") if i else ("heads_loss",):
            assert (a["metrics"][i][k] + b["metrics"][i][k]) / 2 == pytest.approx(one[k], abs=1e-4)
        assert a["metrics"][i]["heads_grad_norm"] == b["metrics"][i]["heads_grad_norm"] == pytest.approx(one["heads_grad_norm"], rel=1e-3)


def test_trouble_on_one_rank_is_trouble_on_both(two_ranks):
    folder, found = two_ranks
    for f in found:
        assert f["skipped"] == [0, 0, 1, 0, 0] and f["finite"]
        assert "iteration 6: the third non-finite" in f["diverged"] and f["diverged"].endswith("step-0000006")
        assert "stopped on collapse after iteration 3, saved in" in f["collapsed"]
        assert "stopped after iteration 4, saved" in f["stopped"]
    assert ladd.newest_checkpoint(folder / "stopped").name == "step-0000004"
    assert ladd.newest_checkpoint(folder / "collapsed").name == "step-0000003"


def test_what_two_ranks_have_saved_is_whole_and_one_can_load_it(two_ranks):
    path = ladd.newest_checkpoint(two_ranks[0] / "whole")
    listed = json.loads((path / "complete.json").read_text())
    assert path.name == "step-0000007" and listed.keys() == {f.name for f in path.iterdir()} - {"complete.json"} and len(listed) > 1
    s = tiny.state(tiny.World(5), tiny.recipe(**R))
    assert ladd.restore(s, path) == 7 and s.student_opt.state and not torch.equal(tiny.weights(s.student), tiny.weights(tiny.World().teacher))


def test_diversity_with_one_sample_a_rank(two_ranks):
    for f in two_ranks[1]:
        healthy, dead = f["diversity"]
        assert healthy == pytest.approx(1, abs=1e-4) and 0 < dead < 0.8


# ---------------------------------------------------------------------------------------------------------------------
# The command line, as far as it needs no world
# ---------------------------------------------------------------------------------------------------------------------

def test_no_arguments_print_the_help_and_return_2(capsys):
    assert ladd.main([]) == 2
    out = capsys.readouterr().out
    assert "--toy" in out and "--resume" in out and all("--" + f.name.replace("_", "-") in out for f in dataclasses.fields(Recipe))


@pytest.mark.parametrize("argv", [["--nonsense"], ["--name", "x"], ["--steps", "two"], ["--log", "paper"], ["--tim", "1"], ["stray"]], ids=str)
def test_bad_arguments_are_one_line_and_2(capsys, argv):
    assert ladd.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("ladd: ") and said.err.count("\n") == 1 and said.out == ""


def fake_module():
    reference = tiny.recipe(batch=8)
    return types.SimpleNamespace(REFERENCE=reference, RECIPES={"other": tiny.recipe(batch=32), "tiny": reference}, add_arguments=lambda group: None)


def resolve(*argv):
    module = fake_module()
    return ladd.resolve_recipe(module, ladd.parser_for(module).parse_args(list(argv)))


def test_recipe_by_name_file_and_field(tmp_path):
    assert resolve() == tiny.recipe(batch=8) and resolve("--recipe", "other") == tiny.recipe(batch=32)
    assert resolve("--recipe", "other", "--seed", "4", "--share-noise", "false") == tiny.recipe(batch=32, seed=4, share_noise=False)
    path = tmp_path / "config.json"
    ladd.write_json(path, {"recipe": dataclasses.asdict(tiny.recipe(batch=5, times=(1.0, 0.7, 0.5, 0.25)))})
    assert resolve("--recipe", str(path), "--seed", "1") == tiny.recipe(batch=5, times=(1.0, 0.7, 0.5, 0.25), seed=1)
    ladd.write_json(path, {"recipe": {"batch": 5, "taps": ["a"]}})      # by an older version, which had fewer fields
    assert resolve("--recipe", str(path)) == Recipe(batch=5, taps=("a",))
    assert resolve("--times", "1,0.5", "--time-probs", "1,0", "--warmup-probs", "0,1").times == (1.0, 0.5)


@pytest.mark.parametrize("name, text, want", [
    ("batch", "12", 12), ("seed", " 7", 7), ("student_lr", "5e-6", 5e-6), ("student_lr", "1", 1.0), ("student_lr", ".001", 0.001), ("student_lr", "1.", 1.0),
    ("share_noise", "false", False), ("share_noise", "true", True), ("share_noise", "False", False), ("lr_decay", "linear", "linear"),
    ("times", "1, 0.7, .5,0.25", (1.0, 0.7, 0.5, 0.25)), ("taps", "a.b,c", ("a.b", "c")), ("taps", "3,true", ("3", "true")), ("taps", "a", ("a",)),
], ids=str)
def test_values_from_the_command_line(name, text, want):
    got = getattr(resolve("--" + name.replace("_", "-"), text), name)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize("name, text", [
    ("batch", "1.5"), ("batch", "many"), ("batch", ""), ("batch", "[4]"), ("batch", "null"), ("batch", "9" * 5000), ("batch", "true"), ("student_lr", "fast"),
    ("student_lr", "nan"), ("student_lr", "NaN"), ("student_lr", "1e999"), ("student_lr", "-Infinity"), ("student_lr", "1" + "0" * 400), ("share_noise", "1"),
    ("share_noise", ""), ("times", "1,half"), ("times", ""), ("time_probs", "1;0"), ("time_probs", "0.7,0.1,0.1,NaN"), ("lr_decay", "fast"),
], ids=lambda v: v[:20])
def test_bad_values_from_the_command_line_name_the_option(name, text):
    with pytest.raises(UserError, match=name.replace("_", "[-_]")):
        resolve("--" + name.replace("_", "-"), text)


def json_values():
    """What of `bad_values` a JSON file can hold."""
    for name, value in bad_values():
        try:
            yield name, json.dumps(value)
        except (TypeError, ValueError):
            pass


def test_a_recipe_file_with_a_bad_value_is_refused_by_its_field(tmp_path):
    path = tmp_path / "config.json"
    for name, text in json_values():
        path.write_text(json.dumps({"recipe": {**dataclasses.asdict(tiny.recipe()), name: "HERE"}}).replace('"HERE"', text))
        with pytest.raises(UserError, match=name):
            ladd.resolve_recipe(fake_module(), types.SimpleNamespace(recipe=str(path)))


GOOD_CONFIG = json.dumps({"world": "tiny", "recipe": dataclasses.asdict(tiny.recipe())})
BAD_CONFIGS = {"empty": b"", "cut": b"{", "list": b"[]", "number": b"3", "null": b"null", "no recipe": b"{}", "recipe a number": b'{"recipe": 3}',
               "recipe a list": b'{"recipe": [1]}', "recipe a text": b'{"recipe": "toy"}', "recipe null": b'{"recipe": null}',
               "recipe a list of pairs": b'{"recipe": [["seed", 1]]}', "unknown field": b'{"recipe": {"sede": 1}}', "empty name": b'{"recipe": {"": 1}}',
               "not a JSON number": b'{"recipe": {"seed": 0x1}}', "long number": b'{"recipe": {"seed": ' + b"9" * 5000 + b"}}", "zeros": b"\0" * 100,
               "not UTF-8": b"\xff\xfe{}", "weights": b"\x08\0\0\0\0\0\0\0{}      ", "deep": b"[" * 100_000, "deep recipe": b'{"recipe":' * 50_000,
               "two": b"{}{}", **{f"cut at {k}": GOOD_CONFIG[:k].encode() for k in range(1, len(GOOD_CONFIG), 37)}}


@pytest.mark.parametrize("data", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_file_that_is_no_recipe_is_refused_by_its_name(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        resolve("--recipe", str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def mangled(data, count, seed=0):
    """`count` damaged copies of some bytes: bits flipped, a piece cut out, doubled or overwritten, by a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        a, b = sorted(rng.choices(range(len(data)), k=2))
        b = min(b, a + rng.choice((1, 2, 8, 10 ** 9)))
        flipped, noise = bytes(c ^ 1 << rng.randrange(8) for c in data[a:b]), rng.randbytes(b - a)
        yield data[:a] + rng.choice((flipped, noise, b"", data[a:b] * 2, b"9" * (b - a), b"[" * (b - a))) + data[b:]


def test_a_mangled_recipe_file_is_a_recipe_or_one_line(tmp_path):
    path, refused = tmp_path / "config.json", 0
    for data in mangled(GOOD_CONFIG.encode(), 500):
        path.write_bytes(data)
        try:
            assert isinstance(ladd.resolve_recipe(fake_module(), types.SimpleNamespace(recipe=str(path))), Recipe)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 250 < refused < 500                              # a digit may become another


@pytest.mark.parametrize("name", ["absent.json", ".", "", "x" * 300, "a/b/c"])
def test_a_recipe_that_is_no_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--recipe .*not a run's config.json .*none of other, tiny"):
        resolve("--recipe", name or str(tmp_path))


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:99", "cpu:x", "hpu", "privateuseone", "meta"])
def test_a_device_that_is_not_here_is_refused(name):
    if name.startswith("cuda") and torch.cuda.device_count() > 99:
        pytest.skip("a very large machine")
    with pytest.raises(UserError, match="--device"):
        ladd.pick_device(name)


def test_devices_that_are_here():
    assert ladd.pick_device("cpu") == CPU
    assert ladd.pick_device(None).type in ("cuda", "mps", "cpu")


def folder(out, **changes):
    return ladd.run_folder(types.SimpleNamespace(**{**dict(out=str(out), name=None, resume=False, sample=False), **changes}))


def test_runs_are_numbered(tmp_path):
    out = tmp_path / "new" / "runs"
    assert folder(out) == out / "001" and list(out.iterdir()) == []          # made, and no trace of the trial left
    for name in ("001", "007", "mine", "9x"):
        (out / name).mkdir()
    assert folder(out) == out / "008"
    assert folder(out, name="a run") == out / "a run" and not (out / "a run").exists()


def test_a_number_is_given_once_however_many_ask_at_once(tmp_path):
    for _ in range(5):
        run = folder(tmp_path)                              # all of them have been told the same number
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            claimed = list(pool.map(lambda _: ladd.claim(run, True), range(8)))
        assert len(set(claimed)) == 8 and min(claimed) == run
        for path in claimed:
            path.with_name(path.name + ".part").rename(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{k:03d}" for k in range(1, 41)]


def test_a_number_that_was_taken_meanwhile_is_passed_over(tmp_path):
    run = folder(tmp_path)
    run.mkdir(), (tmp_path / "002.part").mkdir()
    assert ladd.claim(run, True) == tmp_path / "003" and not (tmp_path / "001.part").exists()


def test_what_a_killed_start_has_left_is_replaced(tmp_path):
    (tmp_path / "mine.part" / "samples").mkdir(parents=True)
    assert ladd.claim(tmp_path / "mine", False) == tmp_path / "mine" and not list((tmp_path / "mine.part").iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/tmp/x", "cache", "x" * 300, "x.part", "two\nlines", "bell\a", "a\0b"])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="--name"):
        folder(tmp_path, name=name)


def test_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine.*exists"):
        folder(tmp_path, name="mine")


@pytest.mark.parametrize("how", ["resume", "sample"])
def test_resume_and_sample_need_a_run_that_is_there(tmp_path, how):
    (tmp_path / "empty").mkdir(), (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text("{}")
    assert folder(tmp_path, name="good", **{how: True}) == tmp_path / "good"
    for name in ("empty", "nowhere"):
        with pytest.raises(UserError, match=f"{name}: there is no such run"):
            folder(tmp_path, name=name, **{how: True})
    with pytest.raises(UserError, match="--name: say which run.*good"):
        folder(tmp_path, **{how: True})


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null/runs", "/proc/nowhere/runs", tmp_path / ("x" * 300), tmp_path / ("x/" * 3000)):
        with pytest.raises(UserError, match="--out.*can't be written"):
            folder(out)


@pytest.mark.parametrize("changes, micro_batch, word", [
    (dict(batch=1), 1, "batch"), (dict(batch=4), 1, "micro-batch"), (dict(head_lr=1e-4, student_lr=1e-4), 16, "head_lr"), (dict(head_lr=1e-5), 16, "head_lr"),
])
def test_known_ways_to_ruin_a_run_need_a_word(changes, micro_batch, word):
    r = tiny.recipe(**changes)
    with pytest.raises(UserError, match=word + ".*--i-know"):
        ladd.refuse_known_ruin(r, micro_batch, False)
    ladd.refuse_known_ruin(r, micro_batch, True)
    ladd.refuse_known_ruin(tiny.recipe(), 16, False), ladd.refuse_known_ruin(tiny.recipe(), 2, False)


@pytest.mark.parametrize("micro_batch", [3, 32, 0, -4])
def test_a_micro_batch_must_divide_the_batch(micro_batch):
    with pytest.raises(UserError, match="divides"):
        ladd.refuse_known_ruin(tiny.recipe(), micro_batch, True)


def test_real_samples_that_are_noise_are_refused(world):
    noise = torch.randn(64, *tiny.SHAPE, generator=ladd.generator("noise"))
    with pytest.raises(UserError, match="noise"):
        ladd.refuse_noise(noise, False)
    ladd.refuse_noise(noise, True)
    smooth = torch.randn(64, 4, 1, 1, generator=ladd.generator("smooth")).expand(64, *tiny.SHAPE)
    for x in (0.5 * noise, noise + 0.3, smooth, world.x0):
        ladd.refuse_noise(x, False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_real_samples_that_are_not_finite_are_refused(world, value):
    world.x0[3, 1, 2, 2] = value
    with pytest.raises(UserError, match="not finite"):
        ladd.refuse_noise(world.x0, True)


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"), ["No space left on device", "runs/a/metrics.jsonl"]),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), ["Permission denied", "runs/a"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."), ["out of memory", "--micro-batch"]),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), ["out of memory"]),
    (UserError("two\nlines"), ["two lines"]),
], ids=["disk", "permission", "GPU memory", "memory", "two lines"])
def test_a_full_disk_or_memory_is_one_line_and_2(monkeypatch, capsys, error, words):
    def fail(argv):
        raise error
    monkeypatch.setattr(ladd, "run_command", fail)
    assert ladd.main(["--toy"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ladd: ") and said.count("\n") == 1 and all(w in said for w in words)


def test_a_mistake_in_the_code_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(ladd, "run_command", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        ladd.main(["--toy"])
