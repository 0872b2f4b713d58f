"""DeepSeekMoE-16B in its original layout, small and independent: a checkpoint and what it computes.

Written from the published description of the model alone (DeepSeekMoE, 2401.06066, and the config
of deepseek-ai/deepseek-moe-16b-base): nothing here imports moe_lab or a modelling file of
transformers. Everything is computed in float64, one document at a time, without padding.
Shapes: L tokens of a document, D hidden size, E routed experts, K chosen per token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

TEXTS = (
    "A router sends each token to a few of its experts.",
    "Two and two are four; (4 + 4) = 8.",
    "def square(x): return x * x",
    "QUICK foxes jump over 13 lazy dogs!",
    "$5 & 7% of #9: [a/b] ~ {c|d}, no?",
    "We keep <what> matters @ home^2.",
)
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# Printable ASCII as the byte-level alphabet writes it, in which a space is "Ġ".
ALPHABET = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
VOCABULARY = {token: number for number, token in enumerate([*ALPHABET, BOS, EOS])}

CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": VOCABULARY[BOS],
    "eos_token_id": VOCABULARY[EOS],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 60,  # as wide as a layer condensed to both shared and 3 routed experts
    "max_position_embeddings": 128,
    "model_type": "deepseek",
    "moe_intermediate_size": 12,
    "moe_layer_freq": 1,
    "n_routed_experts": 10,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": len(VOCABULARY),
}


# --------------------------------------------------------------------------- a checkpoint on disk


def is_moe(config: dict, layer: int) -> bool:
    """Whether a decoder layer is an MoE layer: from first_k_dense_replace on, each freq-th."""
    after = layer >= config["first_k_dense_replace"]
    return after and layer % config["moe_layer_freq"] == 0


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the original checkpoint, in the order of its files."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    keys = hidden // heads * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }

    def mlp(name: str, width: int) -> None:
        found[f"{name}.gate_proj.weight"] = (width, hidden)
        found[f"{name}.up_proj.weight"] = (width, hidden)
        found[f"{name}.down_proj.weight"] = (hidden, width)

    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for projection, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            found[f"{name}.self_attn.{projection}_proj.weight"] = (rows, hidden)
        if is_moe(config, layer):
            width = config["moe_intermediate_size"]
            for expert in range(config["n_routed_experts"]):
                mlp(f"{name}.mlp.experts.{expert}", width)
            found[f"{name}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            mlp(f"{name}.mlp.shared_experts", width * config["n_shared_experts"])
        else:
            mlp(f"{name}.mlp", config["intermediate_size"])
        found[f"{name}.input_layernorm.weight"] = (hidden,)
        found[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def make(
    folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: object
) -> Path:
    """A random checkpoint as the original is laid out: two shards, an index, remote code."""
    folder.mkdir(parents=True)
    config = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        embeds = "embed" in name and not config["tie_word_embeddings"]
        scale = 1.0 if embeds else 0.1 if len(shape) == 1 else 0.2
        value = torch.randn(shape, generator=generator) * scale + ("norm" in name)
        tensors[name] = value.to(dtype)
    # Layer 2 lies in both shards, as layers of the original do.
    names = list(tensors)
    middle = names.index("model.layers.2.mlp.gate.weight")
    shards = {"model-00001-of-00002.safetensors": names[:middle]}
    shards["model-00002-of-00002.safetensors"] = names[middle:]
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
    for file in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / file).write_text("raise SystemExit('remote code was executed')\n")
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """Tokenizer files as the original's: a LlamaTokenizerFast that adds BOS by its config alone."""
    special = [
        {"id": VOCABULARY[token], "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": True, "special": True}
        for token in (BOS, EOS)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
    model |= {"vocab": {token: VOCABULARY[token] for token in ALPHABET}, "merges": []}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special}
    tokenizer |= {"normalizer": None, "pre_tokenizer": byte_level | {"use_regex": True}}
    tokenizer |= {"post_processor": byte_level | {"use_regex": True}}
    tokenizer |= {"decoder": byte_level | {"use_regex": True}, "model": model}
    write_json(folder / "tokenizer.json", tokenizer)

    def added(token: str) -> dict:
        return {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True,
                "rstrip": False, "single_word": False}  # fmt: skip

    settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": added(BOS)}
    settings |= {"clean_up_tokenization_spaces": False, "eos_token": added(EOS), "legacy": True}
    settings |= {"model_max_length": 4096, "pad_token": added(EOS), "sp_model_kwargs": {}}
    settings |= {"unk_token": None, "tokenizer_class": "LlamaTokenizerFast"}
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode(text: str) -> list[int]:
    """BOS and a token per character: what the original tokenizer makes of printable ASCII."""
    written = text.replace(" ", "Ġ").replace("\n", "Ċ")
    return [VOCABULARY[BOS], *(VOCABULARY[character] for character in written)]


