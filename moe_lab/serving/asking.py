"""All checkpoints through all engines: made, asked, judged; what was asked before is remembered."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_lab.dependencies import code_version
from moe_lab.models.form_kinds import NATIVE
from moe_lab.progress import progress
from moe_lab.report.serving import Cell
from moe_lab.serving.checkpoints import Served, made_checkpoint
from moe_lab.serving.engines import Engine, Setting
from moe_lab.serving.judging import EngineAnswer, Judgement, beside_dense, judged_answer
from moe_lab.serving.making import INTACT, recipes
from moe_lab.serving.subjects import subjects
from moe_lab.store import Store

logger = logging.getLogger(__name__)
_ANSWER = "answer.json"


def names() -> list[tuple[str, str]]:
    """Each subject and what is made of it, the dense ones first."""
    every = [(one.name, made) for one in subjects() for made in recipes(one)]
    return sorted(every, key=lambda one: one[1] != INTACT)


def chosen(words: Sequence[str]) -> list[tuple[str, str]]:
    """Those of which each word is in the name, and the dense ones of their subjects."""
    every = names()
    asked = {one for one in every if all(word in " / ".join(one) for word in words)}
    subjects_asked = {subject for subject, _ in asked}
    return [one for one in every if one in asked or one in {(s, INTACT) for s in subjects_asked}]


def made(store: Store, wanted: Sequence[tuple[str, str]]) -> list[Served]:
    """The checkpoints, made or found."""
    by_name = {one.name: one for one in subjects()}
    pairs = ((by_name[subject], what) for subject, what in wanted)
    done = (made_checkpoint(store, subject, what) for subject, what in pairs)
    return list(progress(done, "checkpoints", len(wanted)))


def cells_of(store: Store, engine: Engine, checkpoints: Sequence[Served]) -> list[Cell]:
    """What an engine makes of these checkpoints, among which are the dense ones.

    A dense model that it garbles is tried with its further settings; the checkpoints made from it
    are asked with that which helps.
    """
    versions = engine.versions()
    dense = {one.subject: one for one in checkpoints if one.made == INTACT}
    settings, first = _settings(store, engine, versions, list(dense.values()))
    found = [_cell(engine, dense[name], settings[name], one, one) for name, one in first.items()]
    for setting in engine.settings:
        further = [one for one in checkpoints if one.made != INTACT and _is_for(engine, one)]
        rest = [one for one in further if settings[one.subject] == setting]
        for served, answer in _asked(store, engine, versions, rest, setting):
            one = judged_answer(answer, served.reference, engine.tolerance)
            found.append(_cell(engine, served, setting, one, first[served.subject]))
    order = {one.name: place for place, one in enumerate(checkpoints)}
    return sorted(found, key=lambda cell: order[f"{cell.subject} / {cell.made}"])


def _is_for(engine: Engine, served: Served) -> bool:
    return not (engine.only_own and served.form.startswith(NATIVE))


def _settings(
    store: Store, engine: Engine, versions: dict[str, str], dense: Sequence[Served]
) -> tuple[dict[str, Setting], dict[str, Judgement]]:
    """With which setting each subject is asked, and what its dense model then comes to."""
    settings: dict[str, Setting] = {}
    found: dict[str, Judgement] = {}
    for setting in engine.settings:
        left = [one for one in dense if one.subject not in found]
        left += [one for one in dense if one.subject in found and _is_wrong(found[one.subject])]
        for served, answer in _asked(store, engine, versions, left, setting):
            one = judged_answer(answer, served.reference, engine.tolerance)
            before = found.get(served.subject)
            if before is None or one.verdict == "right":
                settings[served.subject] = setting
                found[served.subject] = _helped(one, before, engine)
    return settings, found


def _is_wrong(one: Judgement) -> bool:
    return one.verdict == "silent"


def _helped(one: Judgement, before: Judgement | None, engine: Engine) -> Judgement:
    """Right by a further setting: what the engine makes of it by itself is told."""
    if before is None:
        return one
    far = f"off by {before.difference:.1g}" if before.difference is not None else "wrong"
    return dataclasses.replace(one, detail=f"without it {far}: the engine's own fault")


def _cell(
    engine: Engine, served: Served, setting: Setting, one: Judgement, dense: Judgement
) -> Cell:
    one = beside_dense(one, dense)
    return Cell(
        served.subject, served.made, served.family, served.form, engine.name, one.verdict,
        _rounded(one.difference), one.tokens, setting.name if one.verdict == "right" else "",
        _without_folder(one.detail, served.folder),
    )  # fmt: skip


def _rounded(difference: float | None) -> float | None:
    """Two digits: the others are another machine's. None where it is no number."""
    known = difference is not None and math.isfinite(difference)
    return float(f"{difference:.1e}") if known else None


def _without_folder(text: str, folder: Path) -> str:
    return text.replace(str(folder), "<checkpoint>")


def _asked(
    store: Store,
    engine: Engine,
    versions: dict[str, str],
    checkpoints: Sequence[Served],
    setting: Setting,
) -> Iterator[tuple[Served, EngineAnswer]]:
    """The answers, those that are remembered first; a crash is not remembered."""
    asked = {"engine": engine.name, "versions": versions, "setting": setting.name}
    asked["code"] = code_version(engine.worker, *engine.parts)
    identities = {one.name: asked | {"checkpoint": one.key} for one in checkpoints}
    waiting = []
    for served in checkpoints:
        if done := store.find("served", identities[served.name]):
            yield served, EngineAnswer.from_json(json.loads((done.folder / _ANSWER).read_text()))
        else:
            waiting.append(served)
    if not waiting:
        return
    what = f"{engine.name}, {setting.name}" if setting.name else engine.name
    for served, answer in progress(engine.answers(waiting, setting), what, len(waiting)):
        if not answer.crashed:
            _remember(store, identities[served.name], answer)
        yield served, answer


def _remember(store: Store, identity: dict[str, Any], answer: EngineAnswer) -> None:
    def make(folder: Path) -> None:
        (folder / _ANSWER).write_text(json.dumps(answer.to_json()))

    store.get("served", identity, make)
