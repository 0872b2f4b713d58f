"""What is written in few bits is what was meant: read whole, by layer, and by stock readers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edited_models import condense, edited, prune
from families import tiny_model
from in_few_bits import by_layer, meant, quantised, read_plainly, read_whole, same
from narrowing import UNEVEN, narrow_plan
from safetensors.torch import load_file, save_file

from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.edited_model import Saving
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.matrices import matrices_of
from moe_lab.models.packed_writing import write_packed
from moe_lab.models.reading_back import NotReadBack
from moe_lab.models.rounding import Levels
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.streamed import write_edited
from moe_lab.models.write_journal import JOURNAL
from moe_lab.quantize.base import QuantizeJob, Quantizer
from moe_lab.quantize.fp8 import Fp8
from moe_lab.quantize.moqe import Moqe
from moe_lab.quantize.rtn import RoundToNearest


def unevenly_narrowed(folder: Path) -> Path:
    model = tiny_model("mixtral")
    model.save_pretrained(folder / "source")
    apply_plan(model, narrow_plan(model, {1: UNEVEN}))
    save_checkpoint(model, folder / "model", folder / "source", padding=0.0)
    return folder / "model"


def made(case: str, folder: Path) -> Path:
    """A checkpoint of each form that the pipeline makes."""
    if case == "uneven":
        return unevenly_narrowed(folder)
    edits = {
        "unequal": ("mixtral", [prune(1, [0, 1, 5])]),
        "pruned": ("qwen3_moe", [prune(i, [0, 3, 5]) for i in range(4)]),
        "condensed": ("qwen2_moe", [condense(1, [0, 2])]),
        "stand-ins": ("qwen3_moe", [prune(1, [0, 3, 5]) | {"replacement": "zero"}]),
        "fused": ("gpt_oss", [prune(1, [0, 1, 2, 3])]),
        "latent": ("deepseek_v3", [prune(i, [0, 1, 4, 5]) for i in (1, 2, 3)]),
    }
    edited(*edits[case], folder / "edited", padding=0.0)
    return folder / "edited" / "model"


CASES: list[tuple[str, Quantizer, bool]] = [
    ("pruned", RoundToNearest(4, 8), True),
    ("pruned", RoundToNearest(4, 8, symmetric=False, what="all"), False),
    ("pruned", Fp8(8, what="all"), True),
    ("pruned", RoundToNearest(8, None, what="attention"), False),
    ("latent", RoundToNearest(3, None, what="all"), True),
    ("latent", Moqe(5), True),
    ("unequal", RoundToNearest(3, 16, clip="mse"), False),
    ("unequal", Fp8(16), False),
    ("uneven", Moqe(2), False),
    ("condensed", RoundToNearest(4, None, what="dense"), False),
    ("stand-ins", RoundToNearest(6, None, symmetric=False), False),
    ("fused", RoundToNearest(4, 8, symmetric=False), False),
]


def test_every_reader_reads_what_was_meant_or_refuses_by_name(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    sources = {case: made(case, tmp_path_factory.mktemp(case)) for case, _, _ in CASES}
    folders, wanted = dict[str, tuple[Path, bool]](), {}
    for number, (case, quantizer, stock) in enumerate(CASES):
        name = f"{number}-{case}"
        folder = tmp_path_factory.mktemp("few") / name / "checkpoint"
        form, lost = quantised(sources[case], quantizer, folder)
        assert form.stock == stock, (name, form.reason)
        wanted[name] = meant(sources[case], quantizer, folder)
        assert same(wanted[name], read_whole(folder)), f"{name}: whole"
        assert same(wanted[name], by_layer(LayerwiseModel(Checkpoint(folder)))), f"{name}: by layer"
        assert 0 < lost.figures()["weight_error"] < 0.8
        folders[name] = folder, stock
    read = read_plainly("stock", [folder for folder, _ in folders.values()])
    for name, (_, stock) in folders.items():
        if stock:
            assert same(wanted[name], read[name]), name  # type: ignore[arg-type]
        else:
            assert "model type `moe_lab`" in read[name], name


@pytest.mark.parametrize("quantizer", [RoundToNearest(8, 8, what="all"), Moqe(3), Fp8(8)])
def test_files_in_bfloat16_are_the_same_weights_whole_and_by_layer_in_float32(
    quantizer: Quantizer, tmp_path: Path
) -> None:
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    folder = tmp_path / "few" / "checkpoint"
    form, _ = quantised(tmp_path / "dense", quantizer, folder)
    assert form.stock
    whole = dict(load(folder, dtype="float32").named_parameters())
    layered = by_layer(LayerwiseModel(Checkpoint(folder, "float32")))
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    assert all(torch.equal(tensor, whole[name]) for name, tensor in layered.items())
    rounded = read_whole(folder)  # in the files' dtype
    assert all(torch.equal(t, whole[name].to(t.dtype)) for name, t in rounded.items())


def test_what_is_not_packed_stays_byte_for_byte_and_whole_files_come_along(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    quantised(tmp_path / "dense", RoundToNearest(4, 8), tmp_path / "one" / "checkpoint")
    before = {
        k: t for f in (tmp_path / "dense").glob("*.safetensors") for k, t in load_file(f).items()
    }
    files = list((tmp_path / "one" / "checkpoint").glob("*.safetensors"))
    after = {k: t for f in files for k, t in load_file(f).items()}
    kept = before.keys() & after.keys()
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert {key for key in before if ".experts." not in key} == kept
    assert not (tmp_path / "one" / JOURNAL).exists()


class Counted(RoundToNearest):
    """Keeps what it found of each layer, and breaks off where it is told to."""

    def begin(self, job: QuantizeJob):  # type: ignore[no-untyped-def]
        at_work = super().begin(job)
        inner = at_work.layer
        at_work.asked = []  # type: ignore[attr-defined]

        def layer(index, matrices):  # type: ignore[no-untyped-def]
            at_work.asked.append(index)  # type: ignore[attr-defined]
            if index == STOP[0]:
                raise KeyboardInterrupt
            return inner(index, matrices)

        at_work.layer = layer  # type: ignore[method-assign]
        return at_work


STOP = [2]


def test_a_broken_attempt_goes_on_behind_the_last_finished_layer(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint(tmp_path / "dense")
    matrices, quantizer = matrices_of(checkpoint), Counted(4, 8)
    chosen = quantizer.chosen(matrices)
    job, out = QuantizeJob(checkpoint, matrices, chosen, tmp_path), tmp_path / "one" / "checkpoint"

    def attempt() -> list[int]:
        at_work = quantizer.begin(job)
        form, finished = quantizer.form(job, at_work), list[int]()
        try:
            write_packed(
                checkpoint, matrices, chosen, form, at_work.layer, out, {},
                lambda index, _: finished.append(index),
            )  # fmt: skip
            assert finished == [0, 1, 2, 3]
        except KeyboardInterrupt:
            assert finished == [0, 1]
        return at_work.asked  # type: ignore[attr-defined, no-any-return]

    STOP[0] = 2
    assert attempt() == [0, 1, 2]
    STOP[0] = -1
    assert attempt() == [2, 3], "what was found of the first two was kept"
    assert not (tmp_path / "one" / "layers").exists()
    assert same(meant(tmp_path / "dense", RoundToNearest(4, 8), tmp_path), read_whole(out))


def test_levels_that_readers_would_read_otherwise_are_noticed(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint(tmp_path / "dense")
    matrices, quantizer = matrices_of(checkpoint), RoundToNearest(4, 8)
    chosen = quantizer.chosen(matrices)
    at_work = quantizer.begin(QuantizeJob(checkpoint, matrices, chosen, tmp_path))

    def too_large(index, these):  # type: ignore[no-untyped-def]
        for matrix, one in at_work.layer(index, these):
            yield matrix, Levels(one.levels + 9, one.scale)  # beyond 4 bits

    form = quantizer.form(QuantizeJob(checkpoint, matrices, chosen, tmp_path), at_work)
    with pytest.raises(NotReadBack, match="another matrix once packed"):
        write_packed(checkpoint, matrices, chosen, form, too_large, tmp_path / "one" / "checkpoint")


def test_a_source_in_few_bits_is_compressed_as_what_is_read_of_it(tmp_path: Path) -> None:
    for number, symmetric in enumerate((True, False)):
        folder = tmp_path / str(number)
        tiny_model("mixtral").save_pretrained(folder / "dense")
        quantised(folder / "dense", RoundToNearest(4, 8, symmetric), folder / "few" / "checkpoint")
        source = Checkpoint(folder / "few" / "checkpoint")
        assert len(source.layers()) == 4
        write_edited(source, Plan(()), folder / "again", Saving())
        assert same(read_whole(source.path), read_whole(folder / "again"))
        values = (folder / "again" / "config.json").read_text()
        assert "quantization_config" not in values and "moe_lab" not in values


def test_a_config_that_promises_packed_weights_has_some(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    quantised(tmp_path / "dense", RoundToNearest(4, 8), tmp_path / "one" / "checkpoint")
    config = (tmp_path / "one" / "checkpoint" / "config.json").read_text()
    (tmp_path / "dense" / "config.json").write_text(config)
    with pytest.raises(Exception, match="none of its tensors is quantised"):
        read_whole(tmp_path / "dense")


def test_a_part_that_is_missing_is_told(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    quantised(tmp_path / "dense", RoundToNearest(4, 8), tmp_path / "one" / "checkpoint")
    file = tmp_path / "one" / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if key.endswith("_scale")))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Exception, match=r"_packed|lacks|do not fit"):
        read_whole(tmp_path / "one" / "checkpoint")
