"""What a model costs: parameters, peak memory of a forward, prefill and decode speed.

All models are in one process and take turns, so that a busy machine slows them alike. On a GPU
that does not hold them all they come one after the other: there nobody else computes.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.models.active import active_parameters, parameters
from moe_lab.models.checkpoint import Model
from moe_lab.models.remapped import all_to_experts
from moe_lab.models.skipping import none_skipped
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.option import Option, Plugin, check_options
from moe_lab.progress import progress

REFERENCE = "dense"


@dataclass(frozen=True)
class Measurement(Plugin):
    """How `measure` measures."""

    prompt_length: Annotated[int, Option("tokens of a prompt", least=1)] = 512
    batch_size: Annotated[int, Option("prompts at once", least=1)] = 1
    decode_tokens: Annotated[int, Option("steps of decoding behind the prompt", least=1)] = 16
    repeats: Annotated[int, Option("rounds, of whose times the median counts", least=1)] = 5
    seed: Annotated[int, Option("of the random prompts")] = 0

    def __post_init__(self) -> None:
        check_options(self, "measure")

    def in_one_process(self) -> Measurement:
        """The same without what others than `measure` measure."""
        return Measurement(**{one.name: getattr(self, one.name) for one in fields(Measurement)})


@torch.inference_mode()
def measure(
    loading: Mapping[str, Callable[[], Model]],
    prompt_length: int,
    batch_size: int,
    decode_tokens: int,
    repeats: int,
    vocabulary_size: int,
    seed: int,
    together: bool = True,
    besides: Callable[[str, Model], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Flat figures `<variant>/<figure>` of every model; ratios are to the one named "dense".

    Prefill is one forward over batch_size x prompt_length random token ids which fills the KV
    cache and computes the last position's logits; decode is greedy, `decode_tokens` steps through
    the cache, and its seconds are per step (one token for each sequence of the batch). Times are
    medians over `repeats` rounds in which each model takes its turn, the order alternating.

    loading: what loads each model. together: whether all are held at once and take turns; else
    each has all of its turns before the next one is loaded. besides: more figures of a variant
    while its model is there.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt_BL = torch.randint(vocabulary_size, (batch_size, prompt_length), generator=generator)
    figures: dict[str, float] = {}
    for names in [list(loading)] if together else [[name] for name in loading]:
        models = {name: loading[name]() for name in names}
        peaks = _peaks(models, prompt_BL)
        times = _times(models, prompt_BL, decode_tokens, repeats)
        for name, model in models.items():
            figures |= {
                f"{name}/parameters": parameters(model),
                **counted(name, model, prompt_length),
                f"{name}/peak_memory_bytes": peaks[name],
                f"{name}/prefill_seconds": times[name][0],
                f"{name}/decode_seconds_per_token": times[name][1],
                **(besides(name, model) if besides else {}),
            }
        del models, model  # before the next one is loaded
        gc.collect()
    return figures | _compared(figures, list(loading))


def _compared(figures: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The figures of each variant against those of the reference."""
    ratios = {
        "parameter_ratio": "parameters", "memory_ratio": "peak_memory_bytes",
    }  # fmt: skip
    speedups = {
        "prefill_speedup": "prefill_seconds", "decode_speedup": "decode_seconds_per_token",
    }  # fmt: skip
    dense = {
        what: figures[f"{REFERENCE}/{what}"] for what in (*ratios.values(), *speedups.values())
    }
    found = {}
    for name in names:
        for ratio, what in ratios.items():
            found[f"{name}/{ratio}"] = figures[f"{name}/{what}"] / dense[what]
        for speedup, what in speedups.items():
            found[f"{name}/{speedup}"] = dense[what] / figures[f"{name}/{what}"]
    return found


def fit_together(sizes: Sequence[int], device: str) -> bool:
    """Whether models of so many bytes can be held at once: on a GPU in half of what is free there,
    since they need room to compute; in the machine's memory always."""
    if not device.startswith("cuda"):
        return True
    return sum(sizes) <= torch.cuda.mem_get_info(device)[0] / 2


def counted(name: str, model: Model, length: int) -> dict[str, float]:
    """The figures that are counted, not measured, of one model over a prompt of this length."""
    return {
        f"{name}/active_parameters": active_parameters(model),
        f"{name}/flops_per_token": flops_per_token(model, length),
    }


