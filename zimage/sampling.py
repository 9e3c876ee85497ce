"""What `sample`, `evaluate` and `export` share: a run and its student, the ways of sampling that are compared, and their images.

The starting noise, and the fresh noise of the "renoise" sampler, are keyed by (seed, the prompt's index), so an image is the same,
up to rounding, whatever batch, process or resumed run it was made in.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import ladd
from ladd import UserError
from zimage import adapter

PROMPTS = Path(__file__).parent / "prompts" / "heldout.txt"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ENCODE = 8              # prompts per pass of the text encoder


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Run:
    """A Z-Image run that has a student."""

    folder: Path
    config: dict        # config.json: the recipe and what else the run was made with
    model: str          # the base model, as it was named
    base: Path          # its folder
    about: dict         # student/about.json

    @property
    def times(self):
        return self.config["recipe"]["times"]

    @property
    def sampler(self):
        return self.config["recipe"]["sampler"]


def read_json(path, way_out):
    """A JSON object from a file; UserError, ending in way_out, where it can't be read as one."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({type(error).__name__}); {way_out}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; {way_out}")
    return value


def open_run(folder, model=None):
    """The run in a folder, its student and base model looked at but not loaded. model: another place of the base model."""
    folder = Path(folder)
    config = read_json(folder / "config.json", "give the folder of a run, like runs/001")
    if config.get("world") != "zimage":
        raise UserError(f"{folder}: a run of the world {config.get('world')!r}; give one of torchrun ladd.py --zimage")
    recipe = config.get("recipe")
    if not isinstance(recipe, dict) or not recipe.get("times") or recipe.get("sampler") not in ("euler", "renoise"):
        raise UserError(f"{folder / 'config.json'}: its recipe lacks times or sampler; restore the file")
    if not list((folder / "student").glob("*.safetensors")):
        raise UserError(f"{folder}: this run has no student/ yet; let it finish, or go on with it by --resume --name {folder.name}")
    about = read_json(folder / "student" / "about.json", f"write student/ again by --resume --name {folder.name}")
    model = model or config.get("model")
    if not model:
        raise UserError(f"{folder / 'config.json'}: names no base model; give it as --model ID_OR_DIR")
    run = Run(folder, config, str(model), adapter.model_folder(model), about)
    teacher = (config.get("data") or {}).get("teacher")
    if teacher and teacher != adapter.model_fingerprint(run.base):
        raise UserError(f"--model {model}: not the model that {folder} was made with, other files in {', '.join(adapter.DECIDING)}; give that one")
    check_shape(run)
    return run


def check_shape(run):
    """UserError unless the student's configuration is that of the base model's transformer."""
    from diffusers import ZImageTransformer2DModel
    defaults = {k: p.default for k, p in inspect.signature(ZImageTransformer2DModel.__init__).parameters.items() if k != "self"}

    def shape(folder):
        config = read_json(folder / "config.json", "restore the file")
        return {**defaults, **{k: v for k, v in config.items() if not k.startswith("_")}}
    if other := ladd.unlike(shape(run.base / "transformer"), shape(run.folder / "student")):
        raise UserError(f"{run.folder / 'student'}: no student of {run.model}: {'; '.join(other)}; "
                        f"give the model it was made from as --model")


def load_student(run, dtype):
    """The run's averaged student, in dtype, frozen. UserError where its files are damaged or lack a weight."""
    return adapter.load_transformer(run.folder / "student", dtype, f"write it again by --resume --name {run.folder.name}")


