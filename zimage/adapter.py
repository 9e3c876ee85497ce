"""Z-Image as ladd sees it: the one place where diffusers' conventions become ladd's (see ladd.py).

    v = -transformer(x_t, 1 - t)       diffusers' Z-Image is told 1 - sigma and returns x0 - eps;
                                       its sigma is our t
    guidance w = guidance_scale + 1    `ZImagePipeline` computes pos + scale (pos - neg), 0 for none

The tests compare with `ZImagePipeline` itself. A `model` is a folder that its `save_pretrained`
wrote, or a name on the Hugging Face hub. Weights are read by `from_pretrained` alone.
"""

import hashlib
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor
from einops import rearrange
from huggingface_hub import snapshot_download
from torch import nn
from tqdm import tqdm

import ladd
from ladd import UserError, check

BASE = "Tongyi-MAI/Z-Image"
CHANNELS = 16  # of a latent
PIXELS = 8  # of the image per latent pixel, each way
MAX_TOKENS = 512  # of a prompt, as the pipeline's default
DECIDING = ("transformer", "text_encoder", "tokenizer")  # what decides a model's latents


class Prompts:
    """A batch of conditions: captions, a list of text features [L_i, C] with L_i >= 1, and vector
    [B, D], what the heads are conditioned on. A slice or a LongTensor takes some of its rows."""

    def __init__(self, captions, vector):
        self.captions, self.vector = list(captions), vector

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, rows):
        index = torch.arange(len(self))[rows.cpu() if torch.is_tensor(rows) else rows].tolist()
        return Prompts([self.captions[k] for k in index], self.vector[index])

    def to(self, device):
        return Prompts([c.to(device) for c in self.captions], self.vector.to(device))


class ZImageVelocity(nn.Module):
    """velocity(x_t [B, 16, h, w], t [B], Prompts) -> v [B, 16, h, w], float32. The transformer
    computes in dtype. t stays float32: in bfloat16 730 of 1000 would become 732."""

    def __init__(self, transformer, dtype=None):
        super().__init__()
        self.transformer, self.dtype = transformer, dtype or transformer.dtype

    def forward(self, x_t, t, cond):
        frames = list(x_t.to(self.dtype).unsqueeze(2))  # B of [16, 1, h, w]: one frame each
        captions = [c.to(x_t.device, self.dtype) for c in cond.captions]
        out = self.transformer(frames, 1 - t.float(), captions, return_dict=False)[0]
        return -torch.stack(out).float().squeeze(2)


def image_tokens(f, x_t):
    """A layer's output [B, S, C] begins with the image's tokens: those, as a map [B, C, h/2, w/2].
    x_t [B, 16, h, w] is what the network was given. Pads and caption are left out."""
    h, w = x_t.shape[-2] // 2, x_t.shape[-1] // 2
    return rearrange(f[:, : h * w], "b (h w) c -> b c h w", h=h)


