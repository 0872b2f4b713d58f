"""Variants at other numbers of experts per token: which there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from factorized import full_rank_plan
from families import tiny_model
from running import Outcome

from moe_lab.evaluate.top_k import other_top_k, with_top_k
from moe_lab.models import routers as model_routers
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.editing import prune_layer
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


def test_no_more_experts_than_a_tokens_groups_have() -> None:
    model = tiny_model("deepseek_v3")  # 2 groups of 4 experts, a token may use 1 of them
    layers = [layer.info for layer in moe_layers(model)]
    with pytest.raises(UserError, match=r"eval.top_k=\[5\]: a token can get 1 to 4 experts"):
        other_top_k([5], None, model.config, layers)
    assert other_top_k([4, 1], None, model.config, layers) == [4, 1]


def test_a_variant_without_moe_layers_has_no_other_k(job: Callable[..., Outcome]) -> None:
    few = ["eval.tasks=[]", "eval.held_out.num_samples=4", "eval.held_out.max_length=32"]
    asked = ["method=drop_layers", "condense.num_layers=3", "eval=perplexity", "eval.top_k=[1]"]
    outcome = job(*asked, *few)
    assert outcome.code == 0, outcome.text
    assert "dense_top_1/kl" in outcome.report and "compressed/kl" in outcome.report
    assert "compressed_top_1/kl" not in outcome.report


@pytest.mark.parametrize(
    "limit,named", [(1, ["own", "own_top_1"]), (0, ["own", "own_top_1", "own_top_2"])]
)
def test_twins_are_no_second_expert(limit: float, named: list[str], tmp_path: Path) -> None:
    """With two experts per token both places would go to one expert and its twin."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    model_routers.set_top_k(model, 1)
    for number, layer in enumerate(moe_layers(model)):
        prune_layer(layer, range(3 + number))
    form = save_checkpoint(model, tmp_path / "checkpoint", tmp_path / "source", twins=limit)
    (tmp_path / "form.json").write_text(json.dumps(form.to_json()))
    found = with_top_k({"own": Checkpoint(tmp_path / "checkpoint")}, [1, 2], [1, 2])
    assert list(found) == named


def test_routers_of_factorised_layers_follow_no_other_number(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    apply_plan(model, full_rank_plan(model, indices=[1]))
    save_checkpoint(model, tmp_path / "own", tmp_path / "source")
    assert list(with_top_k({"own": Checkpoint(tmp_path / "own")}, [1, 2], [1, 2])) == ["own"]


def test_one_number_is_another_where_layers_differ(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    model_routers.set_top_k_of(moe_layers(model)[1], 1)
    save_checkpoint(model, tmp_path / "several", tmp_path / "source")
    several = Checkpoint(tmp_path / "several")
    every = with_top_k({"own": several}, [2], None)
    assert list(every) == ["own", "own_top_2"]
    assert every["own_top_2"].fingerprint != several.fingerprint
    assert other_top_k([2], None, several.config, several.layers()) == [2]
