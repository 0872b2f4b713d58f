"""The models of conf/model/ that are on the hub, and in which form each method's result is saved.

`python docs/models.py` writes the tables of docs/models.md between their marks, in half a minute:
every model is built without weights, and every form found by the code that a run asks before any
work. `python docs/models.py mixtral_8x7b` prints the rows of one. tests/test_models_page.py holds
the page to conf/ and the code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moe_lab.measure.speed import active_parameters
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.drop_blocks import DropBlocks
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.models.architecture import config_of
from moe_lab.models.checkpoint import Model, meta_model
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.forms import Form, form_of
from moe_lab.models.layers import decoders_path, moe_layers, num_parameters
from moe_lab.models.superset import SUPERSET
from moe_lab.types import LayerInfo, RouterName, UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
MARKS = "<!-- {}: made by docs/models.py -->", "<!-- /{} -->"
LAYERS, ROUTED = 3, 4  # as many as conf/condense/cd_moe.yaml asks for
HEAD = ["model=", "on the hub", "licence", "parameters", "of a token", "MoE layers", "experts",
        "top-k", "shared expert"]  # fmt: skip


@cache
def models() -> dict[str, dict[str, Any]]:
    """The options of conf/model/ that state an architecture, by name."""
    files = sorted((ROOT / "conf" / "model").glob("*.yaml"))
    options = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    return {name: one for name, one in options.items() if one.get("architecture")}


@cache
def built(name: str) -> tuple[Model, list[LayerInfo]]:
    """The language model of an option without weights, and its MoE layers."""
    model = meta_model(config_of(models()[name]["architecture"]))
    return model, [layer.info for layer in moe_layers(model)]


# ---------------------------------------------------------------------------------- the models


def _of_language(model: Model, layers: Sequence[LayerInfo]) -> int:
    """Parameters of the language model alone, without towers for images beside it."""
    path = decoders_path(layers[0].name).rpartition(".")[0]
    head = model.get_output_embeddings()
    mine = {id(one): one.numel() for one in model.get_submodule(path).parameters()}
    return sum((mine | {id(one): one.numel() for one in head.parameters()}).values())


def facts(name: str) -> list[str]:
    """A model's cells: what it is."""
    option, (model, layers) = models()[name], built(name)
    beside = num_parameters(model) - _of_language(model, layers)
    first = [
        f"`{name}`",
        f"`{option['path']}`",
        option["licence"],
        _billions(num_parameters(model) - beside),
    ]
    if not layers:
        return [*first, *["–"] * (len(HEAD) - len(first))]
    info = layers[0]
    return [
        *first,
        _billions(active_parameters(model) - beside),
        f"{len(layers)} of {info.num_decoders}",
        str(info.num_experts) + (f" in {info.groups} groups" if info.groups > 1 else ""),
        str(info.top_k),
        "yes" if info.shared else "no",
    ]  # fmt: skip


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B"


# ----------------------------------------------------------------------------------- the forms


def _half(info: LayerInfo) -> int:
    return max(info.num_experts // info.groups // 2, 1) * info.groups


def _kept(info: LayerInfo, number: int) -> tuple[int, ...]:
    """The first experts of each group of a router, so many in all."""
    size, each = info.num_experts // info.groups, number // info.groups
    return tuple(group * size + place for group in range(info.groups) for place in range(each))


def _uniform(layers: Sequence[LayerInfo]) -> Iterable[Edit]:
    return [PruneExperts(one.index, one.name, _kept(one, _half(one))) for one in layers]


def _unequal(layers: Sequence[LayerInfo]) -> Iterable[Edit]:
    return list(_uniform(layers))[:-1]  # the last keeps all


def _merged(router: RouterName) -> Callable[[Sequence[LayerInfo]], Iterable[Edit]]:
    def edits(layers: Sequence[LayerInfo]) -> Iterable[Edit]:
        for one in layers:
            kept = _kept(one, _half(one))
            gone = tuple(set(range(one.num_experts)) - set(kept))
            groups = ((kept[0], *gone), *((expert,) for expert in kept[1:]))
            yield MergeExperts(one.index, one.name, kept, groups=groups, router=router)

    return edits


def _of_method(method: Condense | DropLayers | DropBlocks) -> Callable[..., Iterable[Edit]]:
    def edits(layers: Sequence[LayerInfo]) -> Iterable[Edit]:
        method.check(layers)
        return method.example(layers)

    return edits


METHODS: dict[str, Callable[[Sequence[LayerInfo]], Iterable[Edit]]] = {
    "prune": _uniform,
    "prune, ratio=global": _unequal,
    "merge, router=dominant": _merged("dominant"),
    "merge, router=all": _merged("all"),
    "condense": _of_method(Condense(LAYERS, ROUTED)),
    "condense, convert=superset": _of_method(Condense(LAYERS, ROUTED, convert=SUPERSET)),
    "drop_layers": _of_method(DropLayers(LAYERS)),
    "drop_blocks": _of_method(DropBlocks(LAYERS)),
}


def forms(name: str) -> list[str]:
    """A model's cells: in which form each method's result is saved."""
    model, layers = built(name)
    return [f"`{name}`", *(_form(model.config, layers, method) for method in METHODS)]


def _form(config: Any, layers: Sequence[LayerInfo], method: str) -> str:
    if not layers:
        return "not read"
    convert = SUPERSET if SUPERSET in method else None
    try:
        form = form_of(config, METHODS[method](layers), convert=convert)
        there = form.config.model_type
        return in_words(form) if there == config.model_type else f"as {there}"
    except UserError as error:
        return f"refused: {str(error).partition(': ')[2].partition(';')[0] or error}"


def in_words(form: Form) -> str:
    """A form as a cell shows it."""
    if form.plain:
        return "stock"
    return "stock, with zeros" if form.stock else "own"


# ------------------------------------------------------------------------------------ the page

TABLES: dict[str, tuple[list[str], Callable[[str], list[str]]]] = {
    "models": (HEAD, facts),
    "forms": (["model=", *METHODS], forms),
}


def row(table: str, name: str) -> str:
    """The line of a table for a model."""
    return _line(TABLES[table][1](name))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def with_tables(text: str) -> str:
    """The page with its tables made anew."""
    for table, (head, _) in TABLES.items():
        start, end = (mark.format(table) for mark in MARKS)
        lines = [_line(head), _line(["---"] * len(head)), *(row(table, one) for one in models())]
        before, rest = text.split(start)
        text = "\n".join([f"{before}{start}", *lines, end]) + rest.split(end)[1]
    return text


if __name__ == "__main__":
    if asked := sys.argv[1:]:
        print("\n".join(row(table, name) for table in TABLES for name in asked))
    else:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
