"""What a block makes of its parts' outputs, found by running it: no family says it in its config.

Some blocks hand their router more than the tokens; some scale, average or project what their
experts give, or end in a norm. Letters: see `types.py`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lab.models.hashed import is_hashed, num_token_ids
from moe_lab.models.layers import MoELayer, Output, hidden_of

PROBES = 64
GATE_AT_1 = 1 / (1 + math.exp(-1.0))  # the sigmoid of 1


class _Routed(Exception):
    """Carries what a router returned out of its block, past everything behind it."""

    def __init__(self, output: tuple[Tensor, ...]):
        super().__init__()
        self.output = output


def route(
    layer: MoELayer, x_TD: Tensor, input_ids_T: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer's router makes of the block's input: logits [T, E], weights, indices [T, K].

    The router is called as its block calls it, which may hand it more than the tokens, and past
    hooks on its output; nothing else of the block is computed behind it. input_ids_T: for routers
    that choose by token id; without them any ids are taken.
    """
    tokens = len(x_TD)
    logits, weight, index = router_output(layer, x_TD, input_ids_T)[:3]
    logits_TE = logits.reshape(tokens, -1)[:, : layer.info.num_rows]
    return logits_TE, weight.reshape(tokens, -1), index.reshape(tokens, -1)


def router_output(
    layer: MoELayer, x_TD: Tensor, input_ids_T: Tensor | None = None
) -> tuple[Tensor, ...]:
    """All that the router returns to its block, as it returns it; arguments as of `route`."""
    inner = layer.router.forward
    if _is_called_alone(layer):
        output: tuple[Tensor, ...] = inner(x_TD)
        return output
    own = vars(layer.router).get("forward")

    def forward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        raise _Routed(inner(*arguments, **named))

    layer.router.forward = forward
    try:
        layer.block.forward(x_TD[None], **_further(layer, len(x_TD), x_TD.device, input_ids_T))
    except _Routed as routed:
        return routed.output
    finally:
        del layer.router.forward
        if own is not None:
            layer.router.forward = own
    raise RuntimeError(f"{type(layer.block).__name__} does not call its router")


def _is_called_alone(layer: MoELayer) -> bool:
    """Whether the router needs nothing but tokens: then the block need not be run."""
    parameters = inspect.signature(type(layer.router).forward).parameters.values()
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return not layer.has_block or len(named) == 2  # itself, and the tokens


def _further(
    layer: MoELayer, tokens: int, device: torch.device, input_ids_T: Tensor | None = None
) -> dict[str, Any]:
    """What the block must be given beside the hidden states."""
    if "input_ids" not in inspect.signature(layer.block.forward).parameters:
        return {}
    if input_ids_T is None:
        number = num_token_ids(layer) if is_hashed(layer) else 1
        input_ids_T = torch.arange(tokens, device=device) % number
    return {"input_ids": input_ids_T[None]}


def probe(layer: MoELayer, tokens: int = PROBES) -> Tensor:
    """Random input [T, D] for a layer, always the same."""
    reference = next(p for p in layer.router.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, layer.info.hidden_size, generator=generator).to(reference)


class Terms(NamedTuple):
    """A block that is routed * sum_k weight_k * E_k(x) + shared * gate * shared(x)."""

    routed: float
    shared: float


class _OtherSize(Exception):
    """Experts that work on vectors of another length than the hidden states have."""


class _Part(nn.Module):
    """Stands for the experts, or for the shared ones, and gives what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.gives: Tensor | None = None  # zeros
        self.random = False  # gives the same random numbers for each token, also of another size
        self.factor = 1.0
        self.got = torch.zeros(0)
        self.further = False

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        self.got = hidden_states
        self.further = bool(arguments or named)
        if self.random:
            generator = torch.Generator().manual_seed(hidden_states.shape[-1])
            return self.factor * torch.randn(hidden_states.shape, generator=generator)
        if self.gives is None:
            return torch.zeros_like(hidden_states)
        if hidden_states.numel() != self.gives.numel():
            raise _OtherSize
        return self.gives.reshape(hidden_states.shape)


class _Gate(nn.Module):
    """Stands for the gate of the shared experts: the same logit for every token."""

    logit = torch.inf

    @contextmanager
    def at(self, logit: float) -> Iterator[None]:
        """While open, this logit; else one whose sigmoid is 1."""
        self.logit = logit
        try:
            yield
        finally:
            self.logit = torch.inf

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_full((*hidden_states.shape[:-1], 1), self.logit)


@contextmanager
def on_cpu() -> Iterator[None]:
    """While open, new tensors are in float32 on the CPU, also while a model is built elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@on_cpu()
