"""llama.cpp, really run behind its public converter: right, or refused in a line."""

from __future__ import annotations

import importlib.util
import sys

from running import missing

from moe_lab.serving.asking import cells_of
from moe_lab.serving.checkpoints import Served
from moe_lab.serving.engines import engines
from moe_lab.store import Store


def test_native_is_right_and_our_own_form_refused(few: list[Served], served_store: Store) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        missing("xllamacpp is not installed")
    found = cells_of(served_store, engines(sys.executable)["llama.cpp"], few)
    assert [one.verdict for one in found] == ["right", "right", "refused"]
    assert found[1].tokens == "48/48"
    assert "MoeLabForCausalLM" in found[2].detail
