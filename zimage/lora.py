"""A LoRA student (arXiv 2106.09685) by peft: W + B A beside every linear layer of attention and feed-forward, W frozen, B from 0.

W is the teacher's own weight, of which there is one set for both, so a single GPU has room for it; A and B are float32, and small enough to be
replicated over the ranks. peft's factor alpha / rank is 1 here: alpha = rank.
"""

import copy
import os
import shutil
from pathlib import Path

from torch import nn

from zimage.adapter import ZImageVelocity

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


def size(transformer, rank):
    """How many weights a LoRA of this rank adds to a transformer."""
    ends = tuple(f".{name}" for name in LAYERS)
    return sum(rank * (m.in_features + m.out_features) for name, m in transformer.named_modules() if name.endswith(ends))


def attach(transformer, rank):
    """A transformer with LoRA, equal to the frozen one given, which stays as it is: the modules are copied, their weights shared."""
    from peft import LoraConfig, inject_adapter_in_model
    student = copy.deepcopy(transformer, {id(p): p for p in transformer.parameters()})
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)), student)
    for p in student.parameters():
        if p.requires_grad:                             # peft makes them in W's dtype, where bfloat16 would round updates away
            p.data = p.data.float()
    return student


class LoraVelocity(nn.Module):
    """`ZImageVelocity` of a transformer with LoRA. Its parameters are LoRA's alone: what is trained, averaged and saved."""

    def __init__(self, transformer, dtype):
        super().__init__()
        self.lora = nn.ParameterList(p for p in transformer.parameters() if p.requires_grad)
        self.velocity = [ZImageVelocity(transformer, dtype)]        # in a list: no submodule

    @property
    def transformer(self):
        return self.velocity[0].transformer

    def forward(self, x_t, t, cond):
        return self.velocity[0](x_t, t, cond)


def merge(weights):
    """A transformer's weights with LoRA's B A added to W, by the names of one without LoRA; without LoRA they come back as they are."""
    whole = {k.replace(".base_layer.", "."): w for k, w in weights.items() if ".lora_" not in k}
    for k, a in weights.items():
        if ".lora_A." in k:
            w, b = f"{k.split('.lora_A.')[0]}.weight", weights[k.replace(".lora_A.", ".lora_B.")]
            whole[w] = (whole[w].float() + b @ a).to(whole[w].dtype)
    return whole


def save(transformer, folder):
    """LoRA's weights alone, for `ZImagePipeline.load_lora_weights(folder)`."""
    from diffusers import ZImagePipeline
    from peft import get_peft_model_state_dict
    part = Path(folder).with_name(Path(folder).name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    ZImagePipeline.save_lora_weights(part, transformer_lora_layers=get_peft_model_state_dict(transformer))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
