"""How fast Z-Image is distilled on this machine, and in how much memory, with random weights: nothing is downloaded.

    python -m zimage.bench                  on a GPU Z-Image at its full size (one of 141 GB holds it), elsewhere a tiny model
    python -m zimage.bench --config tiny    a tiny model, in half a minute on one free core: does everything run?

Student, teacher and heads are built and trained by the code of ladd.py --zimage, on random latents and captions. Printed: seconds,
memory and utilisation of an iteration by batch, with and without activation checkpointing; the passes through the network that an
update of the student costs; the time of sampling; and an estimate, labelled so, of a whole run on 8 GPUs.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import os
import platform
import statistics
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist

import ladd
from ladd import UserError
from zimage import adapter, fsdp
from zimage.sampling import Way, at_least, clock, command, integers, sample_latents
from zimage.world import ZIMAGE, ZImageWorld

CONFIGS = {"full": {}, "tiny": dict(dim=48, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32, axes_dims=[4, 4, 4],
                                    axes_lens=[600, 64, 64])}
EMA = {"off": None, "host": torch.device("cpu")}
USEFUL = {"heads": 3, "student": 6}     # passes F of a sample in an iteration that updates the heads alone, and in one of both: `ladd.step`
WARM = 2                                # iterations before those that count
LARGE = 100_000_000                     # parameters that no CPU should be asked to train
GPUS, A100_MEMORY, A100_MATMUL = 8, 80e9, 250e12        # of the estimate: bytes of each; FLOP/s of a large matmul (data sheet: 312e12)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: the project's own world, with random numbers in place of files
# ---------------------------------------------------------------------------------------------------------------------

def skeleton(name):
    """The transformer of that name without memory for its weights."""
    from diffusers import ZImageTransformer2DModel
    with torch.device("meta"):
        return ZImageTransformer2DModel(**CONFIGS[name])


def random_weights(model, device, dtype):
    """{name: tensor} for a skeleton, drawn on the device itself: gains 1, biases 0, matrices that keep a vector's length."""
    gen = torch.Generator(device).manual_seed(0)

    def one(name, shape):
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")), device=device, dtype=dtype)
        return torch.randn(shape, generator=gen, device=device, dtype=dtype).mul_(shape[-1] ** -0.5)
    return {name: one(name, p.shape) for name, p in model.state_dict().items()}


class RandomWorld(ZImageWorld):
    """Z-Image's world with random weights, latents [B, 16, side, side] and captions [tokens, C]. model: a skeleton."""

    def __init__(self, model, recipe, device, side, tokens, checkpointing, ema_device):
        self.model, self.recipe, self.device, self.side = model, recipe, device, side
        self.options = types.SimpleNamespace(no_checkpointing=not checkpointing)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.cond_dim, self.ema_device = model.config["cap_feat_dim"], ema_device
        self.caption = torch.randn(tokens, self.cond_dim, generator=ladd.generator("bench")).bfloat16()
        fsdp.start_alone(device)
        teacher = self.build(self.dtype, False, frozen=True)
        self.teacher, self.tap_root = adapter.ZImageVelocity(teacher, self.dtype), teacher.layers
        self.set_checkpointing(teacher)

    def build(self, dtype, sharded, frozen):
        """A transformer of the skeleton's configuration with random weights."""
        read = lambda: random_weights(self.model, self.device, self.dtype)
        with torch.device("meta"):
            model = type(self.model).from_config(self.model.config)
        return fsdp.build(model, read, dtype, self.device, sharded, self.dtype, frozen)

    def read(self, start, count):
        x0 = torch.randn(count, adapter.CHANNELS, self.side, self.side, generator=ladd.generator("bench", start))
        return x0, adapter.Prompts([self.caption] * count, self.caption.float().mean(0).expand(count, -1)), None


def state_bytes(n, average, gpus=1, teacher_gpus=1):
    """On each GPU before activations: float32 weights, gradients and Adam's two moments, an average, the teacher in bfloat16."""
    return n * (20 if average else 16) / gpus + n * 2 / teacher_gpus


