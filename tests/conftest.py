"""A tiny checkpoint with its tokenizer, and run.py in this process or in one of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ.update(OFFLINE)  # before anything imports the hub's client
# Else MKL rounds by where in memory its operands lie, and what a fresh process loads differs in the
# last bit (seen on an AMD processor). Intel calls it conditional numerical reproducibility.
os.environ.setdefault("MKL_CBWR", "AVX2")

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
        """The kinds of result that its store holds."""
        return sorted(path.name for path in self.store.glob("*") if any(path.glob("*/*.json")))


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


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random qwen2_moe: 4 layers, the first dense, 8 experts, top-3, a shared expert."""
    from families import tiny_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = tiny_model("qwen2_moe", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen short documents as JSON lines."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"{number}. {text}"} for number in range(4) for text in SENTENCES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def small(checkpoint: Path, text_file: Path) -> list[str]:
    """Options that make any run small: the tiny checkpoint and few, short texts of ours."""
    files = f"[{text_file}]"
    return [
        "model=checkpoint",
        f"model.path={checkpoint}",
        "model.dtype=float32",
        "calibration=files",
        f"calibration.files={files}",
        "calibration.num_samples=8",
        "calibration.max_length=32",
        "condense.num_layers=1",
        "condense.num_routed=2",
        "compute.threads=1",
        "track=off",
    ]


@pytest.fixture
def run_py(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python run.py <overrides>` in a process of its own, its output folder under tmp_path."""

    def run(*overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_command(tmp_path, *overrides, **options)

    return run


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
    """`python -c script arguments` twice, as torchrun starts processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in ("0", "1"):
        environment = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", script, *arguments]
        started.append(subprocess.Popen(command, env=environment))
    return started


@pytest.fixture(scope="session")
def main_module() -> Any:
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def composed() -> Iterator[Callable[..., Any]]:
    """Compose conf/run.yaml with overrides, hydra's own node included."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("run", list(overrides), return_hydra_config=True)


@pytest.fixture
def job(
    main_module: Any,
    composed: Callable[..., Any],
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Callable[..., Outcome]]:
    """One job in this process, with a store of its own, small and without its last stages.

    A refusal that Hydra makes before the job comes as the job's own would. anew=False: the report
    of the job before is in the folder.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from moe_lab.runs import options as run_options

    folder = tmp_path / "job"
    folder.mkdir()
    quick = ["method=prune", "finetune=none", "eval=none", "measure=none"]

    def run(*overrides: str, anew: bool = True) -> Outcome:
        caplog.clear()
        if anew:
            (folder / "report.json").unlink(missing_ok=True)
        store, code = tmp_path / "store", 2
        other = any(override.startswith("calibration=") for override in overrides)
        base = [option for option in small if not (other and "calibration.files" in option)]
        try:
            config = composed(*base, *quick, f"store={store}", f"run_dir={folder}", *overrides)
            with open_dict(config):
                config.hydra.runtime.output_dir = str(folder)
                HydraConfig.instance().set_config(config)
                del config["hydra"]
            main_module.main(config)
            code = main_module.exit_codes.pop()
        except Exception as error:
            message = run_options.refusal(error)
            if message is None:
                raise
            print(message)
        path = folder / "report.json"
        report = json.loads(path.read_text()) if path.is_file() else {}
        captured = capsys.readouterr()
        text = captured.out + captured.err + caplog.text
        return Outcome(code, text, report, Path(config.store) if code == 0 else store)

    yield run
    HydraConfig.instance().cfg = None
