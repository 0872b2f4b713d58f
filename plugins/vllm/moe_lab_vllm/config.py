"""The config that vLLM gets to see: the family's own, which carries what the layers are."""

from __future__ import annotations

import copy
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from moe_lab_vllm import FAMILIES
from moe_lab_vllm.form import read_form, read_layers


class MoeLabConfig(PreTrainedConfig):
    """Registered for the model_type "moe_lab"; reading one gives its family's config instead.

    So all that vLLM looks up by model_type (attention, limits, dtypes) is found as for a stock
    checkpoint. Only `architectures` names our model, and `moe_lab` has what its layers are.
    """

    model_type = "moe_lab"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's config, or a pair of it and unused arguments where these are asked for."""
        own = copy.deepcopy(dict(read_form(config_dict)))
        layers = read_layers(own)
        family = own.pop("config")
        kind = family.get("model_type")
        if kind not in FAMILIES:
            raise ValueError(
                f"this checkpoint is a {kind} in moe_lab's own form; moe_lab_vllm serves "
                f"{', '.join(FAMILIES)}: use moe_lab.load"
            )
        read = CONFIG_MAPPING[kind].from_dict(family, **kwargs)
        config = read[0] if isinstance(read, tuple) else read
        if beyond := [index for index in layers if index >= config.num_hidden_layers]:
            raise ValueError(
                f"this checkpoint lists layers {beyond}, its model has {config.num_hidden_layers}"
            )
        config.architectures = [FAMILIES[kind]]
        config.moe_lab = own
        return read
