"""The checks of one model type, on a tiny random model: what is promised, one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe_lab.compute import Compute
from moe_lab.families.family import Family, Made, carried_out, made_by, written_family
from moe_lab.families.judging import changed_outside, judged
from moe_lab.families.outcome import RELOADED, SAME_SUMS, Outcome, difference, told
from moe_lab.families.references import counting_tokens, logits_of
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.listed import Listed
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import load
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan, check_plan
from moe_lab.models.narrowing import neurons_name, shared_neurons_name
from moe_lab.profile.collect import collecting
from moe_lab.stages.profile import collect_profile
from moe_lab.types import LayerInfo

NOT_REACHED = Outcome("not reached")
NEEDED = ("find", "observe")  # without which nothing else is asked


def check_type(name: str, socket: Path, folder: Path) -> dict[str, Outcome]:
    """What came of each of CHECKS for a model type; all are "not built" where it could not be.

    socket: of the process of stock transformers; folder: empty, for the checkpoints.
    """
    try:
        family = written_family(name, socket, folder)
    except Exception as error:  # noqa: BLE001  # whatever a guess of sizes brings about
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return dict.fromkeys(CHECKS, Outcome("not built", words))
    outcomes = dict.fromkeys(CHECKS, NOT_REACHED)
    for column, check in CHECKS.items():
        try:
            outcomes[column] = check(family)
        except Exception as error:  # noqa: BLE001  # every fault is an outcome
            outcomes[column] = told(error)
        if column in NEEDED and outcomes[column].state != "yes":
            break
    family.stock.close()
    return outcomes


def find(family: Family) -> Outcome:
    """Its MoE layers are those that a look at the classes' names finds, with as many experts."""
    found = {info.index: info.num_experts for info in family.layers()}
    if found != family.experts:
        return Outcome("fault", f"experts by layer: {found} found, there are {family.experts}")
    if family.dense.logits is None:
        why = f"stock transformers does not run what was guessed: {family.dense.error}"
        return Outcome("not built", why)
    return Outcome("yes")


def check_observing(family: Family) -> Outcome:
    """Logits stay as they are while statistics are collected, and counts are those of a hook."""
    model = load(family.folder / "dense")
    with counting_tokens(model, family.batches) as counts:
        plain = logits_of(model, family.batches)
    observed = []
    with collecting(model) as collection:
        for batch in family.batches:
            with collection.batch(batch["attention_mask"].bool()):
                observed.append(model(**batch, use_cache=False).logits)
        family.statistics = collection.of_group()
    for what, logits in (("loaded", plain), ("observed", observed)):
        if (far := difference(logits, family.dense.logits or ())) > RELOADED:
            return Outcome("silent", f"{what}, its logits are off by {far:.1e} of the largest")
    return _judged_counts(family, counts)


def _judged_counts(family: Family, counts: Mapping[int, Tensor]) -> Outcome:
    ours = {one.info.index: one["count"] for one in family.statistics}
    if missing := sorted(family.experts.keys() - ours.keys()):
        return Outcome("fault", f"nothing was seen of layers {missing}")
    if wrong := [i for i, count in counts.items() if not torch.equal(count, ours[i].long())]:
        return Outcome("silent", f"in layers {wrong} other counts than what the experts were given")
    unseen = sorted(family.experts.keys() - counts.keys())
    return Outcome(
        "yes", unchecked=f"no indices reach its experts in layers {unseen}"[: 99 * len(unseen)]
    )


def prune(family: Family) -> Outcome:
    """A quarter of the experts of each layer goes; reference: routers that cannot choose them."""
    made = made_by(family, Prune(reap, Uniform(0.25)))
    if changed := changed_outside(family, made):
        return Outcome("silent", f"{len(changed)} tensors changed or gone, such as {changed[0]}")
    return _pruned(family, made, generate=True)


def unequal(family: Family) -> Outcome:
    """Every other layer keeps all its experts; the same reference."""
    numbers = [
        info.num_experts if place % 2 else info.num_experts * 3 // 4
        for place, info in enumerate(family.layers())
    ]
    return _pruned(family, made_by(family, Prune(reap, Listed(numbers))))


def _pruned(family: Family, made: Made, generate: bool = False) -> Outcome:
    kept = {str(edit.index): edit.experts_kept for edit in made.plan.edited()}
    masked = family.stock.ask("masked", family.folder / "dense", family.batches, kept=kept)
    return judged(family, made, masked, generate)


