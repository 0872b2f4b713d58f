"""Expert-only fine-tuning: the experts or gates of edited layers train, nothing else moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from moe_lab.finetune.recipe import Distilling, check_moe_left
from moe_lab.finetune.tuning import DistillingTuning, Tuning, trained
from moe_lab.models.checkpoint import Model, meta_model
from moe_lab.models.condensing import dense_terms, is_condensed_in_place
from moe_lab.models.edits.base import Edit, GatedParts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import SHARED_NAMES, moe_layers
from moe_lab.option import Option
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Experts(Distilling):
    """Train the shared and kept experts of the edited layers, phase after phase.

    CD-MoE (2412.00069): language modelling, then supervised answers; routers, attention, norms,
    embeddings and all other layers are frozen; no LoRA. In a condensed layer the whole dense MLP
    is made of those experts (its constant gates lie folded in the down projection). Constants that
    stand in for pruned experts train with the experts. Neither padding nor prompts enter the loss.

    quantization_aware: latent weights train while the forward pass computes with what the run's
    quantizer will store of them; what is saved are the latent ones, which it then rounds just so.

    The factors that gates learn are folded back at the end. Distillation (Hinton et al.,
    1503.02531), of which the paper has none, leaves the cross entropy the rest of the loss.
    """

    experts: Annotated[bool, Option("whether the experts train")] = True
    gates: Annotated[
        bool, Option("whether each constant gate of a condensed layer learns a factor")
    ] = False
    distillation: Annotated[
        float,
        Option("share of the loss that the divergence from the intact model has", least=0, most=1),
    ] = 0.0

    quantization_aware: Annotated[
        bool,
        Option(
            "compute with the routed experts as quantize=rtn, moqe or planned will store them; "
            "those of all MoE layers train, whatever a plan edits"
        ),
    ] = False

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return self.distillation > 0

    @property
    def rounds(self) -> bool:
        """Whether it computes with the experts as the run's quantizer will store them."""
        return self.quantization_aware

    @property
    def needs_edits(self) -> bool:
        """Not where experts learn to be stored in few bits."""
        return not self.quantization_aware

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.experts or self.gates):
            raise UserError(
                "finetune.experts=false finetune.gates=false trains nothing: set one of them to "
                "true, or finetune=none"
            )

    def check_model(self, config: Any, layers: Sequence[LayerInfo]) -> None:
        """Refuse to train gates in a family whose condensed layers stay in its own block."""
        super().check_model(config, layers)
        if self.gates and dense_terms(moe_layers(meta_model(config))[0]) is None:
            raise UserError(
                f"finetune.gates=true: layers of {layers[0].family} are condensed in their own "
                "block, whose gates cannot be told from its weights: finetune.gates=false"
            )

    def check(self, plan: Plan) -> None:
        """Refuse a plan in which nothing can train, before any weight is read."""
        kinds = {edit.kind for edit in plan.edited()}
        untouched = all(edit.trains == "nothing" for edit in plan.edited())
        if untouched and not self.quantization_aware:
            raise UserError(
                "fine-tuning trains what stays in layers that a plan prunes, merges or condenses; "
                f"this one edits none so ({', '.join(sorted(kinds)) or 'it changes nothing'}):"
                " finetune=none"
            )
        super().check(plan)
        if self.quantization_aware:
            check_moe_left(plan)
        if not (self.experts or any(edit.gated_parts for edit in plan.edited())):
            raise UserError(
                "finetune.gates=true trains the gates of condensed layers, and this plan condenses "
                "none: finetune.experts=true, or method=condense"
            )
        if self.gates:
            _check_gates(plan)

    def prepare(self, model: Model, plan: Plan) -> Tuning:
        """With `gates` their factors are put into the model, until it is finished."""
        self.check(plan)
        named: dict[str, nn.Parameter] = {}
        if self.quantization_aware and self.experts:
            named = trained(model, moe_layers(model), "experts")
        for edit in plan.edited():
            block = model.get_submodule(edit.name)
            for name, parameter in block.named_parameters() if self.experts else ():
                if _trains(edit, block, name):
                    named[f"{edit.name}.{name}"] = parameter
            if self.gates and edit.gated_parts:
                gates = Gates(block, edit.index, edit.gated_parts)
                named[f"{edit.name}.gates"] = gates.factor
        return ExpertTuning(model, named, self.distillation, self.temperature)


