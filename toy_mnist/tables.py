"""docs/benchmark.md, docs/benchmark.png and the README's tables, from the lines of results.jsonl alone.

The test behind "better" and "worse" is the paired t on log FID, two-sided, p < .05, one per step count: runs of one seed see the same draws and
samples of the teacher and are judged from the same noise, so it is their ratios that are compared. At 3 seeds it has 2 degrees of freedom: three ratios
must agree closely to be more than noise.
"""

import json
import math
import statistics

import matplotlib
from scipy import stats

from toy_mnist.results import found, in_words, runs_in
from toy_mnist.settings import GROUPS, REPORT, SETTINGS

matplotlib.use("Agg")
import matplotlib.pyplot as plt     # noqa: E402 (after the choice of a backend that needs no screen)
from matplotlib.ticker import LogLocator, NullLocator     # noqa: E402

STEPS = (4, 2, 1)
HEAD = ("setting", "departs by", "seeds", "FID@4", "FID@2", "FID@1", "KID", "accuracy", "hue entropy", "FID of its real samples", "first alarm", "collapsed", "seconds",
        "FID against")
BRIEF = ("setting", "FID@4", "FID@2", "FID@1", "accuracy", "hue entropy", "first alarm", "collapsed", "FID against")        # in the README, but for ablations
BEGIN, END = "<!-- ablations: drawn by python -m toy_mnist.benchmark --report -->", "<!-- end of ablations -->"     # in the README
PARTNERS = ("baseline", "paper", "regression", "add", "classifier-heads")       # the students among the peers
CAPTION = """Mean ± standard deviation over the seeds; where there are several figures in a cell they are those of 4, 2 and 1 steps. The last column says of the
FID at 4, 2 and 1 steps whether it is better or worse than that of the setting named there, and its multiple of that (the geometric mean over seeds): a paired t-test on log FID, seed by seed,
two-sided, p < .05 in each single test, so of twenty differences that are none one will be called so. "Inside the noise" is a difference that this test does not show; "untested" one with a single seed in common.
The alarm is ladd's own for collapse, looked for after each quarter of the iterations and listed by seed (– = never; early in a short run a student that has not yet learned to draw digits sets it off too); "collapsed" counts the runs that show its signs
at their end. A setting that names more samples than its run reads was given as many as it reads. Seconds are the least over the seeds, of training and looks for collapse, on whatever else the machine was doing."""


def log_ratios(runs, others, key):
    """The logarithm of a figure's ratio, for each seed that both {seed: line} have it of."""
    pairs = [(runs[k]["figures"], others[k]["figures"]) for k in sorted(runs.keys() & others.keys())]
    return [math.log(a[key] / b[key]) for a, b in pairs if key in a and key in b]


def paired_t(d):
    """Two-sided p of the paired t-test on at least two differences d."""
    return float(stats.ttest_1samp(d, 0).pvalue)


def verdict(d):
    """What can be said of logarithms of ratios of distances, less being better, in words."""
    if len(d) < 2:
        return "untested"
    if not paired_t(d) < 0.05:                          # nan too: no spread and no difference
        return "inside the noise"
    return "better" if statistics.mean(d) < 0 else "worse"


def verdicts(runs, others):
    """`verdict` at 4, 2 and 1 steps, in one word where it is the same, and the mean ratios."""
    d = [log_ratios(runs, others, f"fid@{s}") for s in STEPS]
    said = [verdict(v) for v in d]
    words = said[0] if len(set(said)) == 1 else ", ".join(f"{s}: {word}" for s, word in zip(STEPS, said))
    return words + (", × " + " / ".join(f"{math.exp(statistics.mean(v)):.2f}" for v in d) if all(d) else "")


def values(runs, key):
    """A figure of every run {seed: line} that has it; a diverged one has none."""
    return [line["figures"][key] for line in runs.values() if key in line["figures"]]


def spread(v, digits=2):
    """mean ± standard deviation of a list, in words."""
    return "" if not v else f"{statistics.mean(v):.{digits}f}" + (f" ± {statistics.stdev(v):.{digits}f}" if len(v) > 1 else "")


