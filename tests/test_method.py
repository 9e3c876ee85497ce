"""The method, on the made-up world of tiny.py: against closed forms and independent oracles."""

import copy
import dataclasses
import itertools
import math
import statistics
from unittest.mock import Mock

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import Spy, as4d, flat, normal
from torch import nn
from torch.testing import assert_close

import ladd
from ladd import Recipe, UserError


@pytest.fixture
def world():
    return tiny.World()


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- The independent iteration: losses and both gradients written out by hand


def own_sample(student, world, recipe, b, k):
    """Sample k alone: the student's input, and the target of its guess, or None."""
    one = slice(k, k + 1)
    t, eps = float(b.t[k]), b.eps[one]

    def move(velocity, x, start, end):
        with torch.no_grad():
            return x + (end - start) * velocity(x, torch.tensor([start]), b.cond[one])

    x_t = (1 - t) * b.x0[one] + t * eps
    if recipe.backward_simulation:
        x_t = eps
        for start, end in itertools.pairwise(recipe.times):
            x_t = move(student, x_t, start, end) if start > t else x_t
    if b.paired[k] or t < 1 and not recipe.backward_simulation:
        return x_t, b.x0[one]
    if t < 1 or not recipe.distill_own:
        return x_t, None  # this input says nothing of x0
    end = x_t
    for start, stop in itertools.pairwise([*recipe.times, 0.0]):
        end = move(student, end, start, stop)
    return x_t, end


def own_iteration(student, heads, stepped, world, recipe, b):
    """Losses and gradients: of the heads as they stand when the iteration begins, of the student
    against the heads as their step has left them."""
    samples = [own_sample(student, world, recipe, b, k) for k in range(len(b.x0))]
    x_t = torch.cat([x for x, _ in samples])
    x0_hat = x_t - as4d(b.t) * student(x_t, b.t, b.cond)

    def maps_of(x0, t, eps, cond=b.cond):
        x = (1 - as4d(t)) * x0 + as4d(t) * eps
        embedding = torch.cat([t[:, None], cond], 1)
        first = world.teacher.first(x, embedding)
        return [first, world.teacher.second(torch.tanh(first), embedding)]

    def judge(maps, t, cond=b.cond, by=heads):
        return by(maps, t, 2 * cond - 1, b.t)

    sides = {"real": (b.real, b.t_real, b.eps_real), "fake": (x0_hat, b.t_hat, b.eps_hat)}
    maps = {side: maps_of(x0, t, eps) for side, (x0, t, eps) in sides.items()}
    logits = {side: judge(maps[side], sides[side][1]) for side in sides}
    real, fake = logits["real"], logits["fake"]

    def mean(loss, *parts):  # over the two heads
        return sum(loss(*k).mean() for k in zip(*parts, strict=True)) / 2

    losses = {"heads_loss": mean(lambda r, f: (1 - r).relu() + (1 + f).relu(), real, fake)}
    losses["student_loss"] = -mean(lambda f: f, judge(maps["fake"], b.t_hat, by=stepped))
    heads_total = losses["heads_loss"]
    student_total = recipe.adv_weight * losses["student_loss"]
    if recipe.penalty_weight:
        losses["penalty"] = 0
        for side in sides:
            key = (recipe.seed, b.iteration, "penalty", side)
            near = []
            for k, (m, head) in enumerate(zip(maps[side], heads.heads, strict=True)):
                noise = ladd.keyed_noise(b.index, m.shape[1:], *key, k)
                near.append(m + noise * recipe.penalty_std * head.std)
            near = judge(near, sides[side][1])
            losses["penalty"] += mean(lambda p, q: (p - q).square(), near, logits[side])
        heads_total = heads_total + recipe.penalty_weight * losses["penalty"]
    if recipe.misaligned_weight:
        pairs = torch.arange(len(b.cond)).reshape(-1, 2).flip(1).flatten()  # 1, 0, 3, 2, ...
        wrong = judge(maps_of(b.real, b.t_real, b.eps_real, b.cond[pairs]), b.t_real, b.cond[pairs])
        differs = as4d((b.cond[pairs] != b.cond).any(1))[:, 0]
        losses["misaligned_loss"] = mean(lambda q, r: (q - r).exp().log1p() * differs, wrong, real)
        heads_total = heads_total + recipe.misaligned_weight * losses["misaligned_loss"]
    if recipe.anchor_weight:
        v, v_teacher = (m(x_t, b.t, b.cond) for m in (student, world.teacher))
        errors = (v - v_teacher).square().mean((1, 2, 3))
        losses["anchor_loss"] = sum((1 - b.t) * errors) / len(errors)
        student_total = student_total + recipe.anchor_weight * losses["anchor_loss"]
    if recipe.distill_weight:
        known = [(k, target[0]) for k, (_, target) in enumerate(samples) if target is not None]
        power = recipe.distill_power
        errors = [(x0_hat[k] - x).square().mean() / b.t[k] ** power for k, x in known]
        losses["distill_loss"] = sum(errors) / len(samples)
        student_total = student_total + recipe.distill_weight * losses["distill_loss"]
    heads_grads = torch.autograd.grad(heads_total, list(heads.parameters()), retain_graph=True)
    student_grads = torch.autograd.grad(student_total, list(student.parameters()))
    return losses, {"heads": heads_grads, "student": student_grads}


