"""The benchmark: its losses by hand, a whole tiny run, its statistics, its tables."""

import dataclasses
import functools
import json
import shutil
import types
from math import exp, log, log1p, nan

import pytest
import torch
from filelock import FileLock
from scipy import stats

import ladd
import tiny
from test_toy import random_net
from toy_mnist import benchmark, judge, settings, tables, world
from toy_mnist.settings import BASE, SETTINGS, Ablation, recipe_for

W = torch.tensor([1.0, -2.0, 2.0])  # a linear head; |W| = 3
LABELS = torch.tensor([5, 5, 7, 9])
LOSSES = settings.heads_loss, settings.student_loss


class Echo(ladd.World):
    """A teacher whose only feature is its input, and a state with one head: w . f at each place."""

    def __init__(self, w=W, velocity=None):
        super().__init__(velocity, None)
        self.w, self.judged = w, []

    def heads(self, *given):
        self.judged.append(given)
        return [torch.einsum("bchw,c->bhw", m, self.w) for m in given[0]]

    def head_cond(self, label):
        return torch.nn.functional.one_hot(label, 11).float()


def make_batch(n=4, side=6):
    """A batch of iteration 1."""
    x0, eps, eps_hat, eps_real = (tiny.normal(k, n, 3, side, side) for k in range(4))
    t = torch.tensor([1.0, 0.75, 0.5, 0.25]).repeat(n // 4)
    draws = (t, eps, torch.ones_like(t).bool(), 1 - t / 3, eps_hat, 1 - t / 2, eps_real)
    return ladd.Batch(1, torch.arange(n), x0, LABELS.repeat(n // 4), x0, *draws)


GAMES = {
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
    "relativistic": (lambda r, f: log1p(exp(f - r)), lambda r, f: log1p(exp(r - f))),
    "nonsaturating": (lambda r, f: log1p(exp(-r)) + log1p(exp(f)), lambda r, f: log1p(exp(-f))),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
}


@pytest.mark.parametrize("name", GAMES)
def test_games_and_the_warm_up_of_their_weight_by_hand(name):
    """Two heads of unequal maps: the mean over heads of the mean over places."""
    pairs = [[(0.5, 0.0), (2.0, -2.0), (-1.0, 0.5), (0.0, 1.0)], [(1.0, -1.0), (3.0, 2.0)]]
    real, fake = ([torch.tensor(head)[:, k, None] for head in pairs] for k in (0, 1))
    means = [[sum(loss(*p) for p in head) / len(head) for head in pairs] for loss in GAMES[name]]
    state = types.SimpleNamespace(heads=lambda maps, *_: maps, student=None)
    recipe, b = Ablation(loss=name, adv_warmup=4, distill_weight=3.0), make_batch()
    loss, metrics = settings.heads_loss(state, Echo(), recipe, b, real, fake)
    assert float(loss) == pytest.approx(sum(means[0]) / 2, rel=1e-6) and "accuracy/0" in metrics
    loss, _ = settings.student_loss(state, Echo(), recipe, b, fake, b.x0 + 2)
    assert float(loss) == pytest.approx(2 / 4 * sum(means[1]) / 2 + 3 * 2**2, rel=1e-6)


def test_gradient_penalty_of_a_linear_head_between_real_and_fake():
    b, echo = make_batch(), Echo(w := W.clone().requires_grad_())
    value = settings.gradient_penalty(echo, echo, BASE, b, [b.x0], [b.eps])
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor((3.0 - 1) ** 2))
    torch.testing.assert_close(w.grad, 2 * (3 - 1) * W / 3)  # d (|w| - 1)^2 / dw
    maps, t_hat, *_ = echo.judged[0]
    share = ((maps[0] - b.x0) / (b.eps - b.x0)).detach().flatten(1)  # one for each sample
    assert t_hat is b.t_hat and 0 < share.min() < share.max() < 1 and share.std(1).max() < 1e-3
    few = dataclasses.replace(b, index=b.index[2:])
    mix = settings.uniform(BASE, few, "gradient penalty")  # keyed by sample
    torch.testing.assert_close(mix, share.mean(1)[2:], rtol=0, atol=1e-3)


def test_exact_r1_of_heads_with_a_known_slope():
    b, echo = make_batch(), Echo(w := W.clone().requires_grad_())
    for side in (1, 6):  # whatever the number of patches
        penalty = settings.exact_r1(echo, echo, BASE, b, [tiny.normal(1, 4, 3, side, side)], None)
        assert float(penalty.detach()) == pytest.approx(9)
        torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], 2 * W)
    # The mean over heads; places that a strided head leaves out count.
    a, c = tiny.normal(2, 4, 3, 6, 4), tiny.normal(3, 4, 3, 4, 4)
    echo.heads = lambda maps, *_: [maps[0].square().sum(1) / 2, 2 * maps[1][:, :, ::2, ::2].sum(1)]
    want = (a.square().sum((1, 2, 3)).mean() / 24 + 3 * 4 / 4) / 2
    torch.testing.assert_close(settings.exact_r1(echo, echo, BASE, b, [a, c], None), want)


