"""What an edit is: what happens to one layer, known by its kind in plan.json.

A kind is a subclass of `Edit` with a `kind` and its own fields, here or outside the package. What
does not differ from the defaults of `Edit` need not be said: it changes no shape, leaves an MoE
layer with all its experts, and trains nothing.

Importing this folder is light: who shows a plan needs no torch. So whatever works on weights
imports moe_lab.models.editing and the like inside its method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from moe_lab.types import LayerInfo, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import MoELayer, Standing

State = Literal["kept", "removed", "joined"]
EDIT_KINDS: dict[str, type[Edit]] = {}  # by kind: those whose modules were imported


class Fate(NamedTuple):
    """What becomes of one expert.

    state: kept, removed, or joined: one that others were merged into, or a part of what stands in
    the layer's place. number: of a joined one, how many it is made of, or its place among the
    parts. into: the expert that a removed one was merged into, -1 where into none.
    """

    state: State
    number: int = 0
    into: int = -1


class GatedParts(NamedTuple):
    """The parts of a dense MLP that each have a constant gate, folded into its down projection.

    widths: hidden units of each, a shared part first where there is one more than num_experts.
    """

    widths: tuple[int, ...]
    num_experts: int


@dataclass(frozen=True)
class Edit:
    """What happens to one layer; index is the decoder layer's in the model before any edit.

    name: path of the layer's MoE block in that model. Experts are named by their numbers in the
    layer as the edit finds it: as an earlier edit of the same layer left it.

    kind: its name in plan.json. changes: whether it changes anything. leaves_moe: whether an MoE
    layer is left. removes_decoder: whether the whole decoder layer goes, behind all edits of a
    plan. drops_layer: whether the layer adds nothing any more. keeps_experts_as_they_are: whether
    the experts that stay keep all their weights, which a kind must say of itself, also where its
    base says so. trains: what of the block finetune=experts may train: nothing, its routed and
    shared experts, or all of it. gone: what pictures call experts that are not kept; joined: what
    they call those whose fate is joined, and their number.
    """

    index: int
    name: str

    kind: ClassVar[str]
    changes: ClassVar[bool] = True
    leaves_moe: ClassVar[bool] = True
    removes_decoder: ClassVar[bool] = False
    drops_layer: ClassVar[bool] = False
    keeps_experts_as_they_are: ClassVar[bool] = False
    trains: ClassVar[Literal["nothing", "experts", "all"]] = "nothing"
    gone: ClassVar[str] = "removed"
    joined: ClassVar[tuple[str, str] | None] = None

    def __init_subclass__(cls) -> None:
        if "keeps_experts_as_they_are" not in vars(cls):
            cls.keeps_experts_as_they_are = False
        if not isinstance(vars(cls).get("kind"), str):  # a base of several kinds
            return
        known = EDIT_KINDS.get(cls.kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"two kinds of edits are called {cls.kind!r}: {known.__module__}."
                f"{known.__qualname__} and {cls.__module__}.{cls.__qualname__}"
            )
        EDIT_KINDS[cls.kind] = cls

    # ------------------------------------------------------------------ as text

    def to_json(self) -> dict[str, Any]:
        """The edit as plan.json has it: index, name, kind, then its own fields in order."""
        own = {one.name: _plain(getattr(self, one.name)) for one in dataclasses.fields(self)}
        first = {"index": own.pop("index"), "name": own.pop("name"), "edit": self.kind}
        return first | own

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Edit:
        """The inverse of `to_json`; TypeError for fields that the kind does not have."""
        return cls(**{key: _tuples(value) for key, value in values.items() if key != "edit"})

    # ------------------------------------------------------------------ carried out

    def check(self, info: LayerInfo | None) -> None:
        """Refuse with a UserError what the layer cannot have, before any weight is read.

        info: the layer as it then is, None where it is no MoE layer any more, which is refused.
        """
        if info is None:
            raise self._refusal()

    def left(self, info: LayerInfo) -> LayerInfo | None:
        """What the layer is afterwards, as far as `check` of a later edit asks; None for no MoE."""
        return info if self.leaves_moe else None

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Give the layer the shapes that the edit leaves, also in a model without weights.

        standing: what stands at the layer, an MoELayer, or the block where it is no MoE layer any
        more; tensors: the plan's own. Returns the block that stands there now: the same one where
        it was changed in place.
        """
        from moe_lab.models.layers import MoELayer

        return standing.block if isinstance(standing, MoELayer) else standing

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Carry the edit out on a layer with its weights; arguments and result of `restructure`."""
        return self.restructure(standing, tensors)

    def moe_layer(self, standing: Standing) -> MoELayer:
        """What stands at the layer where that is an MoE layer; UserError where it is none."""
        from moe_lab.models.layers import MoELayer

        if not isinstance(standing, MoELayer):
            raise self._refusal()
        return standing

    def _refusal(self) -> UserError:
        return UserError(
            f"layer {self.index}: the edit {self.kind!r} works on an MoE layer, and an earlier "
            "edit of the same plan leaves none there: put it before that one, or leave it out"
        )

    # ------------------------------------------------------------------ in a checkpoint

    @classmethod
    def written(cls, standing: Standing) -> dict[str, Any] | None:
        """What config.json must say of a layer or a block so that `replay` can build it again.

        Asked of each MoE layer and of each other module of a model that is saved. As JSON reads it
        back; None for all that is no structure of this kind's own. What moe_lab writes by itself
        is how many experts and router rows there are, and how wide a `DenseMLP` is.
        """
        return None

    @classmethod
    def replay(cls, standing: Standing, written: dict[str, Any]) -> nn.Module:
        """The block that stands at the layer by what `written` said, its weights still to come.

        standing: what the family builds there, with the experts that moe_lab wrote down.
        """
        raise NotImplementedError(f"{cls.__name__} has `written` and no `replay`")

    # ------------------------------------------------------------------ told

    @property
    def title(self) -> str:
        """The kind, and what else tells its edits apart, in words."""
        return self.kind

    @property
    def cells(self) -> dict[str, list[Any]]:
        """What the page shows by column, beside the experts kept and a search's divergence.

        Texts and numbers, one a place; several that belong together are a list in their place.
        """
        return {}

    @property
    def scores(self) -> tuple[float, ...]:
        """One for each expert, or one of the layer, which the plan's notes name."""
        return ()

    @property
    def expert_scores(self) -> tuple[float, ...]:
        """The scores, where they are of the experts."""
        return ()

    @property
    def layer_score(self) -> float | None:
        """The score, where it is of the layer."""
        return self.scores[0] if len(self.scores) == 1 and not self.expert_scores else None

    @property
    def divergence(self) -> tuple[float, ...]:
        """What a search over the experts looked at, after each choice."""
        return ()

    @property
    def experts_kept(self) -> tuple[int, ...] | None:
        """The experts of which something is left, in the order of their new numbers; None: all."""
        return () if self.drops_layer else None

    @property
    def named_experts(self) -> tuple[int, ...]:
        """All experts that it names: the layer has at least so many."""
        return self.experts_kept or ()

    @property
    def num_experts_left(self) -> int | None:
        """How many experts stay, where that is what the edit decides; None elsewhere."""
        return None

    @property
    def keeps_rows(self) -> bool:
        """Whether the layer's router keeps all its rows while experts go."""
        return False

    @property
    def gated_parts(self) -> GatedParts | None:
        """The parts whose gates finetune.gates may train; None where there are no gates."""
        return None

    def width_of(self, expert: int) -> int | None:
        """How many hidden units an expert keeps, where the edit decides that; None elsewhere."""
        return None

    def fate(self, expert: int) -> Fate:
        """What becomes of one expert."""
        stays = self.experts_kept is None or expert in self.experts_kept
        return Fate("kept" if stays else "removed")


