"""Z-Image: the adapter against diffusers' own pipeline, the whole job on a tiny random pipeline, sharded and on two ranks."""

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny_zimage
import torch

import ladd
from zimage import adapter, fsdp, lora, precompute
from zimage import world as zworld
from zimage.adapter import Prompts, ZImageVelocity
from zimage.data import Latents

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = ["--taps", "1,3", "--head-width", "16", "--batch", "4", "--log-every", "1", "--evaluate-every", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_zimage.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(model):
    return adapter.load_pipeline(model, torch.float32, CPU)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """Ten samples of two sizes, captions of two padded lengths."""
    folder = tmp_path_factory.mktemp("data")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{'a very long description of ' * (k % 2)}thing {k}\n" for k in range(10)))
    assert precompute.main(["--model", str(model), "--prompts", str(prompts), "--out", str(folder / "made"), "--resolution", "64,96x64",
                            "--steps", "3", "--guidance", "3", "--dtype", "float32", "--shard-size", "3"]) == 0
    return folder / "made"


@pytest.fixture(autouse=True)
def no_group():
    """A group of one that a test has started ends with it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def batch(pipe, *prompts, h=8, w=12):
    """Noise [n, 16, h, w] and the prompts' features."""
    z = torch.stack([adapter.noise_for(3, i, h, w) for i in range(len(prompts))])
    captions = adapter.encode(pipe, list(prompts))
    return z, Prompts(captions, torch.stack([c.mean(0) for c in captions]))


# ---------------------------------------------------------------------------------------------------------------------
# The adapter, against the pipeline
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("w, h, wide", [(1, 8, 8), (5, 8, 12), (2.5, 12, 8)])
def test_guided_teacher_is_the_stock_pipeline(pipe, w, h, wide):
    prompts = ["a cat", "a long sentence about a dog and its dish"]
    z, cond = batch(pipe, *prompts, h=h, w=wide)
    empty = Prompts(adapter.encode(pipe, ["", ""]), cond.vector)
    ours = ladd.sample_euler(ladd.guided(ZImageVelocity(pipe.transformer), lambda c: empty, w), z, adapter.teacher_times(5, 6.0), cond)
    theirs = pipe(list(prompts), height=8 * h, width=8 * wide, num_inference_steps=5, guidance_scale=w - 1, latents=z, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.5


@torch.no_grad()
def test_the_student_at_step_0_is_the_pipelines_guess_at_every_t(pipe, model):
    """x0 = x_t - sigma v with v = -model(x_t, 1 - sigma), written out on the bare transformer."""
    z, cond = batch(pipe, "a cat", "two cats")
    x0 = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    for sigma in (1.0, 0.75, 0.5, 0.25):
        x_t = (1 - sigma) * x0 + sigma * z
        out = pipe.transformer(list(x_t.unsqueeze(2)), torch.tensor([1 - sigma] * 2), cond.captions, return_dict=False)[0]
        want = x_t + sigma * torch.stack(out).squeeze(2)
        t = torch.full((2,), sigma)
        got = ladd.velocity_to_x0(x_t, ZImageVelocity(pipe.transformer)(x_t, t, cond), t)
        torch.testing.assert_close(got, want)
        told_sigma = pipe.transformer(list(x_t.unsqueeze(2)), torch.tensor([sigma] * 2), cond.captions, return_dict=False)[0]
        assert sigma == 0.5 or not torch.allclose(got, x_t + sigma * torch.stack(told_sigma).squeeze(2), atol=1e-3)


def test_time_stays_float32_in_a_bfloat16_model():
    seen = []
    net = tiny_zimage.transformer().to(torch.bfloat16)
    net.register_forward_pre_hook(lambda module, args: seen.append((args[0][0].dtype, args[1], args[2][0].dtype)))
    with torch.no_grad():
        v = ZImageVelocity(net)(torch.randn(1, 16, 8, 8), torch.tensor([0.27]), Prompts([torch.randn(5, 32)], torch.zeros(1, 3)))
    assert seen[0][0] == seen[0][2] == torch.bfloat16 and seen[0][1].dtype == torch.float32
    assert float(seen[0][1] * 1000) == pytest.approx(730, abs=1e-3) and v.dtype == torch.float32


def test_times_of_the_teacher_are_the_schedulers(pipe):
    for steps, shift in ((4, 6.0), (50, 3.0), (7, 1.0)):
        scheduler = type(pipe.scheduler)(shift=shift)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        assert adapter.teacher_times(steps, shift) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert adapter.teacher_times(4, 1.0) == [1, 0.75, 0.5, 0.25]


@torch.no_grad()
def test_taps_hold_image_tokens_alone_in_a_mixed_batch(pipe):
    """A batch of captions of 1, 2 and 3 padded lengths: each sample's map is what it is alone, and pads and caption are no part of it."""
    net, prompts = pipe.transformer, ["a", "word " * 8, "many words " * 6]
    for h, w in ((8, 8), (6, 12), (10, 6)):                         # 16, 18 and 15 tokens of 32: pads within
        z, cond = batch(pipe, *prompts, h=h, w=w)
        assert len({adapter.padded_length(c) for c in cond.captions}) == 3
        maps = lambda x, c: adapter.image_tokens(ladd.tapped(net.layers, ("2",), lambda: ZImageVelocity(net)(x, torch.full((len(x),), 0.6), c),
                                                             False)[0], x)
        together = maps(z, cond)
        assert together.shape == (3, 48, h // 2, w // 2)
        for k in range(3):
            torch.testing.assert_close(together[k:k + 1], maps(z[k:k + 1], cond[k:k + 1]), rtol=1e-4, atol=1e-4)
    shifted = z.clone()
    shifted[..., :2, :2] += 10                                      # the first token's pixels move the first place of the map most
    change = (maps(shifted, cond) - together).abs().sum(1)
    assert (change.flatten(1).argmax(1) == 0).all()


def test_image_tokens_of_a_known_sequence():
    h, w = 3, 2
    f = torch.arange(h * w + 5.)[None, :, None].expand(1, -1, 4)    # five rows of something else behind
    assert adapter.image_tokens(f, torch.zeros(1, 16, 2 * h, 2 * w))[0, 0].tolist() == [[0, 1], [2, 3], [4, 5]]


# ---------------------------------------------------------------------------------------------------------------------
# Building and sharding
# ---------------------------------------------------------------------------------------------------------------------

def features_and_gradient(net, x, t, cond):
    x = x.clone().requires_grad_()
    maps = ladd.tapped(net.layers, ("0", "2"), lambda: ZImageVelocity(net, torch.float32)(x, t, cond), False)
    maps = [adapter.image_tokens(f, x) for f in maps]
    sum(m.square().mean() for m in maps).backward()
    return *maps, x.grad


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_features_do_not_depend_on_sharding_checkpointing_or_the_early_end(model, pipe, sharded, checkpointing, cut):
    fsdp.start_alone(CPU)
    net = fsdp.build(fsdp.skeleton(model), lambda: fsdp.read_weights(model), torch.float32, CPU, sharded, torch.float32, frozen=True)
    if cut:
        del net.layers[3:]
    if checkpointing:
        net.enable_gradient_checkpointing()
    z, cond = batch(pipe, "a cat", "a much longer caption, of more than thirty-two tokens")
    t = torch.tensor([0.2, 0.9])
    for a, b in zip(features_and_gradient(net, z, t, cond), features_and_gradient(pipe.transformer, z, t, cond)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_a_sharded_student_samples_with_its_average_after_a_pass_without_gradient(model, pipe):
    """FSDP may keep gathered weights after a pass without gradient; the average must not be lost on them."""
    fsdp.start_alone(CPU)
    net = fsdp.build(fsdp.skeleton(model), lambda: fsdp.read_weights(model), torch.float32, CPU, True, torch.float32, frozen=False)
    velocity, ema = ZImageVelocity(net, torch.float32), ladd.EMA(net, 10.0, 0.1)
    z, cond = batch(pipe, "a cat")
    t = torch.tensor([0.5])
    with torch.no_grad():
        before = velocity(z, t, cond)
        for mean in ema.mean:
            mean.mul_(1.1)
        ema.swap(net)
        got = velocity(z, t, cond)
        other = tiny_zimage.transformer()
        for p in other.parameters():
            p.mul_(1.1)
        torch.testing.assert_close(got, ZImageVelocity(other)(z, t, cond))
        ema.swap(net)
        assert torch.equal(velocity(z, t, cond), before) and not torch.allclose(before, got, atol=1e-2)


def test_saved_whole_weights_are_the_models(model, pipe, tmp_path):
    from diffusers import ZImageTransformer2DModel
    fsdp.start_alone(CPU)
    net = fsdp.build(fsdp.skeleton(model), lambda: fsdp.read_weights(model), torch.float32, CPU, True, torch.float32, frozen=False)
    loaded = ZImageTransformer2DModel.from_pretrained(fsdp.save_whole(net, tmp_path / "student", torch.float32))
    for (k, a), b in zip(loaded.state_dict().items(), pipe.transformer.state_dict().values()):
        assert torch.equal(a, b), k


# ---------------------------------------------------------------------------------------------------------------------
# The job
# ---------------------------------------------------------------------------------------------------------------------

def distil(model, data, out, name, *more):
    return ladd.main(["--zimage", "--model", str(model), "--data", str(data), "--out", str(out), "--name", name, "--device", "cpu", *TINY, *more])


def torchrun(n, *argv, **env):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port=0", "--rdzv_backend=c10d",
                           "--rdzv_endpoint=localhost:0", *argv], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def checkpoint(run):
    """A run's newest checkpoint as a flat dict of whole tensors, whatever number of ranks wrote it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    path = ladd.newest_checkpoint(run)
    dcp_to_torch_save(path, run / "whole.pt")
    flat = {}

    def walk(value, *key):
        for k, v in value.items() if isinstance(value, dict) else ():
            walk(v, *key, str(k))
        if isinstance(value, torch.Tensor):
            flat[".".join(key)] = value
    walk(torch.load(run / "whole.pt", weights_only=False))
    return flat


def far(a, b):
    """|a - b| / |b|, of whole tensors."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def assert_same_training(a, b, tolerance):
    """Two runs' checkpoints: the last clipped gradients (with beta1 = 0 that is exp_avg) and what the student has learned are equal
    within tolerance: the heads compute in bfloat16 where the CPU does, and round otherwise in another batch. Single elements with a
    gradient of nearly 0 are not: AdamW makes a step of either sign of them."""
    assert a.keys() == b.keys() and len(a) > 50
    start = tiny_zimage.transformer().state_dict()
    gradients = [k for k in a if k.endswith("exp_avg") and float(b[k].norm()) > 1e-6]
    assert len(gradients) > 50
    for k in gradients:
        assert far(a[k], b[k]) < tolerance, k
    one, two = (torch.cat([(c[f"student.transformer.{k}"].double() - w.double()).flatten() for k, w in start.items()]) for c in (a, b))
    assert far(one, two) < 0.1 and two.abs().max() > 1e-6


@pytest.fixture(scope="module")
def alone(model, data, tmp_path_factory):
    """Six iterations on one rank, checkpointed at 3 and 6, with grids."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladd, "sample_diversity", functools.partial(ladd.sample_diversity, pairs=8))
        assert distil(model, data, out, "a", "--iterations", "6", "--checkpoint-every", "3", "--evaluate-every", "4") == 0
    return out / "a"


def test_the_whole_job(alone, pipe):
    from diffusers import ZImageTransformer2DModel
    about = json.loads((alone / "student" / "about.json").read_text())
    assert about == {"iteration": 6, "weights": "average", "dtype": "float32"}
    for name in ("start.png", "samples/0000004.png", "samples/0000004-raw.png", "samples/final.png"):
        assert (alone / name).stat().st_size > 10_000
    student = ZImageTransformer2DModel.from_pretrained(alone / "student")
    state = checkpoint(alone)
    for k, p in enumerate(student.parameters()):                                   # what is exported is the average
        assert torch.equal(p, state[f"ema.{k}"])
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), pipe.transformer.parameters()))
    lines = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert [d["iteration"] for d in lines if "student_loss" in d] == [3, 6]         # one student update for three of the heads
    judged = next(d for d in lines if "sample_diversity" in d)
    assert judged["collapsed"] == 0 and {"variance@4", "distance@1"} <= judged.keys()
    config = json.loads((alone / "config.json").read_text())
    assert config["world"] == "zimage" and config["recipe"]["taps"] == ["1", "3"] and config["drift"]["batch"] == [32, 4]
    assert config["data"]["latents.guidance"] == 3 and config["data"]["latents.steps"] == 3        # what sample and evaluate go by


def half_done(run, folder):
    """A copy of a run as folder/a, as if it had been killed after its third iteration."""
    shutil.copytree(run, folder / "a")
    shutil.rmtree(folder / "a" / "checkpoints" / "step-0000006")


def test_killed_and_resumed_is_never_killed(alone, model, data, tmp_path):
    half_done(alone, tmp_path)
    assert distil(model, data, tmp_path, "a", "--iterations", "6", "--checkpoint-every", "3", "--resume") == 0
    a, b = checkpoint(alone), checkpoint(tmp_path / "a")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_every_element_with_a_gradient_moves_at_5e_6(model, data, tmp_path):
    """bf16 weights would round the update away (and the teacher's stay as they were)."""
    assert distil(model, data, tmp_path, "a", "--iterations", "2", "--gen-every", "1", "--lr-warmup", "0", "--checkpoint-every", "2") == 0
    state, start = checkpoint(tmp_path / "a"), tiny_zimage.transformer().state_dict()
    moved = total = 0
    for k, w in start.items():
        # AdamW with beta1 = 0 after one step: w - lr g / (|g| + 1e-8)
        w64, m = w.double(), state[f"student_opt.state.transformer.{k}.exp_avg"].double()
        on = m.abs() > 1e-7
        want = w64 - 5e-6 * m / (m.abs() + 1e-8)
        got = state[f"student.transformer.{k}"].double()
        assert ((got - want).abs() <= 1e-6 * w64.abs() + 1e-9)[on].all(), k
        moved, total = moved + int((got != w64)[on].sum()), total + int(on.sum())
    assert total > 100_000 and moved >= 0.99 * total


def test_calls_and_cost_of_an_iteration(model, data, monkeypatch, tmp_path):
    """Student once, teacher twice on every iteration: so 3 + 3 + 6 = 12 F for a student update at gen_every 3, and 6 at 1."""
    calls, steps = [], []
    real = ZImageVelocity.forward

    def forward(self, x_t, t, cond):
        calls.append((self.transformer.layers[0].attention.to_q.weight.requires_grad, torch.is_grad_enabled(), len(x_t)))
        return real(self, x_t, t, cond)
    step = ladd.step

    def counted(*args, **kwargs):
        calls.clear()
        out = step(*args, **kwargs)
        steps.append(list(calls))
        return out
    monkeypatch.setattr(ZImageVelocity, "forward", forward)
    monkeypatch.setattr(ladd, "step", counted)
    assert distil(model, data, tmp_path, "a", "--iterations", "3", "--no-checkpointing") == 0
    student, teacher = (True, False, 4), (False, False, 4)
    assert steps[0] == steps[1] == [student, teacher, teacher]
    assert steps[2] == [(True, True, 4), teacher, (False, True, 4)]
    # forwards: 3 an iteration; the backward of the third: 1 through the teacher, 2 through the student
    assert sum(len(s) for s in steps) + sum(1 if not trained else 2 for s in steps for trained, graph, _ in s if graph) == 12


def test_in_bfloat16_with_the_average_on_the_host(model, data, tmp_path):
    from safetensors.torch import load_file
    assert distil(model, data, tmp_path, "a", "--iterations", "3", "--dtype", "bfloat16", "--ema-on-host") == 0
    state = checkpoint(tmp_path / "a")                                  # the weights that are trained stay float32
    assert {v.dtype for k, v in state.items() if k.startswith(("student.", "ema."))} == {torch.float32}
    assert {v.dtype for v in load_file(next((tmp_path / "a" / "student").glob("*.safetensors"))).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "a" / "student" / "about.json").read_text())["dtype"] == "bfloat16"


def test_both_worlds_run_the_same_step(model, data, tmp_path, monkeypatch):
    """Each world's job comes to `ladd.step` and trains by nothing else: where that does nothing, no weight changes."""
    from toy_mnist.world import ToyWorld
    calls, last = [], {}

    def step(state, world, recipe, terms, i, *rest):
        weights = torch.cat([ladd.local(p).detach().flatten() for m in (state.student, state.heads) for p in m.parameters()])
        assert i == 0 or torch.equal(weights, last["weights"])
        calls.append((type(world), i))
        last["weights"] = weights
        if i == 1:
            raise ladd.UserError("seen")
        return {"heads_loss": 0.0}
    monkeypatch.setattr(ladd, "step", step)
    for world in (ToyWorld, zworld.ZImageWorld):
        monkeypatch.setattr(world, "draw_start", lambda self, path: None)
    toy = ["--toy", "--samples", "4", "--teacher-steps", "1", "--head-width", "8", "--batch", "2", "--out", str(tmp_path), "--device", "cpu"]
    assert ladd.main(toy) == distil(model, data, tmp_path, "z") == 2
    assert calls == [(ToyWorld, 0), (ToyWorld, 1), (zworld.ZImageWorld, 0), (zworld.ZImageWorld, 1)]


def test_start_png_shows_paired_samples_with_the_noise_they_were_made_from(model, data, tmp_path, monkeypatch):
    shown = {}

    def draw(self, path, rows):
        shown.update((title, z) for z, title in rows)
        raise ladd.UserError("seen")
    monkeypatch.setattr(zworld.ZImageWorld, "draw", draw)
    for share in ("0", "1"):
        assert distil(model, data, tmp_path, "a" + share, "--paired-share", share, "--batch", "2") == 2     # fewer than a grid has
        x0, _, noise = Latents(data).get([0, 2])
        assert torch.equal(shown["x0: the teacher's samples, the 'real' ones"], x0)
        assert torch.equal(shown["x_t at t = 1: what the student is given"], noise) == (share == "1")


def test_compile_takes_every_block_of_student_and_teacher(model, data, tmp_path, monkeypatch):
    """Under FSDP, checkpointing and taps. What the compiler makes of a block is left out: it takes minutes."""
    calls = {}

    def compiled(forward, fullgraph):
        def call(*args, **kwargs):
            calls[id(forward)] += fullgraph
            return forward(*args, **kwargs)
        calls[id(forward)] = 0
        return call
    monkeypatch.setattr(torch, "compile", compiled)
    assert distil(model, data, tmp_path, "a", "--iterations", "2", "--gen-every", "1", "--compile") == 0
    assert len(calls) == 2 * (2 + 2 + 4) and min(calls.values()) >= 2       # refiners and layers, each in both iterations


def test_the_readmes_commands_run_on_the_tiny_model(model, tmp_path, monkeypatch):
    from zimage import evaluate, export, sample
    readme = (ROOT / "README.md").read_text()
    lines = re.findall(r"^    ((?:torchrun|python).*)$", readme, re.M)
    lines = [re.sub(r"^torchrun (--\S+ )+", "python ", line.split("#")[0].strip()) for line in lines]
    commands = [line.replace("python -m ", "").replace("python ", "") for line in lines if "zimage" in line]
    assert [c.split()[0] for c in commands] == ["zimage.precompute", "zimage.precompute", "ladd.py", "ladd.py", "zimage.evaluate", "zimage.sample",
                                                  "zimage.export", "ladd.py"]
    assert commands.pop() == commands[2]                    # the line for several machines
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\na fish\n")
    small, tiny = ["--resolution", "64"], ["--dtype", "float32", "--device", "cpu"]
    job = ["--model", str(model), "--iterations", "2", *TINY, *tiny]
    more = [["--steps", "2", *small, *tiny], ["--steps", "2", *small, *tiny], job, job,
            ["--prompts", "prompts.txt", "--teacher-steps", "2", "--seeds", "0", "--steps", "4", *small, *tiny],
            ["--prompts", "prompts.txt", "--teacher-steps", "2", "--count", "2", "--steps", "4", *small, *tiny], ["--dtype", "float32"]]
    mains = [precompute.main, precompute.main, ladd.main, ladd.main, lambda argv: evaluate.main(argv, features=lambda x: x.flatten(1)[:, ::97]),
             sample.main, export.main]
    for command, main, options in zip(commands, mains, more):
        words = command.replace("Tongyi-MAI/Z-Image", str(model)).replace(str(ROOT), "").split()[1:]
        words = [str(ROOT / w) if w.startswith("zimage/") else w for w in words]
        assert main(words + options) == 0, command
        assert (tmp_path / "data").exists() == ("--plan" not in command)
    assert (tmp_path / "runs/first/report.json").exists() and (tmp_path / "z-image-4-steps/model_index.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------------------

LORA = ["--lora-rank", "4", "--student-lr", "3e-4", "--head-lr", "1e-3", "--lr-warmup", "0", "--gen-every", "1"]


@pytest.fixture(scope="module")
def adapted(model, data, tmp_path_factory):
    """run: six iterations of a LoRA student on one rank, checkpointed at 3 and 6; world and state: as the run ended."""
    out, train, kept = tmp_path_factory.mktemp("lora"), ladd.train, {}

    def keep(world, *args):
        kept.update(world=world, state=train(world, *args))
        return kept["state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladd, "train", keep)
        assert distil(model, data, out, "a", "--iterations", "6", "--checkpoint-every", "3", *LORA) == 0
    return types.SimpleNamespace(run=out / "a", **kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_student_starts_as_the_teacher_whose_weights_it_shares(dtype):
    teacher = torch.nn.Module.to(tiny_zimage.transformer(), dtype).requires_grad_(False)
    student = lora.LoraVelocity(lora.attach(teacher, 4), dtype)
    x, t, cond = torch.randn(2, 16, 8, 12), torch.tensor([0.3, 1]), Prompts([torch.randn(n, 32) for n in (5, 40)], torch.zeros(2, 3))
    guess = student(x, t, cond)
    assert torch.equal(guess, ZImageVelocity(teacher)(x, t, cond))
    trained, whole = list(student.parameters()), list(student.transformer.parameters())
    assert sum(p.numel() for p in trained) == lora.size(teacher, 4) > 20_000 and {p.dtype for p in trained} == {torch.float32}
    ours, theirs = {p.data_ptr() for p in whole} - {p.data_ptr() for p in trained}, {p.data_ptr() for p in teacher.parameters()}
    assert ours == theirs and len(whole) == len(trained) + len(theirs)
    guess.square().mean().backward()
    reached = [p for p in trained if p.grad is not None and p.grad.any()]
    assert len(reached) == len(trained) / 2             # every B; no A, before its B has left 0
    assert all(p.grad is None for p in teacher.parameters()) and not hasattr(teacher.layers[0].attention.to_q, "lora_A")


def test_nothing_but_lora_is_trained_averaged_and_saved(adapted, pipe):
    state, saved, size = adapted.state, checkpoint(adapted.run), lora.size(pipe.transformer, 4)
    base = {k.replace(".base_layer", ""): v for k, v in state.student.transformer.state_dict().items() if ".lora_" not in k}
    for k, w in pipe.transformer.state_dict().items():
        assert torch.equal(base[k], w), k
    b = [p for name, p in state.student.transformer.named_parameters() if ".lora_B." in name]
    assert len(b) > 50 and all(p.any() for p in b)
    of_student = {k: v for k, v in saved.items() if k.startswith(("student.", "student_opt.", "ema.")) and v.numel() > 1}
    assert sum(v.numel() for v in of_student.values()) == 4 * size      # weights, two moments, average
    assert {v.dtype for v in of_student.values()} == {torch.float32}
    assert all(torch.equal(v, mean) for v, mean in zip((saved[f"ema.{k}"] for k in range(2 * len(b))), state.ema.mean))


def test_a_lora_run_ends_in_a_whole_student_and_in_the_lora_alone(adapted, pipe, model, tmp_path):
    from zimage import export
    z, cond = batch(pipe, "a cat", "two cats")
    t = torch.tensor([1.0, 0.4])
    with torch.no_grad(), adapted.state.averaged() as student:
        want, times = student(z, t, cond), ladd.step_times((1, 0.75, 0.5, 0.25), 4)
        sampled = ladd.sample_euler(student, z, times, cond)
        merged = adapter.load_transformer(adapted.run / "student", torch.float32)
        torch.testing.assert_close(ZImageVelocity(merged)(z, t, cond), want, rtol=1e-4, atol=1e-5)
        other = adapter.load_pipeline(model, torch.float32, CPU)
        untrained = ZImageVelocity(other.transformer)(z, t, cond)
        other.load_lora_weights(adapted.run / "lora")
        torch.testing.assert_close(ZImageVelocity(other.transformer)(z, t, cond), want, rtol=1e-4, atol=1e-5)
        assert (want - untrained).abs().max() > 0.01
    assert not torch.equal(adapted.state.ema.mean[1], list(adapted.state.student.parameters())[1])          # the average was saved, not these
    assert export.main([str(adapted.run), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    stock = adapter.load_pipeline(tmp_path / "out", torch.float32, CPU)
    made = stock(["a cat", "two cats"], latents=z, height=64, width=96, num_inference_steps=4, guidance_scale=0, output_type="latent").images
    torch.testing.assert_close(made, sampled, rtol=0, atol=1e-4)


def test_a_lora_run_killed_and_resumed_is_never_killed(adapted, model, data, tmp_path):
    half_done(adapted.run, tmp_path)
    assert distil(model, data, tmp_path, "a", "--iterations", "6", "--checkpoint-every", "3", "--resume") == 0
    a, b = checkpoint(adapted.run), checkpoint(tmp_path / "a")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, before any weight is loaded, and no run's folder
# ---------------------------------------------------------------------------------------------------------------------

def rewritten(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flipped(path, place):
    """One bit of the byte at place is another."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


def weights(model, part="transformer"):
    return next((model / part).glob("*.safetensors"))


def cut(path, size=100):
    path.write_bytes(path.read_bytes()[:-size])


def without_a_weight(model):
    from safetensors.torch import load_file, save_file
    tensors = load_file(weights(model))
    tensors.pop("layers.2.feed_forward.w1.weight")
    save_file(tensors, weights(model), {"format": "pt"})


BAD_MODEL = {       # what is done to the model's folder, and what the line must say
    "empty": (lambda m: [shutil.rmtree(m), m.mkdir()], "no readable model_index.json"),
    "another pipeline": (lambda m: rewritten(m / "model_index.json", _class_name="FluxPipeline"), "a FluxPipeline, not a ZImagePipeline"),
    "no transformer": (lambda m: shutil.rmtree(m / "transformer"), "transformer/config.json can't be read"),
    "no weights": (lambda m: weights(m).unlink(), "transformer/ holds no safetensors"),
    "no JSON": (lambda m: (m / "transformer" / "config.json").write_text("{"), "transformer/config.json can't be read"),
    "no width": (lambda m: rewritten(m / "transformer" / "config.json", dim="wide"), "transformer/config.json makes no transformer"),
    "a layer less": (lambda m: rewritten(m / "transformer" / "config.json", n_layers=3), "do not fit its transformer/config.json, layers.3."),
    "a weight less": (without_a_weight, "1 weights do not fit its transformer/config.json, layers.2.feed_forward.w1.weight first"),
    "cut off": (lambda m: cut(weights(m)), "diffusion_pytorch_model.safetensors: damaged or cut off"),
    "cut off in its header": (lambda m: weights(m).write_bytes(weights(m).read_bytes()[:50]), "damaged or cut off (cut off in its header)"),
    "no text encoder": (lambda m: shutil.rmtree(m / "text_encoder"), "text_encoder/ is missing or empty"),
    "other weights": (lambda m: flipped(weights(m), -5), "made by another model"),
    "another text encoder": (lambda m: flipped(weights(m, "text_encoder"), -5), "made by another model"),
    "no VAE": (lambda m: shutil.rmtree(m / "vae"), "the VAE can't be loaded"),
    "a damaged VAE": (lambda m: cut(weights(m, "vae")), "the VAE can't be loaded"),
}
BAD_DATA = {        # the same for the data's folder
    "no folder": (shutil.rmtree, "manifest.json: can't be read"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json: can't be read"),
    "no JSON": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: can't be read (not JSON)"),
    "another kind": (lambda d: rewritten(d / "manifest.json", kind="photographs"), "not a 'zimage data' manifest"),
    "a shard is gone": (lambda d: (d / "shard-00001.safetensors").unlink(), "1 of 4 shards are missing, shard-00001.safetensors the first; go on"),
    "a shard is cut off": (lambda d: cut(d / "shard-00002.safetensors"), "shard-00002.safetensors: cut off or damaged"),
    "a shard of other data": (lambda d: rewritten(d / "shard-00000.json", made_of={}), "shard-00000.safetensors: belongs to other data"),
}
BAD_OPTIONS = [
    (["--taps", "9"], "taps = ['9']: 9 is no layer of this transformer; give some of 0 .. 3"), (["--taps=-1"], "-1 is no layer"),
    (["--taps", "1,x"], "x is no layer"), (["--taps", "01"], "01 is no layer"), (["--taps", ""], "none given"),
    (["--taps", "1,1"], "name each module once"),
    (["--batch", "6", "--micro-batch", "4"], "--micro-batch 4: give a number that divides batch / ranks = 6"),
    (["--recipe", "zimage-clip"], "holds no vector 'clip', only qwen"),
    (["--recipe", "toy"], "zimage, zimage-clip, zimage-lora"),
    (["--judge-samples", "100"], "unrecognized arguments: --judge-samples 100"), (["--distill-weight", "1"], "--distill-weight"),
    (["--toy"], "--toy and --zimage: give one of them"), (["--dtype", "float16"], "invalid choice: 'float16'"),
    (["--text-vector", "t5"], "text_vector = 't5': choose from qwen, clip"), (["--lora-rank", "-1"], "lora_rank = -1: give a value from 0 to 1024"),
    (["--lora-rank", "1.5"], "lora_rank = '1.5': give int values"),
    (["--lora-rank", "4", "--teacher-sharded"], "--teacher-sharded: a LoRA student uses the teacher's own weights"),
]


def refused(capsys, out, argv, says):
    capsys.readouterr()
    assert ladd.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ladd: ") and says in lines[0], lines
    assert not list(out.glob("*")), "half a run's folder"


@pytest.fixture
def nothing_loads(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")
    monkeypatch.setattr(fsdp, "build", fail)


@pytest.mark.parametrize("what, case", [*(("model", c) for c in BAD_MODEL), *(("data", c) for c in BAD_DATA)])
def test_a_bad_folder_is_refused_in_one_line(what, case, model, data, tmp_path, capsys, nothing_loads):
    folders = {"model": model, "data": data}
    folders[what] = Path(shutil.copytree(folders[what], tmp_path / what))
    spoil, says = (BAD_MODEL if what == "model" else BAD_DATA)[case]
    spoil(folders[what])
    refused(capsys, tmp_path / "out", job(folders["model"], folders["data"], tmp_path / "out")[1:], says)


@pytest.mark.parametrize("options, says", BAD_OPTIONS)
def test_a_bad_option_is_refused_in_one_line(options, says, model, data, tmp_path, capsys, nothing_loads):
    refused(capsys, tmp_path, job(model, data, tmp_path, *options)[1:], says)


@pytest.fixture
def no_hub(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


def test_a_job_without_data_or_model_is_told_where_to_get_them(model, data, tmp_path, capsys, no_hub, nothing_loads):
    tell = ["--zimage", "--out", str(tmp_path), "--device", "cpu"]
    refused(capsys, tmp_path, tell, "--data: name the folder of the teacher's latents; make one by python -m zimage.precompute")
    refused(capsys, tmp_path, [*tell, "--data", str(data)], "--model Tongyi-MAI/Z-Image: no such folder, and the hub gave none (OSError)")


def test_a_batch_that_the_ranks_cannot_share_is_refused(model, data, tmp_path, capsys, monkeypatch, nothing_loads):
    monkeypatch.setattr(ladd, "ranks", lambda: 3), monkeypatch.setattr(ladd, "from_first", lambda make: make())
    for options, says in ((["--batch", "4"], "batch = 4: give a multiple of the 3 ranks"),
                          (["--batch", "2"], "batch = 2: give a multiple of the 3 ranks"),
                          (["--batch", "12", "--micro-batch", "3"], "--micro-batch 3: give a number that divides batch / ranks = 4")):
        monkeypatch.setattr("sys.stderr", stderr := io.StringIO())
        assert ladd.main(job(model, data, tmp_path, *options)[1:]) == 2
        assert stderr.getvalue().startswith("ladd (rank 0): ") and says in stderr.getvalue() and stderr.getvalue().count("\n") == 1
    assert not list(tmp_path.glob("*"))


def test_a_damaged_shard_is_found_before_the_run_has_a_folder(model, data, tmp_path, capsys):
    """Its checksum is read with its first sample: here with the first batch."""
    made = Path(shutil.copytree(data, tmp_path / "data"))
    for shard in made.glob("*.safetensors"):
        flipped(shard, -5)
    refused(capsys, tmp_path / "out", job(model, made, tmp_path / "out")[1:], "damaged (its checksum differs from its .json); run its precompute")


def test_a_run_goes_on_with_its_own_data_alone(alone, model, data, tmp_path, capsys):
    half_done(alone, tmp_path)
    other = Path(shutil.copytree(data, tmp_path / "data"))
    for path in other.glob("*.json"):
        rewritten(path, made_of={**json.loads(path.read_text())["made_of"], "resolution": ["512x512"]})
    before = (tmp_path / "a" / "config.json").read_text()
    assert distil(model, other, tmp_path, "a", "--iterations", "6", "--resume") == 2
    assert "run a was made otherwise: latents.resolution = ['512x512'] (was ['64x64', '96x64']); start a new run" in capsys.readouterr().err
    assert (tmp_path / "a" / "config.json").read_text() == before
    assert distil(model, data, tmp_path, "a", "--sample", "--steps", "2") == 2
    assert f"--sample: for Z-Image it is python -m zimage.sample {tmp_path / 'a'} --steps 2" in capsys.readouterr().err


def test_turbo_is_warned_of_by_its_name_on_the_hub(model, data, tmp_path, capsys, monkeypatch, nothing_loads):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(model))
    for name, warned in (("Tongyi-MAI/Z-Image-Turbo", True), ("Tongyi-MAI/Z-Image", False)):
        assert ladd.main(job(name, data, tmp_path, "--taps", "9")[1:]) == 2        # told before the refusal
        assert (f"WARNING: {name} looks like Z-Image-Turbo" in capsys.readouterr().out) == warned


GB, BIG = 10 ** 9, 6_154_908_736        # Z-Image's weights
LORA_64 = 64 * (34 * (4 * 2 * 3840 + 3 * (3840 + 10240)))      # in 34 blocks, of a linear layer of r: r (inputs + outputs)


def heads_of(taps, width=256, told=2560 + 64, dim=3840):
    """Weights of heads on so many taps: per tap the embedding of what it is told, the first norm, two convolutions, FiLM, the output."""
    emb = 2 * width
    return taps * (told * emb + emb + emb * emb + emb + 2 * dim + 9 * dim * width + width + 9 * width * width + width
                   + emb * 4 * width + 4 * width + width + 1)


HEADS = heads_of(6)


@pytest.mark.parametrize("recipe, options, ranks, memory, checkpoints", [
    ("zimage", [], 1, 20 * BIG + 2 * BIG, 3 * 16 * BIG), ("zimage", ["--ema-half-life", "0"], 2, 16 * BIG / 2 + 2 * BIG, 3 * 12 * BIG),
    ("zimage", ["--ema-on-host", "--keep", "1"], 8, 16 * BIG / 8 + 2 * BIG, 2 * 16 * BIG), ("zimage", ["--teacher-sharded"], 8, 22 * BIG / 8, 3 * 16 * BIG),
    ("zimage-lora", [], 8, 20 * LORA_64 + 2 * BIG, 3 * 16 * LORA_64),
    ("zimage-lora", ["--ema-on-host", "--dtype", "float32"], 1, 16 * LORA_64 + 4 * BIG, 3 * 16 * LORA_64)])
def test_too_little_memory_or_disk_is_refused_to_the_byte(recipe, options, ranks, memory, checkpoints, tmp_path, capsys, monkeypatch):
    """The published size, of which no weight is made."""
    copies = 2 if "--keep" in options else 3
    memory, disk = memory + 16 * HEADS, checkpoints + copies * 12 * HEADS + (4 if "float32" in options else 2) * BIG
    monkeypatch.setattr(ladd, "ranks", lambda: ranks)
    with torch.device("meta"):
        from diffusers import ZImageTransformer2DModel
        whole = ZImageTransformer2DModel()
    world = zworld.ZImageWorld.__new__(zworld.ZImageWorld)
    parser = ladd.parser_for(zworld)
    world.options = parser.parse_args(["--zimage", "--out", str(tmp_path), *options])
    world.recipe = ladd.override(zworld.RECIPES[recipe], {"ema_half_life": 0.0} if "--ema-half-life" in options else {})
    world.device, world.dtype, world.cond_dim = torch.device("cuda"), getattr(torch, world.options.dtype or "bfloat16"), 2560

    def check(gpu, free):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=gpu))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
        world.check_memory(whole)
    check(memory + 1, disk)
    said = capsys.readouterr().out
    trained = LORA_64 if "lora" in recipe else BIG
    assert f"6.15B parameters, {trained / GB:.2f}B of them trained, on {ranks} ranks: {memory / GB:.1f} GB each" in said
    with pytest.raises(ladd.UserError, match=f"^--zimage: {memory / GB:.1f} GB are needed on each GPU before activations, and it has"):
        check(memory - 1, disk)
    with pytest.raises(ladd.UserError, match=f"^--out .*: {copies} checkpoints and the student take {disk / GB:.1f} GB and"):
        check(memory + 1, disk - 1)
    old = tmp_path / "old" / "checkpoints" / "step-0000001"             # a resumed run's own checkpoints will make room
    old.mkdir(parents=True)
    (old / "part").write_bytes(bytes(100))
    world.options.name, world.options.resume = "old", True
    check(memory + 1, disk - 100)


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_loaded(model, data, tmp_path, capsys, monkeypatch, nothing_loads):
    monkeypatch.setattr(ladd, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=1000))
    refused(capsys, tmp_path, job(model, data, tmp_path)[1:], "GB are needed on each GPU before activations, and it has 0.0: use more GPUs")


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks
# ---------------------------------------------------------------------------------------------------------------------

def job(model, data, out, *more):
    return ["ladd.py", "--zimage", "--model", str(model), "--data", str(data), "--out", str(out), "--name", "a", "--device", "cpu", *TINY,
            "--iterations", "6", "--checkpoint-every", "3", *more]


@pytest.fixture(scope="module")
def pair(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    done = torchrun(2, *job(model, data, out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "a", done


def test_two_ranks_make_the_steps_of_one(pair, alone):
    assert_same_training(checkpoint(pair[0]), checkpoint(alone), 0.1)
    a, b = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
             if "heads_loss" in line] for run in (pair[0], alone))
    assert [d["iteration"] for d in a] == [d["iteration"] for d in b]
    for one, two in zip(a, b):
        assert one.keys() == two.keys()
        for k in {"heads_loss", "student_loss", "student_grad_norm", "heads_grad_norm"} & one.keys():
            assert one[k] == pytest.approx(two[k], rel=0.02)


def test_a_checkpoint_of_two_ranks_goes_on_with_one(pair, alone, model, data, tmp_path):
    half_done(pair[0], tmp_path)
    assert distil(model, data, tmp_path, "a", "--iterations", "6", "--checkpoint-every", "3", "--resume") == 0
    assert_same_training(checkpoint(tmp_path / "a"), checkpoint(alone), 0.1)


def test_a_checkpoint_of_one_rank_goes_on_with_two_and_a_sharded_teacher(alone, model, data, tmp_path):
    half_done(alone, tmp_path)
    done = torchrun(2, *job(model, data, tmp_path, "--resume", "--teacher-sharded"))
    assert done.returncode == 0 and "step-0000003" in done.stdout, done.stderr[-3000:]
    assert_same_training(checkpoint(tmp_path / "a"), checkpoint(alone), 0.1)


def test_two_ranks_train_a_lora_as_one_does(adapted, model, data, tmp_path):
    """Judged by the Bs: the gradient of an A is a product with its B, and of that AdamW's first steps know the signs alone."""
    done = torchrun(2, *job(model, data, tmp_path, *LORA, "--iterations", "3"))
    assert done.returncode == 0, done.stderr[-3000:]
    half_done(adapted.run, tmp_path / "one")
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "one" / "a")
    trained = (name for name, p in adapted.state.student.transformer.named_parameters() if p.requires_grad)
    of_b = [k for k, name in enumerate(trained) if ".lora_B." in name]
    gradients = [f"student_opt.state.lora.{k}.exp_avg" for k in of_b]
    assert a.keys() == b.keys() and len(of_b) > 50 and all(b[k].any() for k in gradients)
    assert max(far(a[k], b[k]) for k in gradients) < 0.1
    one, two = (torch.cat([c[f"student.lora.{k}"].flatten() for k in of_b]) for c in (a, b))
    assert far(one, two) < 0.2


DRIVER = """
import os, signal, sys
import ladd
rank, step = int(os.environ["RANK"]), ladd.step

def troubled(state, world, recipe, terms, i, *rest):
    if rank == 1 and i == 1:
        {trouble}
    return step(state, world, recipe, terms, i, *rest)
ladd.step = troubled
sys.exit(ladd.main(sys.argv[1:]))
"""


def test_a_stop_that_one_rank_is_asked_for_ends_both_and_is_saved(model, data, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(trouble="os.kill(os.getpid(), signal.SIGTERM)"))
    done = torchrun(2, str(tmp_path / "driver.py"), *job(model, data, tmp_path)[1:], PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"ladd (rank {rank}): stopped after iteration 2, saved" in done.stderr, done.stderr[-3000:]
    assert ladd.newest_checkpoint(tmp_path / "a").name == "step-0000002"


def test_a_failure_on_one_rank_ends_both_with_its_message(model, data, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(trouble="raise ladd.UserError('the disk of rank 1 is full')"))
    done = torchrun(2, str(tmp_path / "driver.py"), *job(model, data, tmp_path)[1:], PYTHONPATH=str(ROOT))
    assert done.returncode != 0 and "ladd (rank 1): the disk of rank 1 is full" in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "a" / "student").exists()