TOY = {**ladd.GAME, **ladd.TARGETS}
RECIPES = {
    "paper": {"share_noise": False},
    "hinge": {"heads_see_t": True, "gen_every": 2},
    "penalty": {"penalty_weight": 5.0, "share_noise": False, "paired_share": 0.5},
    "misaligned": {"misaligned_weight": 0.5, "share_noise": False},
    "anchor": {"anchor_weight": 2.0},
    "distill": {"paired_share": 0.25, "distill_weight": 2.0},
    "simulation": {"backward_simulation": True, "paired_share": 0.5, "distill_weight": 1.0},
    "ladd": ladd.GAME,
    "toy": TOY,
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_the_iteration_against_an_independent_one(world, changes, bf16):
    recipe = tiny.make_recipe(batch=8, clip=1e9, head_lr=0.05, student_lr=0.01, **changes)
    world.real = world.x0 + 0.1  # not the samples that the student's input is made from
    world.cond = world.cond.round()  # some neighbours have the same
    state = ladd.State(world, recipe, tiny.CPU, torch.bfloat16 if bf16 else torch.float32)
    spy, seen = Spy(), tiny.record_grads(state)
    for i in range(1, 4):
        networks = copy.deepcopy(state.student), copy.deepcopy(state.heads)
        metrics = spy.step(state, world, recipe, i)
        stepped = copy.deepcopy(state.heads).requires_grad_(False)
        losses, grads = own_iteration(*networks, stepped, world, recipe, spy.batches[-1])
        turn = (i + 1) % recipe.gen_every == 0
        for part in ("heads", "student") if turn else ("heads",):
            got, want = flat(seen[part].pop()), flat(grads[part])
            norm, limit = float(want.norm()), 0.05 if bf16 else 1e-5
            assert float((got - want).norm()) < limit * norm
            assert metrics[f"{part}_grad_norm"] == pytest.approx(norm, rel=limit)
        for name, loss in losses.items():
            if turn or name in ("heads_loss", "penalty", "misaligned_loss"):
                exact = not bf16 or name in ("distill_loss", "anchor_loss")  # of no logits
                limit = 1e-5 if exact else 0.05 if name == "penalty" else 1e-3
                assert metrics[name] == pytest.approx(loss.item(), rel=limit, abs=limit), name


# ---- Flow maths, guidance, samplers


def test_flow_formulas_by_hand():
    x0, eps, t = f64(2, 4)[:, None], f64(-2, 10)[:, None], f64(0.25, 0.5)
    x_t = ladd.interpolate(x0, eps, t)
    assert x_t.flatten().tolist() == [0.75 * 2 - 0.25 * 2, 0.5 * 4 + 0.5 * 10]
    assert ladd.velocity_to_x0(x_t, eps - x0, t).flatten().tolist() == [2, 4]
    assert torch.equal(ladd.interpolate(x0, eps, f64(0, 0)), x0)
    assert torch.equal(ladd.interpolate(x0, eps, f64(1, 1)), eps)
    for shape in ((), (1,), (2, 1)):  # one time per sample, or none broadcasts in silence
        with pytest.raises(ValueError):
            ladd.expand(torch.zeros(shape), x0)


def guide(w, t=0.5, **options):
    """Guided v = 100 t + x + cond: conditions 2, 4 against none = -1, on x = 10, 20."""
    v = tiny.Recorder(lambda x, t, cond: 100 * t[:, None] + x + cond)
    velocity = ladd.guided(v, lambda cond: torch.full_like(cond, -1), w, **options)
    out = velocity(f64(10, 20)[:, None], f64(t, t), f64(2, 4)[:, None])
    return out.flatten().tolist(), [len(x) for x, _, _ in v.calls]


def test_guidance_by_hand():
    assert guide(1) == ([62, 74], [2])  # none: one pass
    for w, want in ((0, [59, 69]), (3, [68, 84]), (-1, [56, 64])):
        assert guide(w) == (want, [2, 2])
    for t in (0.1, 0.2499, 0.25, 0.75, 0.7501, 1):  # out of its interval one pass
        out, sizes = guide(3, t, interval=(0.25, 0.75))
        assert out[0] == pytest.approx(100 * t + (18 if 0.25 <= t <= 0.75 else 12))
        assert sizes == ([2, 2] if 0.25 <= t <= 0.75 else [2])


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("first", [1.0, 0.75])
def test_samplers_land_on_x0_with_a_perfect_velocity(n, first):
    x0, noise, fresh = normal(n, 3, 3, 4, 8, 8, dtype=torch.float64)
    times = [first * (1 - k / 8) for k in range(n)]
    for renoise in (None, lambda k: fresh):
        v = tiny.Recorder(lambda x, t, cond: (x - cond) / as4d(t))
        got = ladd.sample_euler(v, noise, times, x0, renoise)
        assert_close(got, x0, rtol=0, atol=1e-12)
        assert v.times() == times  # exactly n evaluations, at the times asked for
        assert torch.equal(v.calls[0][0], first * noise)
        assert all(cond is x0 for _, _, cond in v.calls)


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.75, 0.5, 0.25], [0.9, 0.3], [80 / 81, 0.001]])
def test_euler_equals_the_flow_match_euler_scheduler(times, world):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=times)
    noise, cond = world.noise[:3], world.cond[:3]
    x = times[0] * noise
    for timestep in scheduler.timesteps:
        v = world.teacher(x, torch.full((3,), float(timestep) / 1000), cond)
        x = scheduler.step(v, timestep, x).prev_sample
    assert_close(ladd.sample_euler(world.teacher, noise, times, cond), x, rtol=0, atol=2e-6)


