"""The checks of one model type, on a tiny random model: what is promised, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.compute import Compute
from moe_lab.families.outcome import (
    EFFECT,
    REFERENCE,
    RELOADED,
    SAME_SUMS,
    Outcome,
    State,
    difference,
    told,
)
from moe_lab.families.references import (
    expert_modules,
    generation,
    layer_of,
    logits_of,
    open_model,
)
from moe_lab.families.stock_process import Answer, Stock
from moe_lab.families.tiny import model_types, tiny_batches, tiny_model
from moe_lab.methods.base import Method
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.listed import Listed
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, load, resolve
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan
from moe_lab.models.forms import Form, form_of
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collecting
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.stages.profile import collect_profile
from moe_lab.types import LayerInfo

COLUMNS = (
    "find", "observe", "prune", "merge", "unequal", "condense", "drop layers", "layer by layer",
)  # fmt: skip
NOT_REACHED = Outcome("not reached")


@dataclass(frozen=True)
class Made:
    """A compressed checkpoint: the plan, its folder, its form, and the logits before saving."""

    plan: Plan
    folder: Path
    form: Form
    logits: list[Tensor]


@dataclass
class Family:
    """A model type's tiny checkpoint, what stock transformers makes of it, and what we found."""

    folder: Path
    stock: Stock
    batches: list[dict[str, Tensor]]
    dense: Answer
    experts: dict[int, int]  # by decoder layer how many, counted without moe_lab
    made: int = 0
    statistics: list[LayerStatistics] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint:
        return resolve(self.folder / "dense")

    def layers(self) -> list[LayerInfo]:
        return self.checkpoint.layers()


def check_type(name: str, socket: Path, folder: Path) -> dict[str, Outcome]:
    """What came of each of COLUMNS for a model type; "built" says why where it could not be.

    socket: of the process of stock transformers; folder: empty, for the checkpoints.
    """
    try:
        family = _built(name, socket, folder)
    except Exception as error:  # noqa: BLE001  # whatever a guess of sizes brings about
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"built": Outcome("not built", reason)}
    outcomes = dict.fromkeys(COLUMNS, NOT_REACHED)
    for column, check in CHECKS.items():
        try:
            outcomes[column] = check(family)
        except Exception as error:  # noqa: BLE001  # every fault is an outcome
            outcomes[column] = told(error)
        if column in ("find", "observe") and outcomes[column].state != "yes":
            break
    family.stock.close()
    return outcomes


def _built(name: str, socket: Path, folder: Path) -> Family:
    model, batches = tiny_model(name), tiny_batches()
    model.save_pretrained(folder / "dense")
    stock = Stock(socket, model_types()[name], folder, batches)
    dense = stock.ask("reload", folder / "dense", generate=True)
    experts = {
        layer_of(path): int(getattr(module, "num_experts", 0) or _largest(module))
        for path, module in expert_modules(model).items()
    }
    return Family(folder, stock, batches, dense, experts)


def _largest(experts: nn.Module) -> int:
    return max((parameter.shape[0] for parameter in experts.parameters()), default=0)


def find(family: Family) -> Outcome:
    """Its MoE layers are those that a look at the classes' names finds, with as many experts."""
    found = {info.index: info.num_experts for info in family.layers()}
    if found != family.experts:
        return Outcome("fault", f"experts by layer: {found} found, there are {family.experts}")
    if family.dense.logits is None:
        return Outcome("fault", f"stock transformers does not run it: {family.dense.error}")
    return Outcome("yes")


def observe(family: Family) -> Outcome:
    """Logits stay as they are while statistics are collected, and counts are those of a hook."""
    model = load(family.folder / "dense")
    plain = logits_of(model, family.batches)
    with _counted(model, family.batches) as counts:
        logits_of(model, family.batches)
    with collecting(model) as collection:
        observed = []
        for batch in family.batches:
            with collection.batch(batch["attention_mask"].bool()):
                observed.append(model(**batch, use_cache=False).logits)
        family.statistics = collection.of_group()
    for what, logits in (("loaded", plain), ("observed", observed)):
        if (far := difference(logits, family.dense.logits or ())) > RELOADED:
            return Outcome("silent", f"{what}, its logits differ by {far:.1e} of the largest")
    return _judged_counts(family, counts)


