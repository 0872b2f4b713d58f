"""Layers condensed in closed form, and by hand from a model's own activations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from families import tiny_batch, tiny_model
from torch import Tensor, nn

from moe_lab.methods.condense.method import Condense
from moe_lab.models.dense_units import UnitWeights
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile


class Subject(NamedTuple):
    """A model in float64, unless told, its documents as batches of one, and what is profiled."""

    model: Any
    batches: list[dict[str, Tensor]]
    profile: Profile


def subject_of(
    family: str,
    documents: int = 12,
    remembered: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Subject:
    """Documents of different lengths with padding; remembered: where answers are kept."""
    model = tiny_model(family, **changes).to(dtype)
    model.set_experts_implementation("eager")  # the default one knows no float64
    rows = [
        {name: tensor[row : row + 1] for name, tensor in tiny_batch(seed=seed).items()}
        for seed in range(documents // 3)
        for row in range(3)
    ]
    found = collect_statistics(model, rows)

    def open_stream(
        num_samples: int | None = None,
        documents: Sequence[int] | None = None,
        added: Sequence[Sequence[int]] = (),
    ) -> LayerStream:
        every = rows + [batch_of(one) for one in added]
        places = list(range(len(every)) if documents is None else documents)
        pairs = [places[first : first + 2] for first in range(0, len(places), 2)]
        batches = [padded([every[place] for place in pair]) for pair in pairs]
        return LayerStream(model, batches, positions=places)

    def remember(identity: Mapping[str, Any], work: Any, code: object) -> Any:
        if remembered is None:
            return work()
        key = str(identity)
        if key not in remembered:
            remembered[key] = work()
        return remembered[key]

    profile = Profile(
        found, open_stream, lambda _=None: (model, rows[:1]), remember, remember,
        num_documents=len(rows),
    )  # fmt: skip
    return Subject(model, rows, profile)


def batch_of(ids: Sequence[int]) -> dict[str, Tensor]:
    """A document of these token ids, as a batch of one."""
    ids_1L = torch.tensor([list(ids)])
    return {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)}


def padded(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of one as one batch."""
    length = max(one["input_ids"].shape[1] for one in rows)
    return {
        name: torch.cat([nn.functional.pad(r[name], (0, length - r[name].shape[1])) for r in rows])
        for name in rows[0]
    }


def plan_of(subject: Subject, **options: Any) -> Plan:
    """The plan of method=condense with these options."""
    asked: dict[str, Any] = {"num_layers": 1, "num_routed": 2, "experts": [0, 1]}
    method = Condense(**(asked | options))
    method.check([one.info for one in subject.profile.statistics])
    return method.plan(subject.profile)


def edited(subject: Subject, plan: Plan) -> Any:
    """A copy of the model after the plan."""
    model = copy.deepcopy(subject.model)
    apply_plan(model, plan)
    return model


class Seen(NamedTuple):
    """At one decoder layer, valid tokens [T, D]: what the block gets and gives, what leaves."""

    x_TD: Tensor
    y_TD: Tensor
    leaving_TD: Tensor


@torch.no_grad()
def seen_at(model: Any, batches: Sequence[dict[str, Tensor]], index: int) -> Seen:
    """By hooks on a whole model."""
    decoder = model.model.layers[index]
    found: dict[str, list[Tensor]] = {"x": [], "y": [], "leaving": []}

    def block(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        found["x"].append(args[0].flatten(0, -2))
        found["y"].append(hidden_of(output).flatten(0, -2))

    def layer(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        found["leaving"].append(hidden_of(output).flatten(0, -2))

    handles = [decoder.mlp.register_forward_hook(block), decoder.register_forward_hook(layer)]
    for batch in batches:
        model(**batch)
        valid = batch["attention_mask"].bool().flatten()
        for values in found.values():
            values[-1] = values[-1][valid]
    for handle in handles:
        handle.remove()
    return Seen(*(torch.cat(values) for values in found.values()))


def by_hand(subject: Subject, index: int, units_N2: Tensor, seen: Seen, weight_T: Tensor) -> Tensor:
    """The columns [N, D] with the least weighted squared error, by scipy."""
    layer = {one.info.index: one for one in moe_layers(subject.model)}[index]
    z_TN = UnitWeights(layer).hidden(units_N2)(seen.x_TD).detach()
    root_T1 = weight_T.sqrt()[:, None]
    solution = scipy.linalg.lstsq((z_TN * root_T1).numpy(), (seen.y_TD * root_T1).numpy())[0]
    return torch.from_numpy(np.asarray(solution))


def output_weights(seen: Seen) -> Tensor:
    """What condense.token_weight=output makes each token weigh."""
    return 1 / seen.leaving_TD.square().mean(dim=1)
