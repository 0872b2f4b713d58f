"""What vLLM, with the plugin, makes of a case of `make_cases.py`; run with vLLM's Python.

    python plugins/vllm/tests/served.py FOLDER... [--tensor-parallel-size=2]

Prints a line for each, its name and JSON: the largest difference of the top-20 log-probabilities
along the greedy path, and how many greedy tokens agree; or the error with which it was refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

TOP = 20


def serve(folder: Path, **options: Any) -> Any:
    """vLLM on a case's checkpoint, in float32, without a tokenizer."""
    from vllm import LLM

    defaults: dict[str, Any] = {"enforce_eager": True}
    if "deepseek" in folder.name:
        # vLLM's rotary kernel for CPUs is wrong for latent attention, of dense models too.
        defaults["compilation_config"] = {"custom_ops": ["none"]}
    return LLM(
        model=str(folder / "model"),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=64,
        enable_prefix_caching=False,
        **(defaults | options),
    )


def compare(llm: Any, folder: Path) -> dict[str, Any]:
    """The served model against the reference beside it."""
    from vllm import SamplingParams

    reference = load_file(folder / "reference.safetensors")
    numbers = range(sum(name.startswith("prompt.") for name in reference))
    length = len(reference["tokens.0"])
    asked = [{"prompt_token_ids": reference[f"prompt.{i}"].tolist()} for i in numbers]
    how = SamplingParams(
        temperature=0.0, max_tokens=length, logprobs=TOP, ignore_eos=True, detokenize=False
    )
    off, agree = 0.0, 0
    for i, answer in zip(numbers, llm.generate(asked, how, use_tqdm=False), strict=True):
        (output,) = answer.outputs
        wanted = reference[f"tokens.{i}"].tolist()
        for step, token in enumerate(output.token_ids):
            for candidate, told in output.logprobs[step].items():
                expected = float(reference[f"logprobs.{i}"][step, candidate])
                off = max(off, abs(told.logprob - expected))
            if token != wanted[step]:
                break
            agree += 1
    return {"off": off, "agree": agree, "of": length * len(numbers)}


def answer(folder: Path, **options: Any) -> dict[str, Any]:
    """The comparison, or the words of the error behind all others."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = serve(folder, **options)
        told = compare(llm, folder)
        llm.llm_engine.engine_core.shutdown()
        return told
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the answer
        cause: BaseException = error
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper
        return {"error": str(cause)}
    finally:
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    folders = [Path(one) for one in sys.argv[1:] if not one.startswith("--")]
    asked = dict(one[2:].split("=") for one in sys.argv[1:] if one.startswith("--"))
    options = {name.replace("-", "_"): json.loads(value) for name, value in asked.items()}
    for folder in folders:
        print("RESULT", folder.name, json.dumps(answer(folder, **options)), flush=True)
