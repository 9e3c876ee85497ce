"""The benchmark: its settings, its runner (on a tiny random teacher), its statistics, its report, ADD's discriminator and the timing of a step."""

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import types

import pytest
import torch
from PIL import Image

import ladd
from test_job import make_teacher
from test_toy import grey_digits
from toy_mnist import benchmark, judge, peers, results, settings, speed, tables, world
from toy_mnist.edm import CUNet
from toy_mnist.settings import BASE, SETTINGS

TINY = ["--iterations", "3", "--batch", "4", "--samples", "20", "--judge-samples", "200", "--set", "teacher_steps=2", "--set", "head_width=8",
        "--set", "warmup=1", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def bench(weights, tmp_path_factory):
    """bench(*options) -> (exit code, what it printed, the lines so far), of tiny runs into one folder."""
    out = tmp_path_factory.mktemp("benchmark")

    def run(*options):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(ladd, "sample_diversity", lambda *args: 1.0)          # 512 samples of a batch of 4 take long,
            patch.setattr(world.report, "draw_start", lambda *args: None)       # a picture and KID too
            patch.setattr(judge, "kernel", lambda *args: 0.5)
            code = benchmark.main([*TINY, "--weights", str(weights), "--out", str(out), "--results", str(out / "r.jsonl"), *options])
        return code, printed.getvalue(), results.read_lines(out / "r.jsonl")
    run.out = out
    return run


@pytest.fixture
def started(monkeypatch):
    """The names of the runs that ladd's command line was asked for."""
    names, usual = [], ladd.run_command
    monkeypatch.setattr(ladd, "run_command", lambda argv: (names.append(argv[argv.index("--name") + 1]), usual(argv)))
    return names


# ---- settings ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_settings_recipe_is_valid_and_departs_from_the_baseline_as_stated(setting):
    recipe = dataclasses.replace(settings.recipe_for(setting, {"iterations": 20_000}, BASE.seed), iterations=BASE.iterations)
    stated = {k: v for k, v in setting.changes.items() if setting.group != "experiments" or v != getattr(BASE, k)}    # these state what BASE has too
    assert settings.departures(recipe) == stated and (stated or setting.name == "baseline" or setting.missing or setting.world != "toy")
    assert setting.against in SETTINGS and setting.group in settings.GROUPS
    modules = dict((peers.Classifier() if setting.world == "add" else CUNet(8, 32)).named_modules())
    assert setting.missing or all(tap in modules for tap in recipe.taps)
    budget = settings.recipe_for(setting, {"iterations": 20, "batch": 8, "samples": 30}, 7)
    assert (budget.iterations, budget.seed) == (20, 7) and budget.batch == setting.changes.get("batch", 8)
    assert budget.samples == min(20 * budget.batch, setting.changes["samples"]) if "samples" in setting.changes else budget.samples == 30


def test_the_reports_experiments_keep_what_it_states():
    six = [settings.recipe_for(SETTINGS[f"experiment-{n}"], {"iterations": 20_000}, 0) for n in (1, 2, 4, 5, 6)]
    for r in six:
        assert (r.guidance, r.guidance_low, r.guidance_high, r.teacher_steps) == (4, 0, 1, 50)
        assert (r.student_lr, r.head_lr, r.adv_weight, r.distill_weight) == (1e-4, 5e-5, 0.1, 1)
    assert [r.samples for r in six] == [10_000, 50_000, 10_000, 10_000, 20_000] and [len(r.taps) for r in six] == [5, 4, 9, 5, 5]
    assert [r.paired_share for r in six] == [0, 0, 0, 0, 1] and SETTINGS["experiment-3"].missing


# ---- the runner -------------------------------------------------------------------------------------------------------

def test_finished_runs_are_lines_and_are_not_run_again(bench, started, capsys):
    code, printed, lines = bench("--only", "baseline,hinge", "--seeds", "0,1")
    assert code == 0 and len(started) == 4 and "4 runs to do" in printed
    looks = [json.loads(text) for text in (next(bench.out.glob("baseline-0-*")) / "metrics.jsonl").read_text().splitlines() if "collapsed" in text]
    assert [look["iteration"] for look in looks] == [1, 2] and all("hue_entropy@4" in look and "fid@1" not in look for look in looks)
    assert [(l["setting"], l["seed"]) for l in lines] == [("baseline", 0), ("baseline", 1), ("hinge", 0), ("hinge", 1)]
    for line in lines:
        assert {f"{k}@{s}" for k in ("fid", "kid", "accuracy", "hue_entropy", "ms") for s in (4, 2, 1)} < set(line["figures"])
        assert {"collapsed", "first_alarm", "seconds", "device", "commit", "torch", "time", "jobs", "floor"} <= set(line)
        assert line["collapsed"] and line["samples"]["n"] == 200        # a random teacher's: no digit can be read
        assert line["changes"] == SETTINGS[line["setting"]].changes and line["recipe"]["iterations"] == line["budget"]["iterations"] == 3
    assert len({l["figures"]["fid@1"] for l in lines}) == 4
    assert len(list((bench.out / "cache").glob("samples-20-200-*.json"))) == 1 and not list(bench.out.glob("*/checkpoints"))

    assert "0 runs to do" in bench("--only", "baseline,hinge", "--seeds", "0,1")[1] and len(started) == 4
    assert "seeds 0, 1" in bench("--list")[1]

    file = bench.out / "r.jsonl"                                        # the last line as a kill leaves it
    file.write_bytes(file.read_bytes()[:-200])
    capsys.readouterr()
    code, _, again = bench("--only", "baseline,hinge", "--seeds", "0,1")
    assert code == 0 and len(started) == 5 and started[4] == started[3] and "line 4 is cut off" in capsys.readouterr().err
    assert len((bench.out / "r.jsonl").read_text().splitlines()) == len(again) == 4 and again[:3] == lines[:3] and [again[3][k] for k in ("setting", "seed")] == ["hinge", 1]
    same = lambda line: {k: v for k, v in line["figures"].items() if not k.startswith("ms@")}
    assert same(again[3]) == same(lines[3])


def test_the_judged_student_is_the_reports(bench, weights):
    """A line's figures are what `ladd.py --toy` itself would print of that student."""
    line = next(l for l in bench("--only", "baseline", "--seeds", "0")[2] if (l["setting"], l["seed"]) == ("baseline", 0))
    options = types.SimpleNamespace(judge_samples=200, weights=str(weights), fid="judge", data_root=None, out=str(bench.out))
    recipe = settings.recipe_for(SETTINGS["baseline"], results.recipe_fields(line["budget"]), 0)
    made = world.ToyWorld(recipe, options, torch.device("cpu"))
    student, _ = world.load_teacher(weights, torch.device("cpu"))
    folder, = bench.out.glob("baseline-0-*")
    ladd.fill(student.net, ladd.load_weights(folder / "student.safetensors", "toy student")[0], folder)
    noise, label = made.draw_noise(200, 0, "judge")
    row = made.judge(made.run_sampler(made.sample_student(2), student, noise, label, "")[0], label)
    assert {k: line["figures"][f"{k}@2"] for k in ("fid", "accuracy", "hue_entropy")} == {k: pytest.approx(row[k]) for k in ("fid", "accuracy", "hue_entropy")}


def test_a_stopped_run_goes_on_from_its_checkpoint(bench, monkeypatch, capsys):
    done, usual = [], ladd.step

    def step(state, world, recipe, terms, i, *args):
        done.append(i)
        if i == 1 and len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(state, world, recipe, terms, i, *args)
    monkeypatch.setattr(ladd, "step", step)
    code, _, lines = bench("--only", "paired-1,adversarial-1", "--seeds", "5")
    assert code == 2 and "stopped after iteration 2" in capsys.readouterr().err and not any(l["seed"] == 5 for l in lines)
    assert bench("--only", "paired-1", "--seeds", "5")[0] == 0 and done == [0, 1, 2]


def test_a_run_that_diverges_is_a_result_and_one_that_fails_lets_the_others_go_on(bench, monkeypatch, capsys):
    def step(state, world, recipe, *args):
        raise (ladd.Diverged if recipe.seed == 8 else ladd.UserError)("made up")
    monkeypatch.setattr(ladd, "step", step)
    code, _, lines = bench("--only", "guidance-1,baseline", "--seeds", "9,8")
    assert code == 2 and "2 of 4 runs failed, the first: baseline, seed 9 (made up)" in capsys.readouterr().err
    assert [(l["setting"], l["figures"]) for l in lines if l.get("diverged")] == [("baseline", {}), ("guidance-1", {})]


def test_a_run_in_another_process_is_left_to_it(bench, started, monkeypatch):
    usual = benchmark.job
    monkeypatch.setattr(benchmark, "job", lambda *args: (usual(*args)[0], usual(*args)[1], bench.out / "taken"))
    with results.locked(bench.out / "locks" / "taken"):
        code, printed, lines = bench("--only", "baseline", "--seeds", "6")
    assert code == 0 and "taken: " in printed and started == [] and not any(l.get("seed") == 6 for l in lines)


def test_side_by_side_the_same_runs_are_asked_for(bench, monkeypatch):
    """Each process is this program with one setting and seed; here it runs at once, in this process."""
    asked = []

    class Process:
        def __init__(self, command, stdout, stderr, env, cwd):
            asked.append((command[3:], env["OMP_NUM_THREADS"]))
            with contextlib.redirect_stdout(stdout):
                self.returncode = benchmark.main(command[3:])

        def poll(self):
            return self.returncode
    monkeypatch.setattr(benchmark, "subprocess", types.SimpleNamespace(Popen=Process))
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, printed, lines = bench("--only", "regression", "--seeds", "2,3", "--jobs", "2")
    assert code == 0 and [words[:4] for words, _ in asked] == [["--only", "regression", "--seeds", s] for s in "23"] and {t for _, t in asked} == {"4"}
    assert "[2 of 2] regression-3-" in printed and set(results.found(results.runs_in(lines), SETTINGS["regression"], lines[-1]["budget"])) == {2, 3}
    assert lines[-1]["jobs"] == 2 and "0 runs to do" in bench("--only", "regression", "--seeds", "2,3")[1]


BAD = {"setting": (["--only", "hinge,nothing"], "nothing"), "seeds": (["--seeds", "1,1"], "--seeds 1,1"), "a word": (["--seeds", "one"], "--seeds one"),
       "jobs": (["--jobs", "0"], "--jobs 0"), "field": (["--set", "colour=3"], "colour=3"), "value": (["--set", "beta1=7"], "beta1"),
       "budget": (["--iterations", "0"], "iterations = 0"), "judged": (["--judge-samples", "20"], "--judge-samples 20"),
       "weights": (["--weights", "/nowhere"], "/nowhere"), "device": (["--device", "abacus"], "abacus"), "two": (["--list", "--report"], "--report"),
       "option": (["--colour"], "--colour"), "results": (["--results", "/dev/null/r"], "/dev/null")}


@pytest.mark.parametrize("options, words", BAD.values(), ids=BAD)
def test_bad_options_are_one_line(bench, started, capsys, options, words):
    assert bench(*options)[0] == 2 and started == []
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# ---- statistics and report --------------------------------------------------------------------------------------------

def test_paired_t_by_hand():
    """p = 1 - the integral of Student's density with n - 1 degrees of freedom from -t to t, t = mean / (std / sqrt n)."""
    d = [-0.3, -0.2, -0.1, 0.05]
    mean = sum(d) / 4
    t, df = abs(mean) / math.sqrt(sum((v - mean) ** 2 for v in d) / 3 / 4), 3
    density = lambda x: math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi) * (1 + x * x / df) ** (-(df + 1) / 2)
    h = t / 2000
    inside = h / 3 * sum(density(k * h) * (1 if k in (0, 2000) else 4 if k % 2 else 2) for k in range(2001))       # Simpson's rule
    assert tables.paired_t(d) == pytest.approx(1 - 2 * inside, rel=1e-6)
    assert tables.verdict(d) == "inside the noise"
    assert tables.verdict([-0.5, -0.6, -0.7]) == "better" and tables.verdict([0.5, 0.6, 0.7]) == "worse"
    assert tables.verdict([0.5]) == tables.verdict([]) == "untested" and tables.verdict([0.0, 0.0]) == "inside the noise"


