"""A process of stock transformers, and a tiny checkpoint that was written once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_lab.families.family import Family, written_family
from moe_lab.families.stock_process import stock_process


@pytest.fixture(scope="session")
def stock() -> Iterator[Path]:
    with stock_process() as path:
        yield path


@pytest.fixture(scope="module")
def family(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """A qwen3_moe, whose statistics are collected."""
    from moe_lab.families.checks import check_observing

    made = written_family("qwen3_moe", stock, tmp_path_factory.mktemp("family"))
    assert check_observing(made).state == "yes"
    yield made
    made.stock.close()