# --------------------------------------------------------------------------- what it computes

Condensed = dict[int, dict[int, float]]  # layer -> {expert: constant gate}


class Original:
    """The published model on the tensors of a folder in the original layout, in float64."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        files = sorted(folder.glob("*.safetensors"))
        stored = {name: value for file in files for name, value in load_file(file).items()}
        self.tensors = {name: value.double() for name, value in stored.items()}
        layers = range(self.config["num_hidden_layers"])
        self.moe = [layer for layer in layers if is_moe(self.config, layer)]

    def states(self, ids: list[int], condensed: Condensed | None = None) -> list[Tensor]:
        """Hidden states [L, D]: the embeddings, after each decoder layer, the last one normed."""
        hidden = self.tensors["model.embed_tokens.weight"][torch.tensor(ids)]
        states = [hidden]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed = self.norm(hidden, f"{name}.input_layernorm")
            hidden = hidden + self.attention(normed, f"{name}.self_attn")
            normed = self.norm(hidden, f"{name}.post_attention_layernorm")
            hidden = hidden + self.block(normed, layer, (condensed or {}).get(layer))
            states.append(hidden)
        states[-1] = self.norm(hidden, "model.norm")
        return states

    def logits(self, ids: list[int], condensed: Condensed | None = None) -> Tensor:
        """Next-token logits [L, vocabulary]."""
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self.states(ids, condensed)[-1] @ self.tensors[f"{head}.weight"].T

    def routing(self, ids: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Per MoE layer what its router decides: experts and gates [L, K], best first."""
        found = {}
        states = self.states(ids)
        for layer in self.moe:
            name = f"model.layers.{layer}"
            hidden = states[layer]
            normed = self.norm(hidden, f"{name}.input_layernorm")
            hidden = hidden + self.attention(normed, f"{name}.self_attn")
            found[layer] = self.route(self.norm(hidden, f"{name}.post_attention_layernorm"), layer)
        return found

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""
        mean = x.pow(2).mean(dim=-1, keepdim=True)
        return x / (mean + self.config["rms_norm_eps"]).sqrt() * self.tensors[f"{name}.weight"]

    def attention(self, x: Tensor, name: str) -> Tensor:
        """Causal attention with rotary positions, one head at a time."""
        length, hidden = x.shape
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = hidden // heads
        q, k, v = (x @ self.tensors[f"{name}.{part}_proj.weight"].T for part in "qkv")
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs = []
        for head in range(heads):
            of_q, group = head * size, head * groups // heads * size
            q_h = self.rotate(q[:, of_q : of_q + size])
            k_h = self.rotate(k[:, group : group + size])
            scores = (q_h @ k_h.T / math.sqrt(size)).masked_fill(future, -math.inf)
            outputs.append(scores.softmax(dim=-1) @ v[:, group : group + size])
        return torch.cat(outputs, dim=1) @ self.tensors[f"{name}.o_proj.weight"].T

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary: dimensions i and i + size/2 turn together by position / theta^(2i/size)."""
        length, size = x.shape
        turns = self.config["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
        angle = torch.arange(length).double()[:, None] * turns
        first, second = x[:, : size // 2], x[:, size // 2 :]
        return torch.cat(
            (
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ),
            dim=1,
        )

    def block(self, x: Tensor, layer: int, condensed: dict[int, float] | None) -> Tensor:
        """shared(x) + the chosen experts' gate * expert(x); the same for all where condensed."""
        name = f"model.layers.{layer}.mlp"
        if layer not in self.moe:
            return self.mlp(x, name)
        output = self.mlp(x, f"{name}.shared_experts")
        if condensed is not None:
            for expert, gate in condensed.items():
                output = output + gate * self.mlp(x, f"{name}.experts.{expert}")
            return output
        experts, gates = self.route(x, layer)
        for expert in range(self.config["n_routed_experts"]):
            token, place = torch.where(experts == expert)
            if len(token):
                y = self.mlp(x[token], f"{name}.experts.{expert}")
                output = output.index_add(0, token, gates[token, place, None] * y)
        return output

    def route(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The K largest of softmax(logits) over all experts, not renormalised."""
        logits = x @ self.tensors[f"model.layers.{layer}.mlp.gate.weight"].T
        gates, experts = logits.softmax(dim=-1).topk(self.config["num_experts_per_tok"], dim=-1)
        if self.config["norm_topk_prob"]:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return experts, gates

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        gate, up, down = (
            self.tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
