"""Which checkpoints are asked for, with which setting, and that nothing is asked twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_lab.serving import in_transformers
from moe_lab.serving.asking import cells_of, chosen, names
from moe_lab.serving.checkpoints import Served
from moe_lab.serving.engines import Engine, Setting
from moe_lab.serving.judging import EngineAnswer
from moe_lab.store import Store


def test_dense_ones_come_first() -> None:
    every = names()
    dense = [made for _, made in every[:11]]
    assert dense == ["dense"] * 11 and "dense" not in [made for _, made in every[11:]]
    assert len(every) == len(set(every)) > 90


def test_words_choose_and_bring_the_dense_one() -> None:
    some = chosen(["tiny_mixtral", "merge"])
    assert some[0] == ("tiny_mixtral", "dense") and len(some) == 5
    assert all("merge" in made for _, made in some[1:])
    assert chosen(["no such word"]) == [] and chosen([]) == names()


def right(served: Served) -> EngineAnswer:
    best = served.reference["logprobs"].topk(5)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = [dict(zip(*one, strict=True)) for one in pairs]
    return EngineAnswer(top, served.reference["tokens"].tolist())


def wrong(served: Served) -> EngineAnswer:
    return EngineAnswer([{0: -1.0}] * 3, torch.zeros(3, 16, dtype=torch.long).tolist())


@dataclass(frozen=True)
class Asked(Engine):
    """An engine whose answers are these, by setting and by what was made; others are right."""

    said: dict[tuple[str, str], Any] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)

    def versions(self) -> dict[str, str]:
        return {"torch": "1"}

    def answers(
        self, jobs: Sequence[Served], setting: Setting
    ) -> Iterator[tuple[Served, EngineAnswer]]:
        for served in jobs:
            self.log.append((setting.name, served.made))
            yield served, self.said.get((setting.name, served.made), right)(served)


def asked(name: str, said: dict[tuple[str, str], Any]) -> Asked:
    settings = (Setting(), Setting("careful", {"careful": True}))
    return Asked(name, in_transformers, 1e-4, ("torch",), settings=settings, said=said)


def test_right_and_refused_and_silent(few: list[Served], served_store: Store) -> None:
    refused = lambda served: EngineAnswer(error=f"no {served.folder}/config.json")  # noqa: E731
    engine = asked("a", {("", "prune .25"): wrong, ("", "unequal"): refused})
    found = cells_of(served_store, engine, few)
    assert [one.verdict for one in found] == ["right", "silent", "refused"]
    assert (found[0].engine, found[0].family, found[2].form) == (
        "a", "mixtral", "own form, unequal experts"
    )  # fmt: skip
    assert found[2].detail == "no <checkpoint>/config.json", "no path of this machine"
    assert all(setting == "" for setting, _ in engine.log)


def test_nothing_is_asked_twice_but_what_crashed(few: list[Served], served_store: Store) -> None:
    crashed = lambda served: EngineAnswer(error="it ended", crashed=True)  # noqa: E731
    engine = asked("b", {("", "unequal"): crashed})
    found = cells_of(served_store, engine, few)
    assert found[2].verdict == "crashed"
    engine.log.clear()
    assert cells_of(served_store, engine, few) == found
    assert engine.log == [("", "unequal")]


def test_a_garbled_dense_model_is_tried_with_the_next_setting(
    few: list[Served], served_store: Store
) -> None:
    engine = asked("c", {("", "dense"): wrong, ("careful", "unequal"): wrong})
    found = cells_of(served_store, engine, few)
    assert [one.verdict for one in found] == ["right", "right", "silent"]
    assert [one.setting for one in found] == ["careful", "careful", ""]
    assert "the engine's own fault" in found[0].detail
    assert engine.log == [("", "dense"), *(("careful", one.made) for one in few)]


def test_where_no_setting_helps_it_is_the_engines_own_fault(
    few: list[Served], served_store: Store
) -> None:
    everything = {(name, one.made): wrong for name in ("", "careful") for one in few}
    refused = lambda served: EngineAnswer(error="no")  # noqa: E731
    engine = asked("d", everything | {("", "unequal"): refused})
    found = cells_of(served_store, engine, few)
    assert [one.verdict for one in found] == ["own fault", "own fault", "refused"]


def test_an_engine_for_our_own_form_alone(few: list[Served], served_store: Store) -> None:
    engine = replace(asked("e", {}), only_own=True)
    assert [one.made for one in cells_of(served_store, engine, few)] == ["dense", "unequal"]
