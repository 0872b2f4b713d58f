"""What edits leave of a model, without weights."""

from __future__ import annotations

from pathlib import Path

import torch
from edited_models import condense, prune
from families import tiny_model
from safetensors.torch import save_file

from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.edited_model import REST, EditedModel, Saving, meta_twin
from moe_lab.models.edits.plan import read_edit
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel

KEPT = [0, 1, 4, 5]


def outcome_of(edits: list[dict], **how: object) -> EditedModel:
    model = meta_model(tiny_model("qwen3_moe").config)
    names = {one.info.index: one.info.name for one in moe_layers(model)}
    read = [read_edit({**edit, "name": names[edit["index"]]}) for edit in edits]
    return EditedModel(model, read, Saving(**how))


def test_layers_behind_a_dropped_one_know_what_they_were() -> None:
    found = outcome_of([{"index": 1, "edit": "drop_block"}])
    assert found.numbers == {0: 0, 2: 1, 3: 2}
    name = "model.layers.1.mlp.gate.weight"
    assert found.index_of(name) == 1
    assert found.old_name(name) == "model.layers.2.mlp.gate.weight"
    assert found.old_name("model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert found.form.stock
    assert found.model.config.num_hidden_layers == 3


def test_the_pieces_are_the_model_and_have_the_names_of_files() -> None:
    found = outcome_of([prune(i, KEPT) for i in range(4)])
    pieces = [found.piece(index) for index in (REST, *range(4))]
    names = [name for piece in pieces for name in piece]
    assert sorted(names) == sorted(found.model.state_dict())
    written = found.in_files(found.piece(2))
    assert written["model.layers.2.mlp.experts.3.up_proj.weight"].shape == (16, 32)
    assert "model.layers.2.mlp.experts.4.up_proj.weight" not in written
    assert all(tensor.is_meta for tensor in written.values())


def test_dense_layers_have_the_width_of_their_form() -> None:
    edits = [condense(1, [5, 2]), condense(2, [5])]
    for padding, widths in ((0.5, {48}), (0.0, {32, 16})):
        found = outcome_of([one | {"shared_gate": 1.0} for one in edits], padding=padding)
        assert found.has_edited_blocks
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2)]
        state = found.model.state_dict()
        assert {state[name].shape[0] for name in names} == widths or padding
        assert found.form.stock == bool(padding)


def test_a_twin_without_weights_is_as_the_model_stands() -> None:
    model = tiny_model("qwen2_moe")
    model.model.layers[1].mlp.gate.register_buffer("odd", torch.ones(3))
    twin = meta_twin(model)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert all(tensor.is_meta for tensor in theirs.values())
    assert not any(tensor.is_meta for tensor in ours.values())
    assert twin.config is not model.config


def test_what_came_from_fused_files_is_written_expert_by_expert(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    source = LayerwiseModel(Checkpoint(tmp_path))
    with source.layer(2):
        pass
    for read in (load(tmp_path), source.model):
        found = EditedModel(meta_twin(read), [], Saving())
        assert "model.layers.2.mlp.experts.3.up_proj.weight" in found.in_files(found.piece(2))
