"""What each stage takes on tiny random models, and the cost model fitted to that.

    python experiments/bench/costs.py --fit    sweeps, and writes moe_lab/forecast/costs.json
    python experiments/bench/costs.py          holds the shipped models and three of 1 to 3 GB to it

The stages of a real run follow one another in this process; one beside it looks at its memory every
millisecond. Memory is what it has in no file beyond what it had before the stage, all libraries
imported; the weights that stay in files are told beside. Memory does not depend on who else works
on the machine; times are the processor's seconds of this process with one thread, not the clock's.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import resource
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("tiny_deepseek", "tiny_mixtral", "tiny_qwen2_moe")
LIMIT = 0.20
PAGE = os.sysconf("SC_PAGE_SIZE")
MEMORY = {
    "load": ("experts",),
    "load_converted": ("experts",),
    "profile": ("constant", "states", "given", "routed", "wide", "attention"),
    "profile_layerwise": ("constant", "states", "given", "routed", "wide", "attention"),
    "plan": ("constant",),
    "search": ("constant", "states", "routed", "wide", "all_experts"),
    "compress": ("constant", "outside", "layer", "experts_in_all"),
    "finetune": ("constant", "saved_states", "saved_routed", "saved_attention", "logits"),
    "evaluate_tasks": ("constant", "states", "given", "routed", "logits"),
    "evaluate_held_out": ("constant", "states", "given", "routed", "logits"),
    "evaluate_pair": ("logits",),
    "measure": ("constant", "states", "given", "routed", "wide", "attention"),
}  # fmt: skip

SECONDS = {"compress": ("bytes",), "plan": (), "search_16": ("flops", "compared"),
           "search_32": ("flops", "compared")}  # fmt: skip

# ------------------------------------------------------------------------- what is measured


def resident(pid: int) -> int:
    """Bytes of memory that a process has, but for what lies in files, too."""
    _, whole, in_files, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(whole) - int(in_files)) * PAGE


class Watcher:
    """A process of its own that looks at this one's memory every millisecond.

    Started before torch is: it takes no memory that is looked at, and no thread waits for another.
    """

    def __init__(self) -> None:
        (asked, self._asks), (self._answers, told) = os.pipe(), os.pipe()
        if not os.fork():
            os.close(self._asks)
            _watch(os.getppid(), asked, told)
        os.close(asked)

    def peak(self) -> int:
        """The most that was resident since this was asked last."""
        os.write(self._asks, b"?")
        return int(os.read(self._answers, 100))


def _watch(pid: int, asked: int, told: int) -> None:
    peak = 0
    while True:
        try:
            peak = max(peak, resident(pid))
        except (OSError, IndexError):
            os._exit(0)
        if select.select([asked], [], [], 0.001)[0]:
            if not os.read(asked, 1):
                os._exit(0)
            os.write(told, str(peak).encode())
            peak = 0


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(work: Callable[[], Any], watcher: Watcher) -> tuple[Any, float, float]:
    """What a piece of work gives, its peak beyond what the process has now, and its CPU seconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, used = resident(os.getpid()), _used()
    watcher.peak()
    result = work()
    return result, float(watcher.peak() - before), _used() - used


