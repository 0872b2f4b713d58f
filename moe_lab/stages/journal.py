"""How far a profile is, on disk: one that was killed goes on there, and ends with the same bytes.

A journal is a folder of one process: the sums of each MoE layer and group, with how many batches
they have, and the hidden state of each batch before the decoder layer that comes next. Its record,
written last, names these files with their sizes and sums; what it does not name is of no use. So
the record before is good until the next is complete. What is damaged is computed again: sums from
the first layer on, a state by replaying its batch alone.
By hand: sums that were added in the same order are equal to the bit, and no library keeps both.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab import stopping
from moe_lab.integrity import damage, flush, seal_of, with_sum, without_sum, write_whole
from moe_lab.models.stream import LayerStream
from moe_lab.profile import collect
from moe_lab.profile.collect import Collection
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo

logger = logging.getLogger(__name__)
RECORD = "journal.json"
WORK_PER_COST = 30  # a save comes when the work since the last one took so many times as long
DISK_SPEED = 2e8  # bytes a second, until the first save has shown another


@dataclass
class Progress:
    """How far a pass over batches is.

    at: of each batch, the decoder layer that its hidden state goes into next (empty where the whole
    model computes each batch); counted: of each MoE layer, how many batches its sums have, which
    are the first.
    """

    at: list[int] = field(default_factory=list)
    counted: dict[int, int] = field(default_factory=dict)


class Journal:
    """The journal of one process's part of a profile.

    seconds: of work between two saves, at least. of: what has to be the same for an attempt to go
    on where another one was, as JSON.
    """

    def __init__(self, folder: Path, seconds: float, of: Mapping[str, Any]) -> None:
        self.folder, self.seconds = folder, seconds
        self.of = json.loads(json.dumps(dict(of)))
        self.saves = 0
        self._seals: dict[str, dict[str, Any]] = {}
        self._kept: set[str] = set()  # sums that are complete
        self._cost = 0.0
        self._saved = time.monotonic()
        self.spilled = folder / "spilled"  # for hidden states that outgrow memory
        shutil.rmtree(self.spilled, ignore_errors=True)  # of an attempt that was killed
        self.spilled.mkdir(parents=True)

    def resume(
        self, collection: Collection, num_batches: int, stream: LayerStream | None = None
    ) -> Progress:
        """Where to go on; sums that are not complete, and hidden states, are as they were there.

        stream: where the pass goes layer by layer.
        """
        self._cost = stream.state_bytes() / DISK_SPEED if stream else 0.0
        record = self._read()
        at = record.get("at", [0] * num_batches) if stream else []
        if stream and not at:  # it was closed
            at = [max(stream.moe) + 1] * num_batches
        counted = {int(index): number for index, number in record.get("counted", {}).items()}
        progress = Progress(at, counted)
        self._seals = dict(record.get("files", {}))
        self._without_damage(progress)
        if stream is None and len(set(progress.counted.values())) > 1:
            progress.counted = dict.fromkeys(progress.counted, 0)
        for name in [name for name in self._seals if name.startswith("sums_")]:
            index, group, number = _numbers_in(name)
            if number != progress.counted[index]:
                self._seals.pop(name)
            elif number == num_batches:
                self._kept.add(name)
            else:
                collection.found[group, index] = _read_sums(self.folder / name)
        if stream:
            for batch, index in _going(progress.at, stream):
                self._read_state(stream, batch, index)
        if record:
            _tell(progress, num_batches)
        self._remove_all_but(self._seals)
        self._saved = time.monotonic()
        return progress

    def offer(
        self, progress: Progress, collection: Collection, stream: LayerStream | None = None
    ) -> None:
        """Save where it is due, or where a signal asks the run to stop, which it then does."""
        if self._is_due() or stopping.asked():
            with stopping.hold():
                self.save(progress, collection, stream)
        stopping.check()

    def keep(self, sums: Mapping[int, LayerStatistics], counted: int) -> None:
        """Take the complete sums of a layer, by group, so that memory need not hold them."""
        for group, layer in sums.items():
            self._kept.add(self._write_sums(group, layer, counted))

    def save(
        self, progress: Progress, collection: Collection, stream: LayerStream | None = None
    ) -> None:
        """Write what is new, then the record, then remove what is old."""
        started = time.monotonic()
        named = set(self._kept)
        for (group, index), layer in collection.found.items():
            named.add(self._write_sums(group, layer, progress.counted[index]))
        at = list(progress.at)
        if stream:
            for batch, index in _going(at, stream):
                states = self._write_state(stream, batch, index)
                named.update(states)
                at[batch] = index if states else 0  # what is not there is replayed
        self._write_record(named, at, progress)
        self._remove_all_but(named)
        self.saves += 1
        self._cost = time.monotonic() - started
        self._saved = time.monotonic()

    def close(self, progress: Progress) -> None:
        """Leave the sums alone, all of which are complete."""
        if self.saves:  # else all of it took too short for a save
            self._write_record(self._kept, [], progress)
        self._remove_all_but(self._kept)

    def _is_due(self) -> bool:
        worked = time.monotonic() - self._saved
        return not self.seconds or worked >= max(self.seconds, WORK_PER_COST * self._cost)

    def _read(self) -> dict[str, Any]:
        """The record; empty where there is none, or none that can be gone on with."""
        path = self.folder / RECORD
        if not path.exists():
            return {}
        try:
            record = without_sum(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            logger.warning("%s cannot be read (%s): the profile begins anew", path, error)
            return {}
        if record["of"] != self.of:
            other = [name for name in self.of if record["of"].get(name) != self.of[name]]
            logger.warning(
                "an earlier attempt at this profile had other %s: it begins anew",
                " and ".join(other),
            )
            return {}
        return record

    def _without_damage(self, progress: Progress) -> None:
        """Go back as far as damaged files ask for, and forget these."""
        for name in list(self._seals):
            wrong = damage(self.folder, {name: self._seals[name]}, quick=False)
            if wrong is None:
                continue
            logger.warning("the journal of a profile is damaged: %s; it is computed again", wrong)
            del self._seals[name]
            numbers = _numbers_in(name)
            if name.startswith("sums_"):
                progress.counted[numbers[0]] = 0
                at = [0 if index > numbers[0] else index for index in progress.at]
                progress.at[:] = at
            else:
                progress.at[numbers[0]] = 0

    def _write_sums(self, group: int, layer: LayerStatistics, counted: int) -> str:
        name = f"sums_{layer.info.index}_{group}_{counted}.safetensors"
        if name not in self._seals:
            sums = {key: value.contiguous() for key, value in layer.sums.items()}
            told = {"info": asdict(layer.info), "scoring": layer.scoring}
            save_file(sums, self.folder / name, metadata={"layer": json.dumps(told)})
        return name

    def _write_state(self, stream: LayerStream, batch: int, index: int) -> list[str]:
        """The files of a batch's hidden state, and of what layers hand on beside it.

        None where that is no tensor.
        """
        names = [f"state_{batch}_{index}.safetensors"]
        carried = {key: one for key, one in stream.carried(batch).items() if one is not None}
        if carried:
            names.append(f"carried_{batch}_{index}.safetensors")
        if not all(isinstance(one, Tensor) for one in carried.values()):
            return []
        if names[0] not in self._seals:
            for name in names:  # of a save that was killed
                (self.folder / name).unlink(missing_ok=True)
            stream.cache.write(("input", batch), self.folder / names[0])
            if carried:
                parts = {key: one.contiguous().cpu() for key, one in carried.items()}
                save_file(parts, self.folder / names[1])
        return names

    def _read_state(self, stream: LayerStream, batch: int, index: int) -> None:
        """Put a hidden state where the pass takes it from."""
        stream.cache.read(("input", batch), self.folder / f"state_{batch}_{index}.safetensors")
        carried = f"carried_{batch}_{index}.safetensors"
        if carried in self._seals:
            stream.carry(batch, load_file(self.folder / carried, device=stream.cache.device))

    def _write_record(self, named: Iterable[str], at: list[int], progress: Progress) -> None:
        for name in named:
            if name not in self._seals:
                self._seals[name] = seal_of(self.folder / name)
        self._seals = {name: self._seals[name] for name in sorted(named)}
        flush(self.folder)
        record = {
            "of": self.of, "at": at, "counted": progress.counted, "files": self._seals,
        }  # fmt: skip
        record = json.loads(json.dumps(record))  # keys as they are read
        told = json.dumps(with_sum(record), indent=1)
        write_whole(self.folder / RECORD, told + "\n")

    def _remove_all_but(self, named: Iterable[str]) -> None:
        named = {*named, RECORD}
        for file in self.folder.iterdir():
            if file.is_file() and file.name not in named:
                file.unlink()


def statistics(journals: Sequence[Path], group: int | None = None) -> Iterator[LayerStatistics]:
    """The statistics in complete journals of several processes, added up, a layer at a time.

    group: of this one alone, else of all together.
    """
    files: dict[int, list[tuple[int, Path]]] = {}
    for journal in journals:
        for file in journal.glob("sums_*"):
            index, of_group, _ = _numbers_in(file.name)
            if group in (None, of_group):
                files.setdefault(index, []).append((of_group, file))
    for index in sorted(files):
        by_group: dict[int, list[LayerStatistics]] = {}
        for of_group, file in sorted(files[index]):
            by_group.setdefault(of_group, []).append(_read_sums(file))
        yield _as_one([_as_one(parts) for parts in by_group.values()])


def _going(at: Sequence[int], stream: LayerStream) -> list[tuple[int, int]]:
    """The batches whose hidden states have to be there, with the decoder layers that come next.

    What goes into the first is computed from the tokens, and behind the last goes nothing.
    """
    last = max(stream.moe)
    return [(batch, index) for batch, index in enumerate(at) if 0 < index <= last]


def _as_one(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    return collect.added([[part] for part in parts])[0] if len(parts) > 1 else parts[0]


def _read_sums(file: Path) -> LayerStatistics:
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["layer"])
    return LayerStatistics(LayerInfo(**told["info"]), load_file(file), told["scoring"])


def _numbers_in(name: str) -> list[int]:
    return [int(part) for part in name.partition(".")[0].split("_")[1:]]


def _tell(progress: Progress, num_batches: int) -> None:
    """Say where a killed attempt is gone on with."""
    complete = sum(number == num_batches for number in progress.counted.values())
    begun = [number for number in progress.counted.values() if 0 < number < num_batches]
    where = f", and {max(begun)} of {num_batches} batches of one" if begun else ""
    logger.info(
        "the profile goes on where an earlier attempt was: %d MoE layers%s", complete, where
    )
