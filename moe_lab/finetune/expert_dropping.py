"""Task-specific expert pruning: fine-tuning that drops the experts which the task does not use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from moe_lab import processes
from moe_lab.finetune.recipe import Recipe, Trains, check_moe_left
from moe_lab.finetune.tuning import Tuning, next_token_loss, trained
from moe_lab.models.checkpoint import Model, meta_model
from moe_lab.models.editing import prune_layer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.routers import restricted, set_top_k
from moe_lab.option import Option
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)
ROUTED = ("hidden_states", "top_k_index", "top_k_weights")  # what experts modules take


@dataclass(frozen=True)
class ExpertDropping(Recipe):
    """Fine-tuning in windows, after each of which every layer loses the experts it used little.

    Task-specific expert pruning (2206.00277). alpha_e is the router weight that expert e got in
    the window, as a share of all that its layer's experts got (valid tokens, no padding); experts
    with alpha_e < beta / Z go, Z the number alive in the layer. As many as a token gets stay
    until one is forced.

    Windows divide the training, or its first half with force=half: then only the expert with the
    largest alpha stays in each layer, every token gets it, and the rest trains as a dense model
    (the paper's eager dropping). With force=end that happens when the training is over (its staged
    dropping).
    """

    windows: Annotated[int, Option("equal parts of the training, each ends in a drop", least=1)] = 8
    beta: Annotated[float, Option("share of an even use below which an expert goes", above=0)] = 0.8
    force: Annotated[
        str | None,
        Option(
            "when each layer is left one expert: at half of the training (the paper's eager "
            "dropping), in the end (its staged one), or null for never",
            among=("half", "end"),
        ),
    ] = "half"
    trains: Trains = "both"

    needs_edits = False

    def check(self, plan: Plan) -> None:
        """Refuse a plan after which no MoE layer is left to train."""
        super().check(plan)
        check_moe_left(plan)
        if rows := [edit.index for edit in plan.edited() if edit.keeps_rows]:
            raise UserError(
                f"finetune=expert_dropping drops experts with their router rows, and in layers "
                f"{rows} this plan keeps rows whose experts are gone: method.replacement=nothing, "
                "method.router=dominant for a merge, or finetune=seer"
            )

    def check_model(self, config: Any, layers: Sequence[LayerInfo]) -> None:
        """Refuse routers that cannot work with fewer experts, tried on a model without weights."""
        for info in layers:
            if info.real_experts:
                raise UserError(
                    f"finetune=expert_dropping: in layer {info.index} {info.num_experts} router "
                    f"rows lead to {info.real_experts} experts, which cannot be dropped one by "
                    "one; finetune=seer and finetune=experts train them"
                )
            if info.groups > 1:
                raise UserError(
                    f"finetune=expert_dropping: the router of layer {info.index} works on "
                    f"{info.groups} groups of experts, which must stay equally large, and here "
                    "each expert is dropped by itself; method=prune ratio=uniform keeps groups "
                    "equal, and finetune=seer trains what it leaves"
                )
        model = meta_model(config)
        with restricted(model, {info.index: range(info.num_experts) for info in layers}):
            pass
        if self.force is None:
            return
        for layer in moe_layers(model):
            prune_layer(layer, [0])
        try:
            set_top_k(model, 1)
        except RuntimeError as error:
            raise UserError(
                f"finetune.force={self.force}: routers of the family {config.model_type!r} cannot "
                f"work with one expert ({error}): finetune.force=null drops by the threshold alone"
            ) from error

    def check_steps(self, num_steps: int) -> None:
        """Say where there are fewer steps than windows."""
        most = self.forced_after(num_steps)
        if self.windows > most:
            logger.warning(
                "asked for finetune.windows=%d, given %d: the training has %d steps, %d of them "
                "before the last drop, and a window has at least one", self.windows, most,
                num_steps, most,
            )  # fmt: skip

    def forced_after(self, num_steps: int) -> int:
        """The number of steps after which each layer's one expert is taken, or the last dropped."""
        return max(1, num_steps // 2) if self.force == "half" else num_steps

    def ends_window(self, step: int, num_steps: int) -> bool:
        """Whether a window is over after the step with this number, counted from 0."""
        length = self.forced_after(num_steps)
        before, after = (self.windows * number // length for number in (step, step + 1))
        return step < length and after > before

    def prepare(self, model: Model, plan: Plan) -> ExpertDroppingTuning:
        """The recipe at work on a loaded model."""
        return ExpertDroppingTuning(self, model)


class ExpertDroppingTuning(Tuning):
    """Sums the routers' weights, and drops experts when a window ends.

    A dropped expert is only out of the routers' reach until `finish` removes it: neither
    parameters nor the optimizer change in the middle of the training.
    """

    def __init__(self, recipe: ExpertDropping, model: Model):
        self.layers = {layer.info.index: layer for layer in moe_layers(model)}
        super().__init__(model, trained(model, list(self.layers.values()), recipe.trains))
        self.recipe = recipe
        numbers = {index: layer.info.num_experts for index, layer in self.layers.items()}
        self.alive = {index: list(range(number)) for index, number in numbers.items()}
        self.row = {index: row for row, index in enumerate(self.layers)}
        # Router weight by layer (N of them) and expert: of the window over all processes, and of
        # this process's part of a step.
        self.window_NE = torch.zeros(len(numbers), max(numbers.values()), dtype=torch.float64)
        self.step_NE: Tensor | None = None
        self.valid_T: Tensor | None = None
        self.restriction = ExitStack()
        self.handles = [
            layer.experts.register_forward_pre_hook(self._hearing(layer), with_kwargs=True)
            for layer in self.layers.values()
        ]

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The task's loss; while it trains, the experts' router weights are added up.

        What is computed again in the backward pass, and validation, are not heard.
        """
        if torch.is_grad_enabled() and self.counts:
            self.valid_T = batch["attention_mask"].bool().reshape(-1)
        try:
            return {"loss": next_token_loss(self.model, batch)}
        finally:
            self.valid_T = None

    def _hearing(self, layer: MoELayer) -> Callable[..., None]:
        row = self.row[layer.info.index]

        def hear(experts: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            if self.valid_T is None:
                return
            given = dict(zip(ROUTED, args, strict=False)) | named
            index_TK, weight_TK = (
                given[name].detach().reshape(len(self.valid_T), -1)[self.valid_T]
                for name in ROUTED[1:]
            )
            if self.step_NE is None:
                self.step_NE = torch.zeros_like(self.window_NE, device=index_TK.device)
            number = self.step_NE.shape[1]
            heard_E = torch.bincount(
                index_TK.flatten(), weight_TK.flatten().double(), minlength=number
            )
            self.step_NE[row] += heard_E[:number]  # zero experts come behind

        return hear

    def after_step(self, step: int, num_steps: int) -> dict[str, Any]:
        """The mean number of experts alive in a layer, and at a window's end who was dropped."""
        device = next(self.model.parameters()).device
        heard = torch.zeros_like(self.window_NE, device=device)
        self.window_NE += processes.total(heard if self.step_NE is None else self.step_NE).cpu()
        self.step_NE = None
        dropped = {}
        if self.recipe.ends_window(step, num_steps):
            last = step + 1 == self.recipe.forced_after(num_steps)
            dropped = self._drop(forced=last and self.recipe.force is not None)
            self.window_NE.zero_()
        counts = [len(alive) for alive in self.alive.values()]
        return {"experts_alive": sum(counts) / len(counts)} | dropped

    def alpha(self) -> dict[int, Tensor]:
        """The share [E] of its layer's router weight that each expert got in the window so far."""
        shares = {}
        for index, layer in self.layers.items():
            weight_E = self.window_NE[self.row[index], : layer.info.num_experts]
            shares[index] = weight_E / weight_E.sum()
        return shares

    def _drop(self, forced: bool) -> dict[str, Any]:
        dropped = {}
        for index, alpha_E in self.alpha().items():
            top_k = self.layers[index].info.top_k
            before = self.alive[index]
            beta, fewest = (float("inf"), 1) if forced else (self.recipe.beta, top_k)
            self.alive[index] = survivors(alpha_E, before, beta, fewest)
            if gone := sorted(set(before) - set(self.alive[index])):
                dropped[str(index)] = gone
        self._restrict()
        number = sum(map(len, dropped.values()))
        logger.info("a window ended: %d experts of %d layers are dropped", number, len(dropped))
        return {"dropped": dropped}

    def _restrict(self) -> None:
        """Let routers choose among the living experts only; one for each token if it is forced."""
        self.restriction.close()
        if all(len(alive) == 1 for alive in self.alive.values()):
            set_top_k(self.model, 1)
        self.restriction.enter_context(restricted(self.model, self._reduced()))

    def _reduced(self) -> dict[int, list[int]]:
        numbers = {index: layer.info.num_experts for index, layer in self.layers.items()}
        return {index: kept for index, kept in self.alive.items() if len(kept) < numbers[index]}

    def state(self) -> dict[str, Tensor]:
        """Who is alive, and the router weights of the window so far."""
        alive = {f"alive/{index}": torch.tensor(kept) for index, kept in self.alive.items()}
        return alive | {"window": self.window_NE}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on in the middle of a window."""
        self.window_NE = state["window"].clone()
        self.alive = {index: state[f"alive/{index}"].tolist() for index in self.alive}
        self._restrict()

    def finish(self) -> None:
        """Remove the dropped experts."""
        if not self._reduced():
            logger.warning(
                "finetune=expert_dropping dropped no expert: each got at least finetune.beta=%g of "
                "an even share of its layer's router weight; a larger beta drops more",
                self.recipe.beta,
            )  # fmt: skip
        for handle in self.handles:
            handle.remove()
        self.restriction.close()
        for index, kept in self._reduced().items():
            prune_layer(self.layers[index], kept)


def survivors(alpha_E: Tensor, alive: Sequence[int], beta: float, fewest: int) -> list[int]:
    """Experts with alpha >= beta / Z, Z how many are alive, and the `fewest` largest whatever."""
    shares = alpha_E.tolist()
    ranked = sorted(alive, key=lambda expert: (-shares[expert], expert))
    threshold = beta / len(alive)
    return sorted(
        expert for rank, expert in enumerate(ranked) if rank < fewest or shares[expert] >= threshold
    )
