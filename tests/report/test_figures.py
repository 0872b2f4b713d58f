"""Figures as people read them: units, differences, titles, and which way is better."""

from __future__ import annotations

import math

import pytest

from moe_lab.report.figures import (
    better,
    difference_text,
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
def test_a_figure_is_written_by_the_last_part_of_its_key(key: str, value: float, text: str) -> None:
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
    assert [better(key) for key in ("seed", "ratio", "dense/eval/routing/top_k")] == [0] * 3


def test_titles_name_the_variant() -> None:
    assert titles_of("compressed/kl") == ("compressed", "KL to dense")
    assert titles_of("dense_top_1/eval/average") == ("dense top-1", "average accuracy")
    assert titles_of("dense/eval/arc/acc") == ("dense", "arc acc")
    assert titles_of("calibration/group") == ("", "calibration/group")
    assert is_truth("cached/stock") and not is_truth("compressed/kl")


def test_one_metric_stands_for_a_task() -> None:
    assert main_metric(["acc", "acc_stderr", "acc_norm"]) == "acc_norm"
    assert main_metric(["word_perplexity", "byte_perplexity", "bits_per_byte"]) == "bits_per_byte"
    assert main_metric(["rouge", "bleu"]) == "rouge"
