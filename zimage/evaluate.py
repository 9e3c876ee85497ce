"""KID, FID and CLIP score of a run's student against its teacher, over several seeds:

    python -m zimage.evaluate RUN                                       torchrun --nproc-per-node 8 -m zimage.evaluate RUN

Every row's images of a seed are judged against the teacher's images of *another* seed, at the same prompts: the next of --seeds,
the first after the last (with one seed, that seed plus one). So the teacher's own row is the floor: a student as good as the
teacher scores what the teacher scores, whereas one judged against the images of its own starting noise would be flattered for
every image that it repeats. untrained@N, the base model run as the student is, is the mark to beat.

The images are kept as PNG under RUN/evaluation, with a manifest that says what made them. A run that was stopped goes on; images
of other settings are never mixed in. Under torchrun the prompts are split over the processes, and the first one judges.
"""

import hashlib
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ladd
from ladd import UserError
from toy_mnist.judge import frechet, kernel         # clean-fid's functions, its subsets seeded
from zimage import adapter
from zimage.data import read_prompts
from zimage.precompute import rank_and_ranks
from zimage.sampling import (DTYPES, PROMPTS, add_sampling_arguments, check_sampling, command, compared, images, integers, open_run,
                             parser_for, read_json, student_digest, to_bytes)

INCEPTION = "inception-2015-12-05.pt"   # the file that clean-fid downloads
UNBIASED = 2048                         # images under which FID has too large a bias to be read


# ---------------------------------------------------------------------------------------------------------------------
# The images, cached
# ---------------------------------------------------------------------------------------------------------------------

def png(out, way, seed, index):
    return out / way.name / f"seed-{seed}" / f"{index:05d}.png"


def manifest(run, way, options, prompts):
    """What decides the images of a way: {field: value}. Seeds are folders of their own; batch and processes decide nothing."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return {"model": adapter.model_fingerprint(run.base), "vae": adapter.model_fingerprint(run.base, ["vae"]),
            "student": options.student if way.weights == "student" else None, "prompts": f"{len(prompts)}, sha256 {digest}",
            "resolution": options.resolution, "times": list(way.times), "sampler": way.sampler, "guidance": way.guidance, "dtype": options.dtype}


def claim(out, manifests):
    """Write every way's manifest; UserError, before any is written, where images of other settings lie."""
    rank, _ = rank_and_ranks()
    for name, made_by in manifests.items():
        path = out / name / "manifest.json"
        if path.exists():
            other = ladd.unlike(read_json(path, f"remove {out / name}"), made_by)
            if other:
                raise UserError(f"{out / name}: its images were made with other settings: {'; '.join(other)}; "
                                f"remove it, or give another --out")
        elif (out / name).is_dir() and any((out / name).rglob("*.png")):
            raise UserError(f"{out / name}: holds images but no manifest.json; remove it, or give another --out")
    for name, made_by in manifests.items():
        path = out / name / "manifest.json"
        part = path.with_name(f"manifest-{rank}.part")      # every process writes the same
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(made_by, indent=1) + "\n")
            os.replace(part, path)
        except OSError as error:
            raise UserError(f"--out {out}: can't be written ({error.strerror}); name another folder") from error


def make_images(run, wanted, prompts, out, options):
    """Make the PNGs that are not there yet: this process's share. wanted: [(Way, seeds)]"""
    rank, world = rank_and_ranks()
    mine = range(rank, len(prompts), world)
    jobs = [(way, [(seed, i) for seed in seeds for i in mine if not png(out, way, seed, i).exists()]) for way, seeds in wanted]
    for way, keys, made, seconds in images(run, jobs, prompts, options.resolution, options.batch, options.device,
                                           DTYPES[options.dtype], show=rank == 0):
        for (seed, index), image in zip(keys, to_bytes(made)):
            path = png(out, way, seed, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            Image.fromarray(image).save(part, "PNG")
            os.replace(part, path)
        note_speed(out / way.name / f"speed-{rank}.json", len(keys), seconds, options)


def note_speed(path, count, seconds, options):
    """Add to what is known of a way's speed; begin anew where it was measured otherwise."""
    how = {"batch": options.batch, "device": device_name(options.device)}
    known = read_json(path, "remove it") if path.exists() else {}
    if {k: known.get(k) for k in how} != how:
        known = {"images": 0, "seconds": 0.0}
    ladd.write_json(path, {**how, "images": known["images"] + count, "seconds": known["seconds"] + seconds})


def ms_per_image(folder):
    """Milliseconds of one process per image: the sampler alone, without text encoder and decoder. None if never timed."""
    known = [read_json(path, "remove it") for path in sorted(folder.glob("speed-*.json"))]
    count = sum(k["images"] for k in known)
    return 1000 * sum(k["seconds"] for k in known) / count if count else None


def device_name(device):
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)


def wait_for(paths):
    """Until the other processes have made their images; torchrun ends this one where one of them fails."""
    if missing := sum(not path.exists() for path in paths):
        print(f"waiting for {missing} images of the other processes")
    while not all(path.exists() for path in paths):
        time.sleep(1)