def student_digest(run):
    """A digest of the student's weights, read whole."""
    digest = hashlib.sha256()
    for path in sorted((run.folder / "student").glob("*.safetensors")):
        with open(path, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The ways of sampling
# ---------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Way:
    """One column of a picture, one row of a table: some weights, sampled in some way."""

    name: str           # say "student@4"
    weights: str        # "base" or "student"
    times: tuple        # falling from 1; one step each
    sampler: str = "euler"
    guidance: float = 1.0       # w; 1 = none

    @property
    def nfe(self):
        """Evaluations of the network per image; a guided step counts twice."""
        return len(self.times) * (1 if self.guidance == 1 else 2)


def compared(run, steps, teacher_steps, guidance, untrained_steps):
    """The teacher as its pipeline samples it, the student, and the untrained student: the base model sampled as the student is."""
    student = lambda n: (tuple(ladd.step_times(run.times, n)), run.sampler)
    teacher = tuple(adapter.teacher_times(teacher_steps, adapter.scheduler_shift(run.base, teacher_steps)))
    return [Way(f"teacher@{teacher_steps}", "base", teacher, "euler", guidance),
            *(Way(f"student@{n}", "student", *student(n)) for n in steps),
            *(Way(f"untrained@{n}", "base", *student(n)) for n in untrained_steps)]


@torch.no_grad()
def sample_latents(velocity, way, noise, cond, null, keys):
    """Noise [B, 16, h, w] -> x0 [B, 16, h, w] by `way`.

    cond: Prompts; null [L, C]: the empty prompt's features; keys: (seed, index) of each sample.
    """
    def fresh(step):
        return torch.stack([torch.randn(noise.shape[1:], generator=ladd.generator(*key, "zimage re-noise", step)) for key in keys])

    guided = ladd.guided(velocity, lambda c: adapter.Prompts([null] * len(c), c.vector), way.guidance)
    if way.sampler == "renoise":
        return ladd.sample_renoise(guided, noise, way.times, cond, fresh)
    return ladd.sample_euler(guided, noise, way.times, cond)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------

def encode_prompts(base, prompts, dtype, device):
    """Text features of prompts and of the empty one: a list of [L_i, C] on the CPU, [L, C]. The encoder is freed again."""
    pipe = adapter.load_pipeline(base, dtype, device, transformer=None, vae=None)
    captions = [c.cpu() for k in range(0, len(prompts), ENCODE) for c in adapter.encode(pipe, prompts[k:k + ENCODE])]
    return captions, adapter.encode(pipe, [""])[0].cpu()


def batches(keys, captions, size):
    """Keys (seed, index) in batches of at most `size`, of one padded caption length each: attention then needs no mask."""
    by_length = {}
    for key in keys:
        by_length.setdefault(adapter.padded_length(captions[key[1]]), []).append(key)
    return [same[k:k + size] for _, same in sorted(by_length.items()) for k in range(0, len(same), size)]


def clock(device):
    """Seconds, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def images(run, jobs, prompts, resolution, batch, device, dtype, show=True):
    """Make images, a batch at a time. jobs: [(Way, [(seed, index of the prompt), ...])].

    Yields (way, keys, images [B, 3, H, W] in [0, 1] on the CPU, seconds of the sampler alone). The prompts are encoded first; then
    the base model and the student are loaded one after the other, each only where a job needs it.
    """
    jobs, side = [(way, keys) for way, keys in jobs if keys], resolution // adapter.PIXELS
    if not jobs:
        return
    used = sorted({index for _, keys in jobs for _, index in keys})
    captions, null = encode_prompts(run.base, [prompts[i] for i in used], dtype, device)
    captions, null = dict(zip(used, captions)), null.to(device)
    vae = adapter.load_vae(run.base, dtype, device)
    for weights in ("base", "student"):
        mine = [(way, keys) for way, keys in jobs if way.weights == weights]
        if not mine:
            continue
        transformer = adapter.load_transformer(run.base / "transformer", dtype) if weights == "base" else load_student(run, dtype)
        velocity, warm = adapter.ZImageVelocity(transformer.to(device)), torch.device(device).type != "cuda"
        for way, keys in mine:
            for group in tqdm(batches(keys, captions, batch), desc=way.name, unit="batch", disable=not show):
                noise = torch.stack([adapter.noise_for(*key, side, side) for key in group]).to(device)
                cond = adapter.Prompts([captions[i] for _, i in group], torch.zeros(len(group), 1)).to(device)
                if not warm:            # the first pass on a GPU chooses its kernels: not to be timed
                    with torch.no_grad():
                        velocity(noise, torch.ones(len(group), device=device), cond)
                    warm = True
                began = clock(device)
                x0 = sample_latents(velocity, way, noise, cond, null, group)
                seconds = clock(device) - began
                yield way, group, adapter.decode(vae, x0, batch), seconds
        del transformer, velocity       # before the next one is loaded


def to_bytes(images):
    """Images [B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3], a numpy array, as PNG stores them."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

def command(name, job, argv):
    """job(argv) as a command: its exit code. Bad input, or too little memory, is one line on stderr and 2."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):           # no progress bars and load reports of each part of a model, by each rank
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    try:
        job(sys.argv[1:] if argv is None else argv)
        return 0
    except UserError as error:
        print(f"zimage.{name}: {error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(f"zimage.{name}: out of memory ({adapter.reason(error)}); give a smaller --batch", file=sys.stderr)
    return 2


def parser_for(name, doc):
    """A parser with the options that all three commands have."""
    parser = ladd.Parser(prog=f"python -m zimage.{name}", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         description=doc)
    parser.add_argument("run", metavar="RUN", help="the folder of the run, like runs/001")
    parser.add_argument("--model", metavar="ID_OR_DIR", help="the base model, where it is not at the place the run was made with")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES,
                        help="what the weights are held and run in (default %(default)s)")
    return parser


def add_sampling_arguments(parser):
    parser.add_argument("--steps", help="step counts of the student (default 4,2,1, as far as it knows them)")
    parser.add_argument("--teacher-steps", type=int, metavar="N", help="steps of the teacher (default: those of the run's latents)")
    parser.add_argument("--guidance", type=float, metavar="W",
                        help="guidance of the teacher, neg + W (pos - neg): the pipeline's guidance_scale + 1 (default: that of the run's latents)")
    parser.add_argument("--resolution", default=512, type=int, metavar="PX",
                        help="side of the images, a multiple of 16 (default %(default)s)")
    parser.add_argument("--batch", default=4, type=int, metavar="N",
                        help="images per pass (default %(default)s); they do not depend on it")
    parser.add_argument("--device", help="cuda, mps (untested) or cpu (default: the first of these that is there)")


def check_sampling(options, run):
    """Put the step counts in as numbers, the teacher's settings and the device in; UserError names what is out of range."""
    made = run.config.get("data") or {}
    if options.teacher_steps is None:
        options.teacher_steps = made.get("latents.steps", 50)
    if options.guidance is None:
        options.guidance = made.get("latents.guidance", 5.0)
    options.steps = integers("--steps", options.steps, 1) if options.steps else [n for n in (4, 2, 1) if n <= len(run.times)]
    for n in options.steps:
        ladd.step_times(run.times, n)
    at_least("--teacher-steps", options.teacher_steps, 1)
    at_least("--batch", options.batch, 1)
    if not 0 <= options.guidance < math.inf:
        raise UserError(f"--guidance {options.guidance}: give a number from 0, 1 being none")
    largest = 16 * min(read_json(run.base / "transformer" / "config.json", "restore the file").get("axes_lens", [0, 512, 512])[1:])
    if options.resolution % 16 or not 16 <= options.resolution <= largest:
        raise UserError(f"--resolution {options.resolution}: give a multiple of 16 from 16 to {largest}")
    options.device = ladd.pick_device(options.device)


def at_least(name, value, low):
    if value < low:
        raise UserError(f"{name} {value}: give at least {low}")


def integers(name, text, low):
    """Whole numbers from 'a,b,c', each once and at least low."""
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < low or len(set(values)) < len(values):
        raise UserError(f"{name} {text!r}: give different whole numbers from {low}, with commas between them")
    return values
