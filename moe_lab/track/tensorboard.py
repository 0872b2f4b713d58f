"""TensorBoard: event files under the run's folder, written by tensorboardX where it is installed.

Look at a sweep with `tensorboard --logdir <its folder>`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_lab.track.tracker import Guard, Points, TrackedArtifact, Tracker, figures, flat, numbers

EVENTS_FOLDER = "tensorboard"
INSTALL = ": pip install 'moe_lab[tensorboard]', or say track=offline|off"


class TensorBoardTracker(Tracker):
    """Event files under <run>/tensorboard, as `Tracker` says.

    A curve's figure is there twice: finetune/<phase>/<figure> over steps, and
    finetune_over_tokens/<phase>/<figure>. The report's numbers and the config are one session of
    the HParams view, in tensorboard/report. What TensorBoard cannot show is told as text: where
    a page or an artifact lies, and the artifacts as a table.

    A restarted job writes further files into the same folder, where TensorBoard joins them.
    """

    def __init__(self) -> None:
        self._guard = Guard("TensorBoard's writer", INSTALL)
        self._points = Points(None)
        self._config: dict[str, str | int | float | bool] = {}
        self._writer: Any = None

    @property
    def url(self) -> None:
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
        def open_files() -> None:
            from tensorboardX import SummaryWriter

            self._points = Points(folder / EVENTS_FOLDER / "points.jsonl" if identity else None)
            # Its own names are by the second: a restart within one would overwrite its file.
            suffix = f".{time.time_ns()}"
            self._writer = SummaryWriter(str(folder / EVENTS_FOLDER), filename_suffix=suffix)
            told = {"name": name, "group": group, "kind": job_type, "tags": ", ".join(tags)}
            self._writer.add_text("run", _markdown(["", ""], told.items()))

        self._config = flat(config)
        self._guard("opening its files", open_files)

    def log_curve(self, row: Mapping[str, Any]) -> None:
        if self._writer is None or self._points.has(row):
            return

        def add() -> None:
            for name, value in figures(row).items():
                place = f"{row['phase']}/{name}"
                self._writer.add_scalar(f"finetune/{place}", value, row["step"])
                if "tokens" in row:
                    self._writer.add_scalar(f"finetune_over_tokens/{place}", value, row["tokens"])
            self._points.add(row, row["step"])

        self._in_run("logging a curve", add)

    def summary(self, report: Mapping[str, Any]) -> None:
        def add() -> None:
            results = {key: float(value) for key, value in numbers(report).items()}
            results = {key: value for key, value in results.items() if key not in self._config}
            self._writer.add_hparams(self._config, results, name="report")
            self._writer.add_text("report", _markdown(["", ""], report.items()))

        self._in_run("writing the summary", add)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self._in_run(
            f"adding the table {name}",
            lambda: self._writer.add_text(name, _markdown(columns, rows)),
        )

    def images(self, paths: Iterable[Path]) -> None:
        def add(path: Path) -> None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                pixels_HWC = np.asarray(picture.convert("RGB"))
            self._writer.add_image(f"plots/{path.stem}", pixels_HWC, dataformats="HWC")

        for path in paths:
            self._in_run(f"adding {path}", functools.partial(add, path))

    def html(self, name: str, path: Path) -> None:
        self._in_run(f"adding {path}", lambda: self._writer.add_text(name, f"`{path}`"))

    def artifact(self, path: Path, name: str, type: str) -> None:
        self._in_run(f"adding {path}", lambda: self._writer.add_text(f"{type}/{name}", f"`{path}`"))

    def artifacts(self, items: Iterable[TrackedArtifact]) -> None:
        rows = [
            [item.name, item.type, ", ".join(item.made_from), "used" if item.found else "made",
             item.place or ", ".join(map(str, item.files))]
            for item in items
        ]  # fmt: skip
        self.table("artifacts", ["artifact", "type", "made from", "this run", "place"], rows)

    def finish(self, exit_code: int) -> None:
        def close() -> None:
            self._writer.add_text("exit code", str(exit_code))
            self._writer.close()

        self._in_run("closing its files", close)
        self._writer = None

    def _in_run(self, doing: str, act: Callable[[], object]) -> None:
        if self._writer is not None:
            self._guard(doing, act)


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [["" if cell is None else str(cell).replace("|", r"\|") for cell in line]
             for line in lines]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