def padded_length(tokens):
    """Tokens of a caption in the transformer, which pads each to a multiple of 32."""
    return -(-tokens // 32) * 32


def batches(lengths, size):
    """Samples 0 .. n-1, whose captions have these lengths, in lists of at most `size` and of
    one padded length each: attention then needs no mask."""
    padded = [padded_length(n) for n in lengths]
    for length in sorted(set(padded)):
        alike = [k for k, n in enumerate(padded) if n == length]
        yield from (alike[k : k + size] for k in range(0, len(alike), size))


def progress(parts, words):
    """The parts of a work, with a bar on rank 0 where there is a terminal to show it."""
    return tqdm(list(parts), words, disable=None if ladd.rank() == 0 else True)


def parse_size(text):
    """--resolution as (height, width) in pixels: "512" is a square, "640x384" width x height."""
    sides = text.strip().lower().split("x")
    ok = len(sides) <= 2 and all(s.isdecimal() and int(s) and int(s) % 16 == 0 for s in sides)
    check(ok, f"--resolution: {text!r} is no size in multiples of 16 pixels; give 512 or 640x384")
    return int(sides[-1]), int(sides[0])


def parse_sizes(text):
    """Several such sizes, with commas between them."""
    return [parse_size(word) for word in text.split(",")]


def model_folder(model):
    """The local folder of a model; a name on the hub is downloaded, or found in its cache.
    UserError where it can't be had. It warns of a few-step student, told by its name or its
    scheduler's shift."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(model)))
        except Exception as error:  # the hub raises some ten kinds: no such name, no network, ...
            why = f"no such folder, and the hub gave none ({type(error).__name__})"
            raise UserError(f"--model {model}: {why}; download it, or name a folder") from error
    ok = (folder / "model_index.json").exists()
    check(ok, f"--model {model}: holds no model_index.json; name the folder of a ZImagePipeline")
    shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()).get("shift")
    if shift == 3.0 or "turbo" in Path(model).name.lower():
        ladd.print0(f"WARNING: {model} looks like Z-Image-Turbo, distilled already; take {BASE}")
    return folder


def model_fingerprint(folder, parts=DECIDING):
    """A digest of some parts' files, by default of those that decide the teacher's samples: names,
    sizes, and 64 KiB of either end of each (the files are not read through)."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted(p for p in (Path(folder) / part).glob("[!.]*") if p.is_file()):
            size = path.stat().st_size
            with open(path, "rb") as f:
                digest.update(f"{part}/{path.name} {size} ".encode() + f.read(1 << 16))
                f.seek(max(0, size - (1 << 16)))
                digest.update(f.read())
    return digest.hexdigest()


def load(kind, folder, **options):
    """kind.from_pretrained(folder), from safetensors and in silence; UserError where it fails."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)
    try:
        return kind.from_pretrained(folder, use_safetensors=True, **options)
    except Exception as error:  # by what is missing or damaged
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: can't be loaded ({why}); name another") from error


def load_network(kind, folder, dtype):
    """`load` of a network, in dtype, frozen. UserError where its files lack a weight, which the
    library would fill with anything, or hold an unknown one."""
    model, found = load(kind, folder, dtype=dtype, output_loading_info=True)
    wrong = sorted(found["missing_keys"]) + sorted(found["unexpected_keys"])
    check(not wrong, f"{folder}: missing or unknown weights, {wrong[:1]} the first; name another")
    return model.eval().requires_grad_(False)


def load_transformer(folder, dtype):
    """The transformer that lies in `folder` itself."""
    return load_network(diffusers.ZImageTransformer2DModel, folder, dtype)


class Clip:
    """A CLIP model, which computes in float32. Long prompts are cut at its 77 tokens."""

    def __init__(self, model, device):
        self.net = load_network(transformers.CLIPModel, model, torch.float32).to(device)
        self.processor = load(transformers.CLIPProcessor, model)
        self.dim = self.net.config.projection_dim

    def inputs(self, **shown):
        settings = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 77}
        return self.processor(**shown, **settings).to(self.net.device)

    def vectors(self, prompts):
        """The prompts' pooled, projected vectors [n, dim], on the CPU."""
        pooled = self.net.text_model(**self.inputs(text=prompts)).pooler_output
        return self.net.text_projection(pooled).cpu()

    def score(self, image, prompt):
        """The CLIP score of a PIL image: 100 max(cos, 0)."""
        out = self.net(**self.inputs(text=[prompt], images=[image]))
        return 100 * max(0.0, float(torch.cosine_similarity(out.image_embeds, out.text_embeds)))


def load_pipeline(folder, dtype, device, **parts):
    """The whole `ZImagePipeline`; parts, such as vae=None, replace or leave out what is there."""
    if "transformer" not in parts:
        parts["transformer"] = load_transformer(Path(folder) / "transformer", dtype)
    pipe = load(diffusers.ZImagePipeline, folder, dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@torch.no_grad()
def encode(pipe, prompts, batch=8):
    """Text features of a list of prompts, by the pipeline's own encoder: a list of [L_i, C]."""
    parts = [list(prompts[k : k + batch]) for k in range(0, len(prompts), batch)]
    call = {"do_classifier_free_guidance": False, "max_sequence_length": MAX_TOKENS}
    return [c for part in parts for c in pipe.encode_prompt(part, **call)[0]]  # it changes part


def sample_teacher(pipe, captions, null, noise, steps, guidance):
    """Noise [B, 16, h, w] -> the teacher's latents [B, 16, h, w], float32, by the stock pipeline.
    captions: B of [L_i, C]; null [L, C]: the empty prompt's; guidance: w >= 1, 1 for none."""
    texts = {"prompt_embeds": list(captions), "negative_prompt_embeds": [null] * len(noise)}
    size = {"height": PIXELS * noise.shape[2], "width": PIXELS * noise.shape[3]}
    settings = {"num_inference_steps": steps, "guidance_scale": guidance - 1}
    return pipe(**texts, **size, **settings, latents=noise, output_type="latent").images


@torch.no_grad()
def decode(vae, latents):
    """Latents [B, 16, h, w] -> B PIL images of 8w x 8h pixels."""
    vae.enable_slicing()  # one at a time: that takes little memory
    z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return VaeImageProcessor().postprocess(vae.decode(z, return_dict=False)[0])


def noise_for(seed, index, h, w):
    """The starting noise [16, h, w] of sample `index`: keyed, so it need not be stored."""
    return torch.randn(CHANNELS, h, w, generator=ladd.generator(seed, index, "zimage noise"))
