"""What the README says holds: its commands, links and figures; and the sizes of the files."""

import ast
import importlib
import itertools
import math
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_zimage
import torch
from torch import nn

import faults
import ladd
from toy_mnist import tables
from toy_mnist.settings import SETTINGS
from zimage import evaluate

ROOT = Path(ladd.__file__).parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = tables.read_lines(ROOT / "toy_mnist" / "results.jsonl")
COMMANDS = re.findall(r"^ {4}((?:pip|python|torchrun) .*)$", README, re.M)


def programs(command):
    """The programs that a line of the README starts: (module, words) of each."""
    for part in command.split(" && "):
        words = shlex.split(part, comments=True)
        if words[0] == "pip":
            assert (ROOT / words[words.index("-r") + 1]).exists(), part
        else:  # python or torchrun, their options, a file or module, its words
            k = next(k for k in range(1, len(words)) if not words[k].startswith("-"))
            yield words[k].removesuffix(".py").replace("/", "."), words[k + 1 :]


INSTALLED = "ladd.py --toy", "-m pytest"  # what a newcomer runs first
FLAGS = "--toy", "--zimage", "--sample", "--resume"
TOY = "--iterations 2 --batch 4 --samples 8 --teacher-steps 2 --judge-samples 200 --device cpu"
SMALLER = {  # what follows the words of the README's commands
    "ladd --toy": TOY,
    "ladd --toy --sample": "",
    "ladd --toy --resume": "--judge-samples 200",
    "toy_mnist.benchmark": f"{TOY} --seeds 1 --results results.jsonl",
    "zimage.curate": "--write 20 --held-out 4",
    "zimage.precompute": "--model model --resolution 32 --steps 2 --device cpu",
    "ladd --zimage": "--taps 0,2 --head-width 8 --iterations 1 --batch 2 --device cpu",
    "zimage.evaluate": "--seeds 0 --device cpu",
    "zimage.export": "",
}


def test_the_commands_run_with_sizes_reduced(tmp_path, monkeypatch):
    """All but those that install or test, one after another in an empty folder. MNIST: made up."""
    digits = torch.zeros(22_100, 28, 28).byte(), torch.arange(22_100) % 10
    monkeypatch.setattr("toy_mnist.world.load_mnist", lambda root: digits)
    monkeypatch.chdir(tmp_path)
    all_steps = ladd.sample_euler  # four of them are enough here
    monkeypatch.setattr(ladd, "sample_euler", lambda v, x, t, *more: all_steps(v, x, t[:4], *more))
    monkeypatch.setattr(evaluate, "inception", lambda *_: lambda x: x[:, :, ::8, ::8].flatten(1))
    tiny_zimage.save(tmp_path / "model")
    ran = set()
    assert {f"pip install -r requirements.txt && python {k}" for k in INSTALLED} <= {*COMMANDS}
    for module, words in itertools.chain(*map(programs, COMMANDS)):
        kind = " ".join([module, *[w for w in words if w in FLAGS]])
        if module != "pytest":
            words = [*words, *SMALLER[kind].split()]
            assert ladd.run_command_line(importlib.import_module(module).main, words) == 0, words
            ran.add(kind)
    assert ran == SMALLER.keys()
    assert "| student@" in (tmp_path / "z-image-4-steps" / "README.md").read_text()


class Teacher(nn.Module):
    """A teacher of vectors [B, 4], as a reader of the README may bring one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, x_t, t, cond):
        return self.body(torch.cat([x_t, t[:, None]], 1))


def test_a_world_of_ones_own_trains_as_it_stands(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    names = {"teacher": Teacher().requires_grad_(False), "data": torch.randn(100, 4)}
    exec(code.replace("iterations=500", "iterations=2"), names)
    assert names["x0"].shape == (16, 4) and max(ladd.checkpoints(tmp_path / "runs/mine")) == 2


def test_the_ring_of_docs_is_distilled_and_drawn(tmp_path, monkeypatch):
    """In another folder, a part of its iterations: the game alone brings one step to the ring."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    code = (ROOT / "docs" / "own_model.py").read_text()
    assert code[: code.index("# ---- The picture")].count("\n") <= 61
    exec(code.replace("iterations=1000", "iterations=300").replace("400, 900", "200"), names := {})
    by_teacher = ladd.sample_student(names["teacher"], names["recipe"], names["noise"], None, 1)
    far = [float((x.norm(dim=1) - 1).abs().mean()) for x in (names["seen"][200][1], by_teacher)]
    assert far[0] < 0.1 and far[1] > 0.7
    assert (tmp_path / "docs" / "own_model.png").stat().st_size > 20_000
    assert not (tmp_path / "runs").exists()


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if "://" in name:
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_table_of_results_is_drawn_from_the_benchmarks_runs():
    """Mean and standard deviation over the seeds; a ratio is of the means."""
    names = {"teacher, 50 steps": ("teacher@50", 850), "`toy`": ("baseline", 850)}
    names |= {"real digits": ("real-data", 850), "`ladd`": ("ladd", 1500)}
    shown = "fid", "accuracy", "hue_entropy"
    lines = [d for d in LINES if d["budget"]["samples_seed"] == 2]
    made = [(d, (d["setting"], d["budget"]["iterations"])) for d in lines]
    runs = {k: {d["seed"]: d for d, name in made if name == v} for k, v in names.items()}
    teacher = runs["teacher, 50 steps"]
    for name, made in runs.items():
        columns = []
        for steps in next(iter(made.values()))["fid"]:
            fid, *others = ([d[key][steps] for d in made.values()] for key in shown)
            ratio = sum(fid) / sum(d["fid"]["50"] for d in teacher.values())
            means = [f"{statistics.fmean(values):.3f}".lstrip("0") for values in others]
            spread = f"{statistics.fmean(fid):.2f} ± {statistics.stdev(fid):.2f}"
            columns.append([spread, f"{ratio:.2f}", *means])
        row = " | ".join([f"| {name}", *map(" / ".join, zip(*columns, strict=True))]) + " |"
        assert row in README.splitlines() and len(made) == 5, row
    assert not any(line.get("collapsed") for line in lines)
    faster = [d["fid"].values() for d in lines if d["budget"]["iterations"] == 400]
    means = " / ".join(f"{statistics.fmean(values):.2f}" for values in zip(*faster, strict=True))
    assert f"it trains for 7 (four seeds: FID {means})" in README and len(faster) == 4


