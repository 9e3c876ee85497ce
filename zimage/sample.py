"""Teacher, student and untrained student side by side, from the same noise, in one picture:

    python -m zimage.sample RUN

The untrained student is the base model run in the student's steps, without guidance. Noise is
keyed by (seed, the prompt's index): in any batch or process an image is the same, up to rounding.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import ladd
from ladd import check
from zimage import adapter, data, world

PROMPTS = Path(__file__).parent / "prompts" / "heldout.txt"


class Run(NamedTuple):
    """A finished Z-Image run."""

    folder: Path
    made_of: dict  # what its teacher and data were made of
    recipe: world.ZImageRecipe
    model: str  # the base model, as it was named
    base: Path  # its folder


def open_run(folder, model=None):
    """The run in a folder, nothing of it loaded yet. model: another place of the base model."""
    folder = Path(folder)
    recipe = ladd.recipe_from(world.ZImageRecipe, folder / "config.json")
    made_of = json.loads((folder / "config.json").read_text())["data"]
    check("latents.model" in made_of, f"{folder}: no run of Z-Image; give one, like runs/first")
    done = max(ladd.checkpoints(folder), default=recipe.iterations)  # fewer: it is made longer now
    ended = (folder / "student" / "config.json").exists() and done == recipe.iterations
    check(ended, f"{folder}: it has not ended; go on with it by --resume --name {folder.name}")
    model = str(model or made_of["latents.model"])
    base = adapter.model_folder(model)
    same = adapter.model_fingerprint(base) == made_of["teacher"]
    check(same, f"--model {model}: not the model that {folder} was made with; give that one")
    return Run(folder, made_of, recipe, model, base)


class Way(NamedTuple):
    """A way of sampling: one column of a picture, one row of a table."""

    name: str  # say "student@4"
    weights: str  # "base" or "student"
    steps: int
    guidance: float | None = None  # w of the teacher, 1 for none; None: sampled as the student is

    @property
    def nfe(self):
        """Evaluations of the network per image; a guided step counts twice."""
        return self.steps * (1 if self.guidance in (None, 1) else 2)


def compared(options, untrained_steps):
    """Teacher, student, and untrained student: the base model sampled as the student is."""
    return [
        Way(f"teacher@{options.teacher_steps}", "base", options.teacher_steps, options.guidance),
        *(Way(f"student@{n}", "student", n) for n in options.steps),
        *(Way(f"untrained@{n}", "base", n) for n in untrained_steps),
    ]


def images(run, jobs, prompts, options):
    """Yields (way, key, PIL image), made a batch at a time. jobs: {Way: [key, ...]}; a key is
    (seed, prompt's index). Of base model and student each is loaded only where a job needs it."""
    dtype, device = getattr(torch, options.dtype), options.device
    h, w = (side // adapter.PIXELS for side in options.resolution)
    used = sorted({k for keys in jobs.values() for _, k in keys})
    if not used:
        return
    pipe = adapter.load_pipeline(run.base, dtype, device, transformer=None)
    null, *encoded = adapter.encode(pipe, ["", *(prompts[k] for k in used)])
    captions = dict(zip(used, encoded, strict=True))
    pipe.text_encoder = None  # it goes before the transformer comes
    folders = {"base": run.base / "transformer", "student": run.folder / "student"}
    for weights, folder in folders.items():
        own = {way: keys for way, keys in jobs.items() if keys and way.weights == weights}
        if not own:
            continue
        velocity = pipe.transformer = None  # the base model goes before the student comes
        pipe.transformer = adapter.load_transformer(folder, dtype)
        velocity = adapter.ZImageVelocity(pipe.to(device).transformer)
        for way, keys in own.items():
            batches = adapter.batches([len(captions[k]) for _, k in keys], options.batch)
            for rows in adapter.progress(batches, way.name):
                group = [keys[row] for row in rows]
                told = [captions[k] for _, k in group]
                noise = torch.stack([adapter.noise_for(*key, h, w) for key in group]).to(device)
                if way.guidance is None:
                    cond = adapter.Prompts(told, torch.zeros(len(told), 0))
                    index = [1_000_000 * seed + k for seed, k in group]
                    x0 = ladd.sample_student(velocity, run.recipe, noise, cond, way.steps, index)
                else:
                    x0 = adapter.sample_teacher(pipe, told, null, noise, way.steps, way.guidance)
                for key, image in zip(group, adapter.decode(pipe.vae, x0), strict=True):
                    yield way, key, image


def parser_for(name, doc):
    """A parser with the options that sample, evaluate and export have."""
    parser = ladd.Parser(f"python -m zimage.{name}", description=doc)
    parser.add_argument("run", metavar="RUN", help="the folder of the run, like runs/first")
    parser.add_argument("--model", metavar="ID_OR_DIR", help="the base model, if it has moved")
    return parser


def add_sampling_arguments(parser):
    """Those that sample and evaluate have besides."""
    add = parser.add_argument
    text = "a .txt with one prompt a line, .jsonl, .csv or .tsv (default: 100 shipped ones)"
    add("--prompts", default=PROMPTS, metavar="FILE", help=text)
    add("--steps", type=numbers, metavar="N,N", help="step counts of the student (default: 4,2,1)")
    add("--teacher-steps", type=positive, metavar="N", help="its steps (default: the data's)")
    text = "the teacher's w, 1 for none: guidance_scale + 1 (default: the data's)"
    add("--guidance", type=float, metavar="W", help=text)
    add("--resolution", type=adapter.parse_size, help="512 or 640x384 pixels (default: the data's)")
    add("--batch", type=positive, default=4, help="images per pass (default: %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--dtype", choices=("bfloat16", "float32"), help="(default: the device's)")


def fill_in(options, run):
    """What was left out, from the run and the device; UserError where a value can't be."""
    options.teacher_steps = options.teacher_steps or run.made_of["latents.steps"]
    w = run.made_of["latents.guidance"] if options.guidance is None else options.guidance
    check(1 <= w < float("inf"), f"--guidance {w}: give a number from 1 (no guidance)")
    options.guidance = w
    if not options.resolution:
        options.resolution = adapter.parse_size(run.made_of["latents.resolution"][0])
    options.steps = options.steps or [n for n in (4, 2, 1) if n <= len(run.recipe.times)]
    for n in options.steps:
        ladd.step_times(run.recipe.times, n)
    options.device = ladd.pick_device(options.device)
    options.dtype = options.dtype or ladd.default_dtype(options.device)


def numbers(text):
    """argparse type: '4,2,1' -> [4, 2, 1], each once."""
    values = [int(word) for word in text.split(",")]
    if min(values) < 0 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text}: give different whole numbers, with commas")
    return values


def positive(text):
    """argparse type: a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1")
    return int(text)


def main(argv=None):
    parser = parser_for("sample", __doc__)
    parser.add_argument("--count", type=positive, default=8, help="rows (default: %(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="of the noise (default: %(default)s)")
    parser.add_argument("--out", metavar="PNG", help="the picture (default: RUN/sample.png)")
    add_sampling_arguments(parser)
    options = parser.parse_args(argv)
    run = open_run(options.run, options.model)
    fill_in(options, run)
    out = Path(options.out or run.folder / "sample.png").expanduser()
    check(out.suffix.lower() == ".png", f"--out {out}: give a .png file")
    prompts = data.read_prompts(options.prompts)[: options.count]
    ways = compared(options, untrained_steps=options.steps)
    keys = [(options.seed, index) for index in range(len(prompts))]
    titles = {way: f"{way.name}\n{way.nfe} evaluation{'s' * (way.nfe > 1)}" for way in ways}
    columns = {title: [None] * len(keys) for title in titles.values()}
    for way, (_, index), image in images(run, dict.fromkeys(ways, keys), prompts, options):
        columns[titles[way]][index] = image
    world.draw_grid(out, columns, prompts)
    print(out)


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