def test_seeds_are_compared_with_themselves():
    """Ratios of 1.1, 1.1, 1.21 whatever the seeds' own levels; a seed that one side lacks, or that diverged, is left out."""
    a = {k: made_up("hinge", (f, f, f)) for k, f in ((0, 1.1), (1, 11.0), (2, 121.0), (3, 5.0))}
    b = {k: made_up("baseline", (f, f, f)) for k, f in ((2, 100.0), (1, 10.0), (0, 1.0), (4, 7.0))}
    assert tables.log_ratios(a, b, "fid@4") == pytest.approx([math.log(1.1), math.log(1.1), 2 * math.log(1.1)])
    a[1] = made_up("hinge", ())
    assert tables.log_ratios(a, b, "fid@1") == pytest.approx([math.log(1.1), 2 * math.log(1.1)])
    assert tables.verdicts(a, {}) == "untested"


def test_spread_in_words():
    assert tables.spread([1.0, 1.2, 1.4]) == "1.20 ± 0.20" and tables.spread([1.234]) == "1.23"


BUDGET = {"iterations": 11, "batch": 8, "samples": 30, "judge_samples": 1000, "device": "cpu", "networks": "aa+bb"}


def made_up(name, fids, budget=BUDGET, seed=0, alarm=None, **changes):
    """A line of results whose FIDs at 4, 2 and 1 steps are given."""
    figures = {f"fid@{s}": v for s, v in zip((4, 2, 1), fids)}
    figures |= {f"{k}@{s}": v for s in (4, 2, 1) for k, v in (("kid", 0.125), ("accuracy", 0.875), ("hue_entropy", 0.75), ("ms", 1.5 * s))}
    recipe = settings.recipe_for(SETTINGS[name], {**results.recipe_fields(budget), **changes}, seed)
    return {"kind": "run", "setting": name, "seed": seed, "world": SETTINGS[name].world, "budget": budget, "figures": figures if fids else {}, "seconds": 360,
            "collapsed": bool(alarm), "first_alarm": alarm, "device": "an abacus", "floor": [1000, 1.5], "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
            "samples": {"nfe": 64, "ms_per_image": 9.5, "fid": 0.8125, "kid": 0.0625, "accuracy": 0.5, "hue_entropy": 0.25}}


