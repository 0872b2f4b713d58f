"""DeepSeekMoE-16B's original checkpoints: converted, and condensed as the paper defines it.

The other side of every comparison is `deepseek_original.py`, which shares no code with ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import deepseek_original
import fresh
import pytest
import torch
from deepseek_original import BOS, CONFIG, TEXTS, VOCABULARY, Condensed, Original, encode
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import moe_lab
from moe_lab.models.checkpoint import load, resolve
from moe_lab.models.families import deepseek
from moe_lab.models.weight_files import weight_files
from moe_lab.types import UserError

# Logits, tokens and the routers' decisions, by stock transformers; alone where told so.
FRESH = """
import json, sys
if sys.argv[4] == "ours":
    import moe_lab
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True)
assert ("moe_lab" in sys.modules) == (sys.argv[4] == "ours")
assert not info["missing_keys"] and not info["unexpected_keys"], info
found = {}
for layer in model.model.layers:
    if hasattr(layer.mlp, "gate"):
        def note(module, inputs, output, layer=layer.self_attn.layer_idx):
            found[f"{text}.weight.{layer}"], found[f"{text}.index.{layer}"] = output[1], output[2]
        layer.mlp.gate.register_forward_hook(note)
with torch.no_grad():
    for text, words in enumerate(texts):
        ids = tokenizer(words, return_tensors="pt").input_ids
        found[f"{text}.ids"] = ids[0]
        found[f"{text}.logits"] = model(ids).logits[0]
