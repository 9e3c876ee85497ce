"""A run's student as a folder that stock diffusers samples right:

    python -m zimage.export RUN --out DIR
    ZImagePipeline.from_pretrained(DIR)(prompt, num_inference_steps=4, guidance_scale=0)

The stock pipeline asks for the times linspace(1, 1/N, N), which the base model's scheduler shifts.
This one has no shift, so four steps are at 1, .75, .5, .25, where LADD's student was trained. Step
counts with other trained times need `sigmas=[...]`: DIR/README.md, the model card, gives the calls.
"""

import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import ladd
from zimage import adapter, sample, world

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [ladd, distillation]
{hub}---

# {name}

A student of {model} that needs no guidance and few steps, distilled by LADD ([arXiv
2403.12015](https://arxiv.org/abs/2403.12015)), stored in {dtype}. The base model's licence holds.

```python
import torch
from diffusers import ZImagePipeline  # 0.40 or newer: older ones sample at other times
pipe = ZImagePipeline.from_pretrained("{name}", dtype=torch.{dtype}).to("cuda")
image = pipe("a red fox in fresh snow", {call}).images[0]
```

It was trained at these times (1 = noise, 0 = clean; diffusers calls them sigmas) and no others:

| steps | times | call |
|---|---|---|
{calls}

`guidance_scale=0` matters: the pipeline's own default adds guidance, which the student has learnt.
So does this folder's scheduler: it has no shift, and that of the base model has.
{renoise}
## Figures

{figures}
"""
RENOISE = """
It adds noise between the steps from torch's global generator: `torch.manual_seed(0)` before a call
makes it repeatable, the call's own `generator` does not.
"""


def model_card(run, name, dtype):
    """README.md: what the model is, how to call it, and its figures if it has some."""
    times = [ladd.step_times(run.recipe.times, n) for n in range(len(run.recipe.times), 0, -1)]
    row = "| {} | {} | `pipe(prompt, {})` |"
    calls = [row.format(len(ts), ", ".join(map(str, ts)), world.call_for(ts)) for ts in times]
    report = run.folder / "report.md"
    on_hub = "/" in run.model and not Path(run.model).exists()
    parts = {"name": name, "model": run.model, "dtype": dtype, "call": world.call_for(times[0])}
    parts["hub"] = f"base_model: {run.model}\n" if on_hub else ""
    parts["calls"] = "\n".join(calls)
    parts["renoise"] = RENOISE if run.recipe.sampler == "renoise" else ""
    parts["figures"] = report.read_text(encoding="utf-8") if report.exists() else "Not evaluated."
    return CARD.format(**parts)


def export(run, out, dtype="bfloat16"):
    """Write the folder `out` for a `Run`: it is whole or not there. dtype: of the weights."""
    out = Path(out).expanduser().resolve()
    ladd.check(not any(out.glob("*")), f"--out {out}: not an empty folder; name another")
    kind = getattr(torch, dtype)
    student = adapter.load_transformer(run.folder / "student", kind)
    renoise = run.recipe.sampler == "renoise"
    even = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=renoise)
    pipe = adapter.load_pipeline(run.base, kind, "cpu", transformer=student, scheduler=even)
    for module in (pipe, pipe.transformer, pipe.vae):  # what is shared names no folder from here
        module.register_to_config(_name_or_path="")
    with ladd.replacing(out) as part:
        pipe.save_pretrained(part)
        (part / "README.md").write_text(model_card(run, out.name, dtype), encoding="utf-8")


def main(argv=None):
    parser = sample.parser_for("export", __doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args(argv)
    run = sample.open_run(options.run, options.model)
    export(run, options.out, options.dtype)
    call = world.call_for(run.recipe.times)
    print(f'ZImagePipeline.from_pretrained("{options.out}")(prompt, {call}); see its README.md')


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
