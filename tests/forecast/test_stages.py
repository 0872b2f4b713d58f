"""What stages need, by formulas: without anything measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from foreseen_work import NOTHING, some_work

from moe_lab.forecast.need import Need
from moe_lab.forecast.stages import needs
from moe_lab.forecast.work import Search, Text, Work


def by_stage(work: Work) -> dict[str, Need]:
    return {need.stage: need for need in needs(work, NOTHING)}


def test_each_stage_that_was_asked_for() -> None:
    work = some_work()
    evaluations = [f"evaluate_{name}" for name in ("dense", "compressed", "finetuned")]
    assert list(by_stage(work)) == [
        "profile", "plan", "compress", "finetune", *evaluations, "measure",
    ]  # fmt: skip
    less = replace(work, edited=None, tuning=None, measuring=None, converts=True)
    assert list(by_stage(less)) == ["convert", "profile", "plan", "evaluate_dense"]


def test_one_decoder_layer_at_a_time_takes_less() -> None:
    work = some_work()
    dense = work.dense
    streamed = replace(work, profiling=replace(work.profiling, layerwise=True))
    whole, layerwise = (by_stage(one)["profile"] for one in (work, streamed))
    assert layerwise.memory < whole.memory > dense.bytes
    states = 8 * 16 * dense.shape.hidden_size * 4
    assert layerwise.memory > dense.outside_bytes + 2 * dense.layer_bytes + states
    memory = {
        converted: by_stage(replace(streamed, dense=replace(dense, converted=converted)))["profile"]
        for converted in (True, False)
    }
    more = memory[True].memory - memory[False].memory
    assert more == pytest.approx(0.6 * dense.layer_bytes), "as the files have it, and as it is used"


def test_states_beyond_the_cache_go_to_disk() -> None:
    work = some_work()
    asked = replace(work.profiling, layerwise=True, cache_bytes=100)
    need = by_stage(replace(work, profiling=asked))["profile"]
    assert need.scratch == 8 * 16 * 32 * 4 - 100


def test_what_trains_takes_sixteen_bytes() -> None:
    work = some_work()
    assert work.tuning is not None
    more = replace(work, tuning=replace(work.tuning, trainable=3000))
    few, many = (by_stage(one)["finetune"] for one in (work, more))
    assert many.memory - few.memory == 2000 * (16 - 4)
    assert many.scratch - few.scratch == 2000 * 12 * 2


def test_layers_below_what_trains_need_no_backward_pass() -> None:
    work = some_work()
    assert work.tuning is not None
    last = replace(work, tuning=replace(work.tuning, first=3))
    assert by_stage(last)["finetune"].flops < by_stage(work)["finetune"].flops


def test_a_search_costs_its_passes() -> None:
    work = some_work()
    flops = work.dense.shape.flops([16] * 8, with_head=False)
    need = by_stage(replace(work, search=Search(passes=3.0)))["plan"]
    assert need.flops == 3 * flops
    unknown = by_stage(replace(work, search=Search(passes=1.0, known=False)))["plan"]
    assert unknown.note.startswith("at least")


def test_models_come_one_after_the_other_for_the_held_out_text() -> None:
    work = some_work()
    found = by_stage(work)
    pair, alone = found["evaluate_compressed"], found["evaluate_dense"]
    assert alone.memory <= pair.memory < alone.memory + work.dense.bytes / 4
    assert pair.read == work.dense.file_bytes + work.dense.file_bytes // 2
    assert work.evaluating is not None
    tasks = by_stage(replace(work, evaluating=replace(work.evaluating, held_out=None)))
    assert tasks["evaluate_compressed"].memory == alone.memory
    assert tasks["evaluate_compressed"].flops < alone.flops < pair.flops


@pytest.mark.parametrize(("batch_tokens", "rows"), [(None, 4), (64, 4), (40, 2), (8, 1)])
def test_a_batch_is_bounded_by_its_tokens(batch_tokens: int | None, rows: int) -> None:
    text = Text((16,) * 8, 4, batch_tokens)
    assert (text.rows, text.at_once) == (rows, rows * 16)
