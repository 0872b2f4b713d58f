"""One page for a sweep: index.html, a single file that works offline and asks no network.

The figures of all runs lie in it as one JSON text. What a run's own view needs (config, plan, log,
curves) lies in parts, compressed and each different one once, that the page unpacks when it is
looked at. The page's own code is page.html, page.css and the scripts beside this file.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import html
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import yaml

from moe_lab import pivot, report, reports, store

FILE = "index.html"
SCRIPTS = ("dom", "data", "filter", "table", "axes", "pareto", "charts", "plan", "run", "compare",
           "main")  # fmt: skip
TITLES = {
    "eval/average": "average accuracy",
    "kl": "KL to dense, nats per token",
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "parameter_ratio": "parameters, share of dense",
    "flops_per_token": "FLOPs per token",
    "bytes": "size on disk",
    "memory_ratio": "peak memory of a forward, share of dense",
    "prefill_speedup": "prefill speed, times dense",
    "decode_speedup": "decode speed, times dense",
    "ratio": "ratio: share removed",
}
CONFIG_FOLDER = r"^    - path: (.+)\n +schema: file\n +provider: command-line$"
LOG_LINES, LOG_BYTES = 300, 100_000
PICTURE_BYTES = 10_000_000  # in one page; further ones are links
LISTED = (".hydra", "diagnosis")  # the folders of a run whose files are ours
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def write(folder: Path, title: str | None = None) -> Path:
    """Write <folder>/index.html from all reports at or below `folder`, and return its path.

    title: default, the folder's name. UserError where there is no report.
    """
    frame = reports.read(folder)
    every = frame.to_dict("index")
    parts, pictures = Parts(), Pictures(folder)
    sweep = {
        "title": title or folder.resolve().name,
        "runs": list(frame.index),
        "why": [None if one.get(reports.STATUS) == reports.OK else reports.why(one)
                for one in every.values()],
        "columns": _columns(frame),
        "titles": TITLES,
        "files": [name for name in ("table.md", "table.csv", "table.tex", "multirun.yaml")
                  if (folder / name).is_file()],
        "plots": pictures.of(folder / "plots"),
        "details": [parts.put(_details(folder, name, one, parts, pictures))
                    for name, one in every.items()],
    }  # fmt: skip
    path = folder / FILE
    store.write_whole(path, _page(sweep, parts, pictures))
    return path


class Parts:
    """Texts for later, compressed; the same one is kept once."""

    def __init__(self) -> None:
        self.packed: dict[str, str] = {}

    def put(self, value: Any) -> str:
        """The name under which the page finds `value`, which JSON can say."""
        text = _json(value).encode()
        name = hashlib.sha256(text).hexdigest()[:12]
        if name not in self.packed:
            self.packed[name] = base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()
        return name


class Pictures:
    """PNG files by content, up to PICTURE_BYTES of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.size = root, 0
        self.packed: dict[str, str] = {}

    def of(self, folder: Path) -> list[dict[str, Any]]:
        """Each picture of a folder: its name, its link, and its part unless the page is full."""
        return [self._put(path) for path in sorted(folder.glob("*.png"))]

    def _put(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()[:12]
        if name not in self.packed and self.size + len(content) <= PICTURE_BYTES:
            self.size += len(content)
            self.packed[name] = base64.b64encode(content).decode()
        link = _link(path.relative_to(self.root).as_posix())
        part = name if name in self.packed else None
        return {"name": path.stem, "link": link, "part": part}


def _columns(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Each key's values, every different one once with its text, and which of them each run has.

    better: 1 where higher is better, -1 where lower is, 0 unknown; code -1: the run has none.
    """
    settings, varying = set(reports.settings(frame)), set(reports.varying(frame))
    shown = [*(key for key in reports.varying(frame) if not reports.ORIGIN.match(key)),
             *(key for key in pivot.DEFAULT_VALUES if key in frame)]  # fmt: skip
    return [
        {
            "key": key,
            "setting": key in settings,
            "varies": key in varying,
            "shown": shown.index(key) if key in shown else None,
            "better": 1 if key == "ratio" else report.better(key),  # the more removed
            "format": _format(key),
            **_values(key, frame[key], key in settings),
        }
        for key in frame
    ]


def _values(key: str, column: pd.Series, setting: bool) -> dict[str, Any]:
    places: dict[Any, int] = {}
    codes = []
    for value in column:
        known = value is not None and value == value
        # 1, 1.0 and True are equal to Python, but not the same text.
        codes.append(places.setdefault((type(value), value), len(places)) if known else -1)
    values = [value for _, value in places]
    texts = [
        reports.label(value) if setting or isinstance(value, str) else report.shown(key, value)
        for value in values
    ]
    return {"values": values, "texts": texts, "codes": codes if any(codes) else 0}


def _format(key: str) -> list[Any]:
    """How report.shown writes this key, for numbers that only the page knows: kind, digits, unit.

    Read off an example, so that the two cannot disagree.
    """
    text = report.shown(key, 1234567.0)
    known = {"123456700.0 %": "share", "1.2 M": "count", "1.2 MB": "bytes"}
    if report.is_truth(key):
        return ["truth", 0, ""]
    if text in known:
        return [known[text], 1, ""]
    fixed = re.fullmatch(r"1234567(?:\.(0+))?(.*)", text)
    return ["fixed", len(fixed[1] or ""), fixed[2]] if fixed else ["general", 6, ""]


def _details(
    root: Path, name: str, one: Mapping[str, Any], parts: Parts, pictures: Pictures
) -> dict[str, Any]:
    """What a run's own view shows beside its report; what its folder lacks is None or empty."""
    folder = root / name
    config, hydra = (_read(folder / ".hydra" / f"{file}.yaml") for file in ("config", "hydra"))
    overrides = yaml.load(_read(folder / ".hydra" / "overrides.yaml") or "[]", LOADER) or []
    plan, scores = _plan(_read(folder / "plan.json"))
    usage = _usage(_read(folder / "usage.csv"))
    curve = list(_curve(_read(folder / "curve.jsonl")))
    return {
        "config": config,
        "overrides": overrides,
        "commands": _commands(one.get("commit"), overrides, hydra),
        "versions": _versions(one, config, hydra),
        "plan": parts.put(plan) if plan else None,
        "scores": parts.put(scores) if scores else None,
        "usage": parts.put(usage) if usage else None,
        "curve": parts.put(curve) if curve else None,
        "pictures": pictures.of(folder / "diagnosis"),
        "log": _tail(folder / "run.log"),
        "files": [[file, _link(f"{name}/{file}")] for file in _files(folder)],
    }


def _plan(text: str | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A plan to four digits, and its scores by layer: runs often differ in the plan alone."""
    try:
        found = json.loads(text, parse_float=_short, parse_constant=_nothing) if text else None
    except ValueError:  # killed while it was written
        return None, {}
    if not isinstance(found, dict) or "layers" not in found:
        return None, {}
    scores = {edit["index"]: edit.pop("scores") for edit in found["layers"] if "scores" in edit}
    return found, {index: values for index, values in scores.items() if len(values) > 1}


def _usage(text: str | None) -> dict[str, list[float | None]]:
    """The experts' usage by layer."""
    found: dict[str, list[float | None]] = {}
    for row in csv.DictReader(io.StringIO(text or "")):
        values, expert = found.setdefault(row["layer"], []), int(row["expert"])
        values.extend([None] * (expert + 1 - len(values)))
        values[expert] = _short(row["usage"]) if row["usage"] else None
    return found


def _curve(text: str | None) -> Iterator[dict[str, Any]]:
    for line in (text or "").splitlines():
        try:
            yield json.loads(line, parse_constant=_nothing)
        except ValueError:  # the last line of a killed run
            return


def _commands(commit: str | None, overrides: list[str], hydra: str | None) -> list[str]:
    """The shell lines that make this run again."""
    lines = []
    if commit and commit != "unknown":
        name, _, dirty = commit.partition("+")
        lines.append(f"git checkout {name}" + ("  # and changes not committed" if dirty else ""))
    if not overrides and hydra is None:
        return lines
    asked = [override for override in overrides if not override.startswith("resume=")]
    places = re.findall(
        CONFIG_FOLDER, hydra or "", re.MULTILINE
    )  # of one's own metrics and the like
    # An experiment's file asks for a sweep by itself; this is one job of it.
    of_experiment = any(override.startswith("+") for override in overrides)
    sweeps = hydra is None or re.search(r"^  mode: MULTIRUN$", hydra, re.MULTILINE)
    single = ["hydra.mode=RUN"] if of_experiment and sweeps else []
    folders = [word for place in places for word in ("--config-dir", place)]
    return [*lines, shlex.join(["python", "run.py", *folders, *asked, *single])]


def _versions(one: Mapping[str, Any], config: str | None, hydra: str | None) -> dict[str, str]:
    """Those of the packages that made the run's first result, where its store still has it."""
    names = [value for key, value in one.items() if key.startswith("artifact/") and value]
    root = re.search(r"^store: (.+)$", config or "", re.MULTILINE)
    working = re.search(r"^    cwd: (.+)$", hydra or "", re.MULTILINE)
    if not names or not root:
        return {}
    path = Path(working[1] if working else ".") / root[1] / names[0] / store.DONE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError):
        return {}


def _files(folder: Path) -> Iterator[str]:
    """The files of a run; not those of runs below it, nor of other programs."""
    for path in sorted(folder.iterdir()):
        if path.name in LISTED:
            yield from (f"{path.name}/{one.name}" for one in sorted(path.iterdir()))
        elif path.is_file() and not path.name.endswith(".partial"):
            yield path.name


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _tail(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])


def _link(path: str) -> str:
    return f"./{quote(path)}"  # the ./ keeps a folder's name from being taken for a protocol


def _short(text: str) -> float | None:
    value = float(f"{float(text):.4g}")
    return value if math.isfinite(value) else None


def _nothing(_: str) -> None:
    """NaN and the infinities, which JSON does not have."""


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _page(sweep: Mapping[str, Any], parts: Parts, pictures: Pictures) -> str:
    here = Path(__file__).parent
    style = (here / "page.css").read_text(encoding="utf-8")
    script = "\n".join((here / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    packed = [*_elements("part", parts.packed), *_elements("picture", pictures.packed)]
    values = {
        "title": html.escape(sweep["title"]),
        "policy": f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash(script)}; style-src {_hash(style)}",
        "style": style,
        "script": script,
        "sweep": _json(sweep),
        "parts": "\n".join(packed),
    }
    template = (here / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _elements(kind: str, packed: Mapping[str, str]) -> Iterable[str]:
    return (f'<script type="text/plain" id="{kind}-{name}">{text}</script>'
            for name, text in packed.items())  # fmt: skip


def _hash(text: str) -> str:
    """What a content policy calls a script or style that it lets run: this one, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
