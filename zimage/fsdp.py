"""Z-Image's transformer over the ranks: building it, sharding it by FSDP2 (torch.distributed.fsdp.fully_shard), gathering it.

Only rank 0 reads the weights; the others are sent them tensor by tensor, and keep their part. One process is a group of one, so there is one code path.
"""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ladd
from ladd import UserError
from zimage import lora
from zimage.adapter import reason, tensors_of


def start_alone(device):
    """FSDP wants a process group; without torchrun it is a group of one."""
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def skeleton(folder):
    """The model folder's transformer without memory for its weights. UserError where its configuration makes none."""
    from diffusers import ZImageTransformer2DModel
    try:
        config = ZImageTransformer2DModel.load_config(folder, subfolder="transformer")
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: transformer/config.json can't be read ({reason(error)}); restore it") from error
    try:
        with torch.device("meta"):
            return ZImageTransformer2DModel.from_config(config)
    except Exception as error:          # by what is wrong in it
        raise UserError(f"--model {folder}: transformer/config.json makes no transformer ({reason(error)}); restore it") from error


def check_files(folder, model):
    """UserError where the files of the transformer's weights, by their headers, are damaged or hold other weights than `skeleton`'s."""
    have = {k: tensor["shape"] for path in weight_files(folder) for k, tensor in tensors_of(path).items()}
    want = {k: list(p.shape) for k, p in model.state_dict().items()}
    if wrong := sorted(ladd.drift(want, have)):
        raise UserError(f"--model {folder}: {len(wrong)} weights do not fit its transformer/config.json, {wrong[0]} first; download it again")


def weight_files(folder):
    files = sorted((Path(folder) / "transformer").glob("*.safetensors"))
    if not files:
        raise UserError(f"--model {folder}: transformer/ holds no safetensors; download the model again, or name another")
    return files


def read_weights(folder):
    """All weights of the transformer, on the CPU."""
    from safetensors.torch import load_file
    return {k: v for path in weight_files(folder) for k, v in load_file(path).items()}


def build(model, read, dtype, device, sharded, compute_dtype, frozen):
    """model, a skeleton, with parameters of dtype on device; sharded over the ranks or whole on each of them.

    read() -> {name: tensor}, its weights, asked for on rank 0 alone. compute_dtype: what a sharded one computes in (gradients are reduced in float32). frozen: no gradients for its weights; its root
    then stays gathered, since FSDP cannot gather it again for a backward pass that begins at a tap.
    """
    model = torch.nn.Module.to(model, dtype).requires_grad_(not frozen)      # diffusers' own `to` warns in vain
    weights = {k: v.to(dtype) for k, v in read().items()} if ladd.rank() == 0 else {}
    if sharded:
        mesh = init_device_mesh(device.type, (ladd.ranks(),))
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)   # t stays float32
        for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if frozen else True)
        model.to_empty(device=device)
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    else:
        model.to_empty(device=device)
        if weights:
            model.load_state_dict(weights)
        if ladd.ranks() > 1:
            for p in model.parameters():
                dist.broadcast(p.data, 0)
    return model.eval() if frozen else model.train()


def save_whole(transformer, folder, dtype):
    """The gathered weights in dtype, LoRA merged, as `save_pretrained` writes them, into a folder beside `folder`, by rank 0; returns
    that, to be renamed."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(transformer, options=options)        # on every rank: it exchanges

    def save():
        with torch.device("meta"):
            whole = type(transformer).from_config(transformer.config)
        whole.load_state_dict({k: v.to(dtype) for k, v in lora.merge(weights).items()}, assign=True)
        part = Path(folder).with_name(Path(folder).name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        whole.save_pretrained(part)
        return part
    return ladd.from_first(save)
