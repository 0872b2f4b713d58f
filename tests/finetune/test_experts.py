"""Expert-only fine-tuning: what moves, what does not, and gates of condensed layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from safetensors.torch import load_file
from stand_ins import saved
from trainings import compressed, recipe_of, training
from transformers import AutoConfig

from moe_lab.finetune.experts import Experts, Gates
from moe_lab.finetune.recipe import Phase
from moe_lab.models.checkpoint import load, meta_model
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.observing import OBSERVING
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


def test_training_reaches_the_experts_that_stay(tmp_path: Path) -> None:
    model, plan, _ = saved("qwen2_moe", tmp_path / "x")
    model = load(tmp_path / "x" / "model")
    model.requires_grad_(False)
    tuning = Experts({"one": Phase(data=None)}).prepare(model, plan)
    batch = tiny_batch() | {"labels": tiny_batch()["input_ids"]}
    routers = {f"{one.info.name}.gate": one.router.weight for one in moe_layers(model)}
    trained = tuning.trainable | routers
    gradients = {}
    for implementation in ("eager", OBSERVING):
        model.set_experts_implementation(implementation)
        for parameter in trained.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        model(**batch).loss.backward()
        gradients[implementation] = {name: p.grad for name, p in trained.items()}
    assert any("constants" in name for name in trained)
    for name, gradient in gradients[OBSERVING].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients["eager"][name], rtol=1e-4, atol=1e-6)
    before = logits_of(model, tiny_batch())
    with torch.no_grad():
        for parameter in tuning.trainable.values():
            parameter -= 0.1 * parameter.grad
    after = logits_of(model, tiny_batch())
    assert not torch.equal(before, after)
    save_checkpoint(model, tmp_path / "tuned", tmp_path / "x" / "model")
    model = load(tmp_path / "tuned")
    model.set_experts_implementation(OBSERVING)
    assert torch.equal(logits_of(model, tiny_batch()), after)


# What must move: everything else must not, by a single bit.
MOVING = {
    "condense": ("layers.1.mlp.", "layers.3.mlp."),
    "prune": ("layers.2.mlp.experts.", "layers.2.mlp.shared_expert."),
    "merge": ("layers.2.mlp.experts.", "layers.2.mlp.shared_expert."),
}
GATES = ("layers.1.mlp.down_proj", "layers.3.mlp.down_proj")
TRAINED = {
    "experts": {},
    "experts and gates": {"gates": True},
    "gates": {"gates": True, "experts": False},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "what"),
    [("prune", "experts"), ("merge", "experts"), *(("condense", what) for what in TRAINED)],
    ids=" ".join,
)
def test_only_what_trains_moves(kind: str, what: str, dtype: str, tmp_path: Path) -> None:
    plan = compressed(kind, tmp_path)
    model = load(tmp_path / "compressed", dtype="float32" if dtype == "float32" else "auto")
    changes = TRAINED[what] | dict(epochs=3, weight_decay=0.1, dtype=dtype)
    training(model, plan, tmp_path, **changes).run()
    save_checkpoint(model, tmp_path / "out", tmp_path / "compressed")
    before = load_file(tmp_path / "compressed" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:  # the compressed shapes, not the original's again
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = GATES if what == "gates" else MOVING[kind]
    allowed = {name for name in before if any(part in name for part in parts)}
    assert moved
    assert moved <= allowed, moved - allowed
    counted = json.loads((tmp_path / "trainable.json").read_text())
    gates = 5 if "gates" in what else 0  # two shared parts, three experts
    weights = sum(before[name].numel() for name in allowed) if "experts" in what else 0
    assert counted["parameters"] == weights + gates
    if kind == "condense":
        assert moved == allowed


@pytest.mark.parametrize("what", TRAINED)
def test_zero_padding_of_a_native_dense_layer_stays_zero(what: str, tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, weight_decay=0.1, **TRAINED[what]).run()
    block = model.model.layers[3].mlp  # shared 24 + one expert of 16, padded to the dense 56
    width = block.gate_proj.out_features
    assert width > 40
    assert block.gate_proj.weight[40:].abs().max() == 0
    assert block.down_proj.weight[:, 40:].abs().max() == 0
    assert block.gate_proj.weight[:40].abs().min() > 0


def test_a_gate_scales_its_own_part_and_is_folded_back(tmp_path: Path) -> None:
    """The factors of one layer, found again in the columns of its down projection."""
    plan = compressed("condense", tmp_path)
    model, untouched = (load(tmp_path / "compressed", dtype="float32") for _ in range(2))
    recipe = recipe_of(gates=True, experts=False)
    tuning = recipe.prepare(model, plan)
    named = tuning.trainable
    assert {name.split(".")[2]: tuple(p.shape) for name, p in named.items()} == {
        "1": (3,),
        "3": (2,),
    }
    batch = tiny_batch()
    assert torch.equal(model(**batch).logits, untouched(**batch).logits), "factors start at 1"
    with torch.no_grad():
        named["model.layers.1.mlp.gates"].copy_(torch.tensor([0.5, 2.0, 3.0]))
        named["model.layers.3.mlp.gates"].copy_(torch.tensor([1.5, -1.0]))
    found = model(**batch).logits
    tuning.finish()
    assert not any(isinstance(module, Gates) for module in model.modules())
    assert torch.allclose(model(**batch).logits, found, atol=1e-5)
    columns = {1: [0.5] * 24 + [2.0] * 16 + [3.0] * 16, 3: [1.5] * 24 + [-1.0] * 16 + [1.0] * 16}
    for index, expected in columns.items():
        down = model.model.layers[index].mlp.down_proj.weight
        before = untouched.model.layers[index].mlp.down_proj.weight
        assert torch.equal(down, before * torch.tensor(expected))
    assert model.state_dict().keys() == untouched.state_dict().keys()


@pytest.mark.parametrize(("family", "refused"), [("gpt_oss", True), ("deepseek_v3", False)])
def test_gates_of_a_layer_in_its_own_block_are_refused_before_any_work(
    family: str, refused: bool
) -> None:
    model = tiny_model(family)
    infos = [layer.info for layer in moe_layers(model)]
    recipe = recipe_of(gates=True)
    if not refused:
        recipe.check_model(model.config, infos)
        return
    with pytest.raises(
        UserError, match=r"finetune\.gates=true: layers of gpt_oss are condensed in"
    ):
        recipe.check_model(model.config, infos)


def test_gates_need_the_widths_of_their_parts(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    for widths, message in (((), "make the plan again"), ((24, 16, 17), "layer 1 parts of")):
        first, second = plan.edits
        wrong = Plan((dataclasses.replace(first, widths=widths), second))
        assert recipe_of().prepare(model, wrong).trainable
        with pytest.raises(UserError, match=message):
            recipe_of(gates=True).prepare(model, wrong)


def test_the_trainable_share_of_deepseek_moe_16b() -> None:
    """CD-MoE-SR on 9 layers trains 3.80 % of the original model (2412.00069), counted on shapes."""
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=102400, hidden_size=2048, num_hidden_layers=28, intermediate_size=10944,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=6,
        moe_intermediate_size=1408, shared_expert_intermediate_size=2816, mlp_only_layers=[0],
        decoder_sparse_step=1, norm_topk_prob=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = meta_model(config)
    edits = [
        CondenseLayer(
            layer.info.index, layer.info.name, experts=tuple(range(6)),
            gates=(0.1,) * 6, widths=(2816, *(1408,) * 6),
        )
        for layer in moe_layers(model)[:9]
    ]  # fmt: skip
    plan = Plan(tuple(edits))
    apply_plan(model, plan)
    trainable = recipe_of().prepare(model, plan).trainable
    assert sum(parameter.numel() for parameter in trainable.values()) == 622_854_144
    assert round(100 * 622_854_144 / 16_375_728_128, 2) == 3.80
    gates = recipe_of(gates=True, experts=False).prepare(model, plan).trainable
    assert sum(parameter.numel() for parameter in gates.values()) == 9 * 7


def test_a_plan_in_which_nothing_can_train_is_refused() -> None:
    model = tiny_model("qwen2_moe")
    prune = PruneExperts(1, "model.layers.1.mlp", kept=(0, 1, 2))
    block = DropBlock(2, "model.layers.2")
    for recipe, edits, message in (
        (recipe_of(), (), "it changes nothing"),
        (recipe_of(), (KeepLayer(1, "model.layers.1.mlp"),), "it changes nothing"),
        (recipe_of(), (block,), r"edits none so \(drop_block\): finetune=none"),
        (recipe_of(), (prune, block), "drops whole layers and edits others"),
        (recipe_of(gates=True, experts=False), (prune,), "this plan condenses none"),
    ):
        with pytest.raises(UserError, match=message):
            recipe.prepare(model, Plan(edits))
