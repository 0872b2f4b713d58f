"""Seconds that vLLM takes for random prompts: run as a file by the Python that has vLLM.

`python vllm_script.py ASKED ANSWER`: two JSON files. Nothing of moe_lab is imported, and vLLM only
there: the two live in environments of their own. A run is a process, so that all memory that it
took is given back.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]


def seconds(
    generate: Generate,
    asked: Mapping[str, Any],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Of each round the seconds of a prefill, and of the decoding behind it.

    generate(prompts, number): lets the engine add so many tokens to each prompt, all at once, and
    says how many it has added to each. A round asks twice with the same prompts, for one token and
    for `output_tokens` more; the difference is the decoding. The first round warms up and does not
    count. Prompts are random token ids, the same for every checkpoint, others in each round.
    """
    draw = random.Random(asked["seed"])
    prefill, decode = [], []
    for number in range(asked["repeats"] + 1):
        prompts = [
            [draw.randrange(asked["vocabulary_size"]) for _ in range(asked["prompt_length"])]
            for _ in range(asked["requests"])
        ]
        taken = []
        for tokens in (1, asked["output_tokens"] + 1):
            started = clock()
            added = generate(prompts, tokens)
            taken.append(clock() - started)
            if added != [tokens] * len(prompts):
                raise RuntimeError(f"{tokens} tokens were asked for each prompt, and {added} came")
        if number:
            prefill.append(taken[0])
            decode.append(taken[1] - taken[0])
    return {"prefill": prefill, "decode": decode}


def time_in_vllm(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint takes in vLLM."""
    from vllm import LLM, SamplingParams

    given = {
        "model": asked["folder"],
        "dtype": asked["dtype"],
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # the second call of a round would find the first one's
        "max_model_len": asked["prompt_length"] + asked["output_tokens"] + 1,
        "max_num_seqs": asked["requests"],
        "seed": asked["seed"],
    }
    engine = LLM(**given | dict(asked["engine"]))

    def generate(prompts: list[list[int]], tokens: int) -> list[int]:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        texts = [{"prompt_token_ids": ids} for ids in prompts]
        made = engine.generate(texts, sampling, use_tqdm=False)
        return [len(one.outputs[0].token_ids) for one in made]

    return dict(seconds(generate, asked))


def cause_of(error: BaseException) -> str:
    """An error in one line: the one that it came from."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main(asked: Path, target: Path) -> None:
    """Write the answer, which is an error in words where vLLM refuses the checkpoint."""
    try:
        found = time_in_vllm(json.loads(asked.read_text()))
    except Exception as error:  # noqa: BLE001  # every refusal is an answer
        found = {"error": cause_of(error)}
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
