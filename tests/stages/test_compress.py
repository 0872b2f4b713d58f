"""The stage of compressing: what a plan makes of a checkpoint, once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import FEW
from families import logits_of, tiny_model
from mtp_checkpoints import stored, write_with_mtp
from running import Job
from safetensors.torch import load_file, save_file

from moe_lab.compute import Compute
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.stages.compress import Compression, compress
from moe_lab.stages.context import Context
from moe_lab.stages.run import checkpoint_of
from moe_lab.store import Artifact, Store


def planned(store: Store, plan: Plan) -> Artifact:
    def make(folder: Path) -> None:
        (folder / "plan.json").write_text(plan.to_text())
        plan.write_tensors(folder / "plan.json")

    return store.get("plan", {"plan": plan.to_text()}, make)


def test_a_plan_is_carried_out_once_and_says_in_which_form(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "dense")
    store, dense = Store(tmp_path / "store"), Checkpoint(tmp_path / "dense")
    names = {layer.info.index: layer.info.name for layer in moe_layers(dense.load())}
    alike = Plan(tuple(PruneExperts(i, name, kept=(0, 2, 5, 7)) for i, name in names.items()))
    uneven = Plan(alike.edits[:1], notes={"padding": 0.5})
    for plan, stock in ((alike, True), (uneven, False)):
        asked = Compression(dense, planned(store, plan))
        made = compress(Context(store, Compute("cpu")), asked)
        assert json.loads((made.folder / "form.json").read_text())["stock"] == stock
        expected = dense.load()
        apply_plan(expected, plan)
        compressed = checkpoint_of(made, dense)
        assert compressed.fingerprint == made.key
        assert torch.equal(logits_of(compressed.load()), logits_of(expected))
        again = compress(Context(store, Compute("cpu", batch_size=1)), asked)
        assert (made.cached, again.cached, again.key) == (False, True, made.key)
    exact = Compression(replace(dense, dtype="float32"), planned(store, alike))
    other = compress(Context(store, Compute("cpu")), exact)
    assert not other.cached, "computed in another dtype"
    assert len(list((store.root / "compress").glob("*/form.json"))) == 3


def test_other_files_of_a_tokenizer_are_another_checkpoint(job: Job, small: list[str]) -> None:
    path = next(Path(one.removeprefix("model.path=")) for one in small if "model.path=" in one)
    first = job()
    for name, key, value in (
        ("tokenizer_config.json", "chat_template", "{{ messages[0].content }}"),
        ("generation_config.json", "max_new_tokens", 5),
    ):
        copy = first.store.parent / f"with_another_{key}"
        shutil.copytree(path, copy)
        values = json.loads((copy / name).read_text()) | {key: value}
        (copy / name).write_text(json.dumps(values))
        second = job(f"model.path={copy}")
        assert second.report["cached/plan"]
        made = Path(second.report["compressed/checkpoint"])
        assert json.loads((made / name).read_text())[key] == value


@pytest.mark.parametrize(
    "name", ["mlp.gate.weight", "mlp.shared_experts.up_proj.weight", "hnorm.weight"]
)
def test_an_mtp_layer_that_is_not_finite_decides_nothing(
    name: str, job: Job, tokenizer: Any, tmp_path: Path
) -> None:
    model = tmp_path / "glm"
    write_with_mtp("glm4_moe", model, vocab_size=len(tokenizer), max_position_embeddings=512)
    tokenizer.save_pretrained(model)
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        if (key := f"model.layers.4.{name}") in tensors:
            tensors[key].view(-1)[-1] = float("nan")
            save_file(tensors, path, {"format": "pt"})
    done = job(f"model.path={model}", "metric=router_norm", "ratio.ratio=0.5")
    assert done.code == 2 and f"model.layers.4.{name}" in done.text and "NaN" in done.text
    assert not list(done.store.glob("compress/*/artifact.json"))


def test_mtp_layers_go_through_a_run(job: Job, tokenizer: Any, tmp_path: Path) -> None:
    """Pruned with all others and carried past the tuning; left whole only where that can be."""
    model = tmp_path / "glm"
    made = write_with_mtp("glm4_moe", model, vocab_size=len(tokenizer), max_position_embeddings=512)
    tokenizer.save_pretrained(model)
    asked = [f"model.path={model}", "metric=router_norm", "ratio.ratio=0.5"]
    refused = job(*asked, "method.mtp=keep")
    assert refused.code == 2 and "8 experts while all other layers have 4" in refused.text
    assert refused.stages() == [], "before any work"
    assert job(*asked, "method.mtp=some").code == 2
    merging = ["method=merge", "method.router=dominant", "method.num_experts=6", "method.mtp=keep"]
    assert "8 experts while all other layers have 6" in job(*asked, *merging).text

    done = job(*asked, *FEW, "finetune=experts")
    assert done.code == 0, done.text
    [compressed], [tuned] = (
        list(done.store.glob(f"{stage}/*/checkpoint")) for stage in ("compress", "finetune")
    )
    gate, experts = "model.layers.4.mlp.gate.weight", "model.layers.4.mlp.experts"
    kept = sorted(made[gate].norm(dim=1).topk(4).indices.tolist())
    before, after = stored(compressed), stored(tuned)
    for read in (before, after):
        assert torch.equal(read[gate], made[gate][kept])
        for place, expert in enumerate(kept):
            wanted = made[f"{experts}.{expert}.up_proj.weight"]
            assert torch.equal(read[f"{experts}.{place}.up_proj.weight"], wanted)
        assert f"{experts}.4.up_proj.weight" not in read
    trained = "model.layers.3.mlp.experts.0.up_proj.weight"
    assert not torch.equal(before[trained], after[trained])

    without = job(*asked, *FEW[:1], "method.mtp=drop")
    assert without.code == 0
    [dropped] = set(done.store.glob("compress/*/checkpoint")) - {compressed}
    form = json.loads((dropped.parent / "form.json").read_text())
    assert form["mtp"] == f"MTP layers: {len(made)} tensors left out"
    assert not [name for name in load_file(dropped / "model.safetensors") if ".layers.4." in name]
