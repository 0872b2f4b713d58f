"""The values that pass between the rooms: frozen, and made to be read.

Shape suffixes used throughout moe_lab:
    T tokens (valid ones only)    D hidden size          E routed experts
    K experts chosen per token    S = T*K token-expert pairs, sorted by expert
    I width of one expert         W width of a dense MLP  B sequences  L length
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


class UserError(ValueError):
    """A request that cannot be met: says what was asked, what is possible, how to ask for it."""


class NotFinite(UserError):
    """A number that is NaN or infinite where one has to be known: says where it showed first.

    layer: the true index of the decoder layer where it did, None where that is not known.
    """

    def __init__(self, message: str, layer: int | None = None):
        super().__init__(message)
        self.layer = layer


@dataclass(frozen=True)
class LayerInfo:
    """What one MoE layer is, without its weights.

    index: the decoder layer's true index in the model (dense layers counted);
    name: path of the MoE block in the model; groups, groups_used: of group-limited routers
    (1, 1 elsewhere); shared: whether shared experts stand beside the routed ones; obstacle: why
    the layer cannot become one dense gated MLP, None where it can. shared_width, expert_width:
    hidden units of the shared part (all shared experts together) and of one routed expert;
    num_decoders: decoder layers of the model, dense ones counted; family: its model type.
    expert_parameters, expert_bytes: what goes with one routed expert (weights, biases, its router
    row and whatever else is indexed by expert); model_parameters, model_bytes: of the whole model,
    tied ones once. Bytes are those of the model at hand; in `Checkpoint.layers()`, of its files.
    num_experts counts the router's rows: what a token can be sent to. real_experts: how many
    experts there are where rows lead to stand-ins or share an expert, 0 where each row has its own.
    zero_experts: rows of the router behind these that copy what the block gets: never removed.
    neuron_parameters, neuron_bytes: what goes with one hidden unit of an expert; those of the
    shared experts, 0 where it is not known what these are made of.
    """

    index: int
    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    shared: bool = False
    groups: int = 1
    groups_used: int = 1
    obstacle: str | None = None
    shared_width: int = 0
    expert_width: int = 0
    num_decoders: int = 0
    family: str = ""
    expert_parameters: int = 0
    expert_bytes: int = 0
    model_parameters: int = 0
    model_bytes: int = 0
    real_experts: int = 0
    zero_experts: int = 0
    neuron_parameters: int = 0
    neuron_bytes: int = 0
    shared_neuron_parameters: int = 0
    shared_neuron_bytes: int = 0

    @property
    def items(self) -> str:
        """What messages call what a ratio counts of the layer."""
        return "experts"

    @property
    def floors(self) -> int:
        """How many times a ratio's floor a layer keeps at least."""
        return 1

    @property
    def num_rows(self) -> int:
        """Rows of the router, zero experts counted."""
        return self.num_experts + self.zero_experts


@dataclass(frozen=True)
class Routing:
    """One batch at one MoE layer, valid tokens only.

    x_TD: input of the MoE block; logits_TE: the router's; index_TK, weight_TK: exactly what the
    router hands to the experts. The chosen experts' outputs before their weights lie sorted by
    expert: y_SD, with expert_S, token_S (row in x_TD) and weight_S beside it.
    shared_gate_T: the sigmoid gate of the shared expert, None where it has none. Around the block:
    entering_TD and leaving_TD, input and output of the decoder layer; residual_TD, the state to
    which the MoE sublayer (norm and block) adds; routed_TD, what the routed experts add to it.
    Only where they were asked for: hidden_SI, what the hidden units of the chosen experts compute,
    beside y_SD; shared_hidden_TI, the same of the shared experts, None where that is not known.
    """

    x_TD: Tensor
    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    y_SD: Tensor
    expert_S: Tensor
    token_S: Tensor
    weight_S: Tensor
    shared_gate_T: Tensor | None = None
    entering_TD: Tensor | None = None
    residual_TD: Tensor | None = None
    leaving_TD: Tensor | None = None
    routed_TD: Tensor | None = None
    hidden_SI: Tensor | None = None
    shared_hidden_TI: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """Experts of one layer, or layers, in order of choice.

    divergence: after each choice, where the search looked at it; for experts the first one is that
    of the layer with no routed expert at all. For greedy_ppl it is a perplexity.
    """

    chosen: tuple[int, ...]
    divergence: tuple[float, ...] = ()


AlignName = Literal["none", "weights", "activations", "both"]
RouterName = Literal["all", "dominant", "mean", "sum"]
SkipName = Literal["ratio", "weight", "entropy", "top_p", "first"]
ReplacementName = Literal["nothing", "zero", "constant", "copy"]
MtpName = Literal["prune", "keep", "drop"]
LmHeadName = Literal["auto", "tied", "untied"]