def test_renoising_by_hand():
    # v = x from noise 8: x0 = 0; at .5 x = .5 * 6, x0 = 1.5; at .25 x = .75 * 1.5 + .25 * 10.
    v = tiny.Recorder(lambda x, t, c: x)
    noises = {1: f64(6)[:, None], 2: f64(10)[:, None]}
    x0 = ladd.sample_euler(v, f64(8)[:, None], [1, 0.5, 0.25], None, noises.get)
    assert [float(x) for x, _, _ in v.calls] == [8, 3, 3.625] and float(x0) == 3.625 * 0.75


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_student_sampler_takes_its_steps_and_keys_each_samples_noise(world, sampler):
    recipe, student = tiny.make_recipe(sampler=sampler), world.make_student()
    noise, cond = world.noise[:3], world.cond[:3]
    for steps in (0, -1, 5):
        with pytest.raises(UserError, match=f"--steps {steps}"):
            ladd.step_times(recipe.times, steps)
    for steps, times in ((1, [1]), (2, [1, 0.5]), (3, [1, 0.75, 0.5]), (4, [1, 0.75, 0.5, 0.25])):
        v = tiny.Recorder(student)
        out = ladd.sample_student(v, recipe, noise, cond, steps)
        assert v.times() == times and not out.requires_grad
        assert torch.equal(out, ladd.sample_student(student, recipe, noise, cond, steps))
    euler = ladd.sample_euler(student, noise, times, cond)
    assert torch.equal(out, euler) == (sampler == "euler")
    v = tiny.Recorder(lambda x, t, cond: x / as4d(t))  # x0 = 0 leaves the noise to be seen
    ladd.sample_student(v, recipe, noise, cond, 4)
    pairs = itertools.combinations([x / as4d(t) for x, t, _ in v.calls], 2)
    assert {torch.allclose(a, b, atol=1e-3) for a, b in pairs} == {sampler == "euler"}
    # A sample is the same in whatever company it is made; another index is another noise.
    alone = ladd.sample_student(student, recipe, noise[2:], cond[2:], 4, torch.tensor([2]))
    assert_close(alone, out[2:], rtol=0, atol=1e-6)
    ladd.sample_student(v, recipe, noise, None, 1)
    assert v.calls[-1][2].shape == (3, 0)  # as the networks get it in training
    other = ladd.sample_student(student, recipe, noise[2:], cond[2:], 4, torch.tensor([7]))
    assert torch.equal(other, alone) == (sampler == "euler")


# ---- Taps


def make_chain():
    """x -> 2x -> 2x + 1 -> its square, by modules that count their calls."""
    net = nn.Sequential()
    works = (lambda x: 2 * x), (lambda x: x + 1), (lambda x: x * x)
    for name, work in zip(("twice", "plus", "square"), works, strict=True):
        net.add_module(name, nn.Identity())
        net[-1].forward = Mock(side_effect=work)
    return net


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize(
    "names, want, calls, slope",
    [
        (["twice"], [6], [1, 0, 0], 2),
        (["plus", "twice"], [7, 6], [1, 1, 0], 2),
        (["square", "twice", "plus"], [49, 6, 7], [1, 1, 1], 28),
    ],
)
def test_taps_come_in_the_order_asked(names, want, calls, slope, early_exit):
    net, x = make_chain(), torch.tensor(3.0, requires_grad=True)
    got = ladd.tapped(net, names, lambda: net(x), early_exit)
    assert [float(v.detach()) for v in got] == want and hooks(net) == 0
    counts = [step.forward.call_count for step in net]
    assert counts == (calls if early_exit else [1, 1, 1])  # no deeper than needed
    assert float(torch.autograd.grad(got[0], x)[0]) == slope


@pytest.mark.parametrize("early_exit", [True, False])
def test_the_first_output_of_a_tap_counts(early_exit):
    net, xs = make_chain(), (torch.tensor(3.0), torch.tensor(5.0))
    got = ladd.tapped(net, ["twice", "plus"], lambda: [net(x) for x in xs], early_exit)
    assert [float(v) for v in got] == [6, 7]


@pytest.mark.parametrize("name, x, error", [("square", "text", TypeError), ("cube", 3, UserError)])
def test_taps_are_removed_whatever_happens(name, x, error):
    net = make_chain()
    with pytest.raises(error, match="cube|int"):
        ladd.tapped(net, ["twice", name], lambda: net(x))
    assert hooks(net) == 0


# ---- Heads

CHANNELS, MAPS = (8, 6, 5, 16), ((16, 12), (8, 5), (3, 9), (1, 40))