save_file({name: value.contiguous() for name, value in found.items()}, out)
"""
LAYOUTS = {
    "as published, bfloat16": {"dtype": torch.bfloat16},
    "each second layer dense": {"moe_layer_freq": 2, "num_key_value_heads": 2},
    "two dense, renormalised, tied": {
        "first_k_dense_replace": 2,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
    },
}


def in_fresh_process(folder: Path, out: Path, which: str = "stock") -> dict[str, Tensor]:
    assert "remote code" not in fresh.run(FRESH, folder, out, json.dumps(TEXTS), which)
    return load_file(out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_it_is_the_published_model_in_stock_transformers(
    layout: str, tmp_path: Path
) -> None:
    changes = {"dtype": torch.float32} | LAYOUTS[layout]
    published = deepseek_original.make(tmp_path / "original", **changes)
    resolve(published).convert(tmp_path / "native")
    found, original = in_fresh_process(tmp_path / "native", tmp_path / "out"), Original(published)
    for text, words in enumerate(TEXTS):
        ids = encode(words)
        assert found[f"{text}.ids"].tolist() == ids
        logits = found[f"{text}.logits"].double()
        torch.testing.assert_close(logits, original.logits(ids), rtol=0, atol=1e-5)
        routing = original.routing(ids)
        assert {int(n.split(".")[2]) for n in found if n.startswith(f"{text}.index")} == set(
            routing
        )
        for layer, (experts, gates) in routing.items():
            assert torch.equal(found[f"{text}.index.{layer}"], experts)
            weights = found[f"{text}.weight.{layer}"].double()
            torch.testing.assert_close(weights, gates, rtol=1e-5, atol=1e-6)


def test_it_is_written_shard_for_shard_in_its_own_dtype(tmp_path: Path) -> None:
    published = deepseek_original.make(tmp_path / "original")
    add_tensor(published, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))
    resolve(published).convert(tmp_path / "native")
    weight_map = {}
    pairs = zip(weight_files(published), weight_files(tmp_path / "native"), strict=True)
    for original_file, native_file in pairs:
        original, native = load_file(original_file), load_file(native_file)
        assert {tensor.dtype for tensor in native.values()} == {torch.bfloat16}
        follow = {}
        for name, tensor in original.items():
            if "inv_freq" not in name:
                follow |= deepseek.native_tensors(name, tensor)
        assert set(follow) == set(native)
        weight_map |= dict.fromkeys(native, native_file.name)
        for name, tensor in native.items():
            if ".shared_expert.down_proj." in name:
                assert torch.equal(tensor / 2, original[name.replace("expert.", "experts.")])
    index = json.loads((tmp_path / "native" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == weight_map
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["mlp_only_layers"] == [0]
    assert load(tmp_path / "native").dtype == torch.bfloat16
    assert not list((tmp_path / "native").glob("*.py"))


def test_the_tokenizer_keeps_adding_bos(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    published = deepseek_original.make(tmp_path / "original")
    original = resolve(published)
    original.convert(tmp_path / "native")
    raw = Tokenizer.from_file(str(published / "tokenizer.json"))
    assert raw.encode("ab").ids == encode("ab")[1:], "the original adds BOS by its config alone"
    native = Tokenizer.from_file(str(tmp_path / "native" / "tokenizer.json"))
    assert native.encode("ab").ids == encode("ab")
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path / "native"), original.tokenizer()):
        for words in TEXTS:
            assert tokenizer(words).input_ids == encode(words)
            assert tokenizer.decode(encode(words)) == BOS + words
        assert tokenizer("ab", "c").input_ids == [*encode("ab"), *encode("c")]
        assert tokenizer("ab", add_special_tokens=False).input_ids == encode("ab")[1:]
        assert tokenizer.bos_token_id == VOCABULARY[BOS]
    copied = tmp_path / "native" / "generation_config.json"
    assert copied.read_bytes() == (published / "generation_config.json").read_bytes()


def test_a_tokenizer_that_adds_no_bos_still_adds_none(tmp_path: Path) -> None:
    published = deepseek_original.make(tmp_path / "original")
    settings = json.loads((published / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": False, "add_eos_token": True}
    deepseek_original.write_json(published / "tokenizer_config.json", settings)
    ids = resolve(published).tokenizer()("ab").input_ids
    assert ids == [*encode("ab")[1:], CONFIG["eos_token_id"]]


def add_tensor(folder: Path, name: str, value: Tensor) -> None:
    file = weight_files(folder)[0]
    save_file(load_file(file) | {name: value}, file, metadata={"format": "pt"})
    index_again(folder)


def remove_tensor(folder: Path, name: str) -> None:
    for file in weight_files(folder):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    index_again(folder)


def index_again(folder: Path) -> None:
    """Let the index name what the files hold."""
    places = {name: file.name for file in weight_files(folder) for name in load_file(file)}
    index = {"metadata": {}, "weight_map": places}
    deepseek_original.write_json(folder / "model.safetensors.index.json", index)


REFUSED = {
    "scoring": ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'.*only say 'softmax'"),
    "scaling": ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5.*only say 1"),
    "groups": ({"n_group": 8}, "n_group=8"),
    "biases": ({"attention_bias": True}, "attention_bias=True"),
    "rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
    "no shared": ({"n_shared_experts": None}, "for n_shared_experts; it has n_shared_experts=None"),
    "one": ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "norm_topk_prob=True"),
    "dense": ({"first_k_dense_replace": 9}, "every layer dense"),
    "shape": (
        {"moe_intermediate_size": 13},
        r"132 of another shape: .*\[12, 32\] \(not \[13, 32\]",
    ),
    "missing": ({"n_routed_experts": 11}, "12 missing: model.layers.1.mlp.experts.10.gate_proj"),
    "unknown": ({"n_routed_experts": 9}, "12 unknown: model.layers.1.mlp.experts.9.down_proj"),
}


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """The tiny original, to be broken."""
    return Path(shutil.copytree(published, tmp_path / "broken"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_at_once(name: str, copy: Path) -> None:
    changes, message = REFUSED[name]
    deepseek_original.write_json(copy / "config.json", CONFIG | changes)
    with pytest.raises(UserError, match=message):
        resolve(copy)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    remove_tensor(copy, "model.layers.3.self_attn.o_proj.weight")
    with pytest.raises(UserError, match=r"1 missing: model.layers.3.self_attn.o_proj.weight"):
        resolve(copy)
    add_tensor(copy, "model.layers.3.self_attn.o_proj.weight", torch.ones(32, 32))
    add_tensor(copy, "model.layers.3.self_attn.o_proj.bias", torch.ones(32))
    with pytest.raises(UserError, match=r"1 unknown: model.layers.3.self_attn.o_proj.bias"):
        resolve(copy)


def test_only_bin_files_are_refused(copy: Path) -> None:
    for file in copy.glob("model*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model.bin. moe_lab reads safetensors only"):
        resolve(copy)


def test_loading_the_original_says_what_to_do(published: Path) -> None:
    for read in (moe_lab.load, load, lambda path: resolve(path).load()):
        with pytest.raises(UserError, match=r"original layout.*model=checkpoint.*\.convert\("):
            read(published)


def test_the_converted_copy_depends_on_the_tokenizer_too(published: Path, copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["add_bos_token"] = False
    deepseek_original.write_json(copy / "tokenizer_config.json", settings)
    assert resolve(copy).fingerprint == resolve(published).fingerprint
    assert resolve(copy).texts_fingerprint != resolve(published).texts_fingerprint


class BruteForce:
    """CD-MoE (2412.00069) by its definitions: the whole model runs for every candidate."""

    def __init__(self, original: Original, documents: list[list[int]]):
        self.original, self.documents = original, documents
        self.intact = [original.states(ids) for ids in documents]
        self.gates = self.mean_gates()

    def mean_gates(self) -> dict[int, dict[int, float]]:
        """w_i = sum of the gates of the tokens that chose i / number of these tokens."""
        sums: dict[int, dict[int, list[float]]] = {layer: {} for layer in self.original.moe}
        for ids in self.documents:
            for layer, (experts, gates) in self.original.routing(ids).items():
                pairs = zip(experts.flatten().tolist(), gates.flatten().tolist(), strict=True)
                for expert, gate in pairs:
                    sums[layer].setdefault(expert, []).append(gate)
        return {
            layer: {expert: sum(values) / len(values) for expert, values in found.items()}
            for layer, found in sums.items()
        }

    def divergence(self, condensed: Condensed, position: int) -> float:
        """JS at the hidden states after `position` decoder layers: over tokens, then documents."""
        means = []
        for ids, intact in zip(self.documents, self.intact, strict=True):
            states = self.original.states(ids, condensed)
            means.append(js(intact[position], states[position]).mean())
        return float(sum(means) / len(means))

    def block(self, layer: int, experts: list[int]) -> dict[int, float]:
        return {expert: self.gates[layer][expert] for expert in experts}

    def choose_experts(self, layer: int, number: int) -> tuple[list[int], list[float]]:
        """Greedy by the output of decoder layer `layer`; the divergence before and after each."""
        chosen: list[int] = []
        path = [self.divergence({layer: {}}, layer + 1)]
        for _ in range(number):
            rest = [expert for expert in sorted(self.gates[layer]) if expert not in chosen]
            values = {
                expert: self.divergence({layer: self.block(layer, [*chosen, expert])}, layer + 1)
                for expert in rest
            }
            chosen.append(min(rest, key=values.__getitem__))
            path.append(values[chosen[-1]])
        return chosen, path

    def choose_layers(
        self, experts: dict[int, list[int]], number: int
    ) -> tuple[list[int], list[float]]:
        """Greedy by the last hidden state, with the experts of every layer fixed."""
        order: list[int] = []
        path: list[float] = []
        for _ in range(number):
            rest = [layer for layer in sorted(experts) if layer not in order]
            values = {}
            for layer in rest:
                blocks = {i: self.block(i, experts[i]) for i in (*order, layer)}
                values[layer] = self.divergence(blocks, -1)
            order.append(min(rest, key=values.__getitem__))
            path.append(values[order[-1]])
        return order, path


def js(u_logits: Tensor, v_logits: Tensor) -> Tensor:
    """KL(u||m)/2 + KL(v||m)/2 per token, m = (u+v)/2, 1e-10 added inside each KL."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        p, q = p + 1e-10, q + 1e-10
        return (p * (p / q).log()).sum(dim=-1)

    u, v = u_logits.softmax(dim=-1), v_logits.softmax(dim=-1)
    m = (u + v) / 2
    return (kl(u, m) + kl(v, m)) / 2


