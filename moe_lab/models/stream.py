"""A model's decoder layers, one at a time, over a calibration set.

Each decoder layer is replayed alone on cached hidden states with the keyword arguments that the
model itself would give it (masks may differ from layer to layer, as in gpt_oss): what a search
changes in one layer costs that layer, not a pass through the whole model. Weights may come layer
by layer from disk, and cached states go to disk where they outgrow the memory given to them.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.activations import Activations
from moe_lab.models.editing import NoMLP, set_block
from moe_lab.models.handed_on import Decoders, HandedOn, forwards
from moe_lab.models.layers import MoELayer, Output, hidden_of, moe_layers
from moe_lab.models.layerwise import LayerSource, decoder_layers
from moe_lab.types import NotFinite, UserError

GREEDY_SEARCH = (
    "layers cannot be chosen by a greedy search in this family; name them (condense.layers=[...]) "
    "or choose them by statistics (condense.layers=cosine)"
)

ARGUMENT_BYTES = 256 * 2**20  # of masks and positions that are kept for all layers


class LayerStream:
    """The decoder layers of a model over fixed batches.

    source: a model in memory, or one whose decoder layers come from disk when they are used.
    cache: where hidden states are kept; ("input", batch) holds what the first decoder layer gets,
    [B, L, D]. valid: per batch [B, L] bool. token_weight: per batch [tokens]; each valid token's
    share in a mean over tokens of a document and then over documents, so that long documents count
    as much as short ones. input_ids: per batch [B, L]. positions: where the samples of the batches,
    in their order, stand in the calibration set; unless it is given, as they come.
    """

    def __init__(
        self,
        source: PreTrainedModel | LayerSource,
        batches: Iterable[Mapping[str, Tensor]],
        cache: Activations | None = None,
        positions: Sequence[int] | None = None,
    ):
        self.model = source if isinstance(source, PreTrainedModel) else source.model
        self._opener = None if isinstance(source, PreTrainedModel) else source.layer
        self.cache = cache or Activations(limit=2**63)
        self.moe: dict[int, MoELayer] = {
            layer.info.index: layer for layer in moe_layers(self.model)
        }
        path, self.layers = decoder_layers(self.model)
        self._text_model = self.model.get_submodule(path.rpartition(".")[0])
        self._batches: list[Mapping[str, Tensor]] = []
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self._arguments_left = ARGUMENT_BYTES
        self.handed: HandedOn | None = None
        self._last: tuple[int, list[dict[str, Any]]] | None = None
        self._carried: dict[int, dict[str, Any]] = {}
        self.valid: list[Tensor] = []
        self.input_ids: list[Tensor] = []
        self.token_weight: list[Tensor] = []
        for batch in batches:
            self._catch(batch)
        num_documents = sum(len(valid) for valid in self.valid)
        self.positions = list(range(num_documents) if positions is None else positions)
        for valid in self.valid:
            lengths = valid.sum(dim=1, keepdim=True).clamp(min=1)
            share = (valid / lengths / num_documents)[valid]
            self.token_weight.append(share.double())

    def documents(self, batch: int) -> list[int]:
        """Where the documents of a batch, in its order, stand in the calibration set, [B]."""
        first = sum(len(valid) for valid in self.valid[:batch])
        return self.positions[first : first + len(self.valid[batch])]

    def are_of(self, documents: Collection[int], batch: int) -> Tensor:
        """Whether each valid token of a batch [tokens] is of one of these documents."""
        valid = self.valid[batch]
        of_batch = [place in documents for place in self.documents(batch)]
        return torch.tensor(of_batch, device=valid.device)[:, None].expand(valid.shape)[valid]

    def state_bytes(self) -> int:
        """Size of one hidden state of every token of the calibration set, padding included."""
        hidden = self.cache["input", 0]
        tokens = sum(valid.numel() for valid in self.valid)
        return tokens * hidden.shape[-1] * max(4, hidden.element_size())

    @property
    def num_batches(self) -> int:
        """How many batches the calibration set has."""
        return len(self.valid)

    def layer(
        self, index: int, then: int | None = None
    ) -> AbstractContextManager[nn.Module | None]:
        """Keeps the weights of decoder layer `index` in memory while it is open.

        then: the layer that is opened next, as far as is known; it may be read meanwhile.
        """
        return self._opener(index, then) if self._opener else nullcontext()

    def _catch(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model with every decoder layer replaced by one that notes what it is given."""
        decoders = Decoders(self.model, self.layers, self.layer)
        if self.handed is None:
            self.handed = HandedOn.found(decoders, batch)
        first, caught = self.handed.caught(decoders, batch)
        self.cache["input", len(self.valid)] = first
        self._keep_arguments(len(self.valid), caught)
        self._batches.append(batch)
        self.input_ids.append(batch["input_ids"])
        self.valid.append(batch["attention_mask"].bool())

    def _keep_arguments(self, batch: int, caught: list[dict[str, Any]]) -> None:
        size = sum({one.data_ptr(): one.nbytes for one in _tensors(caught)}.values())
        if size <= self._arguments_left:
            self._arguments_left -= size
            self._arguments[batch] = caught

    def _arguments_of(self, batch: int) -> list[dict[str, Any]]:
        """What each decoder layer is given beside the hidden state: kept, or computed again.

        Masks are as large as the square of a document's length where there are any; then those of
        the last batch are all that memory holds beyond ARGUMENT_BYTES.
        """
        if batch in self._arguments:
            return self._arguments[batch]
        if self._last is None or self._last[0] != batch:
            self._last = None  # not two at once
            assert self.handed is not None
            with _unwatched(self.layers):
                decoders = Decoders(self.model, self.layers, self.layer)
                self._last = batch, self.handed.caught(decoders, self._batches[batch])[1]
        return self._last[1]

    def carried(self, batch: int) -> dict[str, Any]:
        """What the last layer that was replayed handed on beside the hidden state, by argument."""
        return self._carried.get(batch, {})

    def carry(self, batch: int, values: dict[str, Any]) -> None:
        """Set what `carried` gives: what the next layer is handed beside the hidden state."""
        self._carried[batch] = values

    def replay(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The output [B, L, D] of decoder layer `index` (which is open) on `hidden`."""
        arguments = self._arguments_of(batch)[index]
        assert self.handed is not None
        if self.handed.names and index:
            arguments = arguments | self._carried[batch]
        output: Output = self.layers[index](hidden, **arguments)
        self._carried[batch] = self.handed.taken(output, self.layers[index])
        return hidden_of(output)

    def finish(self, hidden: Tensor) -> Tensor:
        """The last hidden state: what follows the last decoder layer, before the head."""
        state: Tensor = _final_norm(self._text_model)(hidden)
        return state

    def targets(self, batch: int) -> Tensor:
        """Where a token and its next one are data, [B, L] bool: never a document's last token."""
        valid = self.valid[batch]
        return valid & nn.functional.pad(valid[:, 1:], (0, 1))

    def next_token_loss(self, batch: int, hidden: Tensor) -> tuple[float, int]:
        """Sum of the cross entropy in nats over the targets of a batch, and their number.

        hidden: the last decoder layer's output [B, L, D].
        """
        predicts = self.targets(batch)
        labels = self.input_ids[batch][predicts.roll(1, dims=1)]
        logits_NV = self.logits_of(hidden[predicts], self.input_ids[batch][predicts]).float()
        loss = nn.functional.cross_entropy(logits_NV, labels, reduction="none")
        return loss.sum(dtype=torch.float64).item(), len(labels)

    def logits_of(self, hidden_ND: Tensor, ids_N: Tensor) -> Tensor:
        """The model's logits [N, V] at N positions, which need not be of one document.

        hidden_ND: the last decoder layer's output there; ids_N: the tokens. What a model does
        behind its decoder layers (norm, head, scaling, soft-capping) it does at each position
        alone, so each is a document of one token here.
        """
        return self._head(hidden_ND[:, None], ids_N[:, None], torch.ones_like(ids_N[:, None]))[:, 0]

    def logits(self, batch: int, hidden: Tensor) -> Tensor:
        """The model's logits [B, L, V]; hidden: the last decoder layer's output [B, L, D]."""
        return self._head(hidden, self.input_ids[batch], self.valid[batch].long())

    def _head(self, hidden: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The whole model, whose decoder layers all give `hidden` [B, L, D]."""
        assert self.handed is not None
        output = self.handed.like(hidden)
        with forwards(self.layers, lambda *_, **arguments: output):
            inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def replay_open(self, index: int, batch: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replay an MoE layer, opened: (output [B, L, D], rest [T, D], block input [T, D]).

        rest is the layer's output with an empty MoE block, so that output = rest + block(input);
        rest and input hold the valid tokens only. Raises UserError for families whose layers do
        more than add the block's output.
        """
        layer, valid = self.moe[index], self.valid[batch]
        caught: dict[str, Any] = {}

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Output) -> None:
            caught["x"] = args[0]
            caught["y"] = hidden_of(output)

            caught["pair"] = isinstance(output, tuple)

        with _hook(layer.block, keep):
            output = self.replay(index, batch, hidden)
        with swapped(self, index, NoMLP(pair=caught.pop("pair"))):
            rest = self.replay(index, batch, hidden)
        tolerance = 1e-2 if output.dtype != torch.float32 else 1e-4
        adds = caught["y"].numel() == output.numel() and torch.allclose(
            rest + caught["y"].reshape(output.shape), output, rtol=tolerance, atol=tolerance
        )
        if not adds:
            check_state(output, index)
            raise UserError(
                f"{type(layer.decoder).__name__} does more with its MoE block's output than add "
                "it: greedy expert search is not available for this family; name the experts with "
                "condense.experts=[...]"
            )
        return output, rest[valid], caught["x"].reshape(output.shape)[valid]

    def check_hidden_alone(self, consequence: str = GREEDY_SEARCH) -> None:
        """Refuse what cannot be done where a layer hands on more than the hidden state.

        consequence: what that is, and what to ask for; by default a search over layers.
        """
        if self.handed is not None and any(self.handed.names):
            raise UserError(
                f"{type(self.layers[0]).__name__} hands on more than the hidden state "
                f"({', '.join(name for name in self.handed.names if name)}), which depends on the "
                f"layers before it: {consequence}"
            )


def check_state(hidden: Tensor, index: int) -> None:
    """Refuse a hidden state at a decoder layer that is not finite, whatever else is wrong."""
    if not bool(hidden.isfinite().all()):
        raise NotFinite(f"layer {index}: the hidden state is not finite", index)


class States:
    """The hidden states before one decoder layer, moving forward through the layers once.

    They begin as what the first decoder layer gets, and lie in the stream's cache; the stream's own
    input stays. name: tells two apart that move along one stream, such as an intact model's and
    those behind layers that are compressed already.
    """

    def __init__(self, stream: LayerStream, name: str = "moving"):
        self.stream, self.name = stream, name
        self._next = 0  # the decoder layer whose input is known

    def __getitem__(self, batch: int) -> Tensor:
        """The states [B, L, D] of one batch."""
        return self.stream.cache[self.name if self._next else "input", batch]

    def move_to(self, index: int) -> None:
        """Go by plain replay to what decoder layer `index` gets; there is no way back."""
        if index < self._next:
            raise ValueError(f"decoder layer {index} was passed already: {self._next} comes next")
        for before in range(self._next, index):
            self._pass(before, functools.partial(self.stream.replay, before))

    def pass_through(self, index: int, compute: Callable[[int, Tensor], Tensor]) -> None:
        """Go to decoder layer `index`, and behind it with what `compute` gives.

        compute(batch, hidden): the output [B, L, D] of layer `index`, whose weights are in memory.
        """
        self.move_to(index)
        self._pass(index, compute)

    def _pass(self, index: int, compute: Callable[[int, Tensor], Tensor]) -> None:
        for _ in self.through(index, compute):
            pass

    def through(self, index: int, compute: Callable[[int, Tensor], Tensor]) -> Iterator[int]:
        """Go behind decoder layer `index`, which comes next, with a stop after each batch.

        Gives the batch's number, while the layer's weights are in memory. Whoever does not go on to
        the last batch leaves states that are of no layer.
        """
        with self.stream.layer(index):
            for batch in range(self.stream.num_batches):
                with torch.no_grad():
                    self.stream.cache[self.name, batch] = compute(batch, self[batch])
                yield batch
        self._next = index + 1


@contextmanager
def swapped(stream: LayerStream, index: int, block: nn.Module | None) -> Iterator[None]:
    """Put another block in the place of a layer's MoE block for a while; None changes nothing."""
    if block is None:
        yield
        return
    name = stream.moe[index].info.name
    previous = set_block(stream.model, name, block)
    try:
        yield
    finally:
        set_block(stream.model, name, previous)


def _final_norm(text_model: nn.Module) -> nn.Module:
    norms = [m for _, m in text_model.named_children() if "Norm" in type(m).__name__]
    if len(norms) != 1:
        raise UserError(f"{type(text_model).__name__} has {len(norms)} final norms, expected one")
    return norms[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a structure of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


@contextmanager
def _unwatched(layers: Iterable[nn.Module]) -> Iterator[None]:
    """While open, no hook of these layers is called."""
    kept = [(layer, layer._forward_pre_hooks, layer._forward_hooks) for layer in layers]
    for layer, _, _ in kept:
        layer._forward_pre_hooks, layer._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for layer, before, behind in kept:
            layer._forward_pre_hooks, layer._forward_hooks = before, behind


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
