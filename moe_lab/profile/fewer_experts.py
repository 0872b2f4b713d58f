"""What an intact model's layers say of fewer experts per token: two questions to them.

How its routers weigh the experts of each token of the calibration text, and how far a layer's
output is from what it was where a token gets only k of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lab.finite import check_number
from moe_lab.models.layers import MoELayer, hidden_of
from moe_lab.models.routers import set_top_k_of
from moe_lab.models.stream import LayerStream, States
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress
from moe_lab.types import UserError

RANDOM_AT_ONCE = 128  # random inputs whose outputs are one matrix of the norm


@dataclass(frozen=True)
class RoutedText:
    """What a layer's router made of all valid tokens of the text, as it gave it to the experts."""

    logits_TE: Tensor
    weight_TK: Tensor
    index_TK: Tensor


def ask_routers(
    profile: Profile,
    num_samples: int | None,
    question: dict[str, Any],
    ask: Callable[[int, RoutedText], dict[str, Any]],
    code: Sequence[object],
) -> dict[int, dict[str, Any]]:
    """What `ask(layer index, its routing)` says (plain values) of each MoE layer on the text.

    Remembered. One pass over the first `num_samples` documents (None: all), of which a layer's
    logits and weights are in memory together. question: what the answers are known by beside the
    sample; code: what `ask` depends on beside this module.
    """

    def work() -> dict[str, dict[str, Any]]:
        stream = profile.open_stream(num_samples)
        states, found = States(stream), {}
        for index in sorted(stream.moe):
            found[str(index)] = ask(index, _routed(stream, states, index))
        return found

    known_by = {**question, "num_samples": num_samples}
    answers: dict[str, dict[str, Any]] = profile.remember(known_by, work, [RoutedText, *code])
    return {int(index): told for index, told in answers.items()}


def _routed(stream: LayerStream, states: States, index: int) -> RoutedText:
    layer = stream.moe[index]
    states.move_to(index)
    parts: list[tuple[Tensor, ...]] = []

    def keep(module: torch.nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        parts.append(tuple(one.reshape(-1, one.shape[-1]) for one in output[:3]))

    handle = layer.router.register_forward_hook(keep)
    try:
        for batch in states.through(index, lambda b, hidden: stream.replay(index, b, hidden)):
            valid = stream.valid[batch].reshape(-1).to(parts[-1][0].device)
            parts[-1] = tuple(one[valid].cpu() for one in parts[-1])
    finally:
        handle.remove()
    return RoutedText(*(torch.cat(some) for some in zip(*parts, strict=True)))


def damage_on_random(profile: Profile, number: int, seed: int) -> dict[int, list[float]]:
    """D_l(k) of each MoE layer l for k = 1 .. K, remembered (LExI 2509.02753).

    The mean of ||y_k - y_K||_F over matrices of RANDOM_AT_ONCE inputs ~ N(0, 1), `number` of them
    in all; y_k the outputs of the layer's MoE block where its router chooses k experts for each
    input, K as many as it does.
    """

    def ask(stream: LayerStream, states: States, index: int) -> list[float]:
        layer = _with_block(stream.moe[index])
        generator = torch.Generator().manual_seed(2**32 * seed + index)
        x_TD = torch.randn(number, layer.info.hidden_size, generator=generator)
        with stream.layer(index):
            reference = layer.experts.down_proj
            parts = x_TD.to(reference.device, reference.dtype).split(RANDOM_AT_ONCE)
            return _mean([_norms(_changes(layer, part)) for part in parts], index)

    question = {"question": "fewer experts/random", "number": number, "seed": seed}
    return _by_layer(profile, 1, question, ask)


def damage_on_text(
    profile: Profile, num_samples: int | None, relative: bool
) -> dict[int, list[float]]:
    """The same on what the intact blocks get of the text's first `num_samples` documents (or all).

    A mean over documents, whose tokens are one matrix each. relative: not of the norm, but of
    ||y_k - y_K||^2 / ||h||^2, a mean over a document's tokens, h the state that leaves the intact
    decoder layer: what each layer adds to the error of the whole, as far as layers do not interact.
    """

    def ask(stream: LayerStream, states: States, index: int) -> list[float]:
        layer, found = _with_block(stream.moe[index]), list[list[float]]()

        def compute(batch: int, hidden: Tensor) -> Tensor:
            with _caught(layer) as caught:
                output = stream.replay(index, batch, hidden)
            every = zip(caught[0].reshape(hidden.shape), output, stream.valid[batch], strict=True)
            for x_LD, h_LD, valid_L in every:
                valid = valid_L.to(x_LD.device)
                changes = _changes(layer, x_LD[valid])
                found.append(_shares(changes, h_LD[valid]) if relative else _norms(changes))
            return output

        states.pass_through(index, compute)
        return _mean(found, index)

    question = {"question": "fewer experts/text", "relative": relative, "num_samples": num_samples}
    return _by_layer(profile, num_samples, question, ask)


def _by_layer(
    profile: Profile,
    num_samples: int | None,
    question: dict[str, Any],
    ask: Callable[[LayerStream, States, int], list[float]],
) -> dict[int, list[float]]:
    """What `ask` says of each MoE layer, remembered."""

    def work() -> dict[str, list[float]]:
        stream = profile.open_stream(num_samples)
        states = States(stream)
        indices = progress(sorted(stream.moe), "fewer experts per token")
        return {str(index): ask(stream, states, index) for index in indices}

    answers: dict[str, list[float]] = profile.remember(question, work, [set_top_k_of])
    return {int(index): damage for index, damage in answers.items()}


def _with_block(layer: MoELayer) -> MoELayer:
    if not layer.has_block:
        raise UserError(
            f"method.rule=lexi runs a layer's MoE block by itself, and {layer.info.family} has its "
            "router and experts in the decoder layer: method.rule=listed, entropy, ratio and top_p "
            "work there"
        )
    return layer


@contextmanager
def _caught(layer: MoELayer) -> Iterator[list[Tensor]]:
    """What the block gets while it is open."""
    caught: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append(args[0] if args else named["hidden_states"])

    handle = layer.block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield caught
    finally:
        handle.remove()


@torch.no_grad()
def _changes(layer: MoELayer, x_TD: Tensor) -> list[Tensor]:
    """y_k - y_K for k = 1 .. K, [T, D] each, in float64."""
    top_k = layer.info.top_k
    try:
        outputs = []
        for number in range(1, top_k + 1):
            set_top_k_of(layer, number)
            outputs.append(hidden_of(layer.block(x_TD[None])).reshape(x_TD.shape).double())
    finally:
        set_top_k_of(layer, top_k)
    return [one - outputs[-1] for one in outputs]


def _norms(changes: Sequence[Tensor]) -> list[float]:
    return [float(change_TD.norm()) for change_TD in changes]


def _shares(changes: Sequence[Tensor], state_TD: Tensor) -> list[float]:
    """Means over tokens of the squared change over the square of the state."""
    square_T = state_TD.double().square().sum(dim=1).clamp(min=1e-300)
    return [float((one_TD.square().sum(dim=1) / square_T).mean()) for one_TD in changes]


def _mean(rows: Sequence[Sequence[float]], index: int) -> list[float]:
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    for number, mean in enumerate(means, start=1):
        check_number(mean, f"layer {index}: the damage of {number} experts per token", index)
    return means
