"""Plan: what happens to each layer, decided and written down before any weight is touched."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.files import PLAN, PLANS
from moe_lab.finite import not_finite_in
from moe_lab.integrity import write_whole
from moe_lab.methods.base import Method
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, Model
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan, check_plan
from moe_lab.models.head import sized_with_head
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.stream import LayerStream
from moe_lab.profile import collect
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Answer, Profile, Tensors
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact
from moe_lab.types import UserError

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

logger = logging.getLogger(__name__)
ANSWER = "answer.json"
TENSORS = "answer.safetensors"


@dataclass(frozen=True)
class Planning:
    """A model, its profile on the calibration set, and a method with its composed options."""

    checkpoint: Checkpoint
    profile: Artifact
    tokens: Tokens
    method: Method
    options: dict[str, Any]


def plan(context: Context, asked: Planning) -> Artifact:
    """A folder with plan.json.

    Where the profile has groups, plans/<number>.json has a plan for each, and plan.json changes
    nothing but names the groups by number.
    """
    method = asked.method
    identity = {
        "profile": asked.profile.key,
        "method": method.identity(asked.options),
        "code": code_version(plan, method, *method.parts()),
    }
    return context.store.get("plan", identity, lambda folder: _write(context, asked, folder))


def _write(context: Context, asked: Planning, folder: Path) -> None:
    model, profiled = IntactModel(context, asked), asked.profile.folder
    sized = sized_with_head(asked.checkpoint, asked.checkpoint.layers(), asked.method.lm_head)
    stored = {info.index: info for info in sized}

    def planned(layers: list[LayerStatistics]) -> Plan:
        for layer in layers:  # profiled as the model computes; sizes count as it is saved
            layer.info = stored[layer.info.index]
        made = asked.method.plan(model.profile(layers))
        check_plan([layer.info for layer in layers], made.edited())
        check_numbers(made)
        asks = {"mtp": asked.method.mtp, "lm_head": asked.method.lm_head}
        other = {name: how for name, how in asks.items() if how != getattr(Method, name)}
        return dataclasses.replace(made, notes=made.notes | other)

    common, groups = collect.load_statistics(profiled), collect.load_groups(profiled)
    for number, layers in enumerate(groups.values()):
        (folder / PLANS).mkdir(exist_ok=True)
        _save(planned(layers), folder / PLANS / f"{number}.json")
    _save(_keep_all(common, list(groups)) if groups else planned(common), folder / PLAN)


def check_numbers(made: Plan) -> None:
    """Refuse a plan with a number that is none, wherever it stands: gates, divergences, notes."""
    parts = [(f"layer {one.index}", one.to_json()) for one in (*made.edits, *made.searched)]
    parts += [("the choice of layers", {"divergence": list(made.layer_divergence)})]
    parts += [("the plan's notes", made.notes)]
    parts += [("the plan's tensors", {name: float(t.abs().max()) if t.numel() else 0.0
               for name, t in made.tensors.items()})]  # fmt: skip
    for where, values in parts:
        if place := not_finite_in(values):
            raise UserError(
                f"{where}: {place} of the plan is not finite, and the statistics are: what "
                "decided it has no value here"
            )


def _save(made: Plan, path: Path) -> None:
    made.write_tensors(path)
    write_whole(path, made.to_text())


def _keep_all(layers: list[LayerStatistics], groups: list[str]) -> Plan:
    edits = tuple(KeepLayer(layer.info.index, layer.info.name) for layer in layers)
    return Plan(edits, notes={"groups": groups})


class IntactModel:
    """What a method may ask of the model beside its statistics, made when it asks.

    What a search finds on the way is kept, step by step (kind `search`): searches go on where
    they were stopped, and plans that ask the same questions share the answers.
    """

    def __init__(self, context: Context, asked: Planning):
        self.context, self.asked = context, asked

    def profile(self, layers: list[LayerStatistics]) -> Profile:
        """What the method looks at."""
        number = len(self.asked.tokens.samples)
        return Profile(
            layers, self.open_stream, self.open_model, self.remember, self.remember_tensors, number
        )

    def open_model(self, num_samples: int | None = None) -> tuple[Model, list[dict[str, Tensor]]]:
        """The model, whole, and the first samples of the calibration set (None: all)."""
        compute = self.context.compute
        batches = self._sample(num_samples).batches(
            compute.batch_size, compute.device, compute.batch_tokens
        )
        return self.asked.checkpoint.load(compute.device), batches

    def open_stream(
        self,
        num_samples: int | None = None,
        documents: Sequence[int] | None = None,
        added: Sequence[Sequence[int]] = (),
    ) -> LayerStream:
        """Its decoder layers over these samples, one in memory at a time.

        added: token ids of documents that stand behind the calibration set's last one.
        """
        compute, checkpoint = self.context.compute, self.asked.checkpoint
        limit = int(compute.cache_gib * 2**30)
        cache = Activations(limit, folder=self.context.store.root, device=compute.device)
        model = LayerwiseModel(checkpoint, compute.device, keep_bytes=limit)
        tokens = self._sample(num_samples) if documents is None else self.asked.tokens
        tokens = Tokens(tokens.samples + tuple(map(tuple, added)), tokens.pad_id)
        places = range(len(tokens.samples)) if documents is None else documents
        sample = tokens.take(places)
        batches = sample.batches(compute.batch_size, compute.device, compute.batch_tokens)
        positions = [places[place] for place in sample.positions_by_length()]
        return LayerStream(model, batches, cache, positions)

    def remember(
        self, identity: dict[str, Any], work: Callable[[], Answer], code: Sequence[object]
    ) -> Answer:
        """What `work` gave for this question and code before, or now."""
        kept = self._kept(identity, functools.partial(_answer, work), code)
        known: Answer = json.loads((kept.folder / ANSWER).read_text())
        return known

    def remember_tensors(
        self, identity: dict[str, Any], work: Callable[[], Tensors], code: Sequence[object]
    ) -> Tensors:
        """The same of tensors by name."""
        kept = self._kept(identity, functools.partial(_answer_in_tensors, work), code)
        return load_file(kept.folder / TENSORS)

    def _kept(
        self, identity: dict[str, Any], make: Callable[[Path], None], code: Sequence[object]
    ) -> Artifact:
        question = identity | {"profile": self.asked.profile.key, "code": code_version(*code)}
        return self.context.store.get("search", question, make)

    def _sample(self, num_samples: int | None) -> Tokens:
        tokens = self.asked.tokens
        if num_samples is not None and num_samples > len(tokens.samples):
            _say_fewer(num_samples, len(tokens.samples))
        return tokens.take(range(len(tokens.samples))[: num_samples or None])


@functools.cache
def _say_fewer(asked: int, there: int) -> None:
    logger.info("asked for the first %d calibration samples, given all %d that there are "
                "(calibration.num_samples)", asked, there)  # fmt: skip


def _answer(work: Callable[[], Any], folder: Path) -> None:
    write_whole(folder / ANSWER, json.dumps(work()) + "\n")


def _answer_in_tensors(work: Callable[[], Tensors], folder: Path) -> None:
    parts = {name: tensor.contiguous().cpu() for name, tensor in work().items()}
    save_file(parts, folder / TENSORS)


def copy_plan(planned: Artifact, folder: Path) -> Plan:
    """Put plan.json, its tensors and the groups' plans/ into the run's folder; the plan."""
    if (planned.folder / PLANS).is_dir():
        shutil.copytree(planned.folder / PLANS, folder / PLANS, dirs_exist_ok=True)
    tensors = planned.folder / PLAN.replace(".json", ".safetensors")
    (folder / tensors.name).unlink(missing_ok=True)  # of what was asked for here before
    if tensors.is_file():
        shutil.copyfile(tensors, folder / tensors.name)
    shutil.copyfile(planned.folder / PLAN, folder / PLAN)
    return Plan.load(folder / PLAN)


def _inputs(run: Run) -> dict[str, Planning]:
    return {
        "plan": Planning(
            run.dense, run.results["profile"], run.texts["calibration"],
            run.parts.method, run.config["method"],
        )
    }  # fmt: skip


def _read(run: Run, name: str, result: Artifact) -> None:
    notes = copy_plan(result, run.folder).notes
    if "statistics" in notes:
        run.report["statistics"] = notes["statistics"]
    plans = sorted((result.folder / PLANS).glob("*.json")) or [result.folder / PLAN]
    tell_given([Plan.load(path).notes for path in plans], run.report)


WHOLE = {  # what given has in words -> what goes, one of it, and what keeps a share from its size
    "experts": ("experts", "expert", "whole experts and what routers need"),
    "expert_parameters": ("parameters of experts", "parameter", "whole ranks"),
    "hidden_units": ("", "hidden unit", "whole hidden units, floors and multiples"),
}


def tell_given(notes: Sequence[Mapping[str, Any]], report: dict[str, Any]) -> None:
    """Say what goes of the experts beside what was asked for; of groups' plans the mean.

    It differs where whole experts, multiples, groups of experts and floors leave something else.
    """
    every = [one["given"] for one in notes if "given" in one]
    if not every:
        return
    asked, kind = notes[0].get("asked", {}), next(name for name in WHOLE if name in every[0])
    what, one_of_it, why = WHOLE[kind]
    words = f"{every[0][kind]} {what}".strip()
    for unit in (unit for unit in ("ratio", "target_gib") if unit in every[0]):
        given = sum(one[unit] for one in every) / len(every)
        report[f"plan/{unit}"] = given
        if unit in asked and not math.isclose(given, asked[unit], abs_tol=1e-6):
            logger.info(
                "asked for ratio.%s=%g, given %.4g: %s go, %s taken into account",
                unit, asked[unit], given, words, why,
            )  # fmt: skip
        elif unit not in asked:
            logger.info("%s go", words)
    if not any(one.get("ratio", 1) for one in every):
        logger.warning("no %s goes: what comes of this plan computes what the model did", one_of_it)


STAGE = Stage(_inputs, plan, _read)
