"""What the gradient of the model's loss says of the hidden units of each expert."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.models.backward import Backward, LossLabels, OutputGradients
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.stream import LayerStream
from moe_lab.profile.hidden import hidden_by_expert
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NeuronGradients:
    """Sums of one MoE layer over the tokens routed to each expert, float64.

    With a unit's activation a_t, its column w of the down projection and the gradient u_t of the
    loss at its expert's output, u_t . w is the loss's gradient at the activation. count [E], of
    tokens; of each hidden unit [E, I]: hidden_square_sum, of a_t^2; gradient_square_sum, of
    (u_t . w)^2; product_square_sum, of (a_t (u_t . w))^2; document_square_sum, over the samples of
    the calibration set, of the square of the sum of a_t (u_t . w) over the sample's tokens. Of
    several losses all these are the mean.
    """

    count: Tensor
    hidden_square_sum: Tensor
    gradient_square_sum: Tensor
    product_square_sum: Tensor
    document_square_sum: Tensor


def neuron_gradients(
    profile: Profile, labels: LossLabels, num_samples: int | None
) -> list[NeuronGradients]:
    """Those of every MoE layer in order, on the first so many samples (None: all of them).

    One pass backwards gives all of them; it is remembered, so that every plan that asks shares it.
    """
    drawn = dataclasses.asdict(labels) if labels.kind == "sampled" else {"kind": labels.kind}
    question = {"question": "gradients at neurons", "labels": drawn, "num_samples": num_samples}
    found = profile.by_layer(
        question, lambda: _measured(profile.open_stream(num_samples), labels), [neuron_gradients]
    )
    return [NeuronGradients(**one) for one in found]


@torch.no_grad()
def _measured(stream: LayerStream, labels: LossLabels) -> dict[int, dict[str, Tensor]]:
    """The sums of each MoE layer, by layer index."""
    check_plain(stream)
    backward = Backward(stream, labels)
    steps = len(stream.moe) * stream.num_batches
    found = {index: _nothing(layer.info) for index, layer in stream.moe.items()}
    for given in progress(backward.outputs(), "gradients", steps):
        sums = found[given.index]
        for expert, h_NI, slopes, document_N in _by_expert(stream, given, sums):
            sums["hidden_square_sum"][expert] += _summed(h_NI.square())
            for slope_NI in slopes:
                product_NI = h_NI * slope_NI
                of_documents_I = _document_squares(product_NI, document_N)
                sums["gradient_square_sum"][expert] += _summed(slope_NI.square()) / labels.draws
                sums["product_square_sum"][expert] += _summed(product_NI.square()) / labels.draws
                sums["document_square_sum"][expert] += of_documents_I / labels.draws
    return found


def check_plain(stream: LayerStream) -> None:
    """Refuse experts whose output is no sum over their hidden units."""
    for index, layer in stream.moe.items():
        if layer.experts.has_post_expert_norm:
            raise UserError(
                f"layer {index}: a norm stands behind each expert, so that its output is no sum "
                "over hidden units: choose a metric of statistics, such as metric=energy"
            )


def _nothing(info: LayerInfo) -> dict[str, Tensor]:
    shape = info.num_experts, info.expert_width
    names = [one.name for one in dataclasses.fields(NeuronGradients)]
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in names}
    return sums | {"count": torch.zeros(info.num_experts, dtype=torch.float64)}


def _by_expert(
    stream: LayerStream, given: OutputGradients, sums: dict[str, Tensor]
) -> Iterator[tuple[int, Tensor, list[Tensor], Tensor]]:
    """Of each expert with tokens: hidden units [n, I], for each loss u . w [n, I], document [n]."""
    columns_EID = HiddenUnits(stream.moe[given.index].experts).down_columns()
    document_T = stream.valid[given.batch].nonzero()[:, 0]
    counts = torch.bincount(given.routing.expert_S, minlength=len(columns_EID)).cpu()
    sums["count"] += counts
    split = [u_SD.split(counts.tolist()) for u_SD in given.of_draw]
    for expert, h_NI, _, token_N in hidden_by_expert(given.routing, len(columns_EID)):
        exact = split[0][expert].dtype
        column_DI = columns_EID[expert].to(exact).T
        slopes = [of_draw[expert] @ column_DI for of_draw in split]
        yield expert, h_NI.to(exact), slopes, document_T[token_N]


def _document_squares(product_NI: Tensor, document_N: Tensor) -> Tensor:
    """Sum over documents of the square of each one's sum [I]."""
    documents, place_N = document_N.unique(return_inverse=True)
    sum_BI = product_NI.new_zeros(len(documents), product_NI.shape[1])
    return _summed(sum_BI.index_add_(0, place_N, product_NI).square())


def _summed(value_NI: Tensor) -> Tensor:
    return value_NI.sum(dim=0, dtype=torch.float64).cpu()