def check_size(name, n, device):
    """Say what the weights take; UserError where that is too much for this device."""
    if device.type != "cuda":
        if n > LARGE:
            raise UserError(f"{name}: {n / 1e9:.2f}B parameters need a GPU, and this is a {device.type}; give --config tiny, or start it on a GPU")
        return
    need, free = state_bytes(n, average=False), torch.cuda.mem_get_info(device)[0]
    print(f"{n / 1e9:.2f}B parameters: {need / 1e9:.1f} GB before activations, of {free / 1e9:.1f} free", flush=True)
    if need > free:
        raise UserError(f"{name}: {need / 1e9:.1f} GB are needed before activations, and this GPU has {free / 1e9:.1f} free; take a larger one")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------

def forward_flops(model, side, tokens):
    """F: the FLOPs of one sample's pass through the transformer by torch's counter: 2 for each multiply-add of the matrix products,
    attention's two among them, at the padded lengths. Norms, rotations and softmax are left out."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        x, t, caption = torch.empty(adapter.CHANNELS, 1, side, side), torch.empty(1), torch.empty(tokens, model.config["cap_feat_dim"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model([x], t, [caption], return_dict=False)
    return counter.get_total_flops()


def median_seconds(device, jobs):
    """Of calling each of jobs, the first WARM left out; on a GPU its peak of memory then speaks of the others alone."""
    seconds = []
    for k, job in enumerate(jobs):
        if k == WARM and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = clock(device)
        job()
        seconds.append(clock(device) - began)
    return statistics.median(seconds[WARM:])


def matmul_rate(device, dtype):
    """FLOP/s of products of large square matrices: what utilisation is a share of."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 10 * 2 * side ** 3 / median_seconds(device, [lambda: [a @ b for _ in range(10)]] * (WARM + 5))


def sampling(world, n):
    """Seconds for one latent: the teacher's 50 steps with guidance, and 4 steps without of the student, which as exported is the
    teacher's network with other weights, so that the teacher stands in for it."""
    x0, cond, _ = world.read(0, 1)
    noise, cond, null = x0.to(world.device), cond.to(world.device), world.caption[:8].to(world.device)      # no prompt is about 8 tokens
    ways = Way("teacher@50", "base", tuple(adapter.teacher_times(50, 6.0)), guidance=5.0), Way("student@4", "student", ZIMAGE.times)

    def seconds(way):
        job = lambda way: functools.partial(sample_latents, world.teacher, way, noise, cond, null, [(0, 0)])
        return median_seconds(world.device, [job(dataclasses.replace(way, times=way.times[:1]))] * WARM + [job(way)] * n)
    teacher, student = map(seconds, ways)
    return {"teacher_seconds": teacher, "student_seconds": student, "ratio": teacher / student, "possible": ways[0].nfe / ways[1].nfe}


def measure(world, state, recipe, kind, n):
    """Figures of the iterations that update `kind`: median seconds and forwards, the F of an iteration, counted at the networks: a pass
    is 1, and where it has a graph its backward is 1 more through the frozen teacher and 2 through the student. On a GPU the peak too,
    and activations: what is held when the student's backward begins, or the peak over weights and gradients where that is more; bytes."""
    cuda, cost, held = world.device.type == "cuda", [], [0]
    allocated = lambda: torch.cuda.memory_allocated(world.device) if cuda else 0

    def student_loss(real, fake):
        held.append(allocated() - rest)
        return ladd.hinge_student(real, fake)
    rest, terms = allocated(), ladd.Terms(student_loss=student_loss)
    mine = itertools.islice((i for i in itertools.count(1) if ladd.updates_student(recipe, i) == (kind == "student")), WARM + n)
    hooks = [net.register_forward_pre_hook(lambda *_, back=back: cost.append(1 + back * torch.is_grad_enabled()))
             for net, back in ((state.student, 2), (world.teacher, 1))]
    try:
        seconds = median_seconds(world.device, (functools.partial(ladd.step, state, world, recipe, terms, i, world.device) for i in mine))
    finally:
        for hook in hooks:
            hook.remove()
    figures = {"seconds": seconds, "forwards": sum(cost) / (WARM + n)}
    if cuda:
        peak = torch.cuda.max_memory_allocated(world.device)
        figures |= {"peak": peak, "activations": max(*held, peak - rest - 4 * sum(p.numel() for p in state.student.parameters()))}
    return figures


