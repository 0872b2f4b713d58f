"""A shipped model, as it is and as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.export.gguf import export_gguf
from moe_lab.files import PACKAGE


@pytest.fixture(scope="session")
def shipped() -> Path:
    """tiny_mixtral: eight experts in each of eight layers."""
    return PACKAGE / "checkpoints" / "tiny_mixtral"


@pytest.fixture(scope="session")
def dense_gguf(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_mixtral as a GGUF file."""
    out = tmp_path_factory.mktemp("gguf") / "tiny_mixtral.gguf"
    export_gguf(shipped, out, pre_tokenizer="refact")
    return out
