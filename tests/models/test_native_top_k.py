"""One number of experts per token for all layers, said by the family's own config."""

from __future__ import annotations

from families import EACH_FAMILY, tiny_model

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.layers import moe_layers
from moe_lab.models.native_top_k import config_of_one_top_k, top_k_obstacle
from moe_lab.models.routers import set_top_k_of


@EACH_FAMILY
def test_one_number_is_said_and_others_are_not(family: str) -> None:
    model = tiny_model(family)
    before = model.config.to_dict()
    layers = moe_layers(model)
    assert config_of_one_top_k(model.config, layers) is model.config
    set_top_k_of(layers[0], 1)
    layers = moe_layers(model)
    assert config_of_one_top_k(model.config, layers) is model.config
    assert top_k_obstacle(model.config, layers) == (
        f"layers [{layers[0].info.index}] choose 1 experts"
    )
    for layer in layers:
        set_top_k_of(layer, 1)
    layers = moe_layers(model)
    told = config_of_one_top_k(model.config, layers)
    assert {layer.info.top_k for layer in moe_layers(meta_model(told))} == {1}
    assert top_k_obstacle(told, layers) is None
    assert model.config.to_dict() == before
