"""Pruning by the norm of router rows, and by its change from a checkpoint to another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import tiny_model

from moe_lab.methods.metrics.router_norm import router_norm
from moe_lab.methods.metrics.router_norm_change import RouterNormChange
from moe_lab.models.checkpoint import resolve
from moe_lab.models.layers import moe_layers
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import UserError


def norms_of(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Row norms by layer, straight from the state dict: all these families call it mlp.gate."""
    return {
        int(name.split(".")[2]): weight.double().square().sum(dim=1).sqrt()
        for name, weight in model.state_dict().items()
        if name.endswith("mlp.gate.weight") and len(weight) == 8
    }


def layers_of(model: torch.nn.Module) -> list[LayerStatistics]:
    """What a profile holds of the routers' norms."""
    norms = norms_of(model)
    return [
        LayerStatistics(layer.info, {"router_norm": norms[layer.info.index]})
        for layer in moe_layers(model)
    ]


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_the_change_is_fine_tuned_minus_pre_trained(family: str, tmp_path: Path) -> None:
    """The reference's own names on disk, in several shards; its dense layers have no router."""
    before, after = tiny_model(family, seed=0), tiny_model(family, seed=1)
    before.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    layers, norms = layers_of(after), norms_of(before)
    metric = RouterNormChange(str(tmp_path))
    metric.check([layer.info for layer in layers])
    assert norms.keys() == {layer.info.index for layer in layers}
    for layer in layers:
        expected = norms_of(after)[layer.info.index] - norms[layer.info.index]
        torch.testing.assert_close(metric(layer), expected, rtol=0, atol=1e-12)
        assert (metric(layer) < 0).any() and (metric(layer) > 0).any(), "a sign, no distance"
        assert torch.equal(router_norm(layer), norms_of(after)[layer.info.index])


REFUSED = {
    "layers": ("qwen2_moe", {"num_hidden_layers": 5}, r"MoE layers \[1, 2, 3, 4\], the model"),
    "experts": ("qwen2_moe", {"num_experts": 6}, r"has 6 experts in layer 1, the model 8"),
    "hidden": ("qwen2_moe", {"hidden_size": 64}, r"has 64 hidden units in layer 1, the model 32"),
    "alike": (
        "qwen3_moe",
        {"mlp_only_layers": [0]},
        "of another family than the model, 'qwen2_moe'",
    ),
    "family": ("mixtral", {}, r"\(a 'mixtral'\) has MoE layers \[0, 1, 2, 3\], the model \[1, 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_architecture_is_refused_with_both(case: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[case]
    tiny_model(family, **changes).save_pretrained(tmp_path)
    layers = [layer.info for layer in moe_layers(tiny_model("qwen2_moe"))]
    with pytest.raises(UserError, match=message):
        RouterNormChange(str(tmp_path)).check(layers)


def test_a_reference_that_is_none_is_refused(tmp_path: Path) -> None:
    layers = [layer.info for layer in moe_layers(tiny_model("qwen2_moe"))]
    for reference, message in (
        (None, r"metric\.reference=<folder or hub id>"),
        (str(tmp_path), r"metric\.reference: .* holds no checkpoint: config\.json is missing"),
        ("./nowhere", r"metric\.reference: .*neither a folder here nor a hub id"),
    ):
        with pytest.raises(UserError, match=message):
            RouterNormChange(reference).check(layers)


@pytest.fixture
def pre_trained(checkpoint: Path, tokenizer, tmp_path: Path) -> Path:
    """A checkpoint of the architecture of `checkpoint`, with other weights."""
    folder = tmp_path / "before"
    tiny_model(
        "qwen2_moe", seed=7, vocab_size=len(tokenizer), max_position_embeddings=512
    ).save_pretrained(folder)
    return folder


def test_a_job_keeps_the_experts_whose_norm_grew_most(job, checkpoint, pre_trained, tmp_path):
    asked = ("metric=router_norm_change", "ratio.ratio=0.5")
    outcome = job(*asked, f"metric.reference={pre_trained}")
    assert outcome.code == 0, outcome.text
    plan = json.loads((tmp_path / "job" / "plan.json").read_text())
    after, before = (norms_of(resolve(path).load()) for path in (checkpoint, pre_trained))
    for layer in plan["layers"]:
        change = after[layer["index"]] - before[layer["index"]]
        assert layer["scores"] == pytest.approx(change.tolist(), abs=1e-9)
        assert layer["kept"] == sorted(change.topk(4).indices.tolist())
    plain = job("metric=router_norm", "ratio.ratio=0.5")
    assert plain.code == 0 and plain.report["cached/profile"], plain.text
    kept = json.loads((tmp_path / "job" / "plan.json").read_text())["layers"]
    assert [row["kept"] for row in kept] == [
        sorted(after[row["index"]].topk(4).indices.tolist()) for row in kept
    ]


def test_a_plan_depends_on_what_the_reference_holds(job, pre_trained, tmp_path):
    asked = ("metric=router_norm_change", "ratio.ratio=0.5")
    first = job(*asked, f"metric.reference={pre_trained}")
    assert first.code == 0 and not first.report["cached/plan"], first.text
    copy = shutil.copytree(pre_trained, tmp_path / "elsewhere")
    assert job(*asked, f"metric.reference={copy}").report["cached/plan"]
    tiny_model("qwen2_moe", seed=8, vocab_size=259, max_position_embeddings=512).save_pretrained(
        copy
    )
    assert not job(*asked, f"metric.reference={copy}").report["cached/plan"]


def test_a_job_refuses_before_it_profiles(job):
    outcome = job("metric=router_norm_change")
    assert outcome.code == 2 and "metric.reference=<folder or hub id>" in outcome.text
    assert "Traceback" not in outcome.text and not outcome.stages()
