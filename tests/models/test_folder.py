"""What of a folder is read: never what lies outside of it, but a hub cache is one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from broken_folders import WEIGHTS, copied, refusal, write_intact
from edited_models import edited, prune

from moe_lab.models.checkpoint import load, resolve
from moe_lab.models.finishing import copy_text_files
from moe_lab.models.folder import check_links, code_files, text_files
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "model"
    write_intact("mixtral", folder, tokenizer)
    return folder


LINKS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "notes.txt", "chat_template.jinja", "spiece.model", "modeling_x.py",
         "additional_chat_templates/tool.jinja")  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_that_leads_out_is_not_read(
    name: str, relative: bool, intact: Path, tmp_path: Path
) -> None:
    folder, secret = copied(intact, tmp_path / "models" / "a"), tmp_path / "secret"
    file = folder / name
    secret.write_text(file.read_text() if file.is_file() else "a key")
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(
        f"{'../' * len(file.relative_to(tmp_path).parts[:-1])}secret" if relative else secret
    )
    assert file.read_text() == secret.read_text()
    told = refusal(folder)
    assert told and f"{file} is a link to {secret}, outside the model's own folder" in told
    with pytest.raises(UserError, match="is a link to"):
        load(folder)
    if not name.endswith((".py", "config.json")):
        with pytest.raises(UserError, match="is a link to"):
            copy_text_files(folder, tmp_path)


def test_a_folder_that_is_a_link_out_and_one_that_leads_nowhere(
    intact: Path, tmp_path: Path
) -> None:
    folder = copied(intact, tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("a key")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert "is a link to" in str(refusal(folder))
    (folder / "additional_chat_templates").unlink()
    (folder / "gone.txt").symlink_to("not-there")
    assert "gone.txt leads nowhere" in str(refusal(folder))
    (folder / "gone.txt").unlink()
    (folder / "x.json").mkdir()
    assert "x.json is no file" in str(refusal(folder))


def test_links_inside_and_links_to_weights_are_followed(intact: Path, tmp_path: Path) -> None:
    """Weights are read as tensors only, and are linked from where there is room for them."""
    folder = copied(intact, tmp_path / "a")
    (folder / "tokenizer.json").rename(folder / "real.bin")
    (folder / "tokenizer.json").symlink_to("real.bin")
    (folder / WEIGHTS).rename(tmp_path / "large.safetensors")
    (folder / WEIGHTS).symlink_to(tmp_path / "large.safetensors")
    assert refusal(folder) is None
    before = resolve(intact).fingerprint
    assert resolve(folder).fingerprint == before
    (tmp_path / "link").symlink_to(folder)
    assert refusal(tmp_path / "link") is None


def as_in_the_hub_s_cache(intact: Path, home: Path) -> Path:
    """A snapshot: all files are links into the same repository's blobs."""
    repository = home / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    for one in (blobs, snapshot):
        one.mkdir(parents=True)
    for number, file in enumerate(sorted(intact.iterdir())):
        (blobs / f"{number:040}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


def test_a_snapshot_of_the_hub_s_cache_is_read_and_leads_nowhere_else(
    intact: Path, tmp_path: Path
) -> None:
    snapshot = as_in_the_hub_s_cache(intact, tmp_path / "hub")
    assert refusal(snapshot) is None
    save_checkpoint(load(snapshot), tmp_path / "out", snapshot)
    for file in text_files(snapshot):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
        assert not (tmp_path / "out" / file.name).is_symlink()
    other = tmp_path / "hub" / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (other / "key").write_text("a key")
    (snapshot / "notes.txt").symlink_to("../../../models--owner--other/blobs/key")
    assert "outside the model's own folder" in str(refusal(snapshot))


def test_code_comes_along_only_where_it_is_named(intact: Path, tmp_path: Path) -> None:
    folder = copied(intact, tmp_path / "a")
    (folder / "modeling_x.py").write_text("raise SystemExit('run')")
    assert code_files(folder) == []
    config = json.loads((folder / "config.json").read_text())
    named = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}}
    (folder / "config.json").write_text(json.dumps(config | named))
    assert [file.name for file in code_files(folder)] == ["modeling_x.py"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"auto_map": {"AutoTokenizer": ["modeling_x.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | named))
    assert refusal(folder) is None  # and SystemExit was not raised
    load(folder)
    check_links(folder)


def test_a_checkpoint_of_ours_has_no_links(tmp_path: Path) -> None:
    edited("mixtral", [prune(1, [0, 1, 2, 3])], tmp_path / "x")
    assert not [file for file in (tmp_path / "x" / "model").rglob("*") if file.is_symlink()]
