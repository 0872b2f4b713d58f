"""What stock transformers makes of checkpoints: run as a file, in a process without moe_lab.

`python in_transformers.py JOBS ANSWERS`: a job a line, an answer a line, written as soon as it is
known. Nothing of moe_lab is imported here; what computes the reference uses `continued`, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def continued(model: Any, ids: list[int], new_tokens: int) -> Tensor:
    """The logprobs [T, V] of each of the next tokens behind a prompt, decoded greedily."""
    found, row = [], torch.tensor([ids])
    for _ in range(new_tokens):
        logits = model(input_ids=row, use_cache=False).logits[0, -1]
        found.append(logits.double().log_softmax(-1))
        row = torch.cat([row, found[-1].argmax()[None, None]], dim=1)
    return torch.stack(found)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """The next-token logprobs of each prompt, and the tokens that greedy decoding adds to it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, local_files_only=True
    ).eval()
    steps = [continued(model, ids, job["new_tokens"]) for ids in job["prompts"]]
    best = [one[0].topk(job["top"]) for one in steps]
    return {
        "top": [list(zip(one.indices.tolist(), one.values.tolist(), strict=True)) for one in best],
        "tokens": [one.argmax(-1).tolist() for one in steps],
    }


def main(jobs: Path, answers: Path) -> None:
    """Answer the jobs in turn."""
    from transformers import AutoModelForCausalLM as _  # noqa: F401  # without it, no answer

    torch.set_num_threads(1)
    assert "moe_lab" not in sys.modules
    with answers.open("a") as file:
        file.write('{"ready": true}\n')
    for line in jobs.read_text().splitlines():
        job = json.loads(line)
        try:
            reply = _answer(job)
        except Exception as error:  # noqa: BLE001  # every refusal is an answer
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        with answers.open("a") as file:
            file.write(json.dumps({"id": job["id"]} | reply) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