def read_images(paths):
    """PNGs as uint8 [B, H, W, 3]. UserError names one that can't be read."""
    def one(path):
        try:
            return np.asarray(Image.open(path).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path}: can't be read as an image ({type(error).__name__}); remove it, and it is made again") from error
    return np.stack([one(path) for path in paths])


# ---------------------------------------------------------------------------------------------------------------------
# The judges
# ---------------------------------------------------------------------------------------------------------------------

def inception(where, device):
    """clean-fid's Inception: images [B, 3, H, W] in [0, 1] -> features [B, 2048].

    where: "inception", to have its file downloaded, or the folder that holds it. UserError where it can't be had.
    """
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer
    folder = Path(torch.hub.get_dir()) / "clean-fid" if where == "inception" else Path(where)
    if where != "inception" and not (folder / INCEPTION).is_file():
        raise UserError(f"--features {where}: holds no {INCEPTION}; give the folder that does, or 'inception' to have it downloaded")
    try:
        if where == "inception":
            folder.mkdir(parents=True, exist_ok=True)
        net = InceptionV3W(str(folder), download=where == "inception").to(device).eval()
    except Exception as error:          # no network, no permission, a damaged file, ...
        raise UserError(f"--features {where}: clean-fid's Inception weights can't be loaded or downloaded ({type(error).__name__}); "
                        f"put {INCEPTION} into a folder and give that") from error
    resize = build_resizer("clean")

    @torch.no_grad()
    def features(x):
        batch = torch.stack([torch.from_numpy(resize(picture)).permute(2, 0, 1) for picture in to_bytes(x)])
        return net(batch.to(device)).float().cpu()
    return features


def all_features(features, paths, batch=32):
    """The features of PNGs: [N, D], numpy."""
    show = lambda some: torch.from_numpy(read_images(some)).permute(0, 3, 1, 2) / 255
    parts = [features(show(paths[k:k + batch])) for k in range(0, len(paths), batch)]
    return torch.cat(parts).detach().float().cpu().numpy()


def clip_scorer(where, device):
    """CLIP score: (PNGs, their prompts) -> 100 max(cos, 0) of each, [N] numpy. Prompts are cut at CLIP's 77 tokens."""
    from transformers import CLIPModel, CLIPProcessor
    try:
        model, processor = CLIPModel.from_pretrained(where).to(device).eval(), CLIPProcessor.from_pretrained(where)
    except Exception as error:          # no such name or folder, no network, a damaged file, ...
        raise UserError(f"--clip {where}: can't be loaded ({str(error).strip().splitlines()[0][:120]}); "
                        f"give a CLIP model's folder or hub name, or leave it out") from error

    @torch.no_grad()
    def score(paths, prompts, batch=32):
        scores = []
        for k in range(0, len(paths), batch):
            inputs = processor(text=list(prompts[k:k + batch]), images=list(read_images(paths[k:k + batch])), return_tensors="pt",
                               padding=True, truncation=True).to(device)
            out = model(**inputs)
            cosine = torch.nn.functional.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
            scores.append(100 * cosine.clamp(min=0).cpu())
        return torch.cat(scores).numpy()
    return score


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------

def against(seeds):
    """[(seed, the seed of the teacher's images that it is judged against)]"""
    return list(zip(seeds, seeds[1:] + seeds[:1])) if len(seeds) > 1 else [(seeds[0], seeds[0] + 1)]


def fid(a, b):
    """Frechet distance of features [N, D], [M, D]; None where clean-fid's matrix root fails, as it can on very few images."""
    try:
        value = frechet(a, b)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def judge(wanted, seeds, prompts, out, features, clip):
    """The rows of the report. wanted: [(Way, seeds)], the teacher first."""
    teacher, rows = wanted[0][0], []
    paths = lambda way, seed: [png(out, way, seed, i) for i in range(len(prompts))]
    reference = {seed: all_features(features, paths(teacher, seed)) for seed in wanted[0][1]}
    for way, _ in wanted:
        figures = {"kid": [], "fid": [], "clip": []}
        for seed, other in against(seeds):
            f = reference[seed] if way is teacher else all_features(features, paths(way, seed))
            figures["kid"].append(kernel(f, reference[other], subsets=100, seed=seed))
            figures["fid"].append(fid(f, reference[other]))
            if clip:
                figures["clip"].append(float(clip(paths(way, seed), prompts).mean()))
        row = {"name": way.name, "steps": len(way.times), "nfe": way.nfe}
        for name, values in figures.items():
            known = bool(values) and None not in values
            row[f"{name}_mean"] = statistics.fmean(values) if known else None
            row[f"{name}_std"] = statistics.stdev(values) if known and len(values) > 1 else None
        rows.append({**row, "ms_per_image": ms_per_image(out / way.name), "per_seed": {k: v for k, v in figures.items() if v}})
    return rows


