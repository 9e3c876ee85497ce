"""The README's commands, run as they stand there in a copy of the project; the long ones with tiny options appended."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ladd
from test_toy import mnist_root     # noqa: F401 (a fixture: a made-up MNIST)

ROOT = Path(ladd.__file__).parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^    ((?:pip|python) .*)$", README, re.M)]
TINY = "--iterations 2 --batch 4 --samples 8 --teacher-steps 3 --judge-samples 200 --head-width 8 --log-every 1"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what a user gets: the tracked files that a job needs."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copy(ROOT / "ladd.py", folder)
    shutil.copytree(ROOT / "toy_mnist", folder / "toy_mnist", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def shell(command, folder):
    """Run a README command with this Python; installing is left out, it has happened."""
    command = re.sub(r"^pip install \S+ \S+ && ", "", command).replace("python ", f"{sys.executable} ", 1)
    return subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)


def test_the_two_commands_stand_in_the_readme():
    assert COMMANDS[0] == "pip install -r requirements.txt && python ladd.py --toy"
    assert COMMANDS[1] == "pip install -r requirements.txt && python -m pytest"


def test_the_main_job_and_its_follow_ups_run_as_written(clone):
    done = shell(f"{COMMANDS[0]} {TINY}", clone)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in re.findall(r"`((?:start|report)\.\w+|config\.json|metrics\.jsonl|student\.safetensors)`", README):
        assert (clone / "runs" / "001" / name).exists(), name
    assert "student@4" in done.stdout and len(json.loads((clone / "runs/001/report.json").read_text())["rows"]) == 8
    follow = [c for c in COMMANDS if c.startswith("python ladd.py --toy --")]
    assert any("--sample" in c for c in follow) and any("--help" in c for c in follow)
    for command in follow:
        done = shell(command + (" --judge-samples 200" if "--judge-samples" in command else ""), clone)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert (clone / "runs/001/sample-4.png").exists()


def test_teacher_and_judge_are_made_again_as_written(clone, mnist_root):     # noqa: F811
    made = clone / "made"
    for word, tiny in (("judge", "--epochs 1"), ("teacher", "--steps 2 --batch 8 --width 8")):
        command = next(c for c in COMMANDS if f"-m toy_mnist.{word}" in c).replace("DIR", str(mnist_root))
        done = shell(f"{command} {tiny} --out {made}", clone)
        assert done.returncode == 0, done.stderr[-2000:]
        assert ladd.load_weights(made / f"{word}.safetensors", f"toy {word}", "config", "command", "data", "versions", "figures")


def test_every_function_that_the_readme_names_exists():
    from toy_mnist import variants, world
    table = README[README.index("## How it works"):README.index("### The toy")]
    names = {n for row in re.findall(r"^\|.*\| (.*?) \|$", table, re.M) for n in re.findall(r"`(\w+)`", row)}
    assert len(names) > 15 and all(hasattr(ladd, n) for n in names), [n for n in names if not hasattr(ladd, n)]
    departures = README[README.index("## The recipe"):README.index("## Your own")]
    fields = {n for row in re.findall(r"^\| .*? \| (`.*?) \| .* \|$", departures, re.M) for n in re.findall(r"`(\w+)`", row)} - {"mean_over_heads"}
    assert len(fields) >= 8 and all(hasattr(world.TOY, n) for n in fields), fields
    assert {ladd.drift(world.TOY, world.PAPER).keys() >= {"paired_share", "loss", "distill_weight", "backward_simulation", "share_noise"}} == {True}


def test_what_the_paper_recipe_turns_on():
    from toy_mnist import variants, world
    terms = variants.terms(world.PAPER, None)
    assert (terms.heads_loss, terms.student_loss) == (ladd.hinge_heads, ladd.hinge_student)
    assert (terms.student_input, terms.add_heads, terms.add_student) == (None, (), ())
    assert world.PAPER.times == (1, 0.75, 0.5, 0.25) and world.PAPER.time_probs == (0.7, 0.1, 0.1, 0.1)
    assert world.PAPER.warmup_probs == (0, 0, 0.5, 0.5) and world.PAPER.warmup == 50
    assert (world.PAPER.renoise_mean, world.PAPER.renoise_std, world.PAPER.share_noise, world.PAPER.heads_see_t) == (1, 1, False, False)


def test_the_shipped_weights_are_small_and_say_what_made_them():
    folder = ROOT / "toy_mnist" / "weights"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 12 * 2 ** 20
    for word in ("teacher", "judge", "reference"):
        tensors, _ = ladd.load_weights(folder / f"{word}.safetensors", f"toy {word}", "command", "data", "versions", "figures")
        assert all(torch.isfinite(v.float()).all() for v in tensors.values())


def test_the_tests_that_notice_the_faults_exist():
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 18
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and all(f"def {name}(" in tests for name in named), row