def _judged_counts(family: Family, counts: Mapping[int, Tensor]) -> Outcome:
    ours = {one.info.index: one["count"] for one in family.statistics}
    if missing := sorted(family.experts.keys() - ours.keys()):
        return Outcome("fault", f"nothing was seen of layers {missing}")
    wrong = [i for i, count in counts.items() if not torch.equal(count, ours[i].long())]
    if wrong:
        return Outcome("silent", f"in layers {wrong} other counts than the experts were given")
    unseen = sorted(family.experts.keys() - counts.keys())
    return Outcome(
        "yes", unchecked=f"no indices reach the experts of layers {unseen}" * bool(unseen)
    )


@contextmanager
def _counted(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Iterator[dict[int, Tensor]]:
    """While it is open, how many valid tokens reach each expert, by what their modules are given."""
    counts: dict[int, Tensor] = {}
    waiting = {path: iter(batches) for path in expert_modules(model)}

    def count(path: str, values: Iterable[Any]) -> None:
        valid = next(waiting[path])["attention_mask"].bool().flatten()
        tensors = [one for one in values if torch.is_tensor(one)]
        index = next((one for one in tensors if not one.is_floating_point()), None)
        if index is not None:
            chosen = index.reshape(len(valid), -1)[valid].flatten()
            number = int(getattr(model.get_submodule(path), "num_experts", 0))
            counts[layer_of(path)] = counts.get(layer_of(path), 0) + torch.bincount(
                chosen, minlength=number
            )

    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, named, path=path: count(path, (*args, *named.values())),
            with_kwargs=True,
        )
        for path in waiting
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def made_by(family: Family, method: Method) -> Made:
    """What the stages plan and compress do, with the same functions and no store."""
    checkpoint, layers = family.checkpoint, family.layers()
    method.check(layers)
    if edits := method.example(layers):
        form_of(checkpoint.config, edits, method.padding)
    plan = method.plan(_profile(family))
    check_plan(layers, plan.edited())
    model = checkpoint.load()
    apply_plan(model, plan)
    logits = logits_of(model, family.batches)
    family.made += 1
    folder = family.folder / f"made_{family.made}"
    form = save_checkpoint(model, folder, checkpoint.path, plan.notes.get("padding"))
    return Made(plan, folder, form, logits)


def _profile(family: Family) -> Profile:
    stored = {info.index: info for info in family.layers()}
    for one in family.statistics:
        one.info = stored[one.info.index]

    def open_stream(num_samples: int | None = None) -> LayerStream:
        model = LayerwiseModel(family.checkpoint, "cpu", keep_bytes=2**30)
        return LayerStream(model, family.batches, Activations(limit=2**30))

    return Profile(
        family.statistics, open_stream, lambda _=None: (family.checkpoint.load(), family.batches)
    )


def judged(family: Family, made: Made, reference: Answer | None, generate: bool = False) -> Outcome:
    """What is to be said of a compressed checkpoint; the first thing that is wrong, if any is.

    It is read back by stock transformers, in our own form by transformers behind `import moe_lab`,
    and by moe_lab.load. reference: what it should compute, None where nothing says that.
    """
    assert family.dense.logits is not None
    stock = family.stock.ask("reload", made.folder, generate=generate)
    read, who = stock, "stock transformers"
    if not made.form.stock:
        unknown = stock.logits and not stock.complaints
        if unknown and difference(stock.logits or (), made.logits) > RELOADED:
            return Outcome("silent", "stock transformers loads our own form as something else")
        read, who = _read_here(family, made.folder), "transformers with moe_lab"
    if read.logits is None:
        return Outcome("fault", f"{who} cannot read it: {read.error}")
    if read.complaints:
        return Outcome("fault", f"the loading report of {who} complains: {read.complaints}")
    ours = logits_of(load(made.folder), family.batches)
    for whose, logits in ((who, read.logits), ("moe_lab.load", ours)):
        if (far := difference(logits, made.logits)) > RELOADED:
            return Outcome("silent", f"read by {whose}, logits differ by {far:.1e} of the largest")
    if difference(made.logits, family.dense.logits) < EFFECT:
        return Outcome("fault", "nothing changed")
    if generate and family.dense.generation == "equal" != read.generation:
        return Outcome(
            "fault", f"cached generation {read.generation}, which the dense model's is not"
        )
    return _compared(made, reference)