def make_heads(see_t=False):
    torch.manual_seed(0)
    maps = [normal(k, 4, CHANNELS[k], *MAPS[k]) for k in range(4)]
    heads = ladd.Heads(maps, 3, 8, see_t)
    return heads, maps, torch.rand(4), torch.randn(4, 3), torch.rand(4)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("see_t", [False, True])
@torch.no_grad()
def test_heads_give_a_float32_logit_per_patch_by_all_that_they_are_told_alone(see_t, bf16):
    heads, maps, t_hat, cond, t = make_heads(see_t)
    heads.dtype = torch.bfloat16 if bf16 else torch.float32
    base = heads(maps, t_hat, cond, t)
    assert [tuple(k.shape) for k in base] == [(4, 8, 6), (4, 8, 5), (4, 2, 5), (4, 1, 20)]
    assert all(k.dtype == torch.float32 and k.flatten(1).std(1).min() > 0 for k in base)
    assert all(map(torch.equal, base, heads(maps, t_hat, cond, t / 2))) != see_t
    for told in ((t_hat / 2, cond), (t_hat, -cond)):
        assert not any(map(torch.equal, base, heads(maps, *told, t)))
    maps[2][1] += 1  # sample 1 of map 2: it moves that sample's logits by head 2 alone
    pairs = zip(base, heads(maps, t_hat, cond, t), strict=True)
    moved = torch.stack([(a != b).flatten(1).any(1) for a, b in pairs])
    assert moved.nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("channels", [1, 5, 16])
@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_heads_see_small_maps(channels, size):
    """A norm over groups of one value would take away all that the features say, silently."""
    torch.manual_seed(0)
    f = normal(5, 4, channels, *size)
    heads = ladd.Heads([f], 3, 8)
    f.requires_grad_()
    logits = heads([f], torch.full((4,), 0.5), torch.zeros(4, 3), torch.ones(4))[0]
    assert float(logits.detach().flatten(1).std(0).min()) > 1e-3
    assert float(torch.autograd.grad(logits.sum(), f)[0].abs().max()) > 1e-3


@torch.no_grad()
def test_heads_standardise_each_channel_by_constants():
    heads, maps, *told = make_heads()
    scale = [10.0 ** torch.arange(c).reshape(-1, 1, 1).fmod(4) for c in CHANNELS]
    large = [7 + 50 * s * m for m, s in zip(maps, scale, strict=True)]
    small = heads(maps, *told)
    torch.manual_seed(0)
    heads = ladd.Heads(large, 3, 8)  # of the same weights
    assert_close(heads(large, *told), small, rtol=0, atol=5e-3)
    assert not any(map(torch.equal, heads(maps, *told), small))  # they are constants


@torch.no_grad()
def test_a_state_standardises_its_heads(world):
    """On the maps of the joint batch's real samples, as the heads will see them."""
    recipe = tiny.make_recipe(batch=8)
    state = tiny.make_state(world, recipe)
    b = ladd.read_batch(world, recipe, 0, 0, 8, tiny.CPU)
    maps = world.features(ladd.interpolate(b.real, b.eps_real, b.t_real), b.t_real, b.cond)
    for head, m in zip(state.heads.heads, maps, strict=True):
        pixels = m.transpose(0, 1).flatten(1)
        assert_close(head.mean.flatten(), pixels.mean(1))
        assert_close(head.std.flatten(), pixels.std(1) + 1e-3)


def test_fourier_by_formula():
    got = ladd.fourier(torch.tensor([0.0, 0.3, 1.0]), 5)
    turns = [2 * math.pi * k for k in (0.25, 1, 4, 16, 64)]
    want = [[f(k * t) for f in (math.cos, math.sin) for k in turns] for t in (0.0, 0.3, 1.0)]
    assert_close(got, torch.tensor(want), rtol=0, atol=1e-4)


# ---- Recipe, reader, draws

BAD_FIELDS = [
    *[("batch", v) for v in ("many", 1.5, True, 0, None, math.nan)],
    *[("student_lr", v) for v in (-1e-4, math.inf, "fast")],
    *[("time_probs", v) for v in ((0.7, 0.3), (0.7, 0.1, 0.1, 0.2), (1.5, -0.5, 0.0, 0.0))],
    *[("times", v) for v in ((0.25, 1.0), (0.9, 0.5), (), (1.0, 1.0, 0.5), (1.0, 0.0))],
    *[("share_noise", 1), ("paired_share", 2), ("taps", ("a", 1)), ("sampler", "heun")],
]


@pytest.mark.parametrize("name, value", BAD_FIELDS, ids=str)
def test_recipe_refuses_a_bad_field_in_one_line_that_names_it(name, value):
    with pytest.raises(UserError, match=name) as error:
        tiny.make_recipe(**{name: value})
    assert "\n" not in str(error.value)


def test_recipe_defaults_are_the_papers_and_every_field_is_explained():
    r = Recipe()
    assert (r.times, r.time_probs) == ((1, 0.75, 0.5, 0.25), (0.7, 0.1, 0.1, 0.1))
    assert (r.warmup_probs, r.warmup) == ((0, 0, 0.5, 0.5), 500)
    assert (r.renoise_mean, r.renoise_std, r.loss, r.adv_weight) == (1, 1, "hinge", 1)
    off = (r.penalty_weight, r.misaligned_weight, r.anchor_weight, r.distill_weight)
    assert not any((*off, r.paired_share, r.backward_simulation))
    assert all(len(f.metadata["help"]) > 8 for f in dataclasses.fields(Recipe))