def _trains(edit: Edit, block: nn.Module, name: str) -> bool:
    """Whether a parameter trains, by its name in the edited block.

    Of a layer that was condensed in its family's own block, only what it was condensed to.
    """
    of_experts = name.split(".")[0] in ("experts", *SHARED_NAMES)
    if edit.trains == "all":
        return of_experts or not is_condensed_in_place(block)
    return edit.trains == "experts" and of_experts


def _check_gates(plan: Plan) -> None:
    """Refuse a plan by which the parts of a condensed layer cannot be told apart."""
    last = {edit.index: edit for edit in plan.edited()}
    for edit in plan.edited():
        if edit.gated_parts and not edit.gated_parts.widths:
            raise UserError(
                f"the plan does not say how wide the parts of layer {edit.index} are, so their "
                "gates cannot be told apart: make the plan again, or finetune.gates=false"
            )
        if edit.gated_parts and last[edit.index] is not edit:
            raise UserError(
                f"the plan edits layer {edit.index} again ({last[edit.index].kind}) behind what "
                "has gates, which may change its parts: finetune.gates=false"
            )


class ExpertTuning(DistillingTuning):
    """Training of experts, whose gates' factors are folded in the end."""

    def finish(self) -> None:
        """Put the learned factors of the gates into the down projections, and take them out."""
        super().finish()
        for block in list(self.model.modules()):
            gates = block._modules.get("gates")
            if isinstance(gates, Gates):
                gates.fold(block)

    @property
    def is_plain(self) -> bool:
        """Without gates nothing is folded."""
        return not any(name.endswith(".gates") for name in self.trainable)


class Gates(nn.Module):
    """A learned factor, starting at 1, on each constant gate folded into a dense MLP.

    The hidden units of the MLP are its parts' one after another, the shared part first, then the
    chosen experts in the plan's order, then zero padding, which has no gate.
    """

    part_W: Tensor

    def __init__(self, block: nn.Module, index: int, parts: GatedParts):
        super().__init__()
        if is_condensed_in_place(block):
            raise UserError(
                f"layer {index} was condensed in its family's own block, whose gates cannot be "
                "told from its weights: finetune.gates=false"
            )
        weight = block.get_parameter("down_proj.weight")
        padding = weight.shape[1] - sum(parts.widths)
        shared = len(parts.widths) - parts.num_experts
        if padding < 0 or shared not in (0, 1):
            raise UserError(
                f"the plan gives layer {index} parts of {list(parts.widths)} hidden units for "
                f"{parts.num_experts} experts, but it has {weight.shape[1]}: this plan is not the "
                "one that the checkpoint was made with"
            )
        widths = torch.tensor([*parts.widths, padding])
        part_W = torch.arange(len(widths)).repeat_interleave(widths)
        self.register_buffer("part_W", part_W.to(weight.device), persistent=False)
        ones = torch.ones(len(parts.widths), dtype=torch.float32, device=weight.device)
        self.factor = nn.Parameter(ones)
        down = block.get_submodule("down_proj")
        self.hook = down.register_forward_pre_hook(lambda _, args: self(args[0]))
        block.gates = self

    def factors(self) -> Tensor:
        """The factor [W] of each hidden unit."""
        return torch.cat([self.factor, self.factor.new_ones(1)])[self.part_W]

    def forward(self, h_W: Tensor) -> Tensor:
        # In float32 whatever the hidden units are: near 1, bfloat16 has steps of 0.8 %.
        return h_W * self.factors()

    @torch.no_grad()
    def fold(self, block: nn.Module) -> None:
        """Scale the columns of the block's down projection, and leave it as it was before."""
        weight = block.get_parameter("down_proj.weight")
        weight.copy_(weight.float() * self.factors())
        self.hook.remove()
        del block.gates
