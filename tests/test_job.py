"""Whole jobs through the command line, with a tiny random teacher beside the shipped judge."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import ladd
from test_core import kind_of
from toy_mnist import report, world
from toy_mnist.edm import CUNet, time_grid
from toy_mnist.judge import WEIGHTS

TINY = ["--iterations", "4", "--batch", "4", "--samples", "20", "--teacher-steps", "3", "--guidance-low", "0", "--guidance-high", "1", "--head-width", "8", "--warmup", "1",
        "--lr-warmup", "1", "--student-lr", "1e-3", "--head-lr", "2e-3", "--log-every", "1"]


def make_teacher(folder):
    """A teacher of random weights, with copies of the shipped judge and its reference."""
    torch.manual_seed(0)
    net = CUNet(width=8, emb=32)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)                             # the zero-initialised layers too
    ladd.save_weights(folder / "teacher.safetensors", net.state_dict(), {"kind": "toy teacher", "config": {**net.config, "sigma_data": 0.6}})
    for path in [*WEIGHTS.glob("judge.*"), *WEIGHTS.glob("reference.*")]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def job(weights, out):
    """job(*options) -> (exit code, what it printed): a run of the tiny recipe into `out`."""
    def run(*options, tiny=TINY):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = ladd.main(["--toy", "--device", "cpu", "--weights", str(weights), "--out", str(out), "--judge-samples", "200", *tiny, *options])
        return code, printed.getvalue()
    return run


@pytest.fixture(scope="module")
def plain(job):
    """plain(name, *options) -> the student's file, of a run that ends when its student is written: no pictures, no table."""
    def run(name, *options, **more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "write", lambda *args: None)
            patch.setattr(report, "draw_start", lambda *args: None)
            assert job("--name", name, "--evaluate-every", "0", *options, **more)[0] == 0
    return run


@pytest.fixture(scope="module")
def full(job, out):
    """The one complete run: (its folder, what it printed)."""
    code, printed = job("--name", "full", "--evaluate-every", "2", "--checkpoint-every", "3")
    assert code == 0
    return out / "full", printed


@pytest.fixture(scope="module")
def uninterrupted(plain, out):
    plain("whole", "--checkpoint-every", "3")
    return out / "whole"


def student(run):
    return (run / "student.safetensors").read_bytes()


