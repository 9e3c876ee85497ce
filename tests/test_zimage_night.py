"""The rehearsal before a long run, and the sweep over a night, on the tiny pipeline."""

import json
import statistics
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

import ladd
import tiny_zimage
from processes import forked
from tiny import start
from zimage import evaluate, plan, precompute, rehearse, sweep

TINY = "--taps 1,3 --head-width 16 --batch 4 --device cpu --dtype float32 --lr-warmup 0".split()
JUDGE = "--teacher-steps 2 --device cpu --dtype float32"


@pytest.fixture
def no_inception(monkeypatch):
    offline = Mock(side_effect=ladd.UserError("--features: no network"))
    monkeypatch.setattr(evaluate, "inception", offline)


def launch(gpus, words, log, until=None, real=rehearse.launch):
    """`rehearse.launch` in half its time. What is killed is a command of its own."""
    return real(gpus, words, log, until) if until else forked(gpus, words, log)


@pytest.mark.parametrize("gpus, recipe", [(1, "zimage-lora"), (2, "zimage-clip")])
def test_a_rehearsal_goes_the_whole_path(
    gpus, recipe, model, tmp_path, capsys, monkeypatch, no_inception
):
    def trace(*args, **settings):
        found = real_trace(*args, **settings)
        assert 1e6 < found.peak < 1e8 and found.flops > 1e6
        found.peak, found.flops = 7e9, 312e12 * gpus / 4  # a second at an A100's peak
        return found

    monkeypatch.chdir(Path(ladd.__file__).parent)
    monkeypatch.setattr(rehearse, "launch", launch)
    real_trace = plan.trace
    monkeypatch.setattr(plan, "trace", trace)
    options = ["--model", model, "--gpus", gpus, "--out", tmp_path / "all.png", "--recipe", recipe]
    if recipe == "zimage-clip":
        assert start(rehearse.main, *options, *TINY) == 2 and "-model" in capsys.readouterr().err
        options += ["--clip-model", tiny_zimage.save_clip(tmp_path / "clip")]
    assert start(rehearse.main, *options, *TINY, "--resolution", "32") == 0
    said, log = capsys.readouterr().out.splitlines(), (tmp_path / "all.log").read_text()
    assert said[-1] == "ready" and "KID: plumbing only" in said
    names = "precompute 16 prompts|4 iterations, SIGKILL|resume, 2 iterations|sample|KID|export"
    rows = {line[:28].strip(): line[28:].split()[2:] for line in said if line[28:38].strip()}
    assert list(rows)[1:8] == [*names.split("|"), "stock ZImagePipeline"]
    planned = [" ".join(row) for row in [*rows.values()][1:4]]
    assert planned == ["0.0 s - -", "16.0 s - 7.000", "8.0 s - 7.000"]
    assert f"by each of {gpus} ranks" in log and log.count("going on from") == 1
    assert [log.count(f"iteration {i} of 6") for i in (1, 2, 3, 4, 6)] == [1] * 5
    assert ", planned 4.00 s at 25 % of the peak of" in said[-3]
    assert {path.name for path in tmp_path.iterdir()} - {"clip"} == {"all.log", "all.png"}
    assert Image.open(tmp_path / "all.png").size == (3 * 300, 4 * 300)


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    log = tmp_path / "log"
    for code, says in {
        "import sys; print('ladd: no such tap', file=sys.stderr); sys.exit(2)": "no such tap",
        "raise ValueError('a broken stage')": "ValueError: a broken stage",
        "import os; os.kill(os.getpid(), 9)": "exit code -9",
    }.items():
        with pytest.raises(ladd.UserError, match=f"^{says}; see {log}"):
            rehearse.launch(1, ["-c", code], log)


def test_images_unlike_the_stock_pipelines_are_noticed(model, tmp_path):
    _, options, _ = ladd.parse(["--zimage", *TINY, "--resolution", "32"])
    for i in range(2):
        Image.new("RGB", (32, 32), (90, 128, 128)).save(tmp_path / f"{i:05d}.png")
    with pytest.raises(ladd.UserError, match="image 0: .* of 255 levels off the stock pipeline's"):
        rehearse.compare(model, tmp_path, ["a cat", "tea"], options, num_inference_steps=2)