def skeleton(layer: MoELayer) -> MoELayer:
    """The layer's block without its experts, on the CPU, in float32 and with random weights.

    The layer itself may be on the meta device. Its shared experts stand for nothing, too.
    """
    parts: dict[str, Any] = {"experts": _Part(), "shared": _Part(), "shared_gate": _Gate()}
    parts = {name: part for name, part in parts.items() if getattr(layer, name) is not None}
    memo: dict[int, Any] = {id(getattr(layer, name)): part for name, part in parts.items()}
    holder = layer.block if layer.has_block else layer.router
    for module in holder.modules():
        if (config := vars(module).get("config")) is not None:
            memo[id(config)] = config
    copied = copy.deepcopy(holder, memo).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for tensor in [*copied.parameters(), *copied.buffers()]:
        random = torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point():
            tensor.copy_(random)
        else:
            tensor.copy_(random.abs() % layer.info.num_experts)
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    parts["block"] = copied if layer.has_block else layer.block
    parts["router"] = memo[id(layer.router)]
    return replace(layer, **parts)


@on_cpu()
def terms(layer: MoELayer) -> Terms | None:
    """The factors of the routed and the shared sum in a block; None where it is no such sum.

    Tried on a copy with random weights, whose experts give what they are told, small and large, in
    batches of two shapes: the layer may be on the meta device.
    """
    if not layer.has_block:
        return None
    bare, found = skeleton(layer), set[Terms]()
    try:
        for shape, scale in (((1, 64), 1.0), ((2, 16), 1000.0)):
            factors = _factors(bare, shape, scale)
            if factors is None:
                return None
            found.add(factors)
    except _OtherSize:
        return None
    return found.pop() if len(found) == 1 else None


def _factors(bare: MoELayer, shape: tuple[int, int], scale: float) -> Terms | None:
    """The same, by tokens [B, L] of this shape and outputs of this scale."""
    generator = torch.Generator().manual_seed(1)
    size = bare.info.hidden_size
    x_BLD, routed_BLD, shared_BLD = torch.randn(3, *shape, size, generator=generator)
    routed_BLD, shared_BLD = scale * routed_BLD, scale * shared_BLD
    zero, one = torch.zeros_like(x_BLD), torch.ones_like(x_BLD)
    if _given(bare, x_BLD, zero, zero).abs().max() > 0 or not _gets_tokens(bare, x_BLD):
        return None
    routed = float(_given(bare, x_BLD, one, zero)[0, 0, 0])
    shared = float(_given(bare, x_BLD, zero, one)[0, 0, 0])
    expected = routed * routed_BLD + shared * shared_BLD
    is_sum = _same(_given(bare, x_BLD, routed_BLD, shared_BLD), expected, scale)
    if isinstance(bare.shared_gate, _Gate):
        with bare.shared_gate.at(1.0):
            given = _given(bare, x_BLD, zero, shared_BLD)
        is_sum &= _same(given, GATE_AT_1 * shared * shared_BLD, scale)
    return Terms(routed, shared) if is_sum else None


@on_cpu()
def adds_multiples(layer: MoELayer) -> bool:
    """Whether a block adds a multiple of its routed sum and one of its shared sum to what else it
    gives, the same ones in batches of any shape. The layer may be on the meta device."""
    if not layer.has_block:
        return False
    bare = skeleton(layer)
    try:
        found = {_multiples(bare, shape) for shape in ((1, 64), (2, 16))}
    except _OtherSize:
        return False
    return len(found) == 1 and None not in found


