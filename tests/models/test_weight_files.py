"""Which files are a checkpoint's weights, and all that can be wrong with them and their index."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_folders import INDEX, WEIGHTS, copied, refusal, write_intact
from safetensors.torch import load_file, save_file

from moe_lab.models.checkpoint import Checkpoint, load, resolve
from moe_lab.models.weight_files import size_in_bytes, weight_files
from moe_lab.types import UserError


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "single"
    write_intact("mixtral", folder, tokenizer)
    assert refusal(folder) is None
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "sharded"
    write_intact("mixtral", folder, tokenizer, max_shard_size="50KB")
    assert refusal(folder) is None and len(weight_files(folder)) > 3
    return folder


def index_of(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text())


def moved(place: str) -> Callable[[Any], Any]:
    """An index that has the embedding in another file."""

    def change(values: Any) -> Any:
        values["weight_map"]["model.embed_tokens.weight"] = place
        return values

    return change


def a_file(values: Any) -> str:
    return next(iter(values["weight_map"].values()))


def without_one(places: dict[str, str]) -> dict[str, str]:
    """A map without one tensor, of a file that has others, too."""
    files = list(places.values())
    gone = next(name for name, file in places.items() if files.count(file) > 1)
    return {name: file for name, file in places.items() if name != gone}


INDICES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda _: [], "it holds a list, not an object"),
    "a number": (lambda _: 5, "it holds a number"),
    "text": (lambda _: "x", "it holds text"),
    "null": (lambda _: None, "it holds missing or null"),
    "nothing": (lambda _: {}, "weight_map is missing"),
    "a list of names": (lambda v: v | {"weight_map": [*v["weight_map"]]}, "weight_map is a list"),
    "no tensor": (lambda v: v | {"weight_map": {}}, "weight_map is an object"),
    "a map of numbers": (lambda v: v | {"weight_map": {"x": 5}}, "is a number, not a file's name"),
    "a map of null": (lambda v: v | {"weight_map": {"x": None}}, "not a file's name"),
    "no metadata": (lambda v: {"weight_map": v["weight_map"]}, "metadata is missing"),
    "metadata of text": (lambda v: v | {"metadata": "x"}, "metadata is text"),
    "a name too long": (moved("é" * 150 + ".safetensors"), "leads elsewhere is not followed"),
    "a name above": (moved("../secret.safetensors"), "leads elsewhere is not followed"),
    "an absolute name": (moved("/etc/hosts.safetensors"), "leads elsewhere is not followed"),
    "a name below": (moved("original/x.safetensors"), "leads elsewhere is not followed"),
    "a name of Windows": (moved("..\\x.safetensors"), "leads elsewhere is not followed"),
    "a name with a null": (moved("x\0.safetensors"), "leads elsewhere is not followed"),
    "a long name": (moved(f"{'x' * 5000}.safetensors"), "leads elsewhere is not followed"),
    "half a character": (moved("\ud800.safetensors"), "leads elsewhere is not followed"),
    "no name": (moved(""), "no *.safetensors"),
    "a pickle": (moved("pytorch_model.bin"), "no *.safetensors. moe_lab reads safetensors only"),
    "an absent file": (moved("model-9.safetensors"), "lacks 1 of"),
    "another file": (
        lambda v: v | {"weight_map": v["weight_map"] | {"model.norm.weight": a_file(v)}},
        "places model.norm.weight in model-00001",
    ),
    "an unknown tensor": (
        lambda v: v | {"weight_map": v["weight_map"] | {"ghost.weight": a_file(v)}},
        "places ghost.weight in",
    ),
    "a tensor less": (
        lambda v: v | {"weight_map": without_one(v["weight_map"])},
        "which model.safetensors.index.json does not name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_is_none(case: str, sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path / "broken")
    (tmp_path / "secret.safetensors").write_bytes((folder / weight_files(folder)[0]).read_bytes())
    change, message = INDICES[case]
    (folder / INDEX).write_text(json.dumps(change(index_of(folder))))
    for told in (refusal(folder), _refused_by_load(folder)):
        assert told and message in told and str(folder) in told and len(told) < 1000, told
        told.encode()


def _refused_by_load(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        load(folder)
    return str(refused.value)


def test_an_index_that_is_no_json(sharded: Path, tmp_path: Path) -> None:
    for text in ("", "{", "x", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")):
        folder = copied(sharded, tmp_path / "broken")
        (folder / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
        told = refusal(folder)
        assert told and f"{INDEX} cannot be read" in told


def header(values: Any, tail: bytes = b"") -> bytes:
    text = (values if isinstance(values, str) else json.dumps(values)).encode()
    return struct.pack("<Q", len(text)) + text + tail


def one(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "a pointer of git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull",
    ),
    "a pickle": (b"PK\x03\x04" + bytes(60), "is a pickle of PyTorch's under another name"),
    "an old pickle": (b"\x80\x02}q\x00." + bytes(60), "is a pickle under another name"),
    "GGUF": (b"GGUF" + bytes(60), "is a GGUF file under another name"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "three bytes": (b"abc", "is damaged or incomplete (3 bytes)"),
    "an absurd length": (struct.pack("<Q", 2**60) + b"{}", "damaged or incomplete"),
    "a length of nothing": (struct.pack("<Q", 0), "damaged or incomplete"),
    "no JSON": (header("nonsense"), "damaged or incomplete"),
    "a list": (header("[]"), "damaged or incomplete"),
    "a cut header": (header(one("F32", [1], 0, 4))[:-9], "damaged or incomplete"),
    "no data": (header(one("F32", [1], 0, 4)), "damaged or incomplete"),
    "too much data": (header(one("F32", [1], 0, 4), bytes(8)), "damaged or incomplete"),
    "offsets outside": (header(one("F32", [1], 0, 400), bytes(4)), "damaged or incomplete"),
    "offsets backwards": (header(one("F32", [1], 4, 0), bytes(4)), "damaged or incomplete"),
    "a hole": (header(one("F32", [1], 4, 8), bytes(8)), "damaged or incomplete"),
    "another size": (header(one("F32", [2], 0, 4), bytes(4)), "damaged or incomplete"),
    "an unknown dtype": (header(one("F37", [1], 0, 4), bytes(4)), "damaged or incomplete"),
    "a long dtype": (header(one("F" * 5000, [1], 0, 4), bytes(4)), "damaged or incomplete"),
    "a negative size": (header(one("F32", [-1], 0, 4), bytes(4)), "damaged or incomplete"),
    "overlapping": (
        header(one("F32", [1], 0, 4) | {"y": one("F32", [1], 0, 4)["x"]}, bytes(4)), "damaged",
    ),
    "no tensor": (header({}), "hold no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_safetensors(case: str, single: Path, tmp_path: Path) -> None:
    folder = copied(single, tmp_path / "broken")
    content, message = FILES[case]
    (folder / WEIGHTS).write_bytes(content)
    told = refusal(folder)
    assert told and message in told and str(folder) in told and len(told) < 1000, told
    assert message in _refused_by_load(folder)


def test_a_file_that_is_cut_anywhere(single: Path, tmp_path: Path) -> None:
    folder, whole = copied(single, tmp_path / "broken"), (single / WEIGHTS).read_bytes()
    for length in (7, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        told = refusal(folder)
        assert told and f"damaged or incomplete ({length} bytes)" in told


def test_the_same_tensor_twice(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path / "broken")
    first, second = weight_files(folder)[:2]
    tensors = load_file(first) | load_file(second)
    save_file(tensors, second, {"format": "pt"})
    assert "twice" in str(refusal(folder))


def test_other_copies_of_the_model_are_not_more_of_it(single: Path, tmp_path: Path) -> None:
    """As Mistral and Meta publish, and with variants and an unfinished download beside."""
    folder = copied(single, tmp_path / "model")
    before = Checkpoint(folder).fingerprint, size_in_bytes(folder), refusal(folder)
    sizes = resolve(folder).layers()[0]
    for name in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors",
                 "model.fp16.safetensors", "model-00001-of-00001.safetensors",
                 "original/model.safetensors", "adapter.safetensors"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / WEIGHTS, folder / name)
    (folder / "consolidated.safetensors.index.json").write_text("nonsense")
    (folder / "pytorch_model.bin").write_bytes(b"\x80nonsense")
    assert (Checkpoint(folder).fingerprint, size_in_bytes(folder), refusal(folder)) == before
    assert resolve(folder).layers()[0] == sizes
    # As in transformers, the single file counts, even beside an index.
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {"x": "consolidated.safetensors"}}')
    assert weight_files(folder) == [folder / WEIGHTS]


INSTEAD = {
    "pytorch_model.bin": "only pytorch_model.bin. moe_lab reads safetensors only",
    "consolidated.00.pth": "only consolidated.00.pth. moe_lab reads",
    "model.fp16.safetensors": "nothing says what model.fp16.safetensors is",
    "consolidated.safetensors": "nothing says what consolidated.safetensors is",
    "adapter_model.safetensors": "Merge it into its model first",
    "model-q4.gguf": "Give the checkpoint that it was made from",
    "README.md": "neither model.safetensors nor model.safetensors.index.json is there",
}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_lies_there_instead(name: str, single: Path, tmp_path: Path) -> None:
    folder = copied(single, tmp_path / "broken")
    (folder / WEIGHTS).rename(folder / name)
    told = refusal(folder)
    assert told and INSTEAD[name] in told
    assert INSTEAD[name] in _refused_by_load(folder)


def test_a_pickle_is_never_opened(single: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    folder = copied(single, tmp_path / "broken")
    (folder / WEIGHTS).unlink()
    for name in ("pytorch_model.bin", "model.safetensors", "tokenizer.pkl", "training_args.bin"):
        torch.save({"x": Trap()}, folder / name)
        assert refusal(folder) is not None
        _refused_by_load(folder)
    assert not (tmp_path / "sprung").exists()
