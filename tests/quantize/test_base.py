"""What a quantizer refuses and announces before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_model
from in_few_bits import quantised

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import matrices_of
from moe_lab.quantize.base import Quantizer, check_unquantised
from moe_lab.quantize.fp8 import Fp8
from moe_lab.quantize.moqe import Moqe
from moe_lab.quantize.rtn import RoundToNearest
from moe_lab.types import UserError


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral").save_pretrained(folder)  # experts of 32 and 16 inputs
    return folder


@pytest.mark.parametrize(("quantizer", "message"), [
    (RoundToNearest(1), "quantize.bits=1"),
    (RoundToNearest(9), "quantize.bits=9"),
    (RoundToNearest(4, 128), r"group_size=128 does not divide the \d+ inputs .*: 16, 8, null"),
    (RoundToNearest(4, 24), "group_size=24 does not divide"),
    (RoundToNearest(4, 8, clip="best"), "quantize.clip=best"),
    (Moqe(4, what="routers"), "quantize.what=routers"),
    (Fp8(128), r"block=128 does not divide .* what divides all matrices: 16, 8"),
    (Fp8(12), "quantize.block=12"),
])  # fmt: skip
def test_what_cannot_be_packed_is_refused(
    quantizer: Quantizer, message: str, mixtral: Path
) -> None:
    with pytest.raises(UserError, match=message):
        quantizer.check(matrices_of(Checkpoint(mixtral)).chosen("experts"))


def test_a_model_without_such_matrices_says_which_it_has(mixtral: Path) -> None:
    with pytest.raises(UserError, match=r"what=dense: .* it has those of attention, experts"):
        Moqe(4, what="dense").chosen(matrices_of(Checkpoint(mixtral)))


def test_experts_in_one_tensor_are_refused_by_fp8_alone(tmp_path: Path) -> None:
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    matrices = matrices_of(Checkpoint(tmp_path)).chosen("experts")
    Moqe(4).check(matrices)
    with pytest.raises(UserError, match=r"no matrix of its own .*quantize=rtn packs it"):
        Fp8(8).check(matrices)


def test_form_and_engines_are_announced(mixtral: Path) -> None:
    checkpoint = Checkpoint(mixtral)
    matrices = matrices_of(checkpoint)

    def told(quantizer: Quantizer) -> str:
        return "; ".join(quantizer.announced(checkpoint, matrices))

    assert told(RoundToNearest(4, None)) == (
        "quantized, it will be packed as compressed-tensors 0.20.1 does"
    )
    assert "vLLM will not read it: experts of 3 bits need its HUMMING" in told(Moqe(3))
    assert "moe_lab's own form, which no other reader knows: transformers drops the zero" in told(
        RoundToNearest(4, None, symmetric=False)
    )
    assert "quantize.block=128" in told(Fp8(8))


def test_what_is_in_few_bits_is_not_rounded_once_more(mixtral: Path, tmp_path: Path) -> None:
    check_unquantised(Checkpoint(mixtral))
    for number, (quantizer, kind) in enumerate(
        [(Moqe(4), r"4 bits \(compressed-tensors\)"), (Fp8(8), "FP8"),
         (RoundToNearest(4, 8, symmetric=False), r"4 bits \(moe_lab's own form\)")]
    ):  # fmt: skip
        folder = tmp_path / str(number) / "checkpoint"
        quantised(mixtral, quantizer, folder)
        with pytest.raises(UserError, match=f"stored in {kind} already"):
            check_unquantised(Checkpoint(folder))
