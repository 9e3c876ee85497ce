"""The toy's judge: Frechet and kernel distance, digit accuracy, hue entropy.

    python -m toy_mnist.judge [--data-root DIR]     trains it again, into toy_mnist/weights

Its network learns to name the digit and to point at the hue. The features are the 128
outputs of a linear layer, before its SiLU: no unit is dead, and the covariance is not singular.
The judge is never a training signal. Its distances have a scale of their own: compare them with
each other and with their floor, the distance between two disjoint sets of real images.
"""

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

import ladd
from toy_mnist import progress
from toy_mnist.data import ColorMNIST, image_hue, load_mnist

WEIGHTS = Path(__file__).parent / "weights"
REFERENCE = 10_000  # real images that the report compares with
CURVE_REFERENCE = 2_000  # others, which only a run's curve is compared with
FLOOR_AT = (1_000, 2_000, 5_000, 10_000)  # counts of images for which the floor is measured
PAINTED = -2  # the epoch that paints them, unlike any of the training


def sum_line(path):
    """The file's line in sha256.txt, as sha256sum writes it."""
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


def load_file(folder, name):
    """(tensors, about) of folder/name.safetensors, checked by sha256.txt where the folder has one.

    about["sha256"] is that of the tensors alone."""
    path = Path(folder).expanduser() / f"{name}.safetensors"
    sums = path.with_name("sha256.txt")
    if sums.exists():
        same = path.exists() and sum_line(path) in sums.read_text()
        ladd.check(same, f"{path}: missing, or not the file of {sums.name}; restore both")
    tensors, about = ladd.load_weights(path, f"toy {name}")
    return tensors, {**about, "sha256": hashlib.sha256(save(tensors)).hexdigest()}


def save_file(folder, name, tensors, about):
    """Write folder/name.safetensors, and the folder's sha256.txt anew."""
    folder = Path(folder).expanduser()
    ladd.save_weights(folder / f"{name}.safetensors", tensors, {"kind": f"toy {name}", **about})
    files = sorted(folder.glob("*.safetensors"))
    (folder / "sha256.txt").write_text("".join(map(sum_line, files)))


def conv(c_in, c_out, stride):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.SiLU())


class JudgeNet(nn.Module):
    """x [B,3,28,28] in [-1,1] -> features [B,128]"""

    def __init__(self):
        super().__init__()
        stages = conv(3, 32, 2), conv(32, 64, 1), conv(64, 64, 2), conv(64, 96, 2)
        self.body = nn.Sequential(*stages)  # -> [B, 96, 4, 4]
        self.features = nn.Linear(96 * 16, 128)
        self.digit = nn.Linear(128, 10)
        self.hue = nn.Linear(128, 2)

    def forward(self, x):
        return self.features(self.body(x).flatten(1))

    def heads(self, f):
        """Features [B,128] -> digit logits [B,10], and the hue as (cos, sin) [B,2]"""
        return self.digit(F.silu(f)), self.hue(F.silu(f))


def frechet(a, b):
    """clean-fid's Frechet distance between two sets of features [N, D], [M, D]."""
    from cleanfid.fid import frechet_distance

    def moments(f):
        f = np.asarray(f, np.float64)
        ladd.check(np.isfinite(f).all(), "samples are not finite: lower student_lr in a new run")
        return f.mean(0), np.cov(f, rowvar=False)

    return float(frechet_distance(*moments(a), *moments(b)))


def kernel(a, b, subsets=50, seed=0):
    """clean-fid's kernel distance (unbiased, cubic kernel) between two sets of features."""
    from cleanfid.fid import kernel_distance

    before = np.random.get_state()
    np.random.seed(seed)  # clean-fid draws its subsets from numpy's global state
    distance = kernel_distance(np.asarray(a), np.asarray(b), num_subsets=subsets)
    np.random.set_state(before)
    return float(distance)


def entropy(hue, bins=36):
    """Entropy of hues [N] in [0, 1), divided by the largest possible: 1 = all equally frequent."""
    p = torch.histc(hue.float(), bins, 0, 1) / max(len(hue), 1)
    return float(-(p[p > 0] * p[p > 0].log()).sum() / math.log(bins))


@torch.no_grad()
def features_of(net, x, device="cpu"):
    """A JudgeNet's features of images [N,3,28,28]: [N,128] on the CPU."""
    return torch.cat([net(part.to(device).clamp(-1, 1)).cpu() for part in x.split(500)])