@pytest.fixture(scope="module")
def brute_force(published: Path) -> BruteForce:
    found = BruteForce(Original(published), [encode(text) for text in TEXTS])
    assert all(len(gates) == CONFIG["n_routed_experts"] for gates in found.gates.values())
    return found


@pytest.mark.parametrize("num_routed", [0, 3])
def test_condensing_is_what_the_paper_defines(
    num_routed: int, condense_published: Callable, brute_force: BruteForce, tmp_path: Path
) -> None:
    outcome = condense_published(f"condense.num_routed={num_routed}", "condense.num_layers=3")
    assert outcome.code == 0, outcome.text
    plan = json.loads((tmp_path / "job" / "plan.json").read_text())
    condensed = [edit for edit in plan["layers"] if edit["edit"] == "condense"]
    ours = {edit["index"]: edit for edit in (*condensed, *plan["searched"])}
    assert sorted(ours) == brute_force.original.moe

    for layer, edit in ours.items():
        experts, path = brute_force.choose_experts(layer, num_routed)
        assert edit["experts"] == experts
        gates = [brute_force.gates[layer][expert] for expert in experts]
        assert edit["gates"] == pytest.approx(gates, rel=1e-6)
        if num_routed:
            assert edit["divergence"] == pytest.approx(path, rel=1e-6)

    experts = {layer: edit["experts"] for layer, edit in ours.items()}
    order, path = brute_force.choose_layers(experts, 3)
    assert plan["layer_order"] == order
    assert plan["layer_divergence"] == pytest.approx(path, rel=1e-6)
    assert sorted(order) == [edit["index"] for edit in condensed]

    blocks = {layer: brute_force.block(layer, experts[layer]) for layer in order}
    # Without routed experts it is much narrower than the one width that the family can say.
    assert outcome.report["compressed/stock"] == (num_routed == 3)
    which, folder = "stock" if num_routed else "ours", outcome.report["compressed/checkpoint"]
    found = in_fresh_process(Path(folder), tmp_path / "out", which)
    for text, ids in enumerate(brute_force.documents):
        expected = brute_force.original.logits(ids, blocks)
        logits = found[f"{text}.logits"].double()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert found[f"{text}.ids"].tolist() == ids
