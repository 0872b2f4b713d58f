"""What each expert of one MoE layer gets: its tokens' inputs and the router's weights.

The tokens are those that it gets now, behind whatever stands before it. They are noted batch by
batch in the stream's cache, so that what is summed of one expert needs memory for one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.models.experts import expert_hidden, expert_output, expert_parameters, scales_input
from moe_lab.models.layers import MoELayer
from moe_lab.models.refitting import handing
from moe_lab.models.stream import States, check_state
from moe_lab.profile.grams import weights_of_states

NOTED_OF_TOKENS = ("x", "place", "weight", "weighs")


class OfExpert(NamedTuple):
    """One expert's tokens: what it is handed [n, D], the router's weights [n], rows in all [n].

    Where the router's weight multiplies the input, it is in x_ND, and gate_N is 1.
    """

    x_ND: Tensor
    gate_N: Tensor
    row_N: Tensor


class RoutedTokens:
    """The valid tokens of a stream at one MoE layer, whose weights are in memory.

    states: those before the layer. token_weight: what each token weighs in sums, by
    `grams.TOKEN_WEIGHTS`: output, 1 / mean square of the state that leaves the decoder layer.
    """

    @torch.no_grad()
    def __init__(self, layer: MoELayer, states: States, token_weight: str = "none"):
        self.layer, self.stream = layer, states.stream
        self._rows = [0]
        for batch in range(self.stream.num_batches):
            self._note(batch, states, token_weight)

    def _note(self, batch: int, states: States, token_weight: str) -> None:
        index, valid = self.layer.info.index, self.stream.valid[batch]
        with handing(self.layer) as catching:
            leaving = self.stream.replay(index, batch, states[batch])
        check_state(leaving[valid] if leaving.shape[:2] == valid.shape else leaving, index)
        handed, flat = catching.taken(), valid.reshape(-1)
        noted = {
            "x": handed.x_TD[flat], "place": handed.place_TK[flat],
            "weight": handed.weight_TK[flat],
            "weighs": weights_of_states(leaving.reshape(len(flat), -1)[flat], token_weight),
        }  # fmt: skip
        for name, tensor in noted.items():
            self.stream.cache["routed tokens", name, batch] = tensor
        self._rows.append(self._rows[-1] + int(flat.sum()))

    def close(self) -> None:
        """Forget what was noted."""
        for batch in range(self.stream.num_batches):
            for name in NOTED_OF_TOKENS:
                self.stream.cache.pop(("routed tokens", name, batch))

    @property
    def num_tokens(self) -> int:
        """All of them, whichever expert they get."""
        return self._rows[-1]

    def weighs(self) -> Tensor:
        """What each token weighs in sums [T]."""
        return torch.cat([self._get("weighs", b) for b in range(self.stream.num_batches)])

    def of(self, expert: int) -> OfExpert:
        """The tokens of one expert, by its place in the experts module."""
        return OfExpert(*(torch.cat(some) for some in zip(*self.parts(expert), strict=True)))

    @torch.no_grad()
    def parts(self, expert: int) -> Iterator[OfExpert]:
        """The same batch by batch."""
        for batch in range(self.stream.num_batches):
            yield self._of(expert, batch)

    def _of(self, expert: int, batch: int) -> OfExpert:
        chosen_TK = self._get("place", batch) == expert
        rows = chosen_TK.any(dim=1).nonzero()[:, 0]
        gate_N = (self._get("weight", batch) * chosen_TK)[rows].sum(dim=1)
        x_ND = self._get("x", batch)[rows]
        if scales_input(self.layer.experts):
            x_ND, gate_N = x_ND * gate_N[:, None], torch.ones_like(gate_N)
        return OfExpert(x_ND, gate_N, rows + self._rows[batch])

    def _get(self, name: str, batch: int) -> Tensor:
        return self.stream.cache["routed tokens", name, batch]

    @torch.no_grad()
    def hidden(self, expert: int, given: OfExpert) -> Tensor:
        """What the expert's hidden units compute of its tokens [n, I], as it stands now."""
        experts = self.layer.experts
        return expert_hidden(experts, expert_parameters(experts)[expert], given.x_ND)

    @torch.no_grad()
    def added(self, expert: int, given: OfExpert) -> Tensor:
        """What the expert adds to its tokens [n, D]: its output times the router's weight."""
        experts = self.layer.experts
        h_NI = self.hidden(expert, given)
        y_ND = expert_output(experts, expert_parameters(experts)[expert], h_NI)
        exact = torch.promote_types(y_ND.dtype, torch.float32)
        return y_ND.to(exact) * given.gate_N.to(exact)[:, None]
