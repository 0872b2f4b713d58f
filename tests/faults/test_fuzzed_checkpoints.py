"""A damaged model folder is taken or refused in words, and never makes a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damages import damaged_bytes, damaged_header, damaged_json
from families import FAMILIES, tiny_model
from fuzzed import Effort, Tally, Told, fuzz, told
from hypothesis import strategies as st
from running import QUICK, small_options

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
FILES = {
    "config": [CONFIG],
    "index": [INDEX],
    "header": ["model-00001-of-*.safetensors", WEIGHTS],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
    "other": ["generation_config.json", "tokenizer_config.json"],
}
PLACES = st.integers(0, 2**30)
CASES = st.tuples(st.sampled_from(sorted(FAMILIES)), st.booleans(), PLACES, PLACES)


@pytest.fixture(scope="module")
def models(fuzz_folder: Path, tokenizer: Any) -> Callable[[str, bool], Path]:
    """A tiny model of a family, in one file or in several."""

    def model(family: str, sharded: bool) -> Path:
        folder = fuzz_folder / "models" / f"{family}-{sharded}"
        if not folder.exists():
            size = "40KB" if sharded else "1GB"
            vocabulary = dict(vocab_size=len(tokenizer), max_position_embeddings=512)
            tiny_model(family, **vocabulary).save_pretrained(folder, max_shard_size=size)
            tokenizer.save_pretrained(folder)
        return folder

    return model


@pytest.fixture
def job(fuzz_folder: Path, text_file: Path, long: bool, elsewhere: None) -> Callable[..., Told]:
    """A job on a copy of a model in which one file holds something else."""

    def run(folder: Path, name: str, change: Callable[[bytes], bytes]) -> Told:
        copy = fuzz_folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        path = min(copy.glob(name))
        path.write_bytes(change(path.read_bytes()))
        store = fuzz_folder / "store"
        shutil.rmtree(store, ignore_errors=True)
        overrides = [*small_options(copy, text_file), *QUICK, f"store={store}"]
        return told(overrides, fuzz_folder / "run", whole=long)

    return run


@pytest.mark.parametrize("kind", FILES)
def test_any_damage(
    kind: str, models: Callable, job: Callable[..., Told], effort: Effort, tally: Tally
) -> None:
    def check(case: tuple[str, bool, int, int]) -> Told:
        family, sharded, where, how = case
        sharded = sharded or kind == "index"
        folder = models(family, sharded)
        name = next(name for name in FILES[kind][how % 2 :] + FILES[kind] if any(folder.glob(name)))
        return job(folder, name, lambda content: _damaged(content, where, how, kind == "header"))

    fuzz(CASES, check, effort, tally)
    tally.check()


def _damaged(content: bytes, where: int, how: int, header: bool) -> bytes:
    if how % 7 == 0:
        return damaged_bytes(content, where, how // 7)
    if header:
        return damaged_header(content, where, how // 7)
    return json.dumps(damaged_json(json.loads(content), where, how // 7)).encode()


def _with(key: str, value: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | {key: value}).encode()


def _mapped(value: Any) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        index = json.loads(content)
        index["weight_map"][min(index["weight_map"])] = value
        return json.dumps(index).encode()

    return change


def _vocabulary(value: Any) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        tokenizer = json.loads(content)
        tokenizer["model"]["vocab"]["a"] = value
        return json.dumps(tokenizer).encode()

    return change


FOUND = {
    "rope_parameters": ("qwen3_moe", CONFIG, _with("rope_parameters", True)),
    "topk_group": ("glm4_moe", CONFIG, _with("topk_group", -1)),
    "heads": ("qwen2_moe", CONFIG, _with("num_attention_heads", 10**9)),
    "experts": ("mixtral", CONFIG, _with("num_local_experts", 10**9)),
    "architectures": ("qwen3_moe", CONFIG, _with("architectures", 1000)),
    "vocabulary": ("glm4_moe", "tokenizer.json", _vocabulary("0")),
    "generation": ("qwen2_moe", "generation_config.json", lambda content: b"false"),
    "index number": ("mixtral", INDEX, _mapped(10**30)),
    "index name": ("mixtral", INDEX, _mapped("x" * 5000)),
    "index surrogate": ("gpt_oss", INDEX, _mapped("\ud800")),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str, models: Callable, job: Callable[..., Told]) -> None:
    family, file, change = FOUND[name]
    outcome = job(models(family, file == INDEX), file, change)
    assert outcome.message is None or len(outcome.message) < 1500
