"""Text as overrides: Hydra, OmegaConf and a shell give it back as it was."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from moe_lab.runs.quoting import as_written, for_shell, override, quoted

TEXTS = [
    "/a/lr=3e-4", "/a b/c", " a", "a ", "/a[1]", "[x]", "[", "a]b", "/a,b", ",", "it's", "''", "'",
    '"x', 'say "a"', "a:b", "{a: 1}", "a{b", "(a)", "f(x)", "$a", "a${b}", "\\${b}", "a\\\\${b}c",
    "${", "${a}${b}", "a\\", "a\\'", "\\\\", "a\\b", "/é/日本", "~/x", "#1", "a;b&c|d", "`a`", "!x",
    "*?", "%s", "true", "null", "NaN", "1e3", "007", "-1", "", "???", "a\tb", "a=b=c",
    "../x", "<y>",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_was(text: str, composed: Callable[..., Any]) -> None:
    word = override("model.path", text)
    if text != "???":  # which stands for what is missing
        assert composed("model=checkpoint", word).model.path == text
    assert shlex.split(for_shell(word)) == [word]


def test_what_needs_no_quotes_has_none() -> None:
    for text in ("owner/name", "/a/b-c_1.5", "a@b", "50%", "x:y", "3.5b"):
        assert quoted(text) == text
    assert for_shell("model.path='a b'") == "\"model.path='a b'\""


@pytest.mark.parametrize(
    ("word", "way"),
    [
        ("model.path=/a/lr=3e-4", "model.path='/a/lr=3e-4'"),
        ("model.path=/a[1]", "model.path='/a[1]'"),
        ("calibration.files=[/a b=1/c.txt,/é.txt]", "calibration.files=['/a b=1/c.txt','/é.txt']"),
        ("calibration.files=[/a(1).txt", "calibration.files=['/a(1).txt']"),
        ("calibration.files=['/ok.txt',/é.txt]", "calibration.files=[/ok.txt,'/é.txt']"),
        ("+model.path=it's", "+model.path='it\\'s'"),
        ("model.path=/a,b", "model.path='/a,b'"),
        ("foo", None),
        ("a b=1", None),
    ],
)
def test_the_way_that_is_shown_is_one(word: str, way: str | None) -> None:
    if "," not in word:
        assert raises(word)
    assert as_written(word) == way
    if way:
        assert not OverridesParser.create().parse_override(way).is_sweep_override()


def raises(word: str) -> bool:
    with pytest.raises(OverrideParseException):
        OverridesParser.create().parse_overrides([word])
    return True
