"""Z-Image's benchmark on a tiny random model: its table, its counts and its refusals."""

import dataclasses
import json
import types

import pytest
import tiny_zimage
import torch

import ladd
from zimage import bench
from zimage.world import ZIMAGE, ZImageWorld

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--config", "tiny", "--iterations", "1", "--resolution", "32", "--tokens", "20"]


@pytest.fixture(autouse=True)
def no_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def tiny_world(**changes):
    recipe = dataclasses.replace(ZIMAGE, taps=("1", "3"), head_width=8, batch=2)
    world = bench.RandomWorld(bench.skeleton("tiny"), recipe, CPU, **{**dict(side=4, tokens=20, checkpointing=True, ema_device=None), **changes})
    return world, ladd.State(world, recipe, CPU), recipe


def test_a_tiny_model_on_the_cpu(tmp_path, monkeypatch, capsys):
    real, steps = ladd.step, []

    def step(state, world, recipe, terms, i, device):
        steps.append((recipe.batch, ladd.updates_student(recipe, i), state.student.transformer.gradient_checkpointing,
                      world.teacher.transformer.gradient_checkpointing))
        return real(state, world, recipe, terms, i, device)
    monkeypatch.setattr(ladd, "step", step)
    out = tmp_path / "bench.json"
    assert bench.main([*QUICK[:2], *QUICK[4:], "--batches", "2,1", "--out", str(out)]) == 0
    said, made = capsys.readouterr().out, json.loads(out.read_text())
    assert "the full size needs a GPU" in said

    cases = [(batch, on) for on in (True, False) for batch in (1, 2)]
    assert steps == [(batch, student, on, on) for batch, on in cases for student in (False, True) for _ in range(bench.WARM + 1)]
    assert [(row["batch"], row["checkpointing"], row["compiled"]) for row in made["rows"]] == [(batch, on, False) for batch, on in cases]
    for row in made["rows"]:
        for kind, forwards in (("heads", 3), ("student", 6)):
            f = row[kind]
            assert f["forwards"] == forwards and f["seconds"] > 0 and "peak" not in f
            want = forwards * row["batch"] * made["forward_flops"] / f["seconds"] / made["matmul_flops_per_second"]
            assert f["utilisation"] == pytest.approx(want) and f"{f['seconds']:.4g} | - | {want:.4g} |" in said
    assert made["forwards_per_student_update"] == {"3": 12, "1": 6} and "at 3 of the heads takes 12 F, at 1 it takes 6 F" in said
    took = made["sampling"]
    assert took["possible"] == 25 and min(took["teacher_seconds"], took["student_seconds"]) > 0
    assert took["ratio"] == pytest.approx(took["teacher_seconds"] / took["student_seconds"])
    assert made["device"].startswith("CPU") and made["torch"] == torch.__version__ and made["dtype"] == "float32"
    assert "ESTIMATE" in said and "27.7 GB (16.9)" in said and "hours" not in made["estimate"]       # 6.155e9 (20/8 + 2) and (20/8 + 2/8)


def test_the_forwards_are_counted_where_they_are_made(monkeypatch):
    world, state, recipe = tiny_world()
    real = ladd.features
    monkeypatch.setattr(ladd, "features", lambda *args: (real(*args), real(*args))[1])          # a teacher run twice as often as need be
    assert bench.measure(world, state, recipe, "heads", 1)["forwards"] == 1 + 2 * 2
    assert bench.measure(world, state, recipe, "student", 1)["forwards"] == 3 + 2 * (1 + 2)


