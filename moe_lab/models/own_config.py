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

from transformers import CONFIG_MAPPING, PreTrainedConfig

MODEL_TYPE, ARCHITECTURE = "moe_lab", "MoeLabForCausalLM"
VERSION = 2  # 1 was the family's config.json with one key more
OWN, FAMILY = "moe_lab", "config"
SENTENCE = "in moe_lab's own form: import moe_lab first, or call moe_lab.load(folder)"
# Configs of families check this size before anything is built, those of wrappers the inner one, and
# quote what they find. Who wants the tokenizer alone asks for neither.
STUMBLE = {"vocab_size": SENTENCE}


class MoeLabConfig(PreTrainedConfig):
    """What AutoConfig knows the form by; what comes of it is the family's own config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The family's config, with the layers' structures as its attribute `moe_lab`."""
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
        return dict(values)
    own = values.get(OWN)
    version = own.get("version") if isinstance(own, dict) else None
    if own is None or version != VERSION or "model_type" not in own.get(FAMILY, {}):
        raise ValueError(
            f"this checkpoint is in moe_lab's own form of version {version}, and this version of "
            f"moe_lab reads up to {VERSION}: update moe_lab"
            if isinstance(version, int) and version > VERSION
            else f"model_type is {MODEL_TYPE!r}, and no family's config stands in {OWN}.{FAMILY}"
        )
    inside: dict[str, Any] = own[FAMILY]
    return inside | {OWN: {key: value for key, value in own.items() if key != FAMILY}}


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `family_values`."""
    inside = {key: value for key, value in values.items() if key != OWN}
    own = {**values[OWN], "version": VERSION, FAMILY: inside}
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
