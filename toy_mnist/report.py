"""What a toy run shows of itself: start.png before the first iteration; table, report.json, report.md and report.png after the last."""

import dataclasses
import json

import matplotlib
import torch
from torchvision.utils import make_grid

import ladd
from toy_mnist.edm import sample_dpm, time_grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt     # noqa: E402 (after the choice of a backend that needs no screen)


def picture(ax, images, title, nrow=10):
    """Images [N, 3, 28, 28] in [-1, 1] (clamped) as a grid on one axis."""
    ax.imshow(make_grid(images.clamp(-1, 1), nrow=nrow, normalize=True, value_range=(-1, 1)).permute(1, 2, 0).numpy())
    ax.set_title(title, fontsize=9), ax.axis("off")


def draw_start(world, path):
    """What one look would catch: the teacher's samples, x_t at every t, and both sides noised again, as iteration 0 sees them."""
    recipe = world.recipe
    d = ladd.draw(recipe, 0, world.shape)
    n = min(10, recipe.batch)
    x0, cond, noise = (v[:n] for v in world.read(0, recipe.batch))
    eps = torch.where(ladd.expand(d["paired"][:n], noise), noise, d["eps"][:n])
    rows = [(x0, "x0: the teacher's samples, the 'real' ones; labels " + " ".join(map(str, cond.tolist())))]
    for t in recipe.times:
        x_t = ladd.interpolate(x0, eps, torch.full((n,), t))
        rows.append((x_t, f"x_t at t = {t:g}: what the student is given"))
    x_t = ladd.interpolate(x0, eps, d["t"][:n])
    with torch.no_grad():
        v = world.teacher(x_t.to(world.device), d["t"][:n].to(world.device), cond.to(world.device)).cpu()
    guess = ladd.velocity_to_x0(x_t, v, d["t"][:n])
    times = lambda t: " ".join(f"{v:.2f}" for v in t[:n].tolist())
    rows += [(guess, "the untrained student's guesses from t = " + times(d["t"])),
             (ladd.interpolate(x0, d["eps_real"][:n], d["t_real"][:n]), "real, noised again to t-hat = " + times(d["t_real"])),
             (ladd.interpolate(guess, d["eps_hat"][:n], d["t_hat"][:n]), "fake, noised again to t-hat = " + times(d["t_hat"]))]
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 1.25 * len(rows)))
    for ax, (images, title) in zip(axes, rows):
        picture(ax, images, title)
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)


def table_rows(world, student):
    """The judged rows: a list of dicts as report.json holds them."""
    recipe, n = world.recipe, world.options.judge_samples
    noise, label = world.draw_noise(n, recipe.seed, "judge")
    grids = {"EDM's grid": time_grid(4), "1, .75, .5, .25": [1, 0.75, 0.5, 0.25]}
    euler = lambda times: lambda v, z, y: ladd.sample_euler(world.guide(v), z, times, y)
    jobs = [(f"teacher@4 on {name}", 4, world.teacher, euler(times)) for name, times in grids.items()]
    jobs += [("teacher@1", 1, world.teacher, euler(time_grid(1))),
             ("DPM-Solver++@4", 4, world.teacher, lambda v, z, y: sample_dpm(world.guide(v), z, 4, y))]
    jobs += [(f"student@{s}", s, student, world.sample_student(s)) for s in world.reported_steps()]

    x, labels = world.x0[:n], world.labels[:n]          # the samples that were learnt from serve this row
    if world.more:                                      # ... and more, where they are too few
        x, labels = torch.cat([x, world.more[0]]), torch.cat([labels, world.more[1]])
    name = f"teacher@{recipe.teacher_steps}" + (" (the samples)" if recipe.teacher_steps in (1, 4) else "")
    rows = [{"name": name, "steps": recipe.teacher_steps, **world.teacher_cost, **world.judge(x, labels)}]
    for name, steps, model, sampler in jobs:
        x, cost = world.run_sampler(sampler, model, noise, label, name)
        rows.append({"name": name, "steps": steps, **cost, **world.judge(x, label)})
    fours = sorted((r for r in rows if r["name"].startswith("teacher@4 on")), key=lambda r: r["fid"])
    fours[0]["grid"], fours[0]["name"] = fours[0]["name"].split(" on ")[1], "teacher@4"     # the better grid bears the name
    return rows


def markdown_table(rows, n, floor):
    """The rows as a Markdown table; beside FID its floor: real against real at n images."""
    head = f"| | steps | NFE | FID (real against real: {floor:.2f} at {n:,}) | KID | accuracy | hue entropy | least hue spread | ms/image |\n"
    head += "|---|---|---|---|---|---|---|---|---|\n"
    return head + "".join(f"| {r['name']} | {r['steps']} | {r['nfe']:g} | {r['fid']:.2f} | {r['kid']:.4f} | {r['accuracy']:.3f} | "
                          f"{r['hue_entropy']:.3f} | {r['hue_spread_min']:.2f} | {r['ms_per_image']:.2f} |\n" for r in rows)


