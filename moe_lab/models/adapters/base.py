"""Families whose MoE layers do not keep the contract of `layers.py`: one file each.

A file is named as transformers' own folder of the family. Its BLOCK is a class derived from the
family's stock MoE block, with a method `adapt_parts(config)` that gives the parts of one block the
contract: what computes stays the stock code, and parameters and their names stay as they are, so
that stock transformers loads what is saved. Experts are derived from `AdaptedExperts` too, and add
what of this their family needs:

    gate_up_proj, down_proj, act_fn      as properties, where the family has them elsewhere
    alone(x, index, weight)              the experts as the family computes them
    indexed_size, places(length, kept)   where a tensor is indexed by expert in another way
    matrices()                           what holds the hidden units, where it is not the first
                                         two; the down projection comes last
    set_matrices(made, width)            the same, taken in again with fewer hidden units
    scales_input                         the router's weight multiplies what the expert gets
    zero_experts                         rows of the router, behind the experts', that copy
    keeps_top_k                          why a token cannot get another number of experts
    obstacle                             why the layer cannot become one dense gated MLP
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moe_lab.lookup import module_in, names_in
from moe_lab.models.experts import Experts
from moe_lab.types import UserError

OUR_PREFIX = "moe_lab"  # how the names of our own ways to compute experts begin
REFUSED = {
    "doge": "its experts are single neurons that product keys retrieve (PEER): it has no routed "
    "feed-forward experts that could be pruned, merged or condensed",
}


class AdaptedExperts(Experts):
    """Mixed in before the stock experts of a family that keeps another contract.

    They compute as the family does; transformers' own implementations know nothing of them.
    """

    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True
    scales_input = False
    zero_experts = 0
    keeps_top_k: str | None = None
    obstacle: str | None = None
    _apply_gate: Any = _default_apply_gate
    _is_expert_parallel = False

    def forward(self, hidden_states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The weighted sum [T, D] of the chosen experts' outputs."""
        if not self.is_ours():
            return self.alone(hidden_states, index_TK, weight_TK)
        compute = ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation]
        out: Tensor = compute(self, hidden_states, index_TK, weight_TK)
        return out

    def is_ours(self) -> bool:
        """Whether it was asked to compute in one of moe_lab's own ways."""
        return str(self.config._experts_implementation).startswith(OUR_PREFIX)

    def alone(self, hidden_states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The same as the family computes it."""
        return super().forward(hidden_states, index_TK, weight_TK)

    @property
    def indexed_size(self) -> int:
        """The size of the dimension of a tensor that is indexed by expert."""
        return len(self.down_proj)

    def places(self, length: int, kept: Sequence[int]) -> list[int]:
        """Where in a dimension of this length, indexed by expert, these experts are."""
        return list(kept)

    def matrices(self) -> dict[str, Tensor]:
        """Views [E, ...] of what holds the experts' hidden units."""
        return {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}

    def set_matrices(self, made: dict[str, Tensor], width: int) -> None:
        """Take in what `matrices` gave, each expert now so wide."""
        for name, tensor in made.items():
            setattr(self, name, nn.Parameter(tensor, getattr(self, name).requires_grad))


def adapt(model: nn.Module) -> None:
    """Let the layers of a model keep the contract, in place, where they do not; idempotent."""
    if not any(_block_for(one) or isinstance(one, AdaptedExperts) for one in model.modules()):
        return
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    config_of: dict[nn.Module, Any] = {}
    for owner in owners:  # outer ones come first: a block gets the config of the innermost
        inside = list(owner.modules())
        blocks = [module for module in inside if _block_for(module)]
        config_of |= dict.fromkeys(blocks, owner.config)
        # Also around what was adapted while it was built, before this owner was.
        if blocks or any(isinstance(module, AdaptedExperts) for module in inside):
            # transformers looks for its decorator in the source of the family's file
            vars(owner)["_can_set_experts_implementation"] = _yes
    for block, config in config_of.items():
        adapted: Any = block
        adapted.__class__ = _block_for(block)
        adapted.adapt_parts(config)


def become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Change the class of a module in place, and set what the new one needs beside."""
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)


def check_supported(model_type: str) -> None:
    """Refuse the families that moe_lab does not compress, with the reason."""
    if model_type in REFUSED:
        raise UserError(f"the family {model_type!r} cannot be compressed: {REFUSED[model_type]}")


def _block_for(module: nn.Module) -> type[nn.Module] | None:
    """The class that adapts a stock MoE block; None for all other modules."""
    kind: Any = type(module)
    return _adapting(kind)


@functools.cache
def _adapting(kind: type[Any]) -> type[nn.Module] | None:
    library, _, rest = kind.__module__.partition(".models.")
    folder = rest.split(".")[0]
    if library != "transformers" or folder not in names_in(__package__):
        return None
    block: type[nn.Module] = module_in(__package__, folder).BLOCK
    return block if kind is block.__bases__[-1] else None


def _yes() -> bool:
    return True
