"""A model's decoder layers, one at a time, over a calibration set.

Each decoder layer is replayed alone on cached hidden states with the keyword arguments that the
model itself would give it (masks may differ from layer to layer, as in gpt_oss): what a search
changes in one layer costs that layer, not a pass through the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_lab.moe import MoELayer, moe_layers, set_block
from moe_lab.types import UserError


class LayerStream:
    """The decoder layers of a model over fixed batches.

    hidden: per batch the input [B, L, D] of the first decoder layer. valid: per batch [B, L] bool.
    token_weight: per batch [tokens]; each valid token's share in a mean over tokens of a document
    and then over documents, so that long documents count as much as short ones.
    """

    def __init__(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]):
        self.model = model
        self.moe: dict[int, MoELayer] = {layer.info.index: layer for layer in moe_layers(model)}
        self.layers = _decoder_layers(model, self.moe)
        self.hidden: list[Tensor] = []
        self.arguments: list[list[dict]] = []
        self.valid: list[Tensor] = []
        self.token_weight: list[Tensor] = []
        for batch in batches:
            self._catch(batch)
        num_documents = sum(len(valid) for valid in self.valid)
        for valid in self.valid:
            lengths = valid.sum(dim=1, keepdim=True).clamp(min=1)
            share = (valid / lengths / num_documents)[valid]
            self.token_weight.append(share.double())

    def _catch(self, batch: dict[str, Tensor]) -> None:
        """Run the model with every decoder layer replaced by one that notes what it is given."""
        caught: list[dict] = []

        def note(hidden: Tensor, **arguments: object) -> Tensor:
            if not caught:
                self.hidden.append(hidden)
            arguments |= {"past_key_values": None, "use_cache": False}
            caught.append(arguments)
            return hidden

        with torch.no_grad(), _forwards(self.layers, note):
            self.model.base_model(**batch, use_cache=False)
        self.arguments.append(caught)
        self.valid.append(batch["attention_mask"].bool())

    def replay(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The output [B, L, D] of decoder layer `index` on `hidden`."""
        output = self.layers[index](hidden, **self.arguments[batch][index])
        return output[0] if isinstance(output, tuple) else output

    def finish(self, hidden: Tensor) -> Tensor:
        """The last hidden state: what follows the last decoder layer, before the head."""
        return _final_norm(self.model)(hidden)

    def replay_open(self, index: int, batch: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replay an MoE layer, opened: valid tokens of (output, rest, block input), each [T, D].

        rest is the layer's output with an empty MoE block, so that output = rest + block(input).
        Raises UserError for families whose layers do more than add the block's output.
        """
        layer, valid = self.moe[index], self.valid[batch]
        caught: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: tuple, output: object) -> None:
            caught["x"] = args[0]
            caught["y"] = output[0] if isinstance(output, tuple) else output

        def empty(module: nn.Module, args: tuple, output: object) -> object:
            if isinstance(output, tuple):
                return (torch.zeros_like(output[0]), *output[1:])
            return torch.zeros_like(output)

        with _hook(layer.block, keep):
            output = self.replay(index, batch, hidden)
        with _hook(layer.block, empty):
            rest = self.replay(index, batch, hidden)
        tolerance = 1e-2 if output.dtype != torch.float32 else 1e-4
        if not torch.allclose(rest + caught["y"], output, rtol=tolerance, atol=tolerance):
            raise UserError(
                f"{type(layer.decoder).__name__} does more with its MoE block's output than add "
                "it: greedy expert search is not available for this family; name the experts with "
                "condense.experts=[...]"
            )
        return output[valid], rest[valid], caught["x"].reshape(output.shape)[valid]


@contextmanager
def swapped(stream: LayerStream, index: int, block: nn.Module) -> Iterator[None]:
    """Put another block in the place of a layer's MoE block for a while."""
    name = stream.moe[index].info.name
    previous = set_block(stream.model, name, block)
    try:
        yield
    finally:
        set_block(stream.model, name, previous)


def _decoder_layers(model: nn.Module, moe: dict[int, MoELayer]) -> nn.ModuleList:
    if not moe:
        raise UserError(f"{type(model).__name__} has no MoE layers")
    name = next(iter(moe.values())).info.name
    index = str(next(iter(moe)))
    path = name[: name.index(f".{index}.")]
    return model.get_submodule(path)


def _final_norm(model: nn.Module) -> nn.Module:
    norms = [m for _, m in model.base_model.named_children() if "Norm" in type(m).__name__]
    if len(norms) != 1:
        raise UserError(f"{type(model).__name__} has {len(norms)} final norms, expected one")
    return norms[0]


@contextmanager
def _forwards(layers: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    layers = list(layers)
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _hook(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
