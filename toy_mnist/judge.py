"""The toy's judge: Frechet and kernel distance on a small network's features, digit accuracy, hue entropy, hue spread.

    python -m toy_mnist.judge [--data-root DIR]      trains it again and writes toy_mnist/weights/judge.* and reference.*

The network is trained to name the digit and to point at the hue; its last 128 linear outputs (before any nonlinearity, so
no unit is dead and the covariance is not singular) are the features. Distances are clean-fid's own functions. The judge is
never a training signal. Its Frechet distance is on its own scale: compare it with nothing but itself and its floor, the
distance between two disjoint sets of real images.
"""

import argparse
import contextlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import ladd
from toy_mnist.data import HUE_BINS, ColorMNIST, image_hue, load_mnist

WEIGHTS = Path(__file__).parent / "weights"
REFERENCE = 10_000                                              # real images whose features ship: MNIST train 0 .. 9,999
FLOOR_AT = (1_000, 2_000, 5_000, 10_000)                        # the floor uses MNIST train 10,000 .. 19,999
WATCH = 2_000                                                   # and these, 20,000 .. 21,999, judge a run's curve alone


class JudgeNet(nn.Module):
    """x [B,3,28,28] in [-1,1] -> features [B,128]; `heads(features)` -> digit logits [B,10], hue as (cos, sin) [B,2]."""

    def __init__(self, width=32, features=128):
        super().__init__()
        self.config = {"width": width, "features": features}
        conv = lambda a, b, s: nn.Sequential(nn.Conv2d(a, b, 3, stride=s, padding=1), nn.GroupNorm(8, b), nn.SiLU())
        self.body = nn.Sequential(conv(3, width, 2), conv(width, 2 * width, 1), conv(2 * width, 2 * width, 2),
                                  conv(2 * width, 3 * width, 2))          # [B, 3*width, 4, 4]
        self.features = nn.Linear(3 * width * 16, features)
        self.digit, self.hue = nn.Linear(features, 10), nn.Linear(features, 2)

    def forward(self, x):
        return self.features(self.body(x).flatten(1))

    def heads(self, f):
        return self.digit(F.silu(f)), self.hue(F.silu(f))


# ---------------------------------------------------------------------------------------------------------------------
# Distances and colour
# ---------------------------------------------------------------------------------------------------------------------

def frechet(a, b):
    """clean-fid's Frechet distance between two sets of features [N, D], [M, D]."""
    from cleanfid.fid import frechet_distance
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)))


def kernel(a, b, subsets=50, seed=0):
    """clean-fid's kernel distance (unbiased, cubic kernel) between two sets of features; its subsets seeded."""
    from cleanfid.fid import kernel_distance
    before = np.random.get_state()
    np.random.seed(seed)                                        # clean-fid draws its subsets from numpy's global state
    try:
        return kernel_distance(np.asarray(a, np.float32), np.asarray(b, np.float32), num_subsets=subsets)
    finally:
        np.random.set_state(before)


def entropy(hue, bins=HUE_BINS):
    """Entropy of hues [N] in [0, 1) over `bins` equal bins, as a share of the greatest possible: 1 = all hues alike often."""
    p = torch.histc(hue.float(), bins, 0, 1) / max(len(hue), 1)
    return float(-(p[p > 0] * p[p > 0].log()).sum() / math.log(bins))


def hue_spread(hue, label):
    """Per class, 1 - |mean of exp(2 pi i hue)|: 0 = one colour only, near 1 = all colours alike. {class: spread}"""
    angle = 2 * math.pi * hue
    spread = {}
    for c in label.unique().tolist():
        a = angle[label == c]
        spread[c] = 1 - float(torch.hypot(a.cos().mean(), a.sin().mean()))
    return spread


