"""docs/benchmark.md and docs/benchmark.png, drawn from the lines of results.jsonl alone.

A line is a run. Of its recipe it holds what is not the default of `Ablation`.
"""

import json
import math
import statistics

from matplotlib.figure import Figure
from scipy import stats

import ladd
from toy_mnist.settings import GROUPS, PEERS, REPORT, SAMPLERS, SETTINGS, Ablation, recipe_for

FIGURES = ("fid", "kid", "accuracy", "hue_entropy", "nfe", "ms_per_image")
INTRODUCTION = """# The toy's benchmark

Drawn by `python -m toy_mnist.benchmark --report` from `toy_mnist/results.jsonl`; no number here is
typed by hand. A cell has the figures of 4, 2 and 1 steps (other teachers than teacher@50: 8 to 1).

- FID: mean ± standard deviation over the seeds. KID, accuracy and hue entropy: means.
- FID against: × is the geometric mean of the ratios, seed by seed, to the setting in brackets: runs
  of one seed see the same draws. Better or worse: p < .05 by a paired, two-sided t-test on log FID
  (1 in 20 where nothing differs), else "inside the noise"; "untested": fewer than two common FIDs.
- First alarm: the iteration at which a run first showed collapse, by seed (–: never), looked for
  after each quarter. A student that can't draw digits yet shows it too. "Collapsed": at the end.
- Seconds (of training) and ms per image: the least over the seeds, beside other work.
"""


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def identity(setting, budget):
    """What a line must say to be a run of the setting, whatever its seed."""
    changed = ladd.diff(recipe_for(setting, budget, seed=0), Ablation())
    recipe = {name: new for name, (_, new) in changed.items()}
    about = {"world": setting.world, "budget": budget, "recipe": recipe}
    about |= {"steps": setting.steps} if setting.world in SAMPLERS else {}
    return json.loads(json.dumps(about))


def found(lines, setting, budget):
    """{seed: line} of the runs under this budget whose recipe is the setting's of today."""
    wanted = identity(setting, budget).items()
    runs = {line["seed"]: line for line in lines if wanted <= line.items()}
    return dict(sorted(runs.items()))


def log_ratios(runs, others, steps):
    """The logarithm of the ratio of FIDs for each seed that both {seed: line} have it of."""
    pairs = [(runs[seed]["fid"], others[seed]["fid"]) for seed in runs if seed in others]
    return [math.log(a[steps] / b[steps]) for a, b in pairs if steps in a and steps in b]


def verdict(d):
    """What a paired t-test says of log ratios d, less being better."""
    if len(d) < 2:
        return "untested"
    if not stats.ttest_1samp(d, 0).pvalue < 0.05:  # nan too: no spread and no difference
        return "inside the noise"
    return "better" if statistics.mean(d) < 0 else "worse"


def verdicts(runs, others):
    """`verdict` at 4, 2 and 1 steps, in one word where it is the same, and the mean ratios."""
    d = {steps: log_ratios(runs, others, steps) for steps in "421"}
    said = {steps: verdict(v) for steps, v in d.items()}
    words = ", ".join(f"{steps}: {word}" for steps, word in said.items())
    words = said["4"] if len({*said.values()}) == 1 else words
    ratios = " / ".join(f"{math.exp(statistics.mean(v)):.2f}" for v in d.values() if v)
    return f"{words}, × {ratios}" if ratios else words


def by_steps(runs, figure):
    """The values over the seeds of a figure, for each number of steps."""
    steps = dict.fromkeys(k for line in runs.values() for k in line[figure])
    return [[line[figure][k] for line in runs.values() if k in line[figure]] for k in steps]


def in_words(runs, figure):
    """A figure at each number of steps: the mean over the seeds, of times the least."""
    words = []
    for values in by_steps(runs, figure):
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        value = min(values) if figure == "ms_per_image" else statistics.mean(values)
        words.append(f"{value:.4g}{deviation}" if figure == "fid" else f"{value:.4g}")
    return " / ".join(words)


def change_words(setting):
    """In what a setting departs from the one it is held against; an experiment from REPORT."""
    other = SETTINGS[setting.against]
    base = other.changes or (REPORT if setting.group == "experiments" else {})
    words = [f"{k} = {v}".replace("'", "") for k, v in setting.changes.items() if base.get(k) != v]
    words += [f"world = {setting.world}"] * (setting.world != other.world)
    return ", ".join(words)


