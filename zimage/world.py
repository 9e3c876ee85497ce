"""The Z-Image world: what `torchrun ladd.py --zimage` gives to the method.

Nothing here has been proven at full scale: see docs/zimage.md.
"""

import dataclasses
import statistics
import sys
import textwrap

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cleanfid.fid import kernel_distance
from matplotlib.figure import Figure

import ladd
from ladd import UserError, check, field, print0
from zimage import adapter, fsdp, lora, plan
from zimage.data import Latents, read_prompts

GRID = 8  # prompts of the grids
LEAST_DIVERSITY = 0.8  # feature_diversity under which a student has collapsed


@dataclasses.dataclass(frozen=True)
class ZImageRecipe(ladd.Recipe):
    """The core's recipe, what the student trains, and what the heads are conditioned on."""

    text_vector: str = field("qwen", "what the heads see of a prompt", ("qwen", "clip"))
    lora_rank: int = field(0, "rank of a LoRA on the teacher's weights; 0 trains all weights")


# The toy's terms and weights, and what is this size's own. Unproven at this size. What is not named
# is the core's default, a guess here: that sweep had gen_every = 3.
OWN = {
    "iterations": 20_000,  # a guess
    "batch": 32,  # four per GPU on eight: a guess
    "renoise_mean": 0.5,  # a published sweep's best with this text vector; by SD3's shift .3
    "student_lr": 5e-6,  # the best of that sweep
    "head_lr": 5e-5,  # ten times as fast, as in the toy: a guess
    "lr_warmup": 200,  # a guess
    "taps": ("5", "10", "15", "20", "25", "29"),  # the published report's
    "head_width": 256,  # likewise
}
ZIMAGE = ZImageRecipe(**ladd.GAME, **ladd.TARGETS, **OWN)
RECIPES = {
    "zimage": ZIMAGE,
    "zimage-ladd": ZImageRecipe(**ladd.GAME, **OWN, lr_decay="both"),
    "zimage-clip": dataclasses.replace(ZIMAGE, text_vector="clip", renoise_mean=1.0),  # that sweep
    # The rank, and ten times the learning rates: guesses.
    "zimage-lora": dataclasses.replace(ZIMAGE, lora_rank=64, student_lr=5e-5, head_lr=5e-4),
}
# A checkpoint of the full student is 99 GB. At these intervals writing and judging take under one
# hundredth of the run on eight A100s, see docs/zimage.md.
OPTIONS = ladd.Options(evaluate_every=2000, checkpoint_every=4000)


def add_arguments(group):
    add = group.add_argument
    add("--model", metavar="ID_OR_DIR", help="the teacher (default: the one that made --data)")
    add("--data", metavar="DIR", help="what python -m zimage.precompute wrote")
    add("--grid-prompts", metavar="FILE", help=f"up to {GRID} prompts of your own in a second grid")
    text = "shard the teacher over the ranks too (default: whole on each, 12.3 GB)"
    add("--teacher-sharded", action="store_true", help=text)
    text = "whose activations are computed again, not kept: slower, far less memory (both)"
    add("--checkpointing", choices=("student", "both", "none"), default="both", help=text)
    add("--compile", action="store_true", help="torch.compile the blocks of student and teacher")
    plan.add_arguments(group)


def make_world(recipe, options, device):
    why = "--teacher-sharded: a LoRA student uses the teacher's own weights, whole on each GPU"
    check(not (recipe.lora_rank and options.teacher_sharded), f"{why}; leave it out")
    if options.plan:
        print0("\n".join(plan.plan(recipe, options)))
        sys.exit()
    other = f"python -m zimage.sample {options.run} --steps {options.steps or 4}"
    check(not options.sample, f"--sample: for Z-Image it is {other}")
    if options.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=device))
        except Exception as error:  # by what is missing: a C++ compiler, Triton, ...
            why = f"torch.compile does not work here ({type(error).__name__})"
            raise UserError(f"--compile: {why}; leave it out") from error
    return ZImageWorld(recipe, options, device)


def check_taps(taps, layers):
    unknown = [name for name in taps if name not in map(str, range(layers))]
    why = f"taps = {list(taps)}: {unknown[:1]} is no layer of this transformer"
    check(taps and not unknown, f"{why}; give some of 0 .. {layers - 1}")


