"""Teaches transformers our own form of checkpoints the moment it is imported, and not before.

Importing transformers and torch takes seconds, which `import moe_lab` must not cost: nothing but
the standard library is imported here.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# What transformers loads all tensors of a checkpoint by, and how it names them when it writes them.
PASSED = ("convert_and_load_state_dict_in_model", "revert_weight_conversion")


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module as others do, and changes it behind its own code."""

    def __init__(self, name: str, teach: Callable[[ModuleType], None]):
        self.name, self.teach = name, teach

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.teach(module)


def teach_when_imported() -> None:
    """Let our own form be read, built and written, now or once transformers is there."""
    lessons = {
        "transformers.models.auto.configuration_auto": _read_and_write,
        "transformers.modeling_utils": _build,
    }
    for name, teach in lessons.items():
        if name in sys.modules:
            teach(sys.modules[name])
        else:
            sys.meta_path.insert(0, _WhenImported(name, teach))


def _read_and_write(auto: ModuleType) -> None:
    """Let AutoConfig know the model type, and let configs with structures be written as ours."""
    from moe_lab.models.own_config import MODEL_TYPE, MoeLabConfig, read_config, write_config

    auto.AutoConfig.register(MODEL_TYPE, MoeLabConfig, exist_ok=True)
    base: Any = MoeLabConfig.__base__
    original = base.to_json_file

    def to_json_file(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
        original(self, json_file_path, use_diff)
        if getattr(self, "moe_lab", None):
            write_config(Path(json_file_path), read_config(Path(json_file_path)))

    base.to_json_file = to_json_file


def _build(modeling: ModuleType) -> None:
    """Let models be built as the "moe_lab" of their config says, and be written and read so."""
    original = modeling.PreTrainedModel.post_init

    def post_init(self: Any) -> None:
        structure = getattr(self.config, "moe_lab", None)
        if structure:
            from moe_lab.models.own_form import apply_structure

            apply_structure(self, structure)
        original(self)

    modeling.PreTrainedModel.post_init = post_init
    load, revert = (getattr(modeling, name) for name in PASSED)

    def joined_and_loaded(model: Any, state_dict: Any, *further: Any, **named: Any) -> Any:
        if getattr(model.config, "moe_lab", None):
            from moe_lab.models.packing import unpacking
            from moe_lab.models.uneven import joined

            state_dict = joined(model, unpacking(state_dict))
        elif _is_unpacked_here(model.config):
            state_dict = _unpacked(model, state_dict)
            named["load_config"] = _without_quantizer(model, named["load_config"])
        return load(model, state_dict, *further, **named)

    def reverted_and_cut(model: Any, state_dict: Any) -> Any:
        if not getattr(model.config, "moe_lab", None):
            return revert(model, state_dict)
        from moe_lab.models.uneven import cut_apart

        rest, rows = cut_apart(model, state_dict)
        return revert(model, rest) | rows

    for name, function in zip(PASSED, (joined_and_loaded, reverted_and_cut), strict=True):
        setattr(modeling, name, function)


def _is_unpacked_here(config: Any) -> bool:
    """Whether a config says that what compressed-tensors packed is to be dequantised."""
    told = getattr(config, "quantization_config", None)
    asked = told.get("dequantize") if isinstance(told, dict) else getattr(told, "dequantize", False)
    if not asked:
        return False
    from moe_lab.models.quantised import packed_bits

    return packed_bits(config) is not None


def _unpacked(model: Any, state_dict: Any) -> Any:
    """What compressed-tensors packed is unpacked as it is read, in the dtype that computes.

    transformers' own way multiplies in the dtype of the scales, and leaves experts in that.
    """
    from moe_lab.models.packing import unpacking
    from moe_lab.models.quantised import packed_bits

    return unpacking(state_dict, packed_bits(model.config))


def _without_quantizer(model: Any, load_config: Any) -> Any:
    """How plain tensors are loaded."""
    from moe_lab.models.quantised import conversions

    return dataclasses.replace(load_config, weight_mapping=conversions(model), hf_quantizer=None)
