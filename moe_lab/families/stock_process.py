"""The process that never imports moe_lab, from our side: started once, asked over a socket."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

REFERENCES = Path(__file__).with_name("references.py")


@contextmanager
def stock_process() -> Iterator[Path]:
    """The path of a socket on which such a process answers while it is open."""
    with TemporaryDirectory(prefix="moe_lab_families_") as folder:
        path, output = Path(folder) / "stock", Path(folder) / "output.txt"
        # -P: the folder of the script, with files named as anything, is not on the path.
        command = [sys.executable, "-P", str(REFERENCES), str(path)]
        with (
            output.open("w") as said,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, cwd=folder
            ) as process,
        ):
            assert process.stdin and process.stdout
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError(f"stock transformers did not start: {output.read_text()[-500:]}")
            try:
                yield path
            finally:
                process.stdin.close()  # by which it ends


@dataclass(frozen=True)
class StockAnswer:
    """What stock transformers made of a checkpoint.

    logits: of each batch, None where there are none and `error` says why. complaints: of its
    loading report. generation: "equal" where it decodes with a cache as without one.
    """

    logits: list[Tensor] | None
    error: str = ""
    complaints: str = ""
    generation: str = ""


class Stock:
    """A connection to that process, which answers it in a fork of its own.

    auto: name of the auto class that opens the models; folder: where batches and logits pass.
    """

    def __init__(self, path: Path, auto: str, folder: Path):
        self.auto, self.folder = auto, folder
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.replies = self.socket.makefile()

    def ask(
        self, kind: str, folder: Path, batches: Sequence[dict[str, Tensor]], **more: Any
    ) -> StockAnswer:
        """What `references.answer` says to a job of this kind about the checkpoint in `folder`."""
        torch.save(list(batches), self.folder / "batches.pt")
        out = self.folder / "logits.pt"
        out.unlink(missing_ok=True)
        files = {"folder": folder, "batches": self.folder / "batches.pt", "out": out}
        job = {"kind": kind, "auto": self.auto} | {key: str(one) for key, one in files.items()}
        try:
            self.socket.sendall(json.dumps(job | more).encode() + b"\n")
            reply = json.loads(self.replies.readline() or '{"error": "the process died"}')
        except OSError as error:
            reply = {"error": f"the process died: {error}"}
        logits = torch.load(out) if out.is_file() and "error" not in reply else None
        complaints = "; ".join(
            f"{key}: {', '.join(names)}" for key, names in reply.get("complaints", {}).items()
        )
        return StockAnswer(logits, reply.get("error", ""), complaints, reply.get("generation", ""))

    def close(self) -> None:
        """Hang up."""
        self.replies.close()
        self.socket.close()
