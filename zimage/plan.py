"""What a Z-Image run costs, before it is paid for: `python ladd.py --zimage --plan --gpus 8`.

One iteration of `ladd.train_step` runs here at full size on fake tensors, which have no values, as
one rank of a fake process group. Every storage that it makes is followed, every matrix product
counted. It needs no weights and no GPU, and writes nothing.
"""

import argparse
import contextlib
import dataclasses
from collections import Counter
from unittest import mock

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import ladd
from zimage import adapter, data, fsdp
from zimage import world as zworld  # which imports this module

# Dense bfloat16 TFLOPS with float32 sums (half of what "with sparsity" says) and GB. Sources:
# NVIDIA's data sheets of A100, H100 SXM, H200 SXM and L40S (ECC takes 3 of its 48 GB), and its Ada
# whitepaper. torch finds 5 % more than GB * 1e9 bytes, which is left to CUDA, NCCL and fragments.
CARDS = {"a100-40g": (312, 40), "a100-80g": (312, 80), "h100": (989, 80), "h200": (989, 141)}
CARDS |= {"l40s": (362, 45), "4090": (165, 24)}
REACHED = 0.4, 0.25  # of a card's peak: a hope, and about what an H200 reached (docs/zimage.md)
CAPTION = 96  # tokens of a prompt, padded
TEACHER = 2 * 50  # passes of a sample of zimage.precompute: 50 steps, with guidance
# Passes of a judged point: each GPU makes the grids, and they share the held-out samples.
GRIDS, JUDGED = 8 * (1 + 2 + 4 + 2), 4 + 2
FINAL = 3 * 1000 * (TEACHER + 4 + 2 + 1 + 4)  # of zimage.evaluate: 3 seeds, 1,000 prompts
WEIGHTS, PIPELINE = 12.3e9, 20.7e9  # bytes of a transformer; with text encoder and VAE

FLOPS = {str(op): formula for op, formula in flop_registry.items()}


def add_arguments(group):
    add = group.add_argument
    add("--plan", action="store_true", help="print memory, hours and money of it all, and end")
    add("--gpus", type=int, default=8, metavar="N", help="GPUs of the plan (8)")
    add("--gpu", choices=CARDS, default="a100-80g", help="their kind (a100-80g)")
    add("--resolution", type=adapter.parse_size, default="512", help="plan: 512 or 640x384 (512)")
    add("--prompts", type=int, default=10_000, metavar="N", help="plan: its prompts (10000)")
    add("--price", type=float, default=0.0, metavar="X", help="money per GPU-hour")
    add("--hours", type=float, default=100.0, metavar="X", help="GPU-hours at hand (100)")
    add("--disk", type=float, default=1.0, metavar="X", help="GB per second of the disk (1)")


class Trace(TorchDispatchMode):
    """Follows the storages that are made inside, and counts FLOPs by torch's own formulas.

    Where the program asks for a value, a number is 1, an index 0, and a mask takes all rows.
    shares: of how many rows each mask really takes; they weigh the FLOPs from there to the
    `index_copy` that puts these rows back.
    """

    def __init__(self, shares=()):
        super().__init__()
        self.live = WeakIdKeyDictionary()  # {storage: [its group]}
        self.peak = self.bound = self.flops = 0  # most live bytes so far; upper bound now
        self.at_peak, self.groups = [], Counter()
        self.shares, self.share = iter(shares), 1

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in kinds:
            return NotImplemented  # it comes again with this rank's part
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else int(args[0].dtype == torch.bool)
        if func is torch.ops.aten.nonzero.default:
            self.share = next(self.shares)
            return args[0].new_zeros(args[0].numel(), 1, dtype=torch.long)
        out = func(*args, **kwargs)
        # Its weak references would keep a module from being moved.
        active_fake_mode().fake_tensor_converter.meta_converter.tensor_memo.clear()
        formula = FLOPS.get(str(func.overloadpacket).replace("_for_cpu", ""))
        if formula:
            self.flops += self.share * formula(*args, **kwargs, out_val=out)
        self.share = 1 if func is torch.ops.aten.index_copy.default else self.share
        gathers = func.namespace in ("fsdp", "c10d")
        for storage in storages((out, args, kwargs) if gathers else out):
            if gathers or storage not in self.live:
                group = self.live.setdefault(storage, [None])
                group[0] = group[0] or ("gathered layers" if gathers else None)
                self.bound += storage.nbytes()
        if self.bound > self.peak:
            sizes = [(group, storage.nbytes()) for storage, group in self.live.items()]
            self.bound = sum(size for _, size in sizes)
            if self.bound > self.peak:
                self.peak, self.at_peak = self.bound, sizes
        return out


def storages(tensors):
    """The storages of tensors in lists and dicts; of a DTensor, this rank's part."""
    for t in tree_iter(tensors):
        if isinstance(t, torch.Tensor):
            yield (t.to_local() if isinstance(t, DTensor) else t).untyped_storage()


