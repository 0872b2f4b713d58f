"""The embedded text: deterministic, split by document, one domain apart from the other."""

from __future__ import annotations

import ast
import itertools

import pytest

from moe_lab.data import standard_library


@pytest.mark.parametrize("domain", standard_library.DOMAINS)
def test_splits_share_no_document(domain: str) -> None:
    found = {
        split: set(standard_library.documents(domain, split)) for split in standard_library.SPLITS
    }
    assert all(found.values())
    if domain in ("prose", "code"):
        for one, other in itertools.combinations(standard_library.SPLITS, 2):
            assert found[one].isdisjoint(found[other])
        sizes = {split: sum(map(len, found[split])) for split in standard_library.SPLITS}
        assert sizes["train"] > 0.75 * sum(sizes.values())


def test_documents_are_the_same_when_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    some = standard_library._modules()[:25]
    monkeypatch.setattr(standard_library, "_modules", lambda: some)
    assert standard_library._library_documents.__wrapped__(
        "train"
    ) == standard_library._library_documents.__wrapped__("train")
    for domain in ("arithmetic", "recall"):
        again = standard_library._made_documents.__wrapped__(domain, "test")
        assert standard_library.documents(domain, "test") == list(again)


def test_a_caller_cannot_change_what_others_get() -> None:
    standard_library.documents("recall", "test").clear()
    assert standard_library.documents("recall", "test")


def test_code_has_no_docstrings_and_is_code() -> None:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for document in standard_library.documents("code", "validation") + standard_library.documents(
        "code", "test"
    ):
        for node in ast.walk(ast.parse(document)):
            assert not (isinstance(node, holders) and ast.get_docstring(node))


def test_prose_has_no_interactive_examples() -> None:
    assert not [d for d in standard_library.documents("prose", "train") if ">>>" in d]


def test_a_module_is_separated_into_prose_and_code() -> None:
    docstring = "Recursive descent parser that is described here and nowhere else in the world.\n"
    prose, code = standard_library._separate(
        f'"""{docstring}"""\nimport ast\n\n\ndef f():\n    "What."\n'
    )
    assert prose == docstring.strip() + "\n\nWhat."
    assert code == "import ast\n\n\ndef f():\n    pass"


def test_arithmetic_is_right_and_held_out() -> None:
    seen: dict[str, set[str]] = {}
    for split in standard_library.SPLITS:
        lines = {
            line for d in standard_library.documents("arithmetic", split) for line in d.splitlines()
        }
        seen[split] = lines
        for line in lines:
            problem, result = line.split("=")
            assert eval(problem) == int(result) >= 0
    assert seen["train"].isdisjoint(seen["test"])
    assert seen["train"].isdisjoint(seen["validation"])


def test_recall_questions_have_one_answer_in_the_list() -> None:
    for document in standard_library.documents("recall", "test")[:200]:
        listed: dict[str, str] = {}
        for line in document.splitlines():
            key, value = line.split(" ")
            if key.startswith(standard_library.PARTNER_SIGN):
                assert value == standard_library.partner(
                    listed[key.removeprefix(standard_library.PARTNER_SIGN)]
                )
            else:
                assert listed.setdefault(key, value) == value


def test_partners_are_mutual() -> None:
    assert (
        standard_library.partner(standard_library.partner("dog"))
        == "dog"
        != standard_library.partner("dog")
    )


def test_everything_is_ascii() -> None:
    for domain in standard_library.DOMAINS:
        assert all(document.isascii() for document in standard_library.documents(domain, "test"))


def test_mixture_draws_domains_by_their_share() -> None:
    drawn = standard_library.mixture("train", 200, seed=3)
    assert (
        drawn
        == standard_library.mixture("train", 200, seed=3)
        != standard_library.mixture("train", 200, seed=4)
    )
    assert len(drawn) == len(set(drawn)) == 200
    for domain, share in standard_library.MIXTURE.items():
        pool = set(standard_library.passages(domain, "train"))
        assert sum(passage in pool for passage in drawn) == round(200 * share)


def test_mixture_repeats_only_when_there_is_no_more() -> None:
    pool = standard_library.passages("prose", "validation")
    number = round(2 * len(pool) / standard_library.MIXTURE["prose"])
    drawn = [p for p in standard_library.mixture("validation", number, seed=0) if p in set(pool)]
    assert {drawn.count(passage) for passage in set(pool)} <= {1, 2, 3}
    assert set(drawn) == set(pool)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 101])
def test_mixture_has_as_many_documents_as_asked_for(count: int) -> None:
    assert len(standard_library.mixture("test", count, seed=0)) == count


def test_passages_are_short() -> None:
    for domain in standard_library.DOMAINS:
        for passage in standard_library.passages(domain, "test"):
            longest_line = max(map(len, passage.splitlines()))
            assert len(passage) <= max(standard_library.PASSAGE_CHARACTERS, longest_line)


def test_shares_add_up() -> None:
    assert set(standard_library.MIXTURE) == set(standard_library.DOMAINS)
    assert sum(standard_library.MIXTURE.values()) == pytest.approx(1)


def test_unknown_names_are_refused_with_what_exists() -> None:
    with pytest.raises(ValueError, match=r"unknown domain 'poetry'.*prose, code"):
        standard_library.documents("poetry", "train")
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train, validation, test"):
        standard_library.documents("prose", "dev")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        standard_library.mixture("dev", 1, seed=0)
    with pytest.raises(ValueError, match="negative"):
        standard_library.mixture("train", -1, seed=0)
