"""Z-Image's transformer over the ranks: building it, sharding it by FSDP2 (torch.distributed.fsdp.fully_shard), gathering it.

Only rank 0 reads the weights; the others are sent their part. One process is a group of one, so there is one code path.
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


def start_alone(device):
    """FSDP wants a process group; without torchrun it is a group of one."""
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def config_of(folder):
    """The transformer's configuration, a dict. UserError where it can't be read."""
    from diffusers import ZImageTransformer2DModel
    try:
        return ZImageTransformer2DModel.load_config(folder, subfolder="transformer")
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: transformer/config.json can't be read ({str(error).strip().splitlines()[0]})") from error


def read_weights(folder):
    """All tensors of transformer/*.safetensors, on the CPU. UserError where a file is damaged."""
    from safetensors.torch import load_file
    tensors = {}
    for path in sorted((Path(folder) / "transformer").glob("*.safetensors")):
        try:
            tensors |= load_file(path)
        except Exception as error:                      # safetensors has an exception class of its own
            raise UserError(f"{path}: damaged or cut off ({error}); download the model again") from error
    return tensors


def build(folder, dtype, device, sharded, compute_dtype, frozen):
    """The model folder's transformer with parameters of dtype on device; sharded over the ranks or whole on each of them.

    compute_dtype: what a sharded one computes in (gradients are reduced in float32). frozen: no gradients for its weights; its root
    then stays gathered, since FSDP cannot gather it again for a backward pass that begins at a tap.
    """
    from diffusers import ZImageTransformer2DModel
    with torch.device("meta"):
        model = torch.nn.Module.to(ZImageTransformer2DModel.from_config(config_of(folder)), dtype)      # diffusers' own `to` warns in vain
    model.requires_grad_(not frozen)
    weights = {k: v.to(dtype) for k, v in read_weights(folder).items()} if ladd.rank() == 0 else {}
    want = model.state_dict()
    wrong = ladd.from_first(lambda: sorted(k for k, p in want.items() if k not in weights or weights[k].shape != p.shape)
                            + sorted(weights.keys() - want.keys()))
    if wrong:
        raise UserError(f"--model {folder}: {len(wrong)} weights do not fit its transformer/config.json, {wrong[0]} first")
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
    """The gathered weights in dtype as `save_pretrained` writes them, into folder: written beside and renamed, by rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(transformer, options=options)        # on every rank: it exchanges

    def save():
        with torch.device("meta"):
            whole = type(transformer).from_config(transformer.config)
        whole.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
        part = Path(folder).with_name(Path(folder).name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        whole.save_pretrained(part)
        return part
    return ladd.from_first(save)
