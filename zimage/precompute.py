"""Make the teacher's samples for training: prompts -> text features and latents, in shards.

    python -m zimage.precompute --model Tongyi-MAI/Z-Image --prompts train.txt --out data
    torchrun --nproc-per-node 8 -m zimage.precompute ...    each GPU an eighth of the shards

After a kill the same command goes on where it was: whole shards stay, and what is made again comes
out alike. `python ladd.py --zimage --plan` says beforehand what it will cost.
"""

import datetime
import hashlib
import json
import shlex
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import ZImageTransformer2DModel

import ladd
from zimage import adapter, data
from zimage.sample import positive


def parse_options(argv):
    made = ladd.Parser("python -m zimage.precompute", description=__doc__)
    add = made.add_argument
    add("--model", required=True, metavar="ID_OR_DIR", help="folder or hub name of the teacher")
    add("--prompts", required=True, metavar="FILE", help=f"one of {', '.join(data.ENDINGS)}")
    add("--out", required=True, metavar="DIR", type=Path, help="folder of the result")
    text = "pixels: 512, or 640x384 (width x height); several, with commas, take turns (512)"
    add("--resolution", type=adapter.parse_sizes, default="512", metavar="SIZES", help=text)
    add("--steps", type=positive, default=50, help="steps of the teacher (%(default)s)")
    text = "w of neg + w (pos - neg): 1 for none; diffusers' guidance_scale + 1 (%(default)s)"
    add("--guidance", type=float, default=5.0, metavar="W", help=text)
    add("--seed", type=int, default=0, help="keys the noise of every sample (%(default)s)")
    add("--batch", type=positive, default=4, help="samples at once, at most (%(default)s)")
    add("--shard-size", type=positive, default=64, help="what a kill loses per GPU (%(default)s)")
    add("--clip", metavar="ID_OR_DIR", help="store the text vector of this CLIP model too")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="(%(default)s)")
    options = made.parse_args(argv)
    ok = 1 <= options.guidance < float("inf")
    ladd.check(ok, f"--guidance {options.guidance}: give a number from 1 (no guidance)")
    return options


def start_ranks():
    """torchrun's ranks. They share a folder and wait for each other; no tensor is exchanged."""
    return PartialState(cpu=True, timeout=datetime.timedelta(days=7))


def make_shard(pipe, clip, shard, prompts, options):
    """The tensors of a planned shard, whose prompts are given."""
    # The empty prompt is the pipeline's own negative one.
    null, *captions = adapter.encode(pipe, ["", *prompts], options.batch)
    tensors = {"vector.qwen": torch.stack([c.float().mean(0) for c in captions]).cpu()}
    if clip:
        tensors["vector.clip"] = clip.vectors(prompts)
    h, w = shard["height"] // adapter.PIXELS, shard["width"] // adapter.PIXELS
    for rows in adapter.batches(shard["lengths"], options.batch):
        some, indices = [captions[k] for k in rows], [shard["indices"][k] for k in rows]
        noise = torch.stack([adapter.noise_for(("data", options.seed), i, h, w) for i in indices])
        settings = null, noise, options.steps, options.guidance
        latents = adapter.sample_teacher(pipe, some, *settings).half().cpu()
        message = f"samples {indices}: a latent is not finite in float16"
        ladd.check(latents.isfinite().all(), f"{message}; try --dtype float32 or less --guidance")
        for k, x0 in zip(rows, latents, strict=True):
            tensors[f"latent.{k}"] = x0
            tensors[f"caption.{k}"] = captions[k].to("cpu", torch.bfloat16)
    return tensors


def make_manifest(options, argv, folder, clip):
    """What the data is made of and the plan of its shards, as a dict; and the prompts."""
    prompts = data.read_prompts(options.prompts)
    pipe = adapter.load_pipeline(folder, None, "cpu", transformer=None, text_encoder=None, vae=None)
    # The chat template of `ZImagePipeline`, to count as it does.
    template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = pipe.tokenizer.apply_chat_template(turns, **template)
    lengths = [len(ids) for ids in pipe.tokenizer(texts).input_ids]
    for prompt, n in zip(prompts, lengths, strict=True):
        why = f"{n} tokens with the chat template, but the model reads {adapter.MAX_TOKENS}"
        ladd.check(n <= adapter.MAX_TOKENS, f"--prompts: {prompt[:40]!r} ...: {why}; shorten it")
    config = ZImageTransformer2DModel.load_config(folder, subfolder="transformer")
    settings = ("steps", "guidance", "seed", "shard_size", "dtype", "clip")
    made_of = {
        "fingerprint": adapter.model_fingerprint(folder),
        "shift": pipe.scheduler.config.shift,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "count": len(prompts),
        "resolution": [f"{width}x{height}" for height, width in options.resolution],
        "vectors": {"qwen": config["cap_feat_dim"], **({"clip": clip.dim} if clip else {})},
        **{name: getattr(options, name) for name in settings},
    }
    manifest = {
        "kind": data.KIND,
        "command": "python -m zimage.precompute " + shlex.join(argv),
        "model": str(folder.resolve()) if Path(options.model).is_dir() else options.model,
        "made_of": made_of,
        "shards": data.plan_shards(lengths, options.resolution, options.shard_size),
    }
    return manifest, prompts


def main(argv):
    options = parse_options(argv)
    state = start_ranks()
    ranks = state.num_processes
    device = ladd.pick_device(options.device)
    folder = adapter.model_folder(options.model)
    clip = adapter.Clip(options.clip, device) if options.clip else None
    manifest, prompts = make_manifest(options, argv, folder, clip)
    made_of, shards = manifest["made_of"], manifest["shards"]
    part = f"{len(shards) / ranks:.3g} of {len(shards):,} shards by each of {ranks} ranks"
    ladd.print0(f"{len(prompts):,} samples, {part}")
    out = options.out.expanduser()
    if (out / "manifest.json").exists():  # of these settings; the model may have moved
        changed = ladd.diff(made_of, data.read_manifest(out)["made_of"])
        words = "; ".join(f"{k} = {new} (was {old})" for k, (old, new) in changed.items())
        way_out = "name a new folder, or give the old settings"
        ladd.check(not changed, f"--out {out}: holds data made otherwise: {words}; {way_out}")
    own = shards[state.process_index :: ranks]
    todo = [shard for shard in own if not data.is_whole(out, shard, made_of)]
    if todo:  # the model is loaded before anything is written, and only where it is needed
        pipe = adapter.load_pipeline(folder, getattr(torch, options.dtype), device, vae=None)
    if state.is_main_process and not (out / "manifest.json").exists():
        ladd.write_json(out / "manifest.json", manifest)
    state.wait_for_everyone()
    for shard in adapter.progress(todo, "shards"):
        tensors = make_shard(pipe, clip, shard, [prompts[i] for i in shard["indices"]], options)
        about = {"kind": data.SHARD_KIND, "made_of": made_of, **shard}
        ladd.save_weights(out / shard["name"], tensors, about)
    state.wait_for_everyone()
    for half in out.glob(".*.part") if state.is_main_process else ():  # a killed process left it
        half.unlink()
    ladd.print0(f"{out}: all {len(shards)} shards are there")


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
