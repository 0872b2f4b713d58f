"""The embedded text: deterministic, split by document, one domain apart from the other."""

from __future__ import annotations

import ast
import itertools

import pytest

from moe_lab import text


@pytest.mark.parametrize("domain", text.DOMAINS)
def test_splits_share_no_document(domain: str) -> None:
    found = {split: set(text.documents(domain, split)) for split in text.SPLITS}
    assert all(found.values())
    if domain in ("prose", "code"):
        for one, other in itertools.combinations(text.SPLITS, 2):
            assert found[one].isdisjoint(found[other])
        sizes = {split: sum(map(len, found[split])) for split in text.SPLITS}
        assert sizes["train"] > 0.75 * sum(sizes.values())


def test_documents_are_the_same_when_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    some = text._modules()[:25]
    monkeypatch.setattr(text, "_modules", lambda: some)
    assert text._library_documents.__wrapped__() == text._library_documents.__wrapped__()
    for domain in ("arithmetic", "recall"):
        again = text._cached_documents.__wrapped__(domain, "test")
        assert text.documents(domain, "test") == list(again)


def test_a_caller_cannot_change_what_others_get() -> None:
    text.documents("recall", "test").clear()
    assert text.documents("recall", "test")


def test_code_has_no_docstrings_and_is_code() -> None:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for document in text.documents("code", "validation") + text.documents("code", "test"):
        for node in ast.walk(ast.parse(document)):
            assert not (isinstance(node, holders) and ast.get_docstring(node))


def test_prose_has_no_interactive_examples() -> None:
    assert not [d for d in text.documents("prose", "train") if ">>>" in d]


def test_a_module_is_separated_into_prose_and_code() -> None:
    docstring = "Recursive descent parser that is described here and nowhere else in the world.\n"
    prose, code = text._separate(f'"""{docstring}"""\nimport ast\n\n\ndef f():\n    "What."\n')
    assert prose == docstring.strip() + "\n\nWhat."
    assert code == "import ast\n\n\ndef f():\n    pass"


def test_arithmetic_is_right_and_held_out() -> None:
    seen: dict[str, set[str]] = {}
    for split in text.SPLITS:
        lines = {line for d in text.documents("arithmetic", split) for line in d.splitlines()}
        seen[split] = lines
        for line in lines:
            problem, result = line.split("=")
            assert eval(problem) == int(result) >= 0
    assert seen["train"].isdisjoint(seen["test"])
    assert seen["train"].isdisjoint(seen["validation"])


def test_recall_questions_have_one_answer_in_the_list() -> None:
    for document in text.documents("recall", "test")[:200]:
        listed: dict[str, str] = {}
        for line in document.splitlines():
            key, value = line.split(" ")
            if key.startswith(text.PARTNER_SIGN):
                assert value == text.partner(listed[key.removeprefix(text.PARTNER_SIGN)])
            else:
                assert listed.setdefault(key, value) == value


def test_partners_are_mutual() -> None:
    assert text.partner(text.partner("dog")) == "dog" != text.partner("dog")


def test_everything_is_ascii() -> None:
    for domain in text.DOMAINS:
        assert all(document.isascii() for document in text.documents(domain, "test"))


def test_mixture_draws_domains_by_their_share() -> None:
    drawn = text.mixture("train", 200, seed=3)
    assert drawn == text.mixture("train", 200, seed=3) != text.mixture("train", 200, seed=4)
    assert len(drawn) == len(set(drawn)) == 200
    for domain, share in text.MIXTURE.items():
        pool = set(text.passages(domain, "train"))
        assert sum(passage in pool for passage in drawn) == round(200 * share)


def test_mixture_repeats_only_when_there_is_no_more() -> None:
    pool = text.passages("prose", "validation")
    number = round(2 * len(pool) / text.MIXTURE["prose"])
    drawn = [p for p in text.mixture("validation", number, seed=0) if p in set(pool)]
    assert {drawn.count(passage) for passage in set(pool)} <= {1, 2, 3}
    assert set(drawn) == set(pool)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 101])
def test_mixture_has_as_many_documents_as_asked_for(count: int) -> None:
    assert len(text.mixture("test", count, seed=0)) == count


def test_passages_are_short() -> None:
    for domain in text.DOMAINS:
        for passage in text.passages(domain, "test"):
            longest_line = max(map(len, passage.splitlines()))
            assert len(passage) <= max(text.PASSAGE_CHARACTERS, longest_line)


def test_shares_add_up() -> None:
    assert set(text.MIXTURE) == set(text.DOMAINS)
    assert sum(text.MIXTURE.values()) == pytest.approx(1)


def test_unknown_names_are_refused_with_what_exists() -> None:
    with pytest.raises(ValueError, match=r"unknown domain 'poetry'.*prose, code"):
        text.documents("poetry", "train")
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train, validation, test"):
        text.documents("prose", "dev")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        text.mixture("dev", 1, seed=0)
    with pytest.raises(ValueError, match="negative"):
        text.mixture("train", -1, seed=0)
