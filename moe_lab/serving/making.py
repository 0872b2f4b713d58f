"""The checkpoints that are served: what each method makes of a model, and what it computes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_lab.dependencies import code_version
from moe_lab.files import CHECKPOINT
from moe_lab.methods.base import Method
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.drop_blocks import DropBlocks
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.listed import Listed
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, Model, load, resolve
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.opening import no_bars
from moe_lab.models.routers import set_top_k, set_top_k_of
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collecting
from moe_lab.profile.profile import Profile
from moe_lab.serving.in_transformers import continued
from moe_lab.serving.subjects import Subject
from moe_lab.store import Artifact, Store
from moe_lab.types import LayerInfo

PROMPTS = (
    "The experts of a layer are",
    "def square(number):\n    return",
    "Two and two are four; four and four are",
)
NUM_NEW_TOKENS = 16  # for each prompt
_LIMIT = 2**30  # bytes of memory for what is kept between layers: more than tiny models need
COMPUTED = "computed.safetensors"
Layers = Sequence[LayerInfo]


@dataclass(frozen=True)
class CheckpointRecipe:
    """How a checkpoint is made of a dense one.

    method: for these MoE layers, None where nothing is done; changed: what becomes of its plan;
    finish: what is done to the model behind it; twins: whether layers may be filled up with copies.
    """

    method: Callable[[Layers], Method | None]
    changed: Callable[[Plan], Plan] = lambda plan: plan
    finish: Callable[[Model], None] = lambda model: None
    twins: float = 0.0


def _some(layers: Layers, number: int) -> list[int]:
    """The last MoE layers but one: a first or last layer is easily forgotten, or treated apart."""
    return [info.index for info in layers][-1 - number : -1]


def _prune(ratio: float, replacement: str = "nothing") -> CheckpointRecipe:
    return CheckpointRecipe(lambda layers: Prune(reap, Uniform(ratio), replacement))


def _merge(grouping: str, router: str) -> CheckpointRecipe:
    return CheckpointRecipe(
        lambda layers: Merge(1, grouping=grouping, ratio=Uniform(0.25), router=router)
    )


def _condense(
    number: int, num_routed: int, padding: float, convert: str | None = None
) -> CheckpointRecipe:
    def method(layers: Layers) -> Method:
        chosen = _some(layers, number)
        return Condense(
            number, num_routed, experts="frequency", layers=chosen, padding=padding, convert=convert
        )

    return CheckpointRecipe(method)


def _drop(number: int, padding: float) -> CheckpointRecipe:
    return CheckpointRecipe(
        lambda layers: DropLayers(number, layers=_some(layers, number), padding=padding)
    )


def _unequal(layers: Layers) -> Listed:
    """Every other layer keeps all its experts, the others three quarters."""
    return Listed([one.num_experts * (3 + place % 2) // 4 for place, one in enumerate(layers)])


def _two_widths(plan: Plan) -> Plan:
    """A plan whose last condensed layer has an expert less than the others."""
    last = [one for one in plan.edits if isinstance(one, CondenseLayer)][-1]
    fewer = dataclasses.replace(
        last, experts=last.experts[:-1], gates=last.gates[:-1], widths=last.widths[:-1]
    )
    edits = tuple(fewer if one is last else one for one in plan.edits)
    return dataclasses.replace(plan, edits=edits)


def _narrow(model: Model) -> None:
    """A layer's experts keep about half of their hidden units, and a token gets one of them less.

    No method cuts inside experts; the form can say it.
    """
    layer = moe_layers(model)[-2]
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    width = layer.info.expert_width // 16 * 8  # grouped products take multiples of 16 bytes
    halves = [half[:, :width] for half in gate_up.chunk(2, dim=1)]
    layer.experts.gate_up_proj = nn.Parameter(torch.cat(halves, dim=1))
    layer.experts.down_proj = nn.Parameter(down[..., :width].contiguous())
    set_top_k_of(layer, layer.info.top_k - 1)


INTACT = "dense"
OF_ALL = {
    INTACT: CheckpointRecipe(lambda layers: None),
    "prune .25": _prune(0.25),
}
OF_SHIPPED = {
    "prune .5": _prune(0.5),
    "merge m_smoe, dominant row": _merge("m_smoe", "dominant"),
    "merge hc_smoe, dominant row": _merge("hc_smoe", "dominant"),
    "merge ream, dominant row": _merge("ream", "dominant"),
    "merge m_smoe, all rows": _merge("m_smoe", "all"),
    "prune .25, zero": _prune(0.25, "zero"),
    "prune .25, constant": _prune(0.25, "constant"),
    "prune .25, copy": _prune(0.25, "copy"),
    "prune .25, ratio=global": CheckpointRecipe(lambda layers: Prune(reap, Global(0.25))),
    "drop_layers": _drop(2, 0.01),
    "drop_layers, padding=0": _drop(2, 0),
    "drop_blocks": CheckpointRecipe(lambda layers: DropBlocks(2, layers=_some(layers, 2))),
    "one expert per token, twins": CheckpointRecipe(
        lambda layers: Prune(reap, Global(0.25)),
        finish=lambda model: set_top_k(model, 1),
        twins=1.0,
    ),
}
WITH_SHARED = {
    "CD-MoE-SR": _condense(3, 4, 0.01),
    "CD-MoE-S": _condense(3, 0, 1.0),
    "CD-MoE-S, padding=0": _condense(3, 0, 0),
    "CD-MoE-SR, two widths, padding=0": dataclasses.replace(
        _condense(3, 4, 0), changed=_two_widths
    ),
}
WITHOUT_SHARED = {
    "CD-MoE-R": _condense(3, 2, 0.01),
    "CD-MoE-R, convert=superset": _condense(3, 2, 0.01, "superset"),
}
OF_RANDOM = {
    "condense": _condense(1, 1, 1.0),
    "drop_layers": _drop(1, 1.0),
    "unequal": CheckpointRecipe(lambda layers: Prune(reap, _unequal(layers))),
    "unequal, constant": CheckpointRecipe(lambda layers: Prune(reap, _unequal(layers), "constant")),
}


NARROWED = {
    "narrower experts, fewer per token": CheckpointRecipe(lambda layers: None, finish=_narrow)
}


def recipes(subject: Subject) -> dict[str, CheckpointRecipe]:
    """What is made of a model, by name; the dense one first."""
    if subject.model_type == "gpt_oss":  # whose experts lie the other way round
        return OF_ALL | OF_RANDOM
    if subject.random:
        return OF_ALL | OF_RANDOM | NARROWED
    more = WITHOUT_SHARED if subject.model_type == "mixtral" else WITH_SHARED
    return OF_ALL | OF_SHIPPED | more | NARROWED


def stored(store: Store, subject: Subject, made: str) -> Artifact:
    """A folder with checkpoint/ and what transformers computes with it in float32."""
    recipe = recipes(subject)[made]
    identity = {"subject": subject.name, "made": made, "code": code_version(stored)}

    def make(folder: Path) -> None:
        with _quiet():
            source = subject.write(folder / "source")
            _write(recipe, resolve(source), folder / CHECKPOINT)
            save_file(_computed(folder / CHECKPOINT), folder / COMPUTED)

    return store.get("serving", identity, make)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the stages tell of each of a hundred checkpoints."""
    ours = logging.getLogger("moe_lab")
    before = ours.level
    ours.setLevel(logging.WARNING)
    try:
        with no_bars():
            yield
    finally:
        ours.setLevel(before)