def test_recipe_from_a_file_and_its_diff(tmp_path):
    r = tiny.make_recipe(times=[1, 0.5], time_probs=[1, 0], warmup_probs=[0.5, 0.5], student_lr=1)
    assert type(r.times[0]) is type(r.student_lr) is float
    stored, file = dataclasses.asdict(r), tmp_path / "config.json"
    for values, want in ((stored, r), ({"batch": 5}, Recipe(batch=5))):  # whole, and an older one
        ladd.write_json(file, {"recipe": values})
        assert ladd.recipe_from(Recipe, file) == want
    for bad, word in (({"recipe": {**stored, "sede": 3}}, "'sede'"), ({"rows": []}, "'recipe'")):
        ladd.write_json(file, bad)
        with pytest.raises(UserError, match=f"config.json: .*{word}"):
            ladd.recipe_from(Recipe, file)
    other = dataclasses.replace(r, seed=3, times=(1.0, 0.4))
    assert ladd.diff(other, r) == {"seed": (0, 3), "times": (r.times, other.times)}


@pytest.mark.parametrize("n", [1, 7, 30])
def test_reader_gives_each_sample_once_an_epoch_from_any_position(n):
    index, epoch = ladd.reader_indices(n, 0, 5 * n, seed=3)
    assert epoch.tolist() == [e for e in range(5) for _ in range(n)]
    assert all(sorted(part) == list(range(n)) for part in index.reshape(5, n).tolist())
    for start, count in itertools.product(range(2 * n + 1), (1, 2 * n)):
        assert torch.equal(ladd.reader_indices(n, start, count, 3)[0], index[start:][:count])
    others = index[n : 2 * n], ladd.reader_indices(n, 0, n, seed=4)[0], torch.arange(n)
    assert n < 7 or not any(torch.equal(index[:n], other) for other in others)  # shuffled anew


def test_keyed_noise_is_each_samples_own():
    a = ladd.keyed_noise(torch.tensor([3, 5, 8]), (4, 2), "word", 1)
    assert a.shape == (3, 4, 2) and a.dtype == torch.float32
    assert torch.equal(ladd.keyed_noise(torch.tensor([8, 3]), (4, 2), "word", 1), a[[2, 0]])
    assert torch.equal(a[1], torch.randn(4, 2, generator=ladd.generator("word", 1, 5)))
    assert not (a == ladd.keyed_noise(torch.tensor([3, 5, 8]), (4, 2), "word", 2)).any()
    many = ladd.keyed_noise(torch.arange(200), (4, 8, 8), "many")
    assert abs(float(many.mean())) < 0.02 and float(many.std()) == pytest.approx(1, abs=0.02)
    assert abs(float((many[1:] * many[:-1]).mean())) < 0.02


def draws(recipe, iteration, index=None, shape=()):
    index = torch.arange(recipe.batch) if index is None else torch.tensor(index)
    return ladd.draw(recipe, iteration, index, shape)


def test_times_follow_their_probabilities_and_the_warmup_counts_iterations():
    r = tiny.make_recipe(batch=500, warmup=3, gen_every=3, time_probs=(0.5, 0.3, 0.2, 0.0))
    for i, probs in enumerate([r.warmup_probs] * 3 + [r.time_probs] * 3):
        t = draws(r, i)["t"].tolist()
        assert set(t) <= set(r.times)
        for time, p in zip(r.times, probs, strict=True):
            limit = 4 * math.sqrt(p * (1 - p) / 500)  # exactly 0 where p is 0 or 1
            assert abs(t.count(time) / 500 - p) <= limit


@pytest.mark.parametrize("m, s", [(1.0, 1.0), (-0.4, 1.7)])
def test_t_hat_is_log_normal_in_sigma(m, s):
    """By Kolmogorov's distance in units of 1 / sqrt(n): above 1.8 by chance 3 times in 1000."""
    d = draws(tiny.make_recipe(batch=3000, renoise_mean=m, renoise_std=s, share_noise=False), 0)
    laws = statistics.NormalDist(m, s), statistics.NormalDist(m + 0.15 * s, s)
    for t in (d["t_hat"].double(), d["t_real"].double()):
        ranked = list(enumerate(sorted((t / (1 - t)).log().tolist())))
        gaps = [max(abs(law.cdf(v) - (k + 0.5) / 3000) for k, v in ranked) for law in laws]
        assert gaps[0] < 1.8 / math.sqrt(3000) < gaps[1]


def test_draws_are_keyed_by_seed_iteration_and_place():
    r = tiny.make_recipe(batch=64, share_noise=False)
    first = draws(r, 7, shape=(4,))
    torch.manual_seed(123)  # the global generator has no say, nor have the other samples
    part = draws(r, 7, [5, 60, 9], (4,))
    assert all(torch.equal(part[k], first[k][[5, 60, 9]]) for k in first)
    noises = ("eps", "t_hat", "eps_hat", "t_real", "eps_real")
    others = [draws(r, 8, shape=(4,)), draws(dataclasses.replace(r, seed=1), 7, shape=(4,))]
    for other in [*others, {k: v.roll(1, 0) for k, v in first.items()}]:
        assert not any((first[k] == other[k]).any() for k in noises)
    for a, b in itertools.combinations(("eps", "eps_hat", "eps_real"), 2):
        assert not (first[a] == first[b]).any()
    assert not (first["t_hat"] == first["t_real"]).any()
    shared = draws(dataclasses.replace(r, share_noise=True), 7, shape=(4,))
    assert all(torch.equal(shared[f"{name}_real"], shared[f"{name}_hat"]) for name in ("t", "eps"))


