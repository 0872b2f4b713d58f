"""Each structure of each family, served by stock vLLM with the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, assert_right
from moe_lab_vllm import FAMILIES

STRUCTURES = "counts dense stand_ins shared_rows narrow".split()


@pytest.fixture(scope="module")
def of_family(serve: Serve) -> Any:
    """The answers for a family's cases, which one process gives in turn."""
    known: dict[str, dict[str, dict[str, Any]]] = {}

    def answers(family: str) -> dict[str, dict[str, Any]]:
        if family not in known:
            known[family] = serve(*(f"{family}-{structure}" for structure in STRUCTURES))
        return known[family]

    return answers


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_serves_what_moe_lab_loads(of_family: Any, family: str, structure: str) -> None:
    assert_right(of_family(family)[f"{family}-{structure}"])


def test_it_says_the_same_compiled(serve: Serve, tmp_path: Path) -> None:
    """All other tests run eagerly, as `QUIET` has it."""
    compiling = {"TORCHDYNAMO_DISABLE": "0", "VLLM_CACHE_ROOT": str(tmp_path)}
    answers = serve("qwen2_moe-stand_ins", environment=compiling, **{"enforce-eager": False})
    assert_right(answers["qwen2_moe-stand_ins"])
    assert list(tmp_path.glob("torch_compile_cache/**/*"))


def test_without_the_plugin_vllm_refuses_in_one_line(serve: Serve) -> None:
    (answer,) = serve("qwen2_moe-counts", environment={"VLLM_PLUGINS": ""}).values()
    assert "moe_lab" in answer["error"]
