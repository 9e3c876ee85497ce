"""A tiny random Z-Image pipeline (all five parts, about 3 MB) and a tiny CLIP, made offline."""

import json

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONFIG = {"dim": 48, "n_layers": 4, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4}
CONFIG |= {"cap_feat_dim": 32, "axes_dims": [4, 4, 4]}
CONFIG["axes_lens"] = [600, 64, 64]  # the first must exceed 512 caption tokens and one
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
CHAT = "{% for m in messages %}" + TURN + "{% endfor %}<|im_start|>assistant\n"
LETTERS = list(bytes_to_unicode().values())


def transformer(seed=0, **changes):
    """A ZImageTransformer2DModel of 0.2M random parameters, none of them zero, where some start."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1 or p.abs().max() == 0:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tokenizer():
    """Byte-level: every character is a token of its own."""
    turns = ["<|im_start|>", "<|im_end|>"]
    words = {w: i for i, w in enumerate([*LETTERS, "<|endoftext|>", *turns])}
    made = transformers.Qwen2Tokenizer(vocab=words, merges=[])
    made.add_special_tokens({"additional_special_tokens": turns})
    made.chat_template = CHAT
    return made


def save(folder, seed=0):
    """A whole pipeline, with the base model's scheduler shift, as a folder; returns the folder."""
    model = transformer(seed)
    torch.manual_seed(seed + 1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Qwen3Config(vocab_size=300, max_position_embeddings=600, **sizes)
    encoder = transformers.Qwen3Model(config).eval()
    sizes = {"latent_channels": 16, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 1}
    sizes |= {"up_block_types": ("UpDecoderBlock2D",) * 4, "use_quant_conv": False}
    sizes |= {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_post_quant_conv": False}
    vae = AutoencoderKL(**sizes).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    ZImagePipeline(scheduler, vae, encoder, tokenizer(), model).save_pretrained(folder)
    return folder


def rewrite(path, **changes):
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_clip(folder):
    """A CLIPModel with its processor, projection 24; returns the folder."""
    words = [*LETTERS, *(w + "</w>" for w in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {w: i for i, w in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    torch.manual_seed(7)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": 24}
    text = {**sizes, "vocab_size": 514, "bos_token_id": 512}
    text |= {"eos_token_id": 513, "pad_token_id": 513}
    vision = {**sizes, "image_size": 24, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    images = transformers.CLIPImageProcessor(**sizes)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder
