"""Measure: what each variant costs, side by side in one process (`moe_lab.measure.speed`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_lab.dependencies import code_version
from moe_lab.evaluate.decoding.base import PLAIN, Decoding, as_decoding, decoding_identity
from moe_lab.files import FIGURES_FILE
from moe_lab.integrity import write_whole
from moe_lab.measure.speed import (
    REFERENCE,
    Measurement,
    bytes_on_disk,
    counted,
    fit_together,
    measure,
    seconds_in_turns,
)
from moe_lab.models.checkpoint import Checkpoint, Model
from moe_lab.models.opening import text_config
from moe_lab.models.routers import at_top_k
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run


PROMPT_TOKENS = 32  # tokens before those whose decoding is timed, as in SCMoE (2405.14507)


@dataclass(frozen=True)
class Measuring:
    """Variants by name, "dense" among them, and how they are measured.

    decoding: how their tasks are decoded, None where that is greedy; options: its composed ones.

    A variant at another number of experts per token is no model of its own: it is counted on the
    one that has its weights, and has active_parameters and flops_per_token alone.
    """

    variants: Mapping[str, Checkpoint]
    how: Measurement
    decoding: Decoding | None = None
    options: Any = None


def measure_variants(context: Context, asked: Measuring) -> Artifact:
    """A folder with figures.json: `measure` and `<variant>/bytes` of all variants, flat.

    The machine is part of the identity: a speed is a property of it as much as of the model.
    """
    variants = asked.variants
    identity = {
        "checkpoints": {name: checkpoint.fingerprint for name, checkpoint in variants.items()},
        "dtypes": {name: checkpoint.dtype for name, checkpoint in variants.items()},
        "how": asdict(asked.how),
        "machine": context.compute.machine(),
        "code": code_version(measure_variants, type(asked.how), asked.decoding),
    }
    if asked.decoding:
        identity["decoding"] = decoding_identity(asked.options)

    def make(folder: Path) -> None:
        figures = _measured(asked, context.compute.device)
        write_whole(folder / FIGURES_FILE, json.dumps(figures, indent=1) + "\n")

    return context.store.get("measure", identity, make)


def _measured(asked: Measuring, device: str) -> dict[str, float]:
    variants, how = asked.variants, asked.how
    whole = {name: one for name, one in variants.items() if one.top_k is None}
    sizes = {name: bytes_on_disk(one.path) for name, one in whole.items()}
    vocabulary = text_config(variants[REFERENCE].config).vocab_size

    def besides(name: str, model: Model) -> dict[str, float]:
        figures: dict[str, float] = {}
        for other, one in variants.items():
            if other not in whole and one.path == whole[name].path:
                with at_top_k(model, one.top_k):
                    figures |= counted(other, model, how.prompt_length)
        if asked.decoding:
            figures |= _decoded(name, model, asked.decoding, how, vocabulary)
        return figures

    loading = {name: functools.partial(one.load, device) for name, one in whole.items()}
    together = fit_together(list(sizes.values()), device)
    figures = measure(
        loading, vocabulary_size=vocabulary, together=together, besides=besides, **asdict(how)
    )
    for name, size in sizes.items():
        figures |= {f"{name}/bytes": size, f"{name}/bytes_ratio": size / sizes[REFERENCE]}
    return figures


def _decoded(
    name: str, model: Model, decoding: Decoding, how: Measurement, vocabulary: int
) -> dict[str, float]:
    """Seconds of a token as the tasks are decoded, and how many times greedy's they are.

    Behind a random prompt of `PROMPT_TOKENS` tokens, which counts, too; both ways take turns.
    """
    generator = torch.Generator().manual_seed(how.seed)
    prompt_BL = torch.randint(vocabulary, (how.batch_size, PROMPT_TOKENS), generator=generator)
    tokens = how.decode_tokens

    def way(decoding: Decoding) -> Callable[[], Any]:
        @contextmanager
        def opened() -> Iterator[Callable[[], object]]:
            with decoding.opened(model) as decoder:
                yield lambda: decoder.generated(prompt_BL.to(model.device), tokens)

        return opened

    ways = {PLAIN: way(as_decoding(PLAIN)), decoding.name: way(decoding)}
    took = seconds_in_turns(model, ways, how.repeats)
    return {
        f"{name}/decoding_seconds_per_token": took[decoding.name] / tokens,
        f"{name}/decoding_slowdown": took[decoding.name] / took[PLAIN],
    }


def _inputs(run: Run) -> dict[str, Measuring]:
    how, suite = run.parts.measure, run.parts.eval
    if not how:
        return {}
    own = suite is not None and suite.how.name != PLAIN
    decoding = (suite.how, run.config["eval"]["decoding"]) if suite and own else ()
    return {"measure": Measuring(run.all_variants, how.in_one_process(), *decoding)}


def _read(run: Run, name: str, result: Artifact) -> None:
    run.report |= json.loads((result.folder / FIGURES_FILE).read_text())


STAGE = Stage(_inputs, measure_variants, _read)
