"""Memory, disk and time of a profile at the shapes of Qwen3-235B-A22B and Kimi-K2.

Two decoder layers of the real widths with random bfloat16 weights are written into a temporary
folder, in shards as published checkpoints have them. A fresh process profiles them layer by layer;
the peak of its anonymous memory (mapped files can leave it) beyond that of the process with its
libraries must stay within what is said before the work. --share takes that share of the experts,
where a machine has not the memory of a whole layer (Kimi-K2's is 31.8 GiB); what the whole model
takes is told by the same function, and its time from that of a layer:

    python experiments/bench/profile_scale.py --shape qwen3_235b --share 0.5
    python experiments/bench/profile_scale.py --shape kimi_k2 --share 0.125 --neurons
    python experiments/bench/profile_scale.py --shape tiny --documents 2 --length 16384

Of the shape `tiny`, whose weights are small, long documents can be tried anywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHARD_BYTES = 2**30
VOCABULARY = 8192  # of the two layers' model: the embedding is known without measuring it
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_235b": {
        "model_type": "qwen3_moe", "layers": 94, "vocab_size": 151936, "hidden_size": 4096,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "intermediate_size": 12288,
    },
    "kimi_k2": {
        "model_type": "deepseek_v3", "layers": 61, "vocab_size": 163840, "hidden_size": 7168,
        "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "intermediate_size": 18432, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.827, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "tiny": {
        "model_type": "qwen3_moe", "layers": 48, "vocab_size": 1024, "hidden_size": 512,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 64,
        "num_experts_per_tok": 8, "moe_intermediate_size": 128, "norm_topk_prob": True,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "intermediate_size": 1024,
    },
}  # fmt: skip


def config_of(shape: str, share: float, num_layers: int = 2) -> Any:
    """The config of a model of this shape, with fewer layers and that share of its experts."""
    from transformers import AutoConfig

    values = {key: value for key, value in SHAPES[shape].items() if key != "layers"}
    count = "num_experts" if "num_experts" in values else "n_routed_experts"
    values[count] = max(values["num_experts_per_tok"], int(values[count] * share))
    if num_layers == 2:
        values["vocab_size"] = min(VOCABULARY, values["vocab_size"])
    return AutoConfig.for_model(
        values.pop("model_type"), **values, num_hidden_layers=num_layers, dtype="bfloat16",
        tie_word_embeddings=False, max_position_embeddings=32768, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def write_model(folder: Path, config: Any) -> None:
    """A random checkpoint, with a tensor for each matrix of an expert."""
    import torch
    from safetensors.torch import save_file

    from moe_lab.models.checkpoint import meta_model

    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(waiting, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(waiting, file))
        waiting.clear()

    drawn: dict[tuple[int, ...], torch.Tensor] = {}  # experts share one draw, at other signs

    def add(name: str, shape: tuple[int, ...]) -> None:
        if shape not in drawn or ".experts." not in name:
            drawn[shape] = torch.empty(shape).uniform_(-0.03, 0.03, generator=generator)
        scale = float(torch.empty(()).uniform_(0.5, 1.5, generator=generator))
        waiting[name] = (drawn[shape] * scale + ("norm" in name)).bfloat16()
        if sum(one.nbytes for one in waiting.values()) > SHARD_BYTES:
            write()

    for name, tensor in meta_model(config).state_dict().items():
        if ".experts." not in name:
            add(name, tuple(tensor.shape))
            continue
        for expert in range(tensor.shape[0]):
            start = name.rpartition(".experts.")[0] + f".experts.{expert}"
            if name.endswith("gate_up_proj"):
                half = (tensor.shape[1] // 2, tensor.shape[2])
                add(f"{start}.gate_proj.weight", half)
                add(f"{start}.up_proj.weight", half)
            else:
                add(f"{start}.down_proj.weight", tuple(tensor.shape[1:]))
    write()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [type(meta_model(config)).__name__]
    config.save_pretrained(folder)


class Peak:
    """The most anonymous memory that this process has had, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            found = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            self.bytes = max(self.bytes, 1024 * found)
            time.sleep(0.01)


