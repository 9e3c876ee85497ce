"""Z-Image on a tiny random pipeline: against diffusers, the job, ranks, LoRA, export."""

import dataclasses
import json
import re
import shutil
import types
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import tree_flatten_with_path

import ladd
import tiny
import tiny_zimage
from processes import on_ranks
from zimage import adapter, export, fsdp, lora, plan, precompute, sample, world as zworld
from zimage.adapter import Prompts, ZImageVelocity

BATCH = 12
TINY = f"--taps 1,3 --head-width 16 --batch {BATCH} --dtype float32 --device cpu".split()
TINY += "--lr-warmup 0 --log-every 1 --evaluate-every 0 --checkpoint-every 2".split()
PROMPTS = ["a red fox", "a harbour in the evening, with three boats and a lighthouse behind", "tea"]


@pytest.fixture(scope="module")
def pipe(model):
    return adapter.load_pipeline(model, torch.float32, tiny.CPU)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """Fourteen samples of two sizes, with captions of two padded lengths."""
    folder = tmp_path_factory.mktemp("data")
    lines = [f"{'a very long description of ' * (k % 2)}thing {k}\n" for k in range(14)]
    (folder / "prompts.txt").write_text("".join(lines))
    argv = ["--model", model, "--prompts", folder / "prompts.txt", "--out", folder / "made"]
    argv += ["--resolution", "64,96x64", "--steps", 3, "--guidance", 3, "--shard-size", 4]
    assert tiny.start(precompute.main, *argv, "--seed=1", "--dtype=float32", "--device=cpu") == 0
    return folder / "made"


@pytest.fixture(autouse=True)
def no_group():
    """A process group that a test has started ends with it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def job(model, data, out, *more):
    folders = ["--model", str(model), "--data", str(data), "--out", str(out), "--name", "a"]
    return ["--zimage", "--iterations", "1", *folders, *TINY, *map(str, more)]


def checkpoint(run):
    """A run's newest checkpoint as a flat dict of whole tensors, whatever ranks wrote it."""
    dcp_to_torch_save(max(ladd.checkpoints(run).values()), run / "whole.pt")
    leaves, _ = tree_flatten_with_path(torch.load(run / "whole.pt", weights_only=False))
    flat = {".".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in flat.items() if isinstance(leaf, torch.Tensor)}


def distance(a, b):
    """|a - b| / |b| of two lists of tensors."""
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (a, b))
    return float((a - b).norm() / b.norm())


def make_batch(pipe, *prompts, h=8, w=12):
    """Noise [n, 16, h, w] and the prompts' features."""
    z = torch.stack([adapter.noise_for(3, i, h, w) for i in range(len(prompts))])
    captions = adapter.encode(pipe, prompts)
    return z, Prompts(captions, torch.stack([c.mean(0) for c in captions]))


def make_world(model, data, sharded=False, dtype="float32", **changes):
    """The world of a recipe of `changes`, made as the command line makes it."""
    recipe = dataclasses.replace(zworld.ZIMAGE, taps=("1", "3"), head_width=16, batch=BATCH)
    options = {"model": str(model), "data": str(data), "dtype": dtype, "micro_batch": "2"}
    options |= {"teacher_sharded": sharded, "checkpointing": "both", "compile": False}
    options["grid_prompts"] = None
    recipe = dataclasses.replace(recipe, **changes)
    return zworld.ZImageWorld(recipe, types.SimpleNamespace(**options), tiny.CPU)


@pytest.mark.parametrize("w, h, wide", [(1, 8, 8), (5, 8, 12), (2.5, 12, 8)])
def test_the_guided_teacher_is_the_stock_pipeline(model, data, pipe, w, h, wide):
    prompts = ["a cat", "a long sentence about a dog and its dish, and what lay in it"]
    z, cond = make_batch(pipe, *prompts, h=h, w=wide)
    world = make_world(model, data, anchor_weight=1.0)
    world.data.about["guidance"] = w
    pipe = adapter.load_pipeline(model, torch.float32, tiny.CPU)
    pipe.scheduler = type(pipe.scheduler)(shift=1.0)
    settings = {"height": 8 * h, "width": 8 * wide, "output_type": "latent"}
    settings |= {"guidance_scale": w - 1, "latents": z}
    theirs = pipe(list(prompts), num_inference_steps=5, **settings).images
    own = ladd.sample_euler(world.anchor, z, [1, 0.8, 0.6, 0.4, 0.2], cond)
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-4)
    settings["latents"] = 0.6 * z  # as if it were a sample at t = 0.6
    rest = pipe(list(prompts), sigmas=[0.6, 0.4, 0.2], **settings).images
    own = ladd.sample_euler(world.anchor, z, [0.6, 0.4, 0.2], cond)
    torch.testing.assert_close(own, rest, rtol=0, atol=1e-4)
    assert theirs.std() > 0.5


