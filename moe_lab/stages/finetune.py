"""Finetune: a short loop on accelerate that resumes where it was stopped.

Not the Hugging Face Trainer: in transformers 5.23 its resume restores attention but not fused
experts, with no more than a warning.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_lab import moe, observing, saving
from moe_lab.checkpoint import Checkpoint
from moe_lab.compute import Compute
from moe_lab.data import Tokens
from moe_lab.progress import progress
from moe_lab.saving import save
from moe_lab.store import Artifact, Store, code_version
from moe_lab.types import Plan, UserError

STATE = "training_state.safetensors"


def finetune(
    store: Store,
    compressed: Checkpoint,
    plan: Artifact,
    recipe: Any,
    options: dict[str, Any],
    tokens: dict[str, Tokens],
    seed: int,
    compute: Compute,
) -> Artifact:
    """A folder with checkpoint/, form.json, curve.jsonl and trainable.json.

    tokens: "data" to train on and "validation"; options: the recipe's composed config.
    """
    identity = {
        "checkpoint": compressed.fingerprint,
        "dtype": compressed.dtype,
        "plan": plan.key,
        "recipe": options,
        "data": {name: part.fingerprint for name, part in tokens.items()},
        "seed": seed,
        "code": code_version(finetune, recipe, moe, observing, saving),
    }

    def make(folder: Path) -> None:
        model = compressed.load(compute.device)
        edits = Plan.load(plan.folder / "plan.json")
        Training(model, edits, recipe, tokens, seed, compute, folder).run()
        stock = save(model.cpu(), folder / "checkpoint", compressed.path)
        (folder / "form.json").write_text(json.dumps({"stock": stock}) + "\n")
        (folder / STATE).unlink(missing_ok=True)

    return store.get("finetune", identity, make)


class Training:
    """One fine-tuning of a loaded model, whose state lies in `folder` from time to time."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        recipe: Any,
        tokens: dict[str, Tokens],
        seed: int,
        compute: Compute,
        folder: Path,
    ):
        self.recipe, self.tokens, self.seed, self.folder = recipe, tokens, seed, folder
        self.compute = compute
        model.requires_grad_(False)
        self.trainable = recipe.trainable(model, plan)
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)
        # Experts computed in a sorted loop: eager's backward pass is quadratic in their number.
        model.set_experts_implementation(observing.OBSERVING)
        self.accelerator = Accelerator(cpu=compute.device == "cpu")
        optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        per_epoch = -(-len(tokens["data"].samples) // recipe.batch_size)
        self.num_steps = recipe.epochs * per_epoch
        self.save_every = max(50, self.num_steps // 10)

    def run(self) -> None:
        """Train from the last saved state, or from the start, to the end."""
        start = self._resume()
        self._write_trainable()
        steps = itertools.islice(enumerate(self._batches()), start, self.num_steps)
        for step, batch in progress(steps, "finetune", self.num_steps - start):
            row = {"step": step + 1} | self._step(step, batch)
            if (step + 1) % self.recipe.validate_every == 0 or step + 1 == self.num_steps:
                row["validation_loss"] = self._validate()
            self._log(row)
            if (step + 1) % self.save_every == 0:
                self._save(step + 1)
        for parameter in self.trainable.values():
            parameter.requires_grad_(False)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        for epoch in itertools.count():
            samples = self.tokens["data"].shuffled(self.seed * 1000 + epoch)
            for start in range(0, len(samples.samples), self.recipe.batch_size):
                yield samples.pad(samples.samples[start : start + self.recipe.batch_size])

    def _step(self, step: int, batch: dict[str, Tensor]) -> dict[str, float]:
        rate = self.recipe.learning_rate * self.recipe.rate(step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
        loss = self.recipe.loss(self.model, batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"fine-tuning diverged: the loss is {loss.item()} at step {step + 1}; try a lower "
                f"finetune.learning_rate than {self.recipe.learning_rate}"
            )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.trainable.values(), self.recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "learning_rate": rate}

    @torch.inference_mode()
    def _validate(self) -> float:
        total = count = 0.0
        tokens = self.tokens["validation"]
        for batch in tokens.batches(self.compute.batch_size, self.compute.device):
            targets = int(batch["attention_mask"][:, 1:].sum())
            total += self.recipe.loss(self.model, batch).item() * targets
            count += targets
        return total / count

    def _log(self, row: dict[str, float]) -> None:
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _write_trainable(self) -> None:
        shapes = {name: list(parameter.shape) for name, parameter in self.trainable.items()}
        number = sum(parameter.numel() for parameter in self.trainable.values())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        values = {"parameters": number, "share": number / total, "tensors": shapes}
        (self.folder / "trainable.json").write_text(json.dumps(values, indent=1) + "\n")

    def _save(self, step: int) -> None:
        tensors = {"step": torch.tensor([step])}
        for name, parameter in self.trainable.items():
            tensors[f"{name}/weight"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value
        partial = self.folder / f"{STATE}.partial"
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        partial.replace(self.folder / STATE)

    def _resume(self) -> int:
        """The step to go on from, with weights and moments restored; the curve cut to it."""
        path, curve = self.folder / STATE, self.folder / "curve.jsonl"
        state = load_file(path) if path.is_file() else {}
        start = int(state["step"]) if state else 0
        rows = curve.read_text().splitlines()[:start] if curve.is_file() else []
        curve.write_text("".join(f"{row}\n" for row in rows))
        for name, parameter in self.trainable.items() if state else ():
            parameter.data.copy_(state[f"{name}/weight"])
            keys = [key for key in state if key.startswith(f"{name}/") and key != f"{name}/weight"]
            self.optimizer.state[parameter] = {key.rpartition("/")[2]: state[key] for key in keys}
        return start
