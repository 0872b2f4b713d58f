"""One pruning job, and what a process needs for it: for this folder's comparisons.

The job: a random qwen3_moe of 0.81 GB in bfloat16 (16 layers of 32 experts, top-4, hidden 512), the
embedded calibration text of a default run (64 samples of 128 tokens), a quarter of each layer's
experts removed by REAP's score, the result written. What is measured of a process is its CPU time,
user and system, of all its threads (one is asked for), and the most memory that it has at once:
anonymous (RssAnon of /proc/<pid>/status, looked at every 20 ms: pages of mapped files, which the
kernel can drop at any time, are none of it) and resident (VmHWM: those pages, too).

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
    """Of one process: CPU seconds of all its threads, bytes of memory at their highest."""

    seconds: float
    anonymous: int
    resident: int


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
        anonymous, resident, done = 0, 0, (0, 0, None)
        while not done[0]:
            memory = memory_of(process.pid)
            anonymous = max(anonymous, memory.get("RssAnon", 0))
            resident = max(resident, memory.get("VmHWM", 0))
            time.sleep(0.02)
            done = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(done[1])
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read()[-5000:]}")
    return Cost(done[2].ru_utime + done[2].ru_stime, anonymous, resident)


def memory_of(process: int) -> dict[str, int]:
    """What the kernel tells of a process's memory, in bytes; nothing of one that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    lines = [line.split() for line in status.splitlines() if line.endswith(" kB")]
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in lines}


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
    dense: Path, ours: Path, commands: Mapping[str, Sequence[str]], theirs: Path, rounds: int
) -> tuple[list[Cost], dict[str, list[Cost]], Kept]:
    """The job by run.py into one folder, by each of a peer's commands into another.

    Both folders are new each time. Gives costs, the peer's by command, and our experts.
    """
    mine, kept = [], Kept()
    its: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(rounds):
        cost, kept = prune(dense, ours)
        mine.append(cost)
        for name, command in commands.items():
            shutil.rmtree(theirs, ignore_errors=True)
            theirs.mkdir()
            its[name].append(watched(command))
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
    ours: Sequence[Cost],
    theirs: Mapping[str, Sequence[Cost]],
    cpu_limit: float,
    memory_limit: float,
) -> int:
    """Print our medians as multiples of a peer's, by its commands; 1 where a limit is passed.

    The limits are of the first command; those of memory are of what is resident.
    """
    mine, passed = median_of(ours), False
    for number, (name, costs) in enumerate(theirs.items()):
        its = median_of(costs)
        for what, one, two, unit, limit in (
            ("CPU", mine.seconds, its.seconds, "s", cpu_limit),
            ("resident memory", mine.resident / MIB, its.resident / MIB, "MiB", memory_limit),
            ("anonymous memory", mine.anonymous / MIB, its.anonymous / MIB, "MiB", None),
        ):
            told = f"{what}: {one:.0f} {unit}, {name} {two:.0f} {unit}: {one / two:.2f}x"
            if number == 0 and limit is not None:
                passed |= one > limit * two
                told += f", limit {limit:.2f}x: {'FAIL' if one > limit * two else 'PASS'}"
            print(told)
    turns = zip(ours, *theirs.values(), strict=True)
    print(
        "all CPU seconds, in turn:", *("/".join(f"{a.seconds:.1f}" for a in one) for one in turns)
    )
    return int(passed)


def show_kept(
    whose: str, one: Mapping[int, Sequence[int]], other: Mapping[int, Sequence[int]]
) -> None:
    """Print in how many of the experts that stay two results agree, for each layer."""
    same = " ".join(str(len(set(kept) & set(other[layer]))) for layer, kept in one.items())
    print(f"the same experts stay by {whose}, of {len(one[0])}, by layer: {same}")


def median_of(costs: Sequence[Cost]) -> Cost:
    """The medians of what several runs cost, each by itself."""
    values = zip(*((one.seconds, one.anonymous, one.resident) for one in costs), strict=True)
    seconds, anonymous, resident = map(statistics.median, values)
    return Cost(seconds, int(anonymous), int(resident))


def main() -> int:
    """The job by run.py alone, under its limit of memory."""
    folder, rounds = asked(__doc__)
    dense = checkpoint_in(folder)
    text_in(folder)
    cost = median_of([prune(dense, folder / "ours")[0] for _ in range(rounds)])
    told = "PASS" if cost.anonymous <= PEAK else "FAIL"
    print(f"{cost.seconds:.1f} s of CPU, {cost.resident / 1e9:.2f} GB of memory; "
          f"anonymous: {cost.anonymous / 1e9:.2f} GB, limit {PEAK / 1e9:.2f}: {told}")  # fmt: skip
    return int(cost.anonymous > PEAK)


if __name__ == "__main__":
    sys.exit(main())
