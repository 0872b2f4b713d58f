"""What tests of whole programs share: run.py and Python in other processes, and what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

QUICK = ("method=prune", "finetune=none", "eval=none", "measure=none")  # without the last stages
SENTENCES = (
    "A router sends each token to a few of its experts, and their outputs are added up.",
    "Two and two are four; four and four are eight; eight and eight are sixteen.",
    "def square(number):\n    return number * number",
    "The quick brown fox jumps over the lazy dog while the cat watches from the wall.",
)


def missing(reason: str) -> NoReturn:
    """Skip a test for want of a program; where all are installed, as in CI, it fails instead."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@dataclass(frozen=True)
class Outcome:
    """What a run gave: its exit code, all it printed, and its report if it wrote one."""

    code: int
    text: str
    report: dict[str, Any]
    store: Path

    def stages(self) -> list[str]:
        """The kinds of result that its store holds, but for pictures, drawn behind all stages."""
        kinds = {path.name for path in self.store.glob("*") if any(path.glob("*/*.json"))}
        return sorted(kinds - {"pictures"})


Job = Callable[..., Outcome]


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without merges: three special tokens and a token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def write_checkpoint(folder: Path, tokenizer: Any) -> None:
    """A random qwen2_moe: 4 layers, the first dense, 8 experts, top-3, a shared expert."""
    from families import tiny_model

    model = tiny_model("qwen2_moe", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_texts(path: Path) -> None:
    """Sixteen short documents as JSON lines."""
    rows = [{"text": f"{number}. {text}"} for number in range(4) for text in SENTENCES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_options(checkpoint: Path, texts: Path) -> list[str]:
    """Options that make any run small: a tiny checkpoint and few, short texts of ours."""
    return [
        "model=checkpoint",
        f"model.path={checkpoint}",
        "model.dtype=float32",
        "calibration=files",
        f"calibration.files=[{texts}]",
        "calibration.num_samples=8",
        "calibration.max_length=32",
        "condense.num_layers=1",
        "condense.num_routed=2",
        "compute.threads=1",
        "track=off",
    ]


def load_module(name: str, path: Path) -> ModuleType:
    """A file outside any package as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


rooms = load_module("rooms", ROOT / "docs" / "rooms.py")


def run_command(
    folder: Path, *overrides: str, python: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run run.py from `folder`, so that its relative outputs/ lies there."""
    command = [*python, str(ROOT / "run.py"), *overrides]
    return run_python(folder, *command)


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python from `folder`, in an environment without W&B's.

    W&B tells child processes of its service there, which a test before may have started and ended.
    """
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=600,
        env={name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
    )  # fmt: skip


class Killed(Exception):
    """Stands for SIGKILL: nothing runs after it."""


def run_killed(training: Any, stop: int, save_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a `Training` that saves so often until it has done `stop` steps, and not further."""
    step = training._step

    def dying(*arguments: Any) -> dict[str, float]:
        if training.done == stop:
            raise Killed
        return step(*arguments)

    training.save_every = save_every
    monkeypatch.setattr(training, "_step", dying)
    with pytest.raises(Killed):
        training.run()


def start_two(script: str, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """`python -c script arguments` twice, as torchrun starts processes that know each other.

    Scripts find the modules of this folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = []
    for rank in ("0", "1"):
        environment = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
        command = [sys.executable, "-c", script, *arguments]
        started.append(subprocess.Popen(command, env=environment))
    return started
