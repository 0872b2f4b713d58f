"""Rounding to nearest: compressed-tensors' own functions, and a slow reference of MoQE's grid."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from moe_lab.models.rounding import BITS, Levels, Scheme, dequantised, nearest, rounded


def some_weights(dtype: torch.dtype = torch.float32) -> Tensor:
    """[6, 64], with an output of zeros, a group of zeros, one without negatives and an outlier."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1] = 0.0
    weight[2, 8:16] = 0.0
    weight[3] = weight[3].abs()
    weight[4, 5] = 30.0
    return weight


def by_the_library(weight: Tensor, scheme: Scheme, parameters_in: torch.dtype) -> Levels:
    arguments = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group_size else "channel",
        group_size=scheme.group_size,
    )
    groups = weight.unflatten(1, (scheme.num_groups(weight.shape[1]), -1))
    least, most = groups.aminmax(dim=-1)
    scale, zero = calculate_qparams(least.to(parameters_in), most.to(parameters_in), arguments)
    scale = scale.to(weight.dtype)
    levels = quantize(weight.float(), scale, zero, arguments, dtype=torch.int8)
    return Levels(levels, scale, None if scheme.symmetric else zero)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [8, 32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_levels_scales_and_zero_points_are_the_librarys(
    bits: int, size: int | None, symmetric: bool
) -> None:
    scheme = Scheme(bits, size, symmetric)
    weight = some_weights()
    ours, theirs = rounded(weight, scheme), by_the_library(weight, scheme, torch.float32)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.levels, theirs.levels)
    if not symmetric:
        assert ours.zero_point is not None and theirs.zero_point is not None
        used = weight.unflatten(1, (ours.scale.shape[1], -1)).abs().amax(dim=-1) > 0
        assert torch.equal(ours.zero_point[used], theirs.zero_point[used])
        assert (ours.zero_point[~used] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", [Scheme(3, 16), Scheme(4, 8, False), Scheme(8), Scheme(2)])
def test_what_a_reader_makes_of_it_is_the_librarys_bit_for_bit(
    dtype: torch.dtype, scheme: Scheme
) -> None:
    weight = some_weights(dtype)
    ours = rounded(weight, scheme)
    if scheme.symmetric:
        theirs = by_the_library(weight, scheme, dtype)
        assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.levels, theirs.levels)
    arguments = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group_size else "channel",
        group_size=scheme.group_size,
    )
    read = dequantised(ours).to(dtype)
    assert torch.equal(read, dequantize(ours.levels, ours.scale, ours.zero_point, arguments))
    assert bool(read.isfinite().all())
    assert (read[1] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_moqes_grid_is_its_formula(bits: int) -> None:
    weight = some_weights()
    found = rounded(weight, Scheme(bits), grid="restricted")
    most = 2 ** (bits - 1) - 1
    for row in range(len(weight)):
        scale = max(abs(value) for value in weight[row].tolist()) / most
        assert float(found.scale[row, 0]) == pytest.approx(scale or torch.finfo().eps)
        for level, value in zip(found.levels[row].tolist(), weight[row].tolist(), strict=True):
            expected = max(-most, min(most, round(value / scale))) if scale else 0
            assert level == expected
    assert found.levels.min() >= -most, "as many levels below 0 as above"


def test_the_restricted_grid_stays_symmetric_where_the_scale_was_rounded() -> None:
    weight = torch.linspace(-1.003, 1.0, 64).repeat(40, 1).to(torch.bfloat16)
    weight = weight * torch.linspace(0.5, 1.5, 40).to(torch.bfloat16)[:, None]
    found = rounded(weight, Scheme(8), grid="restricted").levels
    assert found.min() >= -127 and found.max() <= 127


@pytest.mark.parametrize("scheme", [Scheme(2, 16), Scheme(3), Scheme(4, 16, False), Scheme(8)])
def test_a_searched_range_is_the_best_of_a_slow_search(scheme: Scheme) -> None:
    weight = some_weights()
    plain, found = rounded(weight, scheme), rounded(weight, scheme, clip="mse")
    number = scheme.num_groups(64)

    def error(levels: Levels) -> Tensor:
        return (dequantised(levels) - weight).square().unflatten(1, (number, -1)).sum(dim=-1)

    assert (error(found) <= error(plain)).all(), "the whole range is among those tried"
    for row in range(len(weight)):
        for group in range(number):
            part = weight[row, group * (64 // number) :][: 64 // number]
            tried = []
            for step in range(36):
                cut = part.clone()
                share = 1 - step / 50
                least, most = cut.clamp(max=0).min() * share, cut.clamp(min=0).max() * share
                ends = torch.stack([least, most])[None]
                given = rounded(ends, Scheme(scheme.bits, None, scheme.symmetric))
                levels = nearest(part[None], given.scale, given.zero_point, scheme)
                read = dequantised(Levels(levels, given.scale, given.zero_point))
                tried.append(float((read - part).square().sum()))
            assert float(error(found)[row, group]) == pytest.approx(min(tried), abs=1e-9)
    if scheme.bits < 4:
        assert (error(found) < error(plain)).any()


def test_slices_of_several_experts_are_each_a_matrix() -> None:
    stacked = torch.stack([some_weights(), some_weights() * 3])
    together = rounded(stacked, Scheme(4, 16, False), clip="mse")
    for slice_of, alone in zip(range(2), stacked, strict=True):
        one = rounded(alone, Scheme(4, 16, False), clip="mse")
        assert torch.equal(together.levels[slice_of], one.levels)
        assert torch.equal(dequantised(together)[slice_of], dequantised(one))


def test_nearest_takes_given_scales_for_a_single_column() -> None:
    scale = torch.tensor([[0.5], [2.0]])
    column = torch.tensor([[1.3], [-100.0]])
    assert nearest(column, scale, None, Scheme(4)).tolist() == [[3], [-8]]
    zero = torch.tensor([[1], [-2]], dtype=torch.int8)
    assert nearest(column, scale, zero, Scheme(4, None, False)).tolist() == [[4], [-8]]