@pytest.mark.parametrize("every", [0, 1, 2, 4])
def test_paired_samples_get_their_stored_noise_and_lie_evenly(world, every):
    recipe, spy = tiny.make_recipe(paired_share=1 / every if every else 0.0), Spy()
    spy.step(tiny.make_state(world, recipe), world, recipe, 0, micro_batch=4)
    joint, fresh = spy.joint(), draws(recipe, 0, shape=tiny.SHAPE)
    want = [every > 0 and (k + 1) % every == 0 for k in range(16)]
    assert joint["paired"].tolist() == want
    stored = (joint["eps"] == world.noise[tiny.rows(joint["cond"])]).flatten(1).all(1)
    assert torch.equal(stored, joint["paired"])
    assert torch.equal(joint["eps"][~stored], fresh["eps"][~stored])
    assert torch.equal(joint["eps_hat"], fresh["eps_hat"])  # the second noise stays a fresh one


# ---- The average, schedules, steps


@pytest.mark.parametrize("gen_every", [1, 2])
def test_a_step_updates_the_average_after_the_weights(world, gen_every):
    recipe = tiny.make_recipe(gen_every=gen_every, ema_half_life=40.0, ema_ramp=0.5)
    state = tiny.make_state(world, recipe)
    want = tiny.weights(state.student).double()
    for i in range(6):
        tiny.run_steps(state, world, recipe, [i])
        if i and (i + 1) % gen_every == 0:
            keep = 0.5 ** (gen_every * 16 / min(40, 0.5 * (i + 1) * 16))
            want = keep * want + (1 - keep) * tiny.weights(state.student).double()
        assert_close(flat(state.ema.mean).double(), want, rtol=0, atol=1e-6)
    raw, mean = tiny.weights(state.student), flat(state.ema.mean)
    with pytest.raises(KeyError), state.averaged() as student:
        assert torch.equal(tiny.weights(student), mean) and not torch.equal(raw, mean)
        raise KeyError  # whatever happens, they change back, bit for bit
    assert torch.equal(tiny.weights(state.student), raw) and torch.equal(flat(state.ema.mean), mean)


def test_without_a_half_life_the_last_weights_serve(world):
    state = tiny.make_state(world, tiny.make_recipe(ema_half_life=0.0))
    tiny.run_steps(state, world, world.recipe, range(3))
    last = tiny.weights(state.student)
    with state.averaged() as student:
        assert torch.equal(tiny.weights(student), last) and state.ema.mean == []
        assert not student.training
    assert state.student.training


HEADS_MOVE, STUDENT_MOVES = {"heads", "heads_opt"}, {"student", "student_opt", "ema"}


def step_and_see(state, world, recipe, i, losses=None):
    """The metrics of an iteration, and what of the state it has changed."""
    before = tiny.everything(state)
    (metrics,) = tiny.run_steps(state, world, recipe, [i], None, losses)
    after = tiny.everything(state)
    return metrics, {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}


@pytest.mark.parametrize("gen_every", [1, 2, 3, 7, 8])
def test_schedule_of_the_students_updates(world, gen_every):
    recipe = tiny.make_recipe(gen_every=gen_every, batch=4, ema_half_life=1e-3)
    state = tiny.make_state(world, recipe)
    for i in range(7):
        metrics, moved = step_and_see(state, world, recipe, i)
        turn = i > 0 and (i + 1) % gen_every == 0
        assert moved == HEADS_MOVE | (STUDENT_MOVES if turn else set())
        assert ("student_loss" in metrics) == ("student_grad_norm" in metrics) == turn


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("decay", ["none", "cosine", "both"])
def test_learning_rates_count_iterations(world, decay, every):
    fields = {"lr_warmup": 4, "lr_decay": decay, "iterations": 8, "gen_every": every}
    recipe = tiny.make_recipe(batch=4, **fields)
    state, rates = tiny.make_state(world, recipe), {"student": [], "heads": []}
    for name, seen in rates.items():
        opt = getattr(state, name + "_opt")
        opt.register_step_pre_hook(lambda o, *_, seen=seen: seen.append(o.param_groups[0]["lr"]))
    tiny.run_steps(state, world, recipe, range(8))
    rise = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    fall = [1 if decay == "none" else 0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(8)]
    heads = [r * f if decay == "both" else r for r, f in zip(rise, fall, strict=True)]
    assert rates["heads"] == pytest.approx([recipe.head_lr * x for x in heads])
    student = [recipe.student_lr * rise[i] * fall[i] for i in range(8)]
    assert rates["student"] == pytest.approx(student[1:] if every == 1 else student[2::3])