def run(overrides: list[str], folder: Path, watcher: Watcher) -> dict[str, Any]:
    """A run in this process: by result, what was foreseen and what was measured."""
    import datasets  # noqa: F401  # what stages would import by themselves
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    import moe_lab.evaluate.watched  # noqa: F401
    from moe_lab.evaluate.tasks.tiny.tasks import write_items
    from moe_lab.forecast.costs import Costs, measured_costs
    from moe_lab.forecast.stages import needs
    from moe_lab.stages import forecasting, pipeline
    from moe_lab.stages.parts import Parts

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        places = [f"store={folder / 'store'}", f"run_dir={folder}", "track=off"]
        config = compose("run", [*overrides, *places])
    parts = Parts.made(config, functools.partial(instantiate, _convert_="object"))
    plain: Any = OmegaConf.to_container(config, resolve=True)
    head = {"method": plain["method"]["_target_"], "finetune": "given"}
    prepared = pipeline.prepare(plain, parts, head, folder)
    stages = [pipeline.stage_named(name) for name in pipeline.STAGES]
    torch.ones(64, 64) @ torch.ones(64, 64)
    write_items(folder / "items", 2)  # the text that tasks are made of is read once
    dense, compute = prepared.dense, prepared.context.compute
    lengths = forecasting.lengths_of(prepared.texts)
    asked = forecasting.prospect_of(
        dense, dense.layers(), parts, compute, compute.memory(), lengths
    )
    known = _Noting({}, {}, {}, 0.0, 0.0)
    foreseen = {}
    pairs = zip(needs(asked.work, known), needs(asked.work, measured_costs()), strict=True)
    for need, real in pairs:
        foreseen[need.stage] = {
            "memory": need.memory - need.mapped, "mapped": need.mapped, "kept": need.kept,
            "foreseen": real.memory, **known.taken(),
        }  # fmt: skip
    assert isinstance(known, Costs)
    found: dict[str, Any] = {"process": resident(os.getpid())}
    for dtype in {dense.dtype, "float32"}:
        weights = replace(asked.work.dense, itemsize=getattr(torch, dtype).itemsize,
                          converted=asked.work.dense.converted or dtype != dense.dtype)  # fmt: skip
        kind = "load_converted" if weights.converted else "load"
        _, peak, seconds = measured(replace(dense, dtype=dtype).load, watcher)
        found[kind] = {
            "memory": weights.bytes - weights.mapped_bytes, "peak": peak, "seconds": seconds,
            "parts": {kind: {"experts": weights.expert_bytes}}, "counts": {},
        }  # fmt: skip
    for stage in stages:
        for name, inputs in stage.inputs(prepared).items():
            make = functools.partial(stage.make, prepared.context, inputs)
            result, peak, seconds = measured(make, watcher)
            files = (file for file in result.folder.rglob("*") if file.is_file())
            disk = sum(file.stat().st_size for file in files)
            found[name] = foreseen.get(name, {}) | {
                "peak": peak, "seconds": seconds, "disk": disk}  # fmt: skip
            stage.read(prepared, name, result)
            prepared.results[name] = result
    return found


def _noting() -> type:
    """Costs of nothing that note what they are asked for."""
    from moe_lab.forecast.costs import Costs

    class Noting(Costs):
        def bytes_of(self, work: str, parts: Mapping[str, float]) -> float:
            self.memory.setdefault(work, dict(parts))  # type: ignore[attr-defined]
            return 0.0

        def seconds_of(self, work: str, counts: Mapping[str, float]) -> float:
            self.seconds.setdefault(work, dict(counts))  # type: ignore[attr-defined]
            return 0.0

        def taken(self) -> dict[str, Any]:
            told = {"parts": dict(self.memory), "counts": dict(self.seconds)}
            self.memory.clear()  # type: ignore[attr-defined]
            self.seconds.clear()  # type: ignore[attr-defined]
            return told

    return Noting


# ------------------------------------------------------------------------- random models


