"""In which form matrices of few bits are written: compressed-tensors', or moe_lab's own.

compressed-tensors' where stock transformers and vLLM read it right: one scheme for all packed
matrices, all experts among them, without zero points, a matrix for each expert, in a model that the
family's own form holds. Readers take one scheme for all experts there, and read another one's as
garbage in silence; of experts with zero points transformers loses these, and it looks for packed
experts alone once something is packed. All else is in our own form, whose model type other readers
refuse by name, and whose tensors each say their scheme themselves.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import WeightMatrices, WeightMatrix
from moe_lab.models.own_config import OWN, QUANTISED, is_own_form
from moe_lab.models.packing import PACKING_VERSION, Layout, packed, packed_layout, unpacked
from moe_lab.models.rounding import Levels, Scheme, dequantised

ALSO_LEFT = "lm_head"  # also where it is the embedding and no file has it
VLLM_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class PackedForm:
    """How the matrices of one checkpoint are written. schemes: of the packed ones, by their keys.

    obstacle: why it is our own form, None where it is compressed-tensors'; left: modules that stay
    as they are.
    """

    schemes: Mapping[str, Scheme]
    left: tuple[str, ...]
    obstacle: str | None = None

    @property
    def stock(self) -> bool:
        """Whether stock transformers reads it."""
        return self.obstacle is None

    @property
    def reason(self) -> str:
        """Which form and why, in words."""
        if self.stock:
            return f"packed as compressed-tensors {PACKING_VERSION} does"
        return f"packed in moe_lab's own form, which no other reader knows: {self.obstacle}"

    def layout(self, matrix: WeightMatrix) -> Layout:
        """Dtype and shape of each tensor that is written of a matrix, by the end of its name."""
        scheme = self.schemes[matrix.key]
        return packed_layout(matrix.shape, matrix.dtype, scheme, own=not self.stock)

    def parts(self, matrix: WeightMatrix, levels: Levels) -> dict[str, Tensor]:
        """These tensors."""
        return packed(levels, self.schemes[matrix.key].bits, not self.stock, matrix.axis)

    def read(self, matrix: WeightMatrix, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix [..., out, in] that readers make of what is written."""
        read = unpacked(parts, self.schemes[matrix.key].bits)
        return read if matrix.axis == -1 else read.mT

    def meant(self, levels: Levels) -> Tensor:
        """The same, of what was to be written."""
        return dequantised(levels)

    def values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json says: the source's family values, and how to read the matrices."""
        said = copy.deepcopy(dict(values))
        if self.stock:
            group = group_values(next(iter(self.schemes.values())))
            return said | {"quantization_config": stock_values({"group_0": group}, self.left)}
        bits = Counter(scheme.bits for scheme in self.schemes.values())
        counted = {str(number): count for number, count in sorted(bits.items())}
        own = said.get(OWN) or {"layers": {}}
        return said | {OWN: own | {QUANTISED: {"bits": counted, "packing": PACKING_VERSION}}}


def group_values(scheme: Scheme, targets: Sequence[str] = ("Linear",)) -> dict[str, Any]:
    """What compressed-tensors' config says of a scheme and the modules that have it."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    nothing = {"input_activations": None, "output_activations": None}
    return {"targets": list(targets), "weights": weights} | nothing


def stock_values(groups: Mapping[str, Any], left: Iterable[str]) -> dict[str, Any]:
    """compressed-tensors' config of these groups; left: modules that stay as they are."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": dict(groups),
        "ignore": list(left),
        "version": PACKING_VERSION,
    }


def packed_form(
    checkpoint: Checkpoint, matrices: WeightMatrices, schemes: Mapping[str, Scheme]
) -> PackedForm:
    """The form of a checkpoint whose matrices get these schemes."""
    chosen = [one for one in matrices.every if one.key in schemes]
    others = [one for one in matrices.every if one.key not in schemes]
    obstacle = _obstacle(checkpoint, chosen, others, schemes)
    every = dict.fromkeys((ALSO_LEFT, *matrices.left, *left_paths(others)))
    return PackedForm(dict(schemes), tuple(every), obstacle)


def left_paths(matrices: Iterable[WeightMatrix]) -> Iterator[str]:
    """The modules of matrices in the files and, where they are modules of their own, in the model.

    By these names readers know which ones are not packed.
    """
    for one in matrices:
        yield one.key.removesuffix(".weight")
        if one.name.endswith(".weight"):
            yield one.name.removesuffix(".weight")


def _obstacle(
    checkpoint: Checkpoint,
    chosen: Sequence[WeightMatrix],
    others: Sequence[WeightMatrix],
    schemes: Mapping[str, Scheme],
) -> str | None:
    """Why stock readers would not read the matrices right; None where they do."""
    different = set(schemes.values())
    if is_own_form(vars(checkpoint.config)):
        return "its layers have structures that their family's own form has not"
    if fused := next((one for one in chosen if not one.is_own), None):
        return f"its files have the matrices of several experts in one tensor ({fused.key})"
    if any(one.part == "experts" for one in others):
        return "transformers finds no experts where other matrices are packed and theirs are not"
    if len(different) > 1:
        words = ", ".join(sorted({f"{one.bits} bits" for one in different}))
        return f"its matrices have different schemes ({words}), and readers take one for all"
    if not all(scheme.symmetric for scheme in different):
        return "transformers drops the zero points of experts"
    return None


def vllm_obstacle(matrices: Sequence[WeightMatrix], scheme: Scheme) -> str | None:
    """Why vLLM does not read matrices of this scheme, with a scheme that it reads; None if it does.

    From its source (0.32): experts of 2, 3, 5, 6 and 7 bits go through one kernel that few
    machines have; groups are of 32, 64 or 128 inputs and divide both widths of an expert.
    """
    fits = [str(size) for size in VLLM_GROUPS if not any(one.width % size for one in matrices)]
    instead = f"quantize.bits=4 quantize.group_size={fits[-1] if fits else 'null'}"
    if not scheme.symmetric:
        return f"experts with zero points are saved in moe_lab's own form; it reads {instead}"
    if scheme.bits not in (4, 8):
        return (
            f"experts of {scheme.bits} bits need its HUMMING kernel, which its builds for CPUs and "
            f"many cards lack; everywhere it reads {instead}"
        )
    if scheme.group_size not in (None, *VLLM_GROUPS):
        return f"its groups are of 32, 64 or 128 inputs, or of all; it reads {instead}"
    return None
