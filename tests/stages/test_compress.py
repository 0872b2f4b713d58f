"""The stage of compressing: what a plan makes of a checkpoint, once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from families import logits_of, tiny_model

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