def test_each_measured_run_stands_in_the_log():
    log = (ROOT / "docs" / "experiments.md").read_text()
    runs = [d for d in LINES if d["budget"]["judge_samples"] == 10_000 and "4" in d["fid"]]
    assert len(runs) >= 16
    for d in runs:
        figures = d["seed"], *(f"{d['fid'][k]:.2f}" for k in "421")
        assert "| {} | {} | {} | {} |".format(*figures) in log, figures
    for setting in ("ladd", "baseline", "adversarial-0"):  # at equal images
        of = [d for d in runs if (d["setting"], d["budget"]["iterations"]) == (setting, 1500)]
        fid = [[d["fid"][k] for d in of if d["seed"] <= 3] for k in "421"]
        means = " / ".join(f"{statistics.fmean(values):.2f}" for values in fid)
        assert means in " ".join(README.split()) and len(fid[0]) == 3, (setting, means)


def test_what_departures_are_worth_is_drawn_from_the_benchmarks_runs():
    budget = next(line["budget"] for line in LINES if line["setting"] == "paired-0")
    shown = re.findall(r"`([\w-]+)`: × (\d+\.\d+) / (\d+\.\d+) / (\d+\.\d+)", README)
    assert len(shown) >= 5 and budget["iterations"] * budget["batch"] == 19_200
    for name, *ratios in shown:
        runs, others = (tables.found(LINES, SETTINGS[k], budget) for k in (name, "baseline"))
        logs = [tables.log_ratios(runs, others, steps) for steps in "421"]
        assert ratios == [f"{math.exp(statistics.mean(d)):.2f}" for d in logs], name
        assert len(runs) == 3, name


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120 and len(README.encode()) <= 14 * 1024


@pytest.mark.parametrize("words", [["format", "--check"], ["check"]], ids=" ".join)
def test_ruff_is_content(words):
    command = [sys.executable, "-m", "ruff", *words, "--no-cache", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def lines_of(pattern):
    return sum(len(path.read_text().splitlines()) for path in ROOT.glob(pattern))


def test_the_files_keep_to_their_budgets():
    assert lines_of("ladd.py") <= 1234
    assert lines_of("toy_mnist/*.py") <= 1700 and lines_of("zimage/*.py") <= 2200
    assert lines_of("tests/*.py") - lines_of("tests/faults.py") <= 4500
    assert not any("fmt: " + "off" in path.read_text() for path in ROOT.rglob("*.py"))


def test_the_method_can_be_read_from_the_top():
    text = (ROOT / "ladd.py").read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    length = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: n for name, n in length.items() if n > 50} == {}
    assert length["train_step"] <= 40 and length["main"] <= 25
    assert all(length[name] <= 30 for name in length if name.endswith(("_loss", "_penalty")))
    assert text[: text.index("backward()")].count("\n") + 1 < 480


def test_the_planted_faults_still_fit_the_code():
    assert (ROOT / "docs" / "faults.md").read_text() == faults.page()  # or draw it: --write
    count = [(ROOT / fault.file).read_text().count(fault.old) for fault in faults.FAULTS]
    assert [faults.FAULTS[k].what for k in range(len(count)) if count[k] != 1] == []
    assert not any(fault.old == fault.new for fault in faults.FAULTS)
    planted = [fault.defect for fault in faults.FAULTS]
    assert len(planted) >= 56 and planted.count(0) >= 20
    assert all(planted.count(defect) >= 2 for defect in faults.DEFECTS)
    for fault in faults.FAULTS:
        file, name = fault.test.split("[")[0].rsplit("::", 1)
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), fault.test
