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


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What the file at job["path"] says to its prompts and texts (`llama_cpp.Answers`)."""
    from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

    longest = max((len(prompt) for prompt in job["prompts"]), default=1)
    params = CommonParams()
    params.model.path = job["path"]
    params.n_ctx = longest + job["num_tokens"] + 1
    params.n_parallel, params.n_gpu_layers, params.fit_params = 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = min(4, os.cpu_count() or 1)
    # The cache is by default in float16, which rounds what the file says.
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = params.cache_prompt = params.ctx_shift = False
    server = Server(params)
    found = [_continued(server, prompt, job) for prompt in job["prompts"]]
    return {
        "logprobs": [first for first, _ in found],
        "tokens": [tokens for _, tokens in found],
        "token_ids": [_tokenised(server, text) for text in job["texts"]],
    }


def _continued(server: Any, prompt: list[int], job: dict[str, Any]) -> tuple[Any, list[int]]:
    request = {
        "prompt": prompt,
        "n_predict": job["num_tokens"],
        "logprobs": job["num_logprobs"],
        "samplers": ["top_k"],
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    said = server.handle_completions(request)
    if "choices" not in said:
        raise RuntimeError(f"llama.cpp does not answer: {json.dumps(said)[:300]}")
    content = said["choices"][0]["logprobs"]["content"]
    first = {one["id"]: one["logprob"] for one in content[0]["top_logprobs"]}
    return first, [one["id"] for one in content]


def _tokenised(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    # No proxy: the server is of this process.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
        ids: list[int] = json.load(reply)["tokens"]
    return ids


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answer(json.load(sys.stdin))), encoding="utf-8")
