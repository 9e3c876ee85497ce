"""Make the teacher's samples for training: prompts -> text features and latents, in shards that training reads.

    python -m zimage.precompute --model Tongyi-MAI/Z-Image --prompts zimage/prompts/train.txt --out data/try
    torchrun --nproc-per-node 8 -m zimage.precompute ...        the same data, made by 8 GPUs: each takes every 8th shard

Killed at any instant, the same command goes on where it was: whole shards stay, and what is made again comes out alike. First
ask --plan, which times a few samples on this machine and writes nothing.
"""

import hashlib
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import ladd
from ladd import UserError
from zimage import adapter, data
from zimage.sampling import at_least, clock, command

WAIT = 1800         # seconds that a rank waits for the first one's manifest, which loads the model before it


def parser():
    made = ladd.Parser(prog="python -m zimage.precompute", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = made.add_argument
    add("--model", required=True, metavar="ID_OR_DIR", help=f"the teacher: a ZImagePipeline's folder, or its name on the hub ({adapter.BASE})")
    add("--prompts", required=True, metavar="FILE", help=".txt (one per line), .jsonl (objects with \"prompt\") or .csv (a column \"prompt\")")
    add("--out", metavar="DIR", help="folder of the result; needed but for --plan")
    add("--resolution", default="512", metavar="SIZES", help="size in pixels, 512 (square) or 640x384 (width x height); several, with commas, are "
        "dealt to the prompts in turn (default %(default)s)")
    add("--steps", type=int, default=50, metavar="N", help="Euler steps of the teacher, on its scheduler's times (default %(default)s)")
    add("--guidance", type=float, default=5.0, metavar="W", help="w of neg + w (pos - neg); 1 is none, at half the cost; diffusers' guidance_scale "
        "is w - 1 (default %(default)s)")
    add("--seed", type=int, default=0, help="keys the noise of every sample (default %(default)s)")
    add("--batch", type=int, default=4, metavar="N", help="samples at once, at most (default %(default)s)")
    add("--shard-size", type=int, default=64, metavar="N", help="samples of a shard, which is what a kill can lose (default %(default)s)")
    add("--clip", metavar="ID_OR_DIR", help="store the pooled text vector of this CLIP model too")
    add("--device", help="cuda, mps (untested) or cpu (default: the first of these that is there)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="what the teacher computes in (default %(default)s)")
    add("--plan", action="store_true", help="time a few samples here, print hours and GB for all of them, and write nothing")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for
# ---------------------------------------------------------------------------------------------------------------------

def parse_sizes(text):
    """--resolution as [(height, width)] in pixels; UserError names a side that no latent fits."""
    sizes = []
    for word in text.split(","):
        sides = word.strip().lower().split("x")
        if len(sides) > 2 or not all(s.isascii() and s.isdecimal() and len(s) < 6 for s in sides):
            raise UserError(f"--resolution {text}: {word.strip()!r} is no size; give 512 or WIDTHxHEIGHT, with commas between several")
        width, height = int(sides[0]), int(sides[-1])
        for name, side in (("width", width), ("height", height)):
            if side < 16 or side % 16:
                near = max(16, round(side / 16) * 16)
                raise UserError(f"--resolution {text}: the {name} {side} of {word.strip()} is no multiple of 16; {near} is near")
        sizes.append((height, width))
    return sizes


def check_options(args):
    for name, low in (("steps", 1), ("batch", 1), ("shard_size", 1)):
        at_least(f"--{name.replace('_', '-')}", getattr(args, name), low)
    if not 0 <= args.guidance < math.inf:               # nan fails this too
        raise UserError(f"--guidance {args.guidance}: give a number from 0 up; 1 is none")
    if not args.out and not args.plan:
        raise UserError("--out: say where the data should go, or ask --plan")


def rank_and_ranks():
    """torchrun's RANK and WORLD_SIZE. The ranks need no more than that: they share no tensor, only the folder."""
    try:
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE: not whole numbers ({error}); leave setting them to torchrun") from error
    if not 0 <= rank < ranks:
        raise UserError(f"RANK {rank}, WORLD_SIZE {ranks}: the rank must be below the world's size; leave setting them to torchrun")
    return rank, ranks


def token_counts(tokenizer, prompts):
    """Tokens of each prompt with the chat template, as `ZImagePipeline` counts them: the length of its caption."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=True)
             for p in prompts]
    return [len(ids) for ids in tokenizer(texts).input_ids]


def transformer_config(folder):
    """(channels of a caption, the largest side in pixels) that the model's transformer takes."""
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text())
        return int(config["cap_feat_dim"]), 2 * adapter.PIXELS * min(config["axes_lens"][1:])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model {folder}: transformer/config.json can't be read ({type(error).__name__}); restore it") from error


class Clip:
    """A CLIP text encoder: `clip(prompts)` -> pooled, projected vectors [n, D] float32 on the CPU. Long prompts are cut at its 77 tokens."""

    def __init__(self, model, device):
        from transformers import AutoTokenizer, CLIPTextModelWithProjection
        try:
            self.net, info = CLIPTextModelWithProjection.from_pretrained(model, output_loading_info=True)
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except Exception as error:      # by what is missing or damaged
            raise UserError(f"--clip {model}: no CLIP text encoder with tokenizer can be loaded there ({type(error).__name__}); name the folder "
                            f"of a CLIPModel or CLIPTextModelWithProjection") from error
        if info["missing_keys"]:
            raise UserError(f"--clip {model}: not a CLIP text encoder with its projection (no {sorted(info['missing_keys'])[0]}); name the "
                            f"folder of a CLIPModel or CLIPTextModelWithProjection")
        self.net = self.net.float().eval().requires_grad_(False)
        self.dim, digest = self.net.config.projection_dim, hashlib.sha256()
        for p in self.net.parameters():
            digest.update(p.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        self.net.to(device)

    def __call__(self, prompts):
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.net.config.max_position_embeddings, return_tensors="pt")
        return self.net(**{k: tokens[k].to(self.net.device) for k in ("input_ids", "attention_mask")}).text_embeds.float().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Making samples
# ---------------------------------------------------------------------------------------------------------------------

def alike(lengths, batch):
    """Batches of at most `batch` of the samples 0 .. n-1, each of one padded caption length: those need no attention mask."""
    padded = [adapter.padded_length(range(n)) for n in lengths]
    order = sorted(range(len(lengths)), key=lambda k: padded[k])
    for _, group in itertools.groupby(order, key=lambda k: padded[k]):
        group = list(group)
        yield from (group[i:i + batch] for i in range(0, len(group), batch))


class Teacher:
    """The guided teacher with its text encoders."""

    def __init__(self, pipe, clip, times, guidance, batch, device):
        self.pipe, self.clip, self.times, self.batch, self.device = pipe, clip, times, batch, device
        nothing = adapter.encode(pipe, [""])[0]         # the pipeline's own negative prompt
        null = lambda cond: adapter.Prompts([nothing] * len(cond), torch.zeros(len(cond), 0))
        self.velocity = ladd.guided(adapter.ZImageVelocity(pipe.transformer), null, guidance)

    @torch.no_grad()
    def encode(self, prompts):
        """The captions [L, C] of a list of prompts, as the encoder gives them, and the vectors {name: [n, D] float32}."""
        parts = [prompts[i:i + self.batch] for i in range(0, len(prompts), self.batch)]
        captions = [c for part in parts for c in adapter.encode(self.pipe, part)]
        vectors = {"vector.qwen": torch.stack([c.float().mean(0) for c in captions]).cpu()}
        if self.clip:
            vectors["vector.clip"] = torch.cat([self.clip(part) for part in parts])
        return captions, vectors

    @torch.no_grad()
    def sample(self, captions, noise, times=None):
        """Captions and noise [n, 16, h, w] -> latents [n, 16, h, w] float32, on the CPU."""
        cond = adapter.Prompts(captions, torch.zeros(len(captions), 0))
        return ladd.sample_euler(self.velocity, noise.to(self.device), times or self.times, cond).cpu()

    def shard(self, shard, prompts, seed, progress):
        """(tensors, caption lengths) of a planned shard, whose prompts are given."""
        h, w = shard["height"] // adapter.PIXELS, shard["width"] // adapter.PIXELS
        captions, tensors = self.encode(prompts)
        lengths = [len(c) for c in captions]
        for rows in alike(lengths, self.batch):
            noise = torch.stack([adapter.noise_for(seed, shard["indices"][k], h, w) for k in rows])
            for k, x0 in zip(rows, self.sample([captions[k] for k in rows], noise)):
                if not torch.isfinite(x0.half()).all():
                    raise UserError(f"sample {shard['indices'][k]}: the teacher's latent is not finite in float16 (largest value "
                                    f"{float(x0.abs().max()):.3g}); try --dtype float32, or a smaller --guidance")
                tensors[f"latent.{k}"], tensors[f"caption.{k}"] = x0.half(), captions[k].to(torch.bfloat16)
            progress.update(len(rows))
        return tensors, lengths


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------

def check_out(out, made_of):
    """May this data go there? Into a new or an empty folder, or on with what the same settings began. Writes nothing.

    Returns made_of: as the manifest has it, where there is one.
    """
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: can't be written ({place} is {'not writable' if place.is_dir() else 'no folder'}); name another folder")
    names = os.listdir(out) if out.exists() else []
    if "manifest.json" in names:
        return check_same(out, made_of)
    if set(names) - {"manifest.json.part"}:
        raise UserError(f"--out {out}: holds something else ({sorted(names)[0]}, and no manifest.json); name a new folder")
    return made_of


def check_same(out, made_of):
    """made_of as the folder's manifest has it; UserError where that differs. The model may have moved: its fingerprint counts."""
    old = data.read_manifest(out)["made_of"]
    if old.get("fingerprint") == made_of["fingerprint"]:
        made_of = {**made_of, "model": old.get("model")}
    if other := ladd.unlike(old, made_of):
        raise UserError(f"--out {out}: holds data made otherwise: {'; '.join(other)}; name a new folder, or give the old settings")
    return made_of


def write_manifest(out, manifest, rank):
    """The first rank writes it, the others wait for it: no shard lies in a folder that does not say what it is."""
    path = out / "manifest.json"
    if rank == 0 and not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        ladd.write_json(path, manifest)
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > WAIT:
            raise UserError(f"--out {out}: rank {rank} waited {WAIT} s for the first rank's manifest.json in vain; see what rank 0 said")
        time.sleep(0.2)
    return check_same(out, manifest["made_of"])


def gigabytes(shards, tokens, caption_dim, vector_dims):
    """What the shards take on disk, in GB of 1e9 bytes: float16 latents, bfloat16 captions, float32 vectors."""
    latent = {s["name"]: adapter.CHANNELS * s["height"] * s["width"] / adapter.PIXELS ** 2 for s in shards}
    return sum(2 * latent[s["name"]] + 2 * tokens[i] * caption_dim + 4 * sum(vector_dims) for s in shards for i in s["indices"]) / 1e9


def seconds_per_sample(teacher, shards, prompts, tokens, seed):
    """Seconds that a sample of each size takes here, by a batch of middling captions and a few of the equal steps: {(height, width): s}."""
    middling = sorted(range(len(tokens)), key=tokens.__getitem__)[len(tokens) // 2]
    n = min(teacher.batch, statistics.mode(len(s["indices"]) for s in shards))
    chosen, few, seconds = [prompts[middling]] * n, teacher.times[:4], {}

    teacher.encode(chosen)                              # warm up: the first call of anything is slow
    began = clock(teacher.device)
    captions, _ = teacher.encode(chosen)
    encoding = clock(teacher.device) - began
    for height, width in dict.fromkeys((s["height"], s["width"]) for s in shards):
        noise = torch.stack([adapter.noise_for(seed, k, height // adapter.PIXELS, width // adapter.PIXELS) for k in range(n)])
        teacher.sample(captions, noise, few[:1])
        began = clock(teacher.device)
        teacher.sample(captions, noise, few)
        seconds[height, width] = (encoding + (clock(teacher.device) - began) * len(teacher.times) / len(few)) / n
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

def run_command(argv):
    args = parser().parse_args(argv)
    check_options(args)
    sizes, (rank, ranks) = parse_sizes(args.resolution), rank_and_ranks()
    numbered = data.numbered_prompts(args.prompts)
    if len(numbered) < ranks:
        raise UserError(f"--prompts {args.prompts}: {len(numbered)} prompts for {ranks} ranks; give at least one for each, or start fewer")
    device, folder = ladd.pick_device(args.device), adapter.model_folder(args.model)
    caption_dim, largest = transformer_config(folder)
    for height, width in sizes:
        if max(height, width) > largest:
            raise UserError(f"--resolution {width}x{height}: this model takes sides of at most {largest} pixels")

    dtype, prompts, shift = getattr(torch, args.dtype), [prompt for _, prompt in numbered], adapter.scheduler_shift(folder, args.steps)
    tokenizer = adapter.load_pipeline(folder, dtype, "cpu", transformer=None, text_encoder=None, vae=None, scheduler=None).tokenizer
    tokens = token_counts(tokenizer, prompts)
    for (line, _), n in zip(numbered, tokens):
        if n > adapter.MAX_TOKENS:
            raise UserError(f"--prompts {args.prompts}, line {line}: {n} tokens with the chat template, but the model reads "
                            f"{adapter.MAX_TOKENS}; shorten it")
    clip = Clip(args.clip, device) if args.clip else None
    made_of = {"model": args.model, "fingerprint": adapter.model_fingerprint(folder), "steps": args.steps, "guidance": args.guidance,
               "seed": args.seed, "shift": shift, "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(), "count": len(prompts),
               "resolution": [f"{width}x{height}" for height, width in sizes], "shard_size": args.shard_size, "dtype": args.dtype,
               "vectors": ["qwen"] + ["clip"] * bool(clip), "clip": clip and clip.fingerprint}
    shards = data.plan_shards(len(prompts), sizes, args.shard_size)
    size = gigabytes(shards, tokens, caption_dim, [caption_dim, clip.dim if clip else 0])
    if rank == 0:
        say_what_it_costs(folder, made_of, shards, ranks, size, device)
    load = lambda: Teacher(adapter.load_pipeline(folder, dtype, device, vae=None), clip, adapter.teacher_times(args.steps, shift),
                           args.guidance, args.batch, device)
    if args.plan:
        if rank == 0:                                   # the others' GPUs are alike
            seconds = seconds_per_sample(load(), shards, prompts, tokens, args.seed)
            slowest = max(sum(len(s["indices"]) * seconds[s["height"], s["width"]] for s in shards[r::ranks]) for r in range(ranks))
            each = ", ".join(f"{w}x{h} {s:.3g} s" for (h, w), s in seconds.items())
            print(f"plan: {each} a sample here; all of it {slowest / 3600:.3g} hours on {ranks} like this, and {size:.3g} GB; nothing was written")
        return
    manifest = {"schema": ladd.SCHEMA, "kind": data.KIND, "command": "python -m zimage.precompute " + shlex.join(argv), "made_of": made_of,
                "shards": shards}
    make(Path(args.out), manifest, prompts, load, rank, ranks)


def say_what_it_costs(folder, made_of, shards, ranks, size, device):
    count, passes = made_of["count"], made_of["count"] * made_of["steps"] * (1 if made_of["guidance"] == 1 else 2)
    if warning := adapter.turbo_warning(made_of["model"], folder):
        print(warning)
    print(f"{count:,} samples of {', '.join(dict.fromkeys(made_of['resolution']))} in {len(shards):,} shards: {passes:,} passes of the teacher "
          f"by a sample, {size:.3g} GB on disk; {ranks} rank{'s' * (ranks > 1)} on {device.type}")
    if len(shards) < ranks:
        print(f"NOTE: {ranks - len(shards)} ranks have nothing to do; a --shard-size of {max(1, count // ranks)} would use all")


def make(out, manifest, prompts, load, rank, ranks):
    """This rank's shards, as far as they are not there yet. The model is loaded before anything is written, and only if needed."""
    made_of, mine = manifest["made_of"], manifest["shards"][rank::ranks]
    if rank == 0 or (out / "manifest.json").exists():
        made_of = check_out(out, made_of)
    todo = [shard for shard in mine if not data.whole(out, shard, made_of)]
    if todo:
        teacher = load()
        try:
            made_of = write_manifest(out, manifest, rank)
        except OSError as error:
            raise UserError(f"--out {out}: can't be written ({error.strerror}); name another folder") from error
        make_shards(teacher, out, todo, sum(len(s["indices"]) for s in mine), prompts, made_of, rank)
    if rank == 0:
        print(f"{out}: all {len(mine)} shards of {'this rank' if ranks > 1 else 'it'} are there")


def make_shards(teacher, out, todo, total, prompts, made_of, rank):
    from safetensors import SafetensorError
    left = sum(len(s["indices"]) for s in todo)
    with tqdm(total=total, initial=total - left, desc="samples", disable=rank != 0, mininterval=2) as progress:
        for shard in todo:
            tensors, lengths = teacher.shard(shard, [prompts[i] for i in shard["indices"]], made_of["seed"], progress)
            path = out / shard["name"]
            about = {"kind": data.SHARD_KIND, "made_of": made_of, **shard, "lengths": lengths, "count": len(lengths)}
            try:
                ladd.save_weights(path, tensors, about)
            except (OSError, SafetensorError) as error:
                path.with_name(path.name + ".part").unlink(missing_ok=True)
                raise UserError(f"{path}: can't be written ({str(error).splitlines()[0]}); make room and run the same command again: it "
                                f"goes on") from error


def main(argv=None):
    """The command line; returns the exit code. Bad input is one line on stderr and 2."""
    return command("precompute", run_command, argv)


if __name__ == "__main__":
    sys.exit(main())