def test_the_report_holds_the_numbers_of_its_lines(tmp_path, weights):
    lines = [made_up("baseline", (2.0 + k / 10, 3.0 + k / 10, 4.0 + k / 10), seed=k) for k in range(3)]
    lines += [made_up("hinge", (9.0 + k, (3.2, 3.0, 3.3)[k], 1.0 + k / 10), seed=k, alarm=(7, None, 5)[k]) for k in range(3)]
    lines += [made_up("lr-ratio-2", (77.0, 77.0, 77.0), beta1=0.5), made_up("regression", (2.5, 2.5, 2.5)), made_up("exact-r1", ())]
    lines += [made_up("baseline", (55.5, 5.0, 5.0), {**BUDGET, "iterations": 12})]
    lines[-2]["diverged"] = "made up"
    del lines[0]["recipe"]["beta1"]                                     # a field that did not exist when the line was written
    row = {"name": "teacher, Heun", "steps": 8, "nfe": 19, "fid": 6.125, "kid": 0.5, "accuracy": 0.5, "hue_entropy": 0.5, "ms_per_image": 3.25}
    lines += [{**made_up("teacher", ()), "rows": [row]}]
    lines += [{"kind": "speed", "recipe": "toy", "batch": 16, "compiled": False, "device": "an abacus", "step_ms": 20.5, "networks_ms": 18.75, "ratio": 1.0933,
               "parts_ms": {"teacher on real": 6.25, "draws": 0.5}, "networks": ["teacher on real"], "memory_mb": 321.0}]
    for line in lines:
        results.append(tmp_path / "r.jsonl", line)
    assert benchmark.main(["--report", "--results", str(tmp_path / "r.jsonl"), "--docs", str(tmp_path / "docs"), "--weights", str(weights)]) == 0
    text = (tmp_path / "docs" / "benchmark.md").read_text()
    first, second = text.split("## 12 iterations of 8")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in first.splitlines() if line.startswith("| ")}
    assert rows["baseline"][:5] == ["", "0, 1, 2", "2.10 ± 0.10", "3.10 ± 0.10", "4.10 ± 0.10"]
    assert rows["hinge"][:2] == ["loss = hinge", "0, 1, 2"] and rows["hinge"][2:5] == ["10.00 ± 1.00", "3.17 ± 0.15", "1.10 ± 0.10"]
    assert rows["hinge"][5:] == ["0.125 / 0.125 / 0.125", "0.875 / 0.875 / 0.875", "0.750 / 0.750 / 0.750", "0.81", "7, –, 5", "2 of 3", "360",
                                 "4: worse, 2: inside the noise, 1: better, × 4.75 / 1.02 / 0.27 (baseline)"]
    assert rows["lr-ratio-2"][1] == "not run" and "77.0" not in text and "no setting's today, 1." in text
    assert rows["exact-r1"][10] == "0 of 1, 1 diverged" and rows["exact-r1"][12] == "untested (baseline)"
    assert rows["experiment-3"][1].startswith("not rebuilt") and rows["batch-2"][1] == "not run"
    assert rows["teacher, Heun"] == ["8", "19", "6.12", "0.500", "0.500", "0.500", "3.25"] and "55.50" not in first and "55.50" in second
    assert "| an abacus | toy | 16 | no | 20.5 | 18.8 | 1.09 | 6.2 | 0.5 | 321 |" in second and "Real against real at 1,000 images: FID 1.50" in first
    with Image.open(tmp_path / "docs" / "benchmark.png") as image:
        assert min(image.size) > 300
    columns = {line.count("|") for line in first[first.index("### Ablations"):first.index("### Peers")].splitlines() if line.startswith("|")}
    assert len(columns) == 1