def change_words(setting):
    """In what a setting departs from the one that it is compared with; an experiment from what all six have in common."""
    if setting.missing:
        return ""
    base = SETTINGS[setting.against].changes if setting.against != "baseline" else REPORT if setting.group == "experiments" else {}
    words = [f"{k} = {v}" for k, v in setting.changes.items() if base.get(k) != v] + [f"{k} as in the baseline" for k in base if k not in setting.changes]
    return ", ".join(words + [f"world = {setting.world}"] * (setting.world != SETTINGS[setting.against].world)).replace("'", "")


def cells(setting, runs, others):
    """One setting's row of the table: {heading: text}. runs, others: {seed: line} of it and of the one that it is held against."""
    if not runs:
        return {**dict.fromkeys(HEAD, ""), "setting": setting.name, "departs by": change_words(setting), "seeds": setting.missing or "not run"}
    three = lambda key, digits: " / ".join(f"{statistics.mean(v):.{digits}f}" for s in STEPS if (v := values(runs, f"{key}@{s}")))
    diverged, collapsed = (sum(bool(line.get(word)) for line in runs.values()) for word in ("diverged", "collapsed"))
    end = ", ".join([f"{collapsed} of {len(runs)}"] + [f"{diverged} diverged"] * bool(diverged))
    alarms = ", ".join(str(line.get("first_alarm") or "–") for _, line in sorted(runs.items()))
    samples = [line["samples"]["fid"] for line in runs.values() if "samples" in line][:1]
    said = "" if setting.name == "baseline" else f"{verdicts(runs, others)} ({setting.against})"
    texts = [setting.name, change_words(setting), ", ".join(map(str, sorted(runs))), *(spread(values(runs, f"fid@{s}")) for s in STEPS), three("kid", 3),
             three("accuracy", 3), three("hue_entropy", 3), spread(samples), alarms, end, f"{min(line['seconds'] for line in runs.values()):.0f}", said]
    return dict(zip(HEAD, texts, strict=True))


def markdown(head, rows):
    """Lines of a table: the headings and, from each dict of rows, the texts under them."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(r[k] for k in head) + " |" for r in rows)]


def settings_table(group, runs_of):
    """The table of a group's settings, and beneath it their notes."""
    chosen = [s for s in SETTINGS.values() if s.group == group and s.name != "teacher"]
    shared = ["All six: " + ", ".join(f"{k} = {v}" for k, v in REPORT.items()) + ".", ""] if group == "experiments" else []
    rows = [cells(s, runs_of(s), runs_of(SETTINGS[s.against])) for s in chosen]
    notes = [f"- {s.name}: {s.note}" for s in chosen if s.note]
    return [f"### {group.capitalize()}", "", GROUPS[group], "", *shared, *markdown(HEAD, rows), "", *notes, ""]


def summary(budget, runs_of):
    """The README's tables: the ablations that were run, the best at 4 steps first, what was run of the other groups, and the names of what was not."""
    baseline, geometric = runs_of(SETTINGS["baseline"]), lambda v: math.exp(statistics.mean(map(math.log, v)))
    chosen = [s for s in SETTINGS.values() if s.group == "ablations"]
    run = sorted((s for s in chosen if values(runs_of(s), "fid@4")), key=lambda s: geometric(values(runs_of(s), "fid@4")))
    own = lambda s: {"setting": "**baseline**", "against the baseline": ""} if s.name == "baseline" else {"against the baseline": verdicts(runs_of(s), baseline)}
    lines = [f"{in_words(budget)}; mean ± standard deviation over the seeds, × baseline seed by seed:", ""]
    lines += markdown(("setting", "departs by", "FID@4", "FID@2", "FID@1", "against the baseline"), [{**cells(s, runs_of(s), baseline), **own(s)} for s in run])
    for group in ("experiments", "peers"):
        others = [s for s in SETTINGS.values() if s.group == group and s.name != "teacher" and values(runs_of(s), "fid@4")]
        if others:
            lines += ["", f"{GROUPS[group]} Figures of 4 / 2 / 1 steps, alarms by seed:", ""]
            lines += markdown(BRIEF, [cells(s, runs_of(s), runs_of(SETTINGS[s.against])) for s in others])
    left = [s.name for s in SETTINGS.values() if not runs_of(s) and not s.missing]
    diverged = [s.name for s in SETTINGS.values() if s.name != "teacher" and runs_of(s) and not values(runs_of(s), "fid@4")]
    for words, names in (("Diverged in every run", diverged), ("Not run", left)):
        lines += ["", f"{words}: {', '.join(names)}."] * bool(names)
    return lines


