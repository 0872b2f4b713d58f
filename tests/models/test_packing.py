"""Packed levels: compressed-tensors' own packing, layouts, and slices that unpack when read."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import (
    PackedQuantizationCompressor,
    pack_to_int32,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from moe_lab.models.packing import (
    SCHEME,
    pack,
    packed,
    packed_bytes,
    packed_layout,
    unpacked,
    unpacking,
)
from moe_lab.models.rounding import BITS, Scheme, dequantised, rounded


def some_weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [40, 64, 5])
def test_words_are_the_librarys(bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, width), generator=generator)
    levels = levels.to(torch.int8)
    assert torch.equal(pack(levels, bits), pack_to_int32(levels, bits))


def test_a_packed_row_may_end_within_a_word() -> None:
    levels = torch.tensor([[-8, 7, 0, -1, 5]], dtype=torch.int8)
    assert pack(levels, 4).tolist() == [[0xD78F0]], "0, 15, 8, 7, 13, low bits first"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("size", "symmetric"), [(8, True), (None, True), (8, False)])
def test_parts_are_what_the_librarys_compressor_reads(
    bits: int, size: int | None, symmetric: bool
) -> None:
    weight, scheme = some_weights(20, 40), Scheme(bits, size, symmetric)
    levels = rounded(weight, scheme)
    parts = packed(levels, bits)
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if size else "channel",
        group_size=size,
    )
    theirs = PackedQuantizationCompressor.decompress(
        {f"weight_{name}": part for name, part in parts.items()},
        QuantizationScheme(targets=["Linear"], weights=arguments),
    )
    assert torch.equal(theirs["weight"], dequantised(levels).to(torch.bfloat16))
    assert torch.equal(unpacked(parts, bits), dequantised(levels))


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_of_few_outputs_are_read(bits: int) -> None:
    levels = rounded(some_weights(2, 40), Scheme(bits, 8, False))
    assert torch.equal(unpacked(packed(levels, bits), bits), dequantised(levels))


@pytest.mark.parametrize("shape", [(6, 40), (3, 6, 40)])
@pytest.mark.parametrize("scheme", [Scheme(3, 8), Scheme(4, None), Scheme(5, 8, False)])
def test_layouts_say_what_parts_will_be(shape: tuple[int, ...], scheme: Scheme) -> None:
    weight = some_weights(*shape)
    for own in (False, True):
        parts = packed(rounded(weight, scheme), scheme.bits, own)
        layout = packed_layout(shape, torch.bfloat16, scheme, own)
        assert {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()} == layout
        assert (SCHEME in parts) == own
    parts = packed(rounded(weight, scheme), scheme.bits)
    size = sum(part.numel() * part.element_size() for part in parts.values())
    assert packed_bytes(shape, torch.bfloat16, scheme) == size


def test_a_file_in_our_own_form_unpacks_by_itself() -> None:
    stacked = some_weights(3, 16, 6)  # [experts, in, out], as some families have it
    levels = rounded(stacked.mT.contiguous(), Scheme(5, 8, False))
    parts = packed(levels, 5, own=True, axis=-2)
    tensors = {f"experts.up_proj_{name}": part for name, part in parts.items()}
    found = unpacking(tensors | {"norm": torch.ones(2)})
    assert found.keys() == {"experts.up_proj", "norm"}
    whole = found["experts.up_proj"]
    assert whole.get_shape() == [3, 16, 6]
    assert torch.equal(whole[...], dequantised(levels).mT)
    assert torch.equal(whole[1], dequantised(levels).mT[1])
