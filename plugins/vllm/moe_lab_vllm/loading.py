"""The checkpoint's tensors on their way to the model: each one known, whole, and none missing.

vLLM's own check exempts fused experts, whose buffers may stay half empty; so it is done here, from
what the model is made of back to the names that a checkpoint has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.utils import (
    get_spec_layer_idx_from_weight_name,
    is_pp_missing_parameter,
)

from moe_lab_vllm.building import shared_out
from moe_lab_vllm.form import Layer
from moe_lab_vllm.stand_ins import PlacedExperts

# What vLLM has as one tensor, and a checkpoint as several.
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


class Wanted(NamedTuple):
    """A tensor of an MLP whose sizes we know; units: along which dimension its hidden units are."""

    shape: tuple[int, int]
    units: int


class Arriving:
    """Follows the tensors of one loading: `checked` while they come, `finish` when all have."""

    def __init__(self, model: Any, layers: Mapping[int, Layer]) -> None:
        self.model = model
        self.wanted = _wanted(model, layers)
        self.seen: set[str] = set()

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the model takes; ValueError for one of another name or shape."""
        for name, tensor in weights:
            if name in self.wanted:
                self.seen.add(name)
                yield name, _filled_up(name, tensor, self.wanted[name])
            elif not self._is_for_others(name):
                raise ValueError(f"this checkpoint has {name}, for which its config has no place")

    def finish(self, loaded: set[str]) -> None:
        """ValueError if a tensor did not come, or a parameter was given none."""
        if missing := [name for name in self.wanted if name not in self.seen]:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise ValueError(f"this checkpoint lacks {missing[0]}{more} that its config speaks of")
        parameters = {name for name, one in self.model.named_parameters() if one.numel()}
        if empty := sorted(parameters - loaded):
            raise ValueError(f"vLLM put no tensor of this checkpoint into {', '.join(empty)}")
        for module in self.model.modules():
            if isinstance(module, PlacedExperts):
                module.check_places()

    def _is_for_others(self, name: str) -> bool:
        """Of another pipeline stage, of MTP layers, of a tied head, or what old files repeat."""
        config = self.model.config
        return (
            is_pp_missing_parameter(name, self.model)
            or get_spec_layer_idx_from_weight_name(config, name) is not None
            or (name == "lm_head.weight" and config.tie_word_embeddings)
            or name.endswith("rotary_emb.inv_freq")
        )


def _wanted(model: Any, layers: Mapping[int, Layer]) -> dict[str, Wanted | None]:
    """The tensors that a checkpoint must have for this (rank's part of the) model."""
    wanted: dict[str, Wanted | None] = {}
    for path, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            width = _layer(layers, path).expert_width or module.moe_config.intermediate_size
            hidden = model.config.hidden_size
            down = module.ckpt_down_proj_name
            for expert in range(module.moe_config.num_logical_experts):
                prefix = f"{path.removesuffix('.routed_experts')}.{expert}"
                for name in (module.ckpt_gate_proj_name, module.ckpt_up_proj_name):
                    wanted[f"{prefix}.{name}.weight"] = Wanted((width, hidden), 0)
                wanted[f"{prefix}.{down}.weight"] = Wanted((hidden, width), 1)
    for path, _ in model.named_parameters():
        *parents, module, kind = path.split(".")
        if module == "routed_experts":
            continue
        for part in STACKED.get(module, (module,)):
            name = ".".join([*parents, part, kind])
            wanted[name] = _of_dense(name, layers, model.config.hidden_size)
    return wanted


def _of_dense(name: str, layers: Mapping[int, Layer], hidden: int) -> Wanted | None:
    width = _layer(layers, name).width
    if width is None:
        return None
    if re.search(r"\.\d+\.\w+\.(gate|up)_proj\.weight$", name):
        return Wanted((width, hidden), 0)
    if re.search(r"\.\d+\.\w+\.down_proj\.weight$", name):
        return Wanted((hidden, width), 1)
    return None


def _layer(layers: Mapping[int, Layer], name: str) -> Layer:
    found = re.search(r"\blayers\.(\d+)\.", name)
    return layers.get(int(found[1]), Layer()) if found else Layer()


def _filled_up(name: str, tensor: Tensor, wanted: Wanted | None) -> Tensor:
    """With the zeros that let all ranks have as many hidden units."""
    if wanted is None:
        return tensor
    if tuple(tensor.shape) != wanted.shape:
        raise ValueError(
            f"{name} of this checkpoint is {tuple(tensor.shape)}, its config says {wanted.shape}"
        )
    missing = (shared_out(size := wanted.shape[wanted.units]) or size) - size
    if not missing:
        return tensor
    return F.pad(tensor, (0, 0, 0, missing) if wanted.units == 0 else (0, missing))