def metrics(run):
    """metrics.jsonl without its clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# ---- one complete run -------------------------------------------------------------------------------------------------

def test_a_run_leaves_its_files(full):
    run, _ = full
    for name in ("start.png", "report.png", "samples/0000002.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 60 and len(image.getcolors(2 ** 24)) > 20
    assert {p.name for p in run.iterdir()} == {"start.png", "config.json", "metrics.jsonl", "samples", "checkpoints", "student.safetensors",
                                               "student.json", "best.safetensors", "best.json", "report.json", "report.md", "report.png"}
    best, points = json.loads((run / "best.json").read_text()), [m for m in metrics(run) if "fid@1" in m]
    scores = {m["iteration"]: (m["fid@1"] + m["fid@2"] + m["fid@4"]) / 3 for m in points}
    assert best["score"] == pytest.approx(min(scores.values())) and scores[best["iteration"]] == min(scores.values())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-0000003", "step-0000004"]
    assert not list(run.parent.rglob("*.part"))


def test_config_holds_recipe_drift_data_and_versions(full, weights):
    config = json.loads((full[0] / "config.json").read_text())
    assert config["world"] == "toy" and config["recipe"]["batch"] == 4 and config["recipe"]["student_lr"] == 1e-3
    assert config["drift"]["samples"] == [world.REFERENCE.samples, 20] and "beta2" not in config["drift"]
    assert config["data"]["teacher"] == json.loads((weights / "teacher.json").read_text())["sha256"]
    assert config["data"]["teacher_steps"] == 3 and config["torch"] == torch.__version__ and {"python", "commit"} <= set(config)


def test_metrics_have_a_line_per_iteration_and_a_judged_point(full):
    lines = metrics(full[0])
    training = [l for l in lines if "heads_loss" in l]
    assert [l["iteration"] for l in training] == [1, 2, 3, 4]
    assert ["student_loss" in l for l in training] == [False, True, True, True]       # never the first: the heads know nothing yet
    assert all(f"accuracy/{tap}" in l for l in training for tap in world.TAPS)
    judged, = (l for l in lines if "fid@4" in l)
    assert judged["iteration"] == 2 and {"fid@2", "fid@1", "accuracy@4", "hue_entropy@1"} <= set(judged)


def test_the_report_has_every_row_with_its_cost(full):
    made = json.loads((full[0] / "report.json").read_text())
    rows = {r["name"]: r for r in made["rows"]}
    assert {"teacher@3", "teacher@4", "DPM-Solver++@4", "student@4", "student@2", "student@1"} <= set(rows)
    assert len(rows) == len(made["rows"])
    for row in rows.values():
        assert {"steps", "nfe", "fid", "kid", "accuracy", "hue_entropy", "ms_per_image"} <= set(row)
        assert row["n"] == 200 and row["fid"] > 0 and 0 <= row["accuracy"] <= 1 and 0 <= row["hue_entropy"] <= 1 and row["ms_per_image"] > 0
    evaluations = {name: rows[name]["nfe"] for name in ("teacher@3", "teacher@4", "DPM-Solver++@4", "student@4", "student@2", "student@1")}
    assert evaluations == {"teacher@3": 6, "teacher@4": 8, "DPM-Solver++@4": 8, "student@4": 4, "student@2": 2, "student@1": 1}    # guided: two each
    assert rows["teacher@4"]["fid"] == min(r["fid"] for name, r in rows.items() if name.startswith("teacher@4"))
    assert made["ratios"]["student@4 / teacher@3"] == pytest.approx(rows["student@4"]["fid"] / rows["teacher@3"]["fid"])


def test_the_report_says_what_it_is(full):
    run, printed = full
    made = json.loads((run / "report.json").read_text())
    assert made["smaller"] is True and made["judge_samples"] == 200
    for text in (printed, (run / "report.md").read_text()):
        assert "smaller run" in text.lower() and "iterations 4" in text
        assert "student@4" in text and "DPM-Solver++@4" in text
    assert "departs from the reference recipe" in printed and f"samples = 20 (not {world.REFERENCE.samples})" in printed


def test_the_student_file_is_a_trained_network_of_the_teachers_shape(full, weights):
    trained, teacher = load_file(full[0] / "student.safetensors"), load_file(weights / "teacher.safetensors")
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in teacher.items()}
    assert all(v.isfinite().all() for v in trained.values())
    assert sum(not torch.equal(trained[k], teacher[k]) for k in teacher) > 0.9 * len(teacher)
    about = json.loads((full[0] / "student.json").read_text())
    assert about["kind"] == "toy student" and about["recipe"]["iterations"] == 4


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sample_draws_a_grid_of_the_finished_run(full, job, steps):
    code, printed = job("--sample", "--name", "full", "--steps", str(steps), tiny=[])
    path = full[0] / f"sample-{steps}.png"
    assert code == 0 and str(path) in printed
    with Image.open(path) as image:
        assert image.size == (10 * 30 + 2, 6 * 30 + 2) and len(image.getcolors(2 ** 24)) > 20


def test_a_sample_has_as_many_steps_as_the_student_knows_where_none_are_named(uninterrupted, job, out, tmp_path):
    shutil.copytree(uninterrupted, out / "two-times")
    config = json.loads((out / "two-times" / "config.json").read_text())
    config["recipe"].update(times=[1.0, 0.5], time_probs=[0.5, 0.5], warmup_probs=[0.5, 0.5])
    ladd.write_json(out / "two-times" / "config.json", config)
    code, printed = job("--sample", "--name", "two-times", tiny=[])
    assert code == 0 and "sample-2.png" in printed


def test_samples_at_one_two_and_four_steps_differ(full):
    assert len({(full[0] / f"sample-{s}.png").read_bytes() for s in (1, 2, 4)}) == 3


# ---- the same run again -----------------------------------------------------------------------------------------------

def test_one_seed_gives_one_student_and_another_seed_another(uninterrupted, plain, out):
    plain("same", "--checkpoint-every", "3")
    plain("other seed", "--checkpoint-every", "3", "--seed", "1")
    assert student(out / "same") == student(uninterrupted) != student(out / "other seed")
    assert metrics(out / "same") == metrics(uninterrupted)


def test_deterministic_changes_nothing_on_the_cpu(plain, out):
    plain("as-usual")
    try:
        plain("deterministic", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (out / "as-usual/student.safetensors").read_bytes() == (out / "deterministic/student.safetensors").read_bytes()


def test_evaluation_leaves_the_student_as_it_is(uninterrupted, full):
    assert student(uninterrupted) == student(full[0])
    assert metrics(uninterrupted) == [l for l in metrics(full[0]) if "fid@4" not in l]


def test_checkpoints_leave_the_student_as_it_is(uninterrupted, plain, out):
    """Even one after iteration 0, when the student's optimizer has not yet stepped."""
    plain("often", "--checkpoint-every", "1")
    assert student(out / "often") == student(uninterrupted)


class Killed(BaseException):
    """As kill -9 is: nothing in the run handles it."""


