"""config.json of our own form: another model type, with the family's config inside.

docs/form.md describes it for other readers. Who does not know it refuses the model type; who builds
a class of the family in spite of that stumbles over a dtype that says what to do. As an object a
config is always the family's, with an attribute `moe_lab`; as values it is the family's with a key
of that name. Only files are wrapped, and both ways of reading and writing them are here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

MODEL_TYPE, ARCHITECTURE = "moe_lab", "MoeLabForCausalLM"
VERSION = 2  # 1 was the family's config.json with one key more
KEY, INSIDE = "moe_lab", "config"
# transformers looks a dtype up before it builds anything, and quotes what it does not find.
NO_DTYPE = "in moe_lab's own form: import moe_lab first, or call moe_lab.load(folder)"


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
    return isinstance(values.get(KEY), dict)


def family_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the family's config.json would say, with our own key in it where there are structures.

    Raises ValueError for a form that this version of moe_lab does not know.
    """
    if values.get("model_type") != MODEL_TYPE:
        return dict(values)
    own = values.get(KEY)
    version = own.get("version") if isinstance(own, dict) else None
    if own is None or version != VERSION or "model_type" not in own.get(INSIDE, {}):
        raise ValueError(
            f"this checkpoint is in moe_lab's own form of version {version}, and this version of "
            f"moe_lab reads up to {VERSION}: update moe_lab"
            if isinstance(version, int) and version > VERSION
            else f"model_type is {MODEL_TYPE!r}, and no family's config stands in {KEY}.{INSIDE}"
        )
    inside: dict[str, Any] = own[INSIDE]
    return inside | {KEY: {key: value for key, value in own.items() if key != INSIDE}}


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `family_values`."""
    inside = {key: value for key, value in values.items() if key != KEY}
    own = {**values[KEY], "version": VERSION, INSIDE: inside}
    return {
        "architectures": [ARCHITECTURE],
        "dtype": NO_DTYPE,
        "model_type": MODEL_TYPE,
        KEY: own,
    }


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