def own_adamw(w, gradients, lr, beta1, beta2):
    """AdamW (arXiv 1711.05101, algorithm 2, no decay) in float64, over some steps' gradients."""
    w, m, v = w.double(), 0.0, 0.0
    for k, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g.double()
        v = beta2 * v + (1 - beta2) * g.double() ** 2
        w = w - lr * (m / (1 - beta1**k)) / ((v / (1 - beta2**k)).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("lr, beta1", [(5e-6, 0.0), (5e-6, 0.9), (1e-2, 0.0)])
def test_tiny_steps_are_not_lost_to_rounding(world, lr, beta1):
    recipe = tiny.make_recipe(student_lr=lr, beta1=beta1)
    state = tiny.make_state(world, recipe)
    seen, before = tiny.record_grads(state)["student"], tiny.weights(state.student)
    tiny.run_steps(state, world, recipe, range(5))  # iteration 0 is the heads' alone
    want = own_adamw(before, [flat(step) for step in seen], lr, beta1, 0.99)
    assert_close(tiny.weights(state.student).double(), want, rtol=0, atol=3e-7)
    assert len(seen) == 4 and float((want - before).abs().median()) > lr


def test_each_network_is_clipped_by_its_own_norm(world):
    recipe = tiny.make_recipe(clip=5e-4)
    state = tiny.make_state(world, recipe)
    seen = tiny.record_grads(state)
    metrics = tiny.run_steps(state, world, recipe, [1])[0]
    for name in ("heads", "student"):
        assert float(flat(seen[name][0]).norm()) == pytest.approx(5e-4, rel=2e-3)
        assert metrics[f"{name}_grad_norm"] > 1e-3  # as it was before


@pytest.mark.parametrize("which", [0, 1], ids=["heads", "student"])
def test_a_gradient_that_is_not_finite_skips_its_step_and_three_end_the_run(world, which):
    recipe = tiny.make_recipe(batch=4)
    state, losses = tiny.make_state(world, recipe), tiny.not_finite({2, 3, 5, 6, 7}, which)
    for i in range(7):
        metrics, moved = step_and_see(state, world, recipe, i, losses)
        moves = HEADS_MOVE | (STUDENT_MOVES if i else set())
        if i in (2, 3, 5, 6):
            moves -= STUDENT_MOVES if which else HEADS_MOVE
        assert moves == moved and metrics["skipped"] == (i in (2, 3, 5, 6))
    tiny.run_steps(state, world, dataclasses.replace(recipe, gen_every=2), [8])  # the heads' alone
    with pytest.raises(UserError, match="iteration 8.*non-finite"):
        tiny.run_steps(state, world, recipe, [7], None, losses)
    assert not any(g is not None for g in tiny.grads(state.heads) + tiny.grads(state.student))


# ---- One iteration: what goes where


def test_a_run_starts_from_the_teacher_and_repeats_bit_for_bit(world):
    recipe, found = tiny.make_recipe(share_noise=False, penalty_weight=0.1, paired_share=0.5), []
    for seed in (0, 1):
        torch.manual_seed(seed)  # the global generator has no say
        before = torch.random.get_rng_state()
        state = tiny.make_state(world, recipe)
        assert torch.equal(tiny.weights(state.student), tiny.weights(world.teacher))
        assert all(p.requires_grad for p in state.student.parameters()) and state.student.training
        heads = tiny.weights(state.heads)
        tiny.run_steps(state, world, recipe, range(3))
        assert torch.equal(before, torch.random.get_rng_state())
        found.append(tiny.everything(state))
    assert tiny.same(*found)
    other = tiny.make_state(world, dataclasses.replace(recipe, seed=1))
    assert not torch.equal(heads, tiny.weights(other.heads))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_students_turn_leaves_the_heads_alone(world, weight):
    recipe = tiny.make_recipe(penalty_weight=weight, clip=1e9)
    state, before = tiny.make_state(world, recipe), []
    seen = tiny.record_grads(state)

    def student_loss(state, world, recipe, b, fake, x0_hat):
        assert not any(p.requires_grad for p in state.heads.parameters())
        assert all(m.requires_grad for m in fake)
        before.append(tiny.weights(state.heads))
        return ladd.student_loss(state, world, recipe, b, fake, x0_hat)

    ladd.train_step(state, world, recipe, 1, losses=(ladd.heads_loss, student_loss))
    assert torch.equal(before[0], tiny.weights(state.heads)) and len(seen["heads"]) == 1
    assert all(float(g.abs().max()) > 0 for g in seen["student"][0])
    assert all(p.requires_grad for p in state.heads.parameters())
    networks = state.heads, state.student, world.teacher
    assert all(g is None for m in networks for g in tiny.grads(m))  # none is left at the end


@pytest.mark.parametrize(
    "changes, student, teacher, both",
    [
        ({"share_noise": False, "penalty_weight": 0.5}, 1, 2, 2),
        ({"paired_share": 0.5, "distill_weight": 1.0}, 1, 2, 2),
        ({"backward_simulation": True}, 4, 2, 2),
        ({"misaligned_weight": 0.5}, 1, 3, 3),
        ({"anchor_weight": 1.0}, 1, 2, 3),
        ({"distill_weight": 1.0, "distill_own": True}, 1, 2, 2),
        (TOY, 4, 3, 4),
    ],
    ids=str,
)
def test_network_calls_per_iteration(world, changes, student, teacher, both):
    """3F, or 6F with gradients, and what terms add; as many whatever the draws: no rank waits.

    Of several micro-batches the student's turn repeats the guess and the teacher's look at it."""
    recipe = tiny.make_recipe(gen_every=2, batch=4, **changes)
    state, calls = tiny.make_state(world, recipe), []
    for name, module in (("teacher", world.teacher), ("student", state.student)):

        def record(module, inputs, name=name):
            calls.append((name, len(inputs[0]), torch.is_grad_enabled()))

        module.register_forward_pre_hook(record)
    for i in range(6):
        calls.clear()
        tiny.run_steps(state, world, recipe, [i])
        turn = i % 2 == 1
        names = [name for name, rows, _ in calls if rows > 0]
        own = 4 * turn * recipe.distill_own  # steps to a target
        assert names.count("student") == student + own
        assert names.count("teacher") == (both if turn else teacher)
        assert [c for c in calls if c[2]] == [("student", 4, True), ("teacher", 4, True)] * turn
        assert ("teacher", 4, False) in calls and ("student", 4, turn) in calls
        calls.clear()
        ladd.train_step(state, world, recipe, i, 2)
        names = [name for name, rows, _ in calls]
        assert names.count("student") == 2 * (student + turn + own)
        assert names.count("teacher") == 2 * (both + 1 if turn else teacher)


@pytest.mark.parametrize("micro_batch", [2, 8])
@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_micro_batches_add_up_before_a_single_step(world, micro_batch, changes):
    """The heads stand still: AdamW's first step, of the gradient's sign, enlarges rounding."""
    recipe, found = tiny.make_recipe(clip=1e9, head_lr=0.0, **changes), []
    for size in (None, micro_batch):
        state = tiny.make_state(world, recipe)
        seen = tiny.record_grads(state)
        metrics = tiny.run_steps(state, world, recipe, [1], size)[0]
        metrics.pop("diversity")  # of neighbours in a micro-batch
        assert len(seen["heads"]) == len(seen["student"]) == 1
        found.append((flat(seen["heads"][0]), flat(seen["student"][0]), metrics))
    for whole, parts in zip(found[0][:2], found[1][:2], strict=True):
        assert float((parts - whole).norm()) < 1e-5 * float(whole.norm())
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-5, abs=1e-6)


