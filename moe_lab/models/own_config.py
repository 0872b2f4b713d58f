"""config.json of our own form: another model type, with the family's config inside.

docs/form.md describes it for other readers. Who does not know it refuses the model type; who builds
a class of the family in spite of that stumbles over a sentence where a size should be. As an object
a config is always the family's, with an attribute `moe_lab`; as values it is the family's with a
key of that name. Only files are wrapped, and both ways of reading and writing them are here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

MODEL_TYPE, ARCHITECTURE = "moe_lab", "MoeLabForCausalLM"
VERSION = 4  # 1 was the family's config.json with one key more
# What version 2 did not know. Where no layer has any of it, 2 is written, which more readers know.
SINCE_3 = ("expert_widths", "shared_width")
VERSIONS = (2, 3, VERSION)
QUANTISED = "quantised"  # since 4: how many matrices are packed, by their bits (`packing.py`)
OWN, FAMILY = "moe_lab", "config"
SENTENCE = "in moe_lab's own form: import moe_lab first, or call moe_lab.load(folder)"
# Configs of families check this size before anything is built, those of wrappers the inner one, and
# quote what they find. Who wants the tokenizer alone asks for neither.
STUMBLE = {"vocab_size": SENTENCE}

# What a layer's structure may say, and of which kinds the values are.
STRUCTURE: dict[str, tuple[type, ...]] = {
    "width": (int,), "in_place": (bool,), "num_routed": (int, type(None)), "num_experts": (int,),
    "rows": (int, type(None)), "stand_in": (str, type(None)), "expert_width": (int, type(None)),
    "top_k": (int, type(None)), "own": (dict,), "expert_widths": (list,),
    "shared_width": (int, type(None)),
}  # fmt: skip


class MoeLabConfig(PreTrainedConfig):
    """What AutoConfig knows the form by; what comes of it is the family's own config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The family's config, with the layers' structures as its attribute `moe_lab`."""
        from transformers import CONFIG_MAPPING  # whose import teaches it this very class

        values = family_values(config_dict)
        if values["model_type"] not in CONFIG_MAPPING:
            raise ValueError(
                f"this checkpoint in moe_lab's own form is of the family {values['model_type']!r}, "
                "which this version of transformers does not know"
            )
        return CONFIG_MAPPING[values["model_type"]].from_dict(values, **options)


def is_own_form(values: Mapping[str, Any]) -> bool:
    """Whether this is what a config.json of our own form says, of whichever version."""
    return isinstance(values.get(OWN), dict)


def family_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the family's config.json would say, with our own key in it where there are structures.

    Raises ValueError for a form that this version of moe_lab does not know.
    """
    if values.get("model_type") != MODEL_TYPE:
        _check_structures(values.get(OWN))
        if part := next((n for n, v in values.items() if isinstance(v, dict) and OWN in v), None):
            raise ValueError(f"{part}.{OWN} has no meaning: structures stand at the top")
        return dict(values)
    own: Any = values.get(OWN)
    version = own.get("version") if isinstance(own, dict) else None
    family = own.get(FAMILY) if isinstance(own, dict) else None
    if version not in VERSIONS or not isinstance(family, dict) or "model_type" not in family:
        raise ValueError(
            f"this checkpoint is in moe_lab's own form of version {version}, and this version of "
            f"moe_lab reads up to {VERSION}: update moe_lab"
            if isinstance(version, int) and version > VERSION
            else f"model_type is {MODEL_TYPE!r}, and no family's config stands in {OWN}.{FAMILY}"
        )
    _check_structures(own)
    inside: dict[str, Any] = own[FAMILY]
    return inside | {OWN: {key: value for key, value in own.items() if key != FAMILY}}


def _check_structures(own: Any) -> None:
    """Raise ValueError for structures of layers that are not as `own_form.own_config` writes them.

    Of version 1, in which they stood in the family's config.json, too.
    """
    if own is None or own == {}:
        return
    layers: Any = own.get("layers") if isinstance(own, dict) else None
    if not isinstance(layers, dict):
        raise ValueError(f"{OWN}.layers must be an object that lists layers by number")
    quantised = own.get(QUANTISED)
    if quantised is not None and not isinstance((quantised or {}).get("bits"), dict):
        raise ValueError(f"{OWN}.{QUANTISED}={quantised!r} does not say how many matrices are "
                         "packed in how many bits")  # fmt: skip
    for index, wanted in layers.items():
        if not isinstance(wanted, dict):
            raise ValueError(f"{OWN}.layers.{index} must be an object")
        for key, value in wanted.items():
            kinds = STRUCTURE.get(key)
            if kinds is None:
                raise ValueError(f"{OWN}.layers.{index}.{key} is not known: {', '.join(STRUCTURE)}")
            wrong = type(value) not in kinds or (type(value) is int and value < 0)
            wrong |= key == "num_experts" and not value
            if wrong or (key == "expert_widths" and not _are_widths(value, wanted)):
                raise ValueError(f"{OWN}.layers.{index}.{key}={value!r} is not possible")


def _are_widths(value: list[Any], wanted: dict[str, Any]) -> bool:
    """Whether there is one number for each expert, and not only zeros."""
    plain = all(type(one) is int and one >= 0 for one in value)
    return plain and any(value) and len(value) == wanted.get("num_experts")


def lowest_version(layers: Mapping[str, Any], quantised: Any = None) -> int:
    """The lowest version of the form that can say these structures of layers."""
    if quantised:
        return VERSION
    return 3 if any(name in one for one in layers.values() for name in SINCE_3) else 2


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `family_values`."""
    inside = {key: value for key, value in values.items() if key != OWN}
    version = lowest_version(values[OWN]["layers"], values[OWN].get(QUANTISED))
    own = {**values[OWN], "version": version, FAMILY: inside}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **STUMBLE,
        "text_config": STUMBLE,
        OWN: own,
    }


def without_structures(config: Any) -> Any:
    """A copy of a config, as an object, that says nothing of structures of ours."""
    plain = copy.deepcopy(config)
    if hasattr(plain, OWN):
        delattr(plain, OWN)
    return plain


def read_config(path: Path) -> dict[str, Any]:
    """The family's values of a config.json; OSError and ValueError where it cannot be read."""
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise ValueError("it holds no object")
    return family_values(values)


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    """Write the family's values as a config.json, wrapped where layers have our structures."""
    whole = own_values(values) if is_own_form(values) else values
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
