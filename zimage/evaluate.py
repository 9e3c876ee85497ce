"""KID and CLIP score of a run's student against its teacher, over several seeds:

    python -m zimage.evaluate RUN                torchrun --nproc-per-node 8 -m zimage.evaluate RUN

Every row's images of a seed are judged against the teacher's images of *another* seed at the same
prompts: the next of --seeds, the first after the last (with one seed, that seed plus one). So the
teacher's own row is the floor. Judged against images of its own starting noise, a student would be
flattered for every image that it repeats. untrained@N is the mark to beat.

The images are kept as PNG under RUN/evaluation, in folders named by what made them. What was
stopped goes on. The ranks share the prompts, and the first one judges.
"""

import hashlib
import json
import statistics
import sys
from pathlib import Path

import torch
from cleanfid.fid import get_files_features, kernel_distance
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image

import ladd
from zimage import adapter, data, precompute, sample

INCEPTION = "inception-2015-12-05.pt"  # the file that clean-fid downloads


def parse_options(argv):
    parser = sample.parser_for("evaluate", __doc__)
    add = parser.add_argument
    text = "seeds of the noise, each judged on its own (default %(default)s)"
    add("--seeds", type=sample.numbers, default="0,1,2", metavar="N,N", help=text)
    text = f"folder of clean-fid's {INCEPTION}, which is downloaded there if it is not there"
    add("--features", type=Path, default=Path(torch.hub.get_dir()), metavar="DIR", help=text)
    add("--clip", metavar="ID_OR_DIR", help="a CLIP model: adds the CLIP score")
    add("--out", metavar="DIR", type=Path, help="folder of the images (default: RUN/evaluation)")
    sample.add_sampling_arguments(parser)
    return parser.parse_args(argv)


def image_folder(run, way, prompts, options):
    """Where a way's images lie: a name for all that decides them, so that others are never mixed
    in. Seeds have folders of their own in it; batch and ranks decide nothing."""
    student = way.weights == "student" and adapter.model_fingerprint(run.folder, ["student"])
    sampler = not way.guidance and [run.recipe.sampler, run.recipe.times]
    model = adapter.model_fingerprint(run.base, [*adapter.DECIDING, "vae", "scheduler"])
    made_by = model, student, sampler, way.guidance, prompts, options.resolution, options.dtype
    digest = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
    return options.out / f"{way.name}-{digest[:8]}"


def png(folder, seed, index):
    return folder / f"seed-{seed}" / f"{index:05d}.png"


def inception(folder, device):
    """clean-fid's Inception: images [B, 3, 299, 299] in 0 .. 255 -> features [B, 2048]."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return InceptionV3W(str(folder)).to(device).eval()
    except Exception as error:  # no network, a damaged file, ...
        why = f"clean-fid's Inception can't be loaded or downloaded ({type(error).__name__})"
        way_out = f"put {INCEPTION} there, or name the folder that holds it"
        raise ladd.UserError(f"--features {folder}: {why}; {way_out}") from error


def judge(wanted, folders, prompts, options, features, clip):
    """The rows of the report. wanted: {Way: seeds}, the teacher first."""
    teacher, rows = next(iter(wanted)), []
    others = [*wanted[teacher][1:], wanted[teacher][0]]
    settings = {"num_workers": 0, "batch_size": 32, "device": options.device, "verbose": False}
    paths, found = {}, {}  # of a way and a seed: the images, and their features
    for way, own_seeds in wanted.items():
        for seed in own_seeds:
            paths[way, seed] = [png(folders[way], seed, i) for i in range(len(prompts))]
            of_seed = get_files_features(paths[way, seed], features, **settings)
            found[way, seed] = of_seed.astype("float64")
    for way in wanted:
        row = {"name": way.name, "steps": way.steps, "nfe": way.nfe, "kid": [], "clip": []}
        for seed, other in zip(options.seeds, others, strict=False):
            own, real = found[way, seed], found[teacher, other]
            # One subset of all images: subsets would add noise, and no information.
            row["kid"].append(kernel_distance(own, real, 1, len(own)))
            if clip:
                shown = zip(map(Image.open, paths[way, seed]), prompts, strict=True)
                row["clip"].append(statistics.fmean(clip.score(*pair) for pair in shown))
        for name in ("kid", "clip"):
            values = row[name]
            row[f"{name}_mean"] = statistics.fmean(values) if values else None
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def markdown(rows, c):
    """The rows as a table, and the conditions c under which they were measured in words."""

    def shown(row, name, digits):
        mean, std = row[f"{name}_mean"], row[f"{name}_std"]
        spread = "" if std is None else f" +/- {std:.{digits}f}"
        return "-" if mean is None else f"{mean:.{digits}f}{spread}"

    lines = ["| | steps | NFE | KID | CLIP score |", "|---|---|---|---|---|"]
    for r in rows:
        figures = f"{shown(r, 'kid', 5)} | {shown(r, 'clip', 2)}"
        lines.append(f"| {r['name']} | {r['steps']} | {r['nfe']} | {figures} |")
    words = (
        f"After {c['iteration']} iterations. KID on clean-fid's Inception, {c['images']} images of "
        f"{c['resolution']} per seed, seeds {c['seeds']} (mean +/- standard deviation), against "
        "the teacher's images of another seed at the same prompts. Teacher: guidance "
        f"{c['guidance']:g} (the pipeline's guidance_scale {c['guidance'] - 1:g}). untrained: the "
        "base model sampled as the student is. CLIP score: 100 max(cos, 0)."
    )
    return "\n".join([*lines, "", words, ""])


def main(argv=None, features=None):
    """features: images [B, 3, 299, 299] in 0 .. 255 -> [B, D], in place of Inception."""
    options = parse_options(argv)
    state = precompute.start_ranks()
    run = sample.open_run(options.run, options.model)
    sample.fill_in(options, run)
    options.out = (options.out or run.folder / "evaluation").expanduser()
    prompts = data.read_prompts(options.prompts)
    ladd.check(len(prompts) >= 2, f"--prompts {options.prompts}: KID needs at least 2 prompts")
    seeds = options.seeds
    teacher, *others = sample.compared(options, untrained_steps=[max(options.steps)])
    wanted = {teacher: seeds if len(seeds) > 1 else [seeds[0], seeds[0] + 1]}
    wanted |= dict.fromkeys(others, seeds)
    if state.is_main_process:  # what can't be had is said before hours of sampling
        features = features or inception(options.features, options.device)
        clip = adapter.Clip(options.clip, options.device) if options.clip else None
    folders = {way: image_folder(run, way, prompts, options) for way in wanted}
    own = range(state.process_index, len(prompts), state.num_processes)
    missing = {
        way: [(s, i) for s in seeds for i in own if not png(folders[way], s, i).exists()]
        for way, seeds in wanted.items()
    }
    for way, key, image in sample.images(run, missing, prompts, options):
        with ladd.replacing(png(folders[way], *key)) as part:
            image.save(part, "PNG")
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    height, width = options.resolution
    conditions = {k: getattr(options, k) for k in ("seeds", "guidance", "dtype", "clip")}
    conditions |= {"iteration": run.recipe.iterations, "images": len(prompts)}
    conditions |= {"resolution": f"{width}x{height}", "prompts": str(options.prompts)}
    rows = judge(wanted, folders, prompts, options, features, clip)
    ladd.write_json(run.folder / "report.json", {"rows": rows, "conditions": conditions})
    (run.folder / "report.md").write_text(markdown(rows, conditions), encoding="utf-8")
    print(f"{markdown(rows, conditions)}\nsee {run.folder / 'report.md'} and {options.out}")


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
