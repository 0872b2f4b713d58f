"""What the entropy term costs in a step of fine-tuning, against the same step without it.

CPU time of this process for one step (forwards, backward, update), both in alternation on the same
model and tokens; medians.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.finetune.recipe import Phase
from moe_lab.finetune.seer import Seer
from moe_lab.finetune.training import Training
from moe_lab.models import checkpoint
from moe_lab.models.edits.plan import Plan

LIMIT, ROUNDS = 1.1, 7
ROWS, LENGTH = 16, 128


def wide() -> PreTrainedModel:
    """A random Mixtral, small, with experts as wide as Mixtral's are for their hidden size."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return MixtralForCausalLM(config).eval()


def training(model: PreTrainedModel, entropy: float | None, folder: Path) -> Training:
    """One training of `model` whose loss has the entropy term, or (None) does not know of it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (ROWS, LENGTH), generator=generator).tolist()
    recipe = Seer(phases={"lm": Phase(None, batch_size=ROWS)}, top_k=None, entropy=entropy or 0.0)
    tokens = {"lm/data": Tokens(tuple(map(tuple, ids)), pad_id=0)}
    made = Training(model, Plan(()), recipe, tokens, 0, Compute("cpu"), folder)
    if entropy is None:
        made.tuning.entropy.close()
        made.tuning.losses = super(type(made.tuning), made.tuning).losses
        made.tuning.weights = {}
    return made


def seconds(made: Training, optimizer: torch.optim.Optimizer) -> float:
    """CPU time of a step."""
    started = time.process_time()
    made._step("lm", 0, optimizer)
    return time.process_time() - started


def main() -> None:
    """Print both for every model; exit 1 where the term costs more than the limit."""
    torch.set_num_threads(1)
    models = {
        "tiny_deepseek": lambda: checkpoint.load(
            checkpoint.resolve("shipped:tiny_deepseek").path, dtype="float32"
        ),
        "random Mixtral, hidden 256, 8 experts of 896": wide,
    }
    worst = 0.0
    for name, make in models.items():
        with tempfile.TemporaryDirectory() as folder:
            turns = [training(make(), entropy, Path(folder)) for entropy in (None, 0.1)]
            optimizers = [made._optimizer(made.recipe.phases["lm"]) for made in turns]
            found: list[list[float]] = [[], []]
            for number in range(ROUNDS + 1):
                for which in (0, 1) if number % 2 else (1, 0):
                    found[which].append(seconds(turns[which], optimizers[which]))
        plain, with_entropy = (statistics.median(times[1:]) for times in found)
        worst = max(worst, with_entropy / plain)
        print(f"{name}: {plain:.3f} s a step, {with_entropy:.3f} s with entropy: "
              f"{with_entropy / plain:.3f}x (limit {LIMIT})")  # fmt: skip
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
