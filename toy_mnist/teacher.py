"""Train the toy's teacher: a CUNet by EDM's loss on Color-MNIST.   python -m toy_mnist.teacher [--data-root DIR]

Writes toy_mnist/weights/teacher.safetensors (the EMA weights) and teacher.json (command, data, versions, figures).
Resumable: run the same command again and it goes on from its newest checkpoint in --run.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import ladd
from toy_mnist.data import ColorMNIST, load_mnist
from toy_mnist.edm import NULL_CLASS, SIGMA_MAX, SIGMA_MIN, CUNet, EDMVelocity

WEIGHTS = Path(__file__).parent / "weights"
P_MEAN, P_STD = -0.4, 1.5       # ln(sigma) ~ N(P_MEAN, P_STD^2) for most samples (EDM table 1 has -1.2, 1.2): moved up to where
UNIFORM_SHARE = 0.15            # the distilled student's t-hat is drawn; this share is uniform in ln(sigma) over [0.002, 80], so
LABEL_DROP = 0.12               # that t = 1 has been trained too. LABEL_DROP: share of samples trained without their label


def draw_sigma(n, gen):
    """The training noise levels: n draws of sigma in [0.002, 80], float32 [n]."""
    normal = (P_MEAN + P_STD * torch.randn(n, generator=gen)).exp()
    low, high = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    uniform = (low + (high - low) * torch.rand(n, generator=gen)).exp()
    return torch.where(torch.rand(n, generator=gen) < UNIFORM_SHARE, uniform, normal).clamp(SIGMA_MIN, SIGMA_MAX)


def edm_loss(velocity, x0, label, sigma, eps):
    """EDM's weighted loss (eq. 2 and table 1), per sample: lambda(sigma) |D(x0 + sigma eps) - x0|^2, averaged over pixels. [B]

    In ladd's time |D - x0| = t |v - (eps - x0)|, and lambda = (sigma^2 + sigma_d^2) / (sigma sigma_d)^2.
    """
    t = sigma / (1 + sigma)
    v = velocity(ladd.interpolate(x0, eps, t), t, label)
    error = (t ** 2) * (v - (eps - x0)).square().flatten(1).mean(1)
    return error * (sigma ** 2 + velocity.sigma_data ** 2) / (sigma * velocity.sigma_data) ** 2


def batch_at(data, step, batch, seed):
    """What step `step` trains on, keyed by (seed, step): x0, label (some dropped), sigma, eps."""
    gen = ladd.generator(seed, step, "teacher")
    x0, label = data.batch(*ladd.reader_indices(len(data), step * batch, batch, seed))
    label = torch.where(torch.rand(batch, generator=gen) < LABEL_DROP, torch.full_like(label, NULL_CLASS), label)
    return x0, label, draw_sigma(batch, gen), torch.randn(x0.shape, generator=gen)


@torch.no_grad()
def loss_by_sigma(velocity, data, per_sigma=512, seed=1):
    """EDM's loss at fixed noise levels from 0.002 to 80: {sigma: mean loss}."""
    gen, table = ladd.generator(seed, "loss by sigma"), {}
    for sigma in (0.002, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 80.0):
        x0, label = data.batch(torch.randint(len(data), (per_sigma,), generator=gen), torch.full((per_sigma,), -1))
        eps = torch.randn(x0.shape, generator=gen)
        table[sigma] = round(float(edm_loss(velocity, x0, label, torch.full((per_sigma,), sigma), eps).mean()), 4)
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m toy_mnist.teacher", description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", help="folder that holds MNIST/raw (else LADD_DATA, else ./data by download)")
    parser.add_argument("--steps", type=int, default=4500, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (default %(default)s)")
    parser.add_argument("--width", type=int, default=48, help="channels at 14x14; twice that at 7x7 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", default="runs/teacher", help="folder of its checkpoints (default %(default)s)")
    parser.add_argument("--out", default=str(WEIGHTS), help="folder of the result (default %(default)s)")
    parser.add_argument("--checkpoint-every", type=int, default=500)
    args = parser.parse_args(argv)

    data = ColorMNIST(*load_mnist(args.data_root), seed=args.seed)
    sample = data.batch(torch.arange(n := min(10_000, len(data))), torch.zeros(n, dtype=torch.long))[0]
    sigma_data = round(float(sample.std()), 4)                  # EDM's sigma_data, measured on the data
    torch.manual_seed(args.seed)
    velocity = EDMVelocity(CUNet(args.width), sigma_data)
    opt = torch.optim.AdamW(velocity.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    ema = ladd.EMA(velocity, half_life=50_000, ramp=0.05)
    state = lambda step: {"model": velocity.state_dict(), "opt": opt.state_dict(), "ema": ema.mean, "step": step}

    start, newest = 0, ladd.newest_checkpoint(args.run)
    if newest:
        for p in velocity.parameters():                         # Adam's state must exist before it can be loaded
            p.grad = torch.zeros_like(p)
        opt.step(), opt.zero_grad()
        loaded = ladd.load_checkpoint(newest, state(0))
        velocity.load_state_dict(loaded["model"]), opt.load_state_dict(loaded["opt"])
        start = loaded["step"]
        print(f"going on from {newest}")

    began, window = time.time(), []
    for step in (bar := tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=5)):
        for group in opt.param_groups:                          # warm up for 200 steps, then a cosine down to 1 %
            group["lr"] = args.lr * min(1, (step + 1) / 200) * (0.505 + 0.495 * math.cos(math.pi * step / args.steps))
        loss = edm_loss(velocity, *batch_at(data, step, args.batch, args.seed)).mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(velocity.parameters(), 1.0)
        opt.step()
        ema.update(velocity, (step + 1) * args.batch, args.batch)
        window = (window + [float(loss.detach())])[-100:]
        bar.set_postfix(loss=f"{sum(window) / len(window):.4f}", refresh=False)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            ladd.save_checkpoint(args.run, step + 1, state(step + 1))

    with torch.no_grad():
        for p, mean in zip(velocity.parameters(), ema.mean):
            p.copy_(mean)
    figures = {"parameters": sum(p.numel() for p in velocity.parameters()), "steps": args.steps, "batch": args.batch,
               "loss_by_sigma": loss_by_sigma(velocity, data), "seconds": round(time.time() - began)}
    about = {"kind": "toy teacher", "config": {**velocity.net.config, "sigma_data": sigma_data},
             "command": f"python -m toy_mnist.teacher --steps {args.steps} --batch {args.batch} --lr {args.lr} "
                        f"--width {args.width} --seed {args.seed}",
             "data": f"MNIST train ({len(data):,} digits), uniform hue", "versions": {"torch": torch.__version__},
             "noise": {"P_mean": P_MEAN, "P_std": P_STD, "uniform_share": UNIFORM_SHARE}, "figures": figures}
    ladd.save_weights(Path(args.out) / "teacher.safetensors", velocity.net.state_dict(), about)
    print(figures)


if __name__ == "__main__":
    main()
