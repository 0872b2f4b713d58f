"""A checkpoint's folder as a whole: routers, tokenizers, what lies there instead, and how often."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_folders import KINDS, config, copied, refusal, set_config, write_intact
from running import Job, small_options

from moe_lab.models import checking
from moe_lab.models.checkpoint import load, resolve
from moe_lab.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("checking")
    for kind in KINDS:
        write_intact(kind, folder / kind, tokenizer)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_cannot_get_more_experts_than_there_are(
    kind: str, intact: Path, tmp_path: Path
) -> None:
    folder = set_config(copied(intact / kind, tmp_path / "x"), {"num_experts_per_tok": 9})
    told = str(refusal(folder))
    assert "num_experts_per_tok=9" in told and "has 8 experts" in told


def test_groups_that_the_experts_do_not_make(intact: Path, tmp_path: Path) -> None:
    groups = "groups of its 8 experts (n_group, topk_group)"
    more = "topk_group=5: the router has 2 groups (n_group)"
    for changes, words in (
        ({"n_group": 3}, groups),
        ({"topk_group": 5}, more),
        ({"n_group": 16}, groups),
    ):
        folder = set_config(copied(intact / "deepseek_v3", tmp_path / "x"), changes)
        told = str(refusal(folder))
        assert words in told, told


def set_json(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def added(number: int) -> Callable[[Path], None]:
    """So many tokens more than the embedding has rows."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        for one in range(number):
            token = values["added_tokens"][0] | {"id": 259 + one, "content": f"<extra{one}>"}
            values["added_tokens"].append(token)
        path.write_text(json.dumps(values))

    return change


def written(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text)


def gone(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


CUSTOM = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
NONE = "no tokenizer can be read from"
TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a token more": (added(1), "'<extra0>' the id 259, and the embedding has 259 rows"),
    "tokens more": (added(3), "'<extra2>' the id 261, as 2 others, and the embedding has 259 rows"),
    "none": (gone("tokenizer.json"), "has no tokenizer"),
    "empty": (written("tokenizer.json", ""), NONE),
    "no JSON": (written("tokenizer.json", "{"), NONE),
    "a list": (written("tokenizer.json", "[]"), NONE),
    "no model": (written("tokenizer.json", "{}"), NONE),
    "another model": (set_json("tokenizer.json", model={"type": "Nonsense"}), NONE),
    "a broken config": (written("tokenizer_config.json", "{"), NONE),
    "a config that is none": (written("tokenizer_config.json", "[]"), NONE),
    "added tokens": (
        set_json("tokenizer_config.json", added_tokens_decoder={"x": 5}), NONE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_not_the_model_s(case: str, intact: Path, tmp_path: Path) -> None:
    folder = copied(intact / "mixtral", tmp_path / "x")
    change, message = TOKENIZERS[case]
    change(folder)
    told = refusal(folder)
    assert told and message in told and str(folder) in told and "\n" not in told, told


def test_a_tokenizer_s_own_code_is_never_run(intact: Path, tmp_path: Path) -> None:
    folder = copied(intact / "mixtral", tmp_path / "x")
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass XTokenizer: pass\n"
    for name in ("tokenization_x.py", "modeling_x.py", "configuration_x.py"):
        (folder / name).write_text(trap)
    set_json("tokenizer_config.json", tokenizer_class="XTokenizer", **CUSTOM)(folder)
    refusal(folder)
    classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    set_json("config.json", auto_map=classes | CUSTOM["auto_map"])(folder)
    refusal(folder)
    load(folder)
    set_json("config.json", model_type="x")(folder)
    assert "is never run here" in str(refusal(folder))
    with pytest.raises(UserError, match="never run"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


INSTEAD = {
    "adapter_config.json": "Merge it into its model first",
    "params.json": "the publisher's own format",
    "checkpoint-10/config.json": "there is one in checkpoint-10: give that folder",
    "README.md": "config.json is missing",
}


def test_an_adapter_beside_a_model_is_refused(intact: Path, tmp_path: Path) -> None:
    folder = copied(intact / "mixtral", tmp_path / "x")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    assert "has an adapter beside the model" in str(refusal(folder))
    with pytest.raises(UserError, match="Merge it"):
        load(folder)


@pytest.mark.parametrize("name", INSTEAD)
def test_what_lies_there_in_the_place_of_a_config(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    for refuse in (resolve, load):
        with pytest.raises(UserError, match=INSTEAD[name]):
            refuse(tmp_path)


def test_a_folder_is_looked_through_once_until_it_changes(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = copied(intact / "mixtral", tmp_path / "x"), []
    fits = checking.check_fit
    monkeypatch.setattr(checking, "check_fit", lambda *a: (seen.append(1), fits(*a)))
    resolve(folder)
    resolve(folder).load()
    assert len(seen) == 1
    (folder / "config.json").write_text(json.dumps(config(folder) | {"x": 1}))
    load(folder)
    assert len(seen) == 2
    set_config(folder, {"hidden_size": 64})
    for _ in range(2):  # a refusal is not remembered as a success
        with pytest.raises(UserError):
            resolve(folder)


def test_a_run_refuses_before_any_stage(
    intact: Path, tmp_path: Path, text_file: Path, job: Job
) -> None:
    folder = set_config(copied(intact / "mixtral", tmp_path / "x"), {"rms_norm_eps": -1.0})
    outcome = job(*small_options(folder, text_file))
    assert outcome.code == 2 and outcome.stages() == []
    assert "rms_norm_eps=-1.0" in outcome.text and "Traceback" not in outcome.text


def test_the_export_refuses_the_same(intact: Path, tmp_path: Path) -> None:
    from moe_lab.export.given import find_given

    folder = set_config(copied(intact / "mixtral", tmp_path / "x"), {"vocab_size": "a"})
    with pytest.raises(UserError, match="vocab_size"):
        find_given(str(folder))
