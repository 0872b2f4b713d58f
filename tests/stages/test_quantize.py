"""The stage that stores a run's matrices in few bits, what a run tells of it, and 8 bits' cost."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model
from in_few_bits import meant
from running import Job

from moe_lab.compute import Compute
from moe_lab.data.standard_library import mixture
from moe_lab.models.checkpoint import Checkpoint, resolve
from moe_lab.models.quantised import packed_as
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.quantize.moqe import Moqe
from moe_lab.quantize.rtn import RoundToNearest
from moe_lab.stages.context import Context
from moe_lab.stages.quantize import Quantization, quantize
from moe_lab.stages.run import checkpoint_of
from moe_lab.store import Store


def test_a_checkpoint_is_quantised_once_whatever_the_machine(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "dense")
    store, dense = Store(tmp_path / "store"), Checkpoint(tmp_path / "dense")
    asked = Quantization(dense, Moqe(4), {"bits": 4, "what": "experts"})
    made = quantize(Context(store, Compute("cpu")), asked)
    form = json.loads((made.folder / "form.json").read_text())
    assert form["stock"] and "compressed-tensors" in form["reason"]
    figures = json.loads((made.folder / "figures.json").read_text())
    assert figures["packed_matrices"] == 3 * 8 * 3
    assert figures["bits_per_weight"] == 8 * figures["packed_bytes"] / figures["packed_parameters"]
    quantised = checkpoint_of(made, dense)
    assert packed_as(quantised.config) == "4 bits (compressed-tensors)"
    again = quantize(Context(store, Compute("cpu", batch_size=1)), asked)
    assert (made.cached, again.cached, again.key) == (False, True, made.key)
    other = quantize(Context(store, Compute("cpu")), replace(asked, options={"bits": 3}))
    assert other.key != made.key


def test_a_run_evaluates_what_is_stored_and_tells_of_it(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    done = job(
        "method=prune", "metric=frequency", "ratio.ratio=0.5", "finetune=none", "quantize=rtn",
        "quantize.group_size=8", "quantize.bits=3", "eval=perplexity", "measure=none",
        "eval.held_out.num_samples=2", "eval.held_out.max_length=16",
    )  # fmt: skip
    assert done.code == 0, done.text
    report = done.report
    assert "quantized, it will be packed as compressed-tensors" in done.text
    assert "vLLM will not read it: experts of 3 bits" in done.text
    folder = Path(report["quantized/checkpoint"])
    assert report["quantized/stock"] and "packed matrices" in report["quantized/form"]
    assert "vLLM: not run" in report["quantized/serving"], "nothing is claimed of few bits"
    assert report["quantized/bytes"] == size_in_bytes(folder)
    assert report["quantized/bytes"] < size_in_bytes(Path(report["compressed/checkpoint"]))
    assert report["quantized/kl"] > 0 and report["quantize"] == "rtn"
    assert (report["quantize/bits"], report["quantize/group_size"]) == (3, 8)
    assert 3 < report["quantized/bits_per_weight"] < 16
    card = (folder / "README.md").read_text()
    assert "quantize" in card and "packed matrices" in card
    refused = job("method=none", "finetune=none", "quantize=rtn", f"model.path={folder}")
    assert refused.code == 2 and "stored in 3 bits (compressed-tensors) already" in refused.text
    odd = job("method=none", "finetune=none", "quantize=rtn", "quantize.group_size=24")
    assert odd.code == 2 and "group_size=24 does not divide" in odd.text
    foreseen = job(
        "method=none", "finetune=none", "quantize=rtn", "quantize.group_size=8", "dry_run=true"
    )
    assert foreseen.code == 0 and "quantize" in foreseen.text


@pytest.mark.parametrize("name", ["tiny_deepseek", "tiny_mixtral", "tiny_qwen2_moe"])
def test_8_bits_of_everything_cost_less_than_a_thousandth_of_a_nat(
    name: str, tmp_path: Path
) -> None:
    # bfloat16 alone is as far off; and in one text of hundreds a near tie of a router may flip.
    checkpoint = resolve(f"shipped:{name}", dtype="float32")
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer()
    texts = [
        tokenizer(text, return_tensors="pt").input_ids[:, :128] for text in mixture("test", 12, 0)
    ]

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(ids).logits[0].double().log_softmax(dim=-1) for ids in texts])

    before, named = logprobs(), dict(model.named_parameters())
    changed = meant(checkpoint.path, RoundToNearest(8, None, what="all"), tmp_path)
    for key, tensor in changed.items():
        named[key].data = tensor.float()
    kl = float((before.exp() * (before - logprobs())).sum(dim=-1).mean())
    assert 0 < kl < 1e-3 and math.isfinite(kl)
