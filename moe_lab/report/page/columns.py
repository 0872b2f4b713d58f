"""A page's columns: each report key with its values, their texts and which way is better."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from moe_lab.report.figures import (
    COSTS,
    DEFAULT_VALUES,
    FIGURES,
    MAIN_QUALITIES,
    better,
    figure_text,
    is_truth,
)
from moe_lab.report.frame import ORIGIN_KEYS, keys_of, label_of, setting_keys, varying_keys

RATIO = "ratio"  # the setting that is a cost itself: the more removed, the better


def axes() -> dict[str, Any]:
    """What the page knows of figures that are axes, by their names without the variant.

    titles: of qualities and costs, in the order of FIGURES; costs: in the order in which they are
    proposed; quality: what is proposed to be drawn against them; of_dense: figures that are 1 of
    the dense model itself.
    """
    titles = {
        figure.name: figure.unit.on_page(figure.title)
        for figure in FIGURES
        if figure in (*MAIN_QUALITIES, *COSTS)
    }
    return {
        "titles": titles | {RATIO: "ratio: share removed"},
        "costs": [*(figure.name for figure in COSTS), RATIO],
        "quality": MAIN_QUALITIES[0].name,
        "of_dense": [figure.name for figure in FIGURES if figure.unit.of_dense],
    }


def columns_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Each key's values, every different one once with its text, and which of them each run has.

    better: 1 where higher is better, -1 where lower is, 0 unknown; code -1: the run has none.
    """
    settings, varying = set(setting_keys(frame)), set(varying_keys(frame))
    shown = [*(key for key in varying_keys(frame) if not ORIGIN_KEYS.match(key)),
             *(key for key in DEFAULT_VALUES if key in frame)]  # fmt: skip
    return [
        {
            "key": key,
            "setting": key in settings,
            "varies": key in varying,
            "shown": shown.index(key) if key in shown else None,
            "better": 1 if key == RATIO else better(key),
            "format": _format(key),
            **_values(key, frame[key], key in settings),
        }
        for key in keys_of(frame)
    ]


def _values(key: str, column: pd.Series, setting: bool) -> dict[str, Any]:
    places: dict[tuple[type, Any], int] = {}
    codes = []
    for value in column:
        known = value is not None and value == value
        # 1, 1.0 and True are equal to Python, but not the same text.
        codes.append(places.setdefault((type(value), value), len(places)) if known else -1)
    values = [value for _, value in places]
    texts = [
        label_of(value) if setting or isinstance(value, str) else figure_text(key, value)
        for value in values
    ]
    return {"values": values, "texts": texts, "codes": codes if any(codes) else 0}


def _format(key: str) -> list[str | int]:
    """How `figure_text` writes this key, for numbers that only the page knows: kind, digits, unit.

    Read off an example, so that the two cannot disagree.
    """
    text = figure_text(key, 1234567.0)
    known = {"123456700.0 %": "share", "1.2 M": "count", "1.2 MB": "bytes"}
    if is_truth(key):
        return ["truth", 0, ""]
    if text in known:
        return [known[text], 1, ""]
    fixed = re.fullmatch(r"1234567(?:\.(0+))?(.*)", text)
    return ["fixed", len(fixed[1] or ""), fixed[2]] if fixed else ["general", 6, ""]
