"""What a toy run makes at its end: a printed table, report.json and report.png.

python -m toy_mnist.report runs/ONE runs/OTHER --picture FILE      draw runs beneath each other
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

import ladd
from toy_mnist.edm import sample_dpm
from toy_mnist.judge import Judge

HEADING = """| | NFE | FID | KID | accuracy | hue entropy | ms/image |
|---|---|---|---|---|---|---|"""
ROW = "| {name} | {nfe:g} | {fid:.2f} | {kid:.4f} | {accuracy:.3f} | {hue_entropy:.3f} | "
ROW += "{ms_per_image:.2f} |"


def write(world, run, student):
    """Judge teacher and student, print the table, write both files into the run's folder."""
    rows, n = judged_rows(world, student), world.options.judge_samples
    report = {"rows": rows, "judge_samples": n, "floor": world.judge.floor_at(n)[1]}
    report |= json.loads((run / "config.json").read_text())
    ladd.write_json(run / "report.json", report)
    draw(world, run, student, rows)
    if world.options.gif:
        draw_gif(run)
    print(f"\n{in_words(world, rows)}\n\nsee {run / 'report.png'}")


def judged_rows(world, student):
    """The rows of the table, as report.json holds them: the teacher's, then the student's."""
    recipe, n = world.recipe, world.options.judge_samples
    x0, label, _, cost = world.samples
    if n > len(x0):  # more than the student learnt from
        more = world.teacher_samples(f"samples-{len(x0)}-{n}", n - len(x0))
        x0, label = torch.cat([x0, more.x0]), torch.cat([label, more.label])
    name = f"teacher@{recipe.teacher_steps}" + " (the samples)" * (recipe.teacher_steps == 4)
    figures = world.judge(x0[:n], label[:n])
    rows = [{"name": name, "steps": recipe.teacher_steps, **cost, **figures}]

    guide, even = world.guide, [1, 0.75, 0.5, 0.25]
    jobs = [
        ("teacher@4", 4, world.teacher, lambda v, z, y, k: ladd.sample_euler(guide(v), z, even, y)),
        ("DPM-Solver++@4", 4, world.teacher, lambda v, z, y, k: sample_dpm(guide(v), z, 4, y)),
        *((f"student@{s}", s, student, world.sample_student(s)) for s in world.reported_steps()),
    ]
    noise, label = world.draw_noise(n, recipe.seed, "judge")
    for name, steps, model, sampler in jobs:
        x, cost = world.run_sampler(sampler, model, noise, label, name)
        rows.append({"name": name, "steps": steps, **cost, **world.judge(x, label)})
    return rows


def in_words(world, rows):
    """The table in Markdown, and what is to be known of it."""
    r, n = world.recipe, world.options.judge_samples
    count, floor = world.judge.floor_at(n)
    students = [row for row in rows if row["name"].startswith("student")]
    ratios = [f"{row['name']} {row['fid'] / rows[0]['fid']:.2f}" for row in students]
    lines = [
        HEADING,
        *(ROW.format(**row) for row in rows),
        "",
        f"FID divided by that of {rows[0]['name']}: " + ", ".join(ratios) + ".",
        f"A row has {n:,} images, compared with 10,000 real ones by features of the toy's judge.",
        f"{count:,} real ones: FID {floor:.2f}; 10,000: hue entropy {world.judge.hue_entropy:.3f}.",
        f"Teacher: guided by {r.guidance:g} for {r.guidance_low:g} <= t <= {r.guidance_high:g}.",
        f"Student: not guided. {rows[0]['name']} is judged on other noise.",
    ]
    return "\n".join(lines)


