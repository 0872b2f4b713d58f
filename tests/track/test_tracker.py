"""What trackers share: the flat config, names of a length, points remembered over restarts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from moe_lab.track.tracker import Guard, Points, TrackedArtifact, flat, numbers, short, stable_hash

ROW = {"phase": "lm", "step": 3, "tokens": 30, "loss": 2.0}


def test_config_becomes_flat() -> None:
    nested = {
        "seed": 7,
        "ratio": {
            "_target_": "moe_lab.methods.ratios.uniform.Uniform",
            "ratio": 0.5,
            "target_gib": None,
        },
        "finetune": {"phases": {"lm": {"learning_rate": 1e-4}}, "layers": [1, 2], "on": True},
        "eval": {},
        "condense/num_layers": 3,
    }
    expected = {
        "seed": 7,
        "ratio/ratio": 0.5,
        "finetune/phases/lm/learning_rate": 1e-4,
        "finetune/layers": "[1, 2]",
        "finetune/on": True,
        "condense/num_layers": 3,
    }
    assert flat(nested) == expected
    assert flat(expected) == expected


def test_cut_names_stay_two() -> None:
    assert short("a" * 64, 64) == "a" * 64
    first, second = short("a" * 200 + "1", 64), short("a" * 200 + "2", 64)
    assert len(first) == len(second) == 64
    assert first != second
    assert first.startswith("a" * 55)


def test_the_hash_is_the_same_everywhere() -> None:
    assert stable_hash("sweep/0") == "d2100fb3086846d4"


def test_numbers() -> None:
    found = numbers({"a": 1, "b": True, "c": "x", "d": None, "e": float("nan"), "f": 0.5})
    assert found == {"a": 1, "b": 1, "f": 0.5}
    assert type(found["b"]) is int


def test_points_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "wandb" / "points.jsonl"
    points = Points(path)
    assert (points.has(ROW), points.next_step) == (False, 0)
    points.add(ROW, 5)
    points.add({}, 6)
    again = Points(path)
    assert again.has(ROW)
    assert not again.has(ROW | {"phase": "other"})
    assert again.next_step == 7
    again.forget()
    assert not again.has(ROW)
    assert not Points(path).has(ROW)


def test_an_unfinished_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    points = Points(path)
    points.add(ROW, 0)
    with path.open("a") as file:
        file.write('\n["lm", 4')  # killed here
    again = Points(path)
    again.add(ROW | {"step": 5}, 1)
    found = Points(path)
    assert [found.has(ROW | {"step": step}) for step in (3, 4, 5)] == [True, False, True]


def test_an_item_tells_where_it_lies_and_what_it_was_made_from(tmp_path: Path) -> None:
    item = TrackedArtifact(
        "plan-1", "plan", place=tmp_path, metadata={"at": tmp_path}, made_from=("p-1",)
    )
    assert item.address() == tmp_path.as_uri()
    assert item.about() == {"at": str(tmp_path), "made_from": ["p-1"], "place": str(tmp_path)}
    assert json.dumps(item.about())
    assert TrackedArtifact("m", "model", place="https://host/m").address() == "https://host/m"
    assert TrackedArtifact("m", "model").about() == {}


def test_the_guard_warns_once_per_cause(caplog: pytest.LogCaptureFixture) -> None:
    def fail(text: str) -> None:
        raise OSError(text)

    guard = Guard("the service", "")
    with caplog.at_level(logging.WARNING):
        found = [guard("a call", lambda text=text: fail(text)) for text in ("one", "one", "two")]
    assert found == [False, False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "the service failed at a call: OSError: one. The run goes on without it.",
        "the service failed at a call: OSError: two. The run goes on without it.",
    ]
    with pytest.raises(KeyboardInterrupt):
        guard("a call", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
