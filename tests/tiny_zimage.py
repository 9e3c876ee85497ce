"""A tiny random Z-Image pipeline (all five parts, about 3 MB), made offline for the tests."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

CONFIG = dict(dim=48, n_layers=4, n_refiner_layers=2, n_heads=4, n_kv_heads=4, cap_feat_dim=32, axes_dims=[4, 4, 4],
              axes_lens=[600, 64, 64])      # axes_lens[0] must exceed 512 caption tokens and one
CHAT = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def transformer(seed=0, **changes):
    """A ZImageTransformer2DModel of 0.2M random parameters, every one of them away from zero (pad tokens start there)."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1 or p.abs().max() == 0:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tokenizer():
    """Byte-level: every character is a token of its own."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    words = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHAT
    return made


def pipeline(seed=0, shift=6.0):
    """The whole pipeline: 16-channel VAE of factor 8, Qwen3 encoder of width 32, the base model's scheduler shift."""
    made = transformer(seed)
    torch.manual_seed(seed + 1)
    encoder = Qwen3Model(Qwen3Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                     num_key_value_heads=2, head_dim=8, max_position_embeddings=600)).eval()
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1,
                        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False).eval()
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False), vae, encoder, tokenizer(), made)


def save(folder, seed=0, shift=6.0):
    """The pipeline as a folder that `ZImagePipeline.from_pretrained` reads; returns the folder."""
    pipeline(seed, shift).save_pretrained(folder)
    return folder
