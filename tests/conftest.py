"""A tiny checkpoint with its tokenizer, and run.py in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import (
    OFFLINE,
    QUICK,
    ROOT,
    SUPPORT,
    Outcome,
    byte_tokenizer,
    load_module,
    run_command,
    small_options,
    write_checkpoint,
    write_texts,
)

os.environ.update(OFFLINE)  # before anything imports the hub's client
# Else MKL rounds by where in memory its operands lie, and what a fresh process loads differs in the
# last bit (seen on an AMD processor). Intel calls it conditional numerical reproducibility; on its
# own processors it holds for the widest vectors alone (seen on a Xeon).
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
WIDEST = "AVX512_E1" if "GenuineIntel" in CPU and "avx512" in CPU else "AVX2"
os.environ.setdefault("MKL_CBWR", WIDEST)
# So that the assertions of helpers tell as much as those of tests.
pytest.register_assert_rewrite(*({path.stem for path in SUPPORT.glob("*.py")} - {"running"}))


# Files whose few tests take minutes: they come first, or a process that begins one last ends alone.
LONG = ("test_golden.py", "test_run.py", "test_launchers.py", "test_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_texts(path)
    return path


@pytest.fixture(scope="session")
def small(checkpoint: Path, text_file: Path) -> list[str]:
    return small_options(checkpoint, text_file)


@pytest.fixture
def run_py(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python run.py <overrides>` in a process of its own, its output folder under tmp_path."""

    def run(*overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_command(tmp_path, *overrides, **options)

    return run


@pytest.fixture(scope="session")
def main_module() -> Any:
    """run.py as a module."""
    return load_module("run", ROOT / "run.py")


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

    from moe_lab.runs import refusals

    folder = tmp_path / "job"
    folder.mkdir()

    def run(*overrides: str, anew: bool = True) -> Outcome:
        caplog.clear()
        if anew:
            (folder / "report.json").unlink(missing_ok=True)
        store, code = tmp_path / "store", 2
        chosen = {override.partition("=")[0] for override in overrides}
        other = "calibration" in chosen
        base = [option for option in small if not (other and "calibration.files" in option)]
        base = [option for option in (*base, *QUICK) if option.partition("=")[0] not in chosen]
        try:
            config = composed(*base, f"store={store}", f"run_dir={folder}", *overrides)
            with open_dict(config):
                config.hydra.runtime.output_dir = str(folder)
                HydraConfig.instance().set_config(config)
                del config["hydra"]
            main_module.main(config)
            code = main_module.exit_codes.pop()
        except Exception as error:
            message = refusals.refusal(error)
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


@pytest.fixture
def installed() -> Iterator[None]:
    """Signals as run.py takes them."""
    import signal
    import sys

    from moe_lab import stopping

    hook, before = sys.unraisablehook, {one: signal.getsignal(one) for one in stopping.SIGNALS}
    for one in stopping.SIGNALS:  # also where whoever started the tests has them ignored (nohup)
        signal.signal(one, signal.default_int_handler)
    stopping.install()
    try:
        yield
    finally:
        sys.unraisablehook = hook
        stopping._state = stopping._State()
        for one, handler in before.items():
            signal.signal(one, handler)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    from families import tiny_batch

    return [tiny_batch(seed=1), tiny_batch(seed=2, padding=False)]


@pytest.fixture(scope="module", params=["qwen2_moe", "mixtral", "deepseek_v3"])
def case(request: pytest.FixtureRequest) -> Any:
    """A model of each kind of router, with all that is looked at when experts are chosen."""
    from expert_sets import Case

    return Case(request.param)


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets are not found among those of tests before."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def sst5(own_cache: None, tmp_path: Path) -> Path:
    """A mirror with SST-5 alone."""
    from mirrors import reviews, write_sst5

    write_sst5(tmp_path / "mirror", reviews("test", 9))
    return tmp_path / "mirror"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeekMoE in its original layout, in float32."""
    import deepseek_original
    import torch

    return deepseek_original.make(tmp_path_factory.mktemp("deepseek") / "original", torch.float32)


@pytest.fixture
def condense_published(
    job: Callable[..., Outcome], published: Path, tmp_path: Path
) -> Callable[..., Outcome]:
    """A run of ours that condenses the original checkpoint, in float64."""
    from deepseek_original import TEXTS

    documents = tmp_path / "texts.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def run(*overrides: str) -> Outcome:
        return job(
            "method=condense",
            f"model.path={published}",
            "model.dtype=float64",
            f"calibration.files=[{documents}]",
            f"calibration.num_samples={len(TEXTS)}",
            "calibration.max_length=64",
            "compute.batch_size=4",
            *overrides,
        )

    return run