@pytest.mark.parametrize("sharded", [False, True])
def test_time_stays_float32_where_bfloat16_computes(model, sharded):
    seen, net = [], load(model, False)
    net = fsdp.make_student(net, tiny.CPU, torch.bfloat16) if sharded else net.to(torch.bfloat16)
    net.register_forward_pre_hook(lambda module, args: seen.append(args))
    cond = Prompts([torch.randn(5, 32)], torch.zeros(1, 3))
    with torch.no_grad():
        x, t = torch.randn(1, 16, 8, 8), torch.tensor([0.27])
        v = ZImageVelocity(net, torch.bfloat16)(x, t, cond)
    (frame,), t, (caption,) = seen[0]
    assert frame.dtype == caption.dtype == torch.bfloat16 and t.dtype == v.dtype == torch.float32
    assert float(t * 1000) == pytest.approx(730, abs=1e-3)


@torch.no_grad()
def test_features_hold_image_tokens_alone_in_a_mixed_batch(model, data, pipe):
    """Each sample's map is what it is alone; pads and caption are no part of it."""
    world = make_world(model, data)
    t = torch.full((3,), 0.6)
    for h, w in ((8, 8), (6, 12), (10, 6)):  # 16, 18 and 15 tokens of 32: there are pads
        z, cond = make_batch(pipe, "a", "word " * 8, "many words " * 6, h=h, w=w)
        assert len({adapter.padded_length(len(c)) for c in cond.captions}) == 3
        together = world.features(z, t, cond)[1]
        assert together.shape == (3, 48, h // 2, w // 2)
        for k in range(3):
            alone = world.features(z[k : k + 1], t[:1], cond[k : k + 1])[1]
            torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-4, atol=1e-4)
    shifted = z.clone()
    shifted[..., :2, 2:4] += 10  # the second token's pixels move the second place of the map most
    change = (world.features(shifted, t, cond)[1] - together).abs().sum(1)
    assert (change.flatten(1).argmax(1) == 1).all()


def load(model, sharded):
    folder, alive, counts = model / "transformer", weakref.WeakSet(), set()
    config = fsdp.ZImageTransformer2DModel.load_config(folder)
    with mock.patch.object(dist, "broadcast", lambda w, _: counts.add(alive.add(w) or len(alive))):
        teacher = fsdp.load_teacher(folder, config, torch.float32, tiny.CPU, sharded)
    assert counts == {1}, "there may be no room for a second copy of more than one weight"
    return teacher