# ---------------------------------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def describes(path):
    """For what is read from a file's .json: UserError where it is not there or not of the form that is expected."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ladd.UserError(f"{path}: its contents or its .json are of another form ({error!r:.200}): restore both or make them again") from error


class Judge:
    """`judge(x, label) -> dict` of fid, kid, accuracy, hue_entropy, hue_spread_min; x [N,3,28,28], label [N] as asked for."""

    def __init__(self, weights=WEIGHTS, device="cpu", fid="judge", data_root=None):
        path, reference = (Path(weights) / f"{name}.safetensors" for name in ("judge", "reference"))
        tensors, self.about = ladd.load_weights(path, "toy judge", "config", "figures")
        with describes(path):
            self.net = JudgeNet(**self.about["config"]).to(device).eval().requires_grad_(False)
            figures = self.about["figures"]
            self.floor, self.watch_floor = {str(int(n)): float(v) for n, v in figures["floor"].items()}, float(figures["watch_floor"])
            self.hue_entropy, self.class_share = float(figures["hue_entropy_real"]), list(map(float, figures["class_share"]))
            if len(self.class_share) != 10 or min(self.class_share) < 0 or not math.isclose(sum(self.class_share), 1, abs_tol=1e-3):
                raise ValueError("class_share is not ten shares of 1")
        ladd.fill(self.net, tensors, path)
        self.device, self.which = device, fid
        if fid == "judge":
            tensors, about = ladd.load_weights(reference, "toy reference", "figures")
            if about["figures"] != figures:
                raise ladd.UserError(f"{reference}: made with another judge than {path}: restore both or make them again")
            with describes(reference):
                self.reference, self.watch_reference = tensors["features"].float().numpy(), tensors["watch"].float().numpy()
        else:                                                   # clean-fid's Inception wants the real images themselves
            self.inception = inception(device)
            data = ColorMNIST(*load_mnist(data_root))
            images = [data.batch(torch.arange(i, i + 500), torch.full((500,), -2))[0] for i in range(0, 2 * REFERENCE + WATCH, 500)]
            real = torch.cat([self.inception(x) for x in images]).numpy()
            self.reference, self.watch_reference = real[:REFERENCE], real[-WATCH:]
            self.floor = {str(n): frechet(real[REFERENCE:REFERENCE + n], self.reference) for n in FLOOR_AT}
            self.watch_floor = frechet(real[REFERENCE:2 * REFERENCE][:1000], self.watch_reference)

    @torch.no_grad()
    def features(self, x):
        """Features and digit logits of images [N,3,28,28]: [N,128], [N,10] on the CPU, float32."""
        f = torch.cat([self.net(b.to(self.device).clamp(-1, 1)) for b in x.split(500)])
        return f.cpu(), self.net.heads(f)[0].cpu()

    def __call__(self, x, label, watch=False):
        """The figures of a row; with watch those of a point of the curve: against real images that no report uses, without KID."""
        reference = self.watch_reference if watch else self.reference
        f, logits = self.features(x)
        if self.which == "inception":
            f = torch.cat([self.inception(b.clamp(-1, 1)) for b in x.split(500)])
        hue, label = image_hue(x.cpu()), label.cpu()
        return {"fid": frechet(f.numpy(), reference), "kid": None if watch else kernel(f.numpy(), reference),
                "accuracy": float((logits.argmax(1) == label).float().mean()),
                "hue_entropy": entropy(hue), "hue_spread_min": min(hue_spread(hue, label).values()), "n": len(x)}

    def floor_at(self, n):
        """The real-vs-real distance at the largest stated count that is not above n (at least the smallest)."""
        counts = sorted(map(int, self.floor))
        best = max([k for k in counts if k <= n], default=counts[0])
        return best, self.floor[str(best)]


def inception(device):
    """clean-fid's Inception as images [B,3,28,28] in [-1,1] -> features [B,2048]; UserError where it can't be downloaded."""
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer
    try:
        model = build_feature_extractor("clean", device=torch.device(device), use_dataparallel=False)
    except Exception as error:
        raise ladd.UserError(f"--fid inception: clean-fid's Inception weights can't be loaded or downloaded "
                             f"({str(error).splitlines()[0][:120]}): leave --fid at 'judge'") from error
    resize = build_resizer("clean")

    @torch.no_grad()
    def features(x):
        pictures = ((x.cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        batch = torch.stack([torch.from_numpy(resize(p)).permute(2, 0, 1) for p in pictures])
        return model(batch.to(device)).float().cpu()
    return features


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m toy_mnist.judge", description="Train the toy's judge.")
    parser.add_argument("--data-root", help="folder that holds MNIST/raw (else LADD_DATA, else ./data by download)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(WEIGHTS), help="folder of the result (default %(default)s)")
    args = parser.parse_args(argv)

    data = ColorMNIST(*load_mnist(args.data_root), seed=args.seed + 1000)
    test = ColorMNIST(*load_mnist(args.data_root, train=False), seed=args.seed + 1001)
    torch.manual_seed(args.seed)
    net, batch = JudgeNet(), 200
    steps = max(args.epochs * len(data) // batch, 1)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), mininterval=5):
        index, epoch = ladd.reader_indices(len(data), step * batch, batch, args.seed)
        x, label = data.batch(index, epoch)
        digit, hue = net.heads(net(x))
        angle = 2 * math.pi * image_hue(x)
        loss = F.cross_entropy(digit, label, label_smoothing=0.05) + F.mse_loss(hue, torch.stack([angle.cos(), angle.sin()], 1))
        opt.zero_grad(), loss.backward(), opt.step(), schedule.step()

    @torch.no_grad()
    def run(d, start, count, epoch):
        parts = [d.batch(torch.arange(i, min(i + 500, start + count)), torch.full((min(500, start + count - i),), epoch))
                 for i in range(start, start + count, 500)]
        x, label = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        f = torch.cat([net(b) for b in x.split(500)])
        return f, net.heads(f)[0].argmax(1).eq(label).float().mean().item(), image_hue(x), label

    n = min(REFERENCE, len(data) // 3)
    reference, _, hue, label = run(data, 0, n, -2)
    other, *_ = run(data, n, n, -2)
    watch, *_ = run(data, 2 * n, min(WATCH, len(data) - 2 * n), -2)
    reference, watch = reference.half(), watch.half()
    floor = {str(k): frechet(other[:k], reference.float()) for k in FLOOR_AT if k <= n} or {str(n): frechet(other, reference.float())}
    figures = {"test_accuracy": run(test, 0, len(test), -2)[1], "floor": floor, "watch_floor": frechet(other[:1000], watch.float()), "hue_entropy_real": entropy(hue),
               "hue_spread_real": hue_spread(hue, label), "least_feature_std": float(other.std(0).min()),
               "largest_feature_std": float(other.std(0).max()),
               "class_share": [float((data.label == c).float().mean()) for c in range(10)]}
    about = {"command": f"python -m toy_mnist.judge --epochs {args.epochs} --seed {args.seed}",
             "data": f"MNIST train, uniform hue; reference: its first {n:,} images; floor: the next {n:,} against them; "
                     f"watch: the {len(watch):,} after those",
             "versions": {"torch": torch.__version__}, "figures": figures}
    ladd.save_weights(Path(args.out) / "judge.safetensors", net.state_dict(), {"kind": "toy judge", "config": net.config, **about})
    ladd.save_weights(Path(args.out) / "reference.safetensors", {"features": reference, "watch": watch}, {"kind": "toy reference", **about})
    print(figures)


if __name__ == "__main__":
    main()