@pytest.fixture
def night(model, tmp_path, monkeypatch):
    """A function that runs a sweep of two settings, with stand-ins for Inception, and returns
    (exit code, commands run). until: the number of commands before Ctrl-C."""
    (tmp_path / "prompts.txt").write_text("a cat\nan owl\ntea\na harbour in the evening\n")
    words = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "data"]
    assert start(precompute.main, *words, "--steps", 3, "--resolution", 32, *TINY[6:10]) == 0
    (tmp_path / "file").write_text("# two\nplain\n\nfast --student-lr 1e-2  # ten times\n")
    monkeypatch.setattr(evaluate, "inception", lambda *_: rehearse.stand_in)
    mean = ladd.mean_metrics
    monkeypatch.setattr(ladd, "mean_metrics", lambda window: {**mean(window), "peak_gb": 5.0})

    def run(*more, until=99):
        ran = []

        def launch(gpus, words, log):
            if len(ran) == until:
                raise KeyboardInterrupt
            ran.append([*map(str, words)])
            main = ladd.distil if words[0] == ladd.__file__ else evaluate.main
            assert start(main, *words[2 - (main is ladd.distil) :]) == 0

        monkeypatch.setattr(rehearse, "launch", launch)
        judge = f"--judge={JUDGE} --prompts {tmp_path / 'prompts.txt'}"
        options = [tmp_path / "file", "--out", tmp_path / "out", judge, "--data", tmp_path / "data"]
        return start(sweep.main, *options, "--iterations", 2, *TINY, *more), ran

    return run


def test_a_night_goes_on_where_it_was_stopped(night, tmp_path):
    two = "--seeds", "3,4"
    code, ran = night(*two, until=3)
    assert code == 130 and not (tmp_path / "out" / "results.tsv").exists()
    code, ran = night(*two)
    assert code == 0 and len(ran) == 6, "of eight commands two were done, as one line says"
    assert night(*two) == (0, [])
    lines = (tmp_path / "out" / "results.tsv").read_text().splitlines()
    rows = [dict(zip(sweep.COLUMNS, line.split("\t"), strict=True)) for line in lines[1:]]
    assert [row["name"] for row in rows] == ["plain", "fast"]
    for row in rows:
        runs = sorted((tmp_path / "out").glob(f"{row['name']}-*/report.json"))
        reports = [json.loads(path.read_text()) for path in runs]
        kid = [report["rows"][1]["kid_mean"] for report in reports]
        assert [report["conditions"]["seeds"] for report in reports] == [[3], [4]]
        assert {report["conditions"]["resolution"] for report in reports} == {"32x32"}  # the data's
        words = f"{statistics.mean(kid):.5f} +- {statistics.stdev(kid):.5f}"
        assert row["kid"] == words and row["gb"] == "5.00" and row["seeds"] == "3,4"
    assert "student-lr 1e-2" in rows[1]["settings"] and rows[0]["kid"] != rows[1]["kid"]
    shared = [*(tmp_path / "out" / "images").glob("teacher@2-*/*/*.png")]
    assert len(shared) == 3 * 4, "of seeds 3, 4 and 5, for all four runs"
    assert not [*(tmp_path / "out").glob("*/checkpoints")]
    code, (train,) = night("--seeds", "3,4,5", until=1)
    assert train[-2].startswith("plain-") and train[-2].endswith("-5"), "the new seed alone"
    assert (tmp_path / "out" / f"{train[-2][:-1]}4").is_dir()


def test_a_setting_is_kept_if_it_is_better_by_more_than_the_spread(night, tmp_path, monkeypatch):
    kid = {"plain": (0.1, 0.3, 0.2), "fast": (0.5, 0.1, 0.3)}  # 0.2 +- 0.1, and 0.3 +- 0.2

    def figures(run, words, recipe, seed, options):
        name = run.name.split("-")[0]
        ladd.check(name in kid, "it did not train")
        return kid[name][seed], 0.4, 0, 60.0 + seed

    monkeypatch.setattr(sweep, "figures", figures)
    with open(tmp_path / "file", "a") as f:
        f.write("\nbad --seed 3\n")
    assert night()[0] == 2
    text = (tmp_path / "out" / "results.tsv").read_text()
    lines = [line.split("\t") for line in text.split("\n")]
    ends = [line[5:] for line in lines[1:3]]
    assert ends[0] == ["0.20000 +- 0.10000", "0.40000", "-", "61", "kept"]
    assert ends[1] == ["0.30000 +- 0.20000", "0.40000", "-", "61", "dropped"] and len(lines) == 4
    for count in (6, 6):  # figures by another judge stand beside, once
        night(f"--judge={JUDGE}")
        assert len((tmp_path / "out" / "results.tsv").read_text().split("\n")) == count


def test_a_night_that_cannot_be_is_refused_before_it(night, tmp_path, capsys, no_inception):
    for text, says in {
        "a --no-such 3": "--no-such",
        "a\na --seed 3": "a stands there twice",
        "a/b": "--name a/b",
        "a": "no network",
    }.items():
        (tmp_path / "file").write_text(text)
        assert night() == (2, []) and says in capsys.readouterr().err