def _multiples(bare: MoELayer, shape: tuple[int, int]) -> tuple[float, ...] | None:
    """The factors of the routed and the shared sum, rounded; None where there are none."""
    generator, found = torch.Generator().manual_seed(2), []
    x_BLD, routed_BLD, shared_BLD = torch.randn(
        3, *shape, bare.info.hidden_size, generator=generator
    )

    def given(routed: float, shared: float) -> Tensor:
        return _given(bare, x_BLD, routed * routed_BLD, shared * shared_BLD)

    rest = given(0.0, 0.0)
    for routed, shared in ((1.0, 0.0), (-3.0, 0.0), (0.0, 1.0)):
        change, whole = given(routed, shared) - rest, routed * routed_BLD + shared * shared_BLD
        factor = float((change * whole).sum() / whole.square().sum())
        if not torch.allclose(change, factor * whole, rtol=1e-4, atol=1e-4):
            return None
        found.append(round(factor, 3))
    return tuple(found) if found[0] == found[1] else None


@on_cpu()
def what_else_weights_do(layer: MoELayer) -> str | None:
    """Why constant weights cannot be told from what a block makes of them; None where they can.

    Of a block that stays while its experts become one: what the router says may only be handed to
    the experts, and the gate of the shared ones must be a sigmoid.
    """
    if not layer.has_block:
        return None
    bare, shape = skeleton(layer), (1, 8, layer.info.hidden_size)
    generator = torch.Generator().manual_seed(3)
    x_BLD = torch.randn(shape, generator=generator)
    for part in (bare.experts, bare.shared):
        if isinstance(part, _Part):
            part.random = True
    inner = bare.router.forward

    def other(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        logits, weight, index, *rest = inner(*arguments, **named)
        return logits, weight / 2, (index + 1) % layer.info.num_experts, *rest

    further = _further(bare, shape[1], x_BLD.device)
    whole = hidden_of(bare.block(x_BLD.clone(), **further))
    bare.router.forward = other
    if not torch.equal(hidden_of(bare.block(x_BLD.clone(), **further)), whole):
        return (
            f"{type(layer.block).__name__} uses the router's choice or weights beside handing them "
            "to its experts"
        )
    if isinstance(bare.shared_gate, _Gate) and isinstance(bare.shared, _Part):
        with bare.shared_gate.at(1.0):
            gated = hidden_of(bare.block(x_BLD.clone(), **further))
        bare.shared.factor = GATE_AT_1
        if not _same(hidden_of(bare.block(x_BLD.clone(), **further)), gated, 1.0):
            return f"the gate of {type(layer.block).__name__}'s shared experts is no sigmoid"
    return None


@on_cpu()
def skeleton_output(layer: MoELayer) -> Output:
    """What a block with experts that give zeros returns for a few tokens, its shape that is."""
    bare = skeleton(layer)
    x_TD = torch.zeros(1, layer.info.hidden_size)
    output: Output = bare.block(x_TD[None], **_further(bare, 1, x_TD.device))
    return output


def hands_state_on(layer: MoELayer) -> bool:
    """Whether the block gets a state from the layers before it, and gives one to those behind."""
    known = {"self", "input_ids"}
    parameters = list(inspect.signature(type(layer.block).forward).parameters.values())[2:]
    gets = [p for p in parameters if p.kind < p.VAR_POSITIONAL and p.name not in known]
    return layer.has_block and bool(gets) and isinstance(skeleton_output(layer), tuple)


def _same(one: Tensor, other: Tensor, scale: float) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * scale)


def _given(bare: MoELayer, x_BLD: Tensor, routed_BLD: Tensor, shared_BLD: Tensor) -> Tensor:
    """The output [B, L, D] of a block whose experts and shared experts give these."""
    for part, gives in ((bare.experts, routed_BLD), (bare.shared, shared_BLD)):
        if isinstance(part, _Part):
            part.gives = gives
    output = bare.block(x_BLD.clone(), **_further(bare, x_BLD[..., 0].numel(), x_BLD.device))
    return hidden_of(output).reshape(x_BLD.shape)


def _gets_tokens(bare: MoELayer, x_BLD: Tensor) -> bool:
    """Whether experts and shared experts were given the block's own input, the latter no more."""
    parts = [part for part in (bare.experts, bare.shared) if isinstance(part, _Part)]
    same = all(
        part.got.numel() == x_BLD.numel() and torch.equal(part.got.reshape(x_BLD.shape), x_BLD)
        for part in parts
    )
    return same and not any(part.further for part in parts if part is bare.shared)
