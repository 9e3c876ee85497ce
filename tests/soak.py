"""Kill a real run at random instants and resume it, again and again:   python tests/soak.py [KILLS]

Each round is one whole tiny job, killed (SIGKILL) after a random time and resumed until it ends; its student must equal, bit for
bit, that of a job never killed. Not part of the suite: it takes several seconds a kill.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import ladd                                         # noqa: E402
from test_job import TINY, make_teacher             # noqa: E402


def main(kills=50, seed=0):
    folder, rng = Path(tempfile.mkdtemp()), random.Random(seed)
    (folder / "weights").mkdir()
    weights = make_teacher(folder / "weights")
    script = str(Path(ladd.__file__).resolve())
    options = [*TINY, "--iterations", "40", "--samples", "600", "--judge-samples", "600", "--checkpoint-every", "2", "--evaluate-every", "20", "--device", "cpu"]

    def start(out, resume):
        words = [sys.executable, script, "--toy", "--weights", str(weights), "--out", str(out), "--name", "run", *options]
        return subprocess.Popen(words + ["--resume"] * resume, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1"))

    began = time.time()
    process = start(folder / "whole", False)
    assert process.wait() == 0, process.stderr.read().decode()[-2000:]
    seconds, whole = time.time() - began, (folder / "whole/run/student.safetensors").read_bytes()
    print(f"a job never killed: {seconds:.1f} s", flush=True)

    killed = rounds = 0
    while killed < kills:
        out, rounds = folder / f"round-{rounds}", rounds + 1
        while True:
            process = start(out, (out / "run" / "config.json").exists())
            try:
                process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
                break
            except subprocess.TimeoutExpired:
                process.kill(), process.wait()
                killed += 1
        assert process.returncode == 0, process.stderr.read().decode()[-2000:]
        assert (out / "run/student.safetensors").read_bytes() == whole, f"round {rounds}: another student"
        print(f"{killed} kills survived in {rounds} rounds", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
