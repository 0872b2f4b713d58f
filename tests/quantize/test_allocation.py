"""Bits by errors under a budget: exact, and within it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from quantised_runs import job_of, tiny_checkpoint, written
from safetensors.torch import load_file

from moe_lab.models.checkpoint import load
from moe_lab.models.rounding import Scheme, dequantised, rounded
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.quantize.allocation import BitsBudget, SizeBudget, allocated
from moe_lab.quantize.mixed import Mixed
from moe_lab.quantize.planned import Planned
from moe_lab.quantize.rtn import RoundToNearest
from moe_lab.types import UserError

SCHEMES = [Scheme(bits, 8) for bits in (2, 3, 8)]


def curves(seed: int = 0) -> dict[int, list[list[float]]]:
    drawn = torch.Generator().manual_seed(seed)
    errors = torch.rand(4, 1, 3, generator=drawn).sort(dim=2, descending=True).values
    return {layer: errors[layer].tolist() for layer in range(4)}


def test_layers_get_the_best_of_all_possible_bits(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "mixtral")
    job = job_of(checkpoint, RoundToNearest(4, 8), tmp_path / "job")
    for seed, average in itertools.product(range(3), (2.0, 2.6, 4.1)):
        errors = curves(seed)
        found = allocated(job.chosen, BitsBudget(job.chosen, SCHEMES, average), "layer", errors)
        every = itertools.product(range(3), repeat=4)
        possible = [p for p in every if sum(SCHEMES[i].bits for i in p) <= 4 * average]
        best = min(sum(errors[n][0][i] for n, i in enumerate(p)) for p in possible)
        assert sum(found.errors.values()) == pytest.approx(best)
        assert found.average_bits <= average
    assert len({found.schemes[one.key] for one in job.chosen if one.layer == 2}) == 1


def test_a_size_in_gib_is_kept_on_disk_and_the_least_is_told(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "mixtral")
    whole = size_in_bytes(checkpoint.path)
    quantizer = Mixed(
        target_gib=0.5 * whole / 2**30, group_size=8, by="expert", bits=[2, 8], error_weight="none"
    )
    job = job_of(checkpoint, quantizer, tmp_path / "job")
    figures = written(job, quantizer).figures()
    tensors = load_file(job.folder / "checkpoint" / "model.safetensors").values()
    assert 0.4 * whole < sum(one.nbytes for one in tensors) <= 0.5 * whole
    assert 2 < figures["mean_bits"] < 8 and figures["predicted_error"] > 0
    budget = SizeBudget(job.chosen, SCHEMES, 0.1 * whole / 2**30)
    with pytest.raises(UserError, match=r"in 2 bits it takes 0\.\d+ GiB"):
        budget.check()
    read = load(job.folder / "checkpoint").model.layers[1].mlp.experts.down_proj[3]
    source = load(checkpoint.path).model.layers[1].mlp.experts.down_proj[3].detach()
    assert any(torch.equal(read, dequantised(rounded(source, Scheme(b, 8)))) for b in (2, 8))


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    mixtral = tiny_checkpoint(tmp_path / "mixtral", "mixtral")
    fused = tiny_checkpoint(tmp_path / "gpt_oss", "gpt_oss")
    for checkpoint, options, words in (
        (mixtral, {}, "needs one budget"),
        (mixtral, {"average_bits": 3, "target_gib": 1}, "needs one budget"),
        (mixtral, {"average_bits": 1.5}, "the fewest of quantize.bits are 2"),
        (mixtral, {"average_bits": 3, "bits": []}, r"quantize.bits=\[\]"),
        (mixtral, {"average_bits": 3, "bits": [1, 4]}, "quantize.bits"),
        (mixtral, {"average_bits": 3, "error": "kl", "by": "expert"}, "quantize.by=expert"),
        (mixtral, {"average_bits": 3, "group_size": 7}, "group_size=7 does not divide"),
        (fused, {"average_bits": 3, "by": "expert"}, "quantize.by=layer"),
        (mixtral, {"target_gib": 1e-6}, "other tensors"),
    ):
        with pytest.raises(UserError, match=words):
            job_of(checkpoint, Mixed(**({"group_size": 8} | options)), tmp_path / "job")


def test_bits_of_a_plan_are_obeyed(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "mixtral")
    notes = {"quantize": {"bits": {"0": 2, "1": 16, "2": 4, "3": 16}, "group_size": 8}}
    quantizer = Planned().obeying(notes)
    assert quantizer is not None and quantizer.identity({})["bits"]["2"] == 4
    job = job_of(checkpoint, quantizer, tmp_path / "job")
    written(job, quantizer)
    found, source = load(job.folder / "checkpoint"), load(checkpoint.path)
    for index, scheme in enumerate((Scheme(2, 8), None, Scheme(4, 8), None)):
        ours, plain = (
            one.model.layers[index].mlp.experts.gate_up_proj[5].detach() for one in (found, source)
        )
        assert torch.equal(ours, dequantised(rounded(plain, scheme)) if scheme else plain)
        reads = quantizer.reader(index)
        assert reads is not None and torch.equal(reads(plain), ours)
    whole = {"quantize": {"bits": dict.fromkeys("0123", 16), "group_size": None}}
    assert Planned().obeying(whole) is None
    with pytest.raises(UserError, match=r"ratio\.bits="):
        Planned().obeying({})