def features_and_gradient(net, x, t, cond):
    x = x.clone().requires_grad_()
    velocity = ZImageVelocity(net, torch.float32)
    maps = ladd.tapped(net.layers, ("0", "2"), lambda: velocity(x, t, cond), early_exit=False)
    maps = [adapter.image_tokens(f, x) for f in maps]
    sum(m.square().mean() for m in maps).backward()
    return *maps, x.grad


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_features_bear_sharding_checkpointing_and_a_cut(model, pipe, sharded, checkpointing, cut):
    net = load(model, sharded)
    if cut:
        del net.layers[3:]
    if checkpointing:
        net.enable_gradient_checkpointing()
    z, cond = make_batch(pipe, "a cat", "a much longer caption, of more than thirty-two tokens")
    t = torch.tensor([0.2, 0.9])
    ours = features_and_gradient(net, z, t, cond)
    for a, b in zip(ours, features_and_gradient(pipe.transformer, z, t, cond), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("sharded", [False, True])
def test_the_student_starts_with_the_teachers_weights_in_float32(model, pipe, sharded):
    teacher = load(model, sharded)
    student = fsdp.make_student(teacher, tiny.CPU, torch.bfloat16)
    whole = fsdp.gather(student, torch.float32)
    for (k, a), b in zip(whole.state_dict().items(), pipe.transformer.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b), k
    next(student.parameters()).to_local().detach().zero_()
    w = next(teacher.parameters())
    assert (w.to_local() if sharded else w).any(), "they share no memory"
    assert all(p.requires_grad for p in student.parameters())


@torch.no_grad()
def test_a_sharded_student_samples_with_its_average_after_a_pass_without_gradient(model, pipe):
    """FSDP may keep gathered weights after such a pass; the average must not be lost on them."""
    net = fsdp.make_student(load(model, False), tiny.CPU, torch.float32)
    velocity, ema = ZImageVelocity(net, torch.float32), ladd.EMA(net, 10.0, 0.1)
    (z, cond), t = make_batch(pipe, "a cat"), torch.ones(1)
    before, other = velocity(z, t, cond), tiny_zimage.transformer()
    for w in (*ema.mean, *other.parameters()):
        w.mul_(1.1)
    ema.swap(net)
    torch.testing.assert_close(velocity(z, t, cond), ZImageVelocity(other)(z, t, cond))
    ema.swap(net)
    assert torch.equal(velocity(z, t, cond), before)


@pytest.fixture(scope="module")
def alone(model, data, tmp_path_factory):
    """Six iterations on one rank, checkpointed at 2, 4 and 6, with an evaluation."""
    out = tmp_path_factory.mktemp("alone")
    often = ["--evaluate-every", 4, "--keep", 3]
    (out / "own.txt").write_text("a fox\na harbour\n")
    often += ["--grid-prompts", out / "own.txt"]
    assert ladd.main(job(model, data, out, "--iterations", 6, "--gen-every", 2, *often)) == 0
    return out / "a"


def test_the_whole_job(alone, pipe):
    student = adapter.load_transformer(alone / "student", torch.float32)
    state = checkpoint(alone)
    for k, p in enumerate(student.parameters()):  # what is saved is the average
        assert torch.equal(p, state[f"ema.{k}"])
    both = zip(student.parameters(), pipe.transformer.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in both)
    lines = tiny.log_of(alone)
    updates = [d["iteration"] for d in lines if "student_loss" in d]
    assert updates == [2, 4, 6]  # one student update for two of the heads
    (judged,) = (d for d in lines if "feature_diversity" in d)
    assert judged["iteration"] == 4 and {"variance@4", "distance@1"} <= judged.keys()
    for name, shape in {"0000004": (4 * 300, 7 * 300), "0000004-own": (3 * 300, 2 * 300)}.items():
        with Image.open(alone / "samples" / f"{name}.png") as picture:
            assert picture.size == shape and len(picture.getcolors(2**24)) > 1000
    of = json.loads((alone / "config.json").read_text())["data"]
    assert of["latents.guidance"] == 3 and of["latents.steps"] == 3


def test_bfloat16_computes_and_float32_learns(model, data, tmp_path):
    """Weights in bfloat16 would round an update of 5e-6 away."""
    more = ["--dtype", "bfloat16", "--teacher-sharded", "--checkpointing=none", "--gen-every", 1]
    assert ladd.main(job(model, data, tmp_path, "--iterations", 2, *more)) == 0
    state, moved, total = checkpoint(tmp_path / "a"), 0, 0
    for k, w in tiny_zimage.transformer().state_dict().items():
        change = (state[f"student.transformer.{k}"] - w.bfloat16()).abs()
        moved, total = moved + int((change > 0).sum()), total + w.numel()
        assert change.dtype == torch.float32 and change.max() < 6e-6
    assert moved > 0.9 * total
    saved = load_file(weights(tmp_path / "a", "student"))
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}


def test_compile_takes_every_block_of_student_and_teacher(model, data, monkeypatch):
    """Under FSDP, checkpointing and taps. The compiler itself is left out: it takes minutes."""
    world, made = make_world(model, data, gen_every=1), []

    def compiled(forward, fullgraph):
        assert fullgraph
        made.append(mock.Mock(side_effect=forward))
        return made[-1]

    monkeypatch.setattr(torch, "compile", compiled)
    world.options.compile = True
    state = ladd.State(world, world.recipe, tiny.CPU)
    ladd.train_step(state, world, world.recipe, 1)
    assert len(made) == 2 * (2 + 2 + 4) and all(block.called for block in made)


