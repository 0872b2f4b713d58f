"""A checkpoint opened one decoder layer at a time: memory holds what is used, not the model.

With `layers.py`, `observing.py`, `checkpoint.py` and `saving.py` this file knows transformers'
insides: it fills parts of a model without weights by the very function with which
`from_pretrained` fills all of it, so that every family's conversions apply.
By hand: accelerate's own loading and offloading do not know these conversions (in 1.15).
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig

from moe_lab.models.checkpoint import Checkpoint, Original
from moe_lab.models.free_memory import free_memory
from moe_lab.models.layers import decoders_path, module_list, moe_layers, num_parameters
from moe_lab.models.narrowing import fit_implementation
from moe_lab.models.opening import empty_model, no_bars, stored_dtype, text_config
from moe_lab.models.quantised import conversions, quantised_as, quantizer_of, widen
from moe_lab.models.stored import Stored, held_by, model_names
from moe_lab.models.uneven import load_tensors
from moe_lab.models.weight_files import weight_files
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
# Of a layer's size: what has to be free for it to be read ahead. While it is read, tensors of
# experts lie in memory one by one, and joined.
AHEAD = 2.5


class LayerSource(Protocol):
    """A model whose decoder layers can be had one after another.

    model: what is in no decoder layer has its weights; layers: the decoder layers; dtype: in which
    it computes; layer: a decoder layer with its weights, while it is open; see `LayerwiseModel`.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    dtype: torch.dtype

    def layer(
        self, index: int, then: int | None = None, without: Collection[str] = ()
    ) -> AbstractContextManager[nn.Module]: ...


