"""Short runs under many settings, each judged by its KID, as one command for a night:

    python -m zimage.sweep FILE --data DIR --iterations 500 [options of ladd.py for all settings]

A line of FILE is a setting, its name and then options of ladd.py: `m-0 --renoise-mean 0`. # begins
a comment. results.tsv gets a line per setting, "kept" where its mean KID is under the untrained
student's by more than the standard deviation over the seeds. To go on, repeat the command.
"""

import hashlib
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import ladd
from zimage import evaluate, rehearse, sample

COLUMNS = "commit name settings judge seeds kid untrained gb seconds verdict".split()


def read_settings(path, common, out):
    """{name: (options of ladd.py, recipe)} of a file. UserError where ladd.py refuses them."""
    settings = {}
    for line in path.read_text().splitlines():
        if words := shlex.split(line, comments=True):
            name, words = words[0], [*common, *words[1:]]
            ladd.check(name not in settings, f"{path}: {name} stands there twice")
            run = ["--out", str(out), "--name", name]
            settings[name] = words, ladd.parse(["--zimage", *words, *run])[2]
    return settings


def figures(run, words, recipe, seed, options):
    """KID of student and untrained student, GB and seconds, of a run. It is made, or gone on with,
    unless it has a report. Its checkpoints go."""
    log, report = Path(f"{run}.log"), run / "report.json"
    if not report.exists():
        often = ["--checkpoint-every", max(1, recipe.iterations // 4)]
        place = ["--seed", seed, "--out", run.parent, "--name", run.name, "--resume"]
        rehearse.launch(options.gpus, [ladd.__file__, "--zimage", *often, *words, *place], log)
        judge = [*options.judge, "--seeds", seed, "--steps", len(recipe.times)]
        judge += ["--out", run.parent / "images"]  # all runs share the teacher's
        rehearse.launch(options.gpus, ["-m", "zimage.evaluate", run, *judge], log)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    _, student, untrained = json.loads(report.read_text())["rows"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.fmean(line["seconds"] for line in lines if "seconds" in line)
    gigabytes = max(line.get("peak_gb", 0) for line in lines)
    return student["kid_mean"], untrained["kid_mean"], gigabytes, seconds * recipe.iterations


def main(argv=None):
    parser = ladd.Parser("python -m zimage.sweep", description=__doc__)
    add = parser.add_argument
    here = max(1, torch.cuda.device_count())
    add("file", type=Path, metavar="FILE", help="the settings")
    add("--seeds", type=sample.numbers, default="0,1,2", metavar="N,N", help="each (%(default)s)")
    add("--gpus", type=sample.positive, default=here, metavar="N", help="of a run (%(default)s)")
    text = "folder of the runs and of results.tsv (%(default)s)"
    add("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help=text)
    text = "options of zimage.evaluate, as in --judge='--prompts FILE --resolution 768'"
    add("--judge", type=shlex.split, default=[], metavar="WORDS", help=text)
    options, common = parser.parse_known_args(argv)
    settings = read_settings(options.file, common, options.out)
    results = options.out / "results.tsv"
    judge = evaluate.parse_options(["RUN", *options.judge])
    evaluate.inception(judge.features, "cpu")  # what can't be had is said before the night
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "-"
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, (words, recipe) in settings.items():
        made_by = "\t".join([name, shlex.join(words), shlex.join(options.judge)])
        key = made_by + "\t" + ",".join(map(str, options.seeds))
        text = results.read_text() if results.exists() else "\t".join(COLUMNS) + "\n"
        if f"\t{key}\t" in text:
            continue
        digest = hashlib.sha256(made_by.encode()).hexdigest()[:6]
        runs = {seed: options.out / f"{name}-{digest}-{seed}" for seed in options.seeds}
        try:
            made = [figures(run, words, recipe, seed, options) for seed, run in runs.items()]
        except ladd.UserError as error:  # lets the others go on
            failed.append(f"{name}: {error}")
            print(failed[-1], file=sys.stderr)
            continue
        kid, untrained, gigabytes, seconds = zip(*made, strict=True)
        mean, mark = statistics.fmean(kid), statistics.fmean(untrained)
        spread = statistics.stdev(kid) if len(kid) > 1 else 0
        row = [commit, key, f"{mean:.5f} +- {spread:.5f}", f"{mark:.5f}"]
        row += [f"{max(gigabytes):.2f}" if max(gigabytes) else "-"]
        row += [f"{statistics.fmean(seconds):.0f}", "kept" if mean + spread < mark else "dropped"]
        with ladd.replacing(results) as part:
            text = results.read_text() if results.exists() else text  # another sweep's lines too
            part.write_text(text + "\t".join(row) + "\n")
        print("\t".join(row), flush=True)
    ladd.check(not failed, f"{len(failed)} settings failed, the first is {''.join(failed[:1])}")


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
