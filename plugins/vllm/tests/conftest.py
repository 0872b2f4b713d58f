"""Cases made by moe_lab's Python, and what vLLM's makes of them, each in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
QUIET = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}

Serve = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of cases: that of MOE_LAB_CASES, else made now (some minutes).

    By the Python of MOE_LAB_PYTHON, else that of .venv.
    """
    if made := os.environ.get("MOE_LAB_CASES"):
        return Path(made)
    python = os.environ.get("MOE_LAB_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([python, str(HERE / "make_cases.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def serve(cases: Path) -> Serve:
    """`serve(names or folders, **options)`: the answers of `served.py` by their names."""

    def run(
        *which: str | Path, environment: dict[str, str] | None = None, **options: Any
    ) -> dict[str, dict[str, Any]]:
        folders = [str(one if isinstance(one, Path) else cases / one) for one in which]
        told = [f"--{name}={json.dumps(value)}" for name, value in options.items()]
        done = subprocess.run(
            [sys.executable, str(HERE / "served.py"), *folders, *told],
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        answers = {name: json.loads(told) for _, name, told in (one.split(" ", 2) for one in lines)}
        assert len(answers) == len(folders), done.stdout[-3000:] + done.stderr[-3000:]
        return answers

    return run


def assert_right(answer: dict[str, Any]) -> None:
    """Equal to moe_lab.load: log-probabilities within 1e-4, every greedy token the same."""
    assert "error" not in answer, answer["error"]
    assert answer["agree"] == answer["of"] == 48
    assert answer["off"] <= 1e-4
