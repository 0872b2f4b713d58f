"""All text of a run: what it is called, and where a mistake in it is told to be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hydra.utils import instantiate

from moe_lab.stages.parts import Parts
from moe_lab.stages.texts import tokenize
from moe_lab.types import UserError

OURS = ["num_samples=6", "max_length=16", "files=${calibration.files}"]
ASKED = [
    "method=prune",
    "finetune=experts",
    *(f"calibration@finetune.phases.lm.{text}=files" for text in ("data", "validation")),
    *(f"finetune.phases.lm.{text}.{one}" for text in ("data", "validation") for one in OURS),
    "finetune.phases.lm.validation.num_samples=3",
    "eval=perplexity",
    "calibration@eval.held_out=files",
    "eval.held_out.files=${calibration.files}",
    "eval.held_out.num_samples=5",
]


@pytest.fixture
def parts(composed: Callable[..., Any], small: list[str]) -> Callable[..., Parts]:
    make = partial(instantiate, _convert_="object")
    return lambda *overrides: Parts.made(composed(*small, *overrides), make)


def test_each_text_has_the_name_of_its_use(parts: Callable[..., Parts], tokenizer: Any) -> None:
    found = tokenize(parts(*ASKED), tokenizer)
    assert {name: len(tokens.samples) for name, tokens in found.items()} == {
        "calibration": 8, "lm/data": 6, "lm/validation": 3, "held_out": 5,
    }  # fmt: skip
    assert max(map(len, found["lm/data"].samples)) == 16
    assert tokenize(parts("method=prune", "finetune=none", "eval=none"), tokenizer).keys() == {
        "calibration"
    }
    without = tokenize(parts(*ASKED, "finetune.phases.lm.validation=null"), tokenizer)
    assert without.keys() == found.keys() - {"lm/validation"}
    assert without["calibration"].fingerprint == found["calibration"].fingerprint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.num_samples=99", r"^99 samples were asked for"),
        (
            "finetune.phases.lm.data.num_samples=99",
            r"^finetune\.phases\.lm\.data: 99 samples were asked for",
        ),
        ("finetune.phases.lm.validation.field=x", r"^finetune\.phases\.lm\.validation: .*'x'"),
        ("eval.held_out.field=x", r"^[^:]*has no field 'x'"),
        ("eval.num_items=0", r"eval\.num_items=0: it must be at least 1"),
    ],
)
def test_a_mistake_is_told_where_it_is(
    override: str, message: str, parts: Callable[..., Parts], tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=message):
        tokenize(parts(*ASKED, override), tokenizer)


def test_no_sample_is_longer_than_the_model(
    parts: Callable[..., Parts], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = parts(*ASKED, "calibration.max_length=40", "eval.held_out.max_length=21")
    found = tokenize(made, tokenizer, positions=20)
    assert all(len(ids) <= 20 for tokens in found.values() for ids in tokens.samples)
    assert max(map(len, found["calibration"].samples)) == 20
    for said in (
        "calibration.max_length=40 is more than the 20 positions",
        "eval.held_out.max_length=21 is more than the 20 positions",
    ):
        assert said in caplog.text
    assert "finetune.phases" not in caplog.text, "of 16 tokens: nothing to cut"
    same = tokenize(parts(*ASKED, "calibration.max_length=20"), tokenizer, positions=20)
    assert same["calibration"].fingerprint == found["calibration"].fingerprint
    caplog.clear()
    whole = tokenize(made, tokenizer, positions=40)
    assert max(map(len, whole["calibration"].samples)) == 40 and not caplog.text


def test_a_token_that_the_embedding_has_not_is_named(
    parts: Callable[..., Parts], tokenizer: Any
) -> None:
    rows = len(tokenizer)
    assert tokenize(parts(*ASKED), tokenizer, vocabulary=rows)
    with pytest.raises(UserError, match=r"calibration: document \d+ has the token \d+.* 100 rows"):
        tokenize(parts(*ASKED), tokenizer, vocabulary=100)
