"""Generated text that is kept: the same as generated, and generated where it is not to be had."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from moe_lab.data import kept_text, standard_library
from moe_lab.data.kept_text import keep_in, kept_by_source


class Maker:
    """Texts whose making is counted; `version` is what they are made from."""

    def __init__(self) -> None:
        self.made, self.version = 0, "1"

    def texts(self) -> tuple[str, ...]:
        """As a new process gets them."""

        @kept_by_source("passages", lambda domain, split: f"{domain}{self.version}")
        def make(domain: str, split: str) -> tuple[str, ...]:
            self.made += 1
            return (f"{domain} of {split}", f"a\n{self.version}", "")

        assert make("prose", "test") is make("prose", "test")
        return make("prose", "test")


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    monkeypatch.setattr(kept_text, "_memory", None)
    keep_in(tmp_path / "store")
    return Maker()


def _file(home: Path) -> Path:
    (file,) = (home / "store" / "text").iterdir()
    return file


def test_it_is_made_once_and_again_where_its_source_changed(maker: Maker, tmp_path: Path) -> None:
    first = maker.texts()
    assert (maker.texts(), maker.made) == (first, 1)
    assert _file(tmp_path).name == "passages-prose-test-prose1.json"
    maker.version = "2"
    assert maker.texts() == ("prose of test", "a\n2", "") and maker.made == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign"])
def test_a_damaged_file_is_told_and_written_anew(
    damage: str, maker: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right, file = maker.texts(), _file(tmp_path)
    whole = file.read_bytes()
    wrong = {"cut": whole[:-5], "changed": whole.replace(b"of", b"if"), "empty": b"",
             "foreign": json.dumps(["x"]).encode()}  # fmt: skip
    file.write_bytes(wrong[damage])
    assert maker.texts() == right and maker.made == 2
    assert "is damaged" in caplog.text
    assert file.read_bytes() == whole


def test_what_cannot_be_kept_is_made_each_time(maker: Maker, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file in the folder's place")
    assert maker.texts() == maker.texts() and maker.made == 2


def test_without_a_store_nothing_is_written(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_text, "_memory", None)
    assert maker.texts() and not list(tmp_path.iterdir())


def test_embedded_text_is_kept_by_the_library_that_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files by name, size and times; the generated sheets do not ask for them."""
    module = tmp_path / "lib" / "module.py"
    module.parent.mkdir()
    module.write_text("x = 1\n" * 40)
    monkeypatch.setattr(standard_library, "_modules", lambda: [("module", module)])
    seen = [standard_library._source(domain, "test") for domain in ("code", "recall")]
    module.write_text("y = 1\n" * 40)
    again = [standard_library._source(domain, "test") for domain in ("code", "recall")]
    assert again[0] != seen[0] and again[1] == seen[1]
    monkeypatch.setattr(standard_library.sys, "version", "of another Python")
    assert standard_library._source("recall", "test") != seen[1]
    with pytest.raises(ValueError, match="unknown domain"):
        standard_library._source("../recall", "test")


def test_embedded_text_comes_back_as_it_was_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_text, "_memory", None)
    keep_in(tmp_path)
    for name in ("_cached_documents", "_cached_passages"):
        generated = getattr(standard_library, name).__wrapped__
        asked = kept_by_source(name, standard_library._source)
        for domain in ("prose", "arithmetic"):
            texts = generated(domain, "validation")
            assert asked(generated)(domain, "validation") == texts
            assert asked(lambda domain, split: ())(domain, "validation") == texts
            first, _, rest = (
                next(tmp_path.glob(f"text/{name}-{domain}-*")).read_bytes().partition(b"\n")
            )
            assert hashlib.sha256(rest).hexdigest().encode() == first