def write(world, run, student, changed):
    """Judge everything; print the table; write report.json, report.md and report.png into the run's folder."""
    recipe, rows = world.recipe, table_rows(world, student)
    by_name = {r["name"]: r for r in rows}
    n, floor = world.judge.floor_at(world.options.judge_samples)
    ratios = {}
    for s in world.reported_steps():
        for other in (rows[0]["name"], "teacher@4"):
            ratios[f"student@{s} / {other}"] = by_name[f"student@{s}"]["fid"] / max(by_name[other]["fid"], 1e-12)
    reference = world.reference
    smaller = [f"{k} {getattr(recipe, k)} (not {getattr(reference, k)})" for k in ("iterations", "batch", "samples")
               if getattr(recipe, k) < getattr(reference, k)]
    notes = [f"FID and KID on {'the toy judge' if world.judge.which == 'judge' else 'Inception'}'s features, "
             f"{world.options.judge_samples} images a row against 10,000 real ones.",
             "Hue entropy of real images: " + f"{world.judge.hue_entropy:.3f}.",
             f"Teacher: Euler on EDM's grid, guidance {recipe.guidance:g} for t in [{recipe.guidance_low:g}, {recipe.guidance_high:g}]; "
             f"student: {'averaged' if recipe.ema_half_life else 'last'} weights, {recipe.sampler} sampler, no guidance."]
    if smaller:
        notes.append("A smaller run than the reference recipe: " + ", ".join(smaller) + ".")
    table = markdown_table(rows, n, floor)
    ladd.write_json(run / "report.json", {"rows": rows, "ratios": ratios, "floor": {"n": n, "fid": floor}, "notes": notes, "smaller": bool(smaller),
                                          "features": world.judge.which, "judge_samples": world.options.judge_samples,
                                          "recipe": dataclasses.asdict(recipe), "drift": changed,
                                          "command": world.options.command, **ladd.versions()})
    (run / "report.md").write_text(f"# {run.name}\n\n{table}\n" + "\n".join(notes) + "\n\n" +
                                   "\n".join(f"- FID, {k} = {v:.2f}" for k, v in ratios.items()) + "\n\n![report](report.png)\n")
    draw_report(world, run, student, rows)
    print("\n" + table + "\n" + "\n".join(notes))
    print("FID: " + "  ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    print(f"see {run / 'report.png'}")


def draw_report(world, run, student, rows):
    """report.png: six grids from the same noise; beneath, the curves of the run."""
    recipe, by_name = world.recipe, {r["name"]: r for r in rows}
    noise, label = torch.randn(60, *world.shape, generator=ladd.generator(recipe.seed, "grid")), torch.arange(60) % 10
    four = [1, 0.75, 0.5, 0.25] if by_name["teacher@4"]["grid"].startswith("1,") else time_grid(4)
    panels = {rows[0]["name"]: (world.teacher, world.sample_teacher),
              "teacher@4": (world.teacher, lambda v, z, y: ladd.sample_euler(world.guide(v), z, four, y)),
              "DPM-Solver++@4": (world.teacher, lambda v, z, y: sample_dpm(world.guide(v), z, 4, y))}
    panels |= {f"student@{s}": (student, world.sample_student(s)) for s in world.reported_steps()}
    fig = plt.figure(figsize=(15, 10))
    grid = fig.add_gridspec(3, 12, height_ratios=[1, 1, 0.85])
    for k, (name, (model, sampler)) in enumerate(panels.items()):
        images, _ = world.run_sampler(sampler, model, noise, label, "grid")
        picture(fig.add_subplot(grid[k // 3, 4 * (k % 3):4 * (k % 3) + 4]), images, f"{name}: FID {by_name[name]['fid']:.2f}, {by_name[name]['nfe']:g} evaluations")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = [("FID, 1,000 images", [f"fid@{s}" for s in world.reported_steps()], "log"),
              ("hue entropy", [f"hue_entropy@{s}" for s in world.reported_steps()], "linear"),
              ("losses", ["heads_loss", "student_loss"], "linear"),
              ("head accuracy and diversity", [f"accuracy/{t}" for t in recipe.taps] + ["diversity"], "linear")]
    for k, (title, keys, scale) in enumerate(curves):
        ax = fig.add_subplot(grid[2, 3 * k:3 * k + 3])
        for key in keys:
            points = [(l["iteration"], l[key]) for l in lines if key in l]
            if points:
                ax.plot(*zip(*points), label=key, marker="o" if len(points) < 30 else None, markersize=3, linewidth=1)
        ax.set_title(title, fontsize=10), ax.set_xlabel("iteration", fontsize=8), ax.set_yscale(scale), ax.tick_params(labelsize=8)
        if ax.lines:
            ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(run / "report.png", dpi=80)
    plt.close(fig)
