"""What a block makes of its parts: of real families, and of some that are made up here."""

from __future__ import annotations

import copy

import pytest
import torch
from families import EACH_FAMILY, tiny_model
from odd_blocks import BLOCKS, odd_model
from odd_families import ADAPTED
from odd_families import odd_model as odd_family

from moe_lab.models.layers import moe_layers
from moe_lab.models.probing import (
    Terms,
    adds_multiples,
    hands_state_on,
    probe,
    route,
    terms,
    what_else_weights_do,
)


@EACH_FAMILY
def test_a_router_called_through_its_block_gives_what_its_block_sees(family: str) -> None:
    model = tiny_model(family)
    layer = moe_layers(model)[0]
    seen: list = []
    layer.router.register_forward_hook(lambda module, args, output: seen.append(output))
    x_TD = probe(layer, tokens=7)
    with torch.no_grad():
        layer.block(x_TD[None])
        found = route(layer, x_TD)
    for one, other in zip(found, seen[0], strict=False):
        assert torch.equal(one, other.reshape(7, -1))
    assert len(seen) == 1  # past the hooks


@EACH_FAMILY
def test_the_families_are_plain_sums_and_the_weights_of_a_layer_are_not_asked(family: str) -> None:
    model = tiny_model(family)
    layer = moe_layers(model)[0]
    before = copy.deepcopy(layer.block.state_dict())
    found = terms(layer)
    assert found is not None and found.routed == 1.0
    assert found.shared == (1.0 if layer.shared is not None else 0.0)
    assert all(torch.equal(before[key], tensor) for key, tensor in layer.block.state_dict().items())
    assert terms(moe_layers(model.to("meta"))[0]) == found


FACTORS = {
    "a factor": Terms(2.5, 1.0),
    "an average": Terms(0.5, 0.5),
    "a norm": None,
    "other input": None,
    "an extra return value": Terms(1.0, 1.0),
    "a limit": None,
    "a sequence's length": None,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_a_made_up_block_does_is_found(kind: str) -> None:
    layer = moe_layers(odd_model(kind))[0]
    assert terms(layer) == FACTORS[kind]
    assert not hands_state_on(layer)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("weights used elsewhere", "beside handing them"),
     ("a bias of each expert", "beside handing them"),
     ("another gate", "is no sigmoid")],
)  # fmt: skip
def test_what_constant_weights_cannot_say_is_found(kind: str, words: str) -> None:
    layer = moe_layers(odd_model(kind))[0]
    assert words in (what_else_weights_do(layer) or "")


@EACH_FAMILY
def test_no_family_of_these_uses_its_weights_elsewhere(family: str) -> None:
    assert what_else_weights_do(moe_layers(tiny_model(family))[0]) is None


def test_it_is_found_while_a_model_is_built_elsewhere_in_half_precision() -> None:
    layer = moe_layers(odd_model("a factor").to("meta"))[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert terms(layer) == Terms(2.5, 1.0)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


def test_a_block_that_adds_multiples_to_something_else_is_told_from_others() -> None:
    adds = {kind: adds_multiples(moe_layers(odd_model(kind))[0]) for kind in BLOCKS}
    assert adds == {
        "a factor": True,
        "an average": True,
        "a norm": False,
        "other input": True,  # what parts get is another question
        "an extra return value": True,
        "a limit": False,
        "a sequence's length": False,
    }
    assert adds_multiples(moe_layers(odd_model("a bias of each expert"))[0])
    for family in ADAPTED:  # of which some add more than their experts
        layer = moe_layers(odd_family(family).to("meta"))[0]
        assert adds_multiples(layer)