def row(setting, runs, others):
    """{heading: text}. runs, others: {seed: line} of the setting and of what it is held against."""
    lines = list(runs.values())
    trained = [line for line in lines if setting.world not in SAMPLERS]
    alarms = [line.get("diverged") and "diverged" or line.get("first_alarm") for line in trained]
    return {
        "setting": setting.name,
        "departs by": change_words(setting),
        "seeds": ", ".join(map(str, runs)),
        **{figure: in_words(runs, figure) for figure in FIGURES},
        "fid of its samples": "".join(f"{s['fid']:.4g}" for s in [lines[0].get("samples")] if s),
        "first alarm": ", ".join(str(alarm or "–") for alarm in alarms),
        "collapsed": f"{sum(d.get('collapsed', 0) for d in trained)} of {len(trained)}",
        "seconds": min((d["seconds"] for d in lines if "seconds" in d), default=""),
        "fid against": f"{verdicts(runs, others)} ({setting.against})" if runs != others else "",
    }


def section(budget, runs):
    """What was run under one budget. runs: {name of the setting: {seed: line}}"""
    lines = [line for by_seed in runs.values() for line in by_seed.values()]
    hours = sum(line.get("seconds", 0) for line in lines) / 3600
    devices = "; ".join(sorted({line["device"] for line in lines}))
    text = ["## " + ", ".join(f"{name} {value}" for name, value in budget.items()), ""]
    text += [f"{len(lines)} runs, {hours:.1f} hours of training, on {devices}."]
    for line in [line for line in runs["baseline"].values() if "samples" in line][:1]:
        samples = ", ".join(f"{name} {value:.4g}" for name, value in line["samples"].items())
        text += [f"Real images against real ones: fid {line['floor']:.2f}. The teacher's samples,"]
        text += [f"which the baseline learns from (FID falls with their number): {samples}."]
    for group, description in GROUPS.items():
        chosen = [s for s in SETTINGS.values() if s.group == group and runs[s.name]]
        rows = [row(s, runs[s.name], runs[s.against]) for s in chosen]
        if rows:
            cells = [[*rows[0]], ["---"] * len(rows[0]), *(r.values() for r in rows)]
            text += ["", f"### {group.capitalize()}", "", description, ""]
            text += ["| " + " | ".join(map(str, texts)) + " |" for texts in cells]
            text += ["", *(f"- {s.name}: {s.note}" for s in chosen if s.note)]
    return [*text, ""]


def draw(path, runs):
    """Left: the ablations' FID as multiples of the baseline's. Right: FID and time of some."""
    figure = Figure(figsize=(15, 10), layout="tight")
    left, right = figure.subplots(1, 2)
    left.set_title("FID ÷ the baseline's of the same seed: 4 (blue), 2 (orange), 1 (green) steps")
    names = [name for name, s in SETTINGS.items() if s.group == "ablations" and runs[name]][::-1]
    for place, name in enumerate(names):
        for k, steps in enumerate("421"):
            ratios = [math.exp(d) for d in log_ratios(runs[name], runs["baseline"], steps)]
            left.semilogx(ratios, [place - 0.2 * k] * len(ratios), f"C{k}o")
    left.set_yticks(range(len(names)), names)
    left.axvline(1, color="grey")
    for name in filter(runs.get, ("baseline", "paper", *(s.name for s in PEERS))):
        fid = [statistics.mean(values) for values in by_steps(runs[name], "fid")]
        ms = [min(values) for values in by_steps(runs[name], "ms_per_image")]
        right.loglog(ms, fid, "o-", label=name)
    right.set(title="FID and time", xlabel="ms per image", ylabel="FID at 4, 2 and 1 steps")
    for axis in (left.xaxis, right.xaxis, right.yaxis):  # plain numbers, no powers of ten
        axis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    right.legend()
    figure.savefig(path, dpi=80)


def write(folder, lines):
    """Both files. The picture is of the budget that was begun last."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [INTRODUCTION, "![benchmark](benchmark.png)\n" if lines else "Nothing was run yet.\n"]
    missing = list(SETTINGS)
    for budget in {json.dumps(line["budget"]): line["budget"] for line in lines}.values():
        runs = {name: found(lines, setting, budget) for name, setting in SETTINGS.items()}
        text += section(budget, runs)
        missing = [name for name in missing if not runs[name]]
    text += ["## Not run", "", f"{'; '.join(missing)}."] if missing else []
    draw(folder / "benchmark.png", runs) if lines else None
    (folder / "benchmark.md").write_text("\n".join(text) + "\n")
