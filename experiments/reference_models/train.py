"""Train the reference model: tokenizer, model and weights from the embedded text alone.

    python experiments/reference_models/train.py --output FOLDER [--settings tiny_deepseek.yaml]

Continues from the last checkpoint in FOLDER if there is one.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from padded_experts import install
from token_rows import mixed_batch, rows_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from moe_lab.data import standard_library

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def train_tokenizer(settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding of the training split; digits are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings["vocab_size"],
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(settings["characters"]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        add_bos_token=True,
        model_max_length=1024,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_texts(characters: dict[str, int]) -> list[str]:
    """Passages of every domain, drawn until their number of characters is reached."""
    chosen = []
    for domain, limit in characters.items():
        passages = standard_library.passages(domain, "train")
        random.Random(f"tokenizer/{domain}").shuffle(passages)
        taken = 0
        for passage in passages:
            if taken >= limit:
                break
            chosen.append(passage)
            taken += len(passage)
    return chosen


def build_model(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model; parameters with a name part of `fixed` are zero and not trained."""
    config = AutoConfig.for_model(
        **settings["model"],
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = settings["compute"]["attention"]
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if any(part in name for part in settings["fixed"]):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return model


class Balance:
    """Collects router outputs of a forward pass and gives the balance loss of each layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.outputs: list[tuple[Tensor, Tensor]] = []
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._collect)

    @torch.compiler.disable
    def _collect(self, module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        logits, _, chosen = output
        self.outputs.append((logits, chosen))

    def losses(self) -> Tensor:
        """Experts times the sum over experts of share chosen and mean probability, [layers].

        1 for an even load, as in Switch Transformers; taken layer by layer, since a mean over
        layers would let one layer's idle expert be made up for by another layer's.
        """
        losses = []
        for logits, chosen in self.outputs:
            experts = logits.size(-1)
            share = torch.bincount(chosen.reshape(-1), minlength=experts) / chosen.numel()
            probability = functional.softmax(logits.float(), dim=-1).mean(0)
            losses.append(experts * (share * probability).sum())
        self.outputs.clear()
        return torch.stack(losses)


class MasterWeights:
    """Single-precision copies that the optimizer updates; the model computes in `dtype`."""

    def __init__(self, model: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
        self.settings = settings
        self.working = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().clone().float() for p in self.working]
        matrices = [p for p in self.masters if p.dim() > 1]
        vectors = [p for p in self.masters if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings["weight_decay"]},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=tuple(settings["betas"]),
            fused=True,
        )
        model.to(dtype)

    def update(self, step: int) -> None:
        """One optimizer step with the gradients of the working weights."""
        for master, working in zip(self.masters, self.working, strict=True):
            master.grad = working.grad.float()
            working.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.settings["gradient_clip"])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.settings)
        self.optimizer.step()
        self.copy_to_model()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the master weights into the model."""
        for master, working in zip(self.masters, self.working, strict=True):
            working.copy_(master)


def learning_rate(step: int, settings: dict[str, Any]) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    peak, steps = settings["learning_rate"], settings["steps"]
    warmup = min(1.0, (step + 1) / settings["warmup_steps"])
    decay = min(1.0, (steps - step) / (settings["decay_share"] * steps))
    return peak * warmup * decay


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross entropy in nats per token of rows [count, length]."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, rows: dict[str, Tensor], balance: Balance) -> dict[str, float]:
    """Validation loss per domain in nats per token."""
    model.eval()
    losses = {}
    for domain, held_out in rows.items():
        batches = held_out.split(8)
        losses[domain] = sum(next_token_loss(model, batch).item() for batch in batches)
        losses[domain] /= len(batches)
    balance.outputs.clear()
    model.train()
    return losses


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    masters: MasterWeights,
    seconds: float,
) -> None:
    """Weights in the hub's layout (bfloat16), and what is needed to continue."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    state = {
        "step": step,
        "seconds": seconds,
        "masters": masters.masters,
        "optimizer": masters.optimizer.state_dict(),
    }
    torch.save(state, folder / "state.next")
    (folder / "state.next").replace(folder / "state.pt")


def restore(folder: Path, masters: MasterWeights) -> tuple[int, float]:
    """Steps done and seconds spent, (0, 0) without a checkpoint; sets weights and optimizer."""
    if not (folder / "state.pt").exists():
        return 0, 0.0
    state = torch.load(folder / "state.pt")
    for master, saved in zip(masters.masters, state["masters"], strict=True):
        master.copy_(saved)
    masters.optimizer.load_state_dict(state["optimizer"])
    masters.copy_to_model()
    return state["step"], state["seconds"]


def restore_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer that the checkpoint was trained with, None without a checkpoint."""
    if not (folder / "state.pt").exists():
        return None
    return PreTrainedTokenizerFast.from_pretrained(folder / "model")


def train(folder: Path, settings: dict[str, Any]) -> None:
    """Train into `folder`: model/ (weights, tokenizer), state.pt, log.jsonl."""
    training, seed = settings["training"], settings["seed"]
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = restore_tokenizer(folder) or train_tokenizer(settings["tokenizer"])
    model = build_model(settings, tokenizer)
    install(model, settings["compute"]["capacity_step"])
    dtype = getattr(torch, settings["compute"]["dtype"])
    balance, masters = Balance(model), MasterWeights(model, training, dtype)
    start, seconds = restore(folder, masters)
    streams = rows_of(tokenizer, "train", training["row_length"], seed + start)
    validation = rows_of(tokenizer, "validation", training["row_length"], seed)
    held_out = {name: rows.take(training["validation_rows"]) for name, rows in validation.items()}
    torch._dynamo.config.recompile_limit = 64  # every layer and mode is one variant
    compiled = torch.compile(model, dynamic=False)
    generator = random.Random(f"batches/{seed}/{start}")
    model.train()
    sums, began = torch.zeros(2), time.monotonic() - seconds
    with (folder / "log.jsonl").open("a", buffering=1) as log:
        for step in range(start, training["steps"]):
            rows = mixed_batch(streams, training["rows_per_step"], generator)
            loss = next_token_loss(compiled, rows)
            balances = balance.losses()
            (loss + training["balance_coefficient"] * balances.sum()).backward()
            masters.update(step)
            sums += torch.tensor([loss.item(), balances.max().item()])
            done, record = step + 1, {}
            if done % training["log_every"] == 0:
                mean = (sums / training["log_every"]).tolist()
                record = {"loss": mean[0], "balance_max": mean[1]}
                sums.zero_()
            if done % training["validate_every"] == 0 or done == training["steps"]:
                record["validation"] = validate(model, held_out, balance)
            seconds = time.monotonic() - began
            if record:
                print(json.dumps({"step": done, "seconds": round(seconds, 1), **record}), file=log)
            if done % training["checkpoint_every"] == 0 or done == training["steps"]:
                save(folder, done, model, tokenizer, masters, seconds)


def main() -> None:
    """Command line: an output folder and a settings file."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", type=Path, default=here / "tiny_deepseek.yaml")
    arguments = parser.parse_args()
    train(arguments.output, yaml.safe_load(arguments.settings.read_text()))


if __name__ == "__main__":
    main()
