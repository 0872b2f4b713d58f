"""What a token uses of a model: parameters, and the products of its routed experts."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from moe_lab.models.factorized import idle_parameters
from moe_lab.models.head import repeated_head
from moe_lab.models.layers import MoELayer, moe_layers, num_parameters
from moe_lab.models.remapped import RemappedExperts
from moe_lab.models.widths import num_zeros


def parameters(model: PreTrainedModel) -> int:
    """Parameters, tied ones counted once: also a head beside the embedding that it equals."""
    return num_parameters(model) - repeated_head(model)


def active_parameters(model: PreTrainedModel, used: Mapping[int, float] | None = None) -> int:
    """Parameters that one token uses: all but the routed experts, and those of its own.

    used: how many different experts a token had on average, by layer index; None: as many as the
    router chooses, though a rule may leave some of them out (`skipping.py`). Where router rows lead
    to stand-ins, without `used` it is a token that was sent to none of them.
    """
    active = float(parameters(model) - idle_parameters(model))
    for layer in moe_layers(model):
        routed, replaced = _routed_parameters(layer)
        number = num_real_experts(layer)
        if used is None:
            active -= replaced + routed - routed * min(layer.info.top_k, number) // number
        else:
            active -= replaced + routed * (1 - used[layer.info.index] / number)
    return round(active)


def num_real_experts(layer: MoELayer) -> int:
    """How many experts a layer has that are computed, whatever its router's rows are."""
    return layer.info.real_experts or layer.info.num_experts


def expert_flops(model: PreTrainedModel, computed: Mapping[int, float]) -> float:
    """Floating-point operations of the routed experts' matrix products for one token.

    computed: how many experts it had on average, by layer index. A multiply-add is two.
    """
    total = 0.0
    for layer in moe_layers(model):
        own = [one for module in layer.experts.modules() for one in module._parameters.values()]
        matrices = sum(one.numel() for one in own if one is not None and one.dim() > 2)
        matrices -= num_zeros(layer.experts)[0]
        total += 2 * computed[layer.info.index] * matrices / num_real_experts(layer)
    return total


def _routed_parameters(layer: MoELayer) -> tuple[int, int]:
    """Of the routed experts together, and of the constants that stand in for others."""
    experts = layer.experts
    constants = experts.constants if isinstance(experts, RemappedExperts) else None
    replaced = 0 if constants is None else constants.numel()
    # By modules: those of some families' experts are their block's (JetMoE).
    own = [one for module in experts.modules() for one in module._parameters.values()]
    routed = sum(one.numel() for one in own if one is not None) - replaced
    return routed - num_zeros(experts)[0], replaced
