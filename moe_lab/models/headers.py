"""A checkpoint by its config and the headers of its files alone: its tensors are holes.

A folder of that kind looks like the checkpoint to all that reads no weight. Its files have the
sizes that the hub's have, and take no room on a disk whose file system knows holes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_lab.models.checkpoint import SHIPPED, Checkpoint, check_hub_name, resolve
from moe_lab.models.stored import INDEX
from moe_lab.models.weight_files import weight_files
from moe_lab.types import UserError

Header = Mapping[str, Mapping[str, Any]]  # by tensor: dtype, shape and data_offsets
CONFIG = "config.json"


def described_checkpoint(
    path: str, revision: str | None, dtype: str, ignored: Sequence[str], home: Path
) -> Checkpoint:
    """The checkpoint of `model.path`, of which no weight is downloaded.

    Of a folder, or of the hub where all of it is here already, the checkpoint itself; else one
    without weights, below `home`. UserError where there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() and not path.startswith(SHIPPED):
        check_hub_name(path)
        folder = _in_cache(path, revision) or _headers_of(path, revision, home)
        return resolve(folder, None, dtype, ignored)
    return resolve(path, revision, dtype, ignored)


def write_header(file: Path, tensors: Header, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with this header, and a hole in the place of its tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    text = json.dumps(header | {name: dict(one) for name, one in tensors.items()}).encode()
    text += b" " * (-len(text) % 8)
    size = max((one["data_offsets"][1] for one in tensors.values()), default=0)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + size)


def _in_cache(name: str, revision: str | None) -> Path | None:
    """The hub's checkpoint, where it was downloaded before."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        weight_files(folder)
    except (OSError, ValueError):  # not there, or not whole
        return None
    return folder


def _headers_of(name: str, revision: str | None, home: Path) -> Path:
    """config.json, the index and the headers of a checkpoint on the hub, as a folder."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        config = hf_hub_download(name, CONFIG, revision=revision)
        told = get_safetensors_metadata(name, revision=revision)
    except Exception as error:  # the hub's client raises many kinds; each means: not to be had
        raise UserError(
            f"{name} is not a folder here, and the hub did not give its config and headers: "
            f"{error}. Give a local folder with model.path=<folder>, or check the name, the "
            "network and HF_TOKEN"
        ) from error
    folder = home / name.replace("/", "--")
    folder.mkdir(parents=True)
    shutil.copyfile(config, folder / CONFIG)
    for file, one in told.files_metadata.items():
        tensors = {
            key: {"dtype": tensor.dtype, "shape": list(tensor.shape),
                  "data_offsets": list(tensor.data_offsets)}
            for key, tensor in one.tensors.items()
        }  # fmt: skip
        write_header(folder / file, tensors, one.metadata)
    if told.sharded:
        index = {"metadata": dict(told.metadata or {}), "weight_map": dict(told.weight_map)}
        (folder / INDEX).write_text(json.dumps(index))
    return folder
