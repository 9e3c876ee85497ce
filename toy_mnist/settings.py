"""The settings that `python -m toy_mnist.benchmark` runs: each a name and the fields in which its recipe departs from BASE.

In the order in which they are run, the most telling first. A setting differs from the one it is held `against` by one change,
and by what that change forces, which its note then names.
"""

import dataclasses

import ladd
from toy_mnist.world import PAPER, TOY

# What the settings depart from: the validated recipe as it stood when they were run, before `distill_fresh` and `distill_power`.
BASE = ladd.override(TOY, {"distill_fresh": 0, "distill_power": 0.0})

GROUPS = {"ablations": "One change each from the baseline.",
          "experiments": "The six experiments of a report on LADD with Color-MNIST (1 to 5 collapsed in colour, 6 did not) as far as a recipe can say them, and for each the "
                         "change likeliest to save it.",
          "peers": "Other ways to few steps, on the same network, data and judge."}


@dataclasses.dataclass(frozen=True)
class Setting:
    name: str
    group: str
    changes: dict                   # of the recipe, from BASE
    note: str = ""
    world: str = "toy"              # whose samples and features: see `peers.WORLDS`
    against: str = "baseline"       # the setting that the table compares it with
    missing: str = ""               # why it can't be run


def recipe_for(setting, budget, seed):
    """The setting's recipe: BASE, over it the budget's fields, over these the setting's own.

    A setting that asks for more samples than its run would read gets as many as that: the others would only cost time.
    """
    recipe = ladd.override(ladd.override(BASE, budget), {**setting.changes, "seed": seed})
    read = recipe.iterations * recipe.batch
    return ladd.override(recipe, {"samples": read}) if setting.changes.get("samples", 0) > read else recipe


def departures(recipe, reference=BASE):
    """The fields in which recipe differs from reference, with their values."""
    return {k: new for k, (_, new) in ladd.drift(recipe, reference).items()}


def ablation(name, note="", world="toy", against="baseline", **changes):
    return Setting(name, "ablations", changes, note, world, against)


FRESH = dict(paired_share=0.0, distill_below=0.99, backward_simulation=False)

ABLATIONS = [
    ablation("baseline", "the validated recipe as it stood before it had distill_fresh and distill_power"),
    ablation("lr-ratio-2", "heads 2 times as fast as the student (10 in the baseline)", head_lr=2 * BASE.student_lr),
    ablation("lr-ratio-20", "heads 20 times as fast", head_lr=20 * BASE.student_lr),
    ablation("hinge", loss="hinge"),
    ablation("non-saturating", loss="nonsaturating"),
    ablation("exact-r1", "on every iteration, which makes each about three times as long on a CPU", r1_weight=0.1),
    ablation("approximate-r1", "weight and noise of APT", approximate_r1=100.0),
    ablation("gen-every-3", "as many iterations, so a third of the student's updates", gen_every=3),
    ablation("gen-every-5", "as many iterations, so a fifth of them", gen_every=5),
    ablation("renoise-low", renoise_mean=-0.5),
    ablation("renoise-middle", renoise_mean=0.5),
    ablation("batch-2", "as many iterations, so fewer samples and less time", batch=2),
    ablation("batch-16", "as many iterations, so fewer samples and less time", batch=16),
    ablation("taps-encoder", taps=("enc.1", "enc.3")),
    ablation("taps-middle", taps=("mid.1",)),
    ablation("taps-decoder", taps=("dec.1", "dec.3")),
    ablation("noise-not-shared", share_noise=False),
    ablation("misaligned-pairs", misaligned=1.0),
    ablation("no-backward-simulation", "the squared error then reaches fresh noise at t < 1 too", backward_simulation=False),
    ablation("heads-first", "the heads are stepped before the student's gradient is taken", world="heads-first"),
    ablation("times-uniform", time_probs=(0.25,) * 4),
    ablation("fresh-noise", "no stored noise, so the squared error is left to t < 1, on noised samples: without backward simulation", **FRESH),
    ablation("real-data", "fresh-noise with digits of MNIST in place of the teacher's samples (as many, none that the judge compares with); "
             "a real image has no noise that it was made from", world="data", against="fresh-noise", **FRESH),
    ablation("guidance-1", "samples of the teacher without guidance", guidance=1.0),
    ablation("guidance-4", "guided by 4, for the same t", guidance=4.0),
    ablation("samples-1000", samples=1_000),
    ablation("samples-50000", samples=50_000),
    ablation("no-average", "the last weights are judged", ema_half_life=0.0),
    ablation("heads-narrow", head_width=32),
    ablation("heads-wide", head_width=128),
    ablation("wasserstein", "with gradient penalty, without which it has no bound", loss="wasserstein", gradient_penalty=1.0),
    ablation("paired-0", "the squared error must then stop below t = 1, and backward simulation leaves it no t < 1: the adversarial loss alone",
             paired_share=0.0, distill_below=0.99),
    ablation("paired-1", paired_share=1.0),
    ablation("adversarial-0", "the squared error alone, on the paired half of the batch", adv_weight=0.0),
    ablation("adversarial-1", adv_weight=1.0),
    ablation("heads-not-told-t", heads_see_t=False),
    ablation("fresh-target", "the validated recipe of today, both of its differences at once", **departures(TOY)),
    ablation("paper", "the paper's method, all of its differences at once", **departures(PAPER)),
]

