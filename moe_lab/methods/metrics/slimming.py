"""MoE-Slimming: how much of a block's loss goes with each hidden unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods.metrics.base import Metric
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, hidden_of
from moe_lab.option import Option
from moe_lab.profile.hidden import HiddenStates, hidden_by_expert
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress
from moe_lab.types import Routing

STRENGTH = 0.9  # with which every hidden unit is perturbed
EPSILON = 1e-6


@dataclass(frozen=True)
class Slimming(Metric):
    """First-order attribution of a block's loss to its hidden units, over the layer's sum [E, I].

    MoE-Slimming (2606.18304): an MoE block against its copy whose hidden units are scaled by alpha
    = 0.9; of the relative loss L = ||y^ - y||^2 / (||y||^2 + 1e-6) a unit has s_c = [-dL/dalpha]_+,
    a moving average over batches of 32 documents (0.9 of what was), normalised by layer. Its code
    takes gradients; they have a closed form: with r_t what all routed hidden units give together,
    y^ - y = -(1 - alpha) r, so that s_c = 2 (1 - alpha) [sum_t g_t a_tc <r_t, w_c>]_+ / (||y||^2 +
    1e-6), g the router's weight, a the activation, w_c the column of the down projection.

    Our reading: norms are over all tokens of a batch; batches are in the order of the calibration
    set; the average begins with the first batch; a layer's scores are divided by their sum; shared
    experts are in y and are not perturbed. y is the block's output; where a block scales or
    projects what its experts give, r is taken before that. An expert without tokens has scores of 0
    (noise in its code). Its ranking is ratio=slimming.
    """

    batch: Annotated[int, Option("documents whose loss is one", least=1)] = 32
    momentum: Annotated[float, Option("what stays of the average so far", least=0, below=1)] = 0.9
    num_samples: Annotated[
        int | None, Option("first calibration samples, null for all of them", least=1)
    ] = None

    needs_model = True
    scores_shared = False
    widths = "by_expert"

    def neuron_scores(self, profile: Profile) -> list[Tensor]:
        """A score [E, I] for each layer in order."""

        def work() -> dict[int, dict[str, Tensor]]:
            states = HiddenStates(profile.open_stream(self.num_samples))
            layers = progress(sorted(states.stream.moe), "block losses")
            return {index: {"score": self._averaged(states, index)} for index in layers}

        question = {
            "question": "attribution of block losses", "batch": self.batch,
            "momentum": self.momentum, "num_samples": self.num_samples,
        }  # fmt: skip
        return [one["score"] for one in profile.by_layer(question, work, [Slimming])]

    def _averaged(self, states: HiddenStates, index: int) -> Tensor:
        """The moving average [E, I] of one layer, over its sum."""
        average_EI, *others = attributions(states, index, self.batch).unbind()
        for next_EI in others:
            average_EI = self.momentum * average_EI + (1 - self.momentum) * next_EI
        return average_EI / average_EI.sum().clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def attributions(states: HiddenStates, index: int, batch: int) -> Tensor:
    """[-dL/dalpha]_+ of each hidden unit of a layer for each `batch` documents [G, E, I]."""
    stream, layer = states.stream, states.stream.moe[index]
    group_B = torch.tensor(stream.positions) // batch
    groups, info = int(group_B.max()) + 1, layer.info
    product_GEI = torch.zeros(groups, info.num_experts, info.expert_width, dtype=torch.float64)
    square_G = torch.zeros(groups, dtype=torch.float64)
    row = 0
    with _outputs(layer) as outputs:
        for number, routing in enumerate(states.routings(index)):
            valid = stream.valid[number].cpu()
            group_T = group_B[row : row + len(valid)].repeat_interleave(valid.sum(dim=1))
            row += len(valid)
            y_TD = _block_output(layer, routing, outputs.pop(), valid)
            group_T, square_G, product_GEI = (
                one.to(y_TD.device) for one in (group_T, square_G, product_GEI)
            )
            square_G.index_add_(0, group_T, y_TD.double().square().sum(dim=1))
            _add_products(layer, routing, group_T, product_GEI)
    factor_G = 2 * (1 - STRENGTH) / (square_G + EPSILON)
    return (factor_G[:, None, None] * product_GEI.clamp(min=0)).cpu()


def _block_output(layer: MoELayer, routing: Routing, output: Tensor, valid: Tensor) -> Tensor:
    """What the block gives [T, D]; where it is no module of its own what its routed experts do."""
    if not layer.has_block and routing.routed_TD is not None:
        return routing.routed_TD
    return output.reshape(valid.numel(), -1)[valid.flatten().to(output.device)]


def _add_products(layer: MoELayer, routing: Routing, group_T: Tensor, product_GEI: Tensor) -> None:
    """Add sum_t g_t a_tc <r_t, w_c> of one batch to its documents' groups."""
    columns_EID = HiddenUnits(layer.experts).down_columns()
    exact = torch.promote_types(columns_EID.dtype, torch.float32)
    routed_TD = columns_EID.new_zeros(len(routing.x_TD), columns_EID.shape[2], dtype=exact)
    parts = []
    for expert, h_NI, weight_N, token_N in hidden_by_expert(routing, len(columns_EID)):
        gated_NI = h_NI.to(exact) * weight_N.to(exact)[:, None]
        column_ID = columns_EID[expert].to(exact)
        routed_TD.index_add_(0, token_N, gated_NI @ column_ID)
        parts.append((expert, gated_NI, token_N, column_ID))
    for expert, gated_NI, token_N, column_ID in parts:
        product_NI = gated_NI * (routed_TD[token_N] @ column_ID.T)
        product_GEI[:, expert].index_add_(0, group_T[token_N], product_NI.double())


@contextmanager
def _outputs(layer: MoELayer) -> Iterator[list[Tensor]]:
    """What the block gave last, while it is open."""
    found: list[Tensor] = []
    handle = layer.block.register_forward_hook(
        lambda module, args, output: found.append(hidden_of(output))
    )
    try:
        yield found
    finally:
        handle.remove()
