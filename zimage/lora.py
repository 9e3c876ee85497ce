"""A LoRA student (arXiv 2106.09685) by peft: W + B A beside every linear layer of attention and
feed-forward, W frozen, B from 0.

W is the teacher's own weight, of which there is one set for both, so a single GPU has room for it.
A and B are float32, and small enough to be copied to every rank. peft's factor alpha / rank is 1.
"""

import copy

import torch.distributed as dist
from diffusers import ZImagePipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

import ladd
from zimage.adapter import ZImageVelocity

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
CARD = """A LoRA for {model}, distilled by LADD. The student was trained at times that the
stock pipeline asks for only without the scheduler's shift, so change the scheduler too:

    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    pipe = ZImagePipeline.from_pretrained("{model}")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0{more})
    pipe.load_lora_weights("{folder}")
    image = pipe("a red fox in fresh snow", {call}).images[0]
"""


def size(transformer, rank):
    """How many weights a LoRA of this rank adds to a transformer."""
    ends = tuple(f".{name}" for name in LAYERS)
    linear = [m for name, m in transformer.named_modules() if name.endswith(ends)]
    return sum(rank * (m.in_features + m.out_features) for m in linear)


class LoraVelocity(ZImageVelocity):
    """velocity(x_t, t, cond) of a transformer's copied modules and shared weights, and of LoRA.
    `parameters` are LoRA's alone: they are what is trained, averaged and saved."""

    def __init__(self, transformer, rank, dtype):
        super().__init__(None, dtype)
        student = copy.deepcopy(transformer, {id(p): p for p in transformer.parameters()})
        student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)))
        self.lora = nn.ParameterList(p for p in student.parameters() if p.requires_grad)
        for p in self.lora:
            p.data = p.data.float()  # peft makes them in W's dtype: bfloat16 loses small updates
            if ladd.world_size() > 1:
                dist.broadcast(p.data, 0)
        # Past nn.Module, which would take it for a submodule.
        object.__setattr__(self, "transformer", student)


def merged(transformer):
    """A copy on the CPU without LoRA, whose weights are W + B A."""
    weights = {id(p): p.detach().to("cpu", copy=True) for p in transformer.parameters()}
    whole = copy.deepcopy(transformer, {k: nn.Parameter(w, False) for k, w in weights.items()})
    whole.fuse_lora()
    whole.unload_lora()
    return whole


def save(transformer, folder, model, call, more):
    """LoRA's weights alone, for `load_lora_weights`, and CARD with model, call and more."""
    with ladd.replacing(folder) as part:
        layers = get_peft_model_state_dict(transformer)
        ZImagePipeline.save_lora_weights(part, transformer_lora_layers=layers)
        card = CARD.format(model=model, folder=folder, call=call, more=more)
        (part / "README.md").write_text(card, encoding="utf-8")
