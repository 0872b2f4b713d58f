"""What compressing a checkpoint costs that is larger than memory: time beside `cp`, and memory.

    python experiments/bench/streamed.py
    python experiments/bench/streamed.py <folder> --layers 4
    python experiments/bench/streamed.py <folder>
    python experiments/bench/streamed.py <folder> --run

<folder> gets a random checkpoint of DeepSeekMoE-16B's shape (33 GB in bfloat16, 28 layers, files of
4.9 GiB as the original has), written layer by layer; one that is there already is used. Then a plan
that prunes a quarter of all experts is carried out on it, and the result's bytes are copied by
`cp`, both from files that the page cache does not hold, and both flushed to disk. With --run
instead: `run.py` profiles it on the calibration set, condenses nine layers (CD-MoE-SR, by
statistics) and writes the result, beside reading all weights once, a plain forward layer by layer
over the same text, and writing the result's bytes. Memory is what a process has that is no page of
a file (RssAnon), at its highest. Times are of one run, side by side; nothing else should run.
Without a folder: four layers, in one that is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from moe_lab.files import PACKAGE
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.edited_model import Saving
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.shard_writer import ShardWriter
from moe_lab.models.shards import Entry, plan_shards
from moe_lab.models.stored import in_files
from moe_lab.models.stream import LayerStream, States
from moe_lab.models.streamed import write_edited
from moe_lab.models.weight_files import weight_files
from moe_lab.progress import duration

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from job import memory_of

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
SHARD = int(4.9 * GIB)
DRAWN = 2**26  # random values that tensors are made of
PRUNE, FORWARD = "prune", "forward"  # what a process of its own does


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    asked = parsed(arguments)
    if asked.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return main([folder, *arguments, "--layers=4"])
    if asked.part:
        return {PRUNE: prune, FORWARD: forward}[asked.part](asked)
    dense = asked.folder / "dense"
    if not (dense / "config.json").is_file():
        check_room(asked)
        seconds = timed(lambda: make(asked, dense))
        print(
            f"made {size_of(dense) / GIB:.2f} GiB in {len(weight_files(dense))} files in {seconds}"
        )
    print(f"{dense}: {size_of(dense) / GIB:.2f} GiB; {asked.threads} threads")
    if asked.run:
        whole_run(asked, dense)
    else:
        compress_alone(asked, dense)
    return 0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=100, help="of 256 tokens each")
    parser.add_argument("--condensed", type=int, default=9, help="layers")
    parser.add_argument("--dtype", default="float32", help="in which the whole run computes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", action="store_true", help="the whole run, not compressing alone")
    parser.add_argument("--part", choices=(PRUNE, FORWARD), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def config_of(layers: int, experts: int) -> object:
    """DeepSeekMoE-16B's shape, as the Qwen2-MoE that it becomes when it is converted."""
    return AutoConfig.for_model(
        "qwen2_moe", hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=102400, num_experts=experts, num_experts_per_tok=6,
        moe_intermediate_size=1408, shared_expert_intermediate_size=2816, intermediate_size=10944,
        mlp_only_layers=[0], norm_topk_prob=False, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["Qwen2MoeForCausalLM"], bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def make(asked: argparse.Namespace, folder: Path) -> None:
    """Write the random checkpoint, a decoder layer at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    model = meta_model(config_of(asked.layers, asked.experts)).to(torch.bfloat16)
    pieces: dict[int, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        number = int(name.split(".")[2]) if ".layers." in name else -1
        pieces.setdefault(number, {})[name] = tensor
    files = {number: in_files(model, piece) for number, piece in pieces.items()}
    planned = {n: [Entry.of(*item) for item in one.items()] for n, one in files.items()}
    shards = plan_shards(planned.values(), limit=SHARD)
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with ShardWriter(folder, shards) as writer:
        for piece in planned.values():
            writer.write({entry.name: values(entry, drawn) for entry in piece})
        writer.finish()
    for file in (PACKAGE / "checkpoints" / "tiny_deepseek").glob("*token*.json"):
        shutil.copy(file, folder)
    model.config.save_pretrained(folder)  # last: it is looked for


def values(entry: Entry, drawn: Tensor) -> Tensor:
    """Values of a tensor: ones for norms, else a stretch of the drawn ones that its name picks."""
    size = torch.Size(entry.shape).numel()
    if "norm" in entry.name:
        return torch.ones(entry.shape, dtype=entry.dtype)
    start = sum(entry.name.encode()) * 7919 % 65536
    repeated = drawn.repeat(-(-(start + size) // DRAWN)) if start + size > DRAWN else drawn
    return repeated[start : start + size].reshape(entry.shape)


def check_room(asked: argparse.Namespace) -> None:
    """Refuse to begin where the disk cannot hold the checkpoint and what comes of it."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    model = meta_model(config_of(asked.layers, asked.experts))
    size = 2 * sum(tensor.numel() for tensor in model.parameters())
    free, needed = shutil.disk_usage(asked.folder).free, int(1.9 * size)
    if free < needed:
        sys.exit(f"{asked.folder}: {free / GIB:.0f} GiB are free, {needed / GIB:.0f} are needed")


def compress_alone(asked: argparse.Namespace, dense: Path) -> None:
    """A prune of a quarter, beside copying what it writes."""
    out = asked.folder / "pruned"
    shutil.rmtree(out, ignore_errors=True)
    forget(dense)
    ours, peak = in_process(asked, PRUNE)
    kept = out / "checkpoint"
    forget(kept)
    theirs = copied(kept, asked.folder / "copied")
    layer = layer_bytes(dense)
    print(f"pruned to {size_of(kept) / GIB:.2f} GiB in {duration(ours)}; cp of these bytes in "
          f"{duration(theirs)}: {ours / theirs:.2f} times")  # fmt: skip
    print(f"memory at its highest {peak / GIB:.2f} GiB; a layer {layer / GIB:.2f} GiB")
    shutil.rmtree(out)


def prune(asked: argparse.Namespace) -> int:
    """The process that compresses."""
    dense = Checkpoint(asked.folder / "dense")
    kept = tuple(range(asked.experts // 4, asked.experts))
    edits = tuple(PruneExperts(one.index, one.name, kept=kept) for one in dense.layers())
    started = time.perf_counter()
    write_edited(dense, Plan(edits), asked.folder / "pruned" / "checkpoint", Saving())
    print(f"SECONDS {time.perf_counter() - started}")
    return 0


def whole_run(asked: argparse.Namespace, dense: Path) -> None:
    """Profile, condense, write by run.py, beside what nothing can do without."""
    out = asked.folder / "outputs"
    shutil.rmtree(out, ignore_errors=True)
    forget(dense)
    arguments = [
        "model=checkpoint", f"model.path={dense}", f"model.dtype={asked.dtype}",
        f"calibration.num_samples={asked.samples}", "calibration.max_length=256",
        f"condense.num_layers={asked.condensed}", "condense.experts=soft_count",
        "condense.layers=cosine", "finetune=none", "eval=none", "measure=none", "track=off",
        f"compute.threads={asked.threads}", "compute.layerwise=true",
        f"store={out}/store", f"run_dir={out}/run",
    ]  # fmt: skip
    ours, peak = watched([sys.executable, str(ROOT / "run.py"), *arguments])
    report = json.loads((out / "run" / "report.json").read_text())
    made = Path(report["compressed/checkpoint"])
    stages = {k: v for k, v in report.items() if k.startswith("seconds/")}
    forget(dense)
    reading = timed_run(["sh", "-c", f"cat {dense}/*.safetensors > /dev/null"])
    forget(dense)
    computing, _ = in_process(asked, FORWARD)
    writing = copied(made, asked.folder / "copied")
    whole = reading + computing + writing
    print(f"the whole run {duration(ours)} ({stages}), {size_of(made) / GIB:.2f} GiB written")
    print(
        f"reading once {duration(reading)}, a plain forward layer by layer {duration(computing)} "
        f"(with its own reading), writing {duration(writing)}: {duration(whole)} in all"
    )
    print(f"{ours / whole:.2f} times; memory at its highest {peak / GIB:.2f} GiB")


def forward(asked: argparse.Namespace) -> int:
    """The process that takes the same number of tokens through the layers, watching nothing."""
    checkpoint = Checkpoint(asked.folder / "dense", asked.dtype)
    generator, sizes = torch.Generator().manual_seed(0), []
    while sum(sizes) < asked.samples:
        sizes.append(min(32, asked.samples - sum(sizes)))
    drawn = [torch.randint(2, 2048, (size, 256), generator=generator) for size in sizes]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]
    started = time.perf_counter()
    stream = LayerStream(LayerwiseModel(checkpoint), batches)
    with torch.inference_mode():
        States(stream).move_to(len(stream.layers))
    print(f"SECONDS {time.perf_counter() - started}")
    return 0


def in_process(asked: argparse.Namespace, part: str) -> tuple[float, int]:
    """One part in a process of its own: the seconds that it tells, and its memory."""
    given = vars(asked) | {"part": part}
    folder = given.pop("folder")
    options = [f"--{key}={value}" for key, value in given.items() if key != "run"]
    lines: list[str] = []
    _, peak = watched([sys.executable, __file__, str(folder), *options], lines)
    return float(next(one for one in lines if one.startswith("SECONDS")).split()[1]), peak


def watched(command: Sequence[str], lines: list[str] | None = None) -> tuple[float, int]:
    """Run a command; its seconds, and its anonymous memory in bytes at its highest."""
    threads = {"OMP_NUM_THREADS": command[-1].split("=")[1]} if "threads" in command[-1] else {}
    environment = os.environ | threads | {"PYTHONPATH": str(ROOT)}
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid).get("RssAnon", 0))
            time.sleep(0.02)
        told = process.stdout.read().splitlines() if process.stdout else []
    if process.returncode:
        sys.exit(f"{command[1]} ended with {process.returncode}")
    if lines is not None:
        lines.extend(told)
    return time.perf_counter() - started, peak


def forget(folder: Path) -> None:
    """Have the page cache forget a folder's weights."""
    for file in weights_in(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copied(folder: Path, target: Path) -> float:
    """Seconds to copy a folder's weights by `cp` and to flush them; no room is taken for long."""
    seconds = 0.0
    for file in sorted(weights_in(folder)):
        seconds += timed_run(["cp", "--reflink=never", str(file), str(target)], target)
        target.unlink()
    return seconds


def timed_run(command: Sequence[str], written: Path | None = None) -> float:
    """Seconds of a command, and of the flush of the file that it wrote."""
    started = time.perf_counter()
    subprocess.run(command, check=True)
    if written:
        descriptor = os.open(written, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def weights_in(folder: Path) -> Iterator[Path]:
    """The files of weights below a folder."""
    return folder.rglob("*.safetensors")


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in weights_in(folder))


def layer_bytes(dense: Path) -> int:
    """Bytes of the largest decoder layer."""
    return LayerwiseModel(Checkpoint(dense)).layer_bytes()


def timed(work: object) -> str:
    """How long it took, in words."""
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return duration(time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
