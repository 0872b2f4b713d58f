"""What decoder layers hand on beside the hidden state: found, carried, or refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import EACH_FAMILY
from families import tiny_model as usual_model
from transformers import PreTrainedModel

from moe_lab.families.tiny import tiny_model
from moe_lab.models.handed_on import Decoders, HandedOn
from moe_lab.models.layerwise import decoder_layers
from moe_lab.models.stream import LayerStream, States
from moe_lab.types import UserError


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def found(model: PreTrainedModel) -> HandedOn:
    decoders = Decoders(model, decoder_layers(model)[1], lambda index: nullcontext())
    return HandedOn.found(decoders, batch())


@EACH_FAMILY
def test_most_layers_hand_on_the_hidden_state_alone(family: str) -> None:
    assert found(usual_model(family)) == HandedOn((), False)


HANDED = {
    "glm_moe_dsa": ("prev_topk_indices",),
    "hy_v4": ("prev_topk_indices",),
    "zaya": ("prev_router_hidden_states",),
}


@pytest.mark.parametrize("family", HANDED)
@torch.no_grad()
def test_what_is_handed_on_is_carried_from_layer_to_layer(family: str) -> None:
    model = tiny_model(family)
    assert found(model) == HandedOn(HANDED[family], True)
    stream = LayerStream(model, [batch()])
    states = States(stream)
    states.move_to(len(stream.layers))
    expected = model(**batch(), use_cache=False).logits
    assert torch.equal(stream.logits(0, states[0]), expected)
    with pytest.raises(UserError, match=HANDED[family][0]):
        stream.check_hidden_alone()


def test_what_the_model_computes_between_layers_is_refused() -> None:
    with pytest.raises(UserError, match="is given block_states, which the model computes"):
        found(tiny_model("inkling2_text"))
