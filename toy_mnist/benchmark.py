"""The toy's benchmark: many settings over seeds under one budget, judged alike.

    python -m toy_mnist.benchmark --list                     the settings, and how far each has been run
    python -m toy_mnist.benchmark [--only NAME,...] [--seeds 0,1,2] [--jobs N]      run what is missing
    python -m toy_mnist.benchmark --speed                    an iteration's time beside its network passes
    python -m toy_mnist.benchmark --report                   docs/benchmark.md, docs/benchmark.png, the README's tables: from the results alone

Every finished run is a line of toy_mnist/results.jsonl and is not run again; a killed one goes on from its checkpoint by the same
command. What a line holds is compared only with lines of the same budget (iterations, batch, samples, images judged, device, teacher and judge).

What the settings are stands in settings.py, who LADD is compared with in peers.py, what is tested and drawn in tables.py. A run is looked at for
collapse after each quarter of its iterations.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import ladd
from toy_mnist import peers, speed, tables, world
from toy_mnist.judge import WEIGHTS
from toy_mnist.results import append, found, in_words, locked, read_lines, recipe_fields, runs_in
from toy_mnist.settings import BASE, GROUPS, SETTINGS, departures, recipe_for
from toy_mnist.world import PAPER, TOY

ROOT = Path(ladd.__file__).parent
JUDGED = ("fid", "kid", "accuracy", "hue_entropy")
PASSED_ON = ("iterations", "batch", "samples", "judge_samples", "device", "out", "results", "weights", "data_root")


def budget_of(options):
    """What all runs share, as a dict: fields of the recipe, the images judged, the kind of device, the checksums of teacher and judge."""
    fields = {f.name: f for f in dataclasses.fields(TOY)}
    given = {k: getattr(options, k) for k in ("iterations", "batch", "samples") if getattr(options, k) is not None}
    for name, sign, text in (word.partition("=") for word in options.set):
        if name not in fields or not sign:
            raise ladd.UserError(f"--set {name}{sign}{text}: give FIELD=VALUE with a field of the recipe")
        given[name] = ladd.parse_value(fields[name], text)
    base = dataclasses.asdict(ladd.override(BASE, given))
    sums = [ladd.load_weights(Path(options.weights) / f"{kind}.safetensors", f"toy {kind}")[1]["sha256"][:8] for kind in ("teacher", "judge")]
    budget = {**{k: base[k] for k in ("iterations", "batch", "samples", *given)}, "judge_samples": options.judge_samples,
              "device": ladd.pick_device(options.device).type, "networks": "+".join(sums)}
    return json.loads(json.dumps(budget))               # as a line holds it: a tuple is a list


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

class Benchmarked:
    """What a world does otherwise in the benchmark: one run at a time makes its samples; they are judged once, then students alone."""

    watched = 500

    def prepare(self):
        n = self.options.judge_samples
        path = self.cache_path(f"judged-{n}-{self.judge.about['sha256'][:8]}").with_suffix(".json")
        with locked(path.with_suffix(".lock")):         # the others wait for it and then load what it made
            super().prepare()
            if not path.exists():
                x, label = zip((self.x0[:n], self.labels[:n]), *([self.more] if self.more else []))
                ladd.write_json(path, {**getattr(self, "teacher_cost", {}), **self.judge(torch.cat(x), torch.cat(label))})
        self.samples_row = json.loads(path.read_text())

    def watched_steps(self):
        return self.reported_steps()[:1]                # where `signs` looks for collapse

    def score(self, point):
        """None: no best student is kept."""

    def finish(self, run, student, changed):
        self.save_student(run / "student.safetensors", student)
        n, recipe = self.options.judge_samples, self.recipe
        noise, label = self.draw_noise(n, recipe.seed, "judge")
        figures = {"sample_diversity": ladd.sample_diversity(self, student, recipe, self.device)}
        for s in self.reported_steps():
            x, cost = self.run_sampler(self.sample_student(s), student, noise, label, f"student@{s}")
            row = self.judge(x, label)
            figures |= {f"{k}@{s}": row[k] for k in JUDGED} | {f"ms@{s}": cost["ms_per_image"]}
        collapsed = bool(self.signs(figures)) or figures["sample_diversity"] < self.options.least_diversity
        ladd.write_json(run / "figures.json", {"figures": figures, "collapsed": collapsed, "samples": self.samples_row, "floor": self.judge.floor_at(n)})


def make_world(setting, recipe, options, device):
    base = peers.WORLDS[setting.world]
    return type(base.__name__, (Benchmarked, base), {})(recipe, options, device)


def job(setting, seed, options):
    """(recipe, ladd's command line, run folder) of one run. The folder's name tells recipes of one setting apart."""
    recipe = recipe_for(setting, recipe_fields(options.budget), seed)
    made_of = json.dumps([departures(recipe), options.budget], sort_keys=True)
    run = Path(options.out) / f"{setting.name}-{seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    text = lambda v: ",".join(map(str, v)) if isinstance(v, tuple) else str(v)
    argv = ["--toy", "--out", options.out, "--name", run.name, "--weights", options.weights, "--judge-samples", str(options.judge_samples),
            "--evaluate-every", str(max(1, recipe.iterations // 4)), "--keep", "1"]
    argv += [f"--{k.replace('_', '-')}={text(v)}" for k, v in departures(recipe, TOY).items()]
    argv += [f"--{k.replace('_', '-')}={getattr(options, k)}" for k in ("device", "data_root") if getattr(options, k)]
    return recipe, argv + ["--i-know"] * (recipe.head_lr <= recipe.student_lr), run


def world_for(setting, seed, options):
    """The world of a run, outside a run."""
    recipe, argv, _ = job(setting, seed, options)
    return make_world(setting, recipe, ladd.parser_for(world).parse_args(argv), ladd.pick_device(options.device))


def distil(setting, argv, run):
    """One run by ladd's own command line, from its checkpoint where there is one; what its line says of it."""
    usual, world.make_world = world.make_world, lambda *args: make_world(setting, *args)
    try:
        ladd.run_command([*argv, "--resume"] if run.exists() else argv)
        made = json.loads((run / "figures.json").read_text())
    except ladd.Diverged as error:
        made = {"figures": {}, "diverged": str(error)}
    finally:
        world.make_world = usual
    log = read_lines(run / "metrics.jsonl")
    return {**made, "seconds": max((line["seconds"] for line in log if "seconds" in line), default=0.0),
            "first_alarm": next((line["iteration"] for line in log if line.get("collapsed")), None)}


def judge_teacher(made):
    """The teacher by each of its samplers at 1, 2, 4 and 8 steps, from the noise that the students of this seed are judged on."""
    began, rows = time.time(), []
    noise, label = made.draw_noise(made.options.judge_samples, made.recipe.seed, "judge")
    for name, sampler in peers.SAMPLERS.items():
        sampler(made.teacher, noise[:2].to(made.device), 2, label[:2].to(made.device))      # what loads at a first call is not timed
        for steps in (1, 2, 4, 8):
            x, cost = made.run_sampler(lambda v, z, y: sampler(made.guide(v), z, steps, y), made.teacher, noise, label, f"{name}, {steps}")
            rows.append({"name": f"teacher, {name}", "steps": steps, **cost, **made.judge(x, label)})
    return {"figures": {}, "rows": rows, "seconds": time.time() - began}


def run_one(setting, seed, options):
    """Run one setting with one seed and add its line, unless that is there."""
    recipe, argv, run = job(setting, seed, options)
    with locked(Path(options.out) / "locks" / run.name, wait=False) as mine:
        if not mine or seed in found(runs_in(read_lines(options.results)), setting, options.budget):
            print(f"{run.name}: finished, or being run by another process")
            return
        outcome = judge_teacher(world_for(setting, seed, options)) if setting.world == "teacher" else distil(setting, argv, run)
        device = speed.device_name(ladd.pick_device(options.device))
        append(options.results, {"kind": "run", "setting": setting.name, "seed": seed, "world": setting.world, "budget": options.budget,
                                 "changes": setting.changes, **outcome, "device": device, "jobs": options.side_by_side,
                                 **ladd.versions(), "time": time.strftime("%Y-%m-%d %H:%M"), "recipe": dataclasses.asdict(recipe)})
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    print(f"{run.name}: " + (outcome.get("diverged") or ", ".join(f"{k} {v:.2f}" for k, v in outcome["figures"].items() if k.startswith("fid"))))


def run_here(pending, options):
    """One after another in this process. A run that fails lets the others go on; returns what went wrong."""
    failed = []
    for setting, seed in pending:
        try:
            run_one(setting, seed, options)
        except ladd.UserError as error:
            if str(error).startswith("stopped"):        # Ctrl-C and SIGTERM, as `ladd.train` answers them
                raise
            print(f"{setting.name}, seed {seed}: {error}", file=sys.stderr)
            failed.append(f"{setting.name}, seed {seed} ({error})")
    return failed


def run_side_by_side(first, pending, options):
    """As many processes as --jobs, each with one run and a log beside the runs. What stops this process stops them."""
    first.prepare()                                     # the first run's samples, by all cores; another set is made by the first run that needs it
    environment = dict(os.environ)
    if ladd.pick_device(options.device).type == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    shared = [word for k in PASSED_ON if getattr(options, k) is not None for word in (f"--{k.replace('_', '-')}", str(getattr(options, k)))]
    shared += [word for text in options.set for word in ("--set", text)] + ["--side-by-side", str(options.jobs)]
    waiting, running, failed = list(pending), {}, []
    before = signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                setting, seed = waiting.pop(0)
                log = job(setting, seed, options)[2].with_suffix(".log")
                with open(log, "w") as file:
                    command = [sys.executable, "-m", "toy_mnist.benchmark", "--only", setting.name, "--seeds", str(seed), *shared]
                    running[subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)] = setting.name, seed, log
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                name, seed, log = running.pop(process)
                last = (log.read_text().strip().splitlines() or ["nothing printed"])[-1]
                print(f"[{len(pending) - len(waiting) - len(running)} of {len(pending)}] {last}", flush=True)
                if process.returncode:
                    failed.append(f"{name}, seed {seed} (exit code {process.returncode}: see {log})")
    finally:
        for process in running:
            process.terminate()                         # each saves its run and ends
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# Speed, report, command line
# ---------------------------------------------------------------------------------------------------------------------

