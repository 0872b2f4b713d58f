"""`--to compressed-tensors`: a checkpoint packed as stock transformers and vLLM read it.

By the code of `quantize=rtn` (docs/quantize.md): rounding to nearest, symmetric, one scale for each
group of inputs or each output, experts and linear layers inside decoder layers. Of a checkpoint
that `quantize` packed in moe_lab's own form, because bits differ between layers or experts have
zero points, the levels stay as they are, and only vLLM reads what comes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_lab.export.folder import stored_tensors, write_folder
from moe_lab.export.given import Given
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import WeightMatrix, matrices_of
from moe_lab.models.own_config import OWN, QUANTISED, read_config
from moe_lab.models.packed_form import (
    ALSO_LEFT,
    group_values,
    left_paths,
    packed_form,
    stock_values,
)
from moe_lab.models.packed_writing import write_packed
from moe_lab.models.packing import SCHEME, scheme_of
from moe_lab.models.quantised import stored_in_few_bits
from moe_lab.models.reading_back import NotReadBack
from moe_lab.models.rounding import BITS, Levels, Scheme, rounded
from moe_lab.models.stored import stored_in
from moe_lab.models.weight_files import weight_files
from moe_lab.types import UserError

ENDING = "-compressed-tensors"
OPTIONS = ("bits", "group_size")
TAKES = (
    "checkpoints in their family's own form, with a tensor for each expert; and those of quantize= "
    "that are in moe_lab's own form for their bits alone, with one scheme in each layer"
)
CHANNEL = "channel"
GROUP_SIZES = ("128", "64", "32", CHANNEL)


def export(
    given: Given, out: Path, bits: int | None = None, group_size: str | None = None
) -> list[str]:
    """Write a checkpoint with its experts and linear layers packed.

    bits: 2 to 8, by default 4; group_size: inputs that share a scale, one of GROUP_SIZES, by
    default 128; channel: all of an output's. Neither of a checkpoint that is packed already. Raises
    UserError for widths that the group size does not divide.
    """
    checkpoint = given.checkpoint()
    values = read_config(checkpoint.path / "config.json")
    if (values.get(OWN) or {}).get(QUANTISED):
        if bits or group_size:
            raise UserError(
                f"--bits, --group-size: {checkpoint.path} is packed already, and its levels stay"
            )
        return _in_other_words(checkpoint, values, out)
    return _rounded(checkpoint, out, 4 if bits is None else bits, group_size or "128")


def _rounded(checkpoint: Checkpoint, out: Path, bits: int, group_size: str) -> list[str]:
    if bits not in BITS:
        raise UserError(f"--bits {bits}: it packs {min(BITS)} to {max(BITS)}")
    if group_size not in GROUP_SIZES:
        raise UserError(f"--group-size {group_size}: there are {', '.join(GROUP_SIZES)}")
    if kind := stored_in_few_bits(checkpoint.config):
        raise UserError(f"--to compressed-tensors: {checkpoint.path} is stored in {kind} already")
    matrices = matrices_of(checkpoint)
    scheme = Scheme(bits, None if group_size == CHANNEL else int(group_size))
    _check_widths(matrices.every, scheme)
    form = packed_form(checkpoint, matrices, {one.key: scheme for one in matrices.every})
    if form.obstacle:
        raise UserError(
            f"--to compressed-tensors: {form.obstacle}, which engines would not read; quantize=rtn "
            "packs such a checkpoint in moe_lab's own form"
        )

    def found(_: int, these: Sequence[WeightMatrix]) -> Iterator[tuple[WeightMatrix, Levels]]:
        for one in these:
            yield one, rounded(one.load(), scheme)

    lost = write_packed(checkpoint, matrices, matrices.every, form, found, out).figures()
    return [
        f"{lost['packed_matrices']} matrices are packed in {bits} bits, rounded to nearest without "
        f"calibration: {lost['weight_error']:.1%} of their norm is lost"
    ]


def _check_widths(matrices: Sequence[WeightMatrix], scheme: Scheme) -> None:
    """Refuse inputs that groups of this size do not divide."""
    size = scheme.group_size
    odd = next((one for one in matrices if size and one.width % size), None)
    if odd:
        fit = [
            n for n in GROUP_SIZES if n == CHANNEL or not any(m.width % int(n) for m in matrices)
        ]
        raise UserError(
            f"--group-size {size} does not divide the {odd.width} inputs of {odd.key}; what fits "
            f"all matrices: {', '.join(fit)}"
        )


def _in_other_words(checkpoint: Checkpoint, values: Mapping[str, Any], out: Path) -> list[str]:
    """The same levels, with a group of the config for each scheme."""
    if values[OWN]["layers"]:
        raise UserError(
            f"--to compressed-tensors: {checkpoint.path} has layers whose structures no family "
            "has, beside packed matrices; engines would build other layers"
        )
    matrices = matrices_of(checkpoint)
    packed = [one for one in matrices.every if one.stored.parts]
    schemes = {one.key: scheme_of(dict(one.stored.parts)) for one in packed}
    groups = _groups(packed, schemes)
    left = dict.fromkeys((ALSO_LEFT, *matrices.left, *left_paths(
        one for one in matrices.every if one not in packed)))  # fmt: skip
    family = {name: value for name, value in values.items() if name != OWN}
    config = family | {"quantization_config": stock_values(groups, left)}
    write_folder(out, _without_schemes(checkpoint.path), config, checkpoint.path)
    _compare(checkpoint.path, out)
    told = [f"{len(packed)} packed matrices, {len(groups)} schemes; their levels are as they were"]
    symmetric = all(scheme.symmetric for scheme in schemes.values())
    if len(groups) > 1 or not symmetric:
        told.append(
            "for vLLM alone: transformers and moe_lab take one scheme for all experts, and no zero "
            "points"
        )
    return told


def _groups(packed: Sequence[WeightMatrix], schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """A group of the config for each scheme; UserError where a layer's experts have several."""
    layers: dict[int, set[Scheme]] = {}
    targets: dict[Scheme, list[str]] = {}
    for one in packed:
        if not one.is_own:
            raise UserError(
                f"--to compressed-tensors: {one.key} is no matrix of its own, and the format packs "
                "one for each expert"
            )
        scheme, path = schemes[one.key], one.key.removesuffix(".weight")
        if one.part == "experts":
            layers.setdefault(one.layer, set()).add(scheme)
            path = rf"re:.*{_escaped(path.rpartition('.experts.')[0])}\.experts\..*"
        targets.setdefault(scheme, []).append(path)
    mixed = [layer for layer, several in layers.items() if len(several) > 1]
    if mixed:
        raise UserError(
            f"--to compressed-tensors: the experts of layer {mixed[0]} have different schemes, and "
            "vLLM has one for a layer: quantize with bits that differ between layers alone"
        )
    return {
        f"group_{number}": group_values(scheme, list(dict.fromkeys(paths)))
        for number, (scheme, paths) in enumerate(targets.items())
    }


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")


def _without_schemes(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for file in weight_files(folder):
        kept = (one for one in stored_in(file) if not one.key.endswith(f"_{SCHEME}"))
        yield file.name, {one.key: one.load() for one in kept}


def _compare(source: Path, out: Path) -> None:
    """Read what was written, and compare it byte for byte."""
    written = stored_tensors(out)
    for key, one in stored_tensors(source).items():
        same = key.endswith(f"_{SCHEME}") or one.load().equal(written[key].load())
        if not same:
            raise NotReadBack(f"{out} was read back, and {key} is another tensor. Please report it")
