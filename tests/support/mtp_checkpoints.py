"""Tiny checkpoints with MTP layers as those on the hub have them: random, in the hub's names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

HYBRID = dict(
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=48,
    shared_expert_intermediate_size=24, decoder_sparse_step=1, mlp_only_layers=[], head_dim=8,
    norm_topk_prob=True, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, num_nextn_predict_layers=1,
)  # fmt: skip
SLIDING = dict(
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=48,
    head_dim=16, v_head_dim=8, sliding_window=8, n_group=1, topk_group=1, num_mtp_layers=3,
)  # fmt: skip
CHANGES: dict[str, dict] = {
    "deepseek_v3": {},
    "glm4_moe": {},
    "qwen3_next": HYBRID,
    "mimo_v2_flash": SLIDING,
}
WITH_EXPERTS = ("deepseek_v3", "glm4_moe", "qwen3_next")
DECODERS = {"deepseek_v3": "model.layers.4.", "glm4_moe": "model.layers.4.",
            "qwen3_next": "mtp.layers.0.", "mimo_v2_flash": "model.mtp.layers.{}."}  # fmt: skip
OUTSIDE: dict[str, dict[str, tuple[int, ...]]] = {
    "model.layers.4.": {
        "enorm": (32,), "hnorm": (32,), "eh_proj": (32, 64), "embed_tokens": (96, 32),
        "shared_head.norm": (32,), "shared_head.head": (96, 32),
    },
    "mtp.": {
        "fc": (32, 64), "norm": (32,), "pre_fc_norm_embedding": (32,), "pre_fc_norm_hidden": (32,),
    },
    "model.mtp.": {},
}  # fmt: skip


def mtp_tensors(family: str, decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random tensors of the family's MTP layers; decoder: of a decoder layer, by name in it."""
    generator = torch.Generator().manual_seed(7)
    first = next(path for path in OUTSIDE if DECODERS[family].startswith(path))
    shapes = {f"{first}{name}.weight": shape for name, shape in OUTSIDE[first].items()}
    for number in range(3 if family == "mimo_v2_flash" else 1):
        path = DECODERS[family].format(number)
        shapes |= {path + name: tuple(tensor.shape) for name, tensor in decoder.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_with_mtp(family: str, folder: Path, shards: bool = False, **changes: object) -> dict:
    """A tiny model's checkpoint with MTP layers, in one file or in three; the MTP tensors."""
    model = tiny_model(family, **(CHANGES[family] | changes))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    dense = family == "mimo_v2_flash"  # of its own layers the first alone is
    path = "model.layers.0." if dense else "model.layers.3."
    decoder = {n.removeprefix(path): t for n, t in tensors.items() if n.startswith(path)}
    made = mtp_tensors(family, decoder)
    if shards:
        write_shards(folder, tensors, made)
    else:
        save_file(tensors | made, folder / "model.safetensors", metadata={"format": "pt"})
    return made


def write_shards(folder: Path, tensors: dict[str, Tensor], made: dict[str, Tensor]) -> None:
    """The tensors in three files, the MTP layers' in the last two of them."""
    names, middle = sorted(tensors), len(tensors) // 2
    mine = sorted(made)
    parts = [names[:middle], names[middle:] + mine[::2], mine[1::2]]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({n: (tensors | made)[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint with an index, as the index places them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert set(files) == {file.name for file in folder.glob("*.safetensors")}
    assert sum(map(len, files.values())) == len(index["weight_map"])
    read = {name: files[file][name] for name, file in index["weight_map"].items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in read.values())
    assert index["metadata"]["total_size"] == size
    return read