def test_the_readmes_table_is_filled_between_its_marks(tmp_path, weights):
    for line in [made_up("baseline", (2.0 + k, 3.0, 4.0), seed=k) for k in range(2)] + [made_up("hinge", (1.0 + k / 2, 6.0, 2.0), seed=k) for k in range(2)]:
        results.append(tmp_path / "r.jsonl", line)
    readme = tmp_path / "README.md"
    for old in ("", "an older table\n"):
        readme.write_text(f"before\n{tables.BEGIN}\n{old}{tables.END}\nafter\n")
        benchmark.main(["--report", "--results", str(tmp_path / "r.jsonl"), "--docs", str(tmp_path / "docs"), "--weights", str(weights)])
        text = readme.read_text()
        assert text.startswith(f"before\n{tables.BEGIN}\n") and text.endswith(f"{tables.END}\nafter\n") and "older" not in text
        rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
        assert rows == ["| hinge | loss = hinge | 1.25 ± 0.35 | 6.00 ± 0.00 | 2.00 ± 0.00 | 4: better, 2: worse, 1: better, × 0.50 / 2.00 / 0.50 |",
                        "| **baseline** |  | 2.50 ± 0.71 | 3.00 ± 0.00 | 4.00 ± 0.00 |  |"]
        assert "Not run: lr-ratio-2, lr-ratio-20, non-saturating" in text