def measured(make, recipe, batches, compiled, n):
    """Yield a row {batch, heads: figures, student: figures} per batch. make() -> (world, state).

    What runs out of memory is a note in place of figures, and so, untried, are larger batches. FSDP does not survive an exception in
    the midst of a pass: world and state are then made anew.
    """
    built, lost = None, {}
    for batch in batches:
        row = {"batch": batch}
        if compiled:
            torch.compiler.reset()                      # each batch gets kernels of its own, as in a run
        for kind in USEFUL:
            try:
                if kind not in lost:
                    built = built or make()
                    row[kind] = measure(*built, dataclasses.replace(recipe, batch=batch), kind, n)
            except torch.OutOfMemoryError:
                row[kind] = {"note": "out of memory"}
                lost |= dict.fromkeys(USEFUL if kind == "heads" else [kind], {"note": f"out of memory (at {batch} already)"})
            except Exception as error:                  # a compiler's, of whatever kind: the other rows are still worth having
                if not compiled or isinstance(error, UserError):
                    raise
                lost = dict.fromkeys(USEFUL, {"note": f"not compiled: {adapter.reason(error)}"})
            row.setdefault(kind, lost.get(kind))
            if "note" in row[kind]:
                built = None
        yield row


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------

HEAD = ("| batch | checkpointing | compiled | heads alone: seconds | peak GB | utilisation | with the student: seconds | peak GB | utilisation |\n|"
        + "---|" * 9)


def table_row(row):
    figure = lambda value, scale=1: "-" if value is None else f"{value * scale:.4g}"
    cells = [row["batch"], *("yes" if row[k] else "no" for k in ("checkpointing", "compiled"))]
    for f in (row[kind] for kind in USEFUL):
        cells += [f.get("note") or figure(f["seconds"]), figure(f.get("peak"), 1e-9), figure(f.get("utilisation"))]
    return f"| {' | '.join(map(str, cells))} |"


def estimate(n, flops, rows):
    """The recipe zimage on 8 A100 of 80 GB, from this run's whole rows at full size: (figures, words). gen_every iterations take
    3 F (gen_every - 1) + 6 F a sample; hours by the fastest case that fits, if there is one."""
    share, heads = ZIMAGE.batch // GPUS, ZIMAGE.gen_every - 1
    f, whole, sharded = USEFUL["heads"] * heads + USEFUL["student"], state_bytes(n, True, GPUS), state_bytes(n, True, GPUS, GPUS)
    fit = [(f / (USEFUL["heads"] * heads / row["heads"]["utilisation"] + USEFUL["student"] / row["student"]["utilisation"]), memory, row)
           for row in rows if row["batch"] <= share and (memory := whole + row["student"]["activations"]) <= A100_MEMORY]
    figures = {"parameters": n, "bytes_teacher_whole": whole, "bytes_teacher_sharded": sharded}
    words = (f"ESTIMATE, not measured: n = {n / 1e9:.2f}B weights, all trained, on {GPUS} x A100 80 GB by the recipe zimage.\n"
             f"Memory of each: 16 n / {GPUS} (float32 weights, gradients, Adam) + 4 n / {GPUS} (average; 0 by --ema-on-host) + 2 n (teacher; "
             f"2 n / {GPUS} by --teacher-sharded) = {whole / 1e9:.1f} GB ({sharded / 1e9:.1f}) + activations.\n")
    if not fit:
        return figures, words + f"Hours: not estimated; that takes the full size measured on a GPU, at a batch of at most {share} that fits."
    u, memory, row = max(fit, key=lambda case: case[0])
    hours = ZIMAGE.iterations / ZIMAGE.gen_every * f * flops * share / (u * A100_MATMUL) / 3600
    figures |= {"utilisation": u, "bytes_with_activations": memory, "hours": hours, **{k: row[k] for k in ("batch", "checkpointing", "compiled")}}
    return figures, words + (
        f"With the activations of batch {row['batch']}, checkpointing {row['checkpointing']}, compiled {row['compiled']}, the fastest case that fits: "
        f"{memory / 1e9:.1f} GB.\nHours: {ZIMAGE.iterations:,} iterations / {ZIMAGE.gen_every} x {f} F x {share} samples / (utilisation {u:.3f} x "
        f"{A100_MATMUL / 1e12:.0f} TFLOP/s, an A100's matmul as assumed) = {hours:.1f}, without what the GPUs send each other.")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