def test_killed_at_a_checkpoint_and_resumed_is_never_killed(uninterrupted, plain, out, monkeypatch):
    save = ladd.save_checkpoint

    def save_and_die(run, step, *args, **more):
        save(run, step, *args, **more)
        raise Killed
    monkeypatch.setattr(ladd, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        plain("killed", "--checkpoint-every", "3")
    assert not (out / "killed" / "student.safetensors").exists()
    monkeypatch.setattr(ladd, "save_checkpoint", save)
    plain("killed", "--resume", "--checkpoint-every", "3", tiny=[])
    assert student(out / "killed") == student(uninterrupted)
    assert metrics(out / "killed") == metrics(uninterrupted)


def test_killed_before_the_first_checkpoint_and_resumed_is_never_killed(uninterrupted, plain, out, monkeypatch):
    def die(*args, **more):
        raise Killed
    monkeypatch.setattr(ladd, "save_checkpoint", die)
    with pytest.raises(Killed):
        plain("early", "--checkpoint-every", "3")
    monkeypatch.undo()
    plain("early", "--resume", "--checkpoint-every", "3", tiny=["--log-every", "1"])
    assert student(out / "early") == student(uninterrupted)
    assert metrics(out / "early") == metrics(uninterrupted)             # no line twice


@pytest.fixture
def heard():
    """Ctrl-C as a program in the foreground hears it; a shell's background job is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_job_that_is_stopped_outside_its_training_ends_with_one_line(job, monkeypatch, capsys, out, heard, number):
    before = signal.getsignal(number)
    monkeypatch.setattr(world.ToyWorld, "prepare", lambda self: os.kill(os.getpid(), number))
    code, _ = job("--name", "unborn")
    error = capsys.readouterr().err
    assert code == 130 and "ladd: stopped; the same command goes on" in error and "Traceback" not in error
    assert signal.getsignal(number) == before and not (out / "unborn").exists()


@pytest.mark.parametrize("after", [0, 1])
def test_a_terminated_run_saves_says_how_to_go_on_and_goes_on(uninterrupted, plain, job, out, monkeypatch, capsys, after):
    step = ladd.step

    def step_and_signal(state, world, recipe, terms, i, *args):
        if i == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, world, recipe, terms, i, *args)
    name, handler = f"terminated-{after}", signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ladd, "step", step_and_signal)
    monkeypatch.setattr(report, "draw_start", lambda *args: None)
    code, _ = job("--name", name, "--evaluate-every", "0", "--log-every", "1")
    assert code == 130 and f"--resume --name {name}" in capsys.readouterr().err
    assert [p.name for p in (out / name / "checkpoints").iterdir()] == [f"step-{after + 1:07d}"]
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.setattr(ladd, "step", step)
    plain(name, "--resume", tiny=["--log-every", "1"])
    assert student(out / name) == student(uninterrupted)


def test_a_cut_off_checkpoint_is_passed_over_with_a_line(uninterrupted, plain, out, capsys):
    copied = out / "cut"
    shutil.copytree(uninterrupted, copied)
    (copied / "student.safetensors").unlink()
    data = next((copied / "checkpoints" / "step-0000004").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    plain("cut", "--resume", "--checkpoint-every", "3", tiny=["--log-every", "1"])
    assert "step-0000004" in capsys.readouterr().err
    assert student(copied) == student(uninterrupted)


def test_a_recorded_config_is_a_recipe(uninterrupted, plain, out):
    plain("again", "--recipe", str(uninterrupted / "config.json"), tiny=[])
    assert student(out / "again") == student(uninterrupted)
    configs = [json.loads((out / name / "config.json").read_text()) for name in ("again", "whole")]
    assert configs[0] == configs[1]


def test_the_papers_recipe_by_name(plain, out):
    given = ["--recipe", "paper", "--iterations", "2", "--batch", "4", "--samples", "20", "--teacher-steps", "3"]
    plain("paper", tiny=given)
    expected = ladd.override(world.PAPER, {"iterations": 2, "batch": 4, "samples": 20, "teacher_steps": 3})
    assert ladd.override(world.PAPER, json.loads((out / "paper" / "config.json").read_text())["recipe"]) == expected


def test_every_variant_trains(plain, out):
    plain("variants", "--iterations", "2", "--loss", "relativistic", "--gradient-penalty", "1", "--approximate-r1", "1", "--misaligned", "0.5",
          "--distill-weight", "1", "--score-weight", "1", "--backward-simulation", "true", "--paired-share", "0.5", "--r1-weight", "1",
          "--heads-see-t", "true", "--time-probs", "0.25,0.25,0.25,0.25")
    last = metrics(out / "variants")[-1]
    assert {"distill_loss", "score_loss", "r1"} <= set(last) and last["skipped"] == 0


def test_a_compiled_run_is_the_same_run(plain, out, monkeypatch):
    """With a backend that traces the network but writes no code."""
    graphs, short = [], ["--iterations", "2", "--distill-fresh", "0", "--backward-simulation", "false"]
    plain("not compiled", *short)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph.forward))
    plain("compiled", "--compile", *short)
    assert graphs and metrics(out / "compiled") == [pytest.approx(line, rel=1e-3, abs=1e-3) for line in metrics(out / "not compiled")]
    a, b = (load_file(out / name / "student.safetensors") for name in ("compiled", "not compiled"))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_a_number_that_another_run_takes_meanwhile_is_left_to_it(plain, job, tmp_path, monkeypatch):
    prepare = world.ToyWorld.prepare

    def meanwhile(self):
        for name in ("001", "002.part"):
            (tmp_path / name).mkdir()
        prepare(self)
    monkeypatch.setattr(world.ToyWorld, "prepare", meanwhile)
    monkeypatch.setattr(report, "write", lambda *args: None), monkeypatch.setattr(report, "draw_start", lambda *args: None)
    code, printed = job("--out", str(tmp_path), "--iterations", "1", "--evaluate-every", "0")
    assert code == 0 and f"run {tmp_path / '003'} on cpu" in printed and (tmp_path / "003" / "student.safetensors").exists()
    assert not list((tmp_path / "001").iterdir()) and not list((tmp_path / "002.part").iterdir())


def test_a_run_without_a_name_is_numbered(plain, job, out, weights, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *args: None)
        patch.setattr(report, "draw_start", lambda *args: None)
        (tmp_path / "007").mkdir(), (tmp_path / "seven").mkdir()
        for name in ("008", "009"):
            assert job("--out", str(tmp_path), "--iterations", "1", "--evaluate-every", "0")[0] == 0
            assert (tmp_path / name / "student.safetensors").exists()


# ---- the cache of samples ---------------------------------------------------------------------------------------------

@pytest.fixture
def toy(weights, tmp_path):
    """toy(*options) -> a ToyWorld whose cache is in tmp_path."""
    def make(*options):
        given = ladd.parser_for(world).parse_args(["--toy", "--weights", str(weights), "--out", str(tmp_path), "--judge-samples", "200", *TINY, *options])
        return world.make_world(ladd.resolve_recipe(world, given), given, torch.device("cpu"))
    return make


def test_the_teachers_samples_are_made_once_per_setting(toy, monkeypatch):
    first = toy()
    first.prepare()
    made = []
    monkeypatch.setattr(world.ToyWorld, "run_sampler", lambda self, *args: made.append(args) or (torch.zeros(len(args[2]), 3, 28, 28), {"nfe": 1, "ms_per_image": 1}))
    again = toy("--student-lr", "5e-4", "--seed", "3")                  # not what the samples are made of
    again.prepare()
    assert not made and torch.equal(again.x0, first.x0) and torch.equal(again.labels, first.labels)
    for other in (["--guidance", "2"], ["--teacher-steps", "4"], ["--samples-seed", "2"]):
        toy(*other).prepare()
    assert sum(len(args[2]) == 20 for args in made) == 3


def test_samples_of_other_shares_of_labels_or_another_kind_of_device_have_their_own_cache(toy, weights, tmp_path):
    """Labels are drawn by the judge's shares, and not stored: with others, the cached samples would be told wrong ones."""
    first = toy()
    first.prepare()
    shutil.copytree(weights, tmp_path / "weights")
    for name in ("judge", "reference"):
        rewritten(tmp_path / "weights" / f"{name}.json", lambda about: about["figures"].update(class_share=[0.0] * 9 + [1.0]))
    other = toy("--weights", str(tmp_path / "weights"))
    other.prepare()
    assert set(other.labels.tolist()) == {9} and len(set(first.labels.tolist())) > 3 and not torch.equal(other.x0, first.x0)
    on_gpu = toy()
    on_gpu.device = torch.device("cuda")
    assert on_gpu.cache_path("samples") != first.cache_path("samples") and on_gpu.fingerprint() == first.fingerprint() != other.fingerprint()


def test_a_look_at_the_student_repeats_whatever_was_drawn_before(toy, tmp_path):
    made, seen = toy(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        seen.append((made.watch(made.teacher, tmp_path / "look.png"), (tmp_path / "look.png").read_bytes(), made.sample_grid(made.teacher, 2, "sample")))
    (a, picture, grid), (b, again, same) = seen
    assert a == b and picture == again and torch.equal(grid, same) and {"fid@4", "accuracy@1"} <= a.keys()


def test_cached_samples_are_what_their_noise_leads_to(toy):
    made = toy()
    made.prepare()
    x0, label, noise = made.read(0, 20)
    again = made.sample_teacher(made.teacher, noise, label).clamp(-1, 1)
    torch.testing.assert_close(again, x0, rtol=0, atol=0.02)            # bfloat16 in another batch
    assert len(set(label.tolist())) > 3


def test_cached_samples_of_other_settings_are_refused(uninterrupted, job, out, capsys):
    path, = (p for p in (out / "cache").glob("*.json") if json.loads(p.read_text())["made_of"].items() >= {"samples": 20, "guidance_low": 0}.items())
    text = path.read_text()
    about = json.loads(text)
    about["made_of"]["guidance"] = 7.0
    path.write_text(json.dumps(about))
    try:
        code, _ = job("--name", "stale")
    finally:
        path.write_text(text)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and path.with_suffix("").name in error and not (out / "stale").exists()


def test_the_teachers_samples_are_guided_as_the_recipe_says(toy):
    """Euler on EDM's grid, written out: none + w (given - none) for t in [low, high], the given label alone elsewhere."""
    made = toy("--guidance", "3", "--guidance-low", "0.2", "--guidance-high", "0.9", "--teacher-steps", "5")
    noise, label = made.draw_noise(4, "guided")
    times = time_grid(5)
    x, guided = times[0] * noise, 0
    with torch.no_grad():
        for t, after in zip(times, [*times[1:], 0.0]):
            v, none = (made.teacher(x, torch.full((4,), t), y) for y in (label, torch.full((4,), 10)))
            if 0.2 <= t <= 0.9:
                v, guided = none + 3 * (v - none), guided + 1
            x = x + (after - t) * v
    assert guided in (1, 2, 3)
    torch.testing.assert_close(made.sample_teacher(made.teacher, noise, label), x, rtol=1e-4, atol=1e-4)


def test_damaged_cached_samples_are_refused(toy):
    made = toy()
    made.teacher_samples("samples", 20)
    path = made.cache_path("samples")
    about_path, whole, said = path.with_suffix(".json"), path.read_bytes(), path.with_suffix(".json").read_bytes()
    tensors, about = ladd.load_weights(path, "toy samples", "made_of", "cost")
    again = lambda tensors: ladd.save_weights(path, tensors, {k: v for k, v in about.items() if k not in ("schema", "sha256")})
    for harm in (lambda: damaged(path.parent, path.name, "flipped"), lambda: damaged(path.parent, path.name, "empty"), lambda: path.unlink(),
                 lambda: again({"x0": tensors["x0"][:19]}), lambda: again({"x1": tensors["x0"]}), lambda: about_path.write_bytes(b"\xff\xfe"),
                 lambda: about_path.write_bytes(said[:-9]), lambda: rewritten(about_path, lambda a: a.update(kind="toy judge")),
                 lambda: rewritten(about_path, lambda a: a.pop("cost")), lambda: rewritten(about_path, lambda a: a.update(cost=3)),
                 lambda: rewritten(about_path, lambda a: a.pop("made_of")), lambda: rewritten(about_path, lambda a: a["made_of"].update(device="cuda")),
                 lambda: rewritten(about_path, lambda a: a["made_of"].update(class_share=[0.1] * 10))):
        harm()
        with pytest.raises(ladd.UserError, match=path.name) as error:
            made.teacher_samples("samples", 20)
        assert "\n" not in str(error.value)
        path.write_bytes(whole), about_path.write_bytes(said)
        assert torch.equal(made.teacher_samples("samples", 20)[0], tensors["x0"])


def test_cut_off_cached_samples_are_refused(uninterrupted, job, out, capsys):
    path, = (p.with_suffix(".safetensors") for p in (out / "cache").glob("*.json") if json.loads(p.read_text())["made_of"].items() >= {"samples": 20, "guidance_low": 0}.items())
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    try:
        code, _ = job("--name", "short")
    finally:
        path.write_bytes(data)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and path.name in error and not (out / "short").exists()


# ---- bad input --------------------------------------------------------------------------------------------------------

def refused(code, capsys, *words):
    """Exit code 2 and exactly one line on stderr, which holds the words."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("ladd: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    return error


BAD = {
    "unknown option": (["--nonsense", "1"], ["--nonsense"]),
    "unknown abbreviation": (["--iter", "3"], ["--iter"]),
    "below the range": (["--batch", "0"], ["batch", "0", "1"]),
    "above the range": (["--beta1", "1.5"], ["beta1", "1.5", "0.9999"]),
    "not a number": (["--head-lr", "fast"], ["lr", "fast"]),
    "nan": (["--student-lr", "nan"], ["student_lr", "nan"]),
    "not a choice": (["--loss", "best"], ["loss", "best", "hinge"]),
    "not a flag's value": (["--share-noise", "perhaps"], ["noise", "perhaps"]),
    "probabilities that miss 1": (["--time-probs", "0.5,0.1,0.1,0.1"], ["time_probs", "sum to 1"]),
    "too few probabilities": (["--time-probs", "0.5,0.5"], ["time_probs", "4"]),
    "rising times": (["--times", "0.25,0.5,0.75,1"], ["times"]),
    "head width": (["--head-width", "12"], ["head_width", "12"]),
    "one sample": (["--batch", "1"], ["batch", "--i-know"]),
    "one sample per pass": (["--micro-batch", "1"], ["micro-batch", "--i-know"]),
    "passes that do not fill the batch": (["--micro-batch", "3"], ["--micro-batch", "3", "4"]),
    "passes of no sample": (["--micro-batch", "0"], ["micro-batch", "0"]),
    "slow heads": (["--head-lr", "1e-3"], ["head_lr", "student_lr", "--i-know"]),
    "a tap that is not there": (["--taps", "enc.1,enc.9"], ["enc.9"]),
    "no tap": (["--taps", ""], ["taps"]),
    "unknown recipe": (["--recipe", "best"], ["--recipe best", "toy", "paper"]),
    "unknown device": (["--device", "abacus"], ["--device abacus"]),
    "few judged images": (["--judge-samples", "10"], ["--judge-samples", "200"]),
    "too many judged images": (["--judge-samples", "9" * 30], ["--judge-samples", "1,000,000"]),
    "no whole number of judged images": (["--judge-samples", "1e3"], ["--judge-samples"]),
    "guidance that holds nowhere": (["--guidance-low", "0.9", "--guidance-high", "0.1"], ["guidance_low = 0.9"]),
    "an alarm that never sounds": (["--least-diversity", "nan"], ["--least-diversity nan"]),
    "a diversity below 0": (["--least-diversity", "-0.1"], ["--least-diversity"]),
    "a diversity in words": (["--least-diversity", "much"], ["--least-diversity"]),
    "no step between lines": (["--log-every", "0"], ["--log-every 0", "1"]),
    "no checkpoint to keep": (["--keep", "0"], ["--keep 0", "1"]),
    "judging before the start": (["--evaluate-every", "-1"], ["--evaluate-every"]),
    "a huge pass": (["--micro-batch", "9" * 30], ["--micro-batch"]),
    "unknown log": (["--log", "diary"], ["--log", "diary"]),
    "an option without a value": (["--batch"], ["--batch"]),
    "a word too many": (["again"], ["again"]),
    "two worlds": (["--zimage"], ["--toy and --zimage"]),
    "a recipe that is a folder": (["--recipe", "/"], ["--recipe /", "toy, paper"]),
    "a recipe that is no text": (["--recipe", str(WEIGHTS / "teacher.safetensors")], ["--recipe", "UnicodeDecodeError"]),
    "a recipe of another schema": (["--recipe", str(WEIGHTS / "teacher.json")], ["--recipe", "KeyError"]),
    "weights that are a file": (["--weights", str(WEIGHTS / "teacher.json")], ["teacher.safetensors"]),
    "a name of two lines": (["--name", "a\nb"], ["--name"]),
    "unknown features": (["--fid", "eye"], ["--fid", "eye"]),
    "no step between checkpoints": (["--checkpoint-every", "0"], ["--checkpoint-every", "0"]),
    "a name with a folder": (["--name", "a/b"], ["--name"]),
    "a name that leaves": (["--name", ".."], ["--name"]),
    "no such weights": (["--weights", "/nowhere/at/all"], ["/nowhere/at/all", "teacher.safetensors"]),
    "resume without a name": (["--resume"], ["--name"]),
    "resume what is not there": (["--resume", "--name", "absent"], ["absent"]),
    "sample what is not there": (["--sample", "--name", "absent"], ["absent"]),
}


@pytest.mark.parametrize("options, words", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_run(job, capsys, tmp_path, options, words):
    code, _ = job("--out", str(tmp_path / "runs"), *options)
    refused(code, capsys, *words)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def bad_words(field):
    """What each field of the recipe must refuse on the command line: neither of its kind nor, where it has a range, in it."""
    kind, meta = kind_of(field), field.metadata
    if kind is str and not meta["choices"]:
        return ["", ",", "no.such,enc.1", "enc.1,enc.1", "[]"]          # names of modules
    words = ["", " ", "text", "nan", "inf", "-inf", "1e999", "9" * 400, "-" + "9" * 400, "[]", "{}", "null", "None", "0x10", "1,2,3,4,5,6,7,8,9", "\u00e9", "\0", "1;2"]
    words += ["1.5", "true"] if kind is int else ["2", "1.0", "0"] if kind is bool else ["true"]
    if meta["low"] is not None:
        words += [repr(meta["low"] - 1), repr(meta["high"] * 2 + 1)]
    if kind is not field.type:
        count = len(field.default)
        words += [",".join([w] * count) for w in words if "," not in w] + [",".join(map(repr, field.default[1:])), "," * count]
    return words


@pytest.mark.parametrize("field", dataclasses.fields(world.ToyRecipe), ids=lambda f: f.name)
def test_no_word_is_taken_for_a_value_that_it_is_not(job, capsys, tmp_path, field):
    for word in bad_words(field):
        code, _ = job("--out", str(tmp_path), f"--{field.name.replace('_', '-')}={word}")
        assert len(refused(code, capsys, field.name)) < 2000, word
    assert not list(tmp_path.iterdir())


def test_no_world_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(ladd.main(["--iterations", "3"]), capsys, "--toy")
    assert not list(tmp_path.iterdir())
    assert ladd.main([]) == 2 and "--toy" in capsys.readouterr().out    # no words at all: the help


def test_an_existing_name_is_refused(uninterrupted, job, capsys):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    refused(job("--name", "whole")[0], capsys, "whole", "--resume")
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == before


def test_an_out_that_cannot_be_written_is_refused(job, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for below in ("file", "file/deeper"):
        refused(job("--out", str(tmp_path / below))[0], capsys, "--out", str(tmp_path / below))
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("steps", ["9", "5", "0", "-1"])
def test_steps_that_the_student_does_not_know_are_refused(full, job, capsys, steps):
    refused(job("--sample", "--name", "full", "--steps", steps, tiny=[])[0], capsys, f"--steps {steps}", "1 .. 4")
    assert not (full[0] / f"sample-{steps}.png").exists()


def test_an_unfinished_run_has_no_samples(uninterrupted, job, out, capsys):
    (out / "unfinished").mkdir()
    shutil.copy(uninterrupted / "config.json", out / "unfinished")
    refused(job("--sample", "--name", "unfinished", tiny=[])[0], capsys, "unfinished", "--resume")


def rewritten(path, change):
    """A JSON file after change(its contents), or a list where change returns one."""
    about = json.loads(path.read_text())
    changed = change(about)
    path.write_text(json.dumps(changed if isinstance(changed, list) else about))


@pytest.mark.parametrize("change", [lambda a: a.pop("config"), lambda a: a.update(config=3), lambda a: a["config"].pop("sigma_data"), lambda a: a["config"].update(width="8"),
                                    lambda a: a["config"].update(sigma_data="half"), lambda a: a["config"].update(width=16), lambda a: a.update(schema=2),
                                    lambda a: a.update(kind="toy judge"), lambda a: a.update(sha256=""), lambda a: [a], lambda a: a.pop("schema")], ids=range(11))
def test_a_teacher_that_says_other_things_of_itself_is_refused(job, weights, capsys, tmp_path, change):
    shutil.copytree(weights, tmp_path / "weights")
    rewritten(tmp_path / "weights" / "teacher.json", change)
    refused(job("--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "runs"))[0], capsys, "teacher.safetensors")
    assert not list((tmp_path / "runs").iterdir())


def damaged(folder, name, how):
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    else:                                                               # one bit, at the same length
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name, how", [("teacher.safetensors", "missing"), ("teacher.safetensors", "empty"), ("teacher.safetensors", "cut off"),
                                       ("teacher.safetensors", "flipped"), ("teacher.json", "missing"), ("teacher.json", "cut off"),
                                       ("teacher.json", "empty"), ("judge.safetensors", "cut off"), ("reference.safetensors", "missing")])
def test_damaged_weights_are_refused(job, weights, capsys, tmp_path, name, how):
    shutil.copytree(weights, tmp_path / "weights")
    damaged(tmp_path / "weights", name, "cut off" if how == "cut off" else how)
    if name.endswith(".json") and how == "cut off":
        damaged(tmp_path / "weights", name, how)                        # its last byte is only a line's end
    code, _ = job("--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "runs"))
    refused(code, capsys, str(tmp_path / "weights" / name).rsplit(".", 1)[0])
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", "{\"recipe\": 3}", "{\"recipe\": {\"colour\": 3}}", "{\"recipe\": {\"batch\": \"many\"}}"])
def test_a_file_that_is_no_recipe_is_refused(job, capsys, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(job("--recipe", str(tmp_path / "config.json"), "--out", str(tmp_path / "runs"), tiny=[])[0], capsys)


def test_one_sample_trains_with_i_know(plain, out):
    plain("alone", "--batch", "1", "--iterations", "2", "--i-know")
    assert metrics(out / "alone")[-1]["iteration"] == 2


def test_micro_batches_are_parts_of_one_batch(plain, out, monkeypatch):
    monkeypatch.setattr(ladd, "autocast", lambda *args, **more: contextlib.nullcontext())       # bfloat16 rounds by batch
    plain("joint", "--iterations", "2")
    plain("parts", "--iterations", "2", "--micro-batch", "2")
    for joint, parts in zip(metrics(out / "joint"), metrics(out / "parts"), strict=True):
        for key in {"heads_loss", "student_loss", "heads_grad_norm", "student_grad_norm"} & set(joint):
            assert parts[key] == pytest.approx(joint[key], rel=1e-3)


def test_noise_for_real_samples_is_refused(job, capsys, out, monkeypatch):
    noise = torch.randn(20, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(world.ToyWorld, "prepare", lambda self: None)
    monkeypatch.setattr(world.ToyWorld, "read", lambda self, start, count: (noise[:count], torch.zeros(count, dtype=torch.long), noise[:count]))
    refused(job("--name", "noise")[0], capsys, "noise", "--i-know")
    assert not (out / "noise").exists()
    for name in ("draw_start", "finish"):
        monkeypatch.setattr(world.ToyWorld, name, lambda self, *args: None)
    assert job("--name", "noise", "--i-know")[0] == 0
    shutil.rmtree(out / "noise" / "checkpoints")
    code, printed = job("--name", "noise", "--resume", tiny=[])         # it was said once
    assert code == 0 and "no whole checkpoint: training starts over" in printed


def test_a_resume_under_another_recipe_is_refused(uninterrupted, job, out, capsys):
    shutil.copytree(uninterrupted, out / "changed")
    refused(job("--name", "changed", "--resume", "--student-lr", "5e-4", tiny=[])[0], capsys, "student_lr", "--i-know")


BAD_RUNS = {"config cut off": ("config.json", lambda p: p.write_bytes(p.read_bytes()[:200])), "config empty": ("config.json", lambda p: p.write_text("")),
            "config no text": ("config.json", lambda p: p.write_bytes(b"\xff\0")), "config a folder": ("config.json", lambda p: p.unlink() or p.mkdir()),
            "config a list": ("config.json", lambda p: p.write_text("[]")), "no data": ("config.json", lambda p: rewritten(p, lambda c: c.pop("data"))),
            "data a list": ("config.json", lambda p: rewritten(p, lambda c: c.update(data=[1]))),
            "other data": ("config.json", lambda p: rewritten(p, lambda c: c["data"].update(teacher="0" * 64))),
            "no recipe": ("config.json", lambda p: rewritten(p, lambda c: c.pop("recipe"))),
            "a recipe of another world": ("config.json", lambda p: rewritten(p, lambda c: c["recipe"].update(text_vector="clip"))),
            "a recipe out of range": ("config.json", lambda p: rewritten(p, lambda c: c["recipe"].update(batch=-1))),
            "a log that is a folder": ("metrics.jsonl", lambda p: p.unlink() or p.mkdir()), "no such checkpoint": ("checkpoints", lambda p: None)}


@pytest.mark.parametrize("name, harm", BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_damaged_run_is_not_resumed(uninterrupted, job, tmp_path, capsys, name, harm):
    shutil.copytree(uninterrupted.parent / "cache", tmp_path / "cache"), shutil.copytree(uninterrupted, tmp_path / "run")
    harm(tmp_path / "run" / name)
    options = ["--iterations", "3"] if name == "checkpoints" else []     # it has come to 4 already
    before = (tmp_path / "run" / "config.json").is_file() and (tmp_path / "run" / "config.json").read_bytes()
    refused(job("--out", str(tmp_path), "--name", "run", "--resume", *options, tiny=[])[0], capsys, "iterations = 3" if options else "")
    if name != "metrics.jsonl" and before:
        assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert student(tmp_path / "run") == student(uninterrupted)


def test_a_resume_with_another_teacher_is_refused(uninterrupted, weights, job, plain, out, capsys, tmp_path):
    shutil.copytree(weights, tmp_path / "weights")
    tensors, about = ladd.load_weights(weights / "teacher.safetensors", kind="toy teacher")
    ladd.save_weights(tmp_path / "weights" / "teacher.safetensors", {k: v + 0.01 for k, v in tensors.items()},
                      {k: about[k] for k in ("kind", "config")})
    refused(job("--name", "whole", "--resume", "--weights", str(tmp_path / "weights"), tiny=[])[0], capsys, "teacher", "--i-know")
    shutil.copytree(uninterrupted, out / "another-teacher")             # told so, the run is from then on one of that teacher
    again = ["another-teacher", "--resume", "--weights", str(tmp_path / "weights"), "--iterations"]
    plain(*again, "5", "--i-know", tiny=[])
    plain(*again, "6", tiny=[])


def test_a_finished_run_may_go_on_for_longer(uninterrupted, plain, out):
    shutil.copytree(uninterrupted, out / "longer")
    plain("longer", "--resume", "--iterations", "6", tiny=["--log-every", "1"])
    assert [l["iteration"] for l in metrics(out / "longer")] == [1, 2, 3, 4, 5, 6]
    assert student(out / "longer") != student(uninterrupted)


def test_a_run_from_before_a_field_was_added_goes_on(uninterrupted, plain, out):
    """What its config.json lacks had its default, which is off."""
    shutil.copytree(uninterrupted, out / "older")
    config = json.loads((out / "older" / "config.json").read_text())
    assert config["recipe"].pop("approximate_r1") == 0
    ladd.write_json(out / "older" / "config.json", config)
    plain("older", "--resume", "--iterations", "6", tiny=["--log-every", "1"])
    assert [l["iteration"] for l in metrics(out / "older")] == [1, 2, 3, 4, 5, 6]


def test_a_log_that_is_not_installed_is_refused(job, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *args: None)
    refused(job("--log", "wandb", "--out", str(tmp_path))[0], capsys, "--log wandb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["4", "1", "3"])
def test_every_row_of_the_table_has_its_own_name(toy, monkeypatch, steps):
    made = toy("--teacher-steps", steps)
    monkeypatch.setattr(made, "run_sampler", lambda *args: (torch.zeros(len(args[2]), 3, 28, 28), {"nfe": 1, "ms_per_image": 1}))
    monkeypatch.setattr(made, "judge", lambda x, label: {"fid": 1.0})
    made.prepare()
    names = [row["name"] for row in report.table_rows(made, made.teacher)]
    assert sorted(names) == sorted(set(names)) and f"teacher@{steps}" in names


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        ladd.main(["--toy", "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(world.ToyRecipe):
        assert "--" + field.name.replace("_", "-") in printed
    for option in ("--name", "--resume", "--sample", "--micro-batch", "--judge-samples", "--i-know"):
        assert option in printed


def test_the_file_run_as_a_program_prints_one_line(tmp_path):
    done = subprocess.run([sys.executable, Path(ladd.__file__), "--toy", "--batch", "0", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("ladd: batch = 0") and done.stderr.count("\n") == 1