def fill_readme(path, lines):
    """Put lines between the marks of the README at path, where it has them."""
    text = path.read_text() if path.exists() else ""
    if BEGIN in text and END in text:
        path.write_text("\n".join([text[:text.index(BEGIN)] + BEGIN, "", *lines, "", text[text.index(END):]]))


def peers_rows(runs_of):
    """{name: {steps: rows over seeds}} of the teacher's samplers and of the students beside them."""
    families = {}
    for line in runs_of(SETTINGS["teacher"]).values():
        for r in line["rows"]:
            families.setdefault(r["name"], {}).setdefault(r["steps"], []).append(r)
    for name in PARTNERS:
        for line in runs_of(SETTINGS[name]).values():
            for s in STEPS if line["figures"] else ():
                r = {"nfe": s, "ms_per_image": line["figures"][f"ms@{s}"], **{k: line["figures"][f"{k}@{s}"] for k in ("fid", "kid", "accuracy", "hue_entropy")}}
                families.setdefault({"baseline": "LADD, baseline", "paper": "LADD, the paper's"}.get(name, name), {}).setdefault(s, []).append(r)
    return families


def samplers_table(runs_of):
    families, lines = peers_rows(runs_of), ["| | steps | NFE | FID | KID | accuracy | hue entropy | ms/image |", "|" + "---|" * 8]
    samples = next((line["samples"] for line in runs_of(SETTINGS["baseline"]).values() if "samples" in line), None)
    for name, by_steps in {**({"the teacher's samples, which students learn from": {0: [samples]}} if samples else {}), **families}.items():
        for steps, rows in sorted(by_steps.items(), reverse=True):
            mean = lambda k: statistics.mean(r[k] for r in rows)
            lines.append(f"| {name} | {steps or ''} | {mean('nfe'):g} | {spread([r['fid'] for r in rows])} | {mean('kid'):.3f} | {mean('accuracy'):.3f} | "
                         f"{mean('hue_entropy'):.3f} | {min(r['ms_per_image'] for r in rows):.2f} |")
    if len(lines) == 2:
        return ["Not run.", ""]
    return lines + ["", "ms/image: the least over the seeds, measured while judging, on whatever else the machine was doing.", ""]


def speed_table(lines):
    """The newest line of each device, batch and kind."""
    newest = {(l["recipe"], l["device"], l["compiled"], l["batch"]): l for l in lines if l["kind"] == "speed"}
    if not newest:
        return ["Not run."]
    parts = list(dict.fromkeys(k for l in newest.values() for k in l["parts_ms"]))
    head = ["device", "recipe", "batch", "compiled", "one iteration, ms", "its network passes alone, ms", "ratio", *parts, "memory, MB"]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for l in newest.values():
        table.append(f"| {l['device']} | {l['recipe']} | {l['batch']} | {'yes' if l['compiled'] else 'no'} | {l['step_ms']:.1f} | {l['networks_ms']:.1f} | {l['ratio']:.2f} | "
                     + " | ".join(f"{l['parts_ms'][k]:.1f}" if k in l["parts_ms"] else "" for k in parts) + f" | {l['memory_mb']:.0f} |")
    return table


