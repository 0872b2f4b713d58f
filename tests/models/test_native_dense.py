"""In which words a family's config says which layers are dense, and what it cannot say."""

from __future__ import annotations

import pytest
from families import tiny_model
from torch.nn import functional as F

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.editing import DenseMLP
from moe_lab.models.layers import moe_layers
from moe_lab.models.native_dense import config_with_dense, dense_names


def dense(family: str, index: int, width: int) -> dict[str, DenseMLP]:
    return {f"model.layers.{index}.mlp": DenseMLP(32, width, F.silu)}


@pytest.mark.parametrize(
    ("family", "index", "field", "value"),
    [
        ("qwen2_moe", 2, "mlp_only_layers", [0, 2]),  # wherever they are
        ("qwen3_moe", 3, "mlp_only_layers", [3]),
        ("deepseek_v3", 1, "first_k_dense_replace", 2),  # a first run of layers
    ],
)
def test_layers_are_listed_in_the_familys_own_words(
    family: str, index: int, field: str, value: object
) -> None:
    before = tiny_model(family).config
    config, obstacle = config_with_dense(before, dense(family, index, 80))
    assert obstacle is None
    assert getattr(config, field) == value != getattr(before, field)
    assert config.intermediate_size == 80, "of all dense layers the widest"
    built = meta_model(config)
    assert f"model.layers.{index}.mlp" in dense_names(built)
    assert index not in {layer.info.index for layer in moe_layers(built)}
    assert built.get_submodule(f"model.layers.{index}.mlp.up_proj").weight.shape == (80, 32)


@pytest.mark.parametrize(("family", "index"), [("deepseek_v3", 3), ("mixtral", 1)])
def test_what_a_family_cannot_say_is_told(family: str, index: int) -> None:
    before = tiny_model(family).config
    config, obstacle = config_with_dense(before, dense(family, index, 48))
    assert config is None
    assert obstacle == f"{family} cannot say that layers [{index}] are dense"
    assert config_with_dense(before, {}) == (before, None)


def test_dense_layers_that_were_there_are_known() -> None:
    assert dense_names(tiny_model("qwen2_moe")) == {"model.layers.0.mlp"}
    assert dense_names(tiny_model("mixtral")) == set()
