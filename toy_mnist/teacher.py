"""Train the toy's teacher: a CUNet by EDM's loss on Color-MNIST.

    python -m toy_mnist.teacher [--data-root DIR]     into toy_mnist/weights/teacher.safetensors

It writes the averaged weights. The same command goes on from the newest checkpoint in --run.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ladd
from toy_mnist import progress
from toy_mnist.data import ColorMNIST, load_mnist
from toy_mnist.edm import NULL_CLASS, SIGMA_MAX, SIGMA_MIN, CUNet, EDMVelocity
from toy_mnist.judge import WEIGHTS, save_file

# ln(sigma) ~ N(P_MEAN, P_STD^2) for most samples. EDM's table 1 has -1.2 and 1.2; the distilled
# student's t_hat is drawn at stronger noise. The other share is uniform in ln(sigma) over
# [0.002, 80], so that t = 1, where the student starts, has been trained too.
P_MEAN, P_STD = -0.4, 1.5
UNIFORM_SHARE = 0.15
LABEL_DROP = 0.12  # share of samples that are trained without their label


def draw_sigma(n, gen):
    """The training noise levels: n draws of sigma in [0.002, 80], float32 [n]."""
    normal = (P_MEAN + P_STD * torch.randn(n, generator=gen)).exp()
    low, high = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    uniform = (low + (high - low) * torch.rand(n, generator=gen)).exp()
    use_uniform = torch.rand(n, generator=gen) < UNIFORM_SHARE
    return torch.where(use_uniform, uniform, normal).clamp(SIGMA_MIN, SIGMA_MAX)


def edm_loss(velocity, x0, label, sigma, eps):
    """EDM's loss (eq. 2, table 1) per sample [B]: lambda(sigma) |D(x0 + sigma eps) - x0|^2.

    Averaged over pixels. In ladd's time |D - x0| = t |v - (eps - x0)|, and
    lambda = (sigma^2 + sigma_d^2) / (sigma sigma_d)^2."""
    t = sigma / (1 + sigma)
    v = velocity(ladd.interpolate(x0, eps, t), t, label)
    error = t**2 * (v - (eps - x0)).square().flatten(1).mean(1)
    return error * (sigma**2 + velocity.sigma_data**2) / (sigma * velocity.sigma_data) ** 2


def batch_at(data, step, batch, seed):
    """What step `step` trains on, keyed by (seed, step): x0, label (some dropped), sigma, eps."""
    gen = ladd.generator(seed, step, "teacher")
    x0, label = data.batch(*ladd.reader_indices(len(data), step * batch, batch, seed))
    dropped = torch.rand(batch, generator=gen) < LABEL_DROP
    label = label.masked_fill(dropped, NULL_CLASS)
    return x0, label, draw_sigma(batch, gen), torch.randn(x0.shape, generator=gen)


def train(velocity, data, args):
    """Train in place, from the newest checkpoint of args.run if there is one. Returns the EMA."""
    opt = torch.optim.AdamW(velocity.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    ema = ladd.EMA(velocity, half_life=50_000, ramp=0.05)

    def snapshot():
        model, optimizer = get_state_dict(velocity, opt)
        return {"model": model, "opt": optimizer, "ema": ema.mean}

    loaded, start = ladd.load_checkpoint(args.run, snapshot())  # fills the average in place
    models = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["opt"]}
    set_state_dict(velocity, opt, **models)
    bar = progress(range(start, args.steps), "train", initial=start, total=args.steps)
    for step in bar:
        fall = 0.505 + 0.495 * math.cos(math.pi * step / args.steps)  # to 1 %
        opt.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 200) * fall
        loss = edm_loss(velocity, *batch_at(data, step, args.batch, args.seed)).mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(velocity.parameters(), 1.0)
        opt.step()
        ema.update(velocity, (step + 1) * args.batch, args.batch)
        bar.set_postfix(loss=float(loss.detach()), refresh=False)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            ladd.save_checkpoint(args.run, step + 1, snapshot())
    return ema


def parse(argv):
    parser = ladd.Parser("python -m toy_mnist.teacher", description="Train the toy's teacher.")
    add = parser.add_argument
    add("--data-root", help="folder of MNIST/raw (else LADD_DATA, else ./data)")
    add("--steps", type=int, default=4500, help="training steps (4500)")
    add("--batch", type=int, default=128, help="images per step (128)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (0.001)")
    add("--width", type=int, default=48, help="channels at 14x14, a multiple of 8 (48)")
    add("--seed", type=int, default=0, help="keys every random draw (0)")
    add("--run", default="runs/teacher", help="folder of checkpoints (runs/teacher)")
    add("--out", default=WEIGHTS, help="folder of the result (default: the shipped one)")
    add("--checkpoint-every", type=int, default=500, help="steps (500)")
    args = parser.parse_args(argv)
    args.run = Path(args.run).expanduser()
    for name in ("steps", "batch", "width", "checkpoint_every"):
        value = getattr(args, name)
        ladd.check(value >= 1, f"--{name.replace('_', '-')} {value}: give at least 1")
    ladd.check(args.width % 8 == 0, f"--width {args.width}: give a multiple of 8")
    ladd.check(0 < args.lr < math.inf, f"--lr {args.lr}: give a finite number above 0")
    return args


def main(argv):
    args = parse(argv)
    data = ColorMNIST(*load_mnist(args.data_root), seed=args.seed)
    options = {k: getattr(args, k) for k in ("steps", "batch", "lr", "width", "seed")}
    path, begun = args.run / "config.json", {**options, "digits": len(data)}
    changed = ladd.diff(begun, json.loads(path.read_text()) if path.exists() else begun)
    message = f"--run {args.run}: it was begun with other options: {changed}; name another folder"
    ladd.check(not changed, message)
    ladd.write_json(path, begun)

    began = time.time()
    sample, _ = data.batch(torch.arange(min(10_000, len(data))), 0)
    torch.manual_seed(args.seed)
    velocity = EDMVelocity(CUNet(args.width), round(float(sample.std()), 4))
    ema = train(velocity, data, args)
    ema.swap(velocity)
    parameters = sum(p.numel() for p in velocity.parameters())
    figures = {"parameters": parameters, "seconds": round(time.time() - began)}
    words = " ".join(f"--{name} {value}" for name, value in options.items())
    about = {
        "config": {**velocity.net.config, "sigma_data": velocity.sigma_data},
        "command": f"python -m toy_mnist.teacher {words}",
        "data": f"MNIST train ({len(data):,} digits), uniform hue",
        "torch": torch.__version__,
        "figures": figures,
    }
    save_file(args.out, "teacher", velocity.net.state_dict(), about)
    print(figures)


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
