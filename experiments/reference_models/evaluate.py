"""Measure a trained reference model: losses, expert usage, task scores, reaction to pruning.

python experiments/reference_models/evaluate.py --model FOLDER --output FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from token_rows import mixed_batch, rows_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trigram import Trigram

from moe_lab.data import standard_library
from moe_lab.evaluate.tasks.tiny import tasks
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import restricted

ROW_LENGTH = 256
VALIDATION_ROWS = 48  # per domain
USAGE_ROWS = 200
PRUNED_SHARE = 0.5
DRAWS = 3
NUM_ITEMS = 200
BATCH_SIZE = 64


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router of every mixture-of-experts layer."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def without_experts(model: PreTrainedModel, seed: int) -> AbstractContextManager:
    """Prune a random half of the routed experts of every layer while the context is open."""
    generator = random.Random(f"pruned/{seed}")
    kept = {}
    for layer in moe_layers(model):
        experts = layer.info.num_experts
        gone = generator.sample(range(experts), int(PRUNED_SHARE * experts))
        kept[layer.info.index] = [expert for expert in range(experts) if expert not in gone]
    return restricted(model, kept)


@torch.no_grad()
def losses(model: PreTrainedModel, rows: dict[str, Tensor]) -> dict[str, float]:
    """Cross entropy per domain in nats per token, and overall by `text.MIXTURE`."""
    found = {}
    for domain, held_out in rows.items():
        batches = []
        for batch in held_out.split(16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            batches.append(nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten()))
        found[domain] = torch.stack(batches).mean().item()
    found["overall"] = overall(found)
    return found


def overall(by_domain: dict[str, float]) -> float:
    """Mean over domains weighted by their share in training."""
    return sum(share * by_domain[domain] for domain, share in standard_library.MIXTURE.items())


@torch.no_grad()
def expert_usage(model: PreTrainedModel, rows: Tensor) -> list[float]:
    """Per layer the least used expert's share of the mean use, on rows [count, length]."""
    counts = [torch.zeros(router.weight.size(0)) for router in routers(model)]
    handles = []
    for router, count in zip(routers(model), counts, strict=True):
        handles.append(router.register_forward_hook(_counting(count)))
    for batch in rows.split(16):
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [(count.min() / count.mean()).item() for count in counts]


def _counting(count: Tensor) -> Any:
    def add(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        count.add_(torch.bincount(output[2].flatten(), minlength=count.numel()))

    return add


def task_scores(model: PreTrainedModel, tokenizer: Any, num_items: int) -> dict[str, float]:
    """Percent correct per multiple-choice task and bits per byte per perplexity task."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        tasks.write_items(Path(folder), num_items)
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
            tasks=tasks.configs(Path(folder)),
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
        )["results"]
    scores = {name: 100 * results[name]["acc,none"] for name in tasks.MULTIPLE_CHOICE}
    scores["average"] = sum(scores.values()) / len(scores)
    bits = {name: results[name]["bits_per_byte,none"] for name in tasks.PERPLEXITY_TASKS}
    return {**scores, **bits}


def trigram_losses(tokenizer: Any, rows: dict[str, Tensor], vocabulary: int) -> dict[str, float]:
    """Losses of an interpolated trigram model of the training split, its weights tuned on rows."""
    trigram = Trigram(vocabulary)
    for domain, stream in rows_of(tokenizer, "train", ROW_LENGTH, seed=0).items():
        trigram.add(stream.epoch(), standard_library.MIXTURE[domain])
    found = trigram.losses(rows)
    found["overall"] = overall(found)
    return found


def measure(folder: str, num_items: int) -> dict[str, Any]:
    """Everything the model card reports about the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    streams = rows_of(tokenizer, "validation", ROW_LENGTH, seed=0)
    rows = {domain: stream.take(VALIDATION_ROWS) for domain, stream in streams.items()}
    sample = mixed_batch(
        rows_of(tokenizer, "train", ROW_LENGTH, seed=1), USAGE_ROWS, random.Random(0)
    )
    report: dict[str, Any] = {
        "validation_loss": losses(model, rows),
        "trigram_loss": trigram_losses(tokenizer, rows, len(tokenizer)),
        "least_used_expert": expert_usage(model, sample),
        "dense": task_scores(model, tokenizer, num_items),
        "pruned": [],
    }
    print(json.dumps(report, indent=2), flush=True)
    for seed in range(DRAWS):
        with without_experts(model, seed):
            report["pruned"].append(task_scores(model, tokenizer, num_items))
    report["drop"] = {
        name: score - sum(pruned[name] for pruned in report["pruned"]) / DRAWS
        for name, score in report["dense"].items()
    }
    return report


def main() -> None:
    """Command line: a model folder and a file for the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--items", type=int, default=NUM_ITEMS)
    arguments = parser.parse_args()
    report = measure(arguments.model, arguments.items)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: report[name] for name in ("dense", "pruned", "drop")}, indent=2))


if __name__ == "__main__":
    main()