def test_the_readme_shows_experiments_and_peers_once_they_were_run():
    runs = {name: {k: made_up(name, (f + k, f, 2 * f), seed=k, alarm=alarm) for k in range(2)} for name, f, alarm in
            (("baseline", 1.0, None), ("experiment-1", 4.0, 5), ("experiment-1-rescue", 2.0, None), ("add", 3.0, None))}
    runs |= {"teacher": {0: {}}, "wasserstein": {0: made_up("wasserstein", ())}}
    text = "\n".join(tables.summary(BUDGET, lambda s: runs.get(s.name, {})))
    three = "0.875 / 0.875 / 0.875 | 0.750 / 0.750 / 0.750"
    assert f"| experiment-1 | 4.50 ± 0.71 | 4.00 ± 0.00 | 8.00 ± 0.00 | {three} | 5, 5 | 2 of 2 | " in text
    assert f"| experiment-1-rescue | 2.50 ± 0.71 | 2.00 ± 0.00 | 4.00 ± 0.00 | {three} | –, – | 0 of 2 | 4: " in text and "(experiment-1) |" in text
    assert f"| add | 3.50 ± 0.71 | 3.00 ± 0.00 | 6.00 ± 0.00 | {three} | –, – | 0 of 2 | untested (paper) |" in text
    assert text.index(settings.GROUPS["experiments"]) < text.index(settings.GROUPS["peers"])
    left = text[text.index("Not run: "):].split(", ")
    assert "experiment-2" in left and "regression" in left and not {"experiment-1", "experiment-3", "add", "teacher", "wasserstein"} & set(left)
    assert "Diverged in every run: wasserstein." in text


