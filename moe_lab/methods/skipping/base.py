"""What a rule of method=skip is: from a profile to an edit of each layer's routing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from moe_lab.methods.base import LmHead, Mtp
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.edits.top_k import SetTopK
from moe_lab.option import Option, declared_by, word_of
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

SKIPPING_FILES = (str(__package__), "base", "by_weight", "thresholds")
# The options that all rules take: the seed, too, which is the run's where nobody gives one.
EVERY_RULE = ("rule", "renormalize", "seed", "mtp", "lm_head")


@dataclass(frozen=True)
class SkipOptions:
    """The options of method=skip; which of them a rule takes, it says."""

    rule: Annotated[str, Option("which of a token's experts stay", files_of=SKIPPING_FILES)] = (
        "naee"
    )
    top_k: Annotated[
        int | Sequence[int] | Mapping[str, int] | None,
        Option(
            "of rule=listed: experts per token, one number, one for each MoE layer [6,4], or some "
            "decoder layers' {3: 4}",
            least=1,
        ),
    ] = None
    average_top_k: Annotated[
        float | None,
        Option("experts per token on average over the MoE layers: the budget", least=1),
    ] = None
    quantile: Annotated[
        float | None,
        Option(
            "of rule=ratio, weight: which quantile of g_j / g_1, or of g_j, is the threshold",
            least=0,
            most=1,
        ),
    ] = None
    mass: Annotated[
        float | None,
        Option("of rule=top_p: the probability that the smallest set has", above=0, most=1),
    ] = None
    min_top_k: Annotated[
        int | None, Option("of rule=entropy: the fewest experts per token", least=1)
    ] = None
    inputs: Annotated[
        str | None,
        Option("of rule=lexi: what layers are tried on", among=("random", "text")),
    ] = None
    damage: Annotated[
        str | None,
        Option(
            "of rule=lexi: what is added up: norm (the paper's), or relative (of inputs=text: the "
            "squared error over the square of the state that leaves the layer; ours)",
            among=("norm", "relative"),
        ),
    ] = None
    num_inputs: Annotated[
        int | None, Option("of inputs=random: how many tokens are drawn", least=1)
    ] = None
    num_samples: Annotated[
        int | None, Option("calibration documents that are looked at, null for all", least=1)
    ] = None
    renormalize: Annotated[
        bool | None,
        Option(
            "whether the weights that stay are scaled to the sum of all; false: as the router gave "
            "them; null: of naee true, else as the family does with so many experts"
        ),
    ] = None
    seed: Annotated[int, Option("of inputs=random")] = 0
    mtp: Mtp = "prune"
    lm_head: LmHead = "auto"


class SkipRule(ABC):
    """A rule with its options; what it makes of a profile is one edit for each MoE layer.

    takes: the options, beside EVERY_RULE, that it takes; defaults: what those of them mean that are
    not given; told: what the plan's notes say of it.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    told: ClassVar[str]

    def __init__(self, options: SkipOptions):
        self.options = options

    def option(self, name: str) -> Any:
        """An option, or the rule's own value where it is null."""
        given = getattr(self.options, name)
        return self.defaults.get(name) if given is None else given

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse options of other rules, and what the layers cannot have, with a UserError."""
        taken = (*EVERY_RULE, *self.takes)
        for name, declared in declared_by(type(self.options)).items():
            value = getattr(self.options, name)
            if name not in taken and value not in (None, declared.default):
                raise UserError(
                    f"method.{name}={word_of(value)} is no option of method.rule="
                    f"{self.options.rule}, which takes {', '.join(self.takes) or 'none'}"
                )
        most = max(info.top_k for info in layers)
        average = self.options.average_top_k
        if most < 2 and self.options.rule != "listed":
            raise UserError(
                f"method=skip: {layers[0].family} gives each token 1 expert, so that none can be "
                "left out: remove experts (method=prune) or whole layers (method=drop_layers)"
            )
        if average is not None and average > most:
            raise UserError(
                f"method.average_top_k={average:g}: the model gives a token {most} experts, and "
                f"the average can be from 1 to {most}"
            )

    @abstractmethod
    def edits(self, profile: Profile) -> tuple[Edit, ...]:
        """One edit for each MoE layer in order."""

    @abstractmethod
    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the kind that it will make, before any work."""

    def passes(self, layers: Sequence[LayerInfo]) -> float:
        """What finding the edits takes, in passes of the text through the model: by default one."""
        return 1.0

    def foresees_form(self) -> bool:
        """Whether the form of the example's result is that of the plan's."""
        return True

    def notes(self) -> dict[str, Any]:
        """What the plan says beside its edits."""
        return {"rule": self.options.rule, "how": self.told}

    def fixed(self, info: LayerInfo, top_k: int, damage: Sequence[float] = ()) -> Edit:
        """The edit that gives every token so many experts, as `renormalize` wants their weights."""
        wanted = self.options.renormalize
        if wanted is None:
            return SetTopK(info.index, info.name, top_k, tuple(damage))
        return SkipExperts(info.index, info.name, "first", float(top_k), wanted, mean=float(top_k))
