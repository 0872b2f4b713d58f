"""Figures as people read them: units, differences, titles, and which way is better."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, SUPPORT
from told_figures import told

from moe_lab.report.figures import (
    FIGURES,
    better,
    difference_text,
    figure_of,
    figure_text,
    is_truth,
    main_metric,
    titles_of,
)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("dense/eval/average", 0.7025, "70.2 %"),
        ("compressed/eval/arc/acc_norm", 1.0, "100.0 %"),
        ("compressed/eval/prose/bits_per_byte", 1.2504, "1.250"),
        ("compressed/kl", 0.01234, "0.0123"),
        ("compressed/kl", -0.00001, "0.0000"),
        ("dense/parameters", 999_949, "999.9 k"),
        ("dense/parameters", 999_950, "1.0 M"),
        ("dense/bytes", 32_751_456_256, "32.8 GB"),
        ("dense/bytes", 999, "999 B"),
        ("compressed/prefill_speedup", 1.2149, "1.21×"),
        ("compressed/stock", True, "yes"),
        ("compressed/stock", 1 / 3, "33 % yes"),
        ("dense/eval/routing/top_k", 6.0, "6"),
        ("compressed/kl", math.nan, "–"),
        ("compressed/kl", math.inf, "–"),
    ],
)
def test_a_figure_is_written_in_its_unit(key: str, value: float, text: str) -> None:
    assert figure_text(key, value) == text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("compressed/eval/average", -0.125, "−12.5"),
        ("compressed/eval/average", 0.0001, "0.0"),
        ("compressed/kl", 0.1, "+0.1000"),
        ("compressed/kl", -0.00001, "0.0000"),
        ("compressed/parameters", -2_000_000.0, "−2.0 M"),
        ("compressed/parameter_ratio", 0.021, "+2.1"),
    ],
)
def test_a_difference_has_a_sign_but_for_none(key: str, value: float, text: str) -> None:
    assert difference_text(key, value) == text


def test_which_way_is_better() -> None:
    more = "compressed/eval/average x/eval/arc/acc compressed/decode_speedup"
    less = "finetuned/kl dense/bytes dense/eval/held_out/perplexity seconds/plan dense/parameters"
    assert [better(key) for key in more.split()] == [1] * 3
    assert [better(key) for key in less.split()] == [-1] * 5
    assert better("compressed/decode_seconds_per_token") == -1
    assert better("dense/eval/wiki/word_perplexity") == better("dense/eval/code/perplexity") == -1
    assert [better(key) for key in ("seed", "ratio", "dense/eval/routing/top_k")] == [0] * 3


def test_titles_name_the_variant() -> None:
    assert titles_of("compressed/kl") == ("compressed", "KL to dense")
    assert titles_of("dense_top_1/eval/average") == ("dense top-1", "average accuracy")
    assert titles_of("dense/eval/arc/acc") == ("dense", "arc acc")
    assert titles_of("dense/eval/routing/top_k") == ("dense", "experts per token")
    assert titles_of("dense/peak_memory_bytes") == ("dense", "peak_memory_bytes")
    assert titles_of("calibration/group") == ("", "calibration/group")
    assert is_truth("cached/plan") and is_truth("compressed/stock")
    assert not is_truth("compressed/kl")


def test_one_metric_stands_for_a_task() -> None:
    assert main_metric(["acc", "acc_stderr", "acc_norm"]) == "acc_norm"
    assert main_metric(["word_perplexity", "byte_perplexity", "bits_per_byte"]) == "bits_per_byte"
    assert main_metric(["rouge", "bleu"]) == "rouge"


def test_the_most_special_entry_is_a_keys_own() -> None:
    found = {
        "compressed/eval/arc/acc": "<variant>/eval/<task>/acc",
        "compressed/eval/arc/acc_stderr": "<variant>/eval/<task>/<metric>",
        "compressed/eval/wiki/byte_perplexity": "<variant>/eval/<task>/byte_perplexity",
        "compressed/eval/wiki/word_perplexity": "<variant>/eval/<task>/<text>_perplexity",
        "dense/eval/held_out/perplexity": "<variant>/eval/held_out/perplexity",
        "finetuned_top_1/eval/routing/weight_2": "<variant>/eval/routing/weight_<rank>",
        "seconds/evaluate_dense": "seconds/<stage>",
        "finetune/used_expert_1": "finetune/used_expert_<rank>",
    }
    assert {key: (one := figure_of(key)) and one.key for key in found} == found
    assert figure_of("ratio") is figure_of("compressed/parameters_of_mine") is None


def test_entries_say_what_their_places_need() -> None:
    assert len({figure.key for figure in FIGURES}) == len(FIGURES)
    for figure in FIGURES:
        if figure.axis or figure.columns:
            assert figure.title and "<" not in figure.name, figure.key
            assert figure.better, f"{figure.key}: fronts and the best need a direction"
        assert not figure.row or figure.title or "<task>" in figure.name, figure.key
        assert figure.axis or not figure.picture, figure.key
        assert bool(figure.section) == bool(figure.about) == bool(figure.when), figure.key


ENTRY = """
    Figure("<variant>/bananas", "bananas", COUNT, LESS, row=True, columns=EDITED, axis=9,
           picture=True, section=COST, about="yellow ones", when="grown"),
"""
ADDED = {
    "console": ["bananas | 12.0 M | 6.0 M"],
    "card": ["| bananas | 12.0 M | 6.0 M |"],
    "table": ["compressed/bananas"],
    "help": ["bananas"],
    "page": ["compressed/bananas -1 3.0 M"],
    "titles": ["bananas"],
    "costs": ["bananas"],
    "pictures": ["pareto_bananas"],
    "labels": ["bananas (% of dense)"],
    "docs": ["| `<variant>/bananas` | yellow ones | – | less | grown |"],
}


def test_an_entry_is_all_that_a_figure_costs(tmp_path: Path) -> None:
    """In a copy of the code with one more entry, every place tells it, and else the same."""
    unused = shutil.ignore_patterns("checkpoints", "__pycache__")
    for name in ("moe_lab", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unused)
    source = tmp_path / "moe_lab" / "report" / "figures.py"
    code, before = source.read_text(encoding="utf-8"), '\n    Figure("<variant>/parameter_ratio"'
    assert code.count(before) == 1
    source.write_text(code.replace(before, ENTRY.rstrip() + before), encoding="utf-8")
    command = [sys.executable, str(SUPPORT / "told_figures.py"), "bananas"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout), told(ROOT, ["bananas"])
    for place, lines in here.items():
        assert [one for one in there[place] if one not in lines] == ADDED[place], place
        assert [one for one in there[place] if one not in ADDED[place]] == lines, place