def test_what_the_repository_reports_is_what_its_results_give(tmp_path):
    root = benchmark.ROOT
    (tmp_path / "README.md").write_text((root / "README.md").read_text())
    assert benchmark.main(["--report", "--docs", str(tmp_path / "docs")]) == 0
    for name in ("README.md", "docs/benchmark.md"):
        assert (tmp_path / name).read_text() == (root / name).read_text(), f"{name}: draw it again by --report"


def test_a_report_of_nothing_says_that_nothing_was_run(tmp_path, weights):
    assert benchmark.main(["--report", "--results", str(tmp_path / "r.jsonl"), "--docs", str(tmp_path), "--weights", str(weights)]) == 0
    assert "Not run." in (tmp_path / "benchmark.md").read_text() and (tmp_path / "benchmark.png").exists()


# ---- peers ------------------------------------------------------------------------------------------------------------

def toy_options(weights, out):
    return ladd.parser_for(world).parse_args(["--toy", "--weights", str(weights), "--out", str(out), "--judge-samples", "200"])


def tiny_recipe(name, **changes):
    return settings.recipe_for(SETTINGS[name], {"batch": 4, "samples": 20, "teacher_steps": 2, "lr_warmup": 0, **changes}, 0)


def test_adds_features_are_the_classifiers(weights, bench, monkeypatch):
    monkeypatch.setattr(peers, "STEPS", 2)
    cpu, trained = torch.device("cpu"), []
    usual = peers.train_classifier
    monkeypatch.setattr(peers, "train_classifier", lambda *args: (trained.append(1), usual(*args))[1])
    recipe = tiny_recipe("add")
    first, made = (peers.AddWorld(recipe, toy_options(weights, bench.out), cpu) for _ in range(2))
    first.prepare(), made.prepare()
    assert len(trained) == 1                                            # the second was loaded
    classifier = made.tap_root
    assert torch.equal(first.tap_root.out.weight, classifier.out.weight) and not torch.equal(classifier.out.weight, peers.Classifier().out.weight)

    x, label = made.x0[:4].clone().requires_grad_(), made.labels[:4]
    maps, h = ladd.features(made, x, torch.full((4,), 1e-4), label, recipe.taps), x
    for got, block in zip(maps, classifier.body):                       # from the images alone: no time, no condition
        h = block(h)
        torch.testing.assert_close(got, h)
    sum(m.sum() for m in maps).backward()
    assert x.grad.abs().min(0).values.max() > 0 and all(p.grad is None for p in classifier.parameters())

    state = ladd.State(made, recipe, cpu)
    assert not any("classifier" in name for name, _ in state.student.named_parameters())
    before = {k: v.clone() for k, v in made.teacher.state_dict().items()}
    weights_before = [p.clone() for p in state.student.parameters()]
    metrics = [ladd.step(state, made, recipe, made.terms(), i, cpu) for i in range(2)][1]
    assert metrics["score_loss"] > 0 and any(not torch.equal(a, b) for a, b in zip(weights_before, state.student.parameters()))
    assert all(torch.equal(v, before[k]) for k, v in made.teacher.state_dict().items())


