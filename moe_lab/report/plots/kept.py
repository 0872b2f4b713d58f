"""Pictures, drawn once for all that shows the same: kept in the store, copied from there.

The drawing code is given what its pictures show and nothing else. Their key has that, the code, the
packages that it draws with, and the user's own settings of matplotlib.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab import processes
from moe_lab.dependencies import code_version
from moe_lab.files import PLOTS
from moe_lab.integrity import sha256_of
from moe_lab.provenance import version
from moe_lab.report.frame import REQUEST
from moe_lab.report.plots import run, sweep
from moe_lab.report.report import Report
from moe_lab.store import DONE, Store
from moe_lab.types import UserError

logger = logging.getLogger(__name__)

DRAWN_WITH = ("matplotlib", "numpy", "pandas", "pillow", "fonttools")
MATPLOTLIBRC = "matplotlibrc"


def run_pictures(folder: Path, report: Report, root: Path) -> list[Path]:
    """The PNGs of `draw_run` in a run's folder, with their PDFs beside them; root: the store's."""
    shown = run.shown_files(folder)
    if not shown:
        return []
    told = run.told_of(report)
    seen = {"told": told, "files": {file.name: sha256_of(file) for file in shown}}
    drawn = functools.partial(run.draw_run_into, folder, told)
    return _kept(folder, root, [report.get(REQUEST)], seen, drawn)


def sweep_pictures(folder: Path, frame: pd.DataFrame, root: Path) -> list[Path]:
    """The PNGs of `draw_sweep` in a sweep's folder, likewise."""
    shown = sweep.shown_jobs(frame)
    rows = [list(shown), list(shown.index), shown.to_numpy().tolist()]
    curves = {name: sha256_of(file) for name, file in sweep.curve_files(folder, shown).items()}
    asked = list(shown[REQUEST]) if REQUEST in shown else []
    drawn = functools.partial(sweep.draw_sweep_into, folder, shown)
    return _kept(folder, root, asked, {"rows": rows, "curves": curves}, drawn)


def _kept(
    folder: Path,
    root: Path,
    asked: list[Any],
    seen: Mapping[str, Any],
    drawn: functools.partial[list[Path]],
) -> list[Path]:
    """The pictures in a folder's plots/ that `drawn(<a folder>)` makes of what is `seen`.

    asked: fingerprints of the jobs that they are of, by which the store knows them as used.
    """
    identity = {
        "asked": asked,
        "seen": _digest(seen),
        "code": code_version(drawn.func),
        "drawn with": {name: version(name) for name in DRAWN_WITH},
        "settings": _digest(list(_settings())),
    }

    def make(home: Path) -> None:
        try:
            drawn(home)
        except BaseException:  # none is left half drawn, to take up a disk that may be full
            shutil.rmtree(home)
            raise

    store = Store(root)
    try:
        with processes.alone():
            made = store.get("pictures", identity, make)
    except UserError as error:
        logger.warning("pictures are drawn and not kept: %s", error)
        return drawn(folder / PLOTS)
    return _copied(made.folder, folder / PLOTS)


def _copied(pictures: Path, home: Path) -> list[Path]:
    """The PNGs of a result, with what lies beside them, copied into another folder."""
    files = sorted(file for file in pictures.iterdir() if file.name != DONE)
    if files:
        home.mkdir(parents=True, exist_ok=True)
    written = [Path(shutil.copyfile(file, home / file.name)) for file in files]
    return [file for file in written if file.suffix == ".png"]


def _settings() -> Iterator[str]:
    """What matplotlib may read of a user's wishes, from each of the places where it looks."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "matplotlib"
    own = Path(os.environ.get("MPLCONFIGDIR") or home)
    asked = Path(os.environ.get("MATPLOTLIBRC") or MATPLOTLIBRC)
    for file in (Path(MATPLOTLIBRC), asked, asked / MATPLOTLIBRC, own / MATPLOTLIBRC):
        if file.is_file():
            yield file.read_text(encoding="utf-8", errors="replace")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