def write_model(folder: Path, model: Mapping[str, Any], dtype: str) -> None:
    """A random Qwen2-MoE with the shipped tokenizer, written without holding it twice."""
    import shutil

    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from moe_lab.files import PACKAGE

    config = Qwen2MoeConfig(**model, tie_word_embeddings=False, dtype=dtype, pad_token_id=0,
                            bos_token_id=1, eos_token_id=2)  # fmt: skip
    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(0)
    made = Qwen2MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    made.save_pretrained(folder, max_shard_size="400MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PACKAGE / "checkpoints" / "tiny_deepseek" / name, folder)


def shape(
    hidden: int, experts: int, top_k: int, width: int, layers: int, vocabulary: int, heads: int
) -> dict[str, Any]:
    """Options of a Qwen2-MoE's config."""
    return {
        "hidden_size": hidden, "num_experts": experts, "num_experts_per_tok": top_k,
        "moe_intermediate_size": width, "shared_expert_intermediate_size": 2 * width,
        "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
    }  # fmt: skip


def options(length: int, batch: int, tuned: int) -> list[str]:
    """Options of a run: tokens of a sample, samples in a forward, and in one that trains."""
    return [
        "compute.threads=1", f"compute.batch_size={batch}", f"calibration.max_length={length}",
        f"calibration.num_samples={2 * batch}", "+finetune.phases.lm.num_steps=2",
        f"finetune.phases.lm.batch_size={tuned}", f"finetune.phases.lm.data.max_length={length}",
        "finetune.phases.lm.data.num_samples=64", "finetune.phases.lm.validation=null",
        f"eval.held_out.max_length={length}", f"eval.held_out.num_samples={2 * batch}",
        "eval.num_items=40", "measure.repeats=1", "measure.decode_tokens=4",
        f"measure.prompt_length={4 * length}", f"measure.batch_size={max(1, batch // 8)}",
    ]  # fmt: skip


TASKS, HELD_OUT = ["eval.held_out=null"], ["eval.tasks=[]"]
PRUNE = ["method=prune", "metric=reap", "ratio.ratio=0.5"]
CONDENSE = ["method=condense", "condense.num_layers=1", "condense.num_routed=2"]
LAYERWISE = ["compute.layerwise=true"]
UNTUNED = ["finetune=none"]
# hidden, experts, top-k, width, layers, vocabulary, heads; dtype; length, batch, tuned; what else.
SWEEP: tuple[tuple[tuple[int, ...], str, tuple[int, int, int], list[str]], ...] = (
    ((128, 8, 2, 64, 4, 2048, 4), "float32", (64, 8, 4), PRUNE + TASKS),
    ((128, 32, 4, 64, 8, 2048, 4), "float32", (128, 32, 16), PRUNE + HELD_OUT),
    ((128, 16, 2, 64, 4, 2048, 4), "float32", (64, 8, 4), CONDENSE + HELD_OUT),
    ((256, 16, 2, 128, 4, 4096, 8), "float32", (128, 16, 8), PRUNE + TASKS + LAYERWISE),
    ((256, 32, 8, 64, 6, 2048, 4), "bfloat16", (128, 32, 8), PRUNE + HELD_OUT + LAYERWISE),
    ((256, 32, 4, 64, 4, 2048, 4), "float32", (128, 16, 8), CONDENSE + TASKS),
    ((512, 16, 4, 128, 4, 2048, 8), "float32", (128, 8, 16), PRUNE + HELD_OUT),
    ((512, 32, 4, 128, 4, 8192, 8), "bfloat16", (64, 32, 4), PRUNE + TASKS + LAYERWISE),
    ((384, 8, 2, 128, 6, 4096, 6), "bfloat16", (64, 32, 8), CONDENSE + HELD_OUT),
    ((256, 64, 8, 64, 4, 8192, 4), "float32", (64, 16, 16), PRUNE + HELD_OUT + LAYERWISE),
    ((384, 8, 1, 256, 6, 16384, 6), "float32", (96, 24, 8), PRUNE + TASKS),
    ((256, 16, 2, 128, 12, 2048, 16), "bfloat16", (240, 16, 8), PRUNE + HELD_OUT),
    ((512, 64, 8, 64, 4, 4096, 4), "float32", (128, 32, 8), PRUNE + TASKS),
    ((256, 16, 4, 128, 4, 16384, 4), "float32", (128, 24, 16), CONDENSE + TASKS),
)  # fmt: skip
# About ten times the largest of the sweep: 1 to 3 GB.
LARGE: tuple[tuple[tuple[int, ...], str, tuple[int, int, int], list[str]], ...] = (
    ((1024, 32, 4, 512, 10, 16384, 16), "bfloat16", (128, 8, 4), [*PRUNE, *HELD_OUT, *UNTUNED]),
    ((1024, 64, 8, 256, 14, 8192, 8), "bfloat16", (64, 16, 2), [*CONDENSE, *LAYERWISE, *HELD_OUT]),
    ((1536, 16, 2, 1024, 10, 32768, 12), "bfloat16", (96, 4, 2),
     [*PRUNE, *HELD_OUT, *LAYERWISE, *UNTUNED]),
)  # fmt: skip


# As they are run by default, with fewer steps of tuning and fewer items.
SHIPPED_OPTIONS = ["compute.threads=1", "+finetune.phases.lm.num_steps=3", "eval.num_items=40",
                   "measure.repeats=1"]  # fmt: skip


def one(
    overrides: list[str], model: Mapping[str, Any] | None, dtype: str, watcher: Watcher
) -> dict[str, Any]:
    """A run of a random model, or of what the overrides name."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("COSTS_TMP")) as home:
        if model:
            write_model(Path(home) / "model", model, dtype)
            place = f"model.path={home}/model"
            overrides = [*overrides, "model=checkpoint", place, f"model.dtype={dtype}"]
        return run(overrides, Path(home), watcher)


def runs_of(plan: Iterable[Any], notes: Path, watcher: Watcher) -> Iterator[dict[str, Any]]:
    """Each run of a sweep; those noted before are not made again."""
    known = [json.loads(line) for line in notes.read_text().splitlines()] if notes.is_file() else []
    by_name = {row["name"]: row for row in known}
    for sizes, dtype, (length, batch, tuned), more in plan:
        name = json.dumps([sizes, dtype, length, batch, tuned, more])
        if name not in by_name:
            given = [*options(length, batch, tuned), *more]
            if "finetune=none" in more:
                given = [word for word in given if "finetune.phases" not in word]
            made = one(given, shape(*sizes), dtype, watcher)
            with notes.open("a") as file:
                file.write(json.dumps({"name": name, "found": made}) + "\n")
            by_name[name] = {"name": name, "found": made}
            print(name, flush=True)
        yield by_name[name]["found"]


# ------------------------------------------------------------------------- the fit


def fitted(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The costs that fit these runs best: none is below 0, and errors count by their share."""
    rows = [(made, row) for made in runs for row in made.values() if isinstance(row, dict)]
    memory: dict[str, dict[str, float]] = {}
    for kind, names in MEMORY.items():
        wanted = [
            (row["parts"][kind], _beside(row, kind, memory), row["peak"])
            for made, row in rows
            if _tells_of(kind, made, row, memory)
        ]
        memory[kind] = _solved(names, wanted)
    seconds = {}
    for kind in sorted({kind for _, row in rows for kind in row["counts"]}):
        timed = [(row["counts"][kind], row["seconds"], row["seconds"])
                 for _, row in rows if kind in row["counts"]]  # fmt: skip
        seconds[kind] = _solved(("constant", *SECONDS.get(kind, ("flops", "calls"))), timed)
    return {"memory": memory, "seconds": seconds}


def _tells_of(
    kind: str,
    made: Mapping[str, Any],
    row: Mapping[str, Any],
    memory: Mapping[str, Mapping[str, float]],
) -> bool:
    """Whether a stage's peak is that of a kind of work: not where loading took more."""
    parts = row["parts"]
    if kind not in parts or (kind == "evaluate_held_out" and "evaluate_pair" in parts):
        return False
    if kind.startswith("load"):
        return row is made.get(kind)
    if kind in ("compress", "plan", "search", "profile_layerwise", "evaluate_tasks"):
        return True
    loads = (one for one in ("load", "load_converted") if one in made)
    most = max(memory[one].get("experts", 0) * made[one]["parts"][one]["experts"] for one in loads)
    return bool(row["peak"] - row["memory"] > 1.1 * most)


def _beside(row: Mapping[str, Any], kind: str, memory: Mapping[str, Mapping[str, float]]) -> float:
    """What was measured beside what shapes say; of a pair of models what both take beside one."""
    measured_bytes = row["peak"] - row["memory"]
    if kind != "evaluate_pair":
        return float(measured_bytes)
    costs, parts = memory["evaluate_held_out"], row["parts"]["evaluate_held_out"]
    one_model = sum(costs.get(name, 0.0) * size for name, size in parts.items())
    return float(measured_bytes - costs.get("constant", 0.0) - one_model)


def _solved(
    names: tuple[str, ...], rows: list[tuple[Mapping[str, float], float, float]]
) -> dict[str, float]:
    """Coefficients of these parts: each row has their sizes, the sum, and what an error is of."""
    import numpy as np
    from scipy.optimize import nnls

    if not rows:
        return {}
    sizes = np.array([[parts.get(name, 1.0 if name == "constant" else 0.0) for name in names]
                      for parts, _, _ in rows])  # fmt: skip
    wanted, whole = (np.array([row[place] for row in rows]) for place in (1, 2))
    scale = np.maximum(sizes.max(axis=0), 1e-30)
    found, _ = nnls(sizes / scale / whole[:, None], np.maximum(wanted, 0) / whole)
    values = (found / scale).tolist()
    return {name: float(f"{value:.4g}") for name, value in zip(names, values, strict=True) if value}


def copy_rate() -> float:
    """Bytes in a second that are written to the disk here, or read again."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("COSTS_TMP")) as home:
        block, file = os.urandom(2**24), Path(home) / "block"
        started = time.perf_counter()
        with file.open("wb") as handle:
            for _ in range(16):
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        file.read_bytes()
        return 2 * 2**28 / (time.perf_counter() - started)


def write_costs(runs: list[Mapping[str, Any]]) -> None:
    """Put the fit where the dry run reads it."""
    import datetime

    import torch

    from moe_lab.forecast.costs import FILE
    from moe_lab.provenance import processor

    told = fitted(runs) | {
        "machine": {
            "processor": processor(),
            "threads": "1",
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "runs": str(len(runs)),
        },
        "process_bytes": float(min(run_["process"] for run_ in runs)),
        "copy_rate": float(f"{copy_rate():.3g}"),
    }
    FILE.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------- the check


def check(found: Mapping[str, Any], title: str) -> bool:
    """Print what was foreseen and what was measured; whether the whole run's memory is right."""
    import numpy as np

    from moe_lab.forecast.costs import measured_costs

    costs = measured_costs()
    print(f"{title}\n  {'stage':20} {'foreseen':>9} {'measured':>9}   of it in files; disk")
    whole = [0.0, 0.0]
    for name, row in found.items():
        if not isinstance(row, dict) or "foreseen" not in row:
            continue
        both = row["foreseen"], row["peak"] + row["mapped"]
        whole = [max(pair) for pair in zip(whole, both, strict=True)]
        print(f"  {name:20} {both[0] / 2**20:7.0f} M {both[1] / 2**20:7.0f} M   "
              f"{row['mapped'] / 2**20:.0f} M; {row['kept'] / 2**20:.1f} of "
              f"{row['disk'] / 2**20:.1f} M")  # fmt: skip
    off = whole[0] / whole[1] - 1
    good = bool(np.abs(off) <= LIMIT)
    disk = [sum(row[key] for row in found.values() if isinstance(row, dict) and key in row)
            for key in ("kept", "disk")]  # fmt: skip
    good &= abs(disk[0] / disk[1] - 1) <= LIMIT
    print(f"  {'PASS' if good else 'FAIL'}: the run {whole[0] / 2**30:.3f} GiB foreseen, "
          f"{whole[1] / 2**30:.3f} measured ({off:+.0%}); disk {disk[0] / 2**30:.3f} of "
          f"{disk[1] / 2**30:.3f}; {costs.process_bytes / 2**30:.2f} GiB of the process beside",
          flush=True)  # fmt: skip
    return good


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="sweep, and write the costs anew")
    parser.add_argument("--notes", type=Path, default=Path("costs_sweep.jsonl"))
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    global _Noting
    watcher, _Noting = Watcher(), _noting()
    if given.fit:
        write_costs(list(runs_of(SWEEP, given.notes, watcher)))
        return 0
    good = []
    for name in SHIPPED:
        found = one([f"model={name}", *SHIPPED_OPTIONS], None, "float32", watcher)
        good.append(check(found, f"model={name}"))
    for entry, found in zip(LARGE, runs_of(LARGE, given.notes, watcher), strict=True):
        good.append(check(found, f"random, {json.dumps(entry)}"))
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
