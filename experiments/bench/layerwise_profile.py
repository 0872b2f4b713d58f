"""Peak memory of profiling Mixtral 8x7B's shape with one decoder layer in memory at a time.

Random bfloat16 weights of the real widths are written layer by layer into a temporary folder (2.8
GiB a layer; --layers 32 would be the whole model). A fresh process then profiles them, once with
the routers' statistics alone and once with all, and tells the peak resident memory of its life,
mapped files included. It must stay below the limit, and not grow with the number of layers:

    python experiments/bench/layerwise_profile.py --layers 2 4
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_GIB = 8.0
PROFILES = ("routers", "all")
NUM_DOCUMENTS, LENGTH = 4, 32
HIDDEN, WIDTH, NUM_EXPERTS, VOCABULARY, HEADS, KEY_HEADS = 4096, 14336, 8, 32000, 32, 8


def shapes(layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one decoder layer, or with None of all else."""
    if layer is None:
        return {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,),
            "lm_head.weight": (VOCABULARY, HIDDEN),
        }
    key_width = HIDDEN // HEADS * KEY_HEADS
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (key_width, HIDDEN),
        "self_attn.v_proj.weight": (key_width, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "block_sparse_moe.gate.weight": (NUM_EXPERTS, HIDDEN),
    }
    for expert in range(NUM_EXPERTS):
        for name, shape in (
            ("w1", (WIDTH, HIDDEN)),
            ("w2", (HIDDEN, WIDTH)),
            ("w3", (WIDTH, HIDDEN)),
        ):
            found[f"block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return {f"model.layers.{layer}.{name}": shape for name, shape in found.items()}


def write_model(folder: Path, num_layers: int) -> None:
    """A random checkpoint, a file a layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for part in (None, *range(num_layers)):
        file = "others.safetensors" if part is None else f"layer_{part:02d}.safetensors"
        tensors = {}
        for name, shape in shapes(part).items():
            values = torch.empty(shape, dtype=torch.bfloat16)
            tensors[name] = values.uniform_(-0.03, 0.03, generator=generator).add_("norm" in name)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH,
        num_hidden_layers=num_layers, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
        num_local_experts=NUM_EXPERTS, num_experts_per_tok=2, dtype="bfloat16",
        architectures=["MixtralForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)


def peak_bytes() -> int:
    """The most memory that this process had at once (Linux; not inherited, unlike ru_maxrss)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def profile(folder: Path, kind: str) -> None:
    """In a process of its own: print the peak, what a layer takes, and how many were counted."""
    import torch

    from moe_lab.compute import Compute
    from moe_lab.data.tokens import Tokens
    from moe_lab.models.checkpoint import Checkpoint
    from moe_lab.models.layerwise import LayerwiseModel
    from moe_lab.stages.profile import collect_profile

    ids = torch.randint(3, VOCABULARY, (NUM_DOCUMENTS, LENGTH))
    tokens = Tokens(tuple(map(tuple, ids.tolist())), pad_id=0)
    checkpoint = Checkpoint(folder)
    before, started = peak_bytes(), time.perf_counter()
    compute = Compute("cpu", layerwise=True)
    batches = [(0, batch) for batch in tokens.batches(NUM_DOCUMENTS)]
    found = collect_profile(checkpoint, batches, kind == "routers", compute, folder).of_group()
    assert all(layer["count"].sum() == 2 * ids.numel() for layer in found)
    peak, seconds = peak_bytes(), time.perf_counter() - started
    layer = LayerwiseModel(checkpoint).layer_bytes()
    print(json.dumps([before, peak, layer, len(found), seconds]))


def measure(num_layers: int) -> bool:
    """Write, profile in fresh processes, compare; whether all stayed below the limit."""
    good = True
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write_model(folder, num_layers)
        for kind in PROFILES:
            command = [sys.executable, __file__, "--profile", str(folder), kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            before, peak, layer, counted, seconds = json.loads(done.stdout.splitlines()[-1])
            assert counted == num_layers
            good &= peak <= LIMIT_GIB * 2**30
            print(
                f"{'PASS' if peak <= LIMIT_GIB * 2**30 else 'FAIL'}: {num_layers} layers, "
                f"compute.profile={kind}: peak {peak / 2**30:.2f} GiB of {LIMIT_GIB:g} "
                f"({before / 2**30:.2f} before; a layer is {layer / 2**30:.2f}), {seconds:.0f} s",
                flush=True,
            )
    return good


def main() -> int:
    """Measure each number of layers; 1 where a peak is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[3])
    parser.add_argument("--profile", nargs=2, metavar=("FOLDER", "KIND"), help="of one process")
    given = parser.parse_args()
    if given.profile:
        profile(Path(given.profile[0]), given.profile[1])
        return 0
    good = [measure(number) for number in given.layers]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
