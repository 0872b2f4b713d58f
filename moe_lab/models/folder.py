"""Which files of a checkpoint's folder are read beside its weights, and that none leads out of it.

A folder of others may hold links. In a hub's cache all files are links, into the same repository's
folder of blobs: those are followed. A link to anywhere else is not: what lies there is nobody's
model, and would come along into a checkpoint that is shared. Weights are an exception: people link
large files from where they lie, and of those nothing is read but tensors.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from moe_lab.types import UserError

TEXT_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*")
CODE_FILES = ("*.py",)
# They tell an engine that the weights are of another form, or elsewhere: of what is written beside
# them that is not true. params.json alone makes vLLM look for Mistral's consolidated files.
OF_OTHER_FORMS = re.compile(
    r"^(adapter_config|params|quantize_config|quant_config|hf_quant_config|"
    r".*\.index(\.\w+)?)\.json$"
)


def text_files(folder: Path) -> list[Path]:
    """Tokenizer, processor and generation files: all text beside the config and weights' index.

    But for what speaks of the weights in another form (OF_OTHER_FORMS).
    Raises UserError for a link that leads out of the model's folder.
    """
    files = {file for pattern in TEXT_FILES for file in folder.glob(pattern)}
    return sorted(
        _inside(file, folder)
        for file in files
        if file.name != "config.json" and not OF_OTHER_FORMS.match(file.name)
    )


def code_files(folder: Path) -> list[Path]:
    """The code of others that its configs name for the tokenizer, the processor or the model.

    It is never run here; whoever trusts it finds it in a compressed checkpoint as in its source.
    Raises UserError for a link that leads out of the model's folder.
    """
    if not any("auto_map" in file.read_text(errors="replace") for file in texts_in_json(folder)):
        return []
    return sorted(_inside(file, folder) for name in CODE_FILES for file in folder.glob(name))


def texts_in_json(folder: Path) -> list[Path]:
    """The JSON files of a folder, its config among them."""
    return sorted(_inside(file, folder) for file in folder.glob("*.json"))


def check_links(folder: Path) -> None:
    """Refuse a folder whose text or code files are links that lead out of the model's folder."""
    for patterns in (TEXT_FILES, CODE_FILES):
        for file in (file for pattern in patterns for file in folder.glob(pattern)):
            _inside(file, folder)


def copy_beside(file: Path, folder: Path, target: Path) -> None:
    """Copy a file of a folder to the same place in another one, byte for byte."""
    place = target / file.relative_to(folder)
    place.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, place)


def _inside(file: Path, folder: Path) -> Path:
    """The file, unless it is a link that leads out."""
    home, place = _home(folder), Path(os.path.realpath(file))
    if not place.is_relative_to(home):
        raise UserError(
            f"{file} is a link to {place}, outside the model's own folder: it is not read. Put the "
            "file itself there, if it belongs to the model"
        )
    if not place.is_file():
        what = "leads nowhere" if file.is_symlink() else "is no file"
        raise UserError(f"{file} {what}: copy or download the model again, or remove it")
    return file


def _home(folder: Path) -> Path:
    """The folder, or its repository's where it is a snapshot in a hub's cache."""
    real = Path(os.path.realpath(folder))
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return repository
    return real
