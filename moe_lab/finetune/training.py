"""The training loop: short, on accelerate, and resumed where it was stopped.

Not the Hugging Face Trainer: in transformers 5.23 its resume restores attention but not fused
experts, with no more than a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_lab import processes, stopping
from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.files import CURVE, TRAINABLE
from moe_lab.finetune import sharding
from moe_lab.finetune.recipe import Phase, Recipe, sources
from moe_lab.finetune.state import WEIGHT, SavedState, read_state, write_state
from moe_lab.finetune.teacher import Teacher
from moe_lab.finetune.tuning import OVER_TARGETS
from moe_lab.finite import number_word
from moe_lab.models.checkpoint import Model
from moe_lab.models.edits.plan import Plan
from moe_lab.models.grouped import GROUPED_EXPERTS, widen_but_experts
from moe_lab.models.layers import num_parameters
from moe_lab.progress import progress
from moe_lab.types import NotFinite, UserError

logger = logging.getLogger(__name__)
STATE = "training_state.safetensors"
TUNING = "tuning:"  # before the names of a recipe's own state


class Training:
    """One fine-tuning of a loaded model, whose state lies in `folder` from time to time.

    Steps are counted through all phases. A step's gradient is that of the mean loss over all its
    targets, however they are spread over forwards and processes.
    divided: whether the processes share the decoder layers (compute.sharding). Such a training
    leaves its state and no model; one that goes on from it alone makes that.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        recipe: Recipe,
        tokens: dict[str, Tokens],
        seed: int,
        compute: Compute,
        folder: Path,
        teacher: Teacher | None = None,
        log: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.teacher, self.log = teacher, log
        self.recipe, self.tokens, self.seed, self.folder = recipe, tokens, seed, folder
        self.device = torch.device(compute.device)
        self.divided = compute.sharding == "fsdp" and processes.number() > 1
        self.eval_batch_size = compute.batch_size
        whole: Any = model  # transformers' `to` has types that it does not take
        self.model: Model = (whole if self.divided else whole.to(self.device)).requires_grad_(False)
        self.tuning = recipe.prepare(model, plan)
        for parameter in self.tuning.trainable.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if recipe.dtype == "float32":
            widen_but_experts(model)
        if self.divided:
            self.tuning.trainable = sharding.shard(model, self.tuning.trainable, self.device)
        self.trainable = self.tuning.trainable
        # Eager's backward pass is quadratic in their number.
        model.set_experts_implementation(GROUPED_EXPERTS)
        if recipe.gradient_checkpointing:
            checkpoint_trained_layers(model)
        self.steps_of = {
            name: phase.steps(len(tokens[f"{name}/data"].samples))
            for name, phase in recipe.phases.items()
        }
        self.num_steps = sum(self.steps_of.values())
        self.save_every = max(50, self.num_steps // 10)
        self.done = self.num_tokens = 0
        self.curve: list[str] = []  # its rows so far, as they stand in the file
        self.epoch: tuple[tuple[str, int], Tokens] | None = None

    def run(self) -> None:
        """Train from the last saved state, or from the start, to the end."""
        state = self._resume()
        self._write_trainable()
        first = 0
        for name, num_steps in self.steps_of.items():
            if self.done < first + num_steps:
                self._run_phase(name, first, state)
            first += num_steps
        if not self.divided:
            self.tuning.finish()
            self.model.requires_grad_(False)

    def _run_phase(self, name: str, first: int, state: Mapping[str, Tensor]) -> None:
        phase = self.recipe.phases[name]
        optimizer = self._optimizer(phase)
        if self.done > first:
            self._restore(optimizer, state)
        else:
            self._log({"phase": name, "step": first} | self._validation(name))
        last = first + self.steps_of[name]
        for step in progress(range(self.done, last), f"finetune {name}", last - self.done):
            # A signal waits for the step's end, so that the state it leaves is one of a whole step.
            with stopping.hold():
                row = {"phase": name, "step": step + 1}
                self.tuning.before_step(step, self.num_steps)
                row |= self._step(name, step - first, optimizer)
                row |= self.tuning.after_step(step, self.num_steps)
                if (step + 1) % self.recipe.validate_every == 0 or step + 1 == last:
                    row |= self._validation(name)
                self._log(row)
                self.done = step + 1
                ends = self.divided and self.done == self.num_steps
                if _all_stop() or ends or self.done % self.save_every == 0:
                    self._save(optimizer)
            stopping.check()

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        # Decay pulls towards 0: right for weights, wrong for vectors of factors around 1.
        groups = [
            {"params": parameters, "weight_decay": phase.weight_decay if matrices else 0.0}
            for matrices in (True, False)
            for divided in (True, False)  # no operation takes both kinds
            if (parameters := self._trained(matrices, divided))
        ]
        return torch.optim.AdamW(groups, lr=phase.learning_rate)

    def _trained(self, matrices: bool, divided: bool) -> list[nn.Parameter]:
        return [
            parameter
            for parameter in self.trainable.values()
            if (parameter.dim() > 1) is matrices and sharding.is_divided(parameter) is divided
        ]

    def _step(self, name: str, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """One update at a step counted from the phase's start; what it was like."""
        phase = self.recipe.phases[name]
        rate = phase.learning_rate * phase.rate(step, self.steps_of[name])
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = self._rows(name, step)
        losses = {
            key: value.item() for key, value in self._backward(rows, phase.batch_size).items()
        }
        for key, value in losses.items():
            self._check(value, f"the {key}", name, rows)
        norm = self._clip()
        self._check(norm, "the norm of the gradient", name, rows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.num_tokens += rows.num_tokens
        return {
            "tokens": self.num_tokens,
            **losses,
            "learning_rate": rate,
            "gradient_norm": norm,
        }

    def _check(
        self, value: float, what: str, name: str, rows: Tokens, source: str = "data"
    ) -> None:
        """Refuse a number of a step or a validation that is not finite, before it moves a weight.

        Before the first step nothing was trained: then the model is to blame, or its text.
        """
        if math.isfinite(value):
            return
        told = f"{what} is {number_word(value)} after {self.done} steps, in phase {name}"
        if document := self._first_document(name, rows, source):
            told += f", first at {document}"
        if self.done == 0:
            raise NotFinite(f"fine-tuning cannot begin: {told}")
        rate = self.recipe.phases[name].learning_rate
        raise UserError(
            f"fine-tuning diverged: {told}; try a lower finetune.phases.{name}.learning_rate than "
            f"{rate}"
        )

    def _clip(self) -> float:
        parameters, most = self.trainable.values(), self.recipe.gradient_clip
        if self.divided:
            return sharding.clip(parameters, most)
        return nn.utils.clip_grad_norm_(parameters, most).item()

    @torch.no_grad()
    def _first_document(self, name: str, rows: Tokens, source: str) -> str | None:
        """The first of these samples whose own losses are not finite, in words.

        Of all processes: each looks at its share, and what it finds there first.
        """
        found = len(rows.samples)
        for number, (one, counts) in enumerate(self._forwards(rows, 1)):
            losses = self._mean_losses(one, one, counts).values()
            if counts and not all(math.isfinite(loss) for loss in losses):
                found = min(found, processes.index() + number * processes.number())
        found = min(processes.gather(found))
        if found == len(rows.samples):
            return None
        samples = self.tokens[f"{name}/{source}"].samples
        number = samples.index(rows.samples[found])
        return f"document {number} of finetune.phases.{name}.{source}"

    def _rows(self, name: str, step: int) -> Tokens:
        """The samples of one step of a phase, over all processes."""
        data, size = self.tokens[f"{name}/data"], self.recipe.phases[name].step_size
        epoch, number = divmod(step, -(-len(data.samples) // size))
        if self.epoch is None or self.epoch[0] != (name, epoch):
            self.epoch = (name, epoch), data.shuffled(self.seed * 1000 + epoch)
        return self.epoch[1].take(range(len(data.samples))[number * size : (number + 1) * size])

    def _backward(self, rows: Tokens, batch_size: int) -> dict[str, Tensor]:
        """Add up the gradients of the mean losses over `rows`, and give those means."""
        means: dict[str, Tensor] = {}
        for part, counts in self._forwards(rows, batch_size):
            losses = self._mean_losses(part, rows, counts)
            weights = {"loss": 1.0} | self.tuning.weights
            total = sum(weights[key] * loss for key, loss in losses.items() if weights[key])
            cast(Tensor, total).backward()  # some loss counts
            for key, loss in losses.items():
                means[key] = means.get(key, 0.0) + loss.detach()
        if processes.number() == 1:
            return means
        for parameter in self.trainable.values():
            if not sharding.is_divided(parameter):
                gradient = parameter.grad
                parameter.grad = processes.total(
                    torch.zeros_like(parameter) if gradient is None else gradient
                )
        names = {"loss": 1.0} | self.tuning.weights  # also where this process had no row
        zero = torch.zeros((), device=self.device)
        return {name: processes.total(means.get(name, zero).clone()) for name in names}

    def _forwards(self, rows: Tokens, batch_size: int) -> Iterator[tuple[Tokens, bool]]:
        """This process's samples of `rows`, forward by forward, and whether they count.

        Where layers are divided, all processes go forward equally often, some of them perhaps with
        a sample that is another's.
        """
        mine = rows.take(processes.share(range(len(rows.samples))))
        starts = range(0, len(mine.samples), batch_size)
        for start in starts:
            yield mine.take(range(len(mine.samples))[start : start + batch_size]), True
        largest = math.ceil(len(rows.samples) / processes.number())
        most = math.ceil(largest / batch_size)
        for _ in range(most - len(starts) if self.divided else 0):
            yield rows.take([0]), False

    def _mean_losses(self, part: Tokens, whole: Tokens, counts: bool = True) -> dict[str, Tensor]:
        """What `part` adds to the means of the losses over `whole`; if it counts, else nothing."""
        batch = part.labelled() | (self.teacher.of(part) if self.teacher else {})
        batch = {key: value.to(self.device) for key, value in batch.items()}
        self.tuning.counts = counts
        with self._computing():
            sums = self.tuning.losses(batch)
        number = dict.fromkeys(OVER_TARGETS, whole.num_targets)
        share = 1.0 if counts else 0.0
        return {
            key: share * value / number.get(key, whole.num_tokens) for key, value in sums.items()
        }

    def _computing(self) -> contextlib.AbstractContextManager[object]:
        if self.recipe.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.recipe.dtype))

    @torch.no_grad()
    def _validation(self, name: str) -> dict[str, float]:
        """The mean losses over the phase's validation text, where it has one."""
        tokens = self.tokens.get(f"{name}/validation")
        if tokens is None:
            return {}
        self.tuning.before_validation()
        ordered = tokens.by_length()
        sums = {
            key: torch.zeros((), dtype=torch.float64, device=self.device)
            for key in ("loss", *self.tuning.weights)
        }
        for part, counts in self._forwards(ordered, self.eval_batch_size):
            for key, value in self._mean_losses(part, ordered, counts).items():
                sums[key] += value
        means = {key: processes.total(value).item() for key, value in sums.items()}
        for key, mean in means.items():
            self._check(mean, f"the validation's {key}", name, tokens, "validation")
        return {f"validation_{key}": mean for key, mean in means.items()}

    def _log(self, row: dict[str, Any]) -> None:
        self.curve.append(json.dumps(row) + "\n")
        if processes.is_main():
            with (self.folder / CURVE).open("a") as file:
                file.write(self.curve[-1])
            if self.log:
                self.log(row)

    def _write_trainable(self) -> None:
        shapes = {name: list(parameter.shape) for name, parameter in self.trainable.items()}
        number = sum(parameter.numel() for parameter in self.trainable.values())
        total = num_parameters(self.model)
        texts = {
            name: list(source.sources()) for name, source in sources(self.recipe.phases).items()
        }
        values = {"parameters": number, "share": number / total, "texts": texts, "tensors": shapes}
        if processes.is_main():
            logger.info(
                "fine-tuning trains %s of %s parameters (%.2f %%)",
                f"{number:,}", f"{total:,}", 100 * number / total,
            )  # fmt: skip
            (self.folder / TRAINABLE).write_text(json.dumps(values, indent=1) + "\n")

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        curve = torch.frombuffer(bytearray("".join(self.curve).encode()), dtype=torch.uint8)
        counts = {"done": self.done, "num_tokens": self.num_tokens}
        tensors = {CURVE: curve} | {name: torch.tensor(count) for name, count in counts.items()}
        tensors |= {f"{TUNING}{name}": value for name, value in self.tuning.state().items()}
        for name, parameter in self.trainable.items():
            tensors[f"{name}{WEIGHT}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value
        write_state(tensors, self.folder / STATE)

    def _resume(self) -> Mapping[str, Tensor]:
        """The last saved state, with its weights, counts and curve restored.

        One that cannot be read whole is none: warned of, and training starts over.
        """
        state = self._saved()
        for name in ("done", "num_tokens") if state else ():
            setattr(self, name, int(state[name]))
        if state:
            self.curve = state[CURVE].numpy().tobytes().decode().splitlines(keepends=True)
        for name, parameter in self.trainable.items() if state else ():
            sharding.put(parameter.data, state[f"{name}{WEIGHT}"])
        if state:
            mark = len(TUNING)
            kept = {key[mark:]: state[key] for key in state if key.startswith(TUNING)}
            self.tuning.restore(kept)
        if processes.is_main():
            (self.folder / CURVE).write_text("".join(self.curve))
        return state

    def _saved(self) -> Mapping[str, Tensor]:
        """What lies in the folder, if it is whole: the main process looks."""
        path = self.folder / STATE
        whole = False
        try:
            whole = processes.is_main() and path.is_file() and bool(read_state(path))
        except ValueError as error:
            logger.warning("%s cannot be read (%s): fine-tuning starts over", path, error)
        return SavedState(path) if processes.broadcast(whole) else {}

    def _restore(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainable.items():
            keys = [key.rpartition("/")[2] for key in state if key.startswith(f"{name}/")]
            optimizer.state[parameter] = {
                key: _like(parameter, state[f"{name}/{key}"], key)
                for key in keys
                if key != "weight"
            }


def _like(parameter: nn.Parameter, saved: Tensor, key: str) -> Tensor:
    """A part of the optimizer's state, where its parameter is, and divided as that."""
    if key == "step":
        return saved
    value = torch.zeros_like(parameter, dtype=saved.dtype)
    sharding.put(value, saved)
    return value


def _all_stop() -> bool:
    """Whether a signal has come to one of the processes: then all stop, behind the same step."""
    asked = [number for number in processes.gather(stopping.number_asked()) if number is not None]
    if asked and not stopping.asked():
        stopping.ask(asked[0])
    return bool(asked)


def checkpoint_trained_layers(model: Model) -> None:
    """Compute activations again in the backward pass, from the first layer that trains on.

    Layers below it are part of no graph. Only the layers themselves are told that they train:
    dropout and the like stay as in evaluation.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} cannot compute its activations again: set "
            "finetune.gradient_checkpointing=false"
        )
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # enabled by the line above, a graph through all layers
    trains = False
    for name, module in model.named_modules():
        if name.rpartition(".")[2].isdigit() and hasattr(module, "_gradient_checkpointing_func"):
            trains = trains or any(p.requires_grad for p in module.parameters())
            module.training = trains
