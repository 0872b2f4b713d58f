"""The process that never imports moe_lab: it answers, refuses our form, and survives a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lab.families import stock_process as stock_process_module
from moe_lab.families.family import Family
from moe_lab.families.references import logits_of
from moe_lab.families.stock_process import Stock
from moe_lab.models.checkpoint import load


def test_it_computes_what_the_model_does(family: Family) -> None:
    answer = family.stock.ask("reload", family.folder / "dense", family.batches, generate=True)
    assert answer.logits and not answer.error and not answer.complaints
    assert answer.generation == "equal"
    ours = logits_of(load(family.folder / "dense"), family.batches)
    assert all(torch.equal(one, other) for one, other in zip(answer.logits, ours, strict=True))


def test_an_error_is_an_answer_and_the_next_job_works(family: Family, tmp_path: Path) -> None:
    answer = family.stock.ask("reload", tmp_path, family.batches)
    assert answer.logits is None and answer.error
    assert family.stock.ask("reload", family.folder / "dense", family.batches).logits


def test_what_a_loading_report_complains_of_is_told(family: Family, tmp_path: Path) -> None:
    model = load(family.folder / "dense")
    model.config.num_hidden_layers = 5
    model.config.save_pretrained(tmp_path)
    weights = family.folder / "dense" / "model.safetensors"
    (tmp_path / weights.name).write_bytes(weights.read_bytes())
    answer = family.stock.ask("reload", tmp_path, family.batches)
    assert answer.logits and "model.layers.4." in answer.complaints


def test_a_process_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such thing')")
    monkeypatch.setattr(stock_process_module, "REFERENCES", broken)
    with (
        pytest.raises(RuntimeError, match="did not start: no such thing"),
        stock_process_module.stock_process(),
    ):
        pass


def test_a_connection_that_breaks_is_an_answer(stock: Path, family: Family, tmp_path: Path) -> None:
    other = Stock(stock, "AutoModelForCausalLM", tmp_path)
    other.socket.shutdown(2)
    answer = other.ask("reload", family.folder / "dense", family.batches)
    assert answer.logits is None and "died" in answer.error
    other.close()
    assert family.stock.ask("reload", family.folder / "dense", family.batches).logits