@pytest.mark.parametrize("weighting", ["exponential", "sds", "nfsd"])
def test_score_distillation_has_the_gradient_that_its_paper_gives(weighting):
    def velocity(x_t, t, label):  # tells a label from none (10)
        return 0.3 * x_t + ladd.expand(t + 0.7 * (label != 10), x_t)

    b, recipe = make_batch(64), Ablation(score_weighting=weighting)
    x0_hat = tiny.normal(7, *b.x0.shape).requires_grad_()
    settings.score_loss(Echo(velocity=velocity), recipe, b, x0_hat).backward()
    x0, times = x0_hat.detach(), settings.uniform(recipe, b, "score")
    t, x_t = ladd.expand(times, x0), ladd.interpolate(x0, b.eps_hat, times)
    v = velocity(x_t, times, b.cond)
    guess, free = x_t - t * v, x_t - t * (v - 0.7)
    expected = {
        "exponential": 2 * (1 - t) * (x0 - guess),  # ADD, section 3.3, c = alpha
        "sds": t**2 * (x_t + (1 - t) * v - b.eps_hat),  # DreamFusion, eq. 3: w (eps - noise)
        "nfsd": -2 * torch.where(t < 0.2, guess - x0, guess - free),  # arXiv 2310.17590
    }[weighting]
    torch.testing.assert_close(x0_hat.grad * x0.numel(), expected, rtol=1e-4, atol=1e-4)


def train_once(toy):
    state = ladd.State(toy, toy.recipe, tiny.CPU)
    return ladd.train_step(state, toy, toy.recipe, 1, None, LOSSES)


def test_settings_are_valid_and_different_and_depart_as_they_say():
    budget = {"iterations": 20_000}
    assert len({json.dumps(tables.identity(s, budget)) for s in SETTINGS.values()}) == len(SETTINGS)
    for setting in SETTINGS.values():
        stated = {k: v for k, v in setting.changes.items() if v != getattr(BASE, k)}
        changed = ladd.diff(recipe_for(setting, budget, 7), BASE).items()
        assert {k: new for k, (_, new) in changed} == {**stated, **budget, "seed": 7}


def test_the_paper_and_the_game_are_what_they_are_called():
    own = ladd.diff(recipe_for(SETTINGS["paper"], {}, 0), ladd.Recipe())  # see test_method.py
    assert {*own} & {*vars(ladd.Recipe())} == {"iterations", "warmup", "share_noise", "taps"}
    game = world.RECIPES["ladd"]
    assert game.distill_weight == game.paired_share == 0


@pytest.fixture
def argv(tmp_path, monkeypatch):
    """Options of a tiny benchmark, whose teacher has random weights."""
    monkeypatch.setattr(judge, "kernel", lambda *args: 0.5)  # takes long
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # float32 on every machine
    for name in ("judge", "reference"):
        shutil.copy(judge.WEIGHTS / f"{name}.safetensors", tmp_path)
    about = {"kind": "toy teacher", "config": {"width": 8, "emb": 32, "sigma_data": 0.6}}
    ladd.save_weights(tmp_path / "teacher.safetensors", random_net().state_dict(), about)
    own = "--iterations 3 --batch 4 --samples 20 --judge-samples 200 --teacher-steps 2 --device cpu"
    return f"{own} --out {tmp_path} --results {tmp_path}/r.jsonl --weights {tmp_path}".split()


def bench(argv, *more):
    """The exit code, and the lines so far."""
    code = tiny.start(benchmark.main, *argv, *more)
    return code, tables.read_lines(benchmark.parse(argv).results)


