"""One page for a sweep: index.html, a single file that works offline and asks no network.

The figures of all runs lie in it as one JSON text. What a run's own view needs (config, plan, log,
curves) lies in parts, compressed and each different one once, that the page unpacks when it is
looked at. The page's own code is page.html, page.css and the scripts beside this file: a
plotting library would add megabytes to every page.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moe_lab.files import CURVE, DIAGNOSIS, HYDRA, LOG, PAGE, PLAN, PLOTS, USAGE
from moe_lab.integrity import write_whole
from moe_lab.report.frame import STATUS, read_reports, reason_of
from moe_lab.report.page.columns import axes, columns_of
from moe_lab.report.report import OK
from moe_lab.report.run_files import (
    LOADER,
    commands_of,
    curve_rows,
    files_of,
    read_plan,
    read_text,
    read_usage,
    tail_of,
    versions_of,
)

SCRIPTS = ("dom", "data", "filter", "table", "axes", "pareto", "charts", "plan", "run", "compare",
           "main")  # fmt: skip
PICTURE_BYTES = 10_000_000  # in one page; further ones are links


def write_page(folder: Path, title: str | None = None) -> Path:
    """Write <folder>/index.html from all reports at or below `folder`, and return its path.

    title: default, the folder's name. UserError where there is no report.
    """
    frame = read_reports(folder)
    runs, every = [str(name) for name in frame.index], frame.to_dict("records")
    parts, pictures = PackedTexts(), Pictures(folder)
    sweep = {
        "title": title or folder.resolve().name,
        "runs": runs,
        "why": [None if one.get(STATUS) == OK else reason_of(one)
                for one in every],
        "columns": columns_of(frame),
        **axes(),
        "files": [name for name in ("table.md", "table.csv", "table.tex", "multirun.yaml")
                  if (folder / name).is_file()],
        "plots": pictures.of(folder / PLOTS),
        "details": [parts.put(_details(folder, name, one, parts, pictures))
                    for name, one in zip(runs, every, strict=True)],
    }  # fmt: skip
    path = folder / PAGE
    write_whole(path, _page(sweep, parts, pictures))
    return path


class PackedTexts:
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


def _details(
    root: Path, name: str, one: Mapping[Any, Any], parts: PackedTexts, pictures: Pictures
) -> dict[str, Any]:
    """What a run's own view shows beside its report; what its folder lacks is None or empty."""
    folder = root / name
    config, hydra = (read_text(folder / HYDRA / f"{file}.yaml") for file in ("config", "hydra"))
    overrides = yaml.load(read_text(folder / HYDRA / "overrides.yaml") or "[]", LOADER) or []
    plan, scores = read_plan(read_text(folder / PLAN))
    usage = read_usage(read_text(folder / USAGE))
    curve = list(curve_rows(read_text(folder / CURVE)))
    return {
        "config": config,
        "overrides": overrides,
        "commands": commands_of(one.get("commit"), overrides, hydra),
        "versions": versions_of(one, config, hydra),
        "plan": parts.put(plan) if plan else None,
        "scores": parts.put(scores) if scores else None,
        "usage": parts.put(usage) if usage else None,
        "curve": parts.put(curve) if curve else None,
        "pictures": pictures.of(folder / DIAGNOSIS),
        "log": tail_of(folder / LOG),
        "files": [[file, _link(f"{name}/{file}")] for file in files_of(folder)],
    }


def _link(path: str) -> str:
    return f"./{quote(path)}"  # the ./ keeps a folder's name from being taken for a protocol


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _page(sweep: Mapping[str, Any], parts: PackedTexts, pictures: Pictures) -> str:
    here = Path(__file__).parent
    style = (here / "page.css").read_text(encoding="utf-8")
    script = "\n".join((here / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    packed = [*_elements("part", parts.packed), *_elements("picture", pictures.packed)]
    made = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    return made.get_template("page.html").render(
        title=sweep["title"],
        policy=f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash(script)}; style-src {_hash(style)}",
        style=style,
        script=script,
        sweep=_json(sweep),
        parts="\n".join(packed),
    )


def _elements(kind: str, packed: Mapping[str, str]) -> Iterable[str]:
    return (f'<script type="text/plain" id="{kind}-{name}">{text}</script>'
            for name, text in packed.items())  # fmt: skip


def _hash(text: str) -> str:
    """What a content policy calls a script or style that it lets run: this one, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