def draw(world, run, student, rows):
    """report.png: teacher and student from the same noise; beneath, the curves of the run."""
    grids = [world.sample_grid(world.teacher, world.sample_teacher)]
    steps = world.reported_steps()
    grids += [world.sample_grid(student, world.sample_student(s)) for s in steps]
    shown = [rows[0], *(row for row in rows if row["name"].startswith("student"))]
    figure = Figure(figsize=(14, 6.5), layout="constrained")  # not pyplot's: that is the caller's
    above, beneath = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    axes = above.subplots(1, len(grids), squeeze=False)[0]
    for ax, row, images in zip(axes, shown, grids, strict=True):
        grid = make_grid(images, nrow=10, normalize=True, value_range=(-1, 1))
        ax.imshow(grid.permute(1, 2, 0).numpy())
        ax.set_title(f"{row['name']}: FID {row['fid']:.2f}", fontsize=14)
        ax.axis("off")
    lines, plots = read_log(run), curves(world.judge, dataclasses.asdict(world.recipe), steps)
    for ax, curve in zip(beneath.subplots(1, 4), plots, strict=True):
        draw_curve(ax, lines, world.recipe.batch, *curve)
    figure.savefig(run / "report.png", dpi=100)


def compare(runs, picture):
    """A picture with a row for each run: its last samples, FID, hue entropy and losses."""
    import toy_mnist.settings  # noqa: F401 (adds the benchmark's losses, which runs may have)

    judge, figure = Judge(), Figure(figsize=(18, 3.5 * len(runs)), layout="constrained")
    rows = figure.subplots(len(runs), 4, sharey="col", squeeze=False)
    for (left, *others), run in zip(rows, runs, strict=True):
        lines, recipe = read_log(run), json.loads((run / "config.json").read_text())["recipe"]
        grids = sorted((run / "samples").glob("*.png"))
        ladd.check(grids, f"{run}: has no samples; train it with a lower --evaluate-every")
        left.imshow(Image.open(grids[-1]))
        left.set_title(f"{run.name}: two rows each of 4, 2 and 1 steps", fontsize=12)
        left.axis("off")
        for ax, curve in zip(others, curves(judge, recipe, (4, 2, 1))[:3], strict=True):
            draw_curve(ax, lines, recipe["batch"], *curve)
    figure.savefig(picture, dpi=100)


def draw_gif(run):
    """training.gif: the grids of the run's evaluations, 4, 2 and 1 steps from the same noise."""
    grids = [Image.open(path) for path in sorted((run / "samples").glob("*.png"))]
    pause = [500] * (len(grids) - 1) + [2000]  # ms
    if grids:  # a short run has none
        movie = {"save_all": True, "append_images": grids[1:], "duration": pause, "loop": 0}
        grids[0].save(run / "training.gif", **movie)


def curves(judge, recipe, steps):
    """(title, {metric: label}, level of a dashed line, its label, scale) of each plot."""
    zero = torch.zeros(1)  # the logit of a head that knows nothing
    chance = float(ladd.LOSSES[recipe["loss"]][0](zero, zero))
    losses = {"heads_loss": "heads", "student_loss": "student", "distill_loss": "distillation"}
    words = {s: f"{s} step" + "s" * (s > 1) for s in steps}
    fid = {f"fid@{s}": word for s, word in words.items()}
    hue = {f"hue_entropy@{s}": word for s, word in words.items()}
    taps = {f"accuracy/{tap}": tap for tap in recipe["taps"]}
    return [
        ("FID of 1,000 images", fid, judge.curve_floor, "real images", "log"),
        ("hue entropy", hue, judge.hue_entropy, "10,000 real images", "linear"),
        ("loss", losses, chance, "heads at chance", "linear"),
        ("accuracy of the heads", taps, 0.5, "chance", "linear"),
    ]


def read_log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw_curve(ax, lines, batch, title, names, level, meaning, scale):
    """One plot of metrics over the images seen. lines: those of metrics.jsonl."""
    for key, label in names.items():
        points = [(line["iteration"] * batch / 1000, line[key]) for line in lines if key in line]
        if points:
            ax.plot(*zip(*points, strict=True), label=label, marker=".")
    ax.axhline(level, color="grey", linestyle="--", label=meaning)
    ax.set_xlim(0, None)
    ax.set_xlabel("thousand images seen", fontsize=12)
    ax.set_ylabel(title, fontsize=12)
    if scale == "log":
        ax.set_yscale("log", subs=(2, 3, 5, 7))  # few labels
    ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")  # no powers of ten
    ax.legend(fontsize=10)


def main(argv):
    parser = ladd.Parser("python -m toy_mnist.report", description="draw runs beneath each other")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of toy runs")
    parser.add_argument("--picture", required=True, metavar="FILE", help="the PNG to write")
    compare(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
