"""A dozen types, of every kind of router, shared expert and mixer: what docs/families.md says."""

from __future__ import annotations

import pytest
from running import ROOT

from moe_lab.families.all_types import check_types
from moe_lab.families.table import cell, states_in
from moe_lab.families.tiny import model_types

DOZEN = (
    "qwen3_moe deepseek_v3 mixtral gpt_oss glm4_moe granitemoehybrid jamba phimoe qwen3_next "
    "ernie4_5_moe dots1 mimo_v2_flash"
).split()
TOLD = states_in((ROOT / "docs" / "families.md").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_dozen_types_do_what_the_table_says() -> None:
    rows = list(check_types(DOZEN, processes=2))
    assert sorted(row.name for row in rows) == sorted(DOZEN)
    for row in rows:
        assert not row.failed, (row.name, row.outcomes)
        found = {column: cell(row, column) for column in TOLD[row.name]}
        assert found == TOLD[row.name], f"{row.name}: {row.outcomes}; make families"


def test_the_table_has_every_type() -> None:
    assert TOLD.keys() == model_types().keys()