def _write(recipe: CheckpointRecipe, dense: Checkpoint, folder: Path) -> None:
    """What the stages plan, compress and finetune do, with the same functions."""
    layers = dense.layers()
    model, method, padding, convert = dense.load(), recipe.method(layers), None, None
    if method is not None:
        method.check(layers)
        plan = recipe.changed(method.plan(_profile(dense)))
        check_plan(layers, plan.edited())
        apply_plan(model, plan)
        padding, convert = plan.notes.get("padding"), plan.notes.get("convert")
    recipe.finish(model)
    save_checkpoint(model, folder, dense.path, padding, recipe.twins, convert)


def _profile(dense: Checkpoint) -> Profile:
    """The statistics of random tokens: which experts go does not matter here."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, dense.config.vocab_size, (4, 64), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = dense.load()
    with (
        torch.no_grad(),
        collecting(model) as collection,
        collection.batch(torch.ones_like(ids, dtype=torch.bool)),
    ):
        model(**batch, use_cache=False)
    statistics = collection.of_group()

    def open_stream(num_samples: int | None = None) -> LayerStream:
        model = LayerwiseModel(dense, "cpu", keep_bytes=_LIMIT)
        return LayerStream(model, [batch], Activations(limit=_LIMIT))

    return Profile(statistics, open_stream, lambda _=None: (dense.load(), [batch]))


def prompts_for(checkpoint: Checkpoint) -> list[list[int]]:
    """The prompts as a checkpoint's tokenizer has them."""
    tokenizer = checkpoint.tokenizer()
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def _computed(folder: Path) -> dict[str, Tensor]:
    """The logprobs [P, T, V] at each step of greedy decoding behind each prompt, and its tokens."""
    model = load(folder, dtype="float32")
    steps = [continued(model, ids, NUM_NEW_TOKENS) for ids in prompts_for(Checkpoint(folder))]
    logprobs_PTV = torch.stack(steps)
    return {"logprobs": logprobs_PTV[:, 0].clone(), **_greedy(logprobs_PTV)}


def _greedy(logprobs_PTV: Tensor) -> dict[str, Tensor]:
    """The tokens [P, T] that are chosen, and by how much [P, T] each is ahead of the second."""
    best = logprobs_PTV.topk(2, dim=-1)
    return {
        "tokens": best.indices[..., 0].clone(),
        "margins": (best.values[..., 0] - best.values[..., 1]).clone(),
    }
