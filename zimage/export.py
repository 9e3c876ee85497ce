"""A run's student as a folder that stock diffusers samples right:

    python -m zimage.export RUN --out DIR
    ZImagePipeline.from_pretrained(DIR)(prompt, num_inference_steps=4, guidance_scale=0)

The pipeline of the base model with the student as its transformer and a scheduler without shift. The stock pipeline asks for
the times linspace(1, 1/N, N), and the scheduler's shift, 6 in the base model, would move them; without it four steps are at 1,
.75, .5, .25, where LADD's student was trained. Step counts whose trained times are others need `sigmas=[...]`; the model card,
DIR/README.md, gives the call for each.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import ladd
from ladd import UserError
from zimage import adapter, evaluate
from zimage.sampling import DTYPES, command, load_student, open_run, parser_for, read_json

OLDEST = "0.40"         # of diffusers; 0.38 ends its sigmas at 0, so four steps are at 1, .667, .333, 0, and 0.39 does not know `dtype`


def check_diffusers():
    import diffusers
    from packaging.version import Version
    if Version(diffusers.__version__) < Version(OLDEST):
        raise UserError(f"diffusers {diffusers.__version__}: its Z-Image pipeline misses the trained times; "
                        f"pip install 'diffusers>={OLDEST}'")


def call_for(times):
    """The arguments with which the stock pipeline, without shift, samples at these times."""
    n = len(times)
    stock = [1 - k / n for k in range(n)]                       # its linspace(1, 1/N, N)
    if max(abs(a - b) for a, b in zip(times, stock)) < 1e-6:
        return f"num_inference_steps={n}, guidance_scale=0"
    return f"sigmas=[{', '.join(map(str, times))}], guidance_scale=0"


def calls(run):
    """[(N, its times, the call's arguments)] for every step count that the student knows, the most first."""
    all_times = [ladd.step_times(run.times, n) for n in range(len(run.times), 0, -1)]
    return [(len(times), times, call_for(times)) for times in all_times]


def model_card(run, name, dtype, steps):
    """README.md: what the model is, how to load it, how it was made, and its figures, where it was evaluated."""
    iteration, recipe = run.about.get("iteration"), run.config["recipe"]
    kind = "averaged" if run.about.get("weights") == "average" else "the"
    model = str(run.config.get("model") or run.model)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists()
    call, needs = call_for(ladd.step_times(run.times, steps)), f"1 to {len(run.times)} steps" if len(run.times) > 1 else "1 step"
    lines = ["---", *[f"base_model: {model}"] * bool(on_hub), "library_name: diffusers", "pipeline_tag: text-to-image",
             "tags: [ladd, distillation]", "---\n",
             f"# {name}\n",
             f"A student of {f'[{model}](https://huggingface.co/{model})' if on_hub else model}",
             f"that needs {needs} and no guidance, distilled by LADD (Latent Adversarial Diffusion Distillation,",
             f"[arXiv 2403.12015](https://arxiv.org/abs/2403.12015)): {kind} weights of iteration {iteration}, stored in {dtype}.",
             "Its licence is that of the base model.\n",
             "## Use\n",
             f"```python\nimport torch\nfrom diffusers import ZImagePipeline     # diffusers {OLDEST} or newer\n",
             f'pipe = ZImagePipeline.from_pretrained("{name}", dtype=torch.{dtype}).to("cuda")',
             f'image = pipe("a red fox in fresh snow", {call}).images[0]\n```\n',
             "The student was trained at these times t (1 = noise, 0 = clean; diffusers calls them sigmas), and should be sampled",
             "at no others:\n",
             "| steps | times | call |\n|---|---|---|",
             *(f"| {n} | {', '.join(f'{t:g}' for t in times)} | `pipe(prompt, {arguments})` |" for n, times, arguments in calls(run)),
             "",
             "`guidance_scale=0` matters: the pipeline's own default would add guidance, which the student has learnt already.",
             "So does the scheduler in this folder: it has no shift (`shift` 1), that of the base model would move the times."]
    if run.sampler == "renoise":
        lines += ["It adds fresh noise between the steps (`stochastic_sampling`), from torch's global generator:",
                  "`torch.manual_seed(0)` before a call makes it repeatable, the call's own `generator` does not."]
    lines += ["", "## Recipe\n", "| field | value |\n|---|---|",
              *(f"| {k} | {', '.join(map(str, v)) if isinstance(v, (list, tuple)) else v} |" for k, v in recipe.items()),
              "", "## Figures\n", figures(run)]
    return "\n".join(lines) + "\n"


def figures(run):
    """The table of RUN/report.json for the card."""
    path, way_out = run.folder / "report.json", f"write it again by python -m zimage.evaluate {run.folder}"
    if not path.exists():
        return "Not evaluated."
    report = read_json(path, way_out)
    try:
        conditions, table = report["conditions"], evaluate.markdown_table(report["rows"])
        where = f"Measured at iteration {conditions['iteration']}: {evaluate.describe(conditions)}"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: lacks what a report holds ({error}); {way_out}") from error
    return f"{table}\n{where}"


def check_out(out):
    """UserError where --out can't become a new folder."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: exists and is not empty; name another folder, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")


def export(run, out, dtype="bfloat16", steps=None):
    """Write the folder `out` for a `Run`, beside its place first: it is whole or not there. steps: those of the card's example."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    out = Path(out).resolve()
    check_diffusers()
    check_out(out)
    card = model_card(run, out.name, dtype, steps or min(4, len(run.times)))
    student = load_student(run, DTYPES[dtype])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False, stochastic_sampling=run.sampler == "renoise")
    pipe = adapter.load_pipeline(run.base, DTYPES[dtype], "cpu", transformer=student, scheduler=scheduler)
    for module in (pipe, pipe.transformer, pipe.vae):            # what is shared names no folder of this machine
        module.register_to_config(_name_or_path="")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        pipe.save_pretrained(part)
        (part / "README.md").write_text(card, encoding="utf-8")
        os.replace(part, out)                                   # an empty folder may stand there
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror or error}); "
                        f"name another folder, or free the space") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run_command(argv):
    parser = parser_for("export", __doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--steps", type=int, metavar="N",
                        help="steps of the card's example (default: 4, or all that the student knows)")
    options = parser.parse_args(argv)
    run = open_run(options.run, options.model)
    if options.steps is not None:
        ladd.step_times(run.times, options.steps)
    export(run, options.out, options.dtype, options.steps)
    print(f"{options.out}: iteration {run.about.get('iteration')} of {run.folder}; "
          f'pipe = ZImagePipeline.from_pretrained("{options.out}"), then')
    for n, times, arguments in calls(run):
        print(f"  {n} step{'s' * (n > 1)}, t = {', '.join(f'{t:g}' for t in times)}: pipe(prompt, {arguments})")


def main(argv=None):
    """The command line; returns the exit code. Bad input is one line on stderr and 2."""
    return command("export", run_command, argv)


if __name__ == "__main__":
    sys.exit(main())
