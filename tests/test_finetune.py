"""Expert-only fine-tuning: what moves, what does not, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_batch, tiny_model
from safetensors.torch import load_file

from moe_lab.checkpoint import load
from moe_lab.compute import Compute
from moe_lab.data import Tokens
from moe_lab.finetune.experts import Experts
from moe_lab.moe import apply_plan, moe_layers
from moe_lab.saving import save
from moe_lab.stages import finetune as stage
from moe_lab.types import Edit, Plan, UserError

PLANS = {
    "condense": [
        dict(index=1, edit="condense", experts=(5, 2), gates=(0.4, 0.3), shared_gate=0.5),
        dict(index=3, edit="condense", experts=(0,), gates=(0.2,), shared_gate=0.5),
    ],
    "prune": [dict(index=2, edit="prune", kept=(0, 1, 2, 5))],
}
# What must move: everything else must not, by a single bit.
MOVING = {
    "condense": ("layers.1.mlp.", "layers.3.mlp."),
    "prune": ("layers.2.mlp.experts.", "layers.2.mlp.shared_expert."),
}


def samples(seed: int, count: int) -> Tokens:
    batch = tiny_batch(seed=seed, batch=count, padding=False)
    rows = [tuple(row[: 4 + i % 7].tolist()) for i, row in enumerate(batch["input_ids"])]
    return Tokens(tuple(rows), pad_id=0)


def training(model, plan: Plan, folder: Path, **changes: object) -> stage.Training:
    options = dict(data=None, validation=None, batch_size=4, learning_rate=1e-2, validate_every=3)
    tokens = {"data": samples(1, 24), "validation": samples(2, 6)}
    recipe = Experts(**(options | changes))
    return stage.Training(
        model, plan, recipe, tokens, seed=0, compute=Compute("cpu"), folder=folder
    )


def compressed(kind: str, folder: Path) -> Plan:
    """A compressed checkpoint in folder/compressed, in bfloat16 as real ones are."""
    model = tiny_model("qwen2_moe").to(torch.bfloat16)
    model.save_pretrained(folder / "source")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    plan = Plan(tuple(Edit(name=names[edit["index"]], **edit) for edit in PLANS[kind]))
    model = load(folder / "source", dtype="float32")
    apply_plan(model, plan)
    save(model, folder / "compressed", folder / "source")
    return plan


@pytest.mark.parametrize("kind", PLANS)
def test_only_the_experts_of_edited_layers_move(kind: str, tmp_path: Path) -> None:
    plan = compressed(kind, tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, epochs=3, weight_decay=0.1).run()
    save(model, tmp_path / "out", tmp_path / "compressed")
    before = load_file(tmp_path / "compressed" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    allowed = {name for name in before if any(part in name for part in MOVING[kind])}
    assert moved
    assert moved <= allowed, moved - allowed
    counted = json.loads((tmp_path / "trainable.json").read_text())
    assert counted["parameters"] == sum(before[name].numel() for name in allowed)
    if kind == "condense":
        assert moved == allowed


def test_zero_padding_of_a_native_dense_layer_stays_zero(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, weight_decay=0.1).run()
    block = model.model.layers[3].mlp  # shared 24 + one expert of 16, padded to the dense 56
    width = block.gate_proj.out_features
    assert width > 40
    assert block.gate_proj.weight[40:].abs().max() == 0
    assert block.down_proj.weight[:, 40:].abs().max() == 0
    assert block.gate_proj.weight[:40].abs().min() > 0


class Killed(Exception):
    """Stands for SIGKILL: nothing runs after it."""


@pytest.mark.parametrize("kind", PLANS)
def test_resumed_equals_uninterrupted(kind: str, tmp_path: Path, monkeypatch) -> None:
    plan = compressed(kind, tmp_path)
    results = []
    for name, stop in (("whole", None), ("stopped", 5)):
        folder = tmp_path / name
        folder.mkdir()
        if stop is not None:
            first = training(load(tmp_path / "compressed", dtype="float32"), plan, folder, epochs=2)
            first.save_every = 4
            step = first._step

            def dying(number: int, batch: dict, step=step, stop=stop) -> dict[str, float]:
                if number == stop:
                    raise Killed
                return step(number, batch)

            monkeypatch.setattr(first, "_step", dying)
            with pytest.raises(Killed):
                first.run()
            assert (folder / stage.STATE).is_file()
            assert len((folder / "curve.jsonl").read_text().splitlines()) == 5
        model = load(tmp_path / "compressed", dtype="float32")
        training(model, plan, folder, epochs=2).run()
        results.append((model.state_dict(), (folder / "curve.jsonl").read_text()))
    (whole, curve), (resumed, resumed_curve) = results
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert curve == resumed_curve
    assert [json.loads(row)["step"] for row in curve.splitlines()] == list(range(1, 13))


def test_it_learns_and_the_curve_says_so(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, epochs=8).run()
    rows = [json.loads(row) for row in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert "validation_loss" in rows[-1]
    rates = [row["learning_rate"] for row in rows]
    peak = rates.index(max(rates))
    assert 0 < rates[0] < rates[peak] == pytest.approx(1e-2)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_padding_enters_no_loss() -> None:
    model, recipe = tiny_model("qwen2_moe"), Experts(data=None, validation=None)
    rows = samples(3, 5)
    with torch.no_grad():
        padded = recipe.loss(model, rows.pad(rows.samples))
        other = Tokens(rows.samples, pad_id=7).pad(rows.samples)
        assert torch.equal(padded, recipe.loss(model, other))
        losses, targets = [], []
        for row in rows.samples:
            losses.append(recipe.loss(model, rows.pad([row])).item())
            targets.append(len(row) - 1)
    mean = sum(loss * n for loss, n in zip(losses, targets, strict=True)) / sum(targets)
    assert padded.item() == pytest.approx(mean, rel=1e-5)


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    recipe = Experts(data=None, validation=None)
    with pytest.raises(UserError, match="edits none"):
        recipe.trainable(tiny_model("qwen2_moe"), Plan(()))
    with pytest.raises(UserError, match="above 0"):
        Experts(data=None, validation=None, learning_rate=0)


def test_divergence_is_reported_with_the_way_out(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"lower finetune\.learning_rate"):
        training(model, plan, tmp_path).run()
