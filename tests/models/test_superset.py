"""Models as those of a family that can say more: the same function, in stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import applied, condense, drop, edited, in_fresh_process, prune
from families import tiny_model
from real_models import REAL, shrunk, write_tiny
from running import EditedModel
from transformers import AutoConfig

from moe_lab.methods.condense.method import Condense
from moe_lab.models.architecture import config_of
from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.condensing import edited_blocks
from moe_lab.models.forms import form_of
from moe_lab.models.layers import moe_layers
from moe_lab.models.superset import SUPERSETS, as_superset, obstacle_of, superset_of

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 32,
}  # fmt: skip
# What the family cannot say by itself: any dense layer, or one that is not among the first.
CASES: dict[str, tuple[str, list[dict], dict[str, Any]]] = {
    "mixtral": ("mixtral", [condense(1, [0, 4]), condense(3, [2])], {}),
    "mixtral_head_dim": ("mixtral", [condense(0, [1])], {"head_dim": 16}),
    "mixtral_tied": ("mixtral", [condense(2, [1])], {"tie_word_embeddings": True}),
    "mixtral_dropped": ("mixtral", [drop("drop_layer", 2)], {}),
    "mixtral_pruned": (
        "mixtral",
        [prune(index, [0, 3, 5, 6]) for index in (0, 1, 3)] + [condense(2, [4])],
        {},
    ),
    "deepseek_v3": ("deepseek_v3", [condense(2, [1, 3])], {}),
    "deepseek_v3_yarn": (
        "deepseek_v3", [condense(3, [1])], {"q_lora_rank": 16, "rope_parameters": YARN},
    ),
    "deepseek_v3_halves": ("deepseek_v3", [condense(3, [0])], {"rope_interleave": False}),
    "deepseek_v3_all_sparse": ("deepseek_v3", [condense(1, [2])], {"first_k_dense_replace": 0}),
    "deepseek_v3_dropped": ("deepseek_v3", [drop("drop_layer", 2)], {}),
}  # fmt: skip


def test_what_stock_transformers_loads_computes_the_same(tmp_path: Path) -> None:
    for name, (family, edits, changes) in CASES.items():
        assert edited(family, edits, tmp_path / name, convert="superset", **changes), name
        written = json.loads((tmp_path / name / "model" / "config.json").read_text())
        assert written["model_type"] == SUPERSETS[family].model_type
        assert "moe_lab" not in written
    folders = [tmp_path / name for name in CASES]
    assert in_fresh_process("stock", folders) == dict.fromkeys(CASES, 0.0)


def test_without_the_option_it_stays_its_own_familys(tmp_path: Path) -> None:
    family, edits, _ = CASES["mixtral"]
    assert not edited(family, edits, tmp_path / "x")
    assert load(tmp_path / "x" / "model").config.model_type == "mixtral"


def test_what_the_family_says_itself_is_not_converted(tmp_path: Path) -> None:
    assert edited("deepseek_v3", [condense(1, [2])], tmp_path / "x", convert="superset")
    assert load(tmp_path / "x" / "model").config.model_type == "deepseek_v3"


def test_the_form_is_foreseen_with_its_reason() -> None:
    model = applied("mixtral", [condense(1, [0, 4])])
    [name] = edited_blocks(model)
    source = tiny_model("mixtral").config

    def reason(padding: float, experts: int = 2) -> tuple[bool, str]:
        edits = [condense_edit(name, experts)]
        form = form_of(source, edits, padding, "superset")
        return form.stock, form.reason

    stock, told = reason(padding=1.0)
    assert stock and told.startswith("as qwen2_moe (method.convert=superset), which computes the")
    assert "in half precision it rounds the router's weights" in told
    assert reason(padding=0.0)[0], "one width needs no zeros"


def condense_edit(name: str, experts: int) -> Any:
    from moe_lab.models.edits.condense import CondenseLayer

    some = tuple(range(experts))
    return CondenseLayer(1, name, some, (1.0,) * experts, widths=(16,) * experts)


def test_too_many_zeros_are_not_added(tmp_path: Path) -> None:
    family, edits, _ = CASES["mixtral"]
    assert not edited(family, edits, tmp_path / "x", padding=0.0, convert="superset")
    assert in_fresh_process("ours", [tmp_path / "x"]) == {"x": 0.0}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mixtral", {"sliding_window": 4}, "qwen2_moe cannot say sliding_window=4"),
        ("mixtral", {"router_jitter_noise": 0.1}, "qwen2_moe cannot say router_jitter_noise=0.1"),
        ("mixtral", {"attention_sinks": 2}, "what attention_sinks of its config means"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "cannot say scoring_func=softmax"),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, "where partial_rotary_factor is not 1"),
        ("olmoe", {}, "no family that says more is known for olmoe"),
    ],
)
def test_what_the_other_family_cannot_say_is_an_obstacle(
    family: str, changes: dict, reason: str, tmp_path: Path
) -> None:
    edits = [condense(2, [1])]
    assert not edited(family, edits, tmp_path / "x", convert="superset", **changes)
    model = load(tmp_path / "x" / "model")
    assert reason in obstacle_of(model)
    form = form_of(load(tmp_path / "x" / "source").config, [], convert="superset")
    assert form.plain, "nothing is edited"


def test_other_edits_are_not_what_it_helps_with() -> None:
    unequal = applied("mixtral", [prune(0, [0, 1, 2]), condense(1, [0])])
    assert obstacle_of(unequal) == "no family says different numbers of experts"
    assert obstacle_of(tiny_model("mixtral")) == "it helps where layers became dense"


@pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_v3", "kimi_k2"])
def test_the_published_models_have_no_obstacle(name: str) -> None:
    published = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
                 "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True}  # fmt: skip
    more = {} if name == "mixtral_8x7b" else published
    config = config_of(REAL[name]["architecture"] | more)
    layers = [layer.info for layer in moe_layers(meta_model(config))]
    form = form_of(config, Condense(3, 4).example(layers), convert="superset")
    assert form.stock and form.config.model_type == SUPERSETS[config.model_type].model_type
    there = superset_of(config)
    assert there.num_hidden_layers == config.num_hidden_layers
    source, target = AutoConfig.for_model(config.model_type), type(there)()
    # Not the model_type, the width of dense layers, and the window of sliding attention: 0 is none.
    other = {"model_type", "intermediate_size", "sliding_window"}
    same = source.to_dict().keys() & target.to_dict().keys() - other
    assert {field: getattr(there, field) for field in same} == {
        field: getattr(config, field) for field in same
    }


def test_nothing_is_left_out_in_silence() -> None:
    model = tiny_model("mixtral")
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"as qwen2_moe.*extra\.weight"):
        as_superset(model)


def test_a_run_says_so_before_it_begins_and_works_with_what_it_made(
    tmp_path: Path,
    tokenizer: Any,
    job: Callable[..., EditedModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="moe_lab.stages.checks")
    small = shrunk(REAL["mixtral_8x7b"]["architecture"], len(tokenizer))
    write_tiny(small, tmp_path / "tiny", tokenizer)
    options = [
        f"model.path={tmp_path / 'tiny'}",
        "method=condense",
        "condense.experts=frequency",
        "condense.layers=[1]",
        "condense.padding=1",
        "measure=speed",
        "measure.prompt_length=8",
        "measure.decode_tokens=2",
        "measure.repeats=1",
    ]
    assert job(*options).report["compressed/stock"] is False
    done = job(*options, "condense.convert=superset")
    assert done.code == 0, done.text
    assert "the result will be saved as qwen2_moe (method.convert=superset)" in done.text
    assert done.report["compressed/stock"] is True
    made = Checkpoint(Path(done.report["compressed/checkpoint"]))
    assert made.config.model_type == "qwen2_moe" and made.config.mlp_only_layers == [1]
    refused = job(*options, "condense.convert=any")
    assert refused.code == 2 and "superset" in refused.text
