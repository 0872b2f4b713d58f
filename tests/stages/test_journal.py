"""A profile that was ended at any moment goes on there, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting import assert_alike, samples
from families import FAMILIES, tiny_model
from interrupted import end_together, kills_before_the_end, num_lines

from moe_lab import stopping
from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.families import tiny
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.profile import collect
from moe_lab.profile.collect import Collection
from moe_lab.stages.context import Context
from moe_lab.stages.journal import RECORD, Journal
from moe_lab.stages.profile import Profiling, profile
from moe_lab.store import DONE, Store
from moe_lab.types import NotFinite

FROM = "Journal.resume"  # kills come behind it
WAYS = {
    "on disk": {"layerwise": True, "cache_gib": 0.0},
    "in memory": {"layerwise": True},
    "routers": {"layerwise": True, "profile": "routers"},
    "whole": {"layerwise": False},
}


class Work:
    """The same profile in stores of its own, ten samples in batches of two, and what it took."""

    def __init__(self, home: Path, family: str = "qwen2_moe", groups: bool = True, **options: Any):
        self.home, self.options = home, {"batch_size": 2, "journal_seconds": 0.0} | options
        made = tiny_model(family) if family in FAMILIES else tiny.tiny_model(family)
        made.save_pretrained(home / "model")
        names = tuple(f"group {number % 2}" for number in range(10)) if groups else ()
        self.tokens = Tokens(tuple(map(tuple, samples())), pad_id=0, groups=names)

    def __call__(self, store: str = "store", **options: Any) -> None:
        context = Context(Store(self.home / store), Compute("cpu", **(self.options | options)))
        neurons = self.options.get("profile") != "routers"
        profile(context, Profiling(Checkpoint(self.home / "model"), self.tokens, neurons))

    def folder(self, store: str = "store") -> Path:
        (found,) = (self.home / store / "profile").glob("*[0-9a-f]")
        return found

    def journal(self) -> Path:
        return self.folder() / "journal.0"

    def files(self, store: str = "store") -> dict[str, bytes]:
        folder = self.folder(store)
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != DONE
        }


@pytest.fixture
def batches_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """How many batches have been counted at a layer (or by all) since this was last asked."""
    log = tmp_path / "counted"
    batch = Collection.batch

    def noted(self: Collection, valid: Any, group: int = 0, counts: bool = True) -> Any:
        with log.open("ab") as file:  # of forks, too
            file.write(b"1" if counts else b"")
        return batch(self, valid, group, counts)

    def asked() -> int:
        number = log.stat().st_size if log.exists() else 0
        log.write_bytes(b"")
        return number

    monkeypatch.setattr(Collection, "batch", noted)
    return asked


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_line_it_ends_with_the_same_bytes(
    way: str, tmp_path: Path, batches_counted: Callable[[], int]
) -> None:
    work = Work(tmp_path, **WAYS[way])
    work("undisturbed", journal_seconds=1e9)
    needed = batches_counted()
    lines = num_lines(lambda: work("traced"), FROM)
    batches_counted()
    kills = kills_before_the_end(work, FROM, seed=0, most=2 * lines // 3)
    assert kills >= 3
    assert needed <= batches_counted() <= needed + kills, "a kill costs a batch at most"
    assert work.files() == work.files("undisturbed") == work.files("traced")
    assert not any("journal" in name for name in work.files())


@pytest.mark.parametrize("family", ["glm_moe_dsa", "zaya"])
def test_what_layers_hand_on_is_kept_too(family: str, tmp_path: Path) -> None:
    work = Work(tmp_path, family, groups=False, layerwise=True)
    work("undisturbed")
    lines = num_lines(lambda: work("traced"), FROM)
    assert kills_before_the_end(work, FROM, seed=1, most=lines // 2) >= 2
    assert work.files() == work.files("undisturbed")


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have a signal come in the n-th batch that is counted."""
    count = Collection.batch
    seen = 0

    def counting(self: Collection, *arguments: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            monkeypatch.setattr(stopping._state, "asked", 15)  # held back, as all of a batch is
        return count(self, *arguments, **named)

    monkeypatch.setattr(Collection, "batch", counting)


@pytest.fixture
def stopped(tmp_path: Path) -> Work:
    """A profile that a signal stopped in the third of five batches at the second MoE layer."""
    work = Work(tmp_path, groups=False, layerwise=True, journal_seconds=1e9)
    work("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5 + 5 + 3)  # the first decoder layer has no experts
        with pytest.raises(stopping.Stopped):
            work()
    return work


def test_a_signal_stops_behind_a_batch_that_is_kept(
    stopped: Work, batches_counted: Callable[[], int]
) -> None:
    record = json.loads((stopped.journal() / RECORD).read_text())
    assert record["counted"] == {"1": 5, "2": 3}
    assert record["at"] == [3, 3, 3, 2, 2]
    stopped()
    assert batches_counted() == 2 + 5
    assert stopped.files() == stopped.files("undisturbed")


def test_hidden_states_on_disk_are_linked_not_copied(tmp_path: Path) -> None:
    work = Work(tmp_path, layerwise=True, cache_gib=0.0, journal_seconds=1e9)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 8)
        linked = []
        link = os.link
        patch.setattr(os, "link", lambda *a: (linked.append(a), link(*a)))
        with pytest.raises(stopping.Stopped):
            work()
    assert len(linked) == 6, "each batch of the two groups"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "torn": lambda file: os.truncate(file, file.stat().st_size // 2),
    "flipped": flip,
    "lost": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name, counted",
    [
        ("state_0_3.safetensors", 2 + 5),
        ("state_4_2.safetensors", 2 + 5),
        ("sums_1_0_5.safetensors", 5 + 2 + 5),
        ("sums_2_0_3.safetensors", 5 + 5),
        (RECORD, 5 + 5 + 5),
    ],
)
def test_what_is_damaged_costs_what_it_must(
    name: str, counted: int, damage: str, stopped: Work, batches_counted: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    DAMAGES[damage](stopped.journal() / name)
    stopped()
    assert batches_counted() == counted
    assert stopped.files() == stopped.files("undisturbed")
    lost = damage == "lost" and name == RECORD
    assert lost or f"{name}" in caplog.text


def test_other_batches_begin_anew_and_say_so(
    stopped: Work, batches_counted: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    stopped(batch_size=5)
    assert batches_counted() == 2 * 3
    assert "an earlier attempt at this profile had other batches: it begins anew" in caplog.text


def test_a_resource_that_changes_no_batch_may_change(
    stopped: Work, batches_counted: Callable[[], int]
) -> None:
    stopped(cache_gib=0.0)
    assert batches_counted() == 2 + 5
    assert stopped.files() == stopped.files("undisturbed")


def test_a_short_profile_writes_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = []
    monkeypatch.setattr(Journal, "save", lambda *a: saves.append(a))
    Work(tmp_path, layerwise=True, journal_seconds=60.0)()
    assert not saves


def test_sums_leave_memory_with_their_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    check = Collection.check_finite
    monkeypatch.setattr(
        Collection,
        "check_finite",
        lambda self, index=None: (held.append({key[1] for key in self.found}), check(self, index)),
    )
    Work(tmp_path, layerwise=True)()
    assert held == [set(), {1}, {2}, {3}]


def test_an_end_without_the_seal_is_not_computed_again(
    tmp_path: Path, batches_counted: Callable[[], int]
) -> None:
    work = Work(tmp_path, layerwise=True)
    work()
    expected = work.files()
    (work.folder() / DONE).unlink()
    batches_counted()
    work()
    assert batches_counted() == 0 and work.files() == expected
    os.truncate(work.folder() / "layer_002.safetensors", 100)
    (work.folder() / DONE).unlink()
    work()
    assert batches_counted() and work.files() == expected


def test_numbers_that_are_none_are_refused_again(tmp_path: Path) -> None:
    """A save comes before the check that ends the first attempt."""
    work = Work(tmp_path, layerwise=True)
    model = tiny_model("qwen2_moe")
    model.model.layers[2].mlp.experts.down_proj.data[3] = float("nan")
    shutil.rmtree(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    for _ in range(2):
        with pytest.raises(NotFinite, match="layer 2"):
            work()
    assert collect.load_groups(work.folder()) == {}


def test_two_processes_share_the_batches_and_go_on_together(
    tmp_path: Path, batches_counted: Callable[[], int]
) -> None:
    work = Work(tmp_path, layerwise=True)
    work("alone")
    needed = batches_counted()
    assert end_together(lambda: work("undisturbed"), FROM, [10**9] * 2) == [0, 0]
    assert batches_counted() == needed, "each batch in one of them"
    found = collect.load_statistics(work.folder("undisturbed"))
    assert_alike(found, collect.load_statistics(work.folder("alone")), rtol=1e-12)
    codes = end_together(work, FROM, [10**9, 4000])
    assert codes[1] == -9 and codes[0] not in (0, -9), "the other one hears of it"
    before = batches_counted()
    assert end_together(work, FROM, [10**9] * 2) == [0, 0]
    assert needed <= before + batches_counted() <= needed + 2
    assert work.files() == work.files("undisturbed")


def test_another_number_of_processes_begins_anew(
    stopped: Work, batches_counted: Callable[[], int]
) -> None:
    assert end_together(stopped, FROM, [10**9] * 2) == [0, 0]
    assert batches_counted() == 5 * 3
    found, expected = map(
        collect.load_statistics, (stopped.folder(), stopped.folder("undisturbed"))
    )
    assert_alike(found, expected, rtol=1e-12)