def make_toy(argv, name):
    """The world of a setting with seed 1."""
    options = benchmark.parse(argv)
    recipe = recipe_for(SETTINGS[name], benchmark.budget_of(options), 1)
    return SETTINGS[name].make_world(recipe, options)


def test_adds_heads_read_a_classifier_of_clean_images(argv, monkeypatch):
    train = functools.partial(settings.train_classifier, steps=30)
    monkeypatch.setattr(settings, "train_classifier", train)
    toy = make_toy(argv, "add")
    x, t = toy.samples.x0[:4], torch.rand(4)
    maps, h = toy.features(x, t, LABELS), x
    for m, block in zip(maps, toy.classifier, strict=False):  # of the images alone
        h = block(h)
        torch.testing.assert_close(m, h)
    assert [m.shape[2] for m in maps] == [14, 14, 7, 7, 7]
    right = toy.classifier(toy.samples.x0).argmax(1) == toy.samples.label
    assert right.float().mean() > 0.5  # it has learnt
    assert ladd.draw(toy.recipe, 5, torch.arange(64), (1,))["t_hat"].max() < 5e-5
    assert train_once(toy)["score_loss"] > 0


def test_real_digits_are_of_the_samples_labels_and_none_that_the_judge_knows(argv, monkeypatch):
    assert world.UNSEEN == 2 * judge.REFERENCE + judge.CURVE_REFERENCE
    label = torch.arange(60) % 10
    grey = (4 * torch.arange(60)).byte()[:, None, None].expand(60, 28, 28)  # told by brightness
    monkeypatch.setattr(world, "load_mnist", lambda root: (grey, label))
    monkeypatch.setattr(world, "UNSEEN", 40)
    toy = make_toy(argv, "real-data")
    x0, y, noise, real = toy.batch(3, 50)
    assert all(map(torch.equal, (x0, y, noise), make_toy(argv, "baseline").batch(3, 50)))
    shown = ((real.amax((1, 2, 3)) + 1) / 2 * 255 / 4).round().long()
    assert torch.equal(label[shown], y) and shown.min() >= 40 and len(shown.unique()) > 15
    assert torch.equal(toy.batch(5, 2)[3], real[2:4]) and "student_loss" in train_once(toy)


def test_finished_runs_are_lines_and_are_not_run_again(argv, tmp_path, capsys):
    chosen = ["--only", "heads-normed", "teacher, Heun", "--seeds=1", "--student-lr=0.1"]
    code, (game, teacher) = bench(argv, *chosen)
    assert (code, game["setting"], teacher["setting"]) == (0, "heads-normed", "teacher, Heun")
    assert all([*game[figure]] == ["4", "2", "1"] for figure in tables.FIGURES)
    assert game["collapsed"] and game["first_alarm"] == 1 and game["samples"]["nfe"] >= 2
    assert [*teacher["fid"]] == ["8", "4", "2", "1"] and not [*tmp_path.glob("*/checkpoints")]
    assert all(2 * int(n) - 1 <= nfe <= 4 * int(n) - 2 for n, nfe in teacher["nfe"].items())
    toy, run = make_toy(argv, "heads-normed"), next(tmp_path.glob("heads-normed-1-*/"))
    student, drawn = toy.make_student().eval(), toy.draw_noise(200, 1, "judge")
    student.net.load_state_dict(ladd.load_weights(run / "student.safetensors", "toy student")[0])
    x, _ = toy.run_sampler(toy.sample_student(2), student, *drawn, "judge it again")
    assert toy.judge(x, drawn[1])["fid"] == pytest.approx(game["fid"]["2"], rel=1e-4)
    capsys.readouterr()
    assert bench(argv, *chosen) == (0, [game, teacher])
    assert capsys.readouterr().out.count(f"seed 1: in {tmp_path / 'r.jsonl'} already") == 2
    (tmp_path / "r.jsonl").write_text(json.dumps(teacher) + "\n")
    with FileLock(next(tmp_path.glob("heads-normed-1-*.lock"))):  # another process is at it
        assert bench(argv, *chosen) == (0, [teacher])
    assert bench(argv, *chosen)[1][1]["fid"] == game["fid"]