class WholeModel:
    """A model in memory, whose decoder layers are always there."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        _, self.layers = decoder_layers(model)
        self.dtype = model.get_input_embeddings().get_parameter("weight").dtype

    def layer(
        self, index: int, then: int | None = None, without: Collection[str] = ()
    ) -> AbstractContextManager[nn.Module]:
        """Decoder layer `index`."""
        return nullcontext(self.layers[index])


class LayerwiseModel:
    """A model whose decoder layers have weights only inside `layer(index)`.

    model: the embedding, the final norm and the head are filled; the decoder layers are on the
    meta device. path: where the list of these is. keep_bytes: layers stay filled after their use as
    long as they take no more. instead: what is taken for the tensors of these names in the files.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        keep_bytes: int = 0,
        instead: Mapping[str, Tensor] | None = None,
    ):
        self.device = device
        self.keep_bytes = keep_bytes
        self._instead = {} if instead is None else instead
        self.dtype = computing_dtype(checkpoint)
        self.model = _empty_model(checkpoint, self.dtype)
        self.path, self.layers = decoder_layers(self.model)
        numbered = re.compile(rf"{re.escape(self.path)}\.(\d+)\.")
        self._stored: dict[int | None, list[tuple[str, Stored]]] = {}
        for name, stored in held_by(self.model, weight_files(checkpoint.path)).by_name.items():
            match = numbered.match(name)  # a tower for images may have numbered layers, too
            part = int(match[1]) if match else None
            self._stored.setdefault(part, []).extend((name, one) for one in stored)
        self._experts = _plain_experts(self.model, self.dtype)
        self._fill(None)
        self.model.tie_weights()
        self._make_buffers()
        self._filled: set[int] = set()
        self._kept = 0
        self._ahead: tuple[int, Future[None]] | None = None
        self._told = False
        self.fills_ahead = not device.startswith("cpu")
        names = [n for n, p in self.model.named_parameters() if p.is_meta]
        if missing := [name for name in names if not numbered.match(name)]:
            raise UserError(f"{checkpoint.path} lacks {len(missing)} tensors, such as {missing[0]}")

    @contextmanager
    def layer(
        self, index: int, then: int | None = None, without: Collection[str] = ()
    ) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights; UserError where the checkpoint lacks some.

        then: the layer that is asked for next. It is read while this one is used: onto a GPU where
        memory has room for both, and what goes wrong with it is raised when it is asked for; for
        the CPU into the system's page cache alone, which takes none of the process's memory.
        without: names of tensors of the model that are not read. Modules that are taken out of it
        while it is open lose their weights when it closes, whoever holds them.
        """
        decoder = self.layers[index]
        if index in self._filled:
            yield decoder
            return
        before = set(decoder.modules())
        self._take(index, without)
        self._filled.add(index)
        try:
            left = {n.removeprefix(f"{self.path}.{index}.") for n in without}
            missing = [n for n, p in decoder.named_parameters() if p.is_meta and n not in left]
            if missing:
                raise UserError(f"the checkpoint lacks tensors of layer {index}: {missing[:3]}")
            self._read_ahead(then)
            yield decoder
        finally:
            if self._ahead is not None:
                wait([self._ahead[1]])  # it works on the same modules
            for module in before - set(decoder.modules()):
                module._apply(lambda tensor: tensor.to("meta"), recurse=False)
            size = bytes_of(decoder)
            if self._kept + size <= self.keep_bytes:
                self._kept += size
            else:
                self._empty(index)

    def _take(self, index: int, without: Collection[str]) -> None:
        """Fill a layer, unless it was read ahead: where that went wrong it is read again."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            failed = ahead[1].exception()
            if ahead[0] == index and failed is None:
                return
            self._empty(ahead[0])
        self._fill(index, without)

    def _read_ahead(self, index: int | None) -> None:
        if index is None or index in self._filled:
            return
        if not self.fills_ahead:
            _read_pages(stored for _, stored in self._stored.get(index, []))
            return
        needed, free = int(AHEAD * bytes_of(self.layers[index])), free_memory(self.device)
        if needed > free:
            self._tell_no_room(needed, free)
            return
        with_one = ThreadPoolExecutor(1, "read ahead")
        self._ahead = index, with_one.submit(torch.no_grad()(self._fill), index)
        with_one.shutdown(wait=False)

    def _tell_no_room(self, needed: int, free: int) -> None:
        if not self._told:
            logger.info(
                "decoder layers are read one after the other: reading one ahead would take "
                "%.2f GiB of memory, of which %.2f GiB are free", needed / 2**30, free / 2**30,
            )  # fmt: skip
        self._told = True

    def layer_bytes(self) -> int:
        """Memory of the largest decoder layer."""
        return max(bytes_of(layer) for layer in self.layers)

    def _fill(self, part: int | None, without: Collection[str] = ()) -> None:
        """Load the tensors of one decoder layer, or with None all others, but for `without`."""
        with ExitStack() as stack:
            wanted = [one for name, one in self._stored.get(part, []) if name not in without]
            files = {file for one in wanted for file in one.files()}
            opened = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
            slices = {one.key: one.slice_of(opened) for one in wanted}
            widened = self._as_stored(part)
            _load_into(self.model, slices | self._instead_of(slices), self.dtype, self.device)
        for name, dtype in widened.items():  # one at a time
            _set_dtype(self.model, name, dtype)

    def _as_stored(self, part: int | None) -> dict[str, torch.dtype]:
        """Have the experts of a layer, still empty, read in the dtype of the files if it is narrow.

        Gives the dtypes that they have to get then. Joining experts only moves their numbers, so
        that these are the same; but until they are joined they are pages of the file, and never
        does memory hold them one by one in a wide dtype, too.
        """
        there = dict(self.model.named_parameters()) if self._experts else {}
        parts: dict[str, list[Stored]] = {}
        for name, one in self._stored.get(part, []):
            if name in self._experts and name in there:
                parts.setdefault(name, []).append(one)
        wide: dict[str, torch.dtype] = {}
        for name, some in parts.items():
            # What is unpacked when it is read, or taken instead, is wider than it says.
            as_it_says = not any(one.parts or one.key in self._instead for one in some)
            narrow, wanted = some[0].dtype, there[name].dtype
            if not as_it_says or narrow is None or {one.dtype for one in some} != {narrow}:
                continue
            if narrow != wanted and torch.promote_types(narrow, wanted) == wanted:
                wide[name] = wanted
                _set_dtype(self.model, name, narrow)
        return wide

    def _instead_of(self, slices: Mapping[str, Any]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in self._instead.items() if key in slices}

    def _empty(self, index: int) -> None:
        decoder = self.layers[index]
        buffers = dict(_non_persistent(decoder))  # of what stands there now: it may be edited
        decoder.to("meta")
        _set_buffers(decoder, buffers)
        self._filled.discard(index)
        _return_memory()

    def _make_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds, such as rotary frequencies."""
        for module in self.model.modules():
            computed = {
                name: buffer
                for name, buffer in module._buffers.items()
                if name in module._non_persistent_buffers_set and buffer is not None
            }
            if any(buffer.is_meta for buffer in computed.values()):
                for name, buffer in computed.items():
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
                self.model._init_weights(module)


class OverlaidModel:
    """A checkpoint opened one decoder layer at a time, of which some tensors are others.

    tensors: those, by their names in the model; each is asked for when its layer is opened.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]):
        self._inside, self._tensors = LayerwiseModel(checkpoint), tensors
        self.model, self.layers = self._inside.model, self._inside.layers
        self.dtype = self._inside.dtype
        numbered = re.compile(rf"{re.escape(self._inside.path)}\.(\d+)\.")
        self._of: dict[int | None, list[str]] = {}
        for name in tensors:
            match = numbered.match(name)
            self._of.setdefault(int(match[1]) if match else None, []).append(name)
        self._put(None)

    @contextmanager
    def layer(
        self, index: int, then: int | None = None, without: Collection[str] = ()
    ) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights."""
        with self._inside.layer(index, without=without) as decoder:
            self._put(index)
            yield decoder

    def _put(self, part: int | None) -> None:
        for name in self._of.get(part, []):
            self.model.get_parameter(name).data = self._tensors[name]


def _read_pages(stored: Iterable[Stored]) -> None:
    """Ask the system to have tensors in its page cache soon, where it has a call for that."""
    if not hasattr(os, "posix_fadvise"):
        return
    by_file: dict[Path, list[Stored]] = {}
    for one in (part for whole in stored for part in (dict(whole.parts).values() or (whole,))):
        by_file.setdefault(one.file, []).append(one)
    for file, some in by_file.items():
        with suppress(OSError), file.open("rb") as handle:
            for one in some:
                advice = os.POSIX_FADV_WILLNEED
                os.posix_fadvise(handle.fileno(), one.offset, one.num_bytes, advice)


def _set_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Have a parameter in another dtype; a new one, since it may be of inference mode."""
    owner, _, key = name.rpartition(".")
    tensor = _tensor(model, name).detach().to(dtype)
    model.get_submodule(owner)._parameters[key] = nn.Parameter(tensor, requires_grad=False)


