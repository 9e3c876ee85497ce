"""A real process, killed with SIGKILL in four phases of a job, and resumed: the student is that of a run never killed, bit for bit."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ladd
from test_job import TINY, make_teacher
from toy_mnist import report, world

SMALL = [*TINY, "--judge-samples", "200", "--checkpoint-every", "1", "--evaluate-every", "0", "--device", "cpu"]

# What dies: the process, at the n-th call of a function (counted from 1), before or after the function's own work.
DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import ladd
import torch.distributed.checkpoint as dcp
from toy_mnist import report, world
world.PART = 100
owner, name, call, after = {target}
inner, calls = getattr(owner, name), []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == call and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    result = inner(*args, **kwargs)
    if len(calls) == call and after:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, dying)
sys.exit(ladd.main(sys.argv[1:]))
"""
PHASES = {"sampling the teacher": '(world.ToyWorld, "run_sampler", 3, False)',     # one file is whole, the next half made
          "mid-iteration": '(ladd, "update", 3, False)',                    # gradients taken, nothing stepped
          "inside a save": '(dcp, "save", 2, True)',                        # its files written, not yet renamed into place
          "judging": '(report, "markdown_table", 1, False)'}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def weights(folder):
    (folder / "weights").mkdir()
    return make_teacher(folder / "weights")


def job(weights, out, *options):
    return ["--toy", "--weights", str(weights), "--out", str(out), "--name", "run", *SMALL, *options]


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "PART", 100)
        yield


@pytest.fixture(scope="module")
def whole(weights, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *args: None)
        assert ladd.main(job(weights, folder / "whole")) == 0
    return (folder / "whole" / "run" / "student.safetensors").read_bytes()


@pytest.mark.parametrize("phase", PHASES)
def test_killed_and_resumed_is_never_killed(phase, weights, folder, whole, monkeypatch):
    out = folder / phase.replace(" ", "-")
    driver = DRIVER.format(root=str(Path(ladd.__file__).parent), target=PHASES[phase])
    done = subprocess.run([sys.executable, "-c", driver, *job(weights, out)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (out / "run").exists() == (phase != "sampling the teacher")      # no run's folder before its samples are whole
    if phase != "judging":                              # of the others the student alone is looked at
        monkeypatch.setattr(report, "write", lambda *args: None)
    assert ladd.main(job(weights, out, *(["--resume"] if (out / "run").exists() else []))) == 0
    assert (out / "run" / "student.safetensors").read_bytes() == whole
    assert (out / "run" / "report.md").exists() == (phase == "judging")
    assert not list(out.rglob("*.part-*")) and not list(out.rglob("*.part"))
