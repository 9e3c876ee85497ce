"""The toy's benchmark: many settings over seeds, under one budget, judged alike.

    python -m toy_mnist.benchmark [--only NAME ...] [--seeds 0 1 2]      run what is missing
    python -m toy_mnist.benchmark --report            draw docs/benchmark.md and docs/benchmark.png

A finished run is a line of toy_mnist/results.jsonl and is not run again; a killed one goes on.
Start the same command several times to have as many runs at once. Fields of the recipe, such as
--batch, set the budget, which holds where a setting does not say. Budgets are never mixed.
"""

import contextlib
import dataclasses
import hashlib
import json
import platform
import shutil
import statistics
import sys
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import ladd
from toy_mnist import settings, tables, world

HERE = Path(__file__).parent


def judged(toy, model, sampler, steps):
    """{figure: {steps: value}} of a model by sampler(steps), on the noise of the recipe's seed."""
    noise, label = toy.draw_noise(toy.options.judge_samples, toy.recipe.seed, "judge")
    figures = {name: {} for name in tables.FIGURES}
    for k in steps:
        x, cost = toy.run_sampler(sampler(k), model, noise, label, f"judge {k} steps")
        row = {**cost, **toy.judge(x, label)}
        for name in figures:
            figures[name][str(k)] = float(f"{row[name]:.6g}")
    return figures


def distil(toy, run):
    """Train a student, or go on with it. Its figures, those of its samples, its alarms."""
    recipe = toy.recipe
    every = max(1, recipe.iterations // 4)
    options = ladd.Options(resume=True, evaluate_every=every, checkpoint_every=every, keep=1)
    options.dtype = toy.options.dtype
    try:
        losses = settings.heads_loss, settings.student_loss
        state = ladd.train(toy, recipe, run, options, losses)
    except ladd.UserError as error:
        ladd.check("non-finite" in str(error), str(error))
        return {**{name: {} for name in tables.FIGURES}, "diverged": str(error)}  # a result too
    with state.averaged() as student:
        line = judged(toy, student, toy.sample_student, toy.reported_steps())
        line["collapsed"] = bool(toy.evaluate(student, run, recipe.iterations)["collapse"])
        toy.save(student, run)
    n = toy.options.judge_samples
    line["samples"] = toy.judge(toy.samples.x0[:n], toy.samples.label[:n]) | toy.samples.cost
    line["floor"] = toy.judge.floor_at(n)[1]
    log = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    line["first_alarm"] = next((e["iteration"] for e in log if e.get("collapsed")), None)
    seconds = statistics.mean(e["seconds"] for e in log if "seconds" in e)
    line["seconds"] = round(seconds * recipe.iterations)
    return line


def run_one(setting, seed, options):
    """Run a setting with one seed and add its line, unless it is there or another is at it."""
    recipe = settings.recipe_for(setting, options.budget, seed)
    line = {"setting": setting.name, "seed": seed, **tables.identity(setting, options.budget)}
    key = hashlib.sha256(json.dumps(line).encode()).hexdigest()[:8]  # a budget has its own folder
    run = options.out / f"{setting.name}-{seed}-{key}"
    results = options.results

    def sampler(k):
        by = settings.SAMPLERS[setting.world]
        return lambda v, noise, label, index: by(toy.guide(v), noise, k, label)

    with contextlib.suppress(Timeout), FileLock(f"{run}.lock", blocking=False):
        if seed in tables.found(tables.read_lines(results), setting, options.budget):
            return print(f"{setting.name}, seed {seed}: in {results} already")
        print(f"{setting.name}, seed {seed}: {run}", flush=True)
        toy = setting.make_world(recipe, options)
        teacher = setting.world in settings.SAMPLERS
        line |= judged(toy, toy.teacher, sampler, setting.steps) if teacher else distil(toy, run)
        line["device"] = f"{platform.machine()}, {options.dtype}, {torch.get_num_threads()} threads"
        with FileLock(results.with_suffix(".lock")), ladd.replacing(results) as part:
            lines = [*tables.read_lines(results), line]
            part.write_text("".join(json.dumps(each) + "\n" for each in lines))
        shutil.rmtree(run / "checkpoints", ignore_errors=True)


def parse(argv):
    known = [*settings.GROUPS, *settings.SETTINGS]
    parser = ladd.Parser("python -m toy_mnist.benchmark", description=__doc__)
    add = parser.add_argument
    add("--report", action="store_true", help="draw tables and picture from the results")
    add("--only", nargs="+", metavar="NAME", default=known, choices=known, help="settings, groups")
    add("--seeds", nargs="+", metavar="S", type=int, default=[0, 1, 2], help="of each (0 1 2)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--out", type=Path, default=Path("runs/benchmark"), help="folder of the runs")
    add("--results", type=Path, default=HERE / "results.jsonl", help="file of the results")
    add("--docs", type=Path, default=HERE.parent / "docs", help="folder of the report")
    world.add_arguments(parser)
    ladd.add_fields(parser.add_argument_group("the budget"), settings.BASE)
    parser.set_defaults(judge_samples=10_000)
    options = parser.parse_args(argv)
    options.out = options.out.expanduser()
    options.device = ladd.pick_device(options.device)
    options.dtype = ladd.default_dtype(options.device)
    return options


def budget_of(options):
    """What all runs that are compared have in common."""
    given = ladd.given(options, settings.Ablation)
    ladd.check("seed" not in given, "--seed: the seeds of the runs are --seeds")
    recipe = dataclasses.replace(settings.BASE, **given)
    toy = world.make_world(recipe, options, options.device)
    budget = {name: getattr(recipe, name) for name in ("iterations", "batch", "samples", *given)}
    networks = "+".join(about["sha256"][:8] for about in (toy.about, toy.judge.about))
    shared = {"judge_samples": options.judge_samples, "device": toy.device.type}
    return json.loads(json.dumps({**budget, **shared, "networks": networks}))  # no tuples


def main(argv):
    options = parse(argv)
    if options.report:
        tables.write(options.docs, tables.read_lines(options.results))
        return print(f"{options.docs / 'benchmark.md'} and benchmark.png")
    options.budget = budget_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for setting in settings.SETTINGS.values():
        for seed in options.seeds if {setting.name, setting.group} & {*options.only} else ():
            try:
                run_one(setting, seed, options)
            except ladd.UserError as error:  # lets the others go on
                failed.append(f"{setting.name}, seed {seed}: {error}")
                print(failed[-1], file=sys.stderr)
    ladd.check(not failed, f"{len(failed)} runs failed, the first is {''.join(failed[:1])}")


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
