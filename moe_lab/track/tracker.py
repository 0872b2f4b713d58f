"""What every tracker does alike: its interface, the flat config, points logged once, artifacts.

A tracker never fails the run: each call into the service behind it goes through one `Guard`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab.option import Plugin

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedArtifact:
    """One link of the chain that a run used and made: a model, a profile, a plan or a checkpoint.

    name: made from its content key, as profile-ab12cd34ef56, so that what several jobs share is
    one artifact. files: small files and folders, copied at once. place: where the rest of it lies
    (a folder or an address), which is named, not copied. found: it was there before this run,
    which takes it as an input; else it is an output. made_from: names of other items.
    """

    name: str
    type: str
    files: tuple[Path, ...] = ()
    place: Path | str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    made_from: tuple[str, ...] = ()
    found: bool = False

    def address(self) -> str | None:
        """Its place as a URI."""
        return self.place.resolve().as_uri() if isinstance(self.place, Path) else self.place

    def about(self) -> dict[str, Any]:
        """Its metadata as plain data, with its place and what it was made from."""
        extra = {"made_from": list(self.made_from), "place": self.place and str(self.place)}
        told = dict(self.metadata) | {key: value for key, value in extra.items() if value}
        plain: dict[str, Any] = json.loads(json.dumps(told, default=str))
        return plain


class Tracker(Plugin):
    """Where a run is tracked: `start`, then any of the others in any order, then `finish`.

    One run at a time; it may be started again after `finish`, as in a sweep of several jobs in
    one process. Nothing here raises because of the service behind it, and nothing happens
    between `finish` and the next `start`. The base tracks nothing.
    """

    @property
    def url(self) -> str | None:
        """Where the run can be seen; None unless it is online."""
        return None

    def start(
        self,
        folder: Path,
        config: Mapping[str, Any],
        group: str,
        name: str,
        tags: Sequence[str],
        identity: str | None = None,
        job_type: str = "job",
    ) -> None:
        """Open a run whose files lie under `folder`.

        config: plain data, nested or flat. identity: a text that names this run and no other; a
        later run with the same one goes on with the first.
        """

    def log_curve(self, row: Mapping[str, Any]) -> None:
        """Add a row of a fine-tuning curve: phase, step, tokens, and figures by name.

        A row whose phase and step were logged before, also before a restart, is left out.
        """

    def summary(self, report: Mapping[str, Any]) -> None:
        """Make the flat report the run's summary."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table."""

    def images(self, paths: Iterable[Path]) -> None:
        """Add pictures, each as plots/<its file's name without .png>."""

    def html(self, name: str, path: Path) -> None:
        """Add a page."""

    def artifact(self, path: Path, name: str, type: str) -> None:
        """Attach a file or a folder of results."""

    def artifacts(self, items: Iterable[TrackedArtifact]) -> None:
        """Attach what the run used and made, in the order it was made."""

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 marks it finished, anything else failed."""


class Guard:
    """Calls into a service: what it raises does not fail the run, and each cause warns once."""

    def __init__(self, service: str, remedy: str) -> None:
        self.service, self.remedy = service, remedy
        self._told: set[str] = set()

    def __call__(self, doing: str, act: Callable[[], object], goes_on: str = "without it") -> bool:
        """Whether `act` went well; remedy: what to do where the service is not installed."""
        try:
            act()
        except ImportError as error:
            text = f"no tracking: {self.service} cannot be imported ({error}){self.remedy}"
            self._warn(str(error), text)
        except Exception as error:  # noqa: BLE001 - whatever it raises must not fail the run
            cause = f"{type(error).__name__}: {error}"
            text = f"{self.service} failed at {doing}: {cause}. The run goes on {goes_on}."
            self._warn(cause, text)
        else:
            return True
        return False

    def _warn(self, cause: str, text: str) -> None:
        logger.log(logging.DEBUG if cause in self._told else logging.WARNING, "%s", text)
        self._told.add(cause)


class Points:
    """The points of curves that were logged, and the last step of the log, kept in a file.

    path: None forgets them at the end. A line is [phase, step, step of the log]; one that an
    interrupted process left unfinished is ignored.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.next_step = 0
        self._points: set[tuple[str, int]] = set()
        for line in (
            path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else ()
        ):
            try:
                phase, step, log_step = json.loads(line)
            except ValueError:
                continue
            self._remember(phase, step, log_step)

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether the row's point was logged."""
        return (row["phase"], row["step"]) in self._points

    def add(self, row: Mapping[str, Any], log_step: int) -> None:
        """Remember a row's point, or with an empty row only that the log came that far."""
        phase, step = row.get("phase"), row.get("step")
        self._remember(phase, step, log_step)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The newline first: it ends what an interrupted process left unfinished.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps([phase, step, log_step])}")

    def forget(self) -> None:
        """Start anew, as a service that has none of the points must be given them all."""
        self.next_step = 0
        self._points.clear()
        if self.path:
            self.path.unlink(missing_ok=True)

    def _remember(self, phase: str | None, step: int | None, log_step: int) -> None:
        self.next_step = max(self.next_step, log_step + 1)
        if phase is not None and step is not None:
            self._points.add((phase, step))


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a curve's row other than where on the curve they are."""
    where = ("phase", "step", "tokens")
    return {key: value for key, value in numbers(row).items() if key not in where}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among values; yes and no are 1 and 0."""
    given = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return {key: value + 0 for key, value in given.items() if math.isfinite(value)}


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, str | int | float | bool]:
    """Nested data as one level, with "/" between names; of flat data, the data.

    Lists become JSON text, which a parallel-coordinates view takes as a category. Left out: null,
    and Hydra's own keys such as `_target_`.
    """
    level: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        if str(key).startswith("_") or value is None:
            continue
        if isinstance(value, Mapping):
            level |= flat(value, f"{above}{key}/")
        else:
            is_plain = isinstance(value, (str, int, float))
            level[f"{above}{key}"] = value if is_plain else json.dumps(value, default=str)
    return level


def short(text: str, limit: int) -> str:
    """A text of at most `limit` characters; a cut one ends in a hash, so that two stay two."""
    if len(text) <= limit:
        return text
    return f"{text[: limit - 9]}…{stable_hash(text)[:8]}"


def stable_hash(text: str) -> str:
    """16 hexadecimal digits that are the same in every process."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
