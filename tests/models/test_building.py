"""Whose fault it is when transformers builds nothing: the checkpoint's, or ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model

from moe_lab.models.building import blamed_on, built_config
from moe_lab.models.opening import text_values
from moe_lab.types import UserError

PATH = Path("/folder/config.json")


def blamed(values: dict[str, Any], config: Any) -> str:
    """What is told of a model that cannot be built of this config."""
    with pytest.raises(UserError) as refused, blamed_on(PATH, values):
        tiny_model("mixtral").__class__(config)
    return str(refused.value)


def test_the_fields_that_the_failing_line_reads_are_named() -> None:
    """No message of torch or Python says which: a division by zero, a size below 0, a name."""
    config = tiny_model("mixtral").config
    values = config.to_dict()
    for name, value, told in (
        ("num_attention_heads", 0, "num_attention_heads=0"),
        ("num_key_value_heads", 0, "num_key_value_heads=0"),
        ("vocab_size", -5, "vocab_size=-5"),
        ("hidden_act", "so", "hidden_act='so'"),
    ):
        broken = config.__class__.from_dict(values)
        broken.__dict__[name] = value
        broken.__dict__["head_dim"] = None
        said = blamed(values | {name: value}, broken)
        assert said.startswith(f"{PATH}: ") and told in said and "\n" not in said


class Odd:
    """A config without the part that it should describe."""

    sub_configs = ("x",)
    x = None

    def get_text_config(self, decoder: bool) -> None:
        return None


def test_an_error_of_our_own_passes_through() -> None:
    with pytest.raises(StopIteration), blamed_on(PATH, {}):
        text_values({}, Odd())  # raises in moe_lab
    with pytest.raises(UserError), blamed_on(PATH, {}):
        json.loads("{")  # raises elsewhere


def test_a_refusal_gets_the_file_that_it_is_about() -> None:
    with pytest.raises(UserError, match=r"^/folder/config.json: not this$"), blamed_on(PATH, {}):
        raise UserError("not this")
    with pytest.raises(UserError, match=r"^/folder holds nothing$"), blamed_on(PATH, {}):
        raise UserError("/folder holds nothing")


def test_a_config_says_nothing_of_code_and_is_dequantised(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    chosen = {
        "attn_implementation": "flex_attention",
        "quantization_config": {"quant_method": "fp8"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | chosen))
    config = built_config(tmp_path)
    assert config._attn_implementation is None
    assert config.quantization_config["dequantize"] is True
