"""The help tells the options of what is chosen, with range and value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from running import ROOT, run_command

from moe_lab.option import Option, declared_by
from moe_lab.runs.option_help import (
    NAME_WIDTH,
    WIDTH,
    declared_behind,
    help_line,
    option_words,
    options_of,
    shown,
)


@dataclass
class Cut:
    share: Annotated[float, Option("how much goes", least=0, below=1)] = 0.5
    untold: int = 3


CUT = f"{__name__}.Cut"


def test_the_help_tells_the_options_of_what_is_chosen(tmp_path: Path) -> None:
    done = run_command(tmp_path, "finetune=seer", "finetune.entropy=0.5", "diagnose=full", "--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert (
        "finetune.entropy lambda, the weight of" in text and "(a number, at least 0): 0.5" in text
    )
    assert re.search(r"finetune\.annealing [^:]*linear, staircase, at_once\): linear", text)
    assert "finetune.phases.lm.epochs passes over the text (a whole number, at least 1): 1" in text
    assert "diagnose.num_samples" in text and "eval.num_items" not in text
    assert max(map(len, done.stdout.partition("Groups (")[0].splitlines())) <= WIDTH


def test_values_with_a_dollar_are_told(tmp_path: Path) -> None:
    done = run_command(tmp_path, "calibration=mixture", "metric=random", "--help")
    assert done.returncode == 0, done.stderr
    assert re.search(r"metric\.seed .*: as seed\n", done.stdout)
    assert re.search(r"calibration\.parts .*: prose, code\n", done.stdout)


def test_a_choice_that_does_not_exist_is_told(tmp_path: Path) -> None:
    done = run_command(tmp_path, "finetune=sear", "--help")
    assert done.returncode == 2 and "finetune/sear" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_line_has_help_range_and_type() -> None:
    share, untold = declared_by(Cut).values()
    assert option_words(share) == "how much goes (at least 0, below 1)"
    assert option_words(share, "a number") == "how much goes (a number, at least 0, below 1)"
    assert option_words(untold) == "a whole number"
    assert option_words(None) == ""
    line = help_line("cut.share", "how much goes " * 20)
    first, *others = line.splitlines()
    assert first.startswith("  cut.share ") and max(map(len, line.splitlines())) <= WIDTH
    assert others and all(other.startswith(" " * (NAME_WIDTH + 3)) for other in others)
    assert help_line("cut.share", "").strip() == "cut.share"


def test_nodes_inside_a_mapping_have_options_of_their_own() -> None:
    inner = {"_target_": CUT, "share": 0.1}
    node = {"_target_": CUT, "share": inner, "untold": {"first": inner, "second": None}}
    assert [(name, declared.name, value) for name, declared, value in options_of(node, "cut")] == [
        ("cut.share", "share", inner),
        ("cut.untold.first.share", "share", 0.1),
        ("cut.untold.second", "untold", None),
    ]


def test_an_option_that_others_refer_to_is_theirs() -> None:
    nodes = [{"share": "${far.share}"}, {"_target_": CUT, "share": "${far.share}"}, 3]
    assert declared_behind("far.share", nodes) == declared_by(Cut)["share"]
    assert declared_behind("far.other", nodes) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), ([1, "a"], "[1,a]"), ({"a": 1, "b": 2}, "a, b"), ({}, "{}"), ("", '""'),
     ("a\nb", "a\\nb"), ("${condense.beam}", "as condense.beam"), ({"_target_": CUT}, "Cut")],
)  # fmt: skip
def test_values_are_shown_in_one_line(value: object, text: str) -> None:
    assert shown(value) == text


def test_the_help_of_nothing_chosen_is_as_before(tmp_path: Path) -> None:
    done = run_command(ROOT, "--help")
    assert "Options of what was chosen here" not in done.stdout
    assert "docs/options.md" in done.stdout and "--cfg job" in done.stdout
