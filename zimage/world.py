"""The Z-Image world: what `torchrun ladd.py --zimage` gives to the method. Nothing here has been proven at full scale: see the README."""

import dataclasses
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

import ladd
from ladd import note, say
from zimage import fsdp, lora
from zimage.adapter import (BASE, ZImageVelocity, decode, image_tokens, load_vae, model_fingerprint, model_folder, turbo_warning)
from zimage.data import Latents

NAME = "zimage"
GRID = 4                    # prompts of the grids


@dataclasses.dataclass(frozen=True)
class ZImageRecipe(ladd.Recipe):
    """The core's recipe, what the student trains, and which text vector the heads are told."""

    text_vector: str = note("qwen", "what the heads are told of the prompt: Qwen's features, averaged, or CLIP's text vector", choices=("qwen", "clip"))
    lora_rank: int = note(0, "rank of a LoRA on the teacher's own weights, for one GPU (0 = the student trains all of its weights)", 0, 1024)


# Put together from published reports and untested at scale: learning rates, three updates of the heads for one of the student, the tapped
# layers, and m = 0.5 for t-hat where the heads are told Qwen's features (1 with CLIP's).
ZIMAGE = ZImageRecipe(iterations=20_000, batch=32, student_lr=5e-6, head_lr=1e-5, lr_decay="none", gen_every=3, renoise_mean=0.5,
                      taps=("5", "10", "15", "20", "25", "29"), head_width=256)
ZIMAGE_CLIP = dataclasses.replace(ZIMAGE, text_vector="clip", renoise_mean=1.0)
ZIMAGE_LORA = dataclasses.replace(ZIMAGE, lora_rank=64, student_lr=5e-5, head_lr=1e-4)      # ten times the learning rates: a guess
RECIPES = {"zimage": ZIMAGE, "zimage-clip": ZIMAGE_CLIP, "zimage-lora": ZIMAGE_LORA}
REFERENCE = ZIMAGE


def add_arguments(group):
    group.add_argument("--model", default=BASE, metavar="ID_OR_DIR", help="the teacher: a folder or a name on the hub (default %(default)s)")
    group.add_argument("--data", metavar="DIR", help="what python -m zimage.precompute wrote")
    group.add_argument("--teacher-sharded", action="store_true", help="shard the teacher over the ranks too (default: whole on each, 12.3 GB)")
    group.add_argument("--no-checkpointing", action="store_true", help="keep all activations: faster, and far more memory")
    group.add_argument("--ema-on-host", action="store_true", help="keep the student's average in the host's memory")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="what the networks compute in (default: bfloat16 on a GPU, float32 on a CPU)")


def make_world(recipe, options, device):
    return ZImageWorld(recipe, options, device)


