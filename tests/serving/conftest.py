"""A few of the checkpoints that are served, made once."""

from __future__ import annotations

import pytest

from moe_lab.serving.asking import made
from moe_lab.serving.checkpoints import Served
from moe_lab.store import Store

MIXTRAL = "random mixtral"
FEW = [(MIXTRAL, name) for name in ("dense", "prune .25", "unequal")]


@pytest.fixture(scope="session")
def served_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="session")
def few(served_store: Store) -> list[Served]:
    """Of a random mixtral: the dense one, a native and one of our own form."""
    return made(served_store, FEW)