def merge(family: Family) -> Outcome:
    """Each layer's experts are merged to three quarters; no reference but what was in memory."""
    method = Merge(1, grouping="m_smoe", ratio=Uniform(0.25), router="dominant")
    return judged(family, made_by(family, method))


def narrow(family: Family) -> Outcome:
    """Experts keep half of their hidden units; then an odd number, and the shared ones as many.

    No reference: each is compared with what was in memory.
    """
    infos = family.layers()
    half = infos[0].expert_width // 2
    outcomes = [
        judged(family, carried_out(family, _narrowed(infos, [(width,)] * len(infos), shared)))
        for width, shared in ((half, False), (half - 1 + half % 2, True))
    ]
    return next((one for one in outcomes if one.state != "stock"), outcomes[0])


def narrow_by_expert(family: Family) -> Outcome:
    """The experts of each layer keep different numbers of hidden units, one none; no reference."""
    infos = family.layers()
    widths = [
        (0, *(info.expert_width - 1 - place % 3 for place in range(info.num_experts - 1)))
        for info in infos
    ]
    plan = replace(_narrowed(infos, widths), notes={"padding": 0.0})
    return judged(family, carried_out(family, plan))


def _narrowed(
    infos: Sequence[LayerInfo], widths: Sequence[tuple[int, ...]], shared: bool = False
) -> Plan:
    """A plan that leaves each expert so many of its hidden units, drawn at random.

    shared: the shared experts keep the same share of theirs, the first ones.
    """
    edits, tensors = [], {}
    generator = torch.Generator().manual_seed(0)
    for info, some in zip(infos, widths, strict=True):
        size = info.num_experts, info.expert_width
        rank_EI = torch.rand(size, generator=generator).argsort(dim=1).argsort(dim=1)
        kept_EI = rank_EI < torch.tensor(some)[:, None]
        tensors[neurons_name(info.index)] = kept_EI.to(torch.uint8)
        less = None
        if shared and info.shared_neuron_parameters:
            less = info.shared_width * max(some) // info.expert_width
            first_I = torch.arange(info.shared_width) < less
            tensors[shared_neurons_name(info.index)] = first_I.to(torch.uint8)
        edits.append(NarrowExperts(info.index, info.name, some, less))
    check_plan(infos, edits)
    return Plan(tuple(edits), tensors=tensors)


def condense(family: Family) -> Outcome:
    """A layer becomes a dense MLP; reference: the stock layer with constant router weights."""
    layers = [info.index for info in family.layers()][-2:]
    method = Condense(1, 2, experts="frequency", layers=layers[:1], padding=1.0)
    return _edited(family, made_by(family, method), "condensed")


def drop(family: Family) -> Outcome:
    """A layer's MoE goes; reference: its block's output is zero."""
    last = family.layers()[-1].index
    return _edited(family, made_by(family, DropLayers(1, layers=[last], padding=1.0)), "dropped")


def _edited(family: Family, made: Made, kind: str) -> Outcome:
    (edit,) = made.plan.edited()
    dense = family.folder / "dense"
    reference = family.stock.ask(kind, dense, family.batches, edit=edit.to_json())
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
                return Outcome("silent", f"{where}: {name} is off by {far:.1e} of the largest")
    return Outcome("yes")


def image(family: Family) -> Outcome:
    """A prompt with an image is answered as before by a checkpoint of which nothing was pruned."""
    if not family.takes_images:
        return Outcome("none")
    if family.image is None:
        return Outcome("none", unchecked="no prompt with an image could be made by guessing")
    layers = family.layers()
    made = carried_out(family, Plan(tuple(KeepLayer(one.index, one.name) for one in layers)))
    before, after = (
        family.stock.ask("reload", folder, [family.image])
        for folder in (family.folder / "dense", made.folder)
    )
    if before.logits is None or after.logits is None:
        return Outcome("fault", before.error or after.error)
    if (far := difference(after.logits, before.logits)) > RELOADED:
        return Outcome("silent", f"logits are off by {far:.1e} of the largest")
    return Outcome("stock" if made.form.stock else "own")


CHECKS: dict[str, Callable[[Family], Outcome]] = {
    "find": find,
    "observe": check_observing,
    "prune": prune,
    "merge": merge,
    "narrow": narrow,
    "narrow by expert": narrow_by_expert,
    "unequal": unequal,
    "condense": condense,
    "drop layers": drop,
    "layer by layer": layer_by_layer,
    "image": image,
}
