"""The benchmark's results: a file of lines, each a JSON object, one per finished run (kind "run") or timing (kind "speed")."""

import contextlib
import dataclasses
import fcntl
import json
import sys

import ladd
from toy_mnist.settings import recipe_for
from toy_mnist.world import ToyRecipe


@contextlib.contextmanager
def locked(path, wait=True):
    """Hold the lock file at path, which its holder's death frees too; gives False where another holds it and wait is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def append(path, line):
    """Add one line, in place of one that a kill has cut off."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")


def read_lines(path):
    """The lines of the file, none where it is not there; a cut-off one is passed over with a line that says so."""
    lines = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"{path}: line {number} is cut off, passed over", file=sys.stderr)
    return lines


def identity(world, budget, recipe):
    """What two runs that differ in nothing but the seed have in common, as text. A field that a stored recipe lacks had its default."""
    whole = {**dataclasses.asdict(ToyRecipe()), **recipe}
    return json.dumps([world, budget, {k: v for k, v in whole.items() if k != "seed"}], sort_keys=True)


def runs_in(lines):
    """{identity: {seed: its last line}} of the lines of runs."""
    runs = {}
    for line in lines:
        if line["kind"] == "run":
            runs.setdefault(identity(line["world"], line["budget"], line["recipe"]), {})[line["recipe"]["seed"]] = line
    return runs


def found(runs, setting, budget):
    """{seed: line} of the runs of this budget whose recipe is the setting's today. runs: `runs_in` the lines."""
    with contextlib.suppress(ladd.UserError):           # a recipe that is no longer valid
        if not setting.missing:
            return runs.get(identity(setting.world, budget, dataclasses.asdict(recipe_for(setting, recipe_fields(budget), 0))), {})
    return {}


def recipe_fields(budget):
    """What of a budget (`benchmark.budget_of`) the recipe holds."""
    return {k: v for k, v in budget.items() if k not in ("judge_samples", "networks", "device")}


def in_words(budget):
    words = "{iterations} iterations of {batch}, {samples:,} samples of the teacher, {judge_samples:,} images judged, on {device}, networks {networks}"
    return ", ".join([words.format(**budget), *(f"{k} = {v}" for k, v in budget.items() if f"{{{k}" not in words)])