class ZImageWorld(ladd.World):
    """Z-Image as teacher, its latents as data."""

    reference = ZIMAGE

    def __init__(self, recipe, options, device):
        make = f"python -m zimage.precompute --model {adapter.BASE} --prompts FILE --out DIR"
        check(options.data, f"--data: name the folder of the teacher's latents; make one by {make}")
        self.options, self.device, self.dtype = options, device, getattr(torch, options.dtype)
        self.data = Latents(options.data, vector=recipe.text_vector)
        sizes = self.data.sizes
        self.shown = [k for k in range(len(sizes)) if sizes[k] == sizes[0]][:GRID]  # in grids
        x0, _, _ = self.data.get(self.shown)
        neighbours = float((x0[..., 1:] * x0[..., :-1]).mean())
        noise = abs(float(x0.var()) - 1) < 0.1 and abs(neighbours) < 0.1
        check(not noise, "--data: its latents look like pure noise; make them by zimage.precompute")
        self.model = options.model or self.data.about["model"]
        folder = adapter.model_folder(self.model)
        print0(f"teacher {self.model}")
        self.digest = adapter.model_fingerprint(folder)
        why = f"--data {options.data}: made by another model, {self.data.about['model']}"
        ok = self.data.about["fingerprint"] == self.digest
        check(ok, f"{why}; give that one as --model, or precompute with this one")
        config = fsdp.ZImageTransformer2DModel.load_config(folder / "transformer")
        check_taps(recipe.taps, config["n_layers"])
        self.check_memory(recipe, fsdp.skeleton(config))

        self.texts = read_prompts(options.grid_prompts)[:GRID] if options.grid_prompts else []
        features = ladd.on_rank0(lambda: self.load_vae_and_encode(folder))
        self.nothing, *self.captions = (f.to(device) for f in features)
        sharded = options.teacher_sharded
        teacher = fsdp.load_teacher(folder / "transformer", config, self.dtype, device, sharded)
        self.set_checkpointing(teacher, "teacher")
        super().__init__(adapter.ZImageVelocity(teacher, self.dtype), recipe)

    def load_vae_and_encode(self, folder):
        """Load the VAE, for grids. Text features [L, C] of the empty and the user's own prompts."""
        pipe = adapter.load_pipeline(folder, self.dtype, self.device, transformer=None)
        self.vae = pipe.vae
        return [c.cpu() for c in adapter.encode(pipe, ["", *self.texts])]

    def check_memory(self, recipe, skeleton):
        """Print what the run needs; UserError where a GPU has less."""
        n = sum(p.numel() for p in skeleton.parameters())
        ranks = ladd.world_size()
        trained = lora.size(skeleton, recipe.lora_rank) if recipe.lora_rank else n
        each = 20 if recipe.ema_half_life else 16  # bytes: weight, gradient, 2 moments, average
        need = each * trained / (1 if recipe.lora_rank else ranks)
        need += n * self.dtype.itemsize / (ranks if self.options.teacher_sharded else 1)  # teacher
        weights = f"{n / 1e9:.2f}B weights, {trained / 1e9:.2f}B of them trained"
        disk = f"{(each - 4) * trained / 1e9:.1f} GB of disk for a checkpoint"
        print0(f"{weights}: {need / 1e9:.1f} GB on each GPU before activations, {disk}")
        if self.device.type == "cuda":
            have = torch.cuda.get_device_properties(self.device).total_memory
            ways = "use more GPUs, --teacher-sharded, --ema-half-life 0 or --recipe zimage-lora"
            why = f"{need / 1e9:.1f} GB are needed on each GPU, and it has {have / 1e9:.1f}"
            check(need <= have, f"--zimage: {why}; {ways}")

    # ---- what the method asks for ---------------------------------------------------------------

    def make_student(self):
        """float32 weights, sharded over the ranks, or a float32 LoRA on the teacher's.

        A teacher that is no anchor is only tapped, so its layers after the last tap go: an early
        end by an exception does not suit sharded or checkpointed modules.
        """
        teacher = self.teacher.transformer
        if self.recipe.lora_rank:
            student = lora.LoraVelocity(teacher, self.recipe.lora_rank, self.dtype)
        else:
            transformer = fsdp.make_student(teacher, self.device, self.dtype)
            student = adapter.ZImageVelocity(transformer, self.dtype)
        self.set_checkpointing(student.transformer, "student")
        if not self.recipe.anchor_weight:
            del teacher.layers[max(map(int, self.recipe.taps)) + 1 :]
        if self.options.compile:
            torch._dynamo.config.recompile_limit = 64  # a graph per size, with gradient and without
            for net in (student.transformer, teacher):
                for block in (*net.noise_refiner, *net.context_refiner, *net.layers):
                    # FSDP's hooks and ours stay outside of the graph.
                    block.forward = torch.compile(block.forward, fullgraph=True)
        return student

    def set_checkpointing(self, transformer, role):
        if self.options.checkpointing in (role, "both"):
            transformer.enable_gradient_checkpointing()

    def features(self, x_t, t, cond):
        """The image's tokens after each tapped layer: maps [B, 3840, h/2, w/2], float32."""
        tapped = self.teacher.transformer.layers, self.recipe.taps
        outputs = ladd.tapped(*tapped, lambda: self.teacher(x_t, t, cond), early_exit=False)
        return [adapter.image_tokens(f, x_t).float() for f in outputs]

    def head_cond(self, cond):
        """Normalised: a few of Qwen's channels are larger than all others by orders."""
        return F.layer_norm(cond.vector.float(), cond.vector.shape[1:])

    def batch(self, start, count):
        x0, cond, noise = self.data.read(start, count, self.recipe.batch, self.recipe.seed)
        return x0, cond, noise, x0

    def anchor(self, x_t, t, cond):
        """The teacher's velocity, under the guidance that its samples were made with. 2 F"""
        w = self.data.about["guidance"]
        no_prompt = adapter.Prompts([self.nothing] * len(cond), cond.vector)
        return ladd.guided(self.teacher, lambda _: no_prompt, w)(x_t, t, cond)

    def fingerprint(self):
        made_of = {f"latents.{k}": v for k, v in self.data.about.items()}
        made_of["held_out"] = len(self.data) - len(self.data.trained)
        return {"teacher": self.digest, "dtype": self.options.dtype, **made_of}

    # ---- looking at it, and the end -------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, student, run, step):
        """A grid: the student by 1, 2 and 4 steps from the noise that the teacher's latents have.
        With --grid-prompts a second one, STEP-own.png.

        variance@N of its latents and the squared distance@N to the teacher's, each divided by the
        teacher's variance, are to watch. The measure of quality is `feature_kid`.
        """
        x0, cond, noise = (v.to(self.device) for v in self.data.get(self.shown))
        steps = [n for n in (1, 2, 4) if n <= len(self.recipe.times)]
        own = adapter.Prompts(self.captions, torch.zeros(len(self.captions), 0))
        own_noise = noise[torch.arange(len(own)) % len(noise)]
        columns, own_columns = {"teacher": x0}, {}
        metrics, collapse = {}, []
        for n in steps:
            made = ladd.sample_student(student, self.recipe, noise, cond, n)
            columns[f"student@{n}"] = made
            if self.texts:
                z = ladd.sample_student(student, self.recipe, own_noise, own, n)
                own_columns[f"student@{n}"] = z
            variance = metrics[f"variance@{n}"] = float(made.var() / x0.var())
            metrics[f"distance@{n}"] = float((made - x0).square().mean() / x0.var())
            if not 0.5 <= variance <= 2:
                collapse.append(f"variance@{n} {variance:.2f} is outside of 0.5 .. 2")
        # Mean distance of samples at the last tap, divided by the teacher's: less if more alike.
        maps = [self.half_noised(x, cond).flatten(1) for x in (made, x0)]
        fake, real = (torch.pdist(f).mean() for f in maps)
        diversity = metrics["feature_diversity"] = float(fake / real)
        if diversity < LEAST_DIVERSITY:
            collapse.append(f"feature_diversity {diversity:.2f} is under {LEAST_DIVERSITY}")
        metrics |= self.feature_kid(student)
        grids = {"": (columns, [f"sample {k}" for k in self.shown])}
        grids |= {"-own": (own_columns, self.texts)} if self.texts else {}
        for name, (latents, texts) in grids.items() if ladd.rank() == 0 else ():
            images = {title: adapter.decode(self.vae, z) for title, z in latents.items()}
            draw_grid(run / "samples" / f"{step:07d}{name}.png", images, texts)
        return {**metrics, "collapse": collapse}

    def half_noised(self, x, cond):
        """The last tap's maps [B, C, H, W] of samples x, noised to t = 1/2 by one noise for all."""
        noise = ladd.keyed_noise([0], x.shape[1:], "diversity").to(x).expand_as(x)
        t = torch.full((len(x),), 0.5, device=x.device)
        return self.features(ladd.interpolate(x, noise, t), t, cond)[-1]

    def feature_kid(self, student):
        """KID of the student's samples of the held-out captions, from noise of their own, to the
        teacher's; and its standard error, by a jackknife over the captions.

        In Inception's place stand `half_noised` maps, averaged over the tokens and standardised by
        the teacher's samples: a few channels may be larger than all others by orders. The ranks
        share the batches. Under FSDP all must make the same calls, so some may repeat a batch.
        """
        ranks = ladd.world_size()
        size = int(self.options.micro_batch or 0) or self.recipe.batch // ranks
        batches = list(self.data.held_out_batches(size))
        features = {}  # of each sample, the student's and the teacher's: [2, C]
        for k in range(ladd.rank(), -(-len(batches) // ranks) * ranks, ranks):
            index = batches[k % len(batches)]
            x0, cond, _ = (v.to(self.device) for v in self.data.get(index))
            noise = ladd.keyed_noise(index, x0.shape[1:], "feature_kid").to(x0)
            steps = len(self.recipe.times)
            made = ladd.sample_student(student, self.recipe, noise, cond, steps, index)
            both = [self.half_noised(x, cond).mean((2, 3)).cpu() for x in (made, x0)]
            features.update(zip(index, torch.stack(both, 1), strict=True))
        parts = [None] * ranks
        dist.all_gather_object(parts, features)
        features = {k: pair for part in parts for k, pair in part.items()}
        pairs = torch.stack([features[k] for k in sorted(features)]).double()  # [n, 2, C]
        real, n = pairs[:, 1], len(pairs)
        scaled = ((pairs - real.mean(0)) / (real.std(0) + 1e-3)).numpy()
        np.random.seed(0)  # clean-fid shuffles, which changes the last digits
        few = [np.delete(scaled, k, 0) for k in range(n)]
        kid, *kids = (kernel_distance(p[:, 0], p[:, 1], 1, n) for p in (scaled, *few))
        error = (n - 1) ** 0.5 * statistics.pstdev(kids)
        return {"feature_kid": kid, "feature_kid_error": error, "score": kid, "score_error": error}

    def save(self, student, run, name="student"):
        """The student as run/NAME/ in diffusers' format, in the dtype that it computes in."""
        transformer = student.transformer
        if not self.recipe.lora_rank:
            transformer = fsdp.gather(transformer, self.dtype)  # on every rank: it exchanges
        elif ladd.rank() == 0:
            transformer = lora.merged(transformer)
        if ladd.rank() == 0:
            with ladd.replacing(run / name) as part:
                transformer.save_pretrained(part)

    def finish(self, student, run):
        self.save(student, run)
        if self.recipe.lora_rank:
            more = ", stochastic_sampling=True" if self.recipe.sampler == "renoise" else ""
            card = self.model, call_for(self.recipe.times), more
            ladd.on_rank0(lambda: lora.save(student.transformer, run / "lora", *card))
            print0(f"{run / 'lora'} needs a scheduler of shift 1: see its README.md")
        print0(f"{run / 'student'} is done. Next: python -m zimage.evaluate {run}")


def call_for(times):
    """The arguments by which the stock pipeline, without shift, asks for these times."""
    n = len(times)
    if all(abs(t - (1 - k / n)) < 1e-6 for k, t in enumerate(times)):  # its linspace(1, 1/n, n)
        return f"num_inference_steps={n}, guidance_scale=0"
    return f"sigmas={list(times)}, guidance_scale=0"


def draw_grid(path, columns, texts):
    """A row for each of N texts, a column for each {title: N PIL images of one size}."""
    width, height = next(iter(columns.values()))[0].size
    size = 3 * len(columns), 3 * len(texts) * height / width
    fig = Figure(size, dpi=max(100, width / 3), layout="constrained")
    axes = fig.subplots(len(texts), len(columns), squeeze=False)
    for k, (title, images) in enumerate(columns.items()):
        axes[0, k].set_title(title)
        for ax, image in zip(axes[:, k], images, strict=True):
            ax.imshow(image)
            ax.set(xticks=[], yticks=[])
    for ax, text in zip(axes[:, 0], texts, strict=True):
        ax.set_ylabel(textwrap.fill(text, 40, max_lines=3), fontsize=7)
    with ladd.replacing(path) as part:
        fig.savefig(part, format="png")