@torch.inference_mode()
def flops_per_token(model: Model, length: int) -> float:
    """Floating-point operations of a forward over `length` tokens, the head's too, per token.

    Counted by torch from the shapes of all matrix products (a multiply-add is two), with attention
    and experts computed in their plain forms, so that every product is seen. Attention is counted
    over all pairs of positions, as it is computed without a kernel that leaves out the masked ones.
    Where router rows lead to stand-ins, tokens that are sent to none of them are counted: how many
    are depends on the text (`routing/stand_ins` tells it for the held-out one). Where a rule leaves
    out some of a token's experts, they are counted as if it did not (`routing/expert_flops` tells
    what is left of them on the held-out text).
    """
    experts, attention = model.config._experts_implementation, model.config._attn_implementation
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    try:
        with (
            all_to_experts(model),
            none_skipped(model),
            FlopCounterMode(display=False) as counter,
        ):
            model(torch.zeros(1, length, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)
    total: int = counter.get_total_flops()
    return total / length


def bytes_on_disk(folder: Path) -> int:
    """Size of a checkpoint's weights, without other copies of it that lie beside."""
    return size_in_bytes(folder)


def peak_memory_bytes(model: Model, prompt_BL: Tensor) -> int:
    """Most memory that tensors hold at once during a prefill, the weights among it.

    On CUDA what its allocator saw (the model should be alone there). Elsewhere an exact count:
    weights, buffers and inputs, and each storage that an operator returns, from then until it is
    freed. Scratch memory inside an operator is not seen, nor is the interpreter's own; in return
    the figure is the same on every machine and in every run.
    """
    prompt_BL = prompt_BL.to(model.device)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        _prefill(model, prompt_BL)
        return torch.cuda.max_memory_allocated(model.device)
    counter = _StorageCounter([*model.parameters(), *model.buffers(), prompt_BL])
    with counter:
        _prefill(model, prompt_BL)
    return counter.peak


class _StorageCounter(TorchDispatchMode):
    """Counts the bytes of live storages: those given, and those that operators return."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.live: dict[int, int] = {}  # a storage's address in C++ -> its bytes
        self.now = self.peak = 0
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.live:
            return
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        # The storage's Python object lives as long as the memory, so its end is the free.
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, address: int) -> None:
        self.now -= self.live.pop(address)


def _peaks(models: Mapping[str, Model], prompt_BL: Tensor) -> dict[str, int]:
    peaks = {}
    for name, model in models.items():
        others = [other for other in models.values() if other is not model]
        with _moved_off(others):
            peaks[name] = peak_memory_bytes(model, prompt_BL)
    return peaks


@contextmanager
def _moved_off(models: list[Model]) -> Iterator[None]:
    """Take models off their CUDA device for a while; models in main memory stay."""
    homes: list[tuple[nn.Module, torch.device]] = [
        (model, model.device) for model in models if model.device.type == "cuda"
    ]
    for model, _ in homes:
        model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        for model, device in homes:
            model.to(device)


def _times(
    models: Mapping[str, Model], prompt_BL: Tensor, decode_tokens: int, repeats: int
) -> dict[str, tuple[float, float]]:
    """Median (prefill, decode step) seconds of each model."""
    prompts = {name: prompt_BL.to(model.device) for name, model in models.items()}
    for name, model in models.items():
        _timed_turn(model, prompts[name], decode_tokens)  # warm-up
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in progress(range(repeats), "measure"):
        order = list(models) if number % 2 == 0 else list(models)[::-1]
        for name in order:
            turns[name].append(_timed_turn(models[name], prompts[name], decode_tokens))
    return {
        name: (
            statistics.median(prefill for prefill, _ in measured),
            statistics.median(decode for _, decode in measured),
        )
        for name, measured in turns.items()
    }


def seconds_in_turns(
    model: Model,
    ways: Mapping[str, Callable[[], AbstractContextManager[Callable[[], object]]]],
    repeats: int,
) -> dict[str, float]:
    """Median seconds of some calls, which take turns as the models of `measure` do.

    ways: what opens each; only the call that it gives is timed.
    """
    turns: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, repeats):  # the first is a warm-up
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            with ways[name]() as call:
                started = _now(model)
                call()
                turns[name].append(_now(model) - started)
    return {name: statistics.median(times[1:]) for name, times in turns.items()}


def _timed_turn(model: Model, prompt_BL: Tensor, decode_tokens: int) -> tuple[float, float]:
    started = _now(model)
    output = _prefill(model, prompt_BL)
    filled = _now(model)
    for _ in range(decode_tokens):
        next_B1 = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=next_B1, past_key_values=output.past_key_values, use_cache=True)
    return filled - started, (_now(model) - filled) / decode_tokens


def _prefill(model: Model, prompt_BL: Tensor) -> Any:
    return model(input_ids=prompt_BL, use_cache=True, logits_to_keep=1)


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
