"""llama.cpp's own process: reads a job as JSON, asks the file, and writes the answer as JSON.

Run by path (`llama_cpp.py` does): what llama.cpp cannot load may end its process, and it knows
nothing of torch or moe_lab.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any


def answered(job: dict[str, Any]) -> dict[str, Any]:
    """What the file at job["path"] says to its prompts and texts (`llama_cpp.Answers`)."""
    from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

    longest = max((len(prompt) for prompt in job["prompts"]), default=1)
    params = CommonParams()
    params.model.path = job["path"]
    params.n_ctx = longest + job["num_tokens"] + 1
    params.n_parallel, params.n_gpu_layers, params.fit_params = 1, 0, False
    # Its threads wait for each other busily: more of them than free cores are slower than one.
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # The cache is by default in float16, which rounds what the file says.
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = params.cache_prompt = params.ctx_shift = False
    server = Server(params)
    prompts = job["prompts"]
    return {
        "logprobs": [_logprobs(server, prompt, job["num_logprobs"]) for prompt in prompts],
        "tokens": [_greedy(server, prompt, job["num_tokens"]) for prompt in prompts],
        "token_ids": [_tokenised(server, text) for text in job["texts"]],
    }


def _logprobs(server: Any, prompt: list[int], number: int) -> dict[int, float]:
    # It tells the logprobs of a token only with its text, which a part of a character is not yet.
    # So the next token is made one that is text; its logprobs are told as they were before.
    plain = _tokenised(server, "a")[-1]
    said = _asked(
        server, "completion", prompt=prompt, n_predict=1, n_probs=number, cache_prompt=False,
        logit_bias=[[plain, 1e6]],
    )  # fmt: skip
    first = said["completion_probabilities"][0]
    return {one["id"]: one["logprob"] for one in first["top_logprobs"]}


def _greedy(server: Any, prompt: list[int], number: int) -> list[int]:
    said = _asked(
        server, "completion", prompt=prompt, n_predict=number, samplers=["top_k"], top_k=1,
        return_tokens=True, cache_prompt=False,
    )  # fmt: skip
    tokens: list[int] = said["tokens"]
    return tokens


def _tokenised(server: Any, text: str) -> list[int]:
    asked = {"content": text, "add_special": False, "parse_special": False}
    ids: list[int] = _asked(server, "tokenize", **asked)["tokens"]
    return ids


def _asked(server: Any, what: str, **body: Any) -> Any:
    address = f"{server.listening_address}/{what}"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    # No proxy: the server is in this process.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
        return json.load(reply)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answered(json.load(sys.stdin))), encoding="utf-8")