def test_signs_of_collapse_are_named(model, data, tmp_path):
    world, calls = make_world(model, data), []
    healthy = world.evaluate(world.make_student(), tmp_path, 1)

    def to_zero(x_t, t, cond):  # every guess is x0 = 0
        calls.append(t)
        return x_t / ladd.expand(t, x_t)

    world.teacher.register_forward_pre_hook(lambda net, args: calls.append(args[1]))
    metrics = world.evaluate(to_zero, tmp_path, 2)
    # Seven samples of the grid's size, and three held out: as the plan counts them.
    assert sum(map(len, calls)) == 7 / 8 * plan.GRIDS + 3 * plan.JUDGED
    assert metrics["variance@2"] == 0
    signs = [sign.split()[0] for sign in metrics["collapse"]]
    assert signs == ["variance@1", "variance@2", "variance@4", "feature_diversity"]
    assert metrics["feature_diversity"] < 0.8 < healthy["feature_diversity"]
    assert metrics["feature_kid"] > 2 * healthy["feature_kid"]
    assert metrics["score"] == metrics["feature_kid"] and metrics["score_error"] > 0


LORA = ["--lora-rank", 4, "--student-lr", "3e-4", "--head-lr", "1e-3", "--gen-every", 1]


@pytest.fixture(scope="module")
def adapted(model, data, tmp_path_factory):
    """Four iterations of a LoRA student, checkpointed at 2 and 4: its run, and its end state."""
    out, train, kept = tmp_path_factory.mktemp("lora"), ladd.train, {}

    def keep(*args, **settings):
        kept["state"] = train(*args, **settings)
        return kept["state"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladd, "train", keep)
        assert ladd.main(job(model, data, out, "--iterations", 4, *LORA)) == 0
    return types.SimpleNamespace(run=out / "a", **kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_student_starts_as_the_teacher_whose_weights_it_shares(dtype):
    teacher = torch.nn.Module.to(tiny_zimage.transformer(), dtype).requires_grad_(False)
    student = lora.LoraVelocity(teacher, 4, dtype)
    cond = Prompts([torch.randn(n, 32) for n in (5, 40)], torch.zeros(2, 3))
    x, t = torch.randn(2, 16, 8, 12), torch.tensor([0.3, 1])
    guess = student(x, t, cond)
    assert torch.equal(guess, ZImageVelocity(teacher)(x, t, cond))
    trained, whole = list(student.parameters()), list(student.transformer.parameters())
    assert {p.dtype for p in trained} == {torch.float32}
    assert sum(p.numel() for p in trained) == lora.size(teacher, 4) > 20_000
    ours = {p.data_ptr() for p in whole} - {p.data_ptr() for p in trained}
    assert ours == {p.data_ptr() for p in teacher.parameters()}
    guess.square().mean().backward()
    reached = [p for p in trained if p.grad is not None and p.grad.any()]
    assert len(reached) == len(trained) / 2  # every B; no A, before its B has left 0
    assert all(p.grad is None for p in teacher.parameters())


def test_nothing_but_lora_is_trained_averaged_and_saved(adapted, pipe):
    saved, size = checkpoint(adapted.run), lora.size(pipe.transformer, 4)
    weights = adapted.state.student.transformer.state_dict()
    base = {k.replace(".base_layer", ""): v for k, v in weights.items() if ".lora_" not in k}
    for k, w in pipe.transformer.state_dict().items():
        assert torch.equal(base[k], w), k
    parts = ("student.", "student_opt.", "ema.")
    ours = {k: v for k, v in saved.items() if k.startswith(parts) and v.numel() > 1}
    assert sum(v.numel() for v in ours.values()) == 4 * size  # weights, two moments, average


FULL = ["--iterations", 6, "--gen-every", 2]


@pytest.mark.parametrize("gone, options", [(6, FULL), (4, ["--iterations", 4, *LORA])])
def test_killed_and_resumed_is_never_killed(alone, adapted, model, data, tmp_path, gone, options):
    run = alone if options is FULL else adapted.run
    shutil.copytree(run, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints" / f"step-{gone:07d}")
    assert ladd.main(job(model, data, tmp_path, *options, "--resume")) == 0
    a, b = checkpoint(run), checkpoint(tmp_path / "a")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_lora_run_ends_in_a_whole_student_and_in_a_lora_with_its_card(adapted, pipe, tmp_path):
    z, cond = make_batch(pipe, "a cat", "two cats")
    with adapted.state.averaged() as student:
        want = ladd.sample_student(student, zworld.ZIMAGE, z, cond, 4)
    merged = adapter.load_transformer(adapted.run / "student", torch.float32)
    whole = ladd.sample_student(ZImageVelocity(merged), zworld.ZIMAGE, z, cond, 4)
    torch.testing.assert_close(whole, want, rtol=0, atol=1e-4)

    card = (adapted.run / "lora" / "README.md").read_text()
    code = "\n".join(re.findall("^    (.*)", card, re.M)).replace(".images[0]", "")
    code = code.replace('"a red fox in fresh snow"', '["a cat", "two cats"]')
    more = "guidance_scale=0, height=64, width=96, latents=z, output_type='latent'"
    code = code.replace("guidance_scale=0", more)
    # ComfyUI's names, which it reads as it reads ours, are known to the stock pipeline too.
    path = adapted.run / "lora" / "pytorch_lora_weights.safetensors"
    names = {k.replace("transformer.", "diffusion_model."): v for k, v in load_file(path).items()}
    save_file(names, tmp_path / path.name)
    for each in (code, code.replace(str(path.parent), str(tmp_path))):
        names = {"z": z}
        exec(each, names)  # what the card tells its reader to run
        torch.testing.assert_close(names["image"].images, want, rtol=0, atol=1e-4)
    untrained = ladd.sample_student(ZImageVelocity(pipe.transformer), zworld.ZIMAGE, z, cond, 4)
    assert (untrained - want).abs().max() > 0.01


EVEN = {"time_probs": (0.4, 0.2, 0.2, 0.2), "warmup": 0, "gen_every": 1, "batch": 12}
EVEN["head_lr"] = 0.0  # else AdamW's first step, of the gradient's sign, enlarges rounding
OFF = ("penalty_weight", "misaligned_weight", "anchor_weight", "distill_weight", "paired_share")
EVEN |= {**dict.fromkeys(OFF, 0.0), "backward_simulation": False, "distill_own": False}
SHIPPED = {k: getattr(zworld.ZIMAGE, k) for k in (*OFF, "backward_simulation", "distill_own")}
TERMS = {  # name: (recipe, is the teacher sharded)
    "as shipped": (SHIPPED, True),
    "hinge": ({}, False),
    "penalty": ({"penalty_weight": 5.0, "share_noise": False}, True),
    "misaligned": ({"misaligned_weight": 0.5, "heads_see_t": True}, False),
    "anchor": ({"anchor_weight": 1.0, "backward_simulation": True}, True),
    "paired": ({"paired_share": 0.5, "distill_weight": 1.0, "distill_power": 2.0}, False),
    "lora": ({"lora_rank": 4, "anchor_weight": 1.0}, False),
}


def one_iteration(world):
    """The (heads' gradients, student's gradients) of an iteration, and its network calls."""
    state = ladd.State(world, world.recipe, tiny.CPU)
    calls, seen = [], tiny.record_grads(state)

    def note(net, args):
        calls.append((net is state.student, torch.is_grad_enabled()))

    for net in (state.student, world.teacher):
        net.register_forward_pre_hook(note)
    ladd.train_step(state, world, world.recipe, 1)
    return [seen["heads"][0], seen["student"][0]], calls


def term_gradients(model, data):
    """{term: (heads' gradients, student's)} of one float32 iteration; equal calls on all ranks."""
    made = {}
    for name, (changes, sharded) in TERMS.items():
        made[name], calls = one_iteration(make_world(model, data, sharded, **{**EVEN, **changes}))
        everyone = [None] * ladd.world_size()
        dist.all_gather_object(everyone, calls)
        assert all(each == everyone[0] for each in everyone), (name, everyone)
        if name == "hinge":  # the student and the fakes with a graph: with 1 + 2 F back, 6 F
            assert calls == [(True, True), (False, True), (False, False)]
    return made


def judged(model, data):
    """The KID that two ranks share, and a third one has nothing to do for; and its error."""
    world = make_world(model, data)
    return world.feature_kid(world.make_student())


def as_rank(rank, folder, folders, argv):
    """What each of several processes does: record gradients and KID, then train."""
    found = term_gradients(*folders), judged(*folders)
    assert ladd.main(argv) == 0
    return found


@pytest.fixture(scope="module")
def together(model, data, tmp_path_factory):
    """Gradients and KID of 2 and 3 ranks, and a run that 2 ranks begin, 1 resumes and 3 end."""
    runs, found = tmp_path_factory.mktemp("together"), {}
    for ranks, iterations in ((2, 2), (1, 4), (3, 6)):
        more = ["--gen-every", 2, "--iterations", iterations]
        argv = job(model, data, runs, *more, "--resume", "--evaluate-every", 5)
        argv += ["--teacher-sharded"] * (ranks == 3)
        if ranks == 1:
            assert ladd.main(argv) == 0
            continue
        out = tmp_path_factory.mktemp("ranks")
        found[ranks] = on_ranks(ranks, out, as_rank, (model, data), argv)[0]
    return runs / "a", found


def test_gradients_of_several_ranks_are_those_of_one(together, model, data):
    for name, of_one in term_gradients(model, data).items():
        for ranks, (made, _) in together[1].items():
            for part, a, b in zip(("heads", "student"), made[name], of_one, strict=True):
                assert distance(a, b) < 1e-5, (name, ranks, part)


@torch.no_grad()
def test_feature_kid_equals_an_independent_one_on_any_ranks(together, model, data):
    world, t = make_world(model, data), torch.tensor([0.5])
    student, found = world.make_student(), []
    for k in (11, 12, 13):  # each alone
        x0, cond, _ = world.data.get([k])
        noise = ladd.keyed_noise([k], x0.shape[1:], "feature_kid")
        fake = ladd.sample_euler(student, noise, [1, 0.75, 0.5, 0.25], cond)
        eps = ladd.keyed_noise([0], x0.shape[1:], "diversity")
        maps = [world.features((x + eps) / 2, t, cond)[-1][0] for x in (fake, x0)]
        found.append(torch.stack([m.double().flatten(1).mean(1) for m in maps]))
    x, y = torch.stack(found, 1)
    x, y = (((z - y.mean(0)) / (y.std(0) + 1e-3)).numpy() for z in (x, y))
    kid = tiny.kid_by_hand(x, y)
    kids = [tiny.kid_by_hand(x[rows], y[rows]) for rows in ([1, 2], [0, 2], [0, 1])]
    error = (2 / 3 * sum((k - sum(kids) / 3) ** 2 for k in kids)) ** 0.5
    for made in (judged(model, data), *(kid for _, kid in together[1].values())):
        assert made["feature_kid"] == pytest.approx(kid, rel=1e-3)
        assert made["feature_kid_error"] == pytest.approx(error, rel=1e-3)


def test_two_ranks_then_one_then_three_train_as_one_does(together, alone):
    assert (together[0] / "samples" / "0000005.png").exists()
    a, b = checkpoint(together[0]), checkpoint(alone)
    assert a.keys() == b.keys()
    # The last gradients (with beta1 = 0 they are exp_avg) and the weights are alike, no more: AdamW
    # makes a whole step of a gradient of nearly 0, whatever its sign.
    for part in ("heads_opt", "student_opt"):
        moments = [k for k in a if k.startswith(part) and k.endswith("exp_avg")]
        assert len(moments) > 10
        assert distance([a[k] for k in moments], [b[k] for k in moments]) < 0.1
    start = tiny_zimage.transformer().state_dict()
    moved = [[c[f"student.transformer.{k}"] - w for k, w in start.items()] for c in (a, b)]
    assert distance(*moved) < 0.7 and max(float(m.abs().max()) for m in moved[1]) > 1e-6


def weights(model, part="transformer"):
    return next((model / part).glob("*.safetensors"))


BAD_OPTIONS = [
    (["--taps", "9"], "taps = ['9']: ['9'] is no layer of this transformer; give some of 0 .. 3"),
    (["--recipe", "zimage-clip"], "clip"),
    (["--lora-rank", "4", "--teacher-sharded"], "--teacher-sharded: a LoRA student uses"),
    (["--lora-rank", "4", "--teacher-sharded", "--plan"], "--teacher-sharded: a LoRA student uses"),
    (["--sample"], "--sample: for Z-Image it is python -m zimage.sample"),
    (["--data", "nowhere"], "nowhere"),
]


def refused(capsys, out, argv, says):
    """One line, exit code 2, before any weight is loaded, and no run's folder."""
    tiny.refused(capsys, ladd.main(argv), says)
    assert not list(out.glob("*/*")), "half a run's folder"


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_another_model_than_the_datas_is_refused(model, data, tmp_path, capsys, part):
    path = weights(Path(shutil.copytree(model, tmp_path / "model")), part)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    argv = job(tmp_path / "model", data, tmp_path / "out")
    refused(capsys, tmp_path / "out", argv, "made by another model")


@pytest.mark.parametrize("options, says", BAD_OPTIONS)
def test_a_bad_option_is_refused_in_one_line(options, says, model, data, tmp_path, capsys):
    refused(capsys, tmp_path, job(model, data, tmp_path, *options), says)


def test_every_part_reads_the_weights_that_from_pretrained_reads(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model")) / "transformer"
    single, net = weights(folder.parent), adapter.load_transformer(folder, torch.float32)
    stale = {k: torch.zeros_like(v) for k, v in load_file(single).items()}
    net.save_pretrained(folder, max_shard_size="1MB")
    for variant in ("", ".fp16"):  # beside the shards
        save_file(stale, folder / f"diffusion_pytorch_model{variant}.safetensors")
    found = [adapter.load_transformer(folder, torch.float32)]
    found += [adapter.load_pipeline(folder.parent, torch.float32, "cpu").transformer]
    found += [fsdp.load_teacher(folder, net.config, torch.float32, tiny.CPU, False)]
    for other in found:
        assert all(map(torch.equal, other.parameters(), found[0].parameters()))


def test_latents_of_pure_noise_and_a_lost_compiler_are_refused(model, data, tmp_path, capsys):
    argv, says = job(model, data, tmp_path), "--compile: torch.compile does not work"
    with mock.patch.object(torch, "compile", side_effect=RuntimeError("no C++ compiler")):
        refused(capsys, tmp_path, [*argv, "--compile"], says)
    get = zworld.Latents.get
    with mock.patch.object(zworld.Latents, "get", lambda *args: get(*args)[::-1]):
        refused(capsys, tmp_path, argv, "look like pure noise")


BIG = 6_154_908_736  # Z-Image's weights
LORA_64 = 64 * 34 * (4 * 2 * 3840 + 3 * (3840 + 10240))  # r (inputs + outputs), in 34 blocks


@pytest.mark.parametrize(
    "changes, sharded, ranks, memory, disk",
    [
        ({}, False, 1, 22 * BIG, 16 * BIG),
        ({"ema_half_life": 0.0}, False, 2, 16 * BIG / 2 + 2 * BIG, 12 * BIG),
        ({}, True, 8, 22 * BIG / 8, 16 * BIG),
        ({"lora_rank": 64}, False, 8, 20 * LORA_64 + 2 * BIG, 16 * LORA_64),
    ],
)
def test_too_little_memory_is_refused(changes, sharded, ranks, memory, disk, capsys, monkeypatch):
    """The published size, of which no weight is made."""
    world = zworld.ZImageWorld.__new__(zworld.ZImageWorld)
    world.options = types.SimpleNamespace(teacher_sharded=sharded)
    world.device, world.dtype = torch.device("cuda"), torch.bfloat16
    arguments = dataclasses.replace(zworld.ZIMAGE, **changes), fsdp.skeleton({})
    monkeypatch.setattr(ladd, "world_size", lambda: ranks)
    have = types.SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: have)
    world.check_memory(*arguments)
    have.total_memory -= 1
    with pytest.raises(ladd.UserError, match=f"{memory / 1e9:.1f} GB are needed on each GPU"):
        world.check_memory(*arguments)
    said = capsys.readouterr().out
    assert "6.15B weights" in said and f"{disk / 1e9:.1f} GB of disk for a checkpoint" in said


@pytest.fixture(scope="module")
def place(alone, model, tmp_path_factory):
    """run: a finished run with a student unlike its teacher; exported; prompts: a file of them."""
    folder = tmp_path_factory.mktemp("place")
    run = Path(shutil.copytree(alone, folder / "run"))
    shutil.rmtree(run / "student")
    tiny_zimage.transformer(seed=5).save_pretrained(run / "student")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    exported, prompts = folder / "exported", folder / "prompts.txt"
    assert tiny.start(export.main, run, "--out", exported, "--dtype", "float32") == 0
    return types.SimpleNamespace(run=run, base=model, exported=exported, prompts=prompts)


def stock(folder):
    return adapter.load_pipeline(folder, torch.float32, tiny.CPU)


@pytest.mark.parametrize("n, size", [(4, (32, 64)), (3, (32, 32)), (2, (64, 32)), (1, (48, 32))])
def test_stock_pipeline_samples_the_export_as_ladd_samples_the_student(place, n, size):
    pipe, prompts = stock(place.exported), PROMPTS[:2]
    z = torch.stack([adapter.noise_for(0, i, size[0] // 8, size[1] // 8) for i in range(2)])
    times, seen = ladd.step_times(zworld.ZIMAGE.times, n), []
    call = eval(f"dict({zworld.call_for(times)})")  # what the card tells its reader to write
    handle = pipe.transformer.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    settings = {"latents": z, "output_type": "latent", "height": size[0], "width": size[1]}
    made = pipe(list(prompts), **settings, **call).images
    handle.remove()
    told = 1 - torch.tensor(times)[:, None].expand(n, 2)
    assert torch.equal(torch.stack(seen), told), "N evaluations, at the trained times alone"

    student = adapter.load_transformer(place.run / "student", torch.float32)
    captions = adapter.encode(pipe, prompts)
    cond = Prompts(captions, torch.zeros(2, 1))
    ours = ladd.sample_student(ZImageVelocity(student), zworld.ZIMAGE, z, cond, n)
    torch.testing.assert_close(made, ours, atol=1e-5, rtol=0)


def test_renoise_export_adds_fresh_noise_between_the_steps(place, tmp_path):
    run = Path(shutil.copytree(place.run, tmp_path / "run"))
    recipe = json.loads((run / "config.json").read_text())["recipe"]
    tiny_zimage.rewrite(run / "config.json", recipe={**recipe, "sampler": "renoise"})
    export.export(sample.open_run(run), tmp_path / "out", "float32")
    pipe, z = stock(tmp_path / "out"), adapter.noise_for(0, 0, 4, 4)[None]
    settings = {"latents": z, "output_type": "latent", "height": 32, "width": 32}
    torch.manual_seed(3)
    made = pipe(PROMPTS[0], num_inference_steps=4, guidance_scale=0, **settings).images
    torch.manual_seed(3)  # diffusers draws from the global generator
    cond = Prompts(adapter.encode(pipe, PROMPTS[:1]), torch.zeros(1, 1))
    velocity, times = ZImageVelocity(pipe.transformer), zworld.ZIMAGE.times
    ours = ladd.sample_euler(velocity, z, times, cond, lambda k: torch.randn(z.shape))
    torch.testing.assert_close(made, ours, atol=1e-5, rtol=0)
    assert "torch.manual_seed(0)" in (tmp_path / "out" / "README.md").read_text()
    assert "torch.manual_seed" not in (place.exported / "README.md").read_text()


def test_the_card_and_the_scheduler(place):
    card = (place.exported / "README.md").read_text()
    call = "`pipe(prompt, sigmas=[1.0, 0.75, 0.5], guidance_scale=0)`"
    for words in ("Not evaluated.", str(place.base), call, 'from_pretrained("exported", dtype='):
        assert words in card, words
    named = [p for p in place.exported.rglob("*.json") if str(place.base.parent) in p.read_text()]
    assert not named, "no path of this machine is shared"
    config = stock(place.exported).scheduler.config
    assert config.shift == 1 and not config.stochastic_sampling
    assert stock(place.base).scheduler.config.shift == 6


def test_the_picture_shows_prompts_by_ways(place, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(zworld, "draw_grid", lambda path, columns, texts: shown.append(columns))
    argv = [place.run, "--prompts", place.prompts, "--count", 3, "--steps", "4,1", "--seed", 3]
    argv += ["--teacher-steps", 2, "--resolution", "48x32", "--batch", 2, "--dtype", "float32"]
    assert tiny.start(sample.main, *argv, "--device=cpu") == 0
    ways = {title.split("\n")[0]: images for title, images in shown[0].items()}
    assert list(ways) == ["teacher@2", "student@4", "student@1", "untrained@4", "untrained@1"]
    assert len({image.tobytes() for images in ways.values() for image in images}) == 15
    tiny.refused(capsys, tiny.start(sample.main, *argv, "--guidance=0"), "--guidance 0.0")


def test_a_run_that_cannot_be_exported_is_refused(place, tmp_path, capsys):
    run = Path(shutil.copytree(place.run, tmp_path / "run"))
    code = tiny.start(export.main, run, "--out", place.exported)
    tiny.refused(capsys, code, "not an empty folder")
    longer = {**json.loads((run / "config.json").read_text())["recipe"], "iterations": 99}
    for spoil, says in (
        (lambda: tiny_zimage.rewrite(run / "config.json", recipe=longer), "it has not ended"),
        (lambda: shutil.rmtree(run / "student"), "it has not ended"),
        (lambda: tiny_zimage.rewrite(run / "config.json", recipe={"samples": 3}), "'samples'"),
        (lambda: (run / "config.json").write_text("{"), "config.json: holds no recipe"),
    ):
        spoil()
        tiny.refused(capsys, tiny.start(export.main, run, "--out", tmp_path / "out"), says)
        assert not (tmp_path / "out").exists()