# What the report states for all six; the rest is the paper's method.
REPORT = {**departures(PAPER), "guidance": 4.0, "guidance_low": 0.0, "guidance_high": 1.0, "student_lr": 1e-4, "head_lr": 5e-5,
          "adv_weight": 0.1, "distill_weight": 1.0, "distill_below": 0.99}
PAIRED = dict(paired_share=1.0, distill_below=1.0)
OPEN = "Left open: batch, optimizer, whether the squared error was taken at t = 1 too (here: below). Its 20,000 iterations are cut to the budget's."
EARLY = ("stem", "enc.0", "enc.1", "enc.2", "enc.3")
NINE = ("enc.0", "enc.1", "enc.2", "enc.3", "mid.1", "dec.0", "dec.1", "dec.2", "dec.3")


def experiment(number, note, **changes):
    return Setting(f"experiment-{number}", "experiments", {**REPORT, **changes}, note)


EXPERIMENTS = [
    experiment(1, "Kept: 10,000 samples at guidance 4, heads slower than the student, both weights, five small heads on early features. "
               f"Not kept: 1x1 convolutions with pooling (ours, 16 wide). {OPEN}", samples=10_000, taps=EARLY, head_width=16),
    experiment(2, "Kept: 50,000 samples, four heads of 7.6M together (there 7.4M), a warm-up of the adversarial weight. Left open besides: which features, how "
               "long a warm-up (here 75 iterations).", samples=50_000, taps=("enc.1", "enc.3", "mid.1", "dec.1"), head_width=280, adv_warmup=75),
    Setting("experiment-3", "experiments", {}, "", missing="not rebuilt: it changes the teacher's pooling"),
    experiment(4, "Kept: nine heads of 5.0M together (there 5.1M). Not kept: spectral norm. Left open besides: how many samples (here 10,000), which features.",
               samples=10_000, taps=NINE, head_width=144),
    experiment(5, "As 4, with five heads (2.8M, on the baseline's taps).", samples=10_000, head_width=144),
    experiment(6, "Kept: 20,000 samples with their noise stored and given to the student, heads of 2.5M together (there 2.6M), the squared error on those pairs, "
               "at t = 1 too. Left open besides: how many heads (here five, on the baseline's taps).", samples=20_000, head_width=136, **PAIRED),
]
RESCUES = [Setting(f"{s.name}-rescue", "experiments", {**s.changes, **PAIRED}, "With every noise paired, and the squared error so at t = 1 too.",
                   against=s.name) for s in EXPERIMENTS if s.name[-1] in "1245"]
RESCUES += [Setting("experiment-6-rescue", "experiments", {**EXPERIMENTS[5].changes, "head_lr": 1e-3},
                    "It stood already; with heads ten times as fast as the student, not half.", against="experiment-6")]

PEERS = [
    Setting("teacher", "peers", {}, "The teacher itself with four samplers at 1, 2, 4 and 8 steps, nothing trained.", world="teacher"),
    Setting("regression", "peers", dict(adv_weight=0.0, paired_share=1.0), "Squared error on noise-sample pairs, no adversarial loss."),
    Setting("add", "peers", dict(taps=tuple(f"body.{k}" for k in range(5)), renoise_mean=-10.0, renoise_std=0.0, loss="hinge", r1_weight=1e-5, heads_see_t=False,
                                 time_probs=(0.25,) * 4, warmup=0, adv_weight=1.0, distill_weight=0.0, **FRESH, score_weight=2.5),
            "ADD (arXiv 2311.17042): heads on a classifier's features of the clean guess and sample, score distillation of weight 2.5, R1 of 1e-5, times "
            "alike often. Learning rates and the rest are the baseline's. Clean means t-hat = sigmoid(-10).", world="add", against="paper"),
    Setting("classifier-heads", "peers", dict(taps=tuple(f"body.{k}" for k in range(5)), renoise_mean=-10.0, renoise_std=0.0),
            "The baseline with ADD's heads in place of LADD's: a classifier's features of clean images.", world="add"),
]

SETTINGS = {s.name: s for s in (*ABLATIONS, *sorted(EXPERIMENTS + RESCUES, key=lambda s: s.name), *PEERS)}
