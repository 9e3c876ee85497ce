"""A world of one's own: a small MLP flow on a ring of eight blobs, distilled by `ladd.train`.

python docs/own_model.py        from the project's folder; it writes docs/own_model.png
"""

import math
import sys
import tempfile

import torch
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, ".")  # where ladd.py is
import ladd

FIFTY = [1 - k / 50 for k in range(50)]


class Teacher(nn.Sequential):
    """velocity(x_t [B, 2], t [B], cond) -> v [B, 2]. There is no condition."""

    def forward(self, x_t, t, cond):
        return super().forward(torch.cat([x_t, ladd.fourier(t / 8, 8)], 1))


class Ring(ladd.World):
    def batch(self, start, count):
        index, _ = ladd.reader_indices(len(samples), start, count, self.recipe.seed)
        return samples[index], None, None, samples[index]

    def evaluate(self, student, run, step):
        seen[step] = {n: ladd.sample_student(student, recipe, noise, None, n) for n in (1, 4)}
        return {}


def ring(n):
    angle = torch.randint(8, (n,)) * math.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2)


torch.manual_seed(0)
layers = [nn.Linear(18, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU()]
teacher = Teacher(*layers, nn.Linear(96, 2))
opt = torch.optim.Adam(teacher.parameters(), 2e-3)
for _ in range(3000):
    x0, eps, t = ring(256), torch.randn(256, 2), torch.rand(256)
    v = teacher(ladd.interpolate(x0, eps, t), t, None)
    (v - (eps - x0)).square().mean().backward()
    opt.step()
    opt.zero_grad()
teacher.requires_grad_(False)
noise = torch.randn(4000, 2)
samples = ladd.sample_euler(teacher, noise, FIFTY, None)
game = {"student_lr": 1e-3, "head_lr": 4e-3, "renoise_mean": -1.0, "renoise_std": 1.5}
game |= {"warmup": 0, "heads_see_t": True, "backward_simulation": True}
recipe = ladd.Recipe(iterations=1000, taps=("1", "3", "5"), **game)
seen = {}
with tempfile.TemporaryDirectory() as run:
    ladd.train(Ring(teacher, recipe), recipe, f"{run}/ring", ladd.Options(evaluate_every=100))

# ---- The picture
figure = Figure(figsize=(16, 7), layout="constrained")
axes = iter(figure.subplots(2, 5).T.flat)


def show(title, points):
    ax = next(axes)
    ax.scatter(*points[:1000].T, s=3, zorder=2)
    ax.set_title(title, fontsize=13)
    ax.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal", xticks=[], yticks=[])
    return ax


show("data", ring(1000))
ax, trail = show("teacher, steps: 50", samples), []
ladd.sample_euler(lambda x, *told: trail.append(x) or teacher(x, *told), noise[:40], FIFTY, None)
for path in torch.stack(trail, 1):
    ax.plot(*path.T, color="grey", linewidth=0.5)
for n in (1, 4):
    show(f"teacher, steps: {n}", ladd.sample_student(teacher, recipe, noise, None, n))
for step in (100, 400, 900):
    for n, points in seen[step].items():
        show(f"student, steps: {n}, iteration {step}", points)
figure.savefig("docs/own_model.png", dpi=70)