def draw(path, runs_of):
    """Left: each ablation's FID as a multiple of the baseline's. Right: the peers' FID against milliseconds per image."""
    baseline = runs_of(SETTINGS["baseline"])
    run = [(s, r) for s in SETTINGS.values() if s.group == "ablations" and s.name != "baseline" and log_ratios(r := runs_of(s), baseline, "fid@4")]
    fig, (left, right) = plt.subplots(1, 2, figsize=(15, max(5, 0.28 * len(run) + 1.5)))
    for k, s in enumerate(STEPS):
        for y, (setting, runs) in enumerate(run):
            v = [math.exp(d) for d in log_ratios(runs, baseline, f"fid@{s}")]
            left.errorbar(statistics.mean(v), y + 0.2 * (k - 1), xerr=statistics.stdev(v) if len(v) > 1 else None, fmt="o", markersize=3, color=f"C{k}",
                          label=f"{s} steps" if not y else None)
    left.set_yticks(range(len(run)), [setting.name for setting, _ in run], fontsize=8), left.invert_yaxis(), left.axvline(1, color="grey", linewidth=0.8)
    left.set_xscale("log"), left.set_title("FID ÷ the baseline's of the same seed (mean and standard deviation)", fontsize=10)
    for name, by_steps in peers_rows(runs_of).items():
        points = sorted((min(r["ms_per_image"] for r in rows), statistics.mean(r["fid"] for r in rows)) for rows in by_steps.values())
        right.plot(*zip(*points), marker="o", markersize=4, linewidth=1, label=name, linestyle=":" if name.startswith("teacher") else "-")
    right.set_xscale("log"), right.set_yscale("log"), right.set_xlabel("ms per image"), right.set_title("FID against time per image, 1 to 8 steps", fontsize=10)
    for ax in (left, right):
        for axis in (ax.xaxis, ax.yaxis)[:1 + (ax is right)]:               # plain numbers in place of powers of ten
            axis.set_major_locator(LogLocator(subs=(1, 2, 5))), axis.set_minor_locator(NullLocator()), axis.set_major_formatter("{x:g}")
        if ax.has_data() and ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=80)
    plt.close(fig)


def write(folder, lines):
    """Both files, and the README beside their folder; of several budgets picture and README show the one with most runs."""
    text = ["# The toy's benchmark", "", "Drawn by `python -m toy_mnist.benchmark --report` from `toy_mnist/results.jsonl`; no number here is typed by hand.", "",
            CAPTION, "", "![benchmark](benchmark.png)", ""]
    runs, budgets = runs_in(lines), []
    for budget in {json.dumps(line["budget"]): line["budget"] for line in lines if line["kind"] == "run"}.values():
        mine = {s.name: found(runs, s, budget) for s in SETTINGS.values()}
        used = {id(line): line for by_seed in mine.values() for line in by_seed.values()}          # two settings may share a recipe
        budgets += [(len(used), budget, mine, list(used.values()))] if used else []
    budgets.sort(key=lambda b: -b[0])
    for _, budget, mine, used in budgets:
        text += [f"## {in_words(budget)}", "", f"{len(used)} runs of {sum(map(bool, mine.values()))} settings, {sum(l['seconds'] for l in used) / 3600:.1f} hours of "
                 "training and looks for collapse, on " + "; ".join(sorted({l["device"] for l in used})) + "."]
        floor = next((l["floor"] for l in used if "floor" in l), None)
        text += [f"Real against real at {floor[0]:,} images: FID {floor[1]:.2f}." if floor else "", ""]
        for group in GROUPS:
            text += settings_table(group, lambda s: mine[s.name])
        text += ["### Few steps otherwise", "", *samplers_table(lambda s: mine[s.name])]
    if left_out := sum(len(by_seed) for by_seed in runs.values()) - sum(n for n, *_ in budgets):
        text += [f"Left out: runs whose recipe is no setting's today, {left_out}.", ""]
    text += ["## Speed", "", "One iteration (`ladd.step`) beside its network passes, each timed alone in the same process, medians in milliseconds.", "", *speed_table(lines)]
    (folder / "benchmark.md").write_text("\n".join(text) + "\n")
    draw(folder / "benchmark.png", lambda s: budgets[0][2][s.name] if budgets else {})
    if budgets:
        fill_readme(folder.resolve().parent / "README.md", summary(budgets[0][1], lambda s: budgets[0][2][s.name]))
