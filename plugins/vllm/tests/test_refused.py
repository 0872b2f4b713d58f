"""What is not served: damaged checkpoints, and structures that the plugin does not know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve
from moe_lab_vllm.form import Layer, read_form, read_layers
from safetensors.torch import load_file, save_file

CASE = "qwen2_moe-stand_ins"
EXPERT = "model.layers.2.mlp.experts.1.up_proj.weight"
Change = Callable[[dict[str, Any]], object]


def _say(index: str, **values: Any) -> Change:
    return lambda config: config["moe_lab"]["layers"].setdefault(index, {}).update(values)


CONFIGS: dict[str, tuple[Change, str]] = {
    "newer": (lambda c: c["moe_lab"].update(version=5), "reads version 2: install"),
    "packed": (lambda c: c["moe_lab"].update(version=4), "packed in few bits"),
    "uneven": (lambda c: c["moe_lab"].update(version=3), "not equally wide"),
    "in place": (_say("1", in_place=True, width=8), "says in_place, which moe_lab_vllm does not"),
    "of others": (_say("1", own={"tucker": {}}), "says own, which moe_lab_vllm does not serve"),
    "family": (lambda c: c["moe_lab"]["config"].update(model_type="gpt_oss"), "is a gpt_oss in"),
    "stand-in": (_say("1", stand_in="mean"), "knows zero, constant, copy"),
    "no number": (_say("1", num_experts="6"), "says num_experts '6'"),
    "beyond": (_say("9", num_experts=6), r"lists layers \[9\], its model has 4"),
    "hollow": (lambda c: c.pop("moe_lab"), "was it written by moe_lab"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_not_served_is_refused_before_any_weight(
    cases: Path, tmp_path: Path, name: str
) -> None:
    from moe_lab_vllm import register
    from transformers import AutoConfig

    register()
    change, words = CONFIGS[name]
    config = json.loads((cases / CASE / "model" / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        AutoConfig.from_pretrained(tmp_path)


def test_a_layer_is_read_as_it_is_written() -> None:
    told = {"rows": 8, "num_experts": 5, "stand_in": "copy", "expert_width": 12, "top_k": 1}
    form = {"version": 2, "config": {}, "layers": {"10": told, "2": {"width": 0}}}
    layers = read_layers(read_form({"moe_lab": form}))
    assert layers == {2: Layer(width=0), 10: Layer(5, 8, "copy", 12, 1)}
    assert layers[10].num_stand_ins == 3


def damaged(case: Path, folder: Path, change: Change) -> Path:
    """A copy of a case whose tensors were changed."""
    shutil.copytree(case, folder)
    file = folder / "model" / "model.safetensors"
    tensors: dict[str, Any] = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


TENSORS: dict[str, tuple[Change, str]] = {
    "an_expert_less": (lambda t: t.pop(EXPERT), f"lacks {EXPERT} that"),
    "no_constants": (
        lambda t: t.pop("model.layers.1.mlp.experts.constants"),
        "lacks model.layers.1.mlp.experts.constants that",
    ),
    "an_expert_more": (
        lambda t: t.update({EXPERT.replace(".1.up", ".5.up"): t[EXPERT].clone()}),
        "has model.layers.2.mlp.experts.5.up_proj.weight, for which",
    ),
    "narrower": (
        lambda t: t.update({EXPERT: t[EXPERT][:12].contiguous()}),
        f"{EXPERT} of this checkpoint is (12, 64), its config says (16, 64)",
    ),
    "astray": (
        lambda t: t["model.layers.1.mlp.experts.place_E"].fill_(8),
        "model.layers.1.mlp.experts.place_E leads to 8",
    ),
}


def test_a_damaged_checkpoint_is_refused_by_the_tensors_name(
    cases: Path, serve: Serve, tmp_path: Path
) -> None:
    folders = [
        damaged(cases / CASE, tmp_path / name, change) for name, (change, _) in TENSORS.items()
    ]
    answers = serve(*folders)
    for name, (_, words) in TENSORS.items():
        assert words in answers[name].get("error", "served"), (name, answers[name])


def test_ways_to_serve_that_were_not_tried_are_refused(serve: Serve) -> None:
    (answer,) = serve(CASE, **{"enable-lora": True}).values()
    assert "does not serve moe_lab's own form with LoRA adapters" in answer["error"]
