"""Z-Image as ladd sees it: the one place where diffusers' conventions become ladd's (stated in ladd.py).

    v = -transformer(x_t, 1 - t)        diffusers' Z-Image is told 1 - sigma, in float32, and returns x0 - eps; sigma is our t
    guidance w = guidance_scale + 1     `ZImagePipeline` computes pos + scale (pos - neg), with scale 0 for none

Read off diffusers 0.42.1 and pinned by the tests, which compare with `ZImagePipeline` itself.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

import ladd
from ladd import UserError

BASE = "Tongyi-MAI/Z-Image"
CHANNELS = 16           # of a latent
PIXELS = 8              # of the image per latent pixel, each way
MAX_TOKENS = 512        # of a prompt, as the pipeline's default
DECIDING = ("transformer", "text_encoder", "tokenizer")     # the parts of a model that decide its latents, besides the scheduler's shift


class Prompts:
    """A batch of conditions: captions, a list of text features [L_i, C] (L_i >= 1), and vector [B, D], what the heads are told.

    Slices, moves and has a length as a tensor does, which is all that `ladd.step` asks of a condition.
    """

    def __init__(self, captions, vector):
        self.captions, self.vector = list(captions), vector
        if len(self.captions) != len(vector):
            raise ValueError(f"{len(self.captions)} captions but {len(vector)} vectors")

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, rows):
        return Prompts(self.captions[rows], self.vector[rows])

    def to(self, device):
        return Prompts([c.to(device) for c in self.captions], self.vector.to(device))


class ZImageVelocity(nn.Module):
    """velocity(x_t [B, 16, h, w], t [B], Prompts) -> v [B, 16, h, w], float32, of a `ZImageTransformer2DModel`.

    dtype: what the transformer computes in (its own, or FSDP's for its parameters); t stays float32, since in bfloat16 730 of
    1000 would become 732.
    """

    def __init__(self, transformer, dtype=None):
        super().__init__()
        self.transformer, self.dtype = transformer, dtype or transformer.dtype

    def forward(self, x_t, t, cond):
        x = x_t.to(self.dtype).unsqueeze(2)                                 # [B, 16, 1, h, w]: one frame
        captions = [c.to(x.device, self.dtype) for c in cond.captions]
        out = self.transformer(list(x.unbind(0)), 1 - t.float(), captions, return_dict=False)[0]
        return -torch.stack([o.float() for o in out]).squeeze(2)


def image_tokens(f, x_t):
    """A layer's output [B, S, C], which begins with the image's tokens, as a map [B, C, h/2, w/2]; pads and caption are left out."""
    h, w = x_t.shape[-2] // 2, x_t.shape[-1] // 2
    return f[:, :h * w].transpose(1, 2).unflatten(2, (h, w))


def padded_length(caption):
    """Tokens of a caption [L, C] in the transformer: it pads to a multiple of 32. Batches of one length need no attention mask."""
    return -(-len(caption) // 32) * 32


# ---------------------------------------------------------------------------------------------------------------------
# Loading. `model` is a local folder that `ZImagePipeline.save_pretrained` wrote, or a name on the Hugging Face hub.
# ---------------------------------------------------------------------------------------------------------------------

def model_folder(model):
    """The local folder of a model; a name on the hub is downloaded (or found in its cache). UserError where neither works."""
    if Path(model).is_dir():
        folder = Path(model)
    else:
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(model))
        except Exception as error:      # the hub raises some ten kinds: no such name, no network, no permission, ...
            raise UserError(f"--model {model}: no such folder, and the hub gave none ({type(error).__name__}); "
                            f"download it there first, or name a folder") from error
    try:
        kind = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--model {model}: {folder} has no readable model_index.json; give a folder that "
                        f"ZImagePipeline.save_pretrained wrote") from error
    if kind != "ZImagePipeline":
        raise UserError(f"--model {model}: a {kind}, not a ZImagePipeline")
    return folder


def model_fingerprint(folder, parts=DECIDING):
    """A digest of some parts' files, by default of those that decide the teacher's samples: names, sizes, and 64 KiB of either end of each
    (32 GB are not read through)."""
    digest = hashlib.sha256()
    for part in parts:
        files = sorted(p for p in (Path(folder) / part).glob("[!.]*") if p.is_file())
        if not files:
            raise UserError(f"--model {folder}: {part}/ is missing or empty; download the model again, or name another")
        for path in files:
            size = path.stat().st_size
            with open(path, "rb") as f:
                digest.update(f"{part}/{path.name} {size} ".encode() + f.read(1 << 16))
                f.seek(max(0, size - (1 << 16)))
                digest.update(f.read())
    return digest.hexdigest()


def header(path):
    """What a safetensors file says of itself: ({tensor: its dtype, shape and place}, the bytes that the file must have)."""
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if n > path.stat().st_size:
            raise ValueError("cut off in its header")
        tensors = json.loads(f.read(n))
    tensors.pop("__metadata__", None)
    return tensors, 8 + n + max(entry["data_offsets"][1] for entry in tensors.values())


def tensors_of(path):
    """`header`'s tensors of one of the model's files; UserError where it is damaged or cut off."""
    try:
        tensors, size = header(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged or cut off ({reason(error)}); download the model again") from error
    if path.stat().st_size != size:
        raise UserError(f"{path}: damaged or cut off ({path.stat().st_size} bytes, not {size}); download the model again")
    return tensors


def turbo_warning(model, folder):
    """A warning where the model, by its name or the files in its folder, looks like Z-Image-Turbo, which is a few-step student already;
    None otherwise."""
    try:
        shift = json.loads((Path(folder) / "scheduler" / "scheduler_config.json").read_text()).get("shift")
    except (OSError, ValueError, AttributeError):
        shift = None
    if shift == 3.0 or "turbo" in Path(model).name.lower():
        return (f"WARNING: {model} looks like Z-Image-Turbo (scheduler shift {shift}), which is distilled already; "
                f"the teacher should be the base model, {BASE}")
    return None


def reason(error):
    """The first line of an exception's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_transformer(folder, dtype, way_out="download the model again, or name another"):
    """The transformer that lies in `folder` itself, in dtype, frozen. UserError, ending in way_out, where its
    files are missing, damaged or lack a weight."""
    from diffusers import ZImageTransformer2DModel
    try:
        model, told = ZImageTransformer2DModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:          # OSError, ValueError, SafetensorError, ...: by what is damaged
        raise UserError(f"{folder}: can't be loaded ({reason(error)}); {way_out}") from error
    if wrong := sorted(told["missing_keys"]) + sorted(told["unexpected_keys"]):     # diffusers would fill a lost weight with anything
        raise UserError(f"{folder}: {len(wrong)} weights are missing or unknown, {wrong[0]} among them; {way_out}")
    return model.eval().requires_grad_(False)


def load_pipeline(folder, dtype, device, **parts):
    """The whole `ZImagePipeline`; parts (transformer=None, vae=None, ...) replace or leave out what is not needed."""
    from diffusers import ZImagePipeline
    try:
        pipe = ZImagePipeline.from_pretrained(folder, dtype=dtype, **parts)
    except Exception as error:
        raise UserError(f"--model {folder}: the pipeline can't be loaded ({reason(error)})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_vae(folder, dtype, device):
    """The pipeline's VAE alone, frozen."""
    from diffusers import AutoencoderKL
    try:
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=dtype)
    except Exception as error:
        raise UserError(f"--model {folder}: the VAE can't be loaded ({reason(error)})") from error
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode(pipe, prompts):
    """Text features of a list of prompts, by the pipeline's own encoder: a list of [L_i, C]."""
    return pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS)[0]   # it writes to the list