def _compared(made: Made, reference: Answer | None) -> Outcome:
    state: State = "stock" if made.form.stock else "own"
    if reference is None:
        return Outcome(state)
    if reference.logits is None:
        return Outcome(state, unchecked=reference.error)
    far = difference(made.logits, reference.logits)
    if far > REFERENCE:
        return Outcome("silent", f"logits differ from the reference's by {far:.1e} of the largest")
    return Outcome(state)


def _read_here(family: Family, folder: Path) -> Answer:
    """What transformers makes of a checkpoint in this process, which has imported moe_lab."""
    try:
        model, complaints = open_model(family.stock.auto, str(folder))
    except (OSError, RuntimeError, ValueError) as error:
        return Answer(None, str(told(error).detail))
    decoded = generation(model, family.batches[0])
    return Answer(logits_of(model, family.batches), "", str(complaints or ""), decoded)


def _pruned(family: Family, made: Made, generate: bool = False) -> Outcome:
    kept = {str(edit.index): edit.kept for edit in made.plan.edited()}
    masked = family.stock.ask("masked", family.folder / "dense", kept=kept)
    return judged(family, made, masked, generate)


def prune(family: Family) -> Outcome:
    """A quarter of the experts of each layer goes; reference: routers that cannot choose them."""
    return _pruned(family, made_by(family, Prune(reap, Uniform(0.25))), generate=True)


def unequal(family: Family) -> Outcome:
    """Every other layer keeps all its experts; the same reference."""
    layers = family.layers()
    numbers = [
        info.num_experts if place % 2 else info.num_experts * 3 // 4
        for place, info in enumerate(layers)
    ]
    return _pruned(family, made_by(family, Prune(reap, Listed(numbers))))


def merge(family: Family) -> Outcome:
    """Each layer's experts are merged to three quarters; no reference but what was in memory."""
    method = Merge(1, grouping="m_smoe", ratio=Uniform(0.25), router="dominant")
    return judged(family, made_by(family, method), None)


def condense(family: Family) -> Outcome:
    """A layer becomes a dense MLP; reference: the stock layer with constant router weights."""
    layers = [info.index for info in family.layers()][-2:]
    method = Condense(1, 2, experts="frequency", layers=layers[:1], padding=1.0)
    return _edited(family, made_by(family, method), "condensed")


def drop(family: Family) -> Outcome:
    """A layer's MoE goes; reference: its block's output is zero."""
    return _edited(family, made_by(family, DropLayers(1, padding=1.0)), "dropped")


def _edited(family: Family, made: Made, kind: str) -> Outcome:
    (edit,) = made.plan.edited()
    reference = family.stock.ask(kind, family.folder / "dense", edit=edit.to_json())
    return judged(family, made, reference)


def layer_by_layer(family: Family) -> Outcome:
    """Statistics collected with one decoder layer in memory are those of the whole model."""
    batches = [(0, batch) for batch in family.batches]
    compute = Compute(device="cpu", layerwise=True)
    alone = collect_profile(family.checkpoint, batches, False, compute, family.folder).of_group()
    for one, other in zip(alone, family.statistics, strict=True):
        where = f"layer {one.info.index}"
        if one.sums.keys() != other.sums.keys():
            return Outcome("fault", f"{where}: not the same statistics")
        for name, value in one.sums.items():
            if (far := difference([value], [other[name]])) > SAME_SUMS:
                return Outcome("silent", f"{where}: {name} differs by {far:.1e} of the largest")
    return Outcome("yes")


CHECKS: dict[str, Callable[[Family], Outcome]] = {
    "find": find,
    "observe": observe,
    "prune": prune,
    "merge": merge,
    "unequal": unequal,
    "condense": condense,
    "drop layers": drop,
    "layer by layer": layer_by_layer,
}
