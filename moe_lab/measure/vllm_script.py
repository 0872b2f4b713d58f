"""Seconds that vLLM takes for random prompts: run as a file by the Python that has vLLM.

`python vllm_script.py ASKED ANSWER`: two JSON files. Nothing of moe_lab is imported, and vLLM only
there: the two live in environments of their own. A run is a process, so that all memory that it
took is given back.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# (prompts, number): the engine at work until each prompt has so many tokens more; after each of its
# steps how many each has.
Steps = Callable[[list[list[int]], int], Iterator[list[int]]]


def seconds(
    steps: Steps,
    asked: Mapping[str, Any],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Of each round the seconds of its prefill, and of a step of the decoding behind it.

    The prefill ends when every prompt has its first token; of `output_tokens` steps behind it the
    median counts, so that one that was held up changes nothing. The first round warms up and does
    not count. Prompts are random token ids, the same for every checkpoint, others in each round.
    """
    draw = random.Random(asked["seed"])
    prefill, decode, number = [], [], asked["output_tokens"] + 1
    for round_number in range(asked["repeats"] + 1):
        prompts = [
            [draw.randrange(asked["vocabulary_size"]) for _ in range(asked["prompt_length"])]
            for _ in range(asked["requests"])
        ]
        times = [clock()]  # then those at which every prompt had one token, two, ...
        for counts in steps(prompts, number):
            times += [clock()] * (min(counts) + 1 - len(times))
        if len(times) != number + 1:
            raise RuntimeError(f"{number} tokens were asked for each prompt, not {len(times) - 1}")
        if round_number:
            prefill.append(times[1] - times[0])
            waited = [later - time for time, later in itertools.pairwise(times[1:])]
            decode.append(statistics.median(waited))
    return {"prefill": prefill, "decode": decode}


def time_in_vllm(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint takes in vLLM."""
    from vllm import LLM, SamplingParams

    given = {
        "model": asked["folder"],
        "dtype": asked["dtype"],
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": asked["prompt_length"] + asked["output_tokens"] + 1,
        "max_num_seqs": asked["requests"],
        "max_num_batched_tokens": asked["requests"] * (asked["prompt_length"] + 1),  # in one step
        "seed": asked["seed"],
    }
    engine = LLM(**given | dict(asked["engine"])).llm_engine
    rounds = itertools.count()

    def steps(prompts: list[list[int]], number: int) -> Iterator[list[int]]:
        sampling = SamplingParams(
            temperature=0, max_tokens=number, ignore_eos=True, detokenize=False
        )
        round_number = next(rounds)
        counts = {f"{round_number}-{at}": 0 for at in range(len(prompts))}
        for name, ids in zip(counts, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        while engine.has_unfinished_requests():
            for one in engine.step():
                counts[one.request_id] = len(one.outputs[0].token_ids)
            yield list(counts.values())

    return dict(seconds(steps, asked))


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