@torch.no_grad()
def decode(vae, latents, batch=4):
    """Latents [B, 16, h, w] -> images [B, 3, 8h, 8w] in [0, 1], on the CPU."""
    images = []
    for z in latents.split(batch):
        z = z.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images.append((vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images)


def teacher_times(steps, shift):
    """The pipeline's times for so many steps: linspace(1, 1/N, N) under the scheduler's shift, s t / (1 + (s - 1) t)."""
    return [shift * t / (1 + (shift - 1) * t) for t in torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()]


def scheduler_shift(folder, steps):
    """The shift of the model's scheduler; UserError where its times are not those of `teacher_times`."""
    scheduler = load_pipeline(folder, torch.float32, "cpu", transformer=None, text_encoder=None, tokenizer=None, vae=None).scheduler
    shift = scheduler.config.get("shift")
    try:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        same = torch.allclose(scheduler.sigmas[:-1].double(), torch.tensor(teacher_times(steps, shift), dtype=torch.float64), atol=1e-5)
    except (TypeError, ValueError):
        same = False
    if not same or scheduler.config.get("stochastic_sampling"):
        raise UserError(f"--model {folder}: its scheduler is no flow-matching Euler of fixed shift ({type(scheduler).__name__}, shift {shift}); "
                        f"restore scheduler/scheduler_config.json of {BASE}")
    return float(shift)


def noise_for(seed, index, h, w):
    """The starting noise [16, h, w] of sample `index`: keyed, so it need not be stored."""
    return torch.randn(CHANNELS, h, w, generator=ladd.generator(seed, index, "zimage noise"))
