"""Which files hold a checkpoint's weights, and whether they are whole: by their headers alone.

They are the files that transformers itself loads: model.safetensors, or else those that
model.safetensors.index.json names. Whatever lies beside (consolidated.safetensors, original/, a
variant such as model.fp16.safetensors) is another copy of the model, not more of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from moe_lab.models.stored import INDEX, MADE_BY_MODELS, Stored, stored_in
from moe_lab.types import UserError

SINGLE = "model.safetensors"
# What files that are no safetensors begin with.
_POINTER = b"version https://git-lfs"
_KINDS = {
    b"PK\x03\x04": "a pickle of PyTorch's",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"<": "a web page",
}
MERGE = (
    "Merge it into its model first (peft's merge_and_unload, then save_pretrained), and give that "
    "folder"
)
_CONVERT = (
    "moe_lab reads safetensors only, since pickles can run code. If you trust them: "
    "AutoModelForCausalLM.from_pretrained(<folder>).save_pretrained(<new folder>), and the "
    "tokenizer likewise, writes them as safetensors; many repositories have such a branch"
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; UserError where one is missing or named wrongly."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():  # as in transformers, even beside an index
        return [single]
    if not index.is_file():
        raise UserError(f"{folder} holds no weights that transformers loads: {_instead(folder)}")
    names = sorted(set(weight_map(folder).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files that {INDEX} names: "
            f"{', '.join(missing[:4])}. Copy or download them again"
        )
    return [folder / name for name in names]


def weight_map(folder: Path) -> dict[str, str]:
    """For each tensor the file that the index names; UserError where it is no index."""
    index = folder / INDEX
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{index} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{index} is no index: it holds {_kind(values)}, not an object")
    places = values.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(
            f"{index}: weight_map is {_kind(places)}; it must name the file of each tensor"
        )
    if not isinstance(values.get("metadata"), dict):
        raise UserError(
            f"{index}: metadata is {_kind(values.get('metadata'))}, and transformers needs an "
            'object there, if only an empty one: "metadata": {}'
        )
    for key, name in places.items():
        _check_name(index, key, name)
    return places


def checked_weights(folder: Path) -> list[Stored]:
    """The tensors of a checkpoint's files.

    UserError where they are damaged, no safetensors, or not those that their index names.
    """
    files = weight_files(folder)
    for file in files:
        _check_readable(file)
    stored = [one for file in files for one in stored_in(file)]
    found: dict[str, str] = {}
    for one in stored:
        if one.key in found:
            raise UserError(
                f"{folder} has the tensor {one.key} twice, in {found[one.key]} and in "
                f"{one.file.name}: it is not known which one counts"
            )
        found[one.key] = one.file.name
    if not found:
        raise UserError(f"{folder}: its weights hold no tensor")
    if files != [folder / SINGLE]:
        _compare(folder, weight_map(folder), found)
    return stored


def header_bytes(file: Path) -> int:
    """Bytes of a safetensors file before its tensors: the header's length, and the header."""
    with file.open("rb") as handle:
        return 8 + int.from_bytes(handle.read(8), "little")


def size_in_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in weight_files(folder))


def _compare(folder: Path, told: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse files with other tensors than the index says."""
    counted = {name: place for name, place in told.items() if not MADE_BY_MODELS.search(name)}
    wrong = [name for name, place in counted.items() if found.get(name) != place]
    if wrong:
        name = wrong[0]
        where = f"it is in {found[name]}" if name in found else "no file has it"
        raise UserError(
            f"{folder / INDEX} places {name} in {told[name]}, and {where}"
            f"{_others(wrong)}: the index is not of these files. Copy or download both again"
        )
    if more := [name for name in found if name not in told and not MADE_BY_MODELS.search(name)]:
        raise UserError(
            f"{folder / found[more[0]]} holds {more[0]}, which {INDEX} does not name"
            f"{_others(more)}: the index is not of these files. Copy or download both again"
        )


def _others(names: Iterable[str]) -> str:
    number = len(list(names)) - 1
    return f" (and {number} more)" if number else ""


def _check_name(index: Path, key: str, name: Any) -> None:
    place = f"{index}: weight_map[{_short(key)}]"
    if not isinstance(name, str):
        raise UserError(f"{place} is {_kind(name)}, not a file's name")
    odd = len(name.encode(errors="replace")) > 255 or not name.isprintable() or "\\" in name
    if PurePosixPath(name).name != name or odd:
        raise UserError(
            f"{place} is {_short(name)}; files stand beside the index, and a name "
            "that leads elsewhere is not followed"
        )
    if not name.endswith(".safetensors"):
        raise UserError(f"{place} is {_short(name)}, no *.safetensors. {_CONVERT}")


def _check_readable(file: Path) -> None:
    """Refuse a corrupt or truncated file by its header, without reading its tensors."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} {_damage(file, error)}") from error


def _damage(file: Path, error: Exception) -> str:
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            begin = handle.read(len(_POINTER))
    except OSError as refused:
        return f"cannot be read: {refused.strerror}"
    if begin == _POINTER:
        return (
            "is a pointer of git-lfs, not the file that it stands for: run `git lfs pull` in that "
            "repository, or download the file"
        )
    if kind := next((kind for magic, kind in _KINDS.items() if begin.startswith(magic)), None):
        return f"is {kind} under another name. {_CONVERT}"
    what = f"is damaged or incomplete ({size} bytes): {str(error)[:200]}" if size else "is empty"
    return f"{what}. Copy or download it again"


def _instead(folder: Path) -> str:
    """What lies there in the place of weights, and what to do about it."""
    there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    wanted = f"neither {SINGLE} nor {INDEX}"
    pickles = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    tensors = [name for name in there if name.endswith(".safetensors")]
    if "adapter_config.json" in there or "adapter_model.safetensors" in tensors:
        return f"{wanted}, but an adapter. {MERGE}"
    if tensors:
        return (
            f"{wanted} is there, and nothing says what {', '.join(tensors[:3])} is. Give a single "
            f"file that name, or bring the index along; variants and consolidated files of the "
            "same model are not read"
        )
    if pickles:
        return f"only {', '.join(pickles[:3])}. {_CONVERT}"
    if gguf := [name for name in there if name.endswith(".gguf")]:
        return f"only {gguf[0]}. Give the checkpoint that it was made from"
    return f"{wanted} is there"


def _short(name: str) -> str:
    """A name of others in a message: quoted, printable, and not of thousands of characters."""
    shown = ascii(name)
    return shown if len(shown) < 100 else f"{shown[:80]}..."


def _kind(value: Any) -> str:
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "missing or null"
    return words.get(type(value), "a number")
