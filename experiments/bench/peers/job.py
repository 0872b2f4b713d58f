"""One pruning job, and what a process needs for it: for this folder's comparisons.

The job: a random qwen3_moe of 0.81 GB in bfloat16 (16 layers of 32 experts, top-4, hidden 512), the
embedded calibration text of a default run (64 samples of 128 tokens), a quarter of each layer's
experts removed by REAP's score, the result written. What is measured of a process is its CPU time,
user and system, of all its threads (one is asked for), and the most anonymous memory that it has at
once (RssAnon of /proc/<pid>/status, looked at every 20 ms: pages of mapped files, which the kernel
can drop at any time, are none of it).

    python experiments/bench/peers/job.py <folder>

makes the checkpoint there, and runs the job by run.py alone. Medians of rounds; one thread.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, VOCABULARY = 16, 32, 4, 512, 496, 2048
SAMPLES, LENGTH = 64, 128  # of the text, as a default run has them
SHARE = 0.25  # of the experts of each layer, which go
MIB, PEAK = 2**20, int(1.0e9)
Kept = dict[int, list[int]]


@dataclass(frozen=True)
class Cost:
    """Of one process: CPU seconds of all its threads, anonymous memory in bytes at its highest."""

    seconds: float
    peak: int


def checkpoint_in(folder: Path) -> Path:
    """The folder of the random checkpoint, which is made where it is not there yet."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_lab.files import PACKAGE

    dense = folder / "dense"
    if (dense / "config.json").is_file():
        return dense
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN,
        moe_intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:  # experts unlike each other, so that no score is a tie
        layer.mlp.experts.down_proj.data *= torch.empty(EXPERTS, 1, 1).uniform_(0.5, 2.0)
        layer.mlp.gate.weight.data.mul_(20)
    model.save_pretrained(dense)
    for file in (PACKAGE / "checkpoints" / "tiny_deepseek").glob("*token*.json"):
        shutil.copy(file, dense)
    return dense


def text_in(folder: Path) -> Path:
    """The file of the calibration text, {"text": ...} a line."""
    from moe_lab.data.embedded import StandardLibrary

    file = folder / "text.jsonl"
    documents = islice(StandardLibrary(num_samples=SAMPLES, max_length=LENGTH).documents(), SAMPLES)
    file.write_text("".join(json.dumps({"text": str(one)}) + "\n" for one in documents))
    return file


def tokens_of(text: Path, dense: Path) -> list[list[int]]:
    """Of a peer: the token ids of that text."""
    from transformers import AutoTokenizer

    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    return [list(ids[:LENGTH]) for ids in AutoTokenizer.from_pretrained(dense)(lines).input_ids]


def watched(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command with one thread, and watch its process; its output is shown where it fails."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    given = os.environ | one | (environment or {})
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=given)
        peak, done = 0, (0, 0, None)
        while not done[0]:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
            done = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(done[1])
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read()[-5000:]}")
    return Cost(done[2].ru_utime + done[2].ru_stime, peak)


def anonymous(process: int) -> int:
    """Bytes of a process's memory that are no pages of files."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0


def prune(dense: Path, out: Path, *options: str, root: Path = ROOT) -> tuple[Cost, Kept]:
    """The job by run.py into a new folder: what it cost, and the experts kept, by layer."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, str(root / "run.py"), "model=checkpoint", f"model.path={dense}",
        "method=prune", "metric=reap", f"ratio.ratio={SHARE}", "finetune=none", "eval=none",
        "measure=none", "diagnose=none", "track=off", "calibration=files",
        f"calibration.files=[{dense.parent}/text.jsonl]", f"calibration.num_samples={SAMPLES}",
        f"calibration.max_length={LENGTH}", f"store={out}/store", f"run_dir={out}/run",
        *options,
    ]  # fmt: skip
    cost = watched(command, {"PYTHONPATH": str(root)})
    plan = json.loads((out / "run" / "plan.json").read_text())
    return cost, {edit["index"]: sorted(edit["kept"]) for edit in plan["layers"]}


def take_turns(
    dense: Path, ours: Path, command: Sequence[str], theirs: Path, rounds: int
) -> tuple[list[Cost], list[Cost], Kept]:
    """The job by run.py into one folder, by a peer's command into another: costs, and our experts.

    Both folders are new in each round.
    """
    mine, its, kept = [], [], Kept()
    for _ in range(rounds):
        cost, kept = prune(dense, ours)
        mine.append(cost)
        shutil.rmtree(theirs, ignore_errors=True)
        theirs.mkdir()
        its.append(watched(command))
    return mine, its, kept


def asked(told: str | None) -> tuple[Path, int]:
    """What a comparison is asked for: the folder that it works in, and how many rounds."""
    parser = argparse.ArgumentParser(description=(told or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="none: one that is removed")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.folder is None:
        given.folder = Path(tempfile.mkdtemp(prefix="peers_"))
        atexit.register(shutil.rmtree, given.folder)
    given.folder.mkdir(parents=True, exist_ok=True)
    return given.folder, given.rounds


def compared(
    peer: str,
    ours: Sequence[Cost],
    theirs: Sequence[Cost],
    kept: Kept,
    other: Kept,
    cpu_limit: float,
    memory_limit: float,
) -> int:
    """Print the medians beside their limits, and where other experts stay; 1 for a limit passed.

    The limits are of ours, as multiples of the peer's.
    """
    mine, its = _median(ours), _median(theirs)
    figures = [
        ("CPU", mine.seconds, its.seconds, cpu_limit, "s"),
        ("anonymous memory", mine.peak / MIB, its.peak / MIB, memory_limit, "MiB"),
    ]
    for name, one, two, limit, unit in figures:
        told = "PASS" if one <= limit * two else "FAIL"
        print(f"{name}: {one:.0f} {unit}, {peer} {two:.0f} {unit}: {one / two:.2f}x, limit "
              f"{limit:.2f}x: {told}")  # fmt: skip
    print("all CPU seconds, in turn:", *(f"{a.seconds:.1f}/{b.seconds:.1f}"
                                         for a, b in zip(ours, theirs, strict=True)))  # fmt: skip
    for layer in kept:
        both = len(set(kept[layer]) & set(other[layer]))
        print(f"layer {layer}: {both} of {len(kept[layer])} experts that stay are the same")
    return int(any(one > limit * two for _, one, two, limit, _ in figures))


def _median(costs: Sequence[Cost]) -> Cost:
    seconds = statistics.median(one.seconds for one in costs)
    return Cost(seconds, int(statistics.median(one.peak for one in costs)))


def main() -> int:
    """The job by run.py alone, under its limit of memory."""
    folder, rounds = asked(__doc__)
    dense = checkpoint_in(folder)
    text_in(folder)
    costs = [prune(dense, folder / "ours")[0] for _ in range(rounds)]
    cost = _median(costs)
    told = "PASS" if cost.peak <= PEAK else "FAIL"
    print(f"{cost.seconds:.1f} s of CPU, {cost.peak / 1e9:.2f} GB of anonymous memory, limit "
          f"{PEAK / 1e9:.2f}: {told}")  # fmt: skip
    return int(cost.peak > PEAK)


if __name__ == "__main__":
    sys.exit(main())
