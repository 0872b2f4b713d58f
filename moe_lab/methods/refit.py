"""New down projections for what stays after a method's edits: a repair without training."""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from moe_lab.methods.base import Method
from moe_lab.methods.joint_refit import MOST_TOGETHER, Change, changes
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.chain import Chain
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.refit import RefitExperts
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, standing_at
from moe_lab.models.narrowing import fit_implementation
from moe_lab.models.refitting import refit_name, shared_down, shared_refit_name
from moe_lab.models.stream import LayerStream, States, swapped
from moe_lab.option import Option
from moe_lab.profile.documents import check_enough, held_out
from moe_lab.profile.edited_layer import EditedLayer
from moe_lab.profile.grams import TOKEN_WEIGHTS
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import edited_block
from moe_lab.progress import progress
from moe_lab.types import LayerInfo

logger = logging.getLogger(__name__)
TARGETS = ("sequential", "intact")
OF_REFITS = ("targets", "token_weight")


@dataclass(frozen=True, kw_only=True)
class Refitting(Method):
    """A method whose experts that stay may be refitted, once its plan is made (`decide`).

    All down projections of an MoE layer that are left, of every expert and of the shared ones, are
    found together (`joint_refit.py`), on the tokens that they now get. targets: sequential, what
    should leave the layer is what leaves it in the intact model, and it is fitted on the states
    behind the compressed layers before it, so that it also mends what these broke; intact, each
    layer by itself, on the intact model's states.
    """

    refit: Annotated[
        bool, Option("new down projections for all that stays, in closed form (least squares)")
    ] = False
    targets: Annotated[
        str,
        Option(
            "of refit: each layer on the states behind the compressed ones, or on intact ones",
            among=TARGETS,
        ),
    ] = "sequential"
    token_weight: Annotated[
        str,
        Option(
            "of refit: what a token weighs, 1 / the mean square of its state, or 1",
            among=TOKEN_WEIGHTS,
        ),
    ] = "output"

    @abstractmethod
    def decide(self, profile: Profile) -> Plan:
        """The plan before any refit."""

    def plan(self, profile: Profile) -> Plan:
        """One edit or several for each MoE layer, with a refit where that was asked for."""
        if not self.refit:
            return self.decide(profile)
        check_refits(profile)
        made = self.decide(profile)
        return with_refits(profile, made, self.targets, self.token_weight)

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the plan depends on: without the refit's options where there is none."""
        found = super().identity(options)
        unused = () if self.refit else OF_REFITS
        return {name: value for name, value in found.items() if name not in unused}

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a report says: without the refit's options where there is none."""
        told = super().settings(options)
        unused = () if options.get("refit") else OF_REFITS
        return {name: value for name, value in told.items() if name not in unused}

    @property
    def refits(self) -> bool:
        """Whether its plan has refits."""
        return self.refit

    def followed(self, edits: Sequence[Edit], layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """The edits of an example, with a refit of each layer behind them where asked for."""
        refits = [RefitExperts(info.index, info.name) for info in layers if self.refits]
        return (*edits, *refits)


def check_refits(profile: Profile) -> None:
    """Refuse a model whose layers cannot be refitted, seen at one document and its first one."""
    check_enough(profile.num_documents)
    stream = profile.open_stream(1)
    stream.check_hidden_alone(
        "its layers cannot be refitted one after another: ask for method.refit=false"
    )
    index = min(stream.moe)
    states, wanted = States(stream, "given"), States(stream, "wanted")
    states.move_to(index)
    wanted.pass_through(index, functools.partial(stream.replay, index))
    with stream.layer(index):
        EditedLayer(stream.moe[index], states, wanted, "none", ()).close()


def with_refits(profile: Profile, made: Plan, targets: str, token_weight: str) -> Plan:
    """The plan with a refit behind the edits of each layer that leave an MoE layer."""
    walk = RefitWalk(profile.open_stream(), targets, token_weight)
    chains = {chain.index: chain for chain in made.chains()}
    tensors, edits = dict(made.tensors), list[Edit]()
    for index in progress(sorted(chains), "refit"):
        chain = chains[index]
        found = walk.refit(chain, tensors) if chain.changes and chain.leaves_moe else []
        # One that the method made itself has no say behind this one.
        edits += [edit for edit in chain.edits if not (found and isinstance(edit, RefitExperts))]
        edits += found
    refitted = {str(edit.index): edit.error for edit in edits if isinstance(edit, RefitExperts)}
    notes = made.notes | {"refit": {"targets": targets, "error left": refitted}}
    return replace(made, edits=tuple(edits), tensors=tensors, notes=notes)


class RefitWalk:
    """The layers of a model one after another, each refitted after its edits.

    Two sets of states move along: `wanted`, those of the intact model, which are a layer ahead when
    it is refitted, and `given`, those that the edited layer gets.
    """

    def __init__(self, stream: LayerStream, targets: str, token_weight: str):
        self.stream, self.targets, self.token_weight = stream, targets, token_weight
        stream.cache.announce({"two hidden states, and what is missing": 4 * stream.state_bytes()})
        self.wanted, self.given = States(stream, "wanted"), States(stream, "given")
        self.held = held_out(stream.positions)

    def refit(self, chain: Chain, tensors: dict[str, Tensor]) -> list[Edit]:
        """The edit that refits a layer after its other edits, none where nothing gets better."""
        index = chain.index
        self._move_to(index)
        with self.stream.layer(index):
            block = edited_block(self.stream, index, chain.edits, tensors)
            with swapped(self.stream, index, block):
                fit_implementation(self.stream.model)
                layer = standing_at(self.stream.model, self.stream.moe[index].info.name)
                assert isinstance(layer, MoELayer)
                edit = self._fit(layer, tensors)
                self._go_on(index)
        return [] if edit is None else [edit]

    def _move_to(self, index: int) -> None:
        """The given states before a layer, and those that are wanted behind it."""
        self.given.move_to(index)
        self.wanted.pass_through(index, functools.partial(self.stream.replay, index))

    def _go_on(self, index: int) -> None:
        """What the next layer is given: behind what stands here now, or intact."""
        if self.targets == "intact":
            self.given.pass_through(index, lambda batch, _: self.wanted[batch])
        else:
            self.given.pass_through(index, functools.partial(self.stream.replay, index))

    @torch.no_grad()
    def _fit(self, layer: MoELayer, tensors: dict[str, Tensor]) -> Edit | None:
        data = EditedLayer(layer, self.given, self.wanted, self.token_weight, self.held)
        if data.num_units > MOST_TOGETHER:
            logger.info(
                "layer %d: %d hidden units are more than %d: its experts are refitted one after "
                "another", layer.info.index, data.num_units, MOST_TOGETHER,
            )  # fmt: skip
        change = changes(data)
        data.close()
        if change is None:
            return None
        index, tells = layer.info.index, [(one.strength, one.scale) for one in change.ridges]
        made = _tensors(layer, change)
        edit = RefitExperts(
            index, layer.info.name, shared_refit_name(index) in made, tuple(tells),
            change.error, change.held_error,
        )  # fmt: skip
        edit.apply(layer, made)
        tensors.update(made)
        return edit


def _tensors(layer: MoELayer, change: Change) -> dict[str, Tensor]:
    """The new columns, as the plan's tensors, float32."""
    index = layer.info.index
    new_EID = HiddenUnits(layer.experts).down_columns().detach().double().cpu().clone()
    found = {}
    for part, columns_ND in change.columns.items():
        columns_ND = columns_ND.double().cpu()
        if part.expert is not None:
            new_EID[part.expert, : part.width] += columns_ND
        elif (down := shared_down(layer)) is not None:
            new_DI = down.weight.detach().double().cpu() + columns_ND.T
            found[shared_refit_name(index)] = new_DI.float().contiguous()
    return found | {refit_name(index): new_EID.transpose(1, 2).float().contiguous()}