def parse(argv):
    """The options, checked, and the skeleton of the model they name."""
    parser = ladd.Parser(prog="python -m zimage.bench", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    which, add = parser.add_mutually_exclusive_group(), parser.add_argument
    which.add_argument("--config", choices=CONFIGS, help="the transformer's size (default: full on a GPU, tiny elsewhere)")
    which.add_argument("--model", metavar="DIR", help="the size of the model in this folder, of which the configuration alone is read")
    add("--resolution", type=int, metavar="PX", help="side of the images, a multiple of 16 (default: 512; tiny: 64)")
    add("--tokens", type=int, default=128, metavar="N", help="tokens of every caption (default %(default)s)")
    add("--batches", default="1,2,4,8", metavar="N,N", help="samples of an iteration; each is measured (default %(default)s)")
    add("--iterations", type=int, default=5, metavar="N", help=f"timed iterations of each kind, after {WARM} more (default %(default)s)")
    add("--compile", action="store_true", help="measure with torch.compile too: minutes more for each batch")
    add("--ema", default="off", choices=EMA, help="where the student's average is kept, if at all: 24.6 GB at full size (default %(default)s)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--out", metavar="FILE", help="write every figure into this file too, as JSON")
    options = parser.parse_args(argv)
    if "LOCAL_RANK" in os.environ:
        raise UserError("one process on one GPU is measured: start it without torchrun")
    options.batches = sorted(integers("--batches", options.batches, 1))
    at_least("--iterations", options.iterations, 1)
    if options.out and (Path(options.out).is_dir() or not os.access(Path(options.out).parent, os.W_OK)):
        raise UserError(f"--out {options.out}: can't be written; name a file in a folder that is there")
    if options.model and not Path(options.model).is_dir():
        raise UserError(f"--model {options.model}: no such folder")
    options.device = ladd.pick_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not options.config and not options.model:
        options.config = "full" if options.device.type == "cuda" else "tiny"
        if options.config == "tiny":
            print("the full size needs a GPU: here a tiny model is measured in its place")
    model = fsdp.skeleton(adapter.model_folder(options.model)) if options.model else skeleton(options.config)
    places, *sides = model.config["axes_lens"]
    options.resolution = options.resolution if options.resolution is not None else 64 if options.config == "tiny" else 512
    if options.resolution % 16 or not 16 <= options.resolution <= 16 * min(sides):
        raise UserError(f"--resolution {options.resolution}: give a multiple of 16 from 16 to {16 * min(sides)}")
    most = min(adapter.MAX_TOKENS, (places - 2) // 32 * 32)         # padded to a multiple of 32, with the image's place after it
    if not 1 <= options.tokens <= most:
        raise UserError(f"--tokens {options.tokens}: give 1 to {most}")
    return options, model


def run_command(argv):
    import diffusers
    options, model = parse(argv)
    device, side, n = options.device, options.resolution // adapter.PIXELS, sum(p.numel() for p in model.parameters())
    name = f"--model {options.model}" if options.model else f"--config {options.config}"
    check_size(name, n, device)
    last = len(model.layers) - 1
    taps = *(tap for tap in ZIMAGE.taps if int(tap) < last), str(last)      # the teacher is run to its end: both networks take F
    recipe = dataclasses.replace(ZIMAGE, taps=taps, ema_half_life=ZIMAGE.ema_half_life if options.ema == "host" else 0.0)

    def make_world(checkpointing=True):
        gc.collect(), torch.cuda.empty_cache()          # of an earlier one, which nothing names any more
        return RandomWorld(model, recipe, device, side, options.tokens, checkpointing, EMA[options.ema])

    def make(checkpointing, compiled):
        world = make_world(checkpointing)
        state = ladd.State(world, recipe, device)
        if compiled:
            world.compile(state.student)
        return world, state
    world = make_world()
    dtype, rate, flops = str(world.dtype)[6:], matmul_rate(device, world.dtype), forward_flops(model, side, options.tokens)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    report = {"device": where, **ladd.versions(), "diffusers": diffusers.__version__, "config": name, "parameters": n, "dtype": dtype,
              "resolution": options.resolution, "tokens": options.tokens, "ema": options.ema, "iterations": options.iterations,
              "forward_flops": flops, "matmul_flops_per_second": rate, "sampling": sampling(world, options.iterations), "rows": []}
    del world
    print(f"{where}; " + ", ".join(f"{k} {report[k]}" for k in ("torch", "diffusers", "python", "commit")) + "\n"
          f"{n:,} random weights ({name}), {options.resolution} px, captions of {options.tokens} tokens, in {dtype}, average: {options.ema}\n"
          f"Medians of {options.iterations} iterations. F = {flops:.4g} FLOPs, a sample's pass through the network: its matrix products,\n"
          f"attention's among them. Utilisation: useful FLOPs a second (3 F a sample for the heads alone, 6 F with the student; not the\n"
          f"heads' own, recomputed activations, the optimizer) ÷ the {rate / 1e12:.4g} TFLOP/s of a large {dtype} matmul here.\n\n{HEAD}", flush=True)
    for compiled, checkpointing in itertools.product((False, True)[:1 + options.compile], (True, False)):
        for row in measured(functools.partial(make, checkpointing, compiled), recipe, options.batches, compiled, options.iterations):
            row |= {"checkpointing": checkpointing, "compiled": compiled}
            for kind, f in USEFUL.items():
                if "seconds" in row[kind]:
                    row[kind]["utilisation"] = f * flops * row["batch"] / row[kind]["seconds"] / rate
            print(table_row(row), flush=True)
            report["rows"].append(row)
    whole = [row for row in report["rows"] if all("seconds" in row[kind] for kind in USEFUL)]
    if whole:
        heads, student = (whole[0][kind]["forwards"] for kind in USEFUL)
        report["forwards_per_student_update"] = {"3": 2 * heads + student, "1": student}
        print(f"\nCounted in these iterations: an update of the student at 3 of the heads takes {2 * heads + student:g} F, at 1 it takes "
              f"{student:g} F.")
    took, full = report["sampling"], sum(p.numel() for p in skeleton("full").parameters())
    report["estimate"], words = estimate(full, flops, whole if device.type == "cuda" and n == full else [])
    print(f"\nSampling one latent: teacher, 50 steps with guidance, {took['teacher_seconds']:.4g} s; student, 4 steps, "
          f"{took['student_seconds']:.4g} s: {took['ratio']:.1f} x faster, of the possible {took['possible']:g} x\n\n{words}")
    if options.out:
        ladd.write_json(options.out, report)


def main(argv=None):
    """The command line; returns the exit code. Bad input is one line on stderr and 2."""
    try:
        return command("bench", run_command, argv)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