def test_adds_heads_see_clean_images_and_its_score_is_taken_at_every_time(weights, tmp_path):
    recipe = tiny_recipe("add", batch=64)
    made = peers.AddWorld(recipe, toy_options(weights, tmp_path), torch.device("cpu"))
    d = ladd.draw(recipe, 5, (1,))
    assert d["t_hat"].max() < 5e-5
    asked, teacher = [], made.teacher
    made.teacher = lambda x, t, cond: (asked.append((x, t)), teacher(x, t, cond))[1]
    p = ladd.Pass(key=(0, 5, 0), x0=torch.zeros(64, *made.shape), x0_hat=torch.ones(64, *made.shape), eps_hat=torch.full((64, *made.shape), 3.0),
                  cond=torch.arange(64) % 10, fake_t=None, t_hat=d["t_hat"])
    term, = made.terms().add_student
    term(p, None)
    (x, t), = asked
    assert t.min() < 0.1 and t.max() > 0.9 and torch.allclose(x, 1 + 2 * ladd.expand(t, x))     # (1 - t) 1 + t 3


def test_with_heads_first_the_students_gradient_comes_from_the_stepped_heads(weights, tmp_path):
    """One iteration by either order: the same step of the heads; the student's loss is that of the heads after it, not before."""
    def iteration(name):
        made = peers.WORLDS[SETTINGS[name].world](tiny_recipe(name), toy_options(weights, tmp_path), torch.device("cpu"))
        made.prepare()
        terms, seen, losses = made.terms(), [], []
        state = ladd.State(made, made.recipe, made.device)
        usual = terms.student_loss

        def student_loss(real, fake):
            seen.append([p.clone() for p in state.heads.parameters()])
            losses.append([r.clone() for r in real])
            return usual(real, fake)
        metrics = ladd.step(state, made, made.recipe, dataclasses.replace(terms, student_loss=student_loss), 1, made.device)
        return state, seen[0], losses[0], metrics
    first, seen, real, metrics = iteration("heads-first")
    usual, seen_before, real_before, metrics_before = iteration("baseline")
    after = list(usual.heads.parameters())
    assert all(map(torch.equal, first.heads.parameters(), after)) and all(map(torch.equal, seen, after))       # stepped once, before the student's loss
    assert not all(map(torch.equal, seen_before, after)) and all(not torch.equal(a, b) for a, b in zip(real, real_before))
    assert metrics["heads_loss"] == metrics_before["heads_loss"] and metrics["student_loss"] != metrics_before["student_loss"]
    assert any(not torch.equal(a, b) for a, b in zip(first.student.parameters(), usual.student.parameters()))