@pytest.mark.parametrize("config, side, tokens", [("tiny", 4, 20), ("tiny", 18, 100), ("full", 64, 128)])
def test_flops_of_a_pass(config, side, tokens):
    """Against a count by hand: a block's four projections, its gated feed-forward, attention, and the layers around the blocks."""
    model = bench.skeleton(config)
    d, blocks, refiners, c = (model.config[k] for k in ("dim", "n_layers", "n_refiner_layers", "cap_feat_dim"))
    image, caption = (-(-n // 32) * 32 for n in ((side // 2) ** 2, tokens))
    ada, both = min(d, 256), image + caption
    block = lambda n: n * (4 * d * d + 3 * d * int(d / 3 * 8)) + 2 * n * n * d
    macs = blocks * (block(both) + 4 * d * ada) + refiners * (block(image) + 4 * d * ada + block(caption))
    macs += image * 64 * d + caption * c * d + both * d * 64 + ada * d + 256 * 1024 + 1024 * ada
    assert bench.forward_flops(model, side, tokens) == 2 * macs


def test_what_runs_out_of_memory_is_a_row(tmp_path, monkeypatch, capsys):
    """With the configuration of a model folder that holds no weights."""
    folder = tiny_zimage.save(tmp_path / "model")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    real, worlds, made = ladd.step, [], bench.RandomWorld.__init__

    def step(state, world, recipe, terms, i, device):
        if world.options.no_checkpointing and recipe.batch > 1 and ladd.updates_student(recipe, i):
            raise torch.OutOfMemoryError("no room")
        return real(state, world, recipe, terms, i, device)
    monkeypatch.setattr(ladd, "step", step)
    monkeypatch.setattr(bench, "WARM", 0)
    monkeypatch.setattr(bench.RandomWorld, "__init__", lambda self, *args: worlds.append(args[-2]) or made(self, *args))
    out = tmp_path / "bench.json"
    assert bench.main([*QUICK[:2], *QUICK[4:], "--model", str(folder), "--batches", "1,2,4", "--out", str(out)]) == 0
    rows = {(row["checkpointing"], row["batch"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 6 and all("seconds" in row["heads"] for row in rows.values())
    assert [rows[False, batch]["student"].get("note") for batch in (1, 2, 4)] == [None, "out of memory", "out of memory (at 2 already)"]
    assert all("seconds" in rows[True, batch]["student"] for batch in (1, 2, 4))
    assert worlds == [True, True, False, False]         # for sampling, each variant's, and anew after the failure
    assert "| 2 | no | no | " in (said := capsys.readouterr().out) and "| out of memory | - | - |" in said


def test_a_compiler_that_fails_costs_its_own_rows_alone(tmp_path, monkeypatch):
    def fails(self, student):
        raise ValueError("no compiler\nof any kind")
    monkeypatch.setattr(ZImageWorld, "compile", fails)
    monkeypatch.setattr(bench, "WARM", 0)
    out = tmp_path / "bench.json"
    assert bench.main([*QUICK, "--compile", "--batches", "1,2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["compiled"] for row in rows] == [False] * 4 + [True] * 4
    for row in rows:
        assert all((f.get("note") == "not compiled: no compiler") == row["compiled"] == ("seconds" not in f) for f in (row["heads"], row["student"]))


def test_student_and_teacher_begin_alike():
    world, state, _ = tiny_world()
    for (name, p), q in zip(world.teacher.named_parameters(), state.student.parameters()):
        assert torch.equal(p, ladd.local(q)) and p.isfinite().all() and (p.abs().max() > 0 or name.endswith("bias"))


@pytest.mark.parametrize("option, kept", [((), []), (("--ema", "host"), ["cpu"])], ids=str)
def test_no_average_is_kept_unless_asked_for(monkeypatch, option, kept):
    found, usual = [], ladd.State

    def state(*args):
        found.append(sorted({mean.device.type for mean in usual(*args).ema.mean}))
        raise ladd.UserError("seen")
    monkeypatch.setattr(ladd, "State", state)
    assert bench.main([*QUICK, *option]) == 2 and found == [kept]


def test_the_estimate():
    def row(batch, heads, student, activations):
        return {"batch": batch, "checkpointing": True, "compiled": False, "heads": {"utilisation": heads},
                "student": {"utilisation": student, "activations": activations}}
    rows = [row(2, 0.5, 0.5, 1e9), row(4, 0.8, 0.4, 2e9), row(4, 0.9, 0.9, 60e9), row(8, 0.9, 0.9, 3e9)]     # the last two do not fit
    figures, words = bench.estimate(6e9, 10e12, rows)
    # 32 samples on 8 GPUs are 4; three iterations: 2 x 3 F at 0.8 and 6 F at 0.4 of 250e12
    seconds = 20_000 / 3 * 4 * 10e12 * (6 / 0.8 + 6 / 0.4) / 250e12
    assert figures["hours"] == pytest.approx(seconds / 3600) and figures["batch"] == 4
    assert figures["bytes_with_activations"] == pytest.approx(6e9 * (16 + 4) / 8 + 6e9 * 2 + 2e9)
    assert f"= {seconds / 3600:.1f}, without what the GPUs send each other" in words


def test_too_large_for_this_gpu(monkeypatch, capsys):
    cuda, n = types.SimpleNamespace(type="cuda"), 6_154_908_736
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (141e9, 150e9))
    bench.check_size("--config full", n, cuda)
    assert "6.15B parameters: 110.8 GB before activations, of 141.0 free" in capsys.readouterr().out        # 98.5 and the teacher's 12.3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
    with pytest.raises(ladd.UserError, match="110.8 GB are needed before activations, and this GPU has 80.0 free"):
        bench.check_size("--config full", n, cuda)


@pytest.mark.parametrize("argv, line", [
    (["--device", "cpu", "--config", "full"], "--config full: 6.15B parameters need a GPU"),
    (["--config", "huge"], "argument --config: invalid choice: 'huge'"),
    (["--config", "tiny", "--model", "x"], "not allowed with argument"),
    ([*QUICK, "--batches", "0,1"], "--batches '0,1'"),
    ([*QUICK, "--batches", "one"], "--batches 'one'"),
    ([*QUICK, "--iterations", "0"], "--iterations 0: give at least 1"),
    ([*QUICK, "--resolution", "40"], "--resolution 40: give a multiple of 16"),
    ([*QUICK, "--resolution", "0"], "--resolution 0: give a multiple of 16"),
    ([*QUICK, "--resolution", "2048"], "from 16 to 1024"),
    ([*QUICK, "--tokens", "513"], "--tokens 513: give 1 to 512"),
    ([*QUICK, "--tokens", "0"], "--tokens 0: give 1 to 512"),
    ([*QUICK, "--ema", "device"], "argument --ema: invalid choice"),
    (["--model", "nowhere"], "--model nowhere: no such folder"),
    ([*QUICK, "--out", "nowhere/bench.json"], "--out nowhere/bench.json: can't be written"),
    ([*QUICK, "--out", "."], "--out .: can't be written"),
])
def test_bad_options(argv, line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "RandomWorld", lambda *args: pytest.fail("began to work"))
    assert bench.main(argv) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1 and said.startswith("zimage.bench: ")


def test_under_torchrun_it_refuses(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert bench.main(QUICK) == 2 and "without torchrun" in capsys.readouterr().err
