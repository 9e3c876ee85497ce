"""Z-Image's transformer over the ranks: loading it, sharding it by FSDP2, gathering it.

Rank 0 alone reads the files; the others are sent the weights one by one. A process without torchrun
is a group of one, so there is one code path.
"""

import torch
import torch.distributed as dist
from diffusers import ZImageTransformer2DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import ladd
from zimage.adapter import load_transformer


def skeleton(config):
    """The transformer of a configuration, without memory for its weights."""
    with torch.device("meta"):
        return ZImageTransformer2DModel.from_config(config)


def shard(model, device, compute_dtype, **root):
    """Split a skeleton's parameters over the ranks, block by block; they have no values yet.

    compute_dtype: what the gathered weights are cast to. Gradients are reduced in float32, and t
    stays float32. root: options of `fully_shard` for what lies outside of the blocks.
    """
    mesh = init_device_mesh(device.type, (ladd.world_size(),))
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, **root)


def load_teacher(folder, config, dtype, device, sharded):
    """The transformer in `folder`, in dtype, frozen; whole on every rank, or sharded over them."""
    if not dist.is_initialized():  # without torchrun
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    weights = load_transformer(folder, dtype).state_dict() if ladd.rank() == 0 else {}
    model = torch.nn.Module.to(skeleton(config), dtype)  # diffusers' own `to` warns in vain
    if sharded:
        # The root stays gathered: FSDP can't gather it for a backward pass that begins at a tap.
        shard(model, device, dtype, reshard_after_forward=None)
    model.to_empty(device=device)
    for name, p in model.state_dict().items():  # one by one: there may be no room for all twice
        shape = {"size": p.shape, "dtype": p.dtype, "device": device}
        w = weights.pop(name).to(device) if weights else torch.empty(**shape)
        dist.broadcast(w, 0)
        fill(p, w)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill(p, w):
    """Copy w into p. p may be sharded; w is whole, or sharded alike."""
    if isinstance(p, DTensor) and not isinstance(w, DTensor):
        w = distribute_tensor(w, p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(w)


def make_student(teacher, device, compute_dtype):
    """The teacher's transformer with float32 weights of its own, sharded, to be trained.

    Each rank fills its part from the teacher's weights that it holds already: nothing is sent.
    """
    student = skeleton(teacher.config)
    shard(student, device, compute_dtype, reshard_after_forward=True)
    student.to_empty(device=device)
    for p, w in zip(student.parameters(), teacher.parameters(), strict=True):
        fill(p, w)
    return student.train()


def gather(transformer, dtype):
    """The whole transformer in dtype: on rank 0's CPU, elsewhere without values. All must call."""
    place = "cpu" if ladd.rank() == 0 else "meta"
    weights = {k: p.full_tensor().to(place, dtype) for k, p in transformer.state_dict().items()}
    whole = skeleton(transformer.config)
    whole.load_state_dict(weights, assign=True)
    return whole
