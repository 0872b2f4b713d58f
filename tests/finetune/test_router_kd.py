"""Router distillation: routers alone move, and come nearer to the intact model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distilling import (
    COMPUTE,
    FEW,
    KEPT,
    TEXTS,
    curve,
    reading,
    recipe_of,
    slow_rows,
    taught,
    train_one,
    training,
)
from families import COMMON, FAMILIES, tiny_model
from running import start_two
from transformers import AutoConfig

from moe_lab.data.tokens import IGNORED, Tokens
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.router_kd import RouterKD
from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


def divergence_of(home: Path, model: torch.nn.Module, tokens: Tokens) -> float:
    """The mean exact KL(intact || model) over the targets."""
    p, q = slow_rows(load(home / "dense"), tokens), slow_rows(model, tokens)
    return (p.exp() * (p - q)).sum().item() / len(p)


def test_only_routers_move_and_come_nearer(home: Path, tmp_path: Path) -> None:
    before = divergence_of(home, load(home / "pruned", dtype="float32"), TEXTS["lm/data"])
    done = training(home, tmp_path, "whole", kind=RouterKD, supervised=False, epochs=8)
    frozen = {name: value.clone() for name, value in done.model.state_dict().items()}
    done.run()
    moved = {n for n, value in done.model.state_dict().items() if not torch.equal(value, frozen[n])}
    assert moved == {f"model.layers.{index}.mlp.gate.weight" for index in KEPT}
    assert moved == set(json.loads((tmp_path / "trainable.json").read_text())["tensors"])
    start, *rows = curve(tmp_path)
    assert start.keys() == {"phase", "step", "validation_loss", "validation_distillation"}
    assert {"loss", "distillation", "gradient_norm"} <= rows[0].keys()
    after = divergence_of(home, done.model, TEXTS["lm/data"])
    assert after < 0.8 * before
    # What the curve says is what was measured, also of text that it did not train on.
    held = divergence_of(home, done.model, TEXTS["lm/validation"])
    assert rows[-1]["validation_distillation"] == pytest.approx(held, rel=1e-4)
    surprise = -slow_rows(done.model, TEXTS["lm/validation"])
    targets = [token for sample in TEXTS["lm/validation"].samples for token in sample[1:]]
    mean = surprise[range(len(targets)), targets].mean().item()
    assert rows[-1]["validation_loss"] == pytest.approx(mean, rel=1e-4)


PROCESS = """
import sys
from pathlib import Path
import torch
import distilling
torch.set_num_threads(1)
distilling.train_one(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_two_processes_train_as_one(home: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    started = start_two(PROCESS, str(home), str(two))
    train_one(home, one)
    assert [process.wait(timeout=500) for process in started] == [0, 0]
    rows, others = curve(one), curve(two)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for key in ("loss", "distillation", "validation_distillation"):
        values, found = ([row[key] for row in found if key in row] for found in (rows, others))
        assert found == pytest.approx(values, rel=1e-4) and len(values) > 1
    routers, found = (torch.load(folder / "routers.pt") for folder in (one, two))
    for name in routers:  # Adam amplifies the rounding of gradients near 0 to a step's size
        assert (routers[name] - found[name]).abs().mean() < 1e-4 * routers[name].std()


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_every_family_train(family: str, tmp_path: Path) -> None:
    """Every router gets a gradient, and correction biases, which choose alone, stay."""
    dense = tiny_model(family)
    model = tiny_model(family)
    groups = moe_layers(model)[0].info.groups
    kept = (0, 1, 2, 4, 5, 6) if groups > 1 else (0, 1, 3, 4, 6)
    edits = [PruneExperts(one.info.index, one.info.name, kept=kept) for one in moe_layers(model)]
    apply_plan(model, plan := Plan(tuple(edits[:1])))
    tuning = recipe_of(RouterKD).prepare(model.requires_grad_(False), plan)
    routers = [one.router for one in moe_layers(model)]
    assert len(tuning.trainable) >= len(routers) == len(edits)
    assert all("bias" not in name or family == "gpt_oss" for name in tuning.trainable)
    for parameter in tuning.trainable.values():
        parameter.requires_grad_(True)
    batch = TEXTS["lm/data"].take(range(6)).labelled()
    with torch.no_grad():
        logits = dense(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
        targets = batch["labels"][:, 1:] != IGNORED
        batch |= taught(logits[:, :-1][targets], 8, 1.0)
    losses = tuning.losses(batch)
    losses["distillation"].backward()
    assert losses["distillation"] > 0
    for name, parameter in tuning.trainable.items():
        assert parameter.grad.abs().max() > 0, name


def test_a_correction_bias_that_is_a_parameter_does_not_train() -> None:
    """Most families have it as a buffer; ernie4_5_moe keeps a parameter, inside the router."""
    numbers = dict(moe_num_experts=8, moe_k=2, moe_intermediate_size=16, intermediate_size=48)
    model = meta_model(AutoConfig.for_model("ernie4_5_moe", **COMMON, **numbers))
    routers = [layer.router for layer in moe_layers(model)]
    inside = [name for router in routers for name, _ in router.named_parameters()]
    assert len(inside) == 2 * len(routers) and any("correction_bias" in name for name in inside)
    trainable = recipe_of(RouterKD).prepare(model, Plan(())).trainable
    assert {name.rpartition(".mlp.")[2] for name in trainable} == {"gate.weight"}
    assert len(trainable) == len(routers)


def test_routers_learn_whatever_their_rows_lead_to(home: Path, tmp_path: Path) -> None:
    """Layers of different sizes, stand-ins and merged experts: a checkpoint in our own form."""
    model = load(home / "dense")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    groups = ((0, 1, 2), (3, 4, 5), (6, 7))
    merged = dict(kept=(0, 3, 6), groups=groups, weights=((1 / 3,) * 3, (1 / 3,) * 3, (0.5, 0.5)))
    edits = (
        PruneExperts(1, names[1], kept=(0, 1, 2, 5, 7)),
        PruneExperts(2, names[2], kept=(3, 4, 6), replacement="constant"),
        MergeExperts(3, names[3], router="all", align="none", **merged),
    )
    plan = Plan(edits, tensors={"layers.2.constants": torch.linspace(-1, 1, 160).view(5, 32)})
    apply_plan(model, plan)
    save_checkpoint(model, tmp_path / "own", home / "dense")
    for kind in ({"kind": RouterKD}, {"distillation": 1.0}):
        model = load(tmp_path / "own", dtype="float32")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        recipe = recipe_of(**kind, supervised=False, epochs=6, learning_rate=3e-3)
        folder = tmp_path / type(recipe).__name__
        folder.mkdir()
        given = plan, recipe, TEXTS, 0, COMPUTE, folder, reading(home, "few")
        finetune_training.Training(model, *given).run()
        found = [row["distillation"] for row in curve(folder) if "distillation" in row]
        assert sum(found[-6:]) < 0.9 * sum(found[:6]), "the last epoch against the first"
        save_checkpoint(model, folder / "saved", tmp_path / "own")
        after = load(folder / "saved", dtype="float32").state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        routers = {name for name in before if name.endswith("mlp.gate.weight")}
        if isinstance(recipe, RouterKD):
            assert moved == routers and len(routers) == 3
            assert [len(after[name]) for name in sorted(routers)] == [5, 8, 8]
        else:
            assert moved.isdisjoint(routers) and "model.layers.2.mlp.experts.constants" in moved


def test_what_cannot_be_is_refused(job, tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1, vocab_size=259)
    model.save_pretrained(tmp_path / "one")
    for options, words in (
        (["method=drop_layers", "condense.num_layers=3"], ["MoE layers", "the plan leaves none"]),
        (["finetune.temperature=0"], ["finetune.temperature=0", "above 0"]),
        (["finetune.teacher_top_k=0"], ["finetune.teacher_top_k=0", "at least 1, or null"]),
        (["finetune=experts", "finetune.distillation=1.5"], ["=1.5", "from 0", "to 1"]),
    ):
        outcome = job(*FEW, *options)
        assert outcome.code == 2 and not outcome.stages(), outcome.text
        assert all(word in outcome.text for word in words), outcome.text
    always_one = Checkpoint(tmp_path / "one")
    with pytest.raises(UserError, match=r"always 1.*finetune\.distillation=1"):
        recipe_of(RouterKD).check_model(always_one.config, always_one.layers())
    two = tiny_model("mixtral").config
    recipe_of(RouterKD).check_model(two, [one.info for one in moe_layers(meta_model(two))])
    outcome = job(*FEW, "method=none")  # nothing to learn: the intact model is the teacher
    assert outcome.code == 0 and "seconds/finetune" not in outcome.report
