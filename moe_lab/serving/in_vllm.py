"""What vLLM makes of checkpoints: run as a file by the Python of vLLM's own environment.

`python in_vllm.py JOBS ANSWERS`: a job a line, an answer a line, written as soon as it is known.
Nothing of moe_lab is imported here.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """The next-token logprobs of each prompt, and the tokens that greedy decoding adds to it."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, job["prompts"])) + job["new_tokens"]
    llm = LLM(
        model=job["folder"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=longest,
        max_num_seqs=len(job["prompts"]),
        max_logprobs=job["top"],
        seed=0,
        **job["options"],
    )
    asked = SamplingParams(
        temperature=0,
        max_tokens=job["new_tokens"],
        logprobs=job["top"],
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    made = [one.outputs[0] for one in llm.generate(prompts, asked, use_tqdm=False)]
    return {
        "top": [
            [[token, one.logprob] for token, one in (step.logprobs or [{}])[0].items()]
            for step in made
        ],
        "tokens": [list(step.token_ids) for step in made],
    }


def clean() -> None:
    """Give back what a model held, so that the next one can come in."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def words(error: BaseException) -> str:
    """An error in one line: what it came from, where it was wrapped; where, if it says nothing."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split()) or f"in {Path(last.filename).name}, {last.name}"
    return f"{type(error).__name__}: {said}"


def main(jobs: Path, answers: Path) -> None:
    """Answer the jobs in turn."""
    import vllm  # noqa: F401  # without it, no answer

    with answers.open("a") as file:
        file.write('{"ready": true}\n')
    for line in jobs.read_text().splitlines():
        job = json.loads(line)
        try:
            reply = _answer(job)
        except Exception as error:  # noqa: BLE001  # every refusal is an answer
            reply = {"error": words(error)}
        with answers.open("a") as file:
            file.write(json.dumps({"id": job["id"]} | reply) + "\n")
        clean()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
