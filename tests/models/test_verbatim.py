"""Which bytes of a source a compressed checkpoint has: found by names and shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model

from moe_lab.models.edits.chain import Chain
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.shards import Entry
from moe_lab.models.stored import Held, held_by
from moe_lab.models.verbatim import Moved, spans_of

KEPT = (7, 2)
GATE_UP = "model.layers.2.mlp.experts.gate_up_proj"


def saved(family: str, folder: Path) -> tuple[torch.nn.Module, Held]:
    model = tiny_model(family)
    model.save_pretrained(folder)
    return model, held_by(model, [folder / "model.safetensors"])


def moved(model: torch.nn.Module, chain: Chain | None, new: int = 2) -> Moved:
    layer = next(one for one in moe_layers(model) if one.info.index == 2)
    return Moved(2, new, chain, layer)


def bytes_at(spans: object, folder: Path) -> bytes:
    whole = (folder / "model.safetensors").read_bytes()
    return b"".join(whole[one.offset : one.offset + one.num_bytes] for one in spans)


def test_experts_that_stay_are_their_own_tensors_under_another_number(tmp_path: Path) -> None:
    model, files = saved("qwen3_moe", tmp_path)
    at = moved(model, Chain((PruneExperts(2, "model.layers.2.mlp", kept=KEPT),)))
    keys = [
        f"model.layers.2.mlp.experts.{n}.{p}_proj.weight" for n in (0, 1) for p in ("gate", "up")
    ]
    entries = [Entry(key, torch.float32, (16, 32)) for key in keys]
    found = spans_of(at, GATE_UP, entries, files)
    weight = model.model.layers[2].mlp.experts.gate_up_proj
    assert bytes_at(found[keys[0]], tmp_path) == weight[7, :16].detach().numpy().tobytes()
    assert bytes_at(found[keys[3]], tmp_path) == weight[2, 16:].detach().numpy().tobytes()
    behind = spans_of(moved(model, at.chain, new=1), GATE_UP, [
        Entry(keys[0].replace(".2.", ".1."), torch.float32, (16, 32))], files)  # fmt: skip
    assert list(behind.values()) == [found[keys[0]]], "the layer has another number"


def test_rows_of_a_tensor_of_all_experts(tmp_path: Path) -> None:
    model, files = saved("gpt_oss", tmp_path)
    at = moved(model, Chain((PruneExperts(2, "model.layers.2.mlp", kept=KEPT),)))
    weight = model.model.layers[2].mlp.experts.down_proj
    entry = Entry("model.layers.2.mlp.experts.down_proj", torch.float32, (2, *weight.shape[1:]))
    found = spans_of(at, entry.name, [entry], files)
    assert bytes_at(found[entry.name], tmp_path) == weight[list(KEPT)].detach().numpy().tobytes()


@pytest.mark.parametrize("why", ["merged", "router", "dtype", "shape", "unknown"])
def test_what_may_have_changed_is_not_copied(why: str, tmp_path: Path) -> None:
    model, files = saved("qwen3_moe", tmp_path)
    edit = PruneExperts(2, "model.layers.2.mlp", kept=KEPT)
    if why == "merged":
        edit = MergeExperts(
            2, edit.name, kept=KEPT, groups=((7, 0), (2,)), weights=((0.5, 0.5), (1,))
        )
    dtype = torch.bfloat16 if why == "dtype" else torch.float32
    shape = (20, 32) if why == "shape" else (16, 32)
    name, key = GATE_UP, "model.layers.2.mlp.experts.0.gate_proj.weight"
    if why == "router":
        name = key = "model.layers.2.mlp.gate.weight"
        shape = (8, 32)
    if why == "unknown":
        key = "model.layers.2.mlp.experts.0.other.weight"
    entry = Entry(key, dtype, shape)
    assert spans_of(moved(model, Chain((edit,))), name, [entry], files) is None


def test_what_is_around_an_edited_block_is_as_it_was(tmp_path: Path) -> None:
    model, files = saved("qwen3_moe", tmp_path)
    edit = MergeExperts(
        2, "model.layers.2.mlp", kept=KEPT, groups=((7,), (2,)), weights=((1,), (1,))
    )
    name = "model.layers.2.self_attn.q_proj.weight"
    weight = model.get_parameter(name)
    entry = Entry(name, torch.float32, tuple(weight.shape))
    found = spans_of(moved(model, Chain((edit,))), name, [entry], files)
    assert bytes_at(found[name], tmp_path) == weight.detach().numpy().tobytes()
