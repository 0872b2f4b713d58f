"""The mean of a layer's experts, element by element, weighted by how much the loss heeds each.

D2-MoE (2502.17298) has its base so: W = sum_e F_e f_e W_e / sum_e F_e f_e, F the diagonal of the
empirical Fisher information (the squared gradient of the loss, summed over documents), f how often
an expert is chosen. Only the mean leaves a layer: F itself is as large as the experts.
Letters: E experts, O outputs, N inputs, S pairs of a token and an expert; see `types.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_lab.models.backward import Backward, LossLabels, OutputGradients
from moe_lab.models.factorized import stacked
from moe_lab.models.layers import MoELayer
from moe_lab.models.stream import LayerStream
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress

Stacks = dict[str, Tensor]  # by "gate", "up", "down"


def fisher_means(profile: Profile, num_samples: int | None) -> dict[int, Stacks]:
    """The means [O, N] of every MoE layer's gate, up and down projections, by its index, float64.

    On the first so many samples (None: all). An element to which no document's loss says anything
    has the mean by frequency alone, and where no expert was chosen the plain one.
    """
    question = {"question": "means by Fisher information", "num_samples": num_samples}
    indices = [one.info.index for one in profile.statistics]
    found = profile.by_layer(
        question, lambda: _measured(profile.open_stream(num_samples)), [fisher_means]
    )
    return dict(zip(indices, found, strict=True))


def _measured(stream: LayerStream) -> dict[int, Stacks]:
    backward = Backward(stream, LossLabels())
    steps = len(stream.moe) * stream.num_batches
    found: dict[int, Stacks] = {}
    sums: _Sums | None = None
    for given in progress(backward.outputs(), "Fisher information", steps):
        layer = stream.moe[given.index]
        if given.batch == 0:
            sums = _Sums(layer)
        assert sums is not None
        sums.add(layer, given, stream.valid[given.batch].nonzero()[:, 0])
        if given.batch == stream.num_batches - 1:  # while the layer's weights are in memory
            found[given.index] = sums.means(layer)
    return found


class _Sums:
    """Squared gradients of the matrices of one layer, and how many tokens each expert got."""

    def __init__(self, layer: MoELayer):
        weights = {name: one.detach() for name, one in stacked(layer.experts).items()}
        self.squares = {
            name: torch.zeros_like(one, dtype=torch.float64) for name, one in weights.items()
        }
        self.count = torch.zeros(layer.info.num_experts, dtype=torch.float64)

    def add(self, layer: MoELayer, given: OutputGradients, document_T: Tensor) -> None:
        """One batch; document_T: of which document each of its tokens is."""
        routing, [u_SD] = given.routing, given.of_draw
        counts = torch.bincount(routing.expert_S, minlength=layer.info.num_experts)
        self.count += counts.cpu()
        split = counts.tolist()
        for expert, (u_ND, token_N) in enumerate(
            zip(u_SD.split(split), routing.token_S.split(split), strict=True)
        ):
            if len(u_ND):
                pairs = gradients(layer, expert, routing.x_TD[token_N], u_ND)
                self._add(expert, pairs, document_T[token_N])

    def _add(
        self, expert: int, pairs: dict[str, tuple[Tensor, Tensor]], document_N: Tensor
    ) -> None:
        for document in document_N.unique():
            of_it = document_N == document
            for name, (slope_NO, x_NN) in pairs.items():
                gradient_ON = slope_NO[of_it].T @ x_NN[of_it]
                self.squares[name][expert] += gradient_ON.double().square()

    def means(self, layer: MoELayer) -> Stacks:
        """The weighted means, on the CPU."""
        found = {}
        for name, weight_EON in stacked(layer.experts).items():
            weight_EON = weight_EON.detach().double()
            share_E11 = self.count.to(weight_EON)[:, None, None]
            if not bool(share_E11.any()):
                share_E11 = torch.ones_like(share_E11)
            plain_ON = (share_E11 * weight_EON).sum(dim=0) / share_E11.sum()
            heed_EON = self.squares[name] * share_E11
            total_ON = heed_EON.sum(dim=0)
            mean_ON = (heed_EON * weight_EON).sum(dim=0) / total_ON
            found[name] = torch.where(total_ON > 0, mean_ON, plain_ON).cpu()
        return found


@torch.enable_grad()
def gradients(
    layer: MoELayer, expert: int, x_ND: Tensor, u_ND: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """The slopes at a matrix's outputs and its inputs, by matrix; the gradient is slope^T input.

    u_ND: the loss's gradient at the expert's output before the router's weight.
    """
    gate_IN, up_IN, down_ON = _of_expert(layer, expert, u_ND.dtype)
    x_ND = x_ND.to(u_ND)
    gate_NI = (x_ND @ gate_IN.T).requires_grad_()
    up_NI = (x_ND @ up_IN.T).requires_grad_()
    h_NI = layer.experts.act_fn(gate_NI) * up_NI
    of_gate_NI, of_up_NI = torch.autograd.grad(h_NI, [gate_NI, up_NI], u_ND @ down_ON)
    return {"gate": (of_gate_NI, x_ND), "up": (of_up_NI, x_ND), "down": (u_ND, h_NI.detach())}


def _of_expert(layer: MoELayer, expert: int, dtype: torch.dtype) -> Iterator[Tensor]:
    return (one[expert].detach().to(dtype) for one in stacked(layer.experts).values())
