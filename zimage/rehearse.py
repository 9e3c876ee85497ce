"""The whole path at its real size, in minutes, before it is paid for:

    python -m zimage.rehearse --model Tongyi-MAI/Z-Image --gpus 8 [options of ladd.py]

Prompts -> precompute -> 4 iterations -> SIGKILL -> resume, 2 more -> sample -> KID -> export ->
stock diffusers, each stage by the command that users run. It ends with "ready", or with what is
wrong. All lies in a temporary folder beside the picture, which needs room for two checkpoints, two
students and an export. The picture stays, and a log beside it.
"""

import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import psutil
import torch
from PIL import Image

import ladd
from ladd import check
from zimage import adapter, data, evaluate, plan, sample

PROMPTS = Path(__file__).parent / "prompts" / "train.txt"
PLUMBING = """import sys, ladd
from zimage import evaluate, rehearse
sys.exit(ladd.run_command_line(lambda argv: evaluate.main(argv, rehearse.stand_in)))"""


def stand_in(images):
    """Stands for Inception: images [B, 3, 299, 299] -> the colours of 16 places, [B, 48]."""
    return torch.nn.functional.adaptive_avg_pool2d(images / 255, 4).flatten(1)


def launch(gpus, words, log, until=None):
    """Run `python WORDS`, by torchrun if on several GPUs. Returns what it prints, which the file
    `log` gets too. until: a path; when it exists, the command is killed. UserError if it fails."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    ranks = [*ranks, "--no-python", sys.executable] if gpus > 1 else []
    with open(log, "ab") as f:
        start = f.tell()
        command = [sys.executable, *ranks, *map(str, words)]
        process = psutil.Popen(command, stdout=f, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not (until and until.exists()):
                time.sleep(0.05)
            killed = process.poll() is None
        finally:  # what still runs gets SIGKILL, with what it has started: torchrun's ranks
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [process, *process.children(recursive=True)]
                for each in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                psutil.wait_procs(family, timeout=10)  # PID 1 of a container may keep zombies
    text = log.read_bytes()[start:].decode(errors="replace")
    said = re.findall(r"^ladd: (?!stopped)(.*)", text, re.M)  # torchrun stops the other ranks
    said = said or re.findall(r"^.*\wError: .+", text, re.M)
    why = (said or [f"exit code {process.returncode}"])[0]
    check(killed or process.returncode == 0, f"{why}; see {log}")
    return text


def compare(folder, images, prompts, options, **call):
    """UserError unless the stock pipeline in `folder` makes the first four `images` by `call`."""
    pipe = adapter.load_pipeline(folder, getattr(torch, options.dtype), options.device)
    height, width = options.resolution
    for i, prompt in enumerate(prompts[:4]):
        z = adapter.noise_for(0, i, height // adapter.PIXELS, width // adapter.PIXELS)
        call |= {"latents": z[None].to(options.device), "height": height, "width": width}
        made = 255 * pipe(prompt, output_type="np", **call).images[0]
        apart = float(np.abs(made - Image.open(images / f"{i:05d}.png")).mean())
        # In bfloat16 another batch rounds otherwise, which 50 guided steps enlarge: 8 is a guess.
        why = f"{images}, image {i}: {apart:.1f} of 255 levels off the stock pipeline's"
        check(apart < (1 if options.dtype == "float32" else 8), why)


def rehearse(place, options, recipe, more, planned):
    """All stages in the folder `place`. more: options for ladd.py. planned: a `plan.Trace` of an
    iteration. Returns the seconds of one."""
    gpus = options.gpus
    steps = len(recipe.times)
    run = place / "runs" / "rehearsal"
    log = options.out.with_suffix(".log")
    prompts = data.read_prompts(PROMPTS)[: max(16, 4 * gpus)]  # a batch for each GPU
    (place / "prompts.txt").write_text("\n".join(prompts))
    (place / "few.txt").write_text("\n".join(prompts[: 4 * gpus]))
    log.write_text("")

    def show(name, began, passes, peak, planned_peak=0):  # peaks in GB, 0 for none
        best = passes * planned.forward / 1e12 / plan.CARDS[options.gpu][0]
        seconds = time.time() - began, best / plan.REACHED[1]
        cells = [f"{s:.1f} s" if s < 60 else f"{s / 60:.1f} min" for s in seconds]
        cells += [f"{gb:.3f}" if gb else "-" for gb in (peak, planned_peak)]
        print(f"{name:<28}" + "".join(f"{cell:>10}" for cell in cells), flush=True)

    def stage(name, gpus, passes, *words, until=None, peak=0):
        began = time.time()
        text = launch(gpus, words, log, until)
        found = re.findall(r"peak_gb ([\d.]+)", text)  # which ladd.py prints where it has CUDA
        show(name, began, passes, max(map(float, found), default=0), peak)
        return text

    print(f"{'':<28}{'time':>10}{'planned':>10}{'peak GB':>10}{'planned':>10}")
    height, width = options.resolution
    kind = ["--device", options.device, "--dtype", options.dtype]
    drawn = ["--prompts", place / "prompts.txt", "--resolution", f"{width}x{height}", *kind]
    make = ["-m", "zimage.precompute", "--model", options.model, "--out", place / "data"]
    make += ["--clip", options.clip_model] if options.clip_model else []
    passes = plan.TEACHER * len(prompts) / gpus  # of the network on each GPU
    stage(f"precompute {len(prompts)} prompts", gpus, passes, *make, "--shard-size", 4, *drawn)
    train = [ladd.__file__, "--zimage", *more, *kind, "--model", options.model]
    train += ["--data", place / "data", "--out", run.parent, "--name", run.name]
    train += ["--iterations", 6, "--log-every", 1, "--checkpoint-every", 4, "--evaluate-every", 4]
    fourth = run / "checkpoints" / "step-0000004"
    each = planned.flops * recipe.batch / planned.forward / gpus  # an iteration in passes
    peak = planned.peak / 1e9
    stage("4 iterations, SIGKILL", gpus, 4 * each, *train, until=fourth / ".metadata", peak=peak)
    text = stage("resume, 2 iterations", gpus, 2 * each, *train, "--resume", peak=peak)
    check(f"going on from {fourth}" in text, f"--resume did not go on from iteration 4; see {log}")
    drawn += ["--steps", steps]
    shown = ["-m", "zimage.sample", run, "--count", 4, "--out", options.out, *drawn]
    stage("sample", 1, 4 * (plan.TEACHER + 2 * steps), *shown)
    judge = ["-m", "zimage.evaluate"]
    try:
        evaluate.inception(Path(torch.hub.get_dir()), "cpu")
    except ladd.UserError:
        judge = ["-c", PLUMBING]
        print("KID: plumbing only")
    judge += [run, "--seeds", 0, *drawn, "--prompts", place / "few.txt"]
    stage("KID", gpus, 4 * (2 * plan.TEACHER + 2 * steps), *judge)  # the teacher has two seeds
    stage("export", 1, 0, "-m", "zimage.export", run, "--out", place / "export", *kind[2:])
    began = time.time()
    made_of = json.loads((run / "config.json").read_text())["data"]
    call = {"num_inference_steps": made_of["latents.steps"]}
    call["guidance_scale"] = made_of["latents.guidance"] - 1
    (teacher,) = run.glob("evaluation/teacher@*/seed-0")
    compare(adapter.model_folder(options.model), teacher, prompts, options, **call)
    if recipe.sampler == "euler":  # else diffusers draws noise that has no key
        call = {"sigmas": list(recipe.times), "guidance_scale": 0}
        (student,) = run.glob("evaluation/student@*/seed-0")
        compare(place / "export", student, prompts, options, **call)
    measured = torch.cuda.max_memory_allocated() / 1e9
    show("stock ZImagePipeline", began, 4 * (plan.TEACHER + steps), measured)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines if "student_loss" in line)


def main(argv=None):
    parser = ladd.Parser("python -m zimage.rehearse", description=__doc__)
    add = parser.add_argument
    here = torch.cuda.device_count()
    add("--model", required=True, metavar="ID_OR_DIR", help="folder or hub name of the teacher")
    text = "GPUs, or processes where there is no CUDA (%(default)s)"
    add("--gpus", type=sample.positive, default=max(1, here), metavar="N", help=text)
    add("--out", type=Path, default="rehearsal.png", metavar="PNG", help="picture (%(default)s)")
    add("--clip-model", metavar="ID_OR_DIR", help="the CLIP model of --recipe zimage-clip")
    own, more = parser.parse_known_args(argv)
    _, options, recipe = ladd.parse(["--zimage", *more])
    vars(options).update(vars(own))
    check(options.out.suffix == ".png", f"--out {options.out}: give a .png file")
    ok = options.clip_model or recipe.text_vector == "qwen"
    check(ok, "--clip-model: name the CLIP model whose text vectors this recipe's heads read")
    options.device = options.device or ("cuda" if here else "cpu")
    options.dtype = options.dtype or ladd.default_dtype(torch.device(options.device))
    folder = adapter.model_folder(options.model) / "transformer"
    config = diffusers.ZImageTransformer2DModel.load_config(folder)
    with plan.fake_rank(recipe, options) as settings:
        planned = plan.trace(recipe, options, settings.micro_batch, config=config)
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=options.out.parent) as place:
        seconds = rehearse(Path(place).absolute(), options, recipe, more, planned)
    best = planned.flops * recipe.batch / options.gpus / 1e12 / plan.CARDS[options.gpu][0]
    reached = f": {100 * best / seconds:.0f} % reached" if here else ""
    share = plan.REACHED[1]
    at = f"planned {best / share:.2f} s at {100 * share:g} % of the peak"
    print(f"an iteration: {seconds:.2f} s, {at} of {options.gpus} x {options.gpu}{reached}")
    print(f"{options.out}: teacher as by the stock pipeline, student, untrained student\nready")


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