def profile(folder: Path, given: argparse.Namespace) -> None:
    """In a process of its own: print the peak and the seconds, against what was said before."""
    import torch

    from moe_lab.compute import Compute
    from moe_lab.data.tokens import Tokens
    from moe_lab.models.checkpoint import Checkpoint, meta_model
    from moe_lab.stages import profile_needs
    from moe_lab.stages.context import Context
    from moe_lab.stages.profile import Profiling
    from moe_lab.stages.profile import profile as run
    from moe_lab.store import Store

    torch.set_num_threads(given.threads)
    checkpoint = Checkpoint(folder)
    generator = torch.Generator().manual_seed(1)
    shape = (given.documents, given.length)
    ids = torch.randint(3, checkpoint.config.vocab_size, shape, generator=generator)
    tokens = Tokens(tuple(map(tuple, ids.tolist())), pad_id=0)
    compute = Compute("cpu", layerwise=True, cache_gib=given.cache_gib, journal_seconds=30.0)
    batches = tokens.batches(compute.batch_size, "cpu", compute.batch_tokens)
    shapes = [(0, *batch["input_ids"].shape[:2]) for batch in batches]
    asked = profile_needs.request_of(shapes, compute, given.neurons)
    said = profile_needs.bounds_of(meta_model(checkpoint.config), 2, asked)
    whole_config = config_of(given.shape, 1.0, SHAPES[given.shape]["layers"])
    whole = profile_needs.bounds_of(meta_model(whole_config), 2, asked)
    foreseen = foreseen_bytes(checkpoint, tokens, compute, given.neurons)
    peak = Peak()
    time.sleep(0.1)
    before, started = peak.bytes, time.perf_counter()
    store = Store(folder / "store")
    made = run(Context(store, compute), Profiling(checkpoint, tokens, given.neurons))
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in made.folder.rglob("*"))
    told = {
        "before": before, "peak": peak.bytes - before, "said": said.memory,
        "words": said.in_words(), "foreseen": foreseen,
        "result": size, "result_said": said.result, "seconds": seconds, "whole": whole.in_words(),
    }  # fmt: skip
    print(json.dumps(told))


def foreseen_bytes(checkpoint: Any, tokens: Any, compute: Any, neurons: bool) -> float:
    """The anonymous memory of the profile that a dry run tells: an estimate, not a bound."""
    from moe_lab.forecast.costs import measured_costs
    from moe_lab.forecast.stages import need_of_profile
    from moe_lab.forecast.work import ProfilingWork, Search, Text, Work
    from moe_lab.stages.foreseen import dense_weights

    lengths = tuple(map(len, tokens.samples))
    text = Text(lengths, compute.batch_size, compute.batch_tokens)
    cache = int(compute.cache_gib * 2**30)
    work = Work(
        dense_weights(checkpoint, checkpoint.layers()), None,
        ProfilingWork(text, True, cache, neurons=neurons), Search(),
    )  # fmt: skip
    need = need_of_profile(work, measured_costs())
    return need.memory - need.mapped


def measure(given: argparse.Namespace) -> bool:
    """Write, profile in a fresh process, compare."""
    gib = 2**30
    with tempfile.TemporaryDirectory(dir=given.folder) as home:
        folder = Path(home)
        write_model(folder, config_of(given.shape, given.share))
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        command = [sys.executable, __file__, "--profile", str(folder), *sys.argv[1:]]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        told = json.loads(done.stdout.splitlines()[-1])
    good = told["peak"] <= told["said"] and told["result"] <= 1.01 * told["result_said"] + 2**16
    layers = SHAPES[given.shape]["layers"]
    print(
        f"{'PASS' if good else 'FAIL'}: {given.shape}, {given.share:g} of the experts, two layers "
        f"of {weights / gib:.2f} GiB of weights, {given.documents} x {given.length} tokens: peak "
        f"{told['peak'] / gib:.2f} GiB beyond {told['before'] / gib:.2f}, said "
        f"{told['said'] / gib:.2f} ({told['peak'] / told['said']:.0%}), by a dry run "
        f"{told['foreseen'] / gib:.2f} ({told['foreseen'] / told['peak'] - 1:+.0%}); result "
        f"{told['result'] / gib:.3f} GiB, said {told['result_said'] / gib:.3f}; "
        f"{told['seconds']:.0f} s\n  said: {told['words']}\n"
        f"  the whole model, all {layers} layers: {told['whole']}; about "
        f"{told['seconds'] / 2 * layers / 3600:.1f} h at this share of its experts",
        flush=True,
    )
    return good


def main() -> int:
    """Measure one shape; 1 where it takes more than was said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--cache-gib", type=float, default=4.0)
    parser.add_argument("--neurons", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the weights go for the time being")
    parser.add_argument("--profile", type=Path, help="of one process")
    given = parser.parse_args()
    if given.profile:
        profile(given.profile, given)
        return 0
    return int(not measure(given))


if __name__ == "__main__":
    sys.exit(main())
