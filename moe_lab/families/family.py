"""A tiny model of a type on disk, and what the stages of a run make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from moe_lab.families.images import image_batch, takes_images
from moe_lab.families.references import expert_counts, logits_of
from moe_lab.families.stock_process import Stock, StockAnswer
from moe_lab.families.tiny import auto_class, tiny_batches, tiny_model
from moe_lab.methods.base import Method
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, resolve
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan
from moe_lab.models.forms import Form, form_of
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stream import LayerStream
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo

LIMIT = 2**30  # bytes of memory for what is kept between layers: more than tiny models need


@dataclass(frozen=True)
class Made:
    """A compressed checkpoint: the plan, its folder, its form, and the logits before saving."""

    plan: Plan
    folder: Path
    form: Form
    logits: list[Tensor]


@dataclass
class Family:
    """A model type's tiny checkpoint, what stock transformers makes of it, and what we found.

    experts: by decoder layer how many, counted without moe_lab. image: a prompt with an image,
    None where none could be made; takes_images: whether the type does.
    """

    folder: Path
    stock: Stock
    batches: list[dict[str, Tensor]]
    dense: StockAnswer
    experts: dict[int, int]
    takes_images: bool = False
    image: dict[str, Tensor] | None = None
    num_made: int = 0
    statistics: list[LayerStatistics] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint:
        """The dense one, as a run opens it."""
        return resolve(self.folder / "dense")

    def layers(self) -> list[LayerInfo]:
        """Its MoE layers, as moe_lab finds them."""
        return self.checkpoint.layers()


def written_family(name: str, socket: Path, folder: Path) -> Family:
    """Write the tiny checkpoint of a type, and ask stock transformers what it computes."""
    model, batches = tiny_model(name), tiny_batches()
    model.save_pretrained(folder / "dense")
    stock = Stock(socket, auto_class(name).__name__, folder)
    dense = stock.ask("reload", folder / "dense", batches, generate=True)
    experts = expert_counts(model)
    if not takes_images(model):
        return Family(folder, stock, batches, dense, experts)
    return Family(folder, stock, batches, dense, experts, True, image_batch(model))


def made_by(family: Family, method: Method) -> Made:
    """What the stages plan and compress do, with the same functions and no store."""
    checkpoint, layers = family.checkpoint, family.layers()
    method.check(layers)
    if edits := method.example(layers):
        form_of(checkpoint.config, edits, method.padding)
    plan = method.plan(_profile(family))
    check_plan(layers, plan.edited())
    return carried_out(family, plan)


def carried_out(family: Family, plan: Plan) -> Made:
    """A plan carried out on the model in memory, which is then written."""
    model = family.checkpoint.load()
    apply_plan(model, plan)
    logits = logits_of(model, family.batches)
    family.num_made += 1
    folder = family.folder / f"made_{family.num_made}"
    form = save_checkpoint(model, folder, family.checkpoint.path, plan.notes.get("padding"))
    return Made(plan, folder, form, logits)


def _profile(family: Family) -> Profile:
    stored = {info.index: info for info in family.layers()}
    for one in family.statistics:
        one.info = stored[one.info.index]

    def open_stream(num_samples: int | None = None) -> LayerStream:
        model = LayerwiseModel(family.checkpoint, "cpu", keep_bytes=LIMIT)
        return LayerStream(model, family.batches, Activations(limit=LIMIT))

    return Profile(
        family.statistics, open_stream, lambda _=None: (family.checkpoint.load(), family.batches)
    )
