"""What a method is: from a profile to a plan that says what happens to each layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import Plan
from moe_lab.option import Option, Plugin, check_options
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, LmHeadName, MtpName

Mtp = Annotated[
    str,
    Option(
        "what becomes of MTP layers: as many experts go as elsewhere, or none, or all of it",
        among=get_args(MtpName),
    ),
]
LmHead = Annotated[
    str,
    Option(
        "whether a head that is the embedding gets its own tensor; auto: where llama.cpp needs it",
        among=get_args(LmHeadName),
    ),
]


def form_notes(padding: float | None, convert: str | None = None) -> dict[str, Any]:
    """What a plan's notes say of the form in which its result is to be saved."""
    asked = {"padding": padding, "convert": convert}
    return {name: value for name, value in asked.items() if value is not None}


class Method(Plugin, ABC):
    """A way to compress a model; its options are its fields.

    Only `plan` has to be there. What else may be:
    check(layers): refuses an impossible request before any work, with a UserError; by default
    values that are out of the range which their `Option` says.
    example(layers): edits of the kind that the plan will have, by which a recipe and the form of
    the result are judged before any work; by default None, not known before.
    foresees_form(layers): whether the form of the example's result is that of the plan's; by
    default true.
    unforeseen: what to say where that is not so.
    foreseen(layers): how many experts its edits leave, by layer index, where that is known before
    any work; by default None.
    from_routers: whether the routers' statistics are enough for it; by default false.
    of_neurons: whether it looks at the statistics of hidden units; by default false.
    takes_groups: whether it makes a plan for each group of the calibration set; by default false.
    padding: the largest share of zeros with which stock transformers may hold the result; by
    default None, the model's own.
    convert: whether it may be held as another family's; by default None, it may not.
    mtp: what becomes of the checkpoint's MTP layers, which no plan names (`models/mtp.py`); by
    default their experts are pruned to the number of the others'.
    lm_head: whether a head that is the embedding is written beside it (`models/head.py`); by
    default where llama.cpp needs it.
    decides_bits: whether its plan says in how many bits each layer is to be stored; by default
    false.
    parts(): plug-ins that decide the plan and are in no field, such as those looked up by a name;
    by default none.
    settings(options), groups(options): what a report says of its composed options, and the config
    groups that decide its result besides; by default all that are given (num_layers as
    condense/num_layers, one key for all methods), and none.
    identity(options): what of its composed options the plan depends on; by default all.
    of_condense: the options that are those of the config group condense, and are named so in
    messages; by default none.
    """

    unforeseen = (
        "how wide each expert stays is known with the plan: where widths differ, the result is "
        "saved in moe_lab's own form, which stock transformers cannot load; with method.padding=1 "
        "in the family's, filled up with zeros"
    )
    of_condense: tuple[str, ...] = ()
    mtp: str = "prune"
    lm_head: str = "auto"

    @property
    def from_routers(self) -> bool:
        """Whether the routers' statistics are enough."""
        return False

    @property
    def of_neurons(self) -> bool:
        """Whether it looks at the statistics of hidden units."""
        return False

    @property
    def decides_bits(self) -> bool:
        """Whether its plan says in how many bits each layer is to be stored."""
        return False

    @property
    def takes_groups(self) -> bool:
        """Whether a plan for a group's statistics is one for that group, and can be evaluated."""
        return False

    @property
    def padding(self) -> float | None:
        """The largest share of zeros for stock transformers; None: the model's own."""
        return None

    @property
    def convert(self) -> str | None:
        """superset: the result may become another family's model; None: it stays its own's."""
        return None

    @abstractmethod
    def plan(self, profile: Profile) -> Plan:
        """One edit for each MoE layer."""

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an impossible request before any work, with a UserError."""
        check_options(self, "method", dict.fromkeys(self.of_condense, "condense"))

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...] | None:
        """Edits of the plan's kind; None where they are not known before."""
        return None

    def foresees_form(self, layers: Sequence[LayerInfo]) -> bool:
        """Whether the form of the example's result is that of the plan's."""
        return True

    def foreseen(self, layers: Sequence[LayerInfo]) -> Mapping[int, int] | None:
        """How many experts its edits leave, by layer index; None where that is not known before."""
        return None

    def parts(self) -> Sequence[object]:
        """Plug-ins that decide the plan and are in no field."""
        return ()

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a report says of its composed options, by their names; with a slash: a whole key."""
        told = super().settings(options)
        if "num_layers" not in told:
            return told
        number = told.pop("num_layers")
        return ({} if told.get("layers") == "all" else {"condense/num_layers": number}) | told
