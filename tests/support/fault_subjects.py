"""Runs that are disturbed, and what they give undisturbed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_jobs
from running import QUICK, small_options

LM = "finetune.phases.lm"


@dataclass(frozen=True)
class Subject:
    """A request, the folder in which it was run undisturbed, and the report of that."""

    name: str
    options: tuple[str, ...]
    home: Path
    sweep: bool = False

    @property
    def store(self) -> Path:
        return self.home / "store"

    def overrides(self, **places: Path) -> list[str]:
        """The command's arguments, with the store and the run's folder in the home by default."""
        store, run_dir = places.get("store", "store"), places.get("run_dir", "run")
        where = [f"hydra.sweep.dir={run_dir}"] if self.sweep else [f"run_dir={run_dir}"]
        return [*(["-m"] if self.sweep else []), *self.options, f"store={store}", *where]

    def reports(self, home: Path, run_dir: str = "run") -> list[dict[str, Any]]:
        """The reports of its jobs."""
        jobs = ("0", "1") if self.sweep else ("",)
        return [fault_jobs.report(home, f"{run_dir}/{job}") for job in jobs]

    def wrong(self, job: fault_jobs.Job, run_dir: str = "run") -> list[str]:
        """What is not as in the undisturbed run, of one that ended: code, figures, files."""
        found = [] if job.process.exitcode == 0 else [f"exit {job.process.exitcode}: {job.text()}"]
        found += [] if fault_jobs.no_traceback(job) else [f"a traceback: {job.text()[-2000:]}"]
        pairs = zip(self.reports(self.home), self.reports(job.home, run_dir), strict=True)
        for before, now in pairs if not found else ():
            found += fault_jobs.differences(before, now)
        return found

    def other_files(self, store: Path) -> list[str]:
        """Files of results that are not byte-equal to the undisturbed run's."""
        before, now = self.files, fault_jobs.contents(store)
        return sorted(name for name in before | now if before.get(name) != now.get(name))

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        return fault_jobs.contents(self.store)


@dataclass
class Subjects:
    """All of them, run undisturbed when they are first asked for.

    "small": profile, plan, compress. "recovered": through every stage but the searches, a
    conversion, a teacher and the pictures among them. "condensed": by the searches of CD-MoE.
    "quantized": stored in few bits by GPTQ, and traced. "sweep": two jobs.
    """

    folder: Path
    checkpoint: Path
    published: Path
    texts: Path
    made: dict[str, Subject] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Subject:
        if name not in self.made:
            home = self.folder / name
            subject = Subject(name, tuple(self._options(name)), home, name == "sweep")
            job = fault_jobs.run(home, subject.overrides())
            assert job.process.exitcode == 0, job.text()
            self.made[name] = subject
        return self.made[name]

    def _options(self, name: str) -> list[str]:
        small = [*small_options(self.checkpoint, self.texts), *QUICK]
        if name == "small":
            return small
        if name == "sweep":
            return [*small, "ratio.ratio=0.25,0.5"]
        if name == "quantized":
            traced = [*self._files("trace.prompts", 2), "trace.new_tokens=4"]
            return [*small, "quantize=gptq", "quantize.group_size=8", "trace=full", *traced]
        whole = [*small_options(self.published, self.texts), *self._measured()]
        if name == "recovered":
            return [*whole, "method=prune", *self._tuned("router_kd"), "diagnose=full"]
        tuned = [*self._tuned("experts"), "finetune.distillation=0.5"]
        return [*whole, "method=condense", "condense.num_layers=2", *tuned]

    def _measured(self) -> list[str]:
        held_out = self._files("eval.held_out", 4)
        speed = ["measure.repeats=1", "measure.prompt_length=8", "measure.decode_tokens=1"]
        return ["eval=perplexity", *held_out, "measure=speed", *speed]

    def _tuned(self, recipe: str) -> list[str]:
        data = [*self._files(f"{LM}.data", 8), *self._files(f"{LM}.validation", 4)]
        # Its state is saved after 50 steps.
        return [f"finetune={recipe}", *data, f"{LM}.batch_size=2", f"+{LM}.num_steps=60"]

    def _files(self, node: str, samples: int) -> list[str]:
        return [
            f"calibration@{node}=files",
            f"{node}.files=[{self.texts}]",
            f"{node}.num_samples={samples}",
        ]