def test_samples_conditions_and_noises_stay_paired(world):
    recipe, used = tiny.make_recipe(paired_share=0.5, gen_every=2), []
    world.real = -world.x0
    state = tiny.make_state(world, recipe)
    for i in range(6):
        spy = Spy()
        spy.step(state, world, recipe, i, micro_batch=4)
        joint = spy.joint()
        index = tiny.rows(joint["cond"])  # the condition names the sample
        for name in ("x0", "real", "cond"):
            assert torch.equal(joint[name], getattr(world, name)[index])
        x_t = torch.lerp(joint["x0"], joint["eps"], as4d(joint["t"]))
        assert_close(joint["x_t"], x_t, rtol=0, atol=1e-6)
        assert joint["index"].tolist() == list(range(16)) and spy.batches[0].iteration == i
        used += index.tolist()
    assert used == ladd.reader_indices(tiny.N, 0, 96, 0)[0].tolist()


def test_losses_of_ones_own_replace_the_recipes(world):
    recipe = tiny.make_recipe(batch=8, clip=1e9)
    state = tiny.make_state(world, recipe)
    seen = tiny.record_grads(state)
    before = [tiny.weights(module) for module in (state.heads, state.student)]

    def decay(module):  # its gradient is the weights themselves
        value = sum(p.square().sum() for p in module.parameters()) / 2
        return value, {"own": value}

    losses = lambda state, *_: decay(state.heads), lambda state, *_: decay(state.student)
    (metrics,) = tiny.run_steps(state, world, recipe, [1], 4, losses)
    assert torch.equal(flat(seen["heads"][0]), before[0])
    assert torch.equal(flat(seen["student"][0]), before[1])
    assert metrics["own"] == pytest.approx(sum(float(w.square().sum()) / 2 for w in before))


def test_metrics_of_the_heads_by_hand(world):
    real = [torch.tensor([[[2.0, -1.0]], [[3.0, 1.0]]]), torch.tensor([[[-1.0]], [[1.0]]])]
    fake = [torch.tensor([[[-2.0, 1.0]], [[-3.0, 0.5]]]), torch.tensor([[[-1.0]], [[-4.0]]])]
    recipe = tiny.make_recipe(batch=4)
    state, answers = tiny.make_state(world, recipe), itertools.cycle((real, fake))
    bias = state.heads.heads[0].out.bias
    state.heads.forward = lambda *_: [k + 0 * bias for k in next(answers)]
    metrics = tiny.run_steps(state, world, recipe, [0], micro_batch=2)[0]
    assert metrics["accuracy/first"] == 3 / 4
    assert metrics["accuracy/second"] == (1 / 2 + 1) / 2  # a tie counts half
    assert metrics["heads_loss"] == pytest.approx(((2 / 4 + 3.5 / 4) + (2 / 2 + 0)) / 2)