def time_steps(options):
    """Print and store a line per recipe and batch: the iteration's time beside its network passes."""
    device = ladd.pick_device(options.device)
    for name, reference in (("toy", TOY), ("baseline", BASE), ("paper", PAPER)):
        for batch in options.batches:
            recipe = ladd.override(reference, {**recipe_fields(options.budget), "batch": batch})
            argv = ["--toy", "--weights", options.weights, "--judge-samples", str(options.judge_samples)]
            made = world.ToyWorld(recipe, ladd.parser_for(world).parse_args(argv), device)
            line = speed.measure(made, recipe, device, options.compile)
            print(f"{name}, batch {batch}: an iteration {line['step_ms']:.1f} ms, its network passes alone {line['networks_ms']:.1f} ms: "
                  f"ratio {line['ratio']:.2f} (target: at most 1.10)")
            append(options.results, {"kind": "speed", "recipe": name, **line, **ladd.versions(), "time": time.strftime("%Y-%m-%d %H:%M")})


def draw_report(options):
    options.docs.mkdir(parents=True, exist_ok=True)
    tables.write(options.docs, read_lines(options.results))
    print(options.docs / "benchmark.md")


def list_settings(options):
    runs = runs_in(read_lines(options.results))
    print(in_words(options.budget))
    for group, words in GROUPS.items():
        print(f"\n{group}: {words}")
        for s in (s for s in SETTINGS.values() if s.group == group):
            seeds = ", ".join(map(str, sorted(found(runs, s, options.budget))))
            print(f"  {s.name:24} {s.missing or ('seeds ' + seeds if seeds else 'not run'):16} {tables.change_words(s)}" + f"  ({s.note})" * bool(s.note))