def test_real_digits_are_none_that_the_judge_compares_with_and_have_no_noise(weights, tmp_path, monkeypatch):
    grey, label = grey_digits(60)
    monkeypatch.setattr(peers, "load_mnist", lambda root: (grey, label))
    monkeypatch.setattr(peers, "UNSEEN", 40)
    made = peers.DataWorld(tiny_recipe("real-data"), toy_options(weights, tmp_path), torch.device("cpu"))
    made.prepare()
    assert torch.equal(made.labels, label[40:]) and torch.equal(made.x0.amax(1) > -1, grey[40:] > 0)
    x0, cond, noise = made.read(3, 5)
    assert noise is None and x0.shape == (5, *made.shape) and made.fingerprint() != world.ToyWorld.fingerprint(made)
    ladd.step(ladd.State(made, made.recipe, made.device), made, made.recipe, made.terms(), 1, made.device)
    monkeypatch.setattr(peers, "UNSEEN", 41)
    with pytest.raises(ladd.UserError, match="samples = 20"):
        made.prepare()


def test_the_teacher_is_judged_by_each_of_its_samplers(bench, monkeypatch):
    assert len(peers.SAMPLERS) == 4
    monkeypatch.setattr(peers, "SAMPLERS", {k: peers.SAMPLERS[k] for k in ("Heun", "DPM-Solver++")})
    code, _, lines = bench("--only", "teacher", "--seeds", "0")
    rows = {(r["name"], r["steps"]): r for r in lines[-1]["rows"]}
    assert code == 0 and len(rows) == 8 and lines[-1]["setting"] == "teacher"
    heun = [rows["teacher, Heun", n] for n in (1, 2, 4, 8)]
    assert all(2 * n - 1 <= r["nfe"] <= 2 * (2 * n - 1) for n, r in zip((1, 2, 4, 8), heun)) and all(r["fid"] > 0 and r["n"] == 200 for r in rows.values())
    assert "0 runs to do" in bench("--only", "teacher", "--seeds", "0")[1]


# ---- speed ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["baseline", "fresh-target"])
def test_the_passes_timed_alone_are_those_of_a_step(name, weights, tmp_path):
    recipe, cpu = tiny_recipe(name, head_width=8), torch.device("cpu")
    made, calls = world.ToyWorld(recipe, toy_options(weights, tmp_path), cpu), []
    made.x0 = made.noise = torch.randn(20, *made.shape)
    made.labels = torch.arange(20) % 10
    state = ladd.State(made, recipe, cpu)
    for who, module in (("student", state.student), ("teacher", made.teacher.net.stem), ("heads", state.heads)):
        module.register_forward_hook(lambda m, inputs, output, who=who: calls.append((who, len(inputs[0]) if who != "heads" else recipe.batch)))
    parts, networks = speed.passes(made, state, recipe, cpu, 60)
    count = {}
    for part, (before, run) in parts.items():
        before(), calls.clear(), run()
        count[part] = sorted(calls)
    assert sorted(c for part in networks for c in count[part]) == count["step"] and ("teacher", 4) in count["step"]
    assert [part for part in parts if part not in networks] == ["step", "data and draws", "clipping, optimizers, average"]
    assert all(p.grad is None for p in state.student.parameters())      # the update that is timed is a whole one


def test_speed_writes_its_lines(bench, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    code, printed, lines = bench("--speed", "--batches", "4")
    made = [l for l in lines if l["kind"] == "speed"]
    assert code == 0 and [l["recipe"] for l in made] == ["toy", "baseline", "paper"] and printed.count(": ratio ") == 3
    for line in made:
        assert line["batch"] == 4 and line["networks_ms"] == pytest.approx(sum(line["parts_ms"][k] for k in line["networks"]))
        assert line["ratio"] == pytest.approx(line["step_ms"] / line["networks_ms"]) and 0.3 < line["ratio"] < 10 and line["memory_mb"] > 10