def shares(recipe, n, parts, student_turn):
    """The share of a micro-batch of n samples that takes part in each masked call: a mean over the
    draws. Where none does, the core lets one."""
    probs = dict(zip(recipe.times, recipe.time_probs, strict=True))
    before = [sum(probs[t] for t in probs if t < start) for start in recipe.times[:-1]]
    steps = before * recipe.backward_simulation * parts
    own = [(1 - recipe.paired_share) * recipe.time_probs[0]]  # of all steps to its target
    own = own * bool(recipe.distill_weight and recipe.distill_own)
    anchor = before[:1] * bool(recipe.anchor_weight)
    return [p + (1 - p) ** n / n for p in steps + (own + anchor) * parts * student_turn]


def trace(recipe, options, n, student_turn=True, config=None):
    """One rank's iteration by micro-batches of n samples: two of them, since later ones need no
    more memory. config: of a transformer; by default Z-Image's own. Returns a `Trace` with flops of
    one sample, and forward, those of one pass of the network."""
    parts = min(2, recipe.batch // options.gpus // n) if student_turn else 1
    samples = n * parts
    recipe = dataclasses.replace(recipe, batch=options.gpus * samples)
    world = object.__new__(zworld.ZImageWorld)  # opens no file
    world.recipe, world.options = recipe, argparse.Namespace(**{**vars(options), "compile": False})
    world.device, world.dtype = torch.device("cpu"), torch.bfloat16
    world.data = argparse.Namespace(about={"guidance": 5.0})
    found = Trace(shares(recipe, n, parts, student_turn))
    mesh = fsdp.init_device_mesh("cpu", (options.gpus,))  # which fake tensors can't make
    meshes = mock.patch.object(fsdp, "init_device_mesh", lambda *_: mesh)
    # DTensor finds out shapes on fake tensors of the whole size, which no rank ever holds.
    name = "_propagate_tensor_meta_non_cached"
    unseen = _disable_current_modes()(getattr(ShardingPropagator, name))
    shapes = mock.patch.object(ShardingPropagator, name, unseen)
    with FakeTensorMode(allow_non_fake_inputs=True), found, shapes, meshes:
        net = torch.nn.Module.to(fsdp.skeleton(config or {}), world.dtype)
        zworld.check_taps(recipe.taps, len(net.layers))
        if options.teacher_sharded:
            fsdp.shard(net, world.device, world.dtype, reshard_after_forward=None)
        net.to_empty(device="cpu").eval().requires_grad_(False)
        world.set_checkpointing(net, "teacher")
        world.teacher = adapter.ZImageVelocity(net, world.dtype)
        features = net.config.cap_feat_dim
        world.nothing = torch.empty(32, features)

        def batch(start, count):
            height, width = options.resolution
            x0 = torch.empty(count, adapter.CHANNELS, height // 8, width // 8)
            vector = torch.empty(count, 768 if recipe.text_vector == "clip" else features)
            caption = torch.empty(CAPTION, features, dtype=world.dtype)
            return x0, adapter.Prompts([caption] * count, vector), x0, x0

        world.batch = batch
        world.teacher(batch(0, 1)[0], torch.ones(1), batch(0, 1)[1])
        found.forward = found.flops
        net.rope_embedder.freqs_cis = None  # a LoRA's copy would warn
        state = ladd.State(world, recipe, world.device, world.dtype)
        fixed = {
            "teacher": list(world.teacher.parameters()),
            "student": list(state.student.parameters()),
            "optimizer": list(state.student_opt.state.values()),
            "average": state.ema.mean,
            "heads": [*state.heads.state_dict().values(), *state.heads_opt.state.values()],
        }
        for group, tensors in fixed.items():
            found.live.update((storage, [group]) for storage in storages(tensors))
        found.flops = found.peak = 0

        def mark(opt, *_):
            for storage in storages([p.grad for p in opt.param_groups[0]["params"]]):
                found.live[storage][0] = "heads" if opt is state.heads_opt else "gradients"

        state.heads_opt.register_step_pre_hook(mark)
        state.student_opt.register_step_pre_hook(mark)
        ladd.train_step(state, world, recipe, 2 * recipe.gen_every - 1 if student_turn else 0, n)
    found.flops /= samples
    for (group,), size in found.at_peak:
        found.groups[group or "activations"] += size
    return found


@contextlib.contextmanager
def fake_rank(recipe, options):
    """Inside, this is one of --gpus ranks. Yields `ladd.Options` with micro_batch filled in."""
    part = recipe.batch / max(options.gpus, 1)
    why = f"batch = {recipe.batch}: give each of --gpus {options.gpus} an even number of samples"
    ladd.check(options.gpus > 0 and part % 2 == 0, why)
    settings = dataclasses.replace(zworld.OPTIONS, **ladd.given(options, ladd.Options))
    n = settings.micro_batch or int(part)
    why = f"--micro-batch {n}: give an even part of batch / gpus = {part:g}"
    ladd.check(part % n == 0 and n % 2 == 0, why)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.gpus)
    try:
        yield dataclasses.replace(settings, micro_batch=n)
    finally:
        torch.distributed.destroy_process_group()


def plan(recipe, options, config=None):
    """Yields the lines of --plan. options: the command line; config: as in `trace`."""
    ladd.check(options.prompts > 0, f"--prompts {options.prompts}: give at least 1")
    ladd.check(options.disk > 0, f"--disk {options.disk:g}: give more than 0")
    with fake_rank(recipe, options) as settings:
        n = settings.micro_batch
        heads, both = (trace(recipe, options, n, turn, config) for turn in (False, True))
        one = trace(recipe, options, 1, True, config)  # a line through two sizes tells of all
        slope = max(1, (both.peak - one.peak) / (n - 1))
    (tflops, room), (height, width) = CARDS[options.gpu], options.resolution
    gpus, made, iterations = options.gpus, options.prompts, recipe.iterations

    def row(name, *cells):
        words = (c if isinstance(c, str) else f"{c:,.2f}" for c in cells)
        return f"{name:<34}" + "".join(f"{word:>12}" for word in words)

    def hours(flops, disk=0):  # GPU-hours at these shares of the card's peak
        wait = gpus * disk / options.disk / 1e9
        return [(flops / (u * tflops * 1e12) + wait) / 3600 for u in REACHED]

    yield f"{gpus} x {options.gpu} of {tflops} TFLOPS (dense bfloat16) and {room} GB"
    yield f"{width}x{height}, captions of {CAPTION} tokens, batch {recipe.batch}"
    yield f"a disk that all GPUs share, of {options.disk:g} GB/s"
    yield "\n" + row("a GPU at its peak", "GB")
    yield from (row(f"  {group}", size / 1e9) for group, size in both.groups.most_common())
    yield row("  together", both.peak / 1e9)
    most = int(n + (room * 1e9 - both.peak) / slope)
    fit = [k for k in range(2, most + 1, 2) if recipe.batch // gpus % k == 0]
    words = "fits" if n in fit else "DOES NOT FIT"
    yield row(f"  micro-batch {n} {words}; largest:", str(max(fit, default="none")))
    yield "\n" + row("an iteration", "PFLOP", *(f"s at {100 * u:g} %" for u in REACHED))
    for name, found in (("  heads", heads), ("  heads and student", both)):
        flops = found.flops * recipe.batch
        yield row(name, flops / 1e15, *(3600 * h / gpus for h in hours(flops)))
    turns = sum(ladd.updates_student(recipe, i) for i in range(iterations))
    training = recipe.batch * (heads.flops * (iterations - turns) + both.flops * turns)
    kept = both.groups["student"] + both.groups["optimizer"] + both.groups["average"]
    checkpoint = kept * (1 if recipe.lora_rank else gpus) + both.groups["heads"]
    saves = -(-iterations // settings.checkpoint_every)
    at_once = min(saves, settings.keep + 1)  # the oldest goes once the newest is there
    points = (iterations - 1) // (settings.evaluate_every or iterations)
    judged = gpus * (GRIDS + JUDGED * n * -(-data.count_held_out(made) // (n * gpus)))
    sample = height * width / 2 + CAPTION * 5120 + 10240  # bytes of latent, caption and vector
    stages = {  # passes of the network, bytes for which all GPUs wait, bytes that are kept
        f"{made:,} prompts": (made * TEACHER, 0, made * sample),
        f"{iterations:,} iterations": (training / both.forward, 0, 0),
        f"{points:,} judged points": (points * judged, points * WEIGHTS, 2 * WEIGHTS),
        f"{saves:,} checkpoints": (0, saves * checkpoint, at_once * checkpoint),
        "zimage.evaluate": (FINAL, 0, 3 * 1000 * 5 * 3 * height * width),  # PNGs, at most
        "base model and export": (0, 2 * PIPELINE, 2 * PIPELINE),
    }
    yield "\n" + row("the whole path", "GB", *(f"GPU-h, {100 * u:g} %" for u in REACHED))
    table = [(kept / 1e9, *hours(both.forward * k, disk)) for k, disk, kept in stages.values()]
    yield from (row(f"  {name}", *cells) for name, cells in zip(stages, table, strict=True))
    disk, *total = (sum(column) for column in zip(*table, strict=True))
    yield row("  together", disk, *total)
    yield row(f"  hours on {gpus} GPUs", "", *(t / gpus for t in total))
    if options.price:
        yield row(f"  money at {options.price:g} an hour", "", *(t * options.price for t in total))
    spare = [1 - (t - options.hours) / c for t, c in zip(total, table[0][1:], strict=True)]
    paid = [f"{min(1, max(0, share)):.0%}" for share in spare]
    yield row(f"  prompts paid by {options.hours:g} GPU-hours", "", *paid)
