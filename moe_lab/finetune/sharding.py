"""Decoder layers divided among the processes of a training: PyTorch's FSDP2, a layer at a time.

Each process holds a part of every parameter of a decoder layer, of its gradient and of the
optimizer's state; a layer is put together while it computes. Embedding, head, norms and routers,
which are also asked outside of a forward, are whole in each, and so is what of them trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_lab import processes
from moe_lab.models.checkpoint import Model
from moe_lab.models.layers import decoders_path, module_list, moe_layers


def shard(
    model: Model, trainable: Mapping[str, nn.Parameter], device: torch.device
) -> dict[str, nn.Parameter]:
    """Divide the decoder layers of a model, and move it; the trained parameters, as they are then.

    Only one decoder layer at a time is whole on the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes.open_group()
    names = {parameter: name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(device.type, (processes.number(),))
    decoders, left = decoder_layers(model), _undivided(model)
    for layer in decoders:
        divided = fully_shard(
            layer.to(device), mesh=mesh, reshard_after_forward=True,
            ignored_params={one for one in layer.parameters() if one in left},
        )  # fmt: skip
        divided.set_gradient_divide_factor(1.0)  # a step's losses are sums already
        divided.set_force_sum_reduction_for_comms(True)  # gloo has no other
        divided.set_reduce_scatter_unused_params(True)
    inside = {parameter for layer in decoders for parameter in layer.parameters()}
    _move_rest(model, inside, device)
    there = dict(model.named_parameters())
    return {name: there[names[parameter]] for name, parameter in trainable.items()}


def _undivided(model: Model) -> set[nn.Parameter]:
    """What stays whole: routers, vectors, and what has fewer rows than there are processes."""
    routers = [one for layer in moe_layers(model) for one in layer.router.parameters()]
    small = [one for one in model.parameters() if one.dim() < 2 or len(one) < processes.number()]
    return {*routers, *small}


def decoder_layers(model: Model) -> nn.ModuleList:
    """The decoder layers of a model, found from its first MoE layer, or as the longest list."""
    if layers := moe_layers(model):
        return module_list(model, decoders_path(layers[0].info.name))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def _move_rest(model: nn.Module, inside: set[nn.Parameter], device: torch.device) -> None:
    """Move all parameters and buffers that are in no decoder layer."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in inside:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def is_divided(tensor: Tensor) -> bool:
    """Whether each process has a part of it alone."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together; every process has to ask for a divided one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Copy values, which are whole, into a tensor that may be divided."""
    if not isinstance(target, DTensor):
        target.copy_(values)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    part = values
    for dimension, (size, first) in enumerate(zip(shape, offset, strict=True)):
        part = part.narrow(dimension, min(first, part.shape[dimension]), size)
    target.to_local().copy_(part)


def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale gradients down to a norm of `most` over all of them; the norm that they had."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in gradients if is_divided(g) is divided] for divided in (True, False)]
    squares = torch.stack([_norm(kind) for kind in kinds if kind]).square()
    norm = squares.sum().sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        part.mul_(scale.to(part.device))
    return float(norm)


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm over these gradients: of divided ones over all processes."""
    if not is_divided(gradients[0]):
        return nn.utils.get_total_norm(gradients)
    parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    squares = torch.stack([part.square().sum() for part in parts]).sum()
    return processes.total(squares).sqrt()
