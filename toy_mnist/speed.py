"""The time of one iteration of `ladd.step` beside its network passes, each timed alone: what the method costs beyond its networks.

Step and passes take turns in one process and the median of each is reported, so that a busy machine slows both sides alike. Not
among the passes: draws, noising, losses, clipping, optimizers, average.
"""

import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

import ladd
from toy_mnist import variants

ROUNDS = 7              # of which each median is taken, after two that are not counted


def device_name(device):
    """The GPU's name, or the processor's and the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{(models or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} threads"


def passes(world, state, recipe, device, i):
    """What iteration i is made of: {name: (what is done before, untimed; what is timed)}, and the names of its network passes."""
    terms, student = world.terms(), state.student
    x0, cond, noise = world.read(i * recipe.batch, recipe.batch)
    joint = {**ladd.draw(recipe, i, x0.shape[1:]), "x0": x0, "cond": cond, "noise": noise}
    p = ladd.Pass(**{k: v.to(device) for k, v in joint.items()})
    p.x_t = ladd.interpolate(p.x0, p.eps, p.t)
    real_t, like = ladd.interpolate(p.x0, p.eps_real, p.t_real), torch.ones_like(p.x0)
    fake_t = ladd.interpolate(p.x0, p.eps_hat, p.t_hat).requires_grad_()
    with torch.no_grad():
        maps = ladd.features(world, real_t, p.t_real, p.cond, recipe.taps)
    told = (p.t_hat, world.head_cond(p.cond), p.t)

    def teacher_on_real():
        with torch.no_grad():
            ladd.features(world, real_t, p.t_real, p.cond, recipe.taps)

    def teacher_on_fake():
        fake = ladd.features(world, fake_t, p.t_hat, p.cond, recipe.taps)
        torch.autograd.grad(fake, fake_t, [torch.ones_like(f) for f in fake])

    def heads_on_both():
        with ladd.autocast(device):
            logits = state.heads(maps, *told) + state.heads(maps, *told)
        sum(k.mean() for k in logits).backward()

    def heads_to_maps():
        attached = [m.detach().requires_grad_() for m in maps]
        with ladd.frozen(state.heads), ladd.autocast(device):
            torch.autograd.grad(sum(k.mean() for k in state.heads(attached, *told)), attached)

    def fill_gradients():
        for q in (*student.parameters(), *state.heads.parameters()):
            q.grad = torch.full_like(q, 1e-3)

    def clear_gradients():
        student.zero_grad(set_to_none=True), state.heads.zero_grad(set_to_none=True)

    networks = {"student, forward and backward": lambda: student(p.x_t, p.t, p.cond).backward(like),
                "teacher on real": teacher_on_real,
                "teacher on fake, forward and backward to its input": teacher_on_fake,
                "heads on both, backward to their weights": heads_on_both,
                "heads on fake, backward to their maps": heads_to_maps}
    if terms.student_input:
        networks["student on its way down"] = lambda: terms.student_input(p, student)
    if recipe.distill_fresh and len(fresh := (~p.paired).nonzero()[:, 0]):
        networks["teacher on from the student's first step"] = (
            lambda: variants.continued(world, p.x_t[fresh], recipe.times[1], p.cond[fresh], recipe.distill_fresh))
    others = {"step": lambda: ladd.step(state, world, recipe, terms, i, device),
              "data and draws": lambda: [v.to(device) for v in (*world.read(i * recipe.batch, recipe.batch), *ladd.draw(recipe, i, x0.shape[1:]).values())]}
    timed = {name: (clear_gradients, run) for name, run in {**networks, **others}.items()}
    return {**timed, "clipping, optimizers, average": (fill_gradients, lambda: ladd.update(state, recipe, i))}, list(networks)


def measure(world, recipe, device, compiled):
    """One line of the speed table, for the recipe's batch: medians in milliseconds, memory in MB."""
    torch.manual_seed(0)
    n, cuda = world.recipe.samples, torch.device(device).type == "cuda"
    world.x0, world.labels = torch.randn(n, *world.shape), torch.arange(n) % 10     # their values do not matter to a clock
    world.noise = world.x0
    state, i = ladd.State(world, recipe, device), (recipe.warmup + 2) * recipe.gen_every - 1
    if compiled:
        world.compile(state.student)
    parts, networks = passes(world, state, recipe, device, i)
    taken, memory = {name: [] for name in parts}, 0
    for _ in range(ROUNDS + 2):
        for name, (before, run) in parts.items():
            before()
            if cuda:
                torch.cuda.reset_peak_memory_stats(), torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
                memory = max(memory, torch.cuda.max_memory_allocated())
            taken[name].append(time.perf_counter() - began)
    ms = {name: statistics.median(t[2:]) * 1e3 for name, t in taken.items()}
    if not cuda:                                        # of the whole process so far; bytes on macOS, KB elsewhere
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    step, alone = ms.pop("step"), sum(ms[name] for name in networks)
    return {"batch": recipe.batch, "compiled": compiled, "device": device_name(device), "step_ms": step, "networks_ms": alone, "ratio": step / alone,
            "parts_ms": ms, "networks": networks, "memory_mb": memory / 2 ** 20}
