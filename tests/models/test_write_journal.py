"""How far a checkpoint has come that is being written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model

from moe_lab.models.layerwise import WholeModel
from moe_lab.models.write_journal import Replay, WriteJournal
from moe_lab.types import NotFinite

EVERY = range(4)


def replayed(journal: WriteJournal, layers: range, checked: range = EVERY) -> Replay:
    replay = Replay(WholeModel(tiny_model("qwen3_moe")), EVERY, checked, journal)
    for index in layers:
        replay.through(index)
    return replay


def test_what_was_noted_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = replayed(WriteJournal(None), EVERY)
    first = WriteJournal(tmp_path / "journal")
    first.of("these files")
    first.note({"b": {"bytes": 2}, "a": {"bytes": 1}}, replayed(first, range(2)))
    again = WriteJournal(tmp_path / "journal")
    again.of("these files")
    assert again.done == {"a": {"bytes": 1}, "b": {"bytes": 2}}
    assert again.next_layer == 2
    rest = Replay(WholeModel(tiny_model("qwen3_moe")), EVERY, EVERY, again)
    assert [rest.awaits(index) for index in EVERY] == [False, False, True, True]
    for index in EVERY:
        rest.through(index)
    assert torch.equal(rest.logits(), whole.logits())
    again.remove()
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("damage", ["other files", "torn", "no journal"])
def test_what_is_of_other_files_or_torn_is_nothing(damage: str, tmp_path: Path) -> None:
    journal = WriteJournal(tmp_path / "journal")
    journal.of("other files" if damage == "other files" else "these files")
    journal.note({"a": {"bytes": 1}}, replayed(journal, range(1)))
    if damage == "torn":
        (tmp_path / "journal").write_bytes((tmp_path / "journal").read_bytes()[:50])
    if damage == "no journal":
        (tmp_path / "journal").write_bytes(b"{}")
    again = WriteJournal(tmp_path / "journal")
    again.of("these files")
    assert (again.done, again.next_layer, again.hidden) == ({}, 0, None)


def test_layers_that_are_not_compared_are_passed_by() -> None:
    some = replayed(WriteJournal(None), EVERY, range(1, 3))
    assert not torch.equal(some.logits(), replayed(WriteJournal(None), EVERY).logits())
    assert not some.awaits(0)


def test_a_layer_that_gives_nan_is_named() -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight[0, 0] = torch.nan
    replay = Replay(WholeModel(model), EVERY, EVERY, WriteJournal(None))
    with pytest.raises(NotFinite, match="layer 2"):
        for index in EVERY:
            replay.through(index)