def markdown_table(rows):
    """The rows as a Markdown table; the teacher's KID and FID are the floor."""
    def number(value, digits):
        return "-" if value is None else f"{value:.{digits}f}"

    def spread(row, name, digits):
        mean, std = row[f"{name}_mean"], row[f"{name}_std"]
        return number(mean, digits) + ("" if std is None else f" ± {number(std, digits)}")
    head = "| | steps | NFE | KID | FID | CLIP score | ms/image |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(f"| {r['name']} | {r['steps']} | {r['nfe']} | {spread(r, 'kid', 5)} | {spread(r, 'fid', 2)} | "
                          f"{spread(r, 'clip', 2)} | {number(r['ms_per_image'], 1)} |\n" for r in rows)


def describe(c):
    """The conditions of a report in words: one paragraph."""
    n, side, seeds = c["images_per_seed"], c["resolution"], ", ".join(map(str, c["seeds"]))
    text = [f"KID and FID on features of {c['features']}, {n} images of {side} x {side} per seed, seeds {seeds}"
            f"{' (mean ± standard deviation over them)' if len(c['seeds']) > 1 else ''}, each against the teacher's images of "
            f"another seed at the same prompts: the teacher's own row is the floor.",
            f"Teacher: guidance {c['guidance']:g} (the pipeline's guidance_scale {c['guidance'] - 1:g}).",
            "untrained: the base model run in the student's steps without guidance, the mark to beat."]
    if n < UNBIASED:
        text.append(f"With {n} images, fewer than {UNBIASED:,}, FID is biased: KID is the one to read.")
    if len(c["seeds"]) == 2:
        text.append("The floor's two figures are of the same two sets of images.")
    if c["clip"]:
        text.append(f"CLIP score by {c['clip']}, 100 max(cos, 0), prompts cut at 77 tokens.")
    text.append(f"ms/image: of the sampler alone, on {c['device']} in {c['dtype']}, batches of at most {c['batch']}.")
    return " ".join(text)


def write_report(run, rows, conditions):
    table, words = markdown_table(rows), describe(conditions)
    ladd.write_json(run.folder / "report.json", {"rows": rows, "conditions": conditions})
    title = f"# {run.folder.resolve().name}, iteration {conditions['iteration']}"
    (run.folder / "report.md").write_text(f"{title}\n\n{table}\n{words}\n", encoding="utf-8")
    print(f"\n{table}\n{words}\nsee {run.folder / 'report.md'}; the images are in {conditions['images']}")


def run_command(argv, features=None):
    parser = parser_for("evaluate", __doc__)
    parser.add_argument("--prompts", default=str(PROMPTS), metavar="FILE",
                        help="a .txt with one prompt a line, .jsonl or .csv (default: the held-out prompts)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the noise, each judged on its own (default %(default)s)")
    parser.add_argument("--features", default="inception", metavar="inception|DIR",
                        help=f"clean-fid's Inception, downloaded, or the folder that holds its {INCEPTION} (default %(default)s)")
    parser.add_argument("--clip", metavar="ID_OR_DIR", help="a CLIP model, like openai/clip-vit-large-patch14: adds the CLIP score")
    parser.add_argument("--out", metavar="DIR", help="folder of the images (default: RUN/evaluation)")
    add_sampling_arguments(parser)
    options = parser.parse_args(argv)
    run = open_run(options.run, options.model)
    check_sampling(options, run)
    seeds, prompts = integers("--seeds", options.seeds, 0), read_prompts(options.prompts)
    if len(prompts) < 2:
        raise UserError(f"--prompts {options.prompts}: holds one prompt; distances between sets of images need at least 2")

    rank, _ = rank_and_ranks()
    given, options.student = features is not None, student_digest(run)
    if rank == 0:                       # what can't be had is said before hours of sampling
        features = features or inception(options.features, options.device)
        clip = clip_scorer(options.clip, options.device) if options.clip else None
    out = Path(options.out or run.folder / "evaluation")
    teacher, *others = compared(run, options.steps, options.teacher_steps, options.guidance, [max(options.steps)])
    wanted = [(teacher, sorted({*seeds, *(other for _, other in against(seeds))})), *((way, seeds) for way in others)]
    claim(out, {way.name: manifest(run, way, options, prompts) for way, _ in wanted})
    make_images(run, wanted, prompts, out, options)
    if rank:
        return
    wait_for([png(out, way, seed, i) for way, seeds_of in wanted for seed in seeds_of for i in range(len(prompts))])
    rows = judge(wanted, seeds, prompts, out, features, clip)
    write_report(run, rows, {
        "iteration": run.about.get("iteration"), "student": options.student, "model": run.model, "prompts": str(options.prompts),
        "images_per_seed": len(prompts), "seeds": seeds, "resolution": options.resolution, "teacher_steps": options.teacher_steps,
        "guidance": options.guidance, "sampler": run.sampler, "dtype": options.dtype, "batch": options.batch,
        "device": device_name(options.device), "features": "a network given by the caller" if given else "clean-fid's Inception",
        "clip": options.clip, "images": str(out), **ladd.versions()})


def main(argv=None, features=None):
    """The command line; returns the exit code. Bad input is one line on stderr and 2.

    features: function of images [B, 3, H, W] in [0, 1] -> [B, D], in place of --features.
    """
    return command("evaluate", lambda argv: run_command(argv, features), argv)


if __name__ == "__main__":
    sys.exit(main())
