"""Datasets of the Hugging Face hub, or local folders of the same layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moe_lab.data.reading import PlacedRow
from moe_lab.data.rows import Rows
from moe_lab.option import Option
from moe_lab.types import UserError


@dataclass(frozen=True)
class HubDataset(Rows):
    """A dataset of the Hugging Face hub, or a local folder of the same layout, through `datasets`.

    A part of a split, such as train[:90%], can be asked for where it is not streamed.
    """

    path: Annotated[str, Option("owner/name on the hub, or a folder of the same layout")] = ""
    name: Annotated[str | None, Option("the dataset's configuration, where it has several")] = None
    split: Annotated[str, Option("the split, or a part of it such as train[:90%]")] = "train"
    data_files: Annotated[str | None, Option("read these of its files alone")] = None
    streaming: Annotated[bool, Option("read only as many rows as are taken")] = False

    def rows(self) -> Iterable[PlacedRow]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                data_files=self.data_files,
                streaming=self.streaming,
                cache_dir=_cache_of(Path(self.path)),
            )
        except Exception as error:  # datasets raises many kinds; each means: not to be had
            raise UserError(
                f"the dataset {self.path!r} could not be loaded: {error}. Without a network give a "
                "local folder of the same layout (calibration.path=<folder>), or calibration=files"
            ) from error
        for number, row in enumerate(rows, start=1):
            yield f"{self.path}, row {number}", row

    def describe(self) -> str:
        parts = (self.path, self.name, self.data_files)
        return f"{'/'.join(part for part in parts if part)} ({self.split})"


def _cache_of(folder: Path) -> str | None:
    """Where `datasets` keeps what it made of a local folder; None, its own place, for the hub's.

    It knows a folder by its name and would give old rows for new files (datasets 5.2), so each
    state of a folder has a place of its own.
    """
    if not folder.is_dir():
        return None
    import datasets

    files = sorted(path for path in folder.resolve().rglob("*") if path.is_file())
    stats = [(str(path), path.stat()) for path in files]
    # A change of content that keeps size and time of writing does not keep st_ctime.
    state = [(path, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for path, one in stats]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder_{digest}")
