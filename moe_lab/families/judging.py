"""What is to be said of a compressed checkpoint: read back, and compared with a reference."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from moe_lab.families.family import Family, Made
from moe_lab.families.outcome import (
    EFFECT,
    OF_REFERENCE,
    RELOADED,
    Outcome,
    OutcomeState,
    difference,
    told,
)
from moe_lab.families.references import generation, logits_of, open_model
from moe_lab.families.stock_process import StockAnswer
from moe_lab.models.checkpoint import load
from moe_lab.models.weight_files import weight_files


def judged(
    family: Family, made: Made, reference: StockAnswer | None = None, generate: bool = False
) -> Outcome:
    """The first thing that is wrong with a compressed checkpoint, or the form it has.

    It is read back by stock transformers, in our own form by transformers behind `import moe_lab`,
    and by moe_lab.load. reference: what it should compute, None where nothing says that.
    """
    assert family.dense.logits is not None
    read, who = family.stock.ask("reload", made.folder, family.batches, generate=generate), "stock"
    if not made.form.stock:
        if read.logits and not read.complaints and _far(read.logits, made.logits):
            return Outcome("silent", "stock transformers loads our own form as something else")
        read, who = _read_here(family, made.folder), "with moe_lab"
    if read.logits is None:
        return Outcome("fault", f"transformers ({who}) cannot read it: {read.error}")
    if read.complaints:
        return Outcome("fault", f"transformers ({who}) complains of {read.complaints}")
    ours = logits_of(load(made.folder), family.batches)
    for whose, logits in ((f"transformers ({who})", read.logits), ("moe_lab.load", ours)):
        if far := _far(logits, made.logits):
            return Outcome("silent", f"read by {whose}, logits are {far}")
    if difference(made.logits, family.dense.logits) < EFFECT:
        return Outcome("fault", "nothing changed")
    if generate and family.dense.generation == "equal" != read.generation:
        return Outcome("fault", f"decoding, which worked in the dense model: {read.generation}")
    return _compared(made, reference)


def _far(logits: list[Tensor], others: list[Tensor], bound: float = RELOADED) -> str:
    """How far off, in words; empty where it is not."""
    far = difference(logits, others)
    return f"off by {far:.1e} of the largest" if far > bound else ""


def _compared(made: Made, reference: StockAnswer | None) -> Outcome:
    state: OutcomeState = "stock" if made.form.stock else "own"
    if reference is None:
        return Outcome(state)
    if reference.logits is None:
        return Outcome(state, unchecked=reference.error)
    if far := _far(made.logits, reference.logits, OF_REFERENCE):
        return Outcome("silent", f"logits are not the reference's: {far}")
    return Outcome(state)


def _read_here(family: Family, folder: Path) -> StockAnswer:
    """What transformers makes of a checkpoint in this process, which has imported moe_lab."""
    try:
        model, complaints = open_model(family.stock.auto, str(folder))
    except (OSError, RuntimeError, ValueError) as error:
        return StockAnswer(None, told(error).detail)
    decoded = generation(model, family.batches[0])
    return StockAnswer(logits_of(model, family.batches), "", str(complaints or ""), decoded)


def changed_outside(family: Family, made: Made) -> list[str]:
    """Tensors of the files that are no experts' and no routers', and are not byte for byte alike.

    An expert's has "expert" in its name; a router's is below "gate" or "router", or has another
    shape behind a prune.
    """
    before, after = _tensors(family.folder / "dense"), _tensors(made.folder)
    counts = set(family.experts.values())
    return sorted(
        name
        for name, tensor in before.items()
        if "expert" not in name
        and not {"gate", "router"} & set(name.split("."))
        and not counts.intersection(tensor.shape)
        and (name not in after or not _same(tensor, after[name]))
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
