"""vllm-ascend's list: what the engine keeps of it is the plan."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from edited_models import prune
from families import tiny_model

from moe_lab.export.given import Given
from moe_lab.export.vllm_ascend import export
from moe_lab.models.edits.plan import Plan, read_edit
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError


def planned(folder: Path, kept: dict[int, list[int]], family: str = "qwen3_moe") -> Given:
    model = tiny_model(family)
    model.save_pretrained(folder / "dense")
    names = {one.info.index: one.info.name for one in moe_layers(model)}
    edits = (prune(index, some) | {"name": names[index]} for index, some in kept.items())
    (folder / "plan.json").write_text(Plan(tuple(map(read_edit, edits))).to_text())
    path = folder / "plan.json"
    return Given(str(path), plan_file=path, model=str(folder / "dense"))


@pytest.mark.parametrize("number", range(2, 9))
def test_the_engine_keeps_the_experts_of_the_plan(number: int, tmp_path: Path) -> None:
    kept = {index: sorted((index + 3 * i) % 8 for i in range(number)) for index in range(4)}
    (told,) = export(planned(tmp_path, kept), tmp_path / "one.jsonl")
    options = json.loads(re.search(r"'(\{.*\})'", told)[1])
    assert options["expert_list_file"] == "one.jsonl"
    assert 0 <= options["expert_prune_ratio"] < 1
    left = int(8 * (1.0 - options["expert_prune_ratio"]))
    rows = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["0"], ["1"], ["2"], ["3"]]
    for index, row in enumerate(rows):
        (experts,) = row.values()
        assert sorted(experts) == list(range(8)) and experts[:left] == kept[index]


def test_what_the_engine_cannot_prune_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the engine prunes qwen3_moe alone, and .* is mixtral"):
        export(planned(tmp_path / "m", {0: [0, 1]}, "mixtral"), tmp_path / "one")
    with pytest.raises(UserError, match=r"layers keep 2 and 8 experts.*ratio=uniform"):
        export(planned(tmp_path / "q", {0: [0, 1]}), tmp_path / "one")
    assert not (tmp_path / "one").exists()