def numbers(text, option):
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 0 or len(set(values)) < len(values):
        raise ladd.UserError(f"{option} {text}: give different whole numbers from 0, with commas between")
    return values


def parse(argv):
    parser = ladd.Parser(prog="python -m toy_mnist.benchmark", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the settings, and how far each has been run")
    what.add_argument("--report", action="store_true", help="draw tables and plots from the results")
    what.add_argument("--speed", action="store_true", help="time an iteration beside its network passes")
    parser.add_argument("--only", metavar="NAME,...", help=f"these settings alone, or these groups: {', '.join(GROUPS)}")
    parser.add_argument("--seeds", default="0,1,2", metavar="S,...", help="seeds of every setting (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each in a process of its own (default %(default)s)")
    for name, words in (("iterations", "iterations of every run"), ("batch", "samples per iteration"), ("samples", "samples of the teacher")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"budget: {words}, where a setting does not say (default: the baseline's)")
    parser.add_argument("--judge-samples", type=int, default=10_000, metavar="N", help="budget: images judged per student and step count (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="budget: another field of the recipe, where a setting does not say")
    parser.add_argument("--batches", default="16,64,256", metavar="N,...", help="the batches that --speed times (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="--speed with a compiled student")
    parser.add_argument("--device", help="as in python ladd.py")
    parser.add_argument("--out", default="runs/benchmark", help="folder of the runs (default %(default)s)")
    parser.add_argument("--results", default=ROOT / "toy_mnist" / "results.jsonl", type=Path, help="file of the results (default %(default)s)")
    parser.add_argument("--docs", default=ROOT / "docs", type=Path, help="folder of the report (default %(default)s)")
    parser.add_argument("--weights", default=str(WEIGHTS), metavar="DIR", help="folder of teacher and judge (default: the shipped ones)")
    parser.add_argument("--data-root", help="folder that holds MNIST/raw, for real-data (else LADD_DATA, else a download)")
    parser.add_argument("--side-by-side", type=int, help=argparse.SUPPRESS)         # a process of --jobs N is told N
    options = parser.parse_args(argv)
    names = options.only.split(",") if options.only else list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS and name not in GROUPS]:
        raise ladd.UserError(f"--only {unknown[0]}: no such setting; --list lists them")
    if options.jobs < 1:
        raise ladd.UserError(f"--jobs {options.jobs}: give at least 1")
    options.chosen = [s for s in SETTINGS.values() if s.name in names or s.group in names]
    options.seeds, options.batches = numbers(options.seeds, "--seeds"), numbers(options.batches, "--batches")
    options.side_by_side = options.side_by_side or options.jobs
    for name in ("out", "weights", "data_root"):
        if getattr(options, name):                      # the processes of --jobs run elsewhere
            setattr(options, name, str(Path(getattr(options, name)).resolve()))
    options.results = options.results.resolve()
    options.budget = budget_of(options)
    return options


def run_missing(options):
    """Every chosen setting and seed that has no line yet."""
    runs = runs_in(read_lines(options.results))
    for setting in options.chosen:                      # nothing starts before every recipe is known to be valid
        recipe_for(setting, recipe_fields(options.budget), max(options.seeds))
    pending = [(s, seed) for s in options.chosen if not s.missing for seed in options.seeds if seed not in found(runs, s, options.budget)]
    print(f"{len(pending)} runs to do: {in_words(options.budget)}; results in {options.results}", flush=True)
    if pending:
        options.results.parent.mkdir(parents=True, exist_ok=True), options.results.touch()      # or it is known now, not after the first run
        first = world_for(*pending[0], options)         # an option that no world takes is known here
        failed = run_here(pending, options) if options.jobs == 1 else run_side_by_side(first, pending, options)
        if failed:
            raise ladd.UserError(f"{len(failed)} of {len(pending)} runs failed, the first: {failed[0]}")


def main(argv=None):
    """The command line; returns the exit code. Bad input is one line on stderr and 2."""
    try:
        options = parse(argv)
        (list_settings if options.list else draw_report if options.report else time_steps if options.speed else run_missing)(options)
        return 0
    except (ladd.UserError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