def real_features(net, data):
    """What samples are compared with: reference [10000,128], curve [2000,128], the floor of each.

    MNIST's first 10,000 digits are the reference, the next 10,000 measure the floors, one for each
    count of images, and those after them are the curve's.
    """
    n = min(REFERENCE, len(data) // 3)
    index = torch.arange(min(2 * n + CURVE_REFERENCE, len(data)))
    f = torch.cat([features_of(net, data.batch(k, PAINTED)[0]) for k in index.split(500)])
    second, stored = f[n : 2 * n], f.half().float()
    reference, curve = stored[:n], stored[2 * n :]
    floor = {k: frechet(second[:k], reference) for k in (*FLOOR_AT, n) if k <= n}
    return reference, curve, floor, frechet(second[:1000], curve)


class Judge:
    """judge(x [N,3,28,28], label [N]) -> {"fid", "kid", "accuracy", "hue_entropy"}"""

    def __init__(self, weights=WEIGHTS, device="cpu"):
        tensors, self.about = load_file(weights, "judge")
        figures = self.about["figures"]
        self.hue_entropy = figures["hue_entropy_real"]
        self.class_share = figures["class_share"]
        self.net = JudgeNet()
        self.net.load_state_dict(tensors)
        self.net.to(device).eval().requires_grad_(False)
        self.device = device
        tensors, _ = load_file(weights, "reference")
        self.reference, self.curve_reference = (tensors[k].float() for k in ("features", "curve"))
        self.floor = {int(n): distance for n, distance in figures["floor"].items()}
        self.curve_floor = figures["curve_floor"]

    def __call__(self, x, label, curve=False):
        """The figures of images x that should show `label`.

        curve: compared with real images that no report uses, and without KID."""
        f = features_of(self.net, x, self.device)
        digit, _ = self.net.heads(f.to(self.device))
        reference = self.curve_reference if curve else self.reference
        figures = {"fid": frechet(f, reference)}
        if not curve:
            figures["kid"] = kernel(f, reference)
        figures["accuracy"] = float((digit.argmax(1).cpu() == label.cpu()).float().mean())
        figures["hue_entropy"] = entropy(image_hue(x.cpu()))
        return figures

    def floor_at(self, n):
        """(count, floor) for the largest measured count of images not above n, or the least one."""
        count = max((k for k in self.floor if k <= n), default=min(self.floor))
        return count, self.floor[count]


def train(data, epochs, seed, batch=200):
    """A JudgeNet, trained to name digit and hue of a ColorMNIST."""
    torch.manual_seed(seed)
    net = JudgeNet()
    steps = max(epochs * len(data) // batch, 1)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for step in progress(range(steps), "train the judge"):
        x, label = data.batch(*ladd.reader_indices(len(data), step * batch, batch, seed))
        digit, hue = net.heads(net(x))
        angle = 2 * math.pi * image_hue(x)
        target = torch.stack([angle.cos(), angle.sin()], 1)
        loss = F.cross_entropy(digit, label, label_smoothing=0.05) + F.mse_loss(hue, target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def main(argv):
    parser = ladd.Parser("python -m toy_mnist.judge", description="Train the toy's judge.")
    add = parser.add_argument
    add("--data-root", help="folder of MNIST/raw (else LADD_DATA, else ./data)")
    add("--epochs", type=int, default=6, help="passes over MNIST (6)")
    add("--seed", type=int, default=0, help="keys every random draw (0)")
    add("--out", default=WEIGHTS, help="folder of the result (default: the shipped one)")
    args = parser.parse_args(argv)
    ladd.check(args.epochs >= 1, f"--epochs {args.epochs}: give at least 1")

    data = ColorMNIST(*load_mnist(args.data_root), seed=args.seed + 1000)
    test = ColorMNIST(*load_mnist(args.data_root, train=False), seed=args.seed + 1001)
    net = train(data, args.epochs, args.seed)
    reference, curve, floor, curve_floor = real_features(net, data)
    shown, _ = data.batch(torch.arange(len(reference)), PAINTED)
    x, label = test.batch(torch.arange(len(test)), PAINTED)
    digit, _ = net.heads(features_of(net, x))
    figures = {
        "test_accuracy": float((digit.argmax(1) == label).float().mean()),
        "floor": {str(k): distance for k, distance in floor.items()},
        "curve_floor": curve_floor,
        "hue_entropy_real": entropy(image_hue(shown)),
        "class_share": (data.label.bincount(minlength=10) / len(data)).tolist(),
    }
    about = {
        "command": f"python -m toy_mnist.judge --epochs {args.epochs} --seed {args.seed}",
        "data": f"MNIST train, uniform hue; reference: its first {len(reference):,} images; "
        f"floor: as many after them; curve: the {len(curve):,} after those",
        "torch": torch.__version__,
        "figures": figures,
    }
    save_file(args.out, "judge", net.state_dict(), about)
    features = {"features": reference.half(), "curve": curve.half()}
    save_file(args.out, "reference", features, about)
    print(figures)


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