def _plain_experts(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of the routed experts' parameters, where they are loaded in one dtype, as they are."""
    if quantised_as(model.config) or model._get_dtype_plan(dtype):
        return set()
    experts = {id(p) for layer in moe_layers(model) for p in layer.experts.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in experts}


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: those of which some are MoE layers.

    Of a model without any, the first list of as many modules as its config has decoder layers.
    UserError where there is none.
    """
    first = next(iter(moe_layers(model)), None)
    if first is not None:
        path = decoders_path(first.info.name)
        return path, module_list(model, path)
    number = text_config(model.config).num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return path, module
    raise UserError(f"{type(model).__name__} has no list of {number} decoder layers")


def layers_read(converted: bool) -> float:
    """Memory of a decoder layer while it is read, in layers: of its experts one by one, and joined.

    converted: whether its files have another dtype, in which they are read first.
    """
    return 2.3 if converted else 1.7


def bytes_of(module: nn.Module) -> int:
    """What a module's parameters take, also where they are not there."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


@dataclass(frozen=True)
class Sizes:
    """Of a model, in parameters: its largest decoder layer, and all that is in none.

    widest: of the matrices of a decoder layer that are no routed expert's, the longest side.
    eager_heads: of attention, where it is computed as a matrix of positions by positions.
    """

    layer: int
    outside: int
    widest: int
    eager_heads: int


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a model, which may be without weights."""
    layers = decoder_layers(model)[1]
    routed = {id(p) for one in moe_layers(model) for p in one.experts.parameters()}
    parts = [list(layer.parameters()) for layer in layers]
    plain = [p for part in parts for p in part if p.dim() > 1 and id(p) not in routed]
    largest = [sum(p.numel() for p in part) for part in parts]
    config = text_config(model.config)
    is_eager = model.config._attn_implementation == "eager"
    return Sizes(
        layer=max(largest),
        outside=num_parameters(model) - sum(largest),
        widest=max((max(p.shape) for p in plain), default=0),
        eager_heads=getattr(config, "num_attention_heads", 0) if is_eager else 0,
    )


def _non_persistent(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for path, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            if (buffer := part._buffers.get(name)) is not None:
                yield f"{path}.{name}".lstrip("."), buffer


def _set_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for path, buffer in buffers.items():
        parent, _, name = path.rpartition(".")
        module.get_submodule(parent)._buffers[name] = buffer


def _return_memory() -> None:
    """Give freed memory back to the system, where the C library has a call for it (glibc).

    It keeps blocks of an expert's size for reuse, but too scattered for the next layer to fit in.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    model = empty_model(checkpoint.config, dtype=dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default one knows no float64
    fit_implementation(model)
    model.eval()
    return model


def computing_dtype(checkpoint: Checkpoint) -> torch.dtype:
    if checkpoint.dtype != "auto":
        asked: torch.dtype = getattr(torch, checkpoint.dtype)
        return asked
    return stored_dtype(checkpoint.config)


def _load_into(
    model: PreTrainedModel, tensors: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    """Fill parameters of a model from a checkpoint's tensors or slices, by their names on disk."""
    with no_bars():
        load_tensors(
            model,
            tensors,
            LoadStateDictConfig(
                dtype=dtype,
                dtype_plan=model._get_dtype_plan(dtype),
                device_map={"": device},
                weight_mapping=conversions(model),
                hf_quantizer=quantizer_of(model.config),
            ),
        )
    if quantised_as(model.config):
        widen(model, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def routers_only(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model without weights, but for its MoE layers' routers: nothing else is read.

    Raises UserError where the checkpoint lacks one of their tensors.
    """
    dtype = computing_dtype(checkpoint)
    model = _empty_model(checkpoint, dtype)
    routers = [layer.router for layer in moe_layers(model)]
    wanted = {
        f"{name}.{key}": tuple(tensor.shape)
        for name, module in model.named_modules()
        if any(module is router for router in routers)
        for key, tensor in module.named_parameters()
    }
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in weight_files(checkpoint.path):
            opened = stack.enter_context(safe_open(file, "pt"))
            for key in sorted(opened.keys()):
                tensor = opened.get_slice(key)
                if not isinstance(checkpoint, Original):
                    tensors[key] = tensor
                elif tuple(tensor.get_shape()) in wanted.values():
                    tensors |= checkpoint.family.native_tensors(key, tensor[:])
        names = model_names(model, tensors)
        tensors = {key: tensor for key, tensor in tensors.items() if names[key] in wanted}
        _load_into(model, tensors, dtype, "cpu")
    if missing := [name for name in wanted if _tensor(model, name).is_meta]:
        raise UserError(f"{checkpoint.path} lacks {len(missing)} tensors, such as {missing[0]}")
    return model


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), key)
    return tensor
