"""Weight files that are planned, and filled piece by piece."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.models.shard_writer import NotWritten, ShardWriter, share_file
from moe_lab.models.shards import Entry, Span, plan_shards
from moe_lab.models.stored import stored_in
from moe_lab.models.weight_files import checked_weights

KINDS = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def drawn(number: int) -> dict[str, Tensor]:
    """Tensors of all dtypes, odd sizes and none, their names in no order."""
    generator = torch.Generator().manual_seed(number)
    found = {
        f"layers.{number}.{one}": torch.randint(0, 2, (3, one + 1), generator=generator).to(kind)
        for one, kind in enumerate(KINDS)
    }
    return found | {
        f"layers.{number}.nothing": torch.zeros(0, 4),
        f"scalar.{number}é": torch.ones(()),
    }


def entries(tensors: dict[str, Tensor]) -> list[Entry]:
    return [Entry.of(name, tensor) for name, tensor in tensors.items()]


def test_a_file_is_what_safetensors_itself_writes(tmp_path: Path) -> None:
    pieces = [drawn(0), drawn(1)]
    (shard,) = plan_shards(map(entries, pieces))
    assert shard.name == "model.safetensors"
    with ShardWriter(tmp_path, [shard]) as writer:
        for piece in reversed(pieces):  # in any order
            writer.write(piece)
        writer.finish()
    save_file(pieces[0] | pieces[1], tmp_path / "expected", {"format": "pt"})
    assert (tmp_path / shard.name).read_bytes() == (tmp_path / "expected").read_bytes()


def test_several_files_have_an_index_and_split_only_what_is_too_large(tmp_path: Path) -> None:
    pieces = [
        {f"layers.{i}.{name}": torch.full((100,), float(i)) for name in "abc"} for i in range(4)
    ]
    for limit, names in ((2400, (6, 6)), (1300, (3, 3, 3, 3)), (900, (2, 1, 2, 1, 2, 1, 2, 1))):
        folder = tmp_path / str(limit)
        folder.mkdir()
        shards = plan_shards(map(entries, pieces), limit=limit)
        assert tuple(len(one.entries) for one in shards) == names
        with ShardWriter(folder, shards) as writer:
            for piece in pieces:
                writer.write(piece)
            writer.finish()
        stored = {one.key: one.load() for one in checked_weights(folder)}
        assert stored.keys() == {name for piece in pieces for name in piece}
        assert all(bool((stored[f"layers.{i}.a"] == i).all()) for i in range(4))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * 3 * 400


@pytest.mark.parametrize("stretch", [2**24, 24, 7])
def test_bytes_of_other_files_come_in_stretches(
    stretch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lab.models.shard_writer.STRETCH", stretch)
    source = {"x": torch.arange(60).reshape(6, 10), "y": torch.randn(7)}
    save_file(source, tmp_path / "source")
    at = {one.key: one for one in stored_in(tmp_path / "source")}
    rows = [Span(at["x"].file, at["x"].offset + row * 80, 80) for row in (4, 1)]
    whole = [Span(at["y"].file, at["y"].offset, 28)]
    planned = [Entry("x", torch.int64, (2, 10)), Entry("z", torch.float32, (7,))]
    with ShardWriter(tmp_path, plan_shards([planned])) as writer:
        assert writer.lacks(planned)
        writer.copy({"x": rows, "z": whole})
        assert not writer.lacks(planned)
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["x"], source["x"][[4, 1]])
    assert torch.equal(read["z"], source["y"])
    again = ShardWriter(tmp_path, plan_shards([planned]))
    with pytest.raises(NotWritten, match="ends before"), again as writer:
        writer.copy({"x": rows, "z": [Span(at["y"].file, at["y"].offset + 8, 28)]})
    assert writer.lacks(planned) and not writer.settle(all_of_them=True)


@pytest.mark.parametrize("stretch", [2**24, 24])
def test_tensors_are_written_in_stretches(
    stretch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lab.models.shard_writer.STRETCH", stretch)
    piece = drawn(0)
    with ShardWriter(tmp_path, plan_shards([entries(piece)])) as writer:
        writer.write(piece)
        writer.finish()
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in piece.items())


def test_what_is_not_as_planned_or_missing_is_never_silent(tmp_path: Path) -> None:
    piece = drawn(0)
    writer = ShardWriter(tmp_path, plan_shards([entries(piece)]))
    with pytest.raises(NotWritten, match="was planned as"):
        writer.write({"layers.0.1": torch.zeros(3, 2, dtype=torch.float64)})
    with pytest.raises(NotWritten, match="lacks 12 tensors"):
        writer.finish()


def test_a_disk_that_loses_what_is_written_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = {"x": torch.randn(1000)}
    opened = ShardWriter(tmp_path, plan_shards([entries(piece)]))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, view, at: pwrite(file, bytes(len(view)), at))
    with pytest.raises(NotWritten, match="x was not written as it is"), opened as writer:
        writer.write(piece)


def test_finished_files_stay_and_others_begin_anew(tmp_path: Path) -> None:
    pieces = [drawn(0), drawn(1)]
    shards = plan_shards(map(entries, pieces), limit=600)
    with ShardWriter(tmp_path, shards) as writer:
        writer.write(pieces[0])
    done = writer.settle(all_of_them=True)
    assert done
    torn = next(one.name for one in shards if one.name not in done)
    (tmp_path / torn).write_bytes(b"torn")
    (tmp_path / "model-other.safetensors").write_bytes(b"of an older attempt")
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in done}
    with ShardWriter(tmp_path, shards, done) as again:
        assert {file.name for file in tmp_path.glob("*.safetensors")} == done.keys()
        for piece in pieces:
            again.write(piece)
        again.finish()
    assert stamps == {name: (tmp_path / name).stat().st_mtime_ns for name in done}
    read = {one.key: one.load() for one in checked_weights(tmp_path)}
    assert all(
        torch.equal(read[name], tensor) for piece in pieces for name, tensor in piece.items()
    )


def test_a_finished_file_that_has_changed_since_is_written_again(tmp_path: Path) -> None:
    piece = drawn(0)
    shards = plan_shards([entries(piece)])
    with ShardWriter(tmp_path, shards) as writer:
        writer.write(piece)
    done = writer.settle(all_of_them=True)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    assert not ShardWriter(tmp_path, shards, done).lacks(entries(piece))
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with ShardWriter(tmp_path, shards, done) as again:
        assert again.lacks(entries(piece))
        again.write(piece)
        again.finish()
    assert file.read_bytes() == whole


@pytest.mark.parametrize("way", ["cheapest", "copy"])
def test_a_whole_file_comes_along_by_the_cheapest_way(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blob")

    def refused(*_: object) -> None:
        raise OSError(18, "another device")

    if way == "copy":
        monkeypatch.setattr("moe_lab.models.shard_writer._clone", lambda *_: False)
        monkeypatch.setattr(os, "link", refused)
    taken = share_file(tmp_path / "link.safetensors", tmp_path / "new.safetensors")
    assert taken in (("clone", "link") if way == "cheapest" else ("copy",))
    assert not (tmp_path / "new.safetensors").is_symlink()
    assert (tmp_path / "new.safetensors").read_bytes() == b"weights"
