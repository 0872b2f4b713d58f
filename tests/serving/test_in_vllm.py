"""What vLLM's process says without vLLM; `make serving` runs it with."""

from __future__ import annotations

import pytest

from moe_lab.serving.in_vllm import words


def test_an_error_is_told_by_what_it_came_from() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise ValueError("no such\n  architecture")
        except ValueError as error:
            raise RuntimeError("Engine core initialization failed") from error
    assert words(caught.value) == "ValueError: no such architecture"


def test_an_error_without_words_is_told_by_its_place() -> None:
    with pytest.raises(AssertionError) as caught:
        raise AssertionError
    place = "test_an_error_without_words_is_told_by_its_place"
    assert words(caught.value) == f"AssertionError: in test_in_vllm.py, {place}"