@dataclass(frozen=True)
class EditOfExperts(Edit):
    """The `kept` experts stay, kept[i] as expert i; all others go."""

    kept: tuple[int, ...] = ()

    trains = "experts"

    def check(self, info: LayerInfo | None) -> None:
        """Refuse a number of experts with which the layer's router cannot work."""
        from moe_lab.models.layers import check_kept

        super().check(info)
        if info is not None:
            check_kept(info, len(self.kept), self.keeps_rows)

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The kept experts as they are, with or without all router rows."""
        from moe_lab.models.editing import prune_layer

        layer = self.own_layer(standing)
        if self.keeps_rows and len(self.kept) < layer.info.num_experts:
            self.keep_with_all_rows(layer, tensors)
        else:
            prune_layer(layer, self.kept, into=self.into)
        return layer.block

    @property
    def into(self) -> dict[int, int]:
        """The kept expert that another one went into, where that is what the edit does."""
        return {}

    def keep_with_all_rows(self, layer: MoELayer, tensors: Mapping[str, Tensor]) -> None:
        """The same in place where `keeps_rows`: the kind says where the others' rows lead."""
        raise NotImplementedError(f"{type(self).__name__} keeps rows and does not say how")

    def own_layer(self, standing: Standing) -> MoELayer:
        """The MoE layer that stands there; UserError where its rows lead elsewhere already."""
        from moe_lab.models.layers import check_own_rows

        layer = self.moe_layer(standing)
        check_own_rows(layer.info)
        return layer

    def left(self, info: LayerInfo) -> LayerInfo | None:
        """The layer with fewer experts."""
        number = len(self.kept)
        if self.keeps_rows and number < info.num_experts:
            return dataclasses.replace(info, real_experts=number)
        return dataclasses.replace(info, num_experts=number)

    @property
    def expert_scores(self) -> tuple[float, ...]:
        """One for each expert; may be empty."""
        return self.scores

    @property
    def experts_kept(self) -> tuple[int, ...] | None:
        """The experts that stay."""
        return self.kept

    @property
    def num_experts_left(self) -> int | None:
        """How many stay."""
        return len(self.kept)


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
