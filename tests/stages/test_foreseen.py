"""What a plan leaves, before any work, against what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from running import Job

from moe_lab.forecast.work import Search
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.methods.none import Nothing
from moe_lab.methods.skip import Skip
from moe_lab.models.checkpoint import resolve
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.stages.foreseen import dense_weights, foreseen, search_of

LM = (
    "calibration@finetune.phases.lm.data=files",
    "finetune.phases.lm.data.files=${calibration.files}", "finetune.phases.lm.validation=null",
    "finetune.phases.lm.data.num_samples=4", "+finetune.phases.lm.num_steps=1",
)  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=prune", "metric=frequency", "ratio.ratio=0.5", "finetune=experts", *LM),
        ("method=condense", "condense.layers=[2,3]", "condense.experts=[0,3]"),
        ("method=drop_layers", "method.layers=[2]"),
    ],
    ids=lambda one: one[0],
)  # fmt: skip
def test_what_is_written_on_disk_is_foreseen(
    overrides: tuple[str, ...],
    job: Job,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files of the source that are linked take no room."""
    monkeypatch.setattr("moe_lab.models.shard_writer._clone", lambda *_: False)
    dense = tmp_path / "dense"
    model = tiny_model("qwen2_moe", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(dense, max_shard_size="100KB")
    tokenizer.save_pretrained(dense)
    foretold = job("dry_run=true", f"model.path={dense}", *overrides)
    assert foretold.code == 0, foretold.text
    told = foretold_of(foretold.text)
    done = job(f"model.path={dense}", *overrides)
    assert done.code == 0, done.text
    written, expected = {}, {}
    for stage in {"compress", "finetune"} & set(done.stages()):
        files = [file.stat() for file in (done.store / stage).rglob("*.safetensors")]
        written[stage] = sum(one.st_size for one in files if one.st_nlink == 1)
        expected[stage] = told[f"{stage}/disk_gib"] * 2**30
    assert "compress" in written
    assert expected == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=prune", "metric=frequency", "ratio.ratio=0.5"),
        ("method=prune", "metric=frequency", "ratio=global", "ratio.ratio=0.3"),
        ("method=merge", "ratio.ratio=0.5"),
        ("method=condense", "condense.layers=[1,2]", "condense.experts=[0,3]"),
        ("method=drop_layers", "condense.num_layers=1"),
    ],
    ids=lambda one: " ".join(one),
)
def test_sizes_are_those_that_are_written(
    overrides: tuple[str, ...], job: Job, checkpoint: Path
) -> None:
    foretold = job("dry_run=true", *overrides)
    assert foretold.code == 0, foretold.text
    told = foretold_of(foretold.text)
    done = job(*overrides)
    written = size_in_bytes(Path(done.report["compressed/checkpoint"])) / 2**30
    assert told["result/exact"] == ("ratio=global" not in overrides)
    # Headers count in a model of 0.2 MB.
    assert told["result/gib"] == pytest.approx(written, rel=0.015 if told["result/exact"] else 0.03)
    assert told.get("result/stock") == (
        done.report["compressed/stock"] if told["result/exact"] else None
    )


def foretold_of(text: str) -> dict:
    place = text.rpartition("dry run: ")[2].split("\n")[0].strip()
    return json.loads(Path(place).read_text())


def test_nothing_is_left_as_it_is(checkpoint: Path) -> None:
    one = resolve(checkpoint)
    layers = one.layers()
    dense = dense_weights(one, layers)
    assert dense.file_bytes == size_in_bytes(checkpoint)
    assert foreseen(one, Nothing(), layers, dense).weights is None


def test_what_a_search_asks(checkpoint: Path) -> None:
    layers = resolve(checkpoint).layers()
    assert search_of(DropLayers(1), layers) == Search()
    named = Condense(1, 2, layers=[2], experts=[0, 1])
    assert search_of(named, layers) == Search()
    experts = Condense(1, 2, layers=[2], experts="greedy_js")
    assert search_of(experts, layers) == Search(2.0, 8 + 7, True, True)
    # Of 4 decoder layers the last 3 are candidates: from these 3, 2 and 1 are computed.
    both = Condense(1, 2, layers="greedy_js", experts="greedy_js")
    assert search_of(both, layers) == Search(2.0 + (3 + 2 + 1) / 4 + 1, 3 * (8 + 7), True, True)
    assert not search_of(Condense(1, 2, refit="down_proj"), layers).known
    lexi = {"rule": "lexi", "average_top_k": 1.5}
    assert search_of(Skip(**lexi), layers) == search_of(Skip("listed", top_k=1), layers) == Search()
    assert search_of(Skip(**lexi, inputs="text"), layers).passes == 1 + (layers[0].top_k + 1) / 2
    assert search_of(Skip("naee"), layers) == Search(1.0)
