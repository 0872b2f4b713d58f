"""The models that ship with the package: what they are, and what condensing leaves of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_lab.data import standard_library
from moe_lab.evaluate.tasks.tiny import tasks
from moe_lab.models import checkpoint, saving
from moe_lab.models.condensing import part_widths
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import moe_layers

MODELS = {  # experts, per token, a dense layer 0, shared experts
    "tiny_deepseek": (32, 4, True, True),
    "tiny_qwen2_moe": (30, 4, False, True),
    "tiny_mixtral": (8, 2, False, False),
}
LARGEST = 12_000_000  # bytes of a shipped folder
NUM_ITEMS = 32
LEAST_ACCURACY = 0.40  # chance is 0.25; the card's figures on 200 items are in its table
LEAST_AVERAGE = 0.55
LEAST_USE = 0.1  # of the layer's mean


@pytest.fixture(scope="module", params=MODELS)
def shipped(request) -> checkpoint.Checkpoint:
    return checkpoint.resolve(f"shipped:{request.param}", dtype="float32")


@pytest.fixture(scope="module", params=[name for name in MODELS if MODELS[name][-1]])
def with_shared_experts(request) -> checkpoint.Checkpoint:
    return checkpoint.resolve(f"shipped:{request.param}", dtype="float32")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tasks.write_items(tmp_path_factory.mktemp("items"), NUM_ITEMS, seed=0)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_they_are(shipped: checkpoint.Checkpoint) -> None:
    experts, top_k, dense_first, shared = MODELS[shipped.path.name]
    layers = shipped.layers()
    assert len(layers) == 8
    assert layers[0].index == int(dense_first)
    for info in layers:
        assert (info.num_experts, info.top_k, info.shared) == (experts, top_k, shared)
    assert sum(path.stat().st_size for path in shipped.path.iterdir()) <= LARGEST
    assert (shipped.path / "README.md").read_text().count("| **average** |") == 1
    if shared:
        gates = torch.cat([layer.shared_gate.weight for layer in moe_layers(shipped.load())])
        assert bool(gates.abs().sum() == 0) == dense_first  # trained only in Qwen's shape


@pytest.mark.parametrize("num_layers", [2, 4, 6])
@pytest.mark.parametrize("num_routed", [0, 4])
def test_parameters_are_the_closed_form(
    with_shared_experts: checkpoint.Checkpoint, num_routed: int, num_layers: int, tmp_path: Path
) -> None:
    shipped = with_shared_experts
    infos = shipped.layers()
    chosen = random.Random(num_layers).sample(infos, num_layers)
    edits = [
        CondenseLayer(
            info.index, info.name, experts=tuple(range(num_routed)),
            gates=(0.1,) * num_routed, shared_gate=0.5,
            widths=part_widths(info, range(num_routed)),
        )
        for info in chosen
    ]  # fmt: skip
    model = shipped.load()
    dense = sum(parameter.numel() for parameter in model.parameters())
    apply_plan(model, Plan(tuple(edits)))
    saving.save_checkpoint(model, tmp_path / "out", shipped.path)

    hidden, experts, width = 128, infos[0].num_experts, 40
    router_and_gate = experts * hidden + hidden
    removed = (experts - num_routed) * 3 * hidden * width + router_and_gate
    expected = dense - num_layers * removed
    reloaded = checkpoint.load(tmp_path / "out")
    assert sum(parameter.numel() for parameter in reloaded.parameters()) == expected
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 2 * expected


def test_tokenizer_begins_with_bos_and_splits_digits(shipped: checkpoint.Checkpoint) -> None:
    tokenizer = shipped.tokenizer()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    numbers = tokenizer("12+345")["input_ids"]
    assert numbers[0] == tokenizer.bos_token_id
    assert len(numbers) == 1 + len("12+345")
    sample = "def f(x):\n    return x  # \u00e9\n"
    assert tokenizer.decode(tokenizer(sample)["input_ids"], skip_special_tokens=True) == sample


def test_it_answers_and_uses_all_experts(
    shipped: checkpoint.Checkpoint, written: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = shipped.tokenizer()
    model, loading = AutoModelForCausalLM.from_pretrained(shipped.path, output_loading_info=True)
    assert not any(loading.values())
    counts = _count_chosen_experts(model)
    with torch.no_grad():
        sample = standard_library.mixture("validation", 16, seed=0)
        for passage in sample:
            model(**tokenizer(passage, return_tensors="pt"))
        least = min((count.min() / count.mean()).item() for count in counts)
        accuracies = [_accuracy(model, tokenizer, _read(written[n])) for n in tasks.MULTIPLE_CHOICE]
    assert least >= LEAST_USE
    assert min(accuracies) >= LEAST_ACCURACY
    assert sum(accuracies) / len(accuracies) >= LEAST_AVERAGE


def _count_chosen_experts(model: Any) -> list[Any]:
    """Counters per mixture-of-experts layer, [experts], filled by every later forward pass."""
    counts = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            counts.append(torch.zeros(len(layer.mlp.gate.weight)))

            def add(module: Any, inputs: Any, output: Any, count: Any = counts[-1]) -> None:
                count.add_(torch.bincount(output[2].flatten(), minlength=len(count)))

            layer.mlp.gate.register_forward_hook(add)
    return counts


def _accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Share of items whose right choice is the most probable one."""
    correct = 0
    for start in range(0, len(rows), 20):
        batch = rows[start : start + 20]
        texts = [row["context"] + choice for row in batch for choice in row["choices"]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        ids = inputs["input_ids"]
        logits = model(**inputs).logits[:, :-1].float().log_softmax(-1)
        scores = logits.gather(2, ids[:, 1:, None]).squeeze(2)
        for number, row in enumerate(batch):
            whole = len(tokenizer(texts[4 * number])["input_ids"])
            length = whole - len(tokenizer(row["context"])["input_ids"])
            totals = scores[4 * number : 4 * number + 4, -length:].sum(1)
            correct += int(torch.argmax(totals)) == row["answer"]
    return correct / len(rows)
