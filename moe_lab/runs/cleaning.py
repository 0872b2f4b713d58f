"""What a store holds, which of it some runs use, and removing what may go.

A report names the results of its stages (`artifact/<stage>`), and each result's identity names what
it was made from; following both finds all that is used. Some kinds are made within a stage, or
behind all of them, and named by no report (UNNAMED): they count as used where they were asked about
something that is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_lab.files import HYDRA
from moe_lab.locks import LEASE, held, taken
from moe_lab.runs.status import KEY, RUNNING, Job, read_yaml
from moe_lab.store import DONE, key_of
from moe_lab.types import UserError

KINDS = (
    "convert", "profile", "search", "plan", "compress", "teacher", "finetune", "quantize",
    "evaluate", "measure", "measure_vllm", "similarity", "diagnose", "trace", "serving", "served",
    "pictures",
)  # fmt: skip
UNNAMED = ("search", "similarity", "pictures")
UNUSED, CHECKPOINTS, SEARCH = CHOICES = ("unused", "checkpoints", "search")
KINDS_WITH_WEIGHTS = ("convert", "compress", "finetune", "quantize")
KEY_FOLDER = re.compile(r"[0-9a-f]{12}(\.damaged-\d+)?")  # with a word: set aside by the store
LOCKS = (".lock", LEASE)  # of results, beside them
RECENT = 600.0  # seconds in which a result nobody names may still be waiting for its job's report


@dataclass(frozen=True)
class Result:
    """A folder of the store; seconds: what making it took, None for one that is not finished.

    names: the keys under which reports and identities know it; made_from: every key, fingerprint
    and code version in its identity, those of identities within it too.
    """

    kind: str
    key: str
    folder: Path
    bytes: int
    seconds: float | None
    made: float
    names: frozenset[str]
    made_from: frozenset[str]

    @property
    def lock(self) -> Path:
        """The file that a job holds while it makes this."""
        return self.folder.with_suffix(".lock")


@dataclass(frozen=True)
class Contents:
    """A store's results; orphans: locks without a result; others: what is not a store's, by size.

    Nothing of the last is ever touched: links, kinds unknown here, activations of a killed search.
    """

    root: Path
    results: tuple[Result, ...]
    orphans: tuple[Path, ...]
    others: dict[str, int]

    @cached_property
    def busy(self) -> Path | None:
        """A lock that a job holds now."""
        locks = (*(one.lock for one in self.results), *self.orphans)
        return next(filter(held, locks), None)


def stores(jobs: Iterable[Job]) -> list[Path]:
    """The store folders that jobs used, those that are there."""
    roots: dict[Path, None] = {}
    places: dict[Path, Path | None] = {}
    for job in jobs:
        text = (read_yaml(job.folder / HYDRA / "config.yaml") or {}).get("store")
        if not isinstance(text, str) or "${" in text:
            continue
        home = job.folder.parent
        if home not in places:
            said = read_yaml(job.folder / HYDRA / "hydra.yaml") or {}
            cwd = said.get("hydra", {}).get("runtime", {}).get("cwd")
            of_sweep = job.sweep.cwd if job.sweep else None
            places[home] = Path(cwd) if cwd else of_sweep
        candidates = [place / text for place in (places[home], Path.cwd()) if place]
        roots |= dict.fromkeys([one.resolve() for one in candidates if one.is_dir()][:1])
    return list(roots)


def contents(root: Path) -> Contents:
    """All that lies in a store, without following links; UserError where there is none."""
    if not root.is_dir():
        raise UserError(f"there is no store at {root}: name its folder with --store")
    root = root.resolve()
    results, orphans, others = [], [], {}
    for kind in sorted(os.scandir(root), key=lambda entry: entry.name):
        if kind.name not in KINDS or not kind.is_dir(follow_symlinks=False):
            others[kind.name] = size_of(kind)
            continue
        for entry in sorted(os.scandir(kind.path), key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            if KEY_FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                results.append(_result(kind.name, Path(entry.path), size_of(entry)))
            elif not KEY_FOLDER.fullmatch(stem) or suffix not in LOCKS or entry.is_symlink():
                others[f"{kind.name}/{entry.name}"] = size_of(entry)
            elif not os.path.lexists(os.path.join(kind.path, stem)):
                orphans.append(Path(entry.path).with_suffix(".lock"))
    return Contents(root, tuple(results), tuple(dict.fromkeys(orphans)), others)


def size_of(entry: os.DirEntry[str]) -> int:
    """Bytes of a file, or of all files in a folder; a link is as big as itself."""
    if not entry.is_dir(follow_symlinks=False):
        return entry.stat(follow_symlinks=False).st_size
    with os.scandir(entry.path) as inside:
        return sum(map(size_of, inside))


def used(results: Iterable[Result], jobs: Iterable[Job]) -> set[Path]:
    """The folders of the results that the jobs used, directly or through other results."""
    mentioned = set().union(*(job.mentioned for job in jobs))
    known = set(mentioned)
    left, folders = list(results), set()
    while reached := [one for one in left if one.names & known]:
        left = [one for one in left if not one.names & known]
        folders |= {one.folder for one in reached}
        mentioned |= set().union(*(one.names for one in reached))
        known = set(mentioned).union(*(one.made_from for one in results if one.folder in folders))
    asked = (one for one in left if one.kind in UNNAMED and one.made_from & mentioned)
    return folders | {one.folder for one in asked}


def check_cleaning(store: Contents, jobs: list[Job], what: str) -> None:
    """Refuse to clean where something is under way, or where it is not known what is used."""
    if busy := [job for job in jobs if job.status == RUNNING]:
        raise UserError(
            f"still running, so that any result may be needed: {_named(busy)}; clean the store "
            "when nothing runs"
        )
    if store.busy:
        raise UserError(
            f"{store.busy} is held: a job outside this folder works with the store now, and may "
            "need any result of it: clean it when nothing runs"
        )
    if what != UNUSED:
        return
    if silent := [job for job in jobs if not job.tells_results]:
        raise UserError(
            "it is not known what is unused, as these jobs do not say which results they use "
            f"(artifact/<stage> in their reports): {_named(silent)}; run them again, which costs "
            "little while the store has their results, or move these folders away"
        )
    named = set().union(*(job.mentioned for job in jobs))
    if store.results and not any(one.names & named for one in store.results):
        raise UserError(
            f"these runs name none of the results in {store.root}, so that all would count as "
            "unused: theirs lie in another store (--store), or none was finished"
        )


def chosen_results(store: Contents, jobs: list[Job], what: str) -> dict[Result, str]:
    """What goes, and why: `what` is one of CHOICES."""
    kept = used(store.results, jobs)
    kinds = {CHECKPOINTS: KINDS_WITH_WEIGHTS, SEARCH: (SEARCH,)}.get(what)
    if kinds:
        done = (one for one in store.results if one.seconds is not None and one.kind in kinds)
        return {one: "can be made again" for one in done if one.folder in kept}
    partial = {
        one: "damaged" if one.key.partition(".")[2] else "not finished"
        for one in store.results if one.seconds is None
    }  # fmt: skip
    done = (one for one in store.results if one.seconds is not None and one.folder not in kept)
    return partial | {one: "not used" for one in done if time.time() - one.made > RECENT}


def recent(store: Contents, jobs: list[Job]) -> int:
    """How many finished results that no job uses are too young to be called unused."""
    kept, now = used(store.results, jobs), time.time()
    done = (one for one in store.results if one.seconds is not None and one.folder not in kept)
    return sum(now - one.made <= RECENT for one in done)


def by_kind(store: Contents, jobs: list[Job]) -> dict[str, dict[str, float]]:
    """By kind: number of finished results, used by these jobs, unfinished; bytes and seconds."""
    kept = used(store.results, jobs)
    kinds: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        results = [one for one in store.results if one.kind == kind]
        done = [one for one in results if one.seconds is not None]
        if results:
            kinds[kind] = {
                "results": len(done),
                "used": sum(one.folder in kept for one in done),
                "unfinished": len(results) - len(done),
                "bytes": sum(one.bytes for one in results),
                "seconds": sum(one.seconds for one in done if one.seconds is not None),
            }
    return kinds


def would_free(store: Contents, jobs: list[Job]) -> list[dict[str, Any]]:
    """What each of CHOICES would free: results, bytes, seconds; or why it is refused."""
    freed = []
    for what in CHOICES:
        chosen, refused = {}, None
        try:
            check_cleaning(store, jobs, what)
            chosen = chosen_results(store, jobs, what)
        except UserError as error:
            refused = str(error)
        size = sum(one.bytes for one in chosen)
        took = sum(one.seconds or 0 for one in chosen)
        freed.append({"what": what, "results": len(chosen), "bytes": size, "seconds": took,
                      "refused": refused})  # fmt: skip
    return freed


def remove(result: Result) -> bool:
    """Remove one result; False where it is in use, or has changed since it was looked at.

    artifact.json goes first: of a removal that is interrupted nothing remains that looks finished.
    """
    folder = result.folder
    with taken(result.lock) as lock:
        changed = (folder / DONE).exists() != (result.seconds is not None) or folder.is_symlink()
        if lock is None or changed or not folder.is_dir():
            return False
        (folder / DONE).unlink(missing_ok=True)
        shutil.rmtree(folder)
        lock.remove()
    return True


def remove_orphans(locks: Iterable[Path]) -> None:
    """Remove locks beside which there is no result, unless a job just begins one."""
    for path in locks:
        with taken(path) as lock:
            if lock and not path.with_suffix("").exists():
                lock.remove()


def _result(kind: str, folder: Path, size: int) -> Result:
    made, seconds, identity = folder.stat().st_mtime, None, {}
    try:
        record = json.loads((folder / DONE).read_text(encoding="utf-8"))
        seconds, identity = float(record["seconds"]), dict(record["identity"])
        made = (folder / DONE).stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not finished, as the store sees it too
    names = {folder.name}
    if "statistics" in identity:  # a profile of routers alone goes by the key of all statistics
        names.add(key_of({key: v for key, v in identity.items() if key != "statistics"}))
    made_from = frozenset(_references(identity))
    return Result(kind, folder.name, folder, size, seconds, made, frozenset(names), made_from)


def _references(value: object) -> Iterator[str]:
    """What an identity may name: keys and fingerprints, and the keys of identities within it."""
    if isinstance(value, str):
        yield from KEY.findall(value)
    elif isinstance(value, dict):
        yield key_of(value)
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from _references(part)


def _named(jobs: Iterable[Job]) -> str:
    """Jobs by the folder they lie in: runs/a: 0, 3; runs/b: 1."""
    homes: dict[Path, list[str]] = {}
    for job in jobs:
        homes.setdefault(job.folder.parent, []).append(job.folder.name)
    return "; ".join(f"{home}: {', '.join(names)}" for home, names in homes.items())
