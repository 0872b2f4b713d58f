"""Which model types have experts, and a tiny random model of each: by structure, not by a list."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from moe_lab.families.sizes import (
    FIRST_TEXT_ID,
    SENSES,
    SENSES_NAMES,
    SPECIAL,
    TEXT,
    TYPE_VARIANTS,
    VOCABULARY,
    WHERE_USED,
)
from moe_lab.models.layers import COUNT_FIELDS

# By which auto class a type is opened: the first that maps it. A multimodal one before its text.
AUTO_CLASSES: tuple[Any, ...] = (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
)

LARGEST = 3_000_000  # parameters of what still counts as tiny


def model_types() -> dict[str, str]:
    """Each model type that counts experts in its config, and the auto class that opens it.

    TYPE_VARIANTS of types that are there are among them.
    """
    types = {
        name: kind.__name__
        for name in sorted(CONFIG_MAPPING)
        if (kind := auto_class(name)) and any(map(_counts_experts, parts_of(name)))
    }
    variants = {name: types[base] for name in TYPE_VARIANTS if (base := base_of(name)) in types}
    return dict(sorted((types | variants).items()))


def base_of(name: str) -> str:
    """The model type of a row: all before the name of a variant."""
    return name.partition("+")[0]


def auto_class(name: str) -> Any:
    """The first of AUTO_CLASSES that opens a model type; None where none does."""
    config = CONFIG_MAPPING[base_of(name)]
    return next((kind for kind in AUTO_CLASSES if config in kind._model_mapping), None)


def parts_of(name: str) -> Iterator[Any]:
    """A type's default config and those in it; its class where there is no default."""
    try:
        yield from _parts(CONFIG_MAPPING[name]())
    except Exception:  # noqa: BLE001  # whatever a config refuses of its own defaults
        yield CONFIG_MAPPING[name]


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if (part := vars(config).get(name)) is not None and hasattr(part, "sub_configs"):
            yield from _parts(part)


def _counts_experts(config: Any) -> bool:
    names = {*vars(config), *(config.attribute_map or {})}
    return not names.isdisjoint(COUNT_FIELDS)


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of a tiny model of a type; changes: other values for fields of it."""
    kind = CONFIG_MAPPING[base_of(name)]
    return kind(**_values(kind(), TEXT) | TYPE_VARIANTS.get(name, {}) | changes)


def _values(config: Any, table: dict[str, Any]) -> dict[str, Any]:
    """The values of a tiny config in the place of the given one's."""
    there = vars(config)
    values = {name: table[name] for name in table if name in there}
    if "qk_rope_head_dim" in there:  # latent attention: all heads alike, of sizes of their own
        values.pop("head_dim", None)
        values |= {"num_key_value_heads": values.get("num_attention_heads")}
    for name in WHERE_USED & values.keys():
        if (there[name] or 0) <= 1:
            del values[name]
    values |= {name: VOCABULARY for name in there if name.endswith("vocab_size")}
    tokens = [name for name in there if name.endswith(("_token_id", "_token_index"))]
    values |= {name: 3 + place for place, name in enumerate(tokens) if name not in TEXT}
    values |= _lists(config, values)
    for name in config.sub_configs:
        if (part := there.get(name)) is not None and hasattr(part, "sub_configs"):
            senses = table is SENSES or any(word in name for word in SENSES_NAMES)
            values[name] = _values(part, SENSES if senses else table)
            if part.model_type:
                values[name]["model_type"] = part.model_type
    values |= SPECIAL.get(config.model_type, {})
    return {name: value for name, value in values.items() if value is not None}


def _lists(config: Any, values: dict[str, Any]) -> dict[str, list[Any]]:
    """Lists with an entry for each decoder layer, as short as the model is; every kind stays."""
    length, wanted = vars(config).get("num_hidden_layers"), values.get("num_hidden_layers", 0)
    found = {}
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == length and length > wanted:
            kinds = list(dict.fromkeys(map(repr, value)))[:wanted]
            first = [next(one for one in value if repr(one) == kind) for kind in kinds]
            found[name] = first + value[len(first) : wanted]
    return found


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a type, float32, in evaluation mode; changes: of its config.

    Every parameter is drawn, also those that transformers initialises to a constant: routers of
    zeros and norms of ones would hide mistakes.
    """
    config, kind = tiny_config(name, **changes), auto_class(name)
    _check_size(kind, config)
    torch.manual_seed(seed)
    model: PreTrainedModel = kind.from_config(config).float().eval()
    with torch.no_grad():
        for key, tensor in _drawn(model):
            tensor.copy_(_drawn_values(key, tensor))
    return model


def _check_size(kind: Any, config: Any) -> None:
    """Refuse what is not tiny, before it takes memory."""
    with torch.device("meta"):
        model = kind.from_config(copy.deepcopy(config))
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    if sum(sizes.values()) > LARGEST:
        large = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"it would have {sum(sizes.values()):,} parameters, {sizes[large]:,} of them in {large}"
        )


def _drawn(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters, and the buffers that training sets."""
    yield from model.named_parameters()
    for key, buffer in model.named_buffers():
        if key.endswith(("correction_bias", "expert_bias", "gate.bias", "tid2eid")):
            yield key, buffer


def _drawn_values(key: str, tensor: Tensor) -> Tensor:
    if key.endswith("tid2eid"):  # which experts a token id goes to
        rows = [torch.randperm(8)[: tensor.shape[1]] for _ in range(tensor.shape[0])]
        return torch.stack(rows)
    if "correction_bias" in key or "expert_bias" in key:
        return torch.rand(tensor.shape) * 0.3
    scale = 0.2 if tensor.dim() > 1 else 0.1
    return torch.randn(tensor.shape) * scale + float("norm" in key.lower() and tensor.dim() == 1)


def tiny_batches(seed: int = 0) -> list[dict[str, Tensor]]:
    """Two batches of token ids with their attention masks, the rows padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for lengths in ((24, 32, 32), (20, 24, 24)):
        ids = torch.randint(FIRST_TEXT_ID, VOCABULARY, (3, max(lengths)), generator=generator)
        mask = torch.tensor([[int(at < one) for at in range(max(lengths))] for one in lengths])
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches
