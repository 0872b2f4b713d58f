"""Router knowledge distillation: after a compression the routers learn from the intact model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab.finetune.recipe import Distilling, check_moe_left
from moe_lab.finetune.tuning import DistillingTuning, Tuning, trained
from moe_lab.models import routers as model_routers
from moe_lab.models.checkpoint import Model, meta_model
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import moe_layers
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class RouterKD(Distilling):
    """Train the routers of all MoE layers to give the intact model's next-token distributions.

    Router-KD (2603.02217): L = T^2 / N sum_t KL(softmax(z_t / T) || softmax(z'_t / T)) over the N
    targets, z the logits over the vocabulary of the intact model and z' those of the compressed
    one; all but the routers is frozen. Since distributions over the vocabulary are compared, and
    not the routers' own, the two may differ in their experts. Correction biases that no gradient
    reaches stay as they are. The text needs no answers; here prompts are no targets either.

    With teacher_top_k=None the loss is the paper's; else the likeliest tokens are told apart and
    all others count as one, which is ours. The paper's learning rate, batch and number of samples
    were not found in public text.
    """

    distils = True

    def check(self, plan: Plan) -> None:
        """Refuse a plan after which no MoE layer is left, or which changes nothing."""
        super().check(plan)
        check_moe_left(plan)

    def check_model(self, config: Any, layers: Sequence[LayerInfo]) -> None:
        """Refuse routers that no gradient reaches."""
        if layers[0].top_k == 1 and not model_routers.learns_with_one(
            moe_layers(meta_model(config))[0]
        ):
            raise UserError(
                "finetune=router_kd: with one expert for each token this family's router weights "
                "are always 1, so that no loss has a gradient for its routers: finetune=experts "
                "with finetune.distillation=1 trains what stays of the edited layers instead"
            )

    def prepare(self, model: Model, plan: Plan) -> Tuning:
        """The recipe at work on a loaded model."""
        routers = trained(model, moe_layers(model), "routers")
        return DistillingTuning(model, routers, 1.0, self.temperature)