def test_killed_runs_go_on_and_failed_ones_let_the_others_run(argv, monkeypatch, capsys):
    done, usual = [], ladd.train_step

    def step(state, toy, recipe, i, *args):
        done.append((recipe.seed, i))
        ladd.check(recipe.seed != 6, "made up")
        if recipe.seed == 7:
            torch.nn.init.constant_(state.heads.heads[0].out.bias, nan)
        if done[-1] == (5, 2) and done.count((5, 2)) == 1:
            raise KeyboardInterrupt
        return usual(state, toy, recipe, i, *args)

    monkeypatch.setattr(ladd, "train_step", step)
    assert bench(argv, "--only", "paired-1", "--seeds", "5") == (130, [])
    code, lines = bench(argv, "--only", "paired-1", "--seeds", "6", "7", "5")
    assert code == 2 and [i for seed, i in done if seed == 5] == [0, 1, 2, 2]
    assert "1 runs failed, the first is paired-1, seed 6: made up" in capsys.readouterr().err
    assert [line["seed"] for line in lines] == [7, 5] and lines[0]["fid"] == {}
    assert "non-finite" in lines[0]["diverged"] and "diverged" not in lines[1]  # that is a result


def test_verdicts_are_those_of_scipys_paired_t_test():
    for seed in range(60):
        a, b = (2 + tiny.normal(seed, 2, 2 + seed % 3) / 9).tolist()
        p = stats.ttest_rel([log(x) for x in a], [log(y) for y in b]).pvalue
        d = [log(x / y) for x, y in zip(a, b, strict=True)]
        expected = "inside the noise" if p >= 0.05 else "better" if sum(d) < 0 else "worse"
        assert tables.verdict(d) == expected
    assert tables.verdict([0.5]) == "untested" and tables.verdict([0.0] * 2) == "inside the noise"


def made_up(name, *fids, seed=0, **more):
    """A line of results with FIDs at 4, 2 and 1 steps."""
    line = {"setting": name, "seed": seed, **tables.identity(SETTINGS[name], {"iterations": 11})}
    line |= {figure: {"4": 0.75, "2": 0.5, "1": 0.25} for figure in tables.FIGURES}
    line |= {"fid": dict(zip("421", fids, strict=False)), "seconds": 360, "device": "an abacus"}
    return {**line, "samples": {"fid": 0.8125}, "floor": 1.5, "collapsed": False, **more}


def test_tables_and_picture_hold_the_numbers_of_the_lines_alone(tmp_path):
    lines = [made_up("baseline", 2 + k / 10, 3 + k / 10, 4 + k / 10, seed=k) for k in range(3)]
    for k, (two, alarm) in enumerate(((3.2, 7), (3.0, None), (3.3, 5))):
        more = dict(seed=k, collapsed=bool(alarm), first_alarm=alarm)
        lines.append(made_up("relativistic", 9 + k, two, 1 + k / 10, **more))
    for k, name in enumerate(("add", "paper")):
        lines += [made_up(name, seed=k, diverged="made up"), made_up(name, 5, 5, 5, seed=1 - k)]
    lines += [made_up("lr-ratio-2", 77, 77, 77, recipe={"beta1": 0.5})]  # no setting's today
    tables.write(tmp_path, lines[::-1])
    text = (tmp_path / "benchmark.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    rows = {row[0]: dict(zip(cells[0], row, strict=False)) for row in cells}
    assert rows["baseline"]["fid"] == "2.1 ± 0.10 / 3.1 ± 0.10 / 4.1 ± 0.10"
    verdict = "4: worse, 2: inside the noise, 1: better, × 4.75 / 1.02 / 0.27 (baseline)"
    expected = {"departs by": "loss = relativistic", "seeds": "0, 1, 2", "kid": "0.75 / 0.5 / 0.25"}
    expected |= {"first alarm": "7, –, 5", "collapsed": "2 of 3", "fid against": verdict}
    assert rows["relativistic"] == {**rows["relativistic"], **expected}
    assert rows["add"]["fid against"] == "untested (paper)"
    assert "77" not in text and "heads-narrow; lr-ratio-2; " in text
    assert "10 runs, 1.0 hours" in text and (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_what_the_repository_reports_is_what_its_results_give(tmp_path):
    assert tiny.start(benchmark.main, "--report", "--docs", tmp_path) == 0
    drawn, shipped = tmp_path / "benchmark.md", benchmark.HERE.parent / "docs" / "benchmark.md"
    assert drawn.read_text() == shipped.read_text(), "draw it again by --report"