class ZImageWorld(ladd.World):
    early_exit = False      # the teacher is cut off after its last tap instead, which sharding and checkpointing bear

    def __init__(self, recipe, options, device):
        if options.sample:
            raise ladd.UserError(f"--sample: for Z-Image it is python -m zimage.sample {Path(options.out) / options.name} --steps {options.steps or 4}")
        if recipe.lora_rank and options.teacher_sharded:
            raise ladd.UserError("--teacher-sharded: a LoRA student uses the teacher's own weights, whole on each GPU; leave it out")
        if not options.data:
            raise ladd.UserError("--data: name the folder of the teacher's latents; make one by python -m zimage.precompute "
                                 f"--model {options.model} --prompts zimage/prompts/train.txt --out DIR")
        self.recipe, self.options, self.device = recipe, options, device
        self.data = Latents(options.data, vector=recipe.text_vector)        # before the model, which may have to be downloaded
        self.folder = model_folder(options.model)
        if warning := turbo_warning(options.model, self.folder):
            say(warning)
        skeleton = fsdp.skeleton(self.folder)
        fsdp.check_files(self.folder, skeleton)
        self.fingerprint_of_model = model_fingerprint(self.folder)
        self.data.check_model(self.fingerprint_of_model)
        layers = len(skeleton.layers)
        unknown = [name for name in recipe.taps if name not in map(str, range(layers))]
        if unknown or not recipe.taps:
            raise ladd.UserError(f"taps = {list(recipe.taps)}: {unknown[0] if unknown else 'none given'} is no layer of this "
                                 f"transformer; give some of 0 .. {layers - 1}")
        kind = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self.dtype = getattr(torch, kind)
        self.cond_dim, self.ema_device = self.data.vector_dim, torch.device("cpu") if options.ema_on_host else None
        self.config = {"model": options.model, "dtype": kind}
        self.check_memory(skeleton)
        self.vae = load_vae(self.folder, self.dtype, device) if ladd.rank() == 0 else None      # it draws the pictures
        fsdp.start_alone(device)
        teacher = self.build(self.dtype, options.teacher_sharded, frozen=True)
        self.teacher, self.tap_root = ZImageVelocity(teacher, self.dtype), teacher.layers
        self.set_checkpointing(teacher)

    # ---- what the method asks for ------------------------------------------------------------------------------------

    def build(self, dtype, sharded, frozen):
        """The model folder's transformer, by `fsdp.build`."""
        read = lambda: fsdp.read_weights(self.folder)
        return fsdp.build(fsdp.skeleton(self.folder), read, dtype, self.device, sharded, self.dtype, frozen)

    def make_student(self):
        """float32 weights, sharded over the ranks, or a float32 LoRA on the teacher's. From here on the teacher is only tapped: its layers
        after the last tap go."""
        teacher = self.teacher.transformer
        if self.recipe.lora_rank:
            student = lora.LoraVelocity(lora.attach(teacher, self.recipe.lora_rank), self.dtype)
        else:
            student = ZImageVelocity(self.build(torch.float32, True, frozen=False), self.dtype)
        self.set_checkpointing(student.transformer)
        del teacher.layers[max(map(int, self.recipe.taps)) + 1:]
        return student

    def set_checkpointing(self, transformer):
        if not self.options.no_checkpointing:
            transformer.enable_gradient_checkpointing()

    def compile(self, student):
        """Block by block, after one pass that fills the cache of positions."""
        torch._dynamo.config.recompile_limit = 64       # student or teacher, with gradient or without, refined or not, by size: each is a graph
        x0, cond, _ = self.read(0, min(2, self.recipe.batch))
        for velocity in (student, self.teacher):
            with torch.no_grad():
                velocity(x0.to(self.device), torch.full((len(x0),), 0.5, device=self.device), cond.to(self.device))
            net = velocity.transformer
            for block in (*net.noise_refiner, *net.context_refiner, *net.layers):
                block.forward = torch.compile(block.forward, fullgraph=True)        # FSDP's and our hooks stay outside

    def tap_map(self, name, output, x_t):
        return image_tokens(output, x_t).float()

    def head_cond(self, cond):
        """Normalised, since a few of Qwen's channels are larger than all others by orders."""
        return F.layer_norm(cond.vector.float(), cond.vector.shape[1:])

    def read(self, start, count):
        return self.data.read(start, count, self.recipe.batch, self.recipe.seed)

    def fingerprint(self):
        return {"teacher": self.fingerprint_of_model, "computed in": self.config["dtype"], **{f"latents.{k}": v for k, v in self.data.about.items()}}

    # ---- what it needs of the machine --------------------------------------------------------------------------------

    def check_memory(self, skeleton):
        """Say what the run needs; UserError where weights, gradients and optimizer alone exceed the GPU, or the checkpoints, one of them
        being written, and the student the disk. Per trained weight 4 bytes each for itself, its gradient, AdamW's two moments and its
        average, if it has one; every rank holds all heads."""
        count = lambda module: sum(p.numel() for p in module.parameters())
        n, ranks, rank, r = count(skeleton), ladd.ranks(), self.recipe.lora_rank, self.recipe
        trained, average = lora.size(skeleton, rank) if rank else n, 4 if r.ema_half_life else 0
        with torch.device("meta"):
            heads = count(ladd.Heads([skeleton.config["dim"]] * len(r.taps), [1] * len(r.taps), self.cond_dim, r.head_width, r.heads_see_t))
        need = (trained * (16 + (0 if self.options.ema_on_host else average)) / (1 if rank else ranks) + 16 * heads
                + n * self.dtype.itemsize / (ranks if self.options.teacher_sharded else 1))
        checkpoint, copies = trained * (12 + average) + 12 * heads, self.options.keep + 1
        disk = copies * checkpoint + n * self.dtype.itemsize
        say(f"{n / 1e9:.2f}B parameters, {trained / 1e9:.2f}B of them trained, on {ranks} ranks: {need / 1e9:.1f} GB each before activations; "
            f"{disk / 1e9:.1f} GB of disk: {copies} checkpoints of {checkpoint / 1e9:.1f} (one of them being written) and the finished student")
        if self.device.type == "cuda" and need > (have := torch.cuda.get_device_properties(self.device).total_memory):
            raise ladd.UserError(f"--zimage: {need / 1e9:.1f} GB are needed on each GPU before activations, and it has {have / 1e9:.1f}: use "
                                 f"more GPUs, --teacher-sharded, --ema-on-host, --ema-half-life 0 or --recipe zimage-lora")
        folder = Path(self.options.out)
        there = (folder / (self.options.name or "") / "checkpoints").rglob("*") if self.options.resume else ()
        free = shutil.disk_usage(folder if folder.exists() else ".").free + sum(path.stat().st_size for path in there if path.is_file())
        if disk > free:
            raise ladd.UserError(f"--out {folder}: {copies} checkpoints and the student take {disk / 1e9:.1f} GB and {free / 1e9:.1f} are free; "
                                 f"give a smaller --keep, or another folder")

    def prepare(self):
        say(f"{len(self.data)} of the teacher's latents; grids of the first {GRID} of a batch are drawn at every judged point")

    # ---- looking -----------------------------------------------------------------------------------------------------

    def grid_samples(self):
        """The prompts of every grid: the first samples of the size that the first sample has. x0, cond, noise, on the device."""
        alike = [k for k in range(len(self.data)) if self.data.sizes[k] == self.data.sizes[0]][:GRID]
        return tuple(v.to(self.device) for v in self.data.get(alike))

    def steps(self):
        return [s for s in (4, 2, 1) if s <= len(self.recipe.times)]

    def draw(self, path, rows):
        """Rows of latents [B, 16, h, w] with a title each, decoded, as one picture; by rank 0."""
        if ladd.rank() > 0:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from torchvision.utils import make_grid
        fig = Figure(figsize=(10, 2.9 * len(rows)))
        FigureCanvasAgg(fig)
        for ax, (latents, title) in zip(fig.subplots(len(rows), 1, squeeze=False)[:, 0], rows):
            ax.imshow(make_grid(decode(self.vae, latents), nrow=len(latents)).permute(1, 2, 0).numpy())
            ax.set_title(title, fontsize=9), ax.axis("off")
        fig.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=80)

    @torch.no_grad()
    def draw_start(self, path):
        """What one look would catch: the teacher's latents, x_t at every t, the untrained student's guesses, both sides noised again."""
        x0, cond, noise = self.grid_samples()
        n = min(len(x0), self.recipe.batch)
        x0, cond, noise = x0[:n], cond[:n], noise[:n]
        d = {k: v[:n].to(self.device) for k, v in ladd.draw(self.recipe, 0, x0.shape[1:]).items()}
        eps = torch.where(ladd.expand(d["paired"], noise), noise, d["eps"])
        rows = [(x0, "x0: the teacher's samples, the 'real' ones")]
        for time in self.recipe.times:
            t = torch.full((n,), time, device=self.device)
            x_t = ladd.interpolate(x0, eps, t)
            guess = ladd.velocity_to_x0(x_t, self.teacher(x_t, t, cond), t)
            rows += [(x_t, f"x_t at t = {time:g}: what the student is given"), (guess, f"the untrained student's guess from t = {time:g}")]
        rows += [(ladd.interpolate(x0, d["eps_real"], d["t_real"]), "real, noised again"),
                 (ladd.interpolate(guess, d["eps_hat"], d["t_hat"]), "fake, noised again")]
        self.draw(path, rows)

    def student_rows(self, student, x0, cond, noise):
        """The student's latents by every number of steps, from the noise that the teacher's latents were made from."""
        return {s: ladd.student_sampler(self.recipe, s)(student, noise, cond) for s in self.steps()}

    def watch_raw(self, student, path):
        samples = self.grid_samples()
        self.draw(path, [(z, f"student, {s} steps, raw weights") for s, z in self.student_rows(student, *samples).items()])

    def watch(self, student, path):
        """A grid of the averaged student; per number of steps the spread of its latents, and their squared distance to the teacher's
        from the same noise, both ÷ the teacher's variance. Figures to watch, no measure of quality."""
        samples = self.grid_samples()
        made, x0 = self.student_rows(student, *samples), samples[0]
        self.draw(path, [(x0, "teacher")] + [(z, f"student, {s} steps" + ", averaged weights" * bool(self.recipe.ema_half_life)) for s, z in made.items()])
        return {f"{k}@{s}": float(v / x0.var()) for s, z in made.items() for k, v in (("variance", z.var()), ("distance", (z - x0).square().mean()))}

    def score(self, point):
        return None

    def signs(self, point):
        """Latents far flatter or wilder than the teacher's."""
        return [f"{k} {v:.2f} is outside 0.5 .. 2" for k, v in point.items() if k.startswith("variance@") and not 0.5 <= v <= 2]

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self, run, student, changed):
        """The student (its average, where one is kept) as run/student/, in the format of diffusers."""
        self.watch(student, run / "samples" / "final.png")
        kind = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        part = fsdp.save_whole(student.transformer, run / "student", kind)

        def complete():
            weights = "average" if self.recipe.ema_half_life else "last"
            ladd.write_json(part / "about.json", {"iteration": self.recipe.iterations, "weights": weights, "dtype": str(kind)[6:]})
            shutil.rmtree(run / "student", ignore_errors=True)
            os.replace(part, run / "student")
            if self.recipe.lora_rank:
                lora.save(student.transformer, run / "lora")
        ladd.from_first(complete)
        say(f"{run / 'student'} is done. Next: python -m zimage.evaluate {run}, or python -m zimage.export {run} --out DIR")
