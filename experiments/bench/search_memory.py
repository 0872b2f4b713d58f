"""Memory of CD-MoE's searches from disk: one decoder layer and the activations, not the model.

A random Qwen2-MoE is written to disk; a fresh process searches experts for all its layers and an
order of layers, with no memory for activations (all in files). Its peak resident memory above that
of the same process before the search is compared with what one step has to hold: a layer while it
is read and converted (three times its size) and a chunk of all experts' outputs, read, written and
compared (four times).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LAYERS, CHUNKS = 3, 4  # how often each is held at most
NUM_TOKENS = 8 * 64  # fewer than a chunk has at most
NUM_LAYERS, NUM_EXPERTS, HIDDEN, WIDTH = 16, 64, 256, 176


def write_model(folder: Path) -> int:
    """A random checkpoint; returns its bytes."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=4 * WIDTH,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=4,
        num_experts=NUM_EXPERTS, num_experts_per_tok=6, moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=2 * WIDTH, mlp_only_layers=[0],
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def resident_bytes(field: str) -> int:
    """Memory of this process: VmRSS now, VmHWM at most since it began (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def search(folder: Path) -> None:
    """In a process of its own: print bytes of a layer, of activations, and of memory used."""
    import torch

    from moe_lab.methods.condense.method import Condense
    from moe_lab.models.activations import Activations
    from moe_lab.models.checkpoint import Checkpoint
    from moe_lab.models.layerwise import LayerwiseModel
    from moe_lab.models.stream import LayerStream
    from moe_lab.profile.layer import LayerStatistics
    from moe_lab.profile.profile import Profile

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 512, (8, NUM_TOKENS // 8), generator=generator)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    checkpoint = Checkpoint(folder, "float32")
    statistics = []
    for info in checkpoint.layers():  # as if profiled: the searches need counts and sums of gates
        ones = torch.ones(info.num_experts, dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        sums = {"count": ones, "gate_sum": 0.1 * ones, "tokens": one, "shared_gate_sum": 0.5 * one}
        statistics.append(LayerStatistics(info, sums))
    source = LayerwiseModel(checkpoint)
    cache = Activations(limit=0, folder=folder.parent)
    stream = LayerStream(source, batches, cache)
    before = resident_bytes("VmRSS")
    Condense(num_layers=2, num_routed=2).plan(Profile(statistics, lambda: stream))
    print(json.dumps([source.layer_bytes(), cache.spilled, resident_bytes("VmHWM") - before]))


def main() -> int:
    """Write, search in a fresh process, compare."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "model"
        size = write_model(folder)
        command = [sys.executable, __file__, str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    layer, written, used = json.loads(done.stdout.splitlines()[-1])
    print(f"model on disk {size / 1e6:.0f} MB, its largest layer {layer / 1e6:.0f} MB")
    print(f"activations written to disk in all {written / 1e6:.0f} MB")
    chunk = NUM_EXPERTS * NUM_TOKENS * HIDDEN * 4
    limit = LAYERS * layer + CHUNKS * chunk
    verdict = "PASS" if used <= limit else "FAIL"
    print(
        f"{verdict}: the searches took {used / 1e6:.0f} MB, {used / size:.0%} of the model; limit "
        f"{limit / 1e6:.0f} MB ({LAYERS} layers, {CHUNKS} chunks of {chunk / 1e6:.0f} MB)"
    )
    return int(used > limit)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        search(Path(sys.argv[1]))
    else:
        sys.exit(main())
