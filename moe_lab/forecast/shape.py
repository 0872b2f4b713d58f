"""What a model is to a forecast: of each decoder layer its sizes and its products, without weights.

A token's products are counted from the shapes of the parameters: every matrix of a layer is
multiplied once with each token, of the routed experts those of the chosen ones. What is multiplied
with no parameter is attention's own products (positions with positions) and those of layers with a
state (`state_flops`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_lab.models.checkpoint import Model
from moe_lab.models.layers import MoELayer, module_list, moe_layers
from moe_lab.models.layerwise import decoder_layers
from moe_lab.models.opening import text_config

DELTA_CHUNK = 64  # tokens that gated delta rules work on at a time (transformers' chunk_size)


@dataclass(frozen=True)
class DecoderShape:
    """One decoder layer.

    parameters: all of it; expert_parameters: those of its routed experts; num_experts, top_k,
    expert_width: 0 where it has none. token_flops: of the products with its parameters, for each
    token; pair_flops: of attention, for each pair of positions of a sequence. heads: of attention.
    width: of the widest that a token has within it, beside its experts.
    """

    parameters: int
    expert_parameters: int = 0
    num_experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    token_flops: float = 0.0
    pair_flops: float = 0.0
    state_flops: float = 0.0
    chunk: int = 1
    heads: int = 0
    width: int = 0

    def flops(self, lengths: Sequence[int]) -> float:
        """Operations (a multiply-add is two) over sequences of these lengths."""
        filled = sum(-(-length // self.chunk) * self.chunk for length in lengths)
        pairs = sum(length**2 for length in lengths)
        state = self.state_flops * filled
        return self.token_flops * sum(lengths) + self.pair_flops * pairs + state


@dataclass(frozen=True)
class ModelShape:
    """A model; decoders in order.

    embedding, head, others: parameters of the input embedding, of the head where it is none of the
    embedding's, and of all else that is in no decoder layer (norms, towers for images).
    head_flops: for each token that gets logits.
    """

    decoders: tuple[DecoderShape, ...]
    hidden_size: int
    vocabulary: int
    embedding: int
    head: int
    others: int
    head_flops: float

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.outside + sum(one.parameters for one in self.decoders)

    @property
    def outside(self) -> int:
        """Parameters that are in no decoder layer."""
        return self.embedding + self.head + self.others

    @property
    def largest(self) -> int:
        """Parameters of the largest decoder layer."""
        return max(one.parameters for one in self.decoders)

    def flops(self, lengths: Sequence[int], with_head: bool = True) -> float:
        """Operations (a multiply-add is two) of one forward over sequences of these lengths."""
        layers = sum(one.flops(lengths) for one in self.decoders)
        return layers + (self.head_flops * sum(lengths) if with_head else 0.0)


def shape_of(model: Model, path: str | None = None) -> ModelShape:
    """The shape of a model, which may be without weights.

    path: of its decoder layers, for one that may have no MoE layer left.
    """
    decoders = decoder_layers(model)[1] if path is None else module_list(model, path)
    moe = {id(layer.decoder): layer for layer in moe_layers(model)}
    config = text_config(model.config)
    inside = {id(one) for layer in decoders for one in layer.parameters()}
    embedding, head = (_weight(one) for one in (model.get_input_embeddings(), _head(model)))
    tied = head is embedding or config.tie_word_embeddings
    beside = {id(one): one.numel() for one in model.parameters() if id(one) not in inside}
    outside = sum(beside.values())
    own_head = 0 if tied else head.numel()
    return ModelShape(
        decoders=tuple(_decoder(layer, moe.get(id(layer)), config) for layer in decoders),
        hidden_size=embedding.shape[-1],
        vocabulary=head.shape[0],
        embedding=embedding.numel(),
        head=own_head,
        others=outside - embedding.numel() - own_head,
        head_flops=2.0 * head.numel(),
    )


def _head(model: Model) -> nn.Module:
    found: nn.Module | None = model.get_output_embeddings()
    return model.get_input_embeddings() if found is None else found


def _weight(module: nn.Module) -> torch.Tensor:
    return module.get_parameter("weight")


def _decoder(decoder: nn.Module, layer: MoELayer | None, config: Any) -> DecoderShape:
    parameters = list(decoder.parameters())
    routed = set[int]() if layer is None else {id(one) for one in layer.experts.parameters()}
    plain = [one for one in parameters if id(one) not in routed]
    experts = [one for one in parameters if id(one) in routed]
    named = {id(one): name for name, one in decoder.named_parameters()}
    matrices = sum(_products(named[id(one)], one) for one in plain)
    pairs, heads = _attention(decoder, config)
    state, chunk = _state(decoder)
    info = layer.info if layer else None
    number = (info.real_experts or info.num_experts) if info else 0
    chosen = sum(one.numel() for one in experts if one.dim() > 2)
    chosen = chosen or sum(one.numel() for one in experts if one.dim() > 1)
    per_token = chosen / number * info.top_k if info and number else 0.0
    return DecoderShape(
        parameters=sum(one.numel() for one in parameters),
        expert_parameters=sum(one.numel() for one in experts),
        num_experts=number,
        top_k=info.top_k if info else 0,
        expert_width=info.expert_width if info else 0,
        token_flops=2.0 * (matrices + per_token),
        pair_flops=pairs,
        state_flops=state,
        chunk=chunk,
        heads=heads,
        width=max((max(one.shape) for one in plain if one.dim() > 1), default=0),
    )


def _products(name: str, parameter: torch.Tensor) -> int:
    """Multiplications that a parameter takes part in for each token: of a matrix all."""
    if name.endswith("bias") or parameter.dim() < 2:
        return 0
    row = name.endswith("gate.weight") and len(parameter) == 1  # of a shared expert
    return parameter.numel() if row or parameter.numel() > max(parameter.shape) else 0


def _attention(decoder: nn.Module, config: Any) -> tuple[float, int]:
    """Operations of attention for each pair of positions, and its heads."""
    pairs, heads = 0.0, 0
    for name, module in decoder.named_modules():
        kind = type(module).__name__
        if kind.endswith("Attention") and "Linear" not in kind and "." not in name:
            heads, query, value = _heads(module, config)
            pairs += 2.0 * heads * (query + value)
    return pairs, heads


def _heads(attention: nn.Module, config: Any) -> tuple[int, int, int]:
    """Heads of an attention, and the widths of its queries and values."""
    said: Mapping[str, Any] = vars(attention)
    number = said.get("num_heads") or said.get("num_attention_heads") or config.num_attention_heads
    width = said.get("head_dim") or config.hidden_size // number
    query = said.get("qk_head_dim") or width
    return number, query, said.get("v_head_dim") or width


def _state(decoder: nn.Module) -> tuple[float, int]:
    """Operations of a layer's state for each token of whole chunks, and how many a chunk has."""
    for module in decoder.modules():
        said = vars(module)
        if {"head_k_dim", "head_v_dim", "num_v_heads"} <= said.keys():
            key, value = said["head_k_dim"], said["head_v_dim"]
            return _delta_flops(said["num_v_heads"], key, value), DELTA_CHUNK
        if {"ssm_state_size", "chunk_size", "num_heads", "head_dim"} <= said.keys():
            chunk, size, width = (said[k] for k in ("chunk_size", "ssm_state_size", "head_dim"))
            return 2.0 * said["num_heads"] * (chunk * (size + width) + 2 * size * width), chunk
    return 0.0, 1


def _delta_flops(heads: int, key: int, value: int) -> float:
    """Of a gated delta rule, for each token: within a chunk, and with the state."""
    return 2.0 * heads * (DELTA_CHUNK * (2 * key + value) + 3 * key * value)
