"""`--to gguf`: a checkpoint as one file for llama.cpp, by its public converter.

The file counts only once llama.cpp has loaded it and computes what transformers does: a model that
the converter or llama.cpp takes for another one is told by its logprobs, whatever the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_lab.export.gguf_converter import OUTTYPES, check_gguf, write_gguf
from moe_lab.export.given import Given
from moe_lab.export.llama_cpp import Answers, NotLoaded, logprobs_and_tokens, require_packages
from moe_lab.models.checkpoint import Checkpoint, Model, load
from moe_lab.types import UserError

ENDING = ".gguf"
OPTIONS = ("outtype", "pre_tokenizer", "tolerance")
TAKES = "checkpoints in their family's own form, of families that llama.cpp has"
# The largest difference of a next token's logprob from transformers, both in float32, that is
# rounding: at most 2e-5 was seen on tiny models; a file that means another one is off by 0.1 to 10.
TOLERANCE = 2e-3
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
            write_gguf(folder, out, one, pre_tokenizer)
            found = _compared(folder, model, out, tolerance if one == "f32" else float("inf"))
        except BaseException:
            out.unlink(missing_ok=True)
            raise
        told.append(f"{one}: {found}")
    return told


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
    gaps, agreeing = [0.0], 0
    for prompt, logprobs, tokens in zip(prompts, answers.logprobs, answers.tokens, strict=True):
        ids = torch.tensor([[*prompt, *tokens]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
        ours = logits[len(prompt) - 1].log_softmax(-1)
        gaps += [float(ours[token]) - value for token, value in logprobs.items()]
        greedy = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        equal = [one == other for one, other in zip(greedy, tokens, strict=True)]
        agreeing += [*equal, False].index(False)
    return float(torch.tensor(gaps).abs().max()), agreeing  # NaN is the largest
