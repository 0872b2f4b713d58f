"""What a method, a metric and a ratio may look at before they decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

from torch import Tensor

from moe_lab.models.checkpoint import Model
from moe_lab.models.stream import LayerStream
from moe_lab.profile.layer import LayerStatistics

Answer = TypeVar("Answer")
Tensors = dict[str, Tensor]


class Remember(Protocol):
    """Gives what `work` gave for this identity and code before, or now."""

    def __call__(
        self, identity: dict[str, Any], work: Callable[[], Answer], code: Sequence[object]
    ) -> Answer: ...


class RememberTensors(Protocol):
    """The same of tensors by name."""

    def __call__(
        self, identity: dict[str, Any], work: Callable[[], Tensors], code: Sequence[object]
    ) -> Tensors: ...


def _always_anew(
    identity: dict[str, Any], work: Callable[[], Answer], code: Sequence[object]
) -> Answer:
    return work()


def _no_model(num_samples: int | None = None, documents: Sequence[int] | None = None) -> NoReturn:
    raise RuntimeError("this profile has statistics alone")


@dataclass(frozen=True)
class Profile:
    """Statistics of the intact model, and what costs more, made only when somebody asks.

    open_stream(num_samples, documents, added): the model's decoder layers over the first so many
    samples of the calibration set (None: all of it), or over the documents at these places of it;
    added: documents, as token ids, that stand behind its last one. open_model(num_samples): the
    intact model, whole, and those samples as batches (input_ids, attention_mask [B, L]).
    remember(identity, work, code): what `work` (plain JSON values) gave for the same identity,
    model, data and code before; code: the functions, classes or objects that decide its answer,
    with all that their modules import.
    remember_tensors: the same where `work` gives tensors by name, on the CPU. num_documents: how
    many samples the calibration set has.
    """

    statistics: list[LayerStatistics]
    open_stream: Callable[..., LayerStream] = _no_model
    open_model: Callable[..., tuple[Model, list[dict[str, Tensor]]]] = _no_model
    remember: Remember = _always_anew
    remember_tensors: RememberTensors = _always_anew
    num_documents: int = 0

    def by_layer(
        self,
        question: dict[str, Any],
        work: Callable[[], Mapping[int, Tensors]],
        code: Sequence[object],
    ) -> list[Tensors]:
        """Tensors by name of each MoE layer in order, which `work` finds for all, remembered."""

        def all_of_them() -> Tensors:
            found = work().items()
            return {f"{i}.{name}": value for i, one in found for name, value in one.items()}

        layers: dict[str, Tensors] = {str(layer.info.index): {} for layer in self.statistics}
        for full, value in self.remember_tensors(question, all_of_them, code).items():
            index, _, name = full.partition(".")
            layers[index][name] = value
        return list(layers.values())
