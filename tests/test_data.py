"""Text as token batches: what is a sample, how batches pad, and what fingerprints tell apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.data import standard_library
from moe_lab.data.embedded import StandardLibrary, StandardQuestions
from moe_lab.data.files import Files
from moe_lab.data.hub import HubDataset
from moe_lab.data.mixture import Mixture
from moe_lab.data.source import Pair, Texts
from moe_lab.data.tokens import IGNORED, Tokens
from moe_lab.types import UserError

ROWS = [f"document {number} " + "x" * number for number in range(12)]


def files(path: Path, **options: Any) -> Files:
    return Files(**({"num_samples": 12, "max_length": 64, "files": (str(path),)} | options))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row, "other": row[::-1]}) + "\n" for row in ROWS))
    return path


def decoded(tokens: Tokens, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(list(sample)) for sample in tokens.samples]


def test_one_document_is_one_sample(lines: Path, tokenizer: Any) -> None:
    tokens = files(lines).tokens(tokenizer)
    assert decoded(tokens, tokenizer) == ROWS
    assert tokens.num_tokens == sum(len(row) for row in ROWS)


def test_documents_are_truncated_and_never_packed(lines: Path, tokenizer: Any) -> None:
    tokens = files(lines, max_length=5).tokens(tokenizer)
    assert decoded(tokens, tokenizer) == [row[:5] for row in ROWS]


def test_packed_only_when_asked(lines: Path, tokenizer: Any) -> None:
    joined = "".join(ROWS)
    tokens = files(lines, max_length=20, pack=True, num_samples=6).tokens(tokenizer)
    assert decoded(tokens, tokenizer) == [joined[20 * i : 20 * i + 20] for i in range(6)]
    with pytest.raises(UserError, match=rf"40 samples.*only {len(joined) // 20} full samples"):
        files(lines, max_length=20, pack=True, num_samples=40).tokens(tokenizer)


def test_batches_pad_on_the_right_with_mask_zero(lines: Path, tokenizer: Any) -> None:
    tokens = files(lines).tokens(tokenizer)
    batches = tokens.batches(5)
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 2]
    seen = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape and mask.sum(1).amax() == ids.shape[1]
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
        seen += [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]
    assert sorted(seen) == sorted(tokens.samples)


def test_batches_hold_samples_of_similar_length(lines: Path, tokenizer: Any) -> None:
    shuffled = files(lines).tokens(tokenizer).shuffled(3)
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in shuffled.batches(4)]
    assert lengths == [[11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 22, 23]]


def test_shuffled_keeps_all_and_depends_on_the_seed(lines: Path, tokenizer: Any) -> None:
    tokens = files(lines).tokens(tokenizer)
    first, again, second = (tokens.shuffled(seed) for seed in (1, 1, 2))
    assert first.samples == again.samples != second.samples != tokens.samples
    assert sorted(first.samples) == sorted(tokens.samples)


def test_fingerprints_tell_data_apart(lines: Path, tokenizer: Any, tmp_path: Path) -> None:
    same = files(lines).tokens(tokenizer).fingerprint
    assert files(lines).tokens(tokenizer).fingerprint == same
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(lines.read_bytes())
    assert files(moved).tokens(tokenizer).fingerprint == same, "paths never enter"
    others = [
        files(lines, num_samples=11),
        files(lines, max_length=8),
        files(lines, field="other"),
        files(lines, pack=True, max_length=8),
    ]
    prints = [source.tokens(tokenizer).fingerprint for source in others]
    assert len({same, *prints}) == 5
    assert all(len(text) == 12 and int(text, 16) >= 0 for text in prints)
    assert Tokens(((1, 2), (3,)), 0).fingerprint != Tokens(((1,), (2, 3)), 0).fingerprint


def test_jsonl_parquet_and_text_read_alike(lines: Path, tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS, "number": range(12)}), table)
    plain = []
    for number, row in enumerate(ROWS):
        plain.append(tmp_path / f"{number}.txt")
        plain[-1].write_text(row)
    expected = files(lines).tokens(tokenizer).samples
    assert files(table).tokens(tokenizer).samples == expected
    named = tuple(str(path) for path in plain)
    assert files(lines, files=named).tokens(tokenizer).samples == expected


def test_a_text_file_is_one_document_and_lines_may_hold_any_unicode(
    tokenizer: Any, tmp_path: Path
) -> None:
    text = tmp_path / "one.txt"
    text.write_text("first\n\nsecond", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    odd = ["line\u2028separator", "né\x85xt", "日本"]
    dumped = [json.dumps({"text": row}, ensure_ascii=False) for row in odd]
    rows.write_text("\n\n".join(dumped), encoding="utf-8")
    both = files(text, files=(str(text), str(rows)), num_samples=4)
    assert decoded(both.tokens(tokenizer), tokenizer) == ["first\n\nsecond", *odd]


def test_empty_documents_are_no_samples(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ["", "  \n", "something", "\t", "more"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert decoded(files(path, num_samples=2).tokens(tokenizer), tokenizer) == ["something", "more"]
    with pytest.raises(UserError, match="holds only 2 documents with text; ask for fewer"):
        files(path, num_samples=3).tokens(tokenizer)


def test_a_local_folder_of_the_hubs_layout(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    for split, rows in {"train": ROWS, "test": ROWS[:2]}.items():
        table = pyarrow.table({"text": rows, "answer": [row[0] for row in rows]})
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    source = HubDataset(12, 64, path=str(folder))
    assert decoded(source.tokens(tokenizer), tokenizer) == ROWS
    test = HubDataset(2, 64, path=str(folder), split="test", template="{text}: {answer}")
    assert decoded(test.tokens(tokenizer), tokenizer) == [f"{row}: d" for row in ROWS[:2]]
    for wrong in (dict(field="texts"), dict(template="{question}")):
        with pytest.raises(UserError, match=r"\['answer', 'text'\]"):
            HubDataset(1, 64, path=str(folder), **wrong).tokens(tokenizer)
    with pytest.raises(UserError, match="could not be loaded"):
        HubDataset(1, 64, path=str(tmp_path / "nothing")).tokens(tokenizer)


class Endless(Texts):
    """Documents that all say the same, without end."""

    def documents(self) -> Any:
        while True:
            yield f"sample of length {self.max_length}"


def test_a_mixture_keeps_its_shares(tokenizer: Any) -> None:
    weights = {"a": 3, "b": 1}
    parts = {
        name: {"weight": weight, "source": Endless(1, number)}
        for number, (name, weight) in enumerate(weights.items(), start=1)
    }
    mixture = Mixture(num_samples=100, max_length=64, parts=parts)
    found = decoded(mixture.tokens(tokenizer), tokenizer)
    counts = [found.count(f"sample of length {number}") for number in (1, 2)]
    assert sum(counts) == 100 and abs(counts[0] - 75) <= 1
    assert mixture.tokens(tokenizer).fingerprint == mixture.tokens(tokenizer).fingerprint
    with pytest.raises(UserError, match="above 0"):
        Mixture(num_samples=2, max_length=8, parts={"a": {"weight": 0, "source": None}}).documents()


def test_the_standard_library(tokenizer: Any) -> None:
    sources = [
        StandardLibrary(16, 32),
        StandardLibrary(16, 32, seed=1),
        StandardLibrary(16, 32, split="test"),
        StandardLibrary(16, 32, domains=("arithmetic",)),
    ]
    prints = [source.tokens(tokenizer).fingerprint for source in sources]
    assert len(set(prints)) == 4
    assert StandardLibrary(16, 32).tokens(tokenizer).fingerprint == prints[0]
    sheets = decoded(sources[-1].tokens(tokenizer), tokenizer)
    assert all("=" in sheet for sheet in sheets)
    with pytest.raises(UserError, match="train, validation, test"):
        StandardLibrary(1, 8, split="tests").tokens(tokenizer)
    with pytest.raises(UserError, match="prose, code, arithmetic, recall"):
        StandardLibrary(1, 8, domains=("music",)).tokens(tokenizer)
    with pytest.raises(UserError, match="10000000 samples were asked for"):
        StandardLibrary(10_000_000, 8).tokens(
            lambda group, **_: {"input_ids": [(1, 2)] * len(group)}
        )


# --------------------------------------------------------------------------- prompts with answers

QUESTIONS = [
    {"question": f"{number}+{number}=", "reply": f"{2 * number}", "label": number % 2, "none": None}
    for number in range(6)
]
TEMPLATES = dict(num_samples=6, prompt="{question}", answer="{reply}")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def answers(tokens: Tokens, tokenizer: Any) -> list[str]:
    """What a model learns of each sample: the text of its labels."""
    found = []
    for row in range(len(tokens.samples)):
        labels = tokens.take([row]).labelled()["labels"][0]
        found.append(tokenizer.decode(labels[labels != IGNORED].tolist()))
    return found


def test_only_answers_are_learned(questions: Path, tokenizer: Any) -> None:
    tokens = files(questions, **TEMPLATES).tokens(tokenizer)
    whole = [row["question"] + row["reply"] for row in QUESTIONS]
    assert decoded(tokens, tokenizer) == whole
    assert answers(tokens, tokenizer) == [row["reply"] for row in QUESTIONS]
    assert tokens.num_targets == sum(len(row["reply"]) for row in QUESTIONS)
    everything = files(questions, loss_on="all", **TEMPLATES).tokens(tokenizer)
    assert everything.prompts == () and answers(everything, tokenizer) == whole
    plain = files(questions, num_samples=6, template="{question}{reply}").tokens(tokenizer)
    assert plain.fingerprint == everything.fingerprint != tokens.fingerprint


def test_labels_leave_out_padding_and_prompts() -> None:
    """Also padding whose id is one of the text's, as where the end stands for it."""
    tokens = Tokens(((5, 6, 7, 9), (5, 9)), pad_id=9, prompts=(2, 1))
    batch = tokens.labelled()
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [5, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, no, 7, 9], [no, 9, no, no]]
    assert Tokens(tokens.samples, 9).labelled()["labels"].tolist()[1] == [5, 9, no, no]


def test_prompts_stay_with_their_samples(questions: Path, tokenizer: Any) -> None:
    tokens = files(questions, **TEMPLATES).tokens(tokenizer)
    of = dict(zip(tokens.samples, tokens.prompts, strict=True))
    for other in (tokens.shuffled(3), tokens.by_length(), tokens.take([4, 1])):
        assert [of[sample] for sample in other.samples] == list(other.prompts)
    assert tokens.shuffled(3).samples == Tokens(tokens.samples, 0).shuffled(3).samples
    moved = Tokens(tokens.samples, tokens.pad_id, (1,) * 6)
    assert moved.fingerprint != tokens.fingerprint


def test_answers_that_rows_only_number(questions: Path, tokenizer: Any) -> None:
    named = {"0": " even {question}", "1": " odd"}
    source = files(questions, **(TEMPLATES | dict(answer="{label}", answers=named)))
    found = answers(source.tokens(tokenizer), tokenizer)
    assert found[:3] == [" even 0+0=", " odd", " even 2+2="]
    with pytest.raises(UserError, match="answer is '1'; answers= knows 0"):
        files(questions, **(TEMPLATES | dict(answer="{label}", answers={"0": "a"}))).tokens(
            tokenizer
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(answer="{answer}"), r"\['label', 'none', 'question', 'reply'\].*'\{answer\}'"),
        (dict(answer="{none}"), "do not fill the template '{none}'.*null"),
        (dict(answer=" "), "a row without an answer"),
        (dict(answer=None), "answer=None belong together"),
        (dict(prompt=None), "prompt=None.*belong together"),
        (dict(loss_on="prompt"), "loss_on=prompt: there are answer, all"),
        (dict(pack=True), "pack=true would cut prompts from their answers"),
        (dict(max_length=4), r"has 4 tokens, so that max_length=4 leaves nothing.*max_length=5"),
    ],
)
def test_pairs_that_cannot_be_learned(
    options: dict[str, Any], message: str, questions: Path, tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=message):
        files(questions, **(TEMPLATES | options)).tokens(tokenizer)


def test_long_prompts_can_be_left_out(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"question": "x" * length, "reply": "yes"} for length in (3, 9, 4, 12, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(max_length=6, prompt="{question}", answer="{reply}", skip_long=True)
    with caplog.at_level("INFO"):
        tokens = files(path, num_samples=3, **options).tokens(tokenizer)
    assert answers(tokens, tokenizer) == ["yes", "ye", "y"], "cut to max_length, something is left"
    with pytest.raises(UserError, match="holds only 3"):
        files(path, num_samples=4, **options).tokens(tokenizer)
    assert "2 prompts were too long and left out" in caplog.text


class Merging:
    """A tokenizer that joins a prompt's last letter with an answer's first, and ends each text."""

    pad_token_id = 0

    def __call__(self, texts: Any, truncation: bool = False, max_length: int = 99) -> Any:
        if isinstance(texts, str):
            return {"input_ids": self([texts])["input_ids"][0]}
        return {"input_ids": [[ord(c) for c in t.replace("ab", "X")] + [1] for t in texts]}


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    class One(Texts):
        def documents(self) -> Any:
            yield Pair("cca", "bd")

    tokens = One(1, 9).tokens(Merging())
    assert tokens.samples == ((ord("c"), ord("c"), ord("X"), ord("d"), 1),)
    assert tokens.prompts == (2,)


def test_a_mixture_of_pairs_and_text(questions: Path, lines: Path, tokenizer: Any) -> None:
    parts = {
        "pairs": {"weight": 1, "source": files(questions, **TEMPLATES)},
        "text": {"weight": 1, "source": files(lines)},
    }
    mixture = Mixture(num_samples=8, max_length=64, parts=parts)
    tokens = mixture.tokens(tokenizer)
    learned = answers(tokens, tokenizer)
    for whole, answer, prompt in zip(
        decoded(tokens, tokenizer), learned, tokens.prompts, strict=True
    ):
        assert answer == (whole if whole.startswith("document") else whole.partition("=")[2])
        assert (prompt > 0) == ("=" in whole)
    assert mixture.sources() == (str(questions), str(lines))


def test_the_standard_questions(tokenizer: Any) -> None:
    """Of their own split only, in the form of the sheets, half sums and half partners."""
    for split in ("train", "validation"):
        tokens = StandardQuestions(64, 99, split=split).tokens(tokenizer)
        problems = {f"{a}{sign}{b}": str(c) for a, sign, b, c in standard_library.problems(split)}
        found = [0, 0]
        for whole, answer in zip(
            decoded(tokens, tokenizer), answers(tokens, tokenizer), strict=True
        ):
            last = whole.split("\n")[-1]
            if "=" in last:
                assert problems[last.partition("=")[0]] == answer
                found[0] += 1
            else:
                key = last.removeprefix("?").partition(" ")[0]
                listed = dict(line.split(" ") for line in whole.split("\n")[:-1])
                assert answer == f" {standard_library.partner(listed[key])}"
                found[1] += 1
        assert found == [32, 32]
    sums = StandardQuestions(8, 99, domains=("arithmetic",)).tokens(tokenizer)
    assert all("=" in whole for whole in decoded(sums, tokenizer))
    with pytest.raises(UserError, match="no questions in 'prose'; there are arithmetic, recall"):
        StandardQuestions(8, 99, domains=("prose",)).tokens(tokenizer)


# One row of each dataset that the supervised mixture reads, with its columns, and what is learned.
CHOICES = {"label": ["A", "B", "C", "D"], "text": ["w", "x", "y", "z"]}
ROWS_OF = {
    "boolq": ({"question": "is it", "passage": "It is.", "answer": True}, " yes"),
    "piqa": ({"goal": "g", "sol1": "first", "sol2": "second", "label": 1}, " second"),
    "hellaswag": (
        {"activity_label": "a", "ctx": "c", "endings": ["e", "f", "g", "h"], "label": "2"},
        " g",
    ),
    "winogrande": (
        {"sentence": "the _ is", "option1": "cat", "option2": "dog", "answer": "1"},
        " cat",
    ),
    "openbookqa": ({"question_stem": "q", "choices": CHOICES, "answerKey": "D"}, " z"),
    "arc_easy": ({"question": "q", "choices": CHOICES, "answerKey": "3"}, " y"),
    "arc_challenge": ({"question": "q", "choices": CHOICES, "answerKey": "A"}, " w"),
    "mmlu": ({"train": {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 3}}, " D"),
}


def test_the_supervised_mixture_reads_training_splits_alone(composed: Any) -> None:
    """Every part's templates fit its dataset's columns; validation never meets training."""
    from hydra.utils import instantiate

    config = composed("finetune=cd_moe").finetune.phases.sft
    data, validation = (
        instantiate(config[name], _convert_="object") for name in ("data", "validation")
    )
    assert data.parts.keys() == validation.parts.keys() == ROWS_OF.keys()
    for name, (row, answer) in ROWS_OF.items():
        source, held_out = (mixture.parts[name]["source"] for mixture in (data, validation))
        assert (source.split, held_out.split) == ("train[:-100]", "train[-100:]")
        pair = source._pair(source.path, row)
        assert pair.answer == answer and pair.prompt and not pair.prompt.endswith(" ")
        assert held_out._pair(source.path, row) == pair
    assert all("train" in name for name in data.sources())


def test_a_hub_dataset_of_pairs_in_parts(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "piqa"
    folder.mkdir()
    rows = [{"goal": f"g{number}", "label": number % 2} for number in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    options = dict(path=str(folder), prompt="{goal}", answer="{label}")
    source = HubDataset(7, 64, split="train[:-3]", **options)
    assert decoded(source.tokens(tokenizer), tokenizer) == [f"g{n}{n % 2}" for n in range(7)]
    assert source.sources() == (f"{folder} (train[:-3])",)
    rest = HubDataset(3, 64, split="train[-3:]", **options)
    assert decoded(rest.tokens(tokenizer), tokenizer) == ["g71", "g80", "g91"]


# --------------------------------------------------------------------------- groups


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": row, "subject": "abc"[n % 3], "year": n // 6} for n, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_field_gives_each_sample_its_group(labelled: Path, tokenizer: Any) -> None:
    plain = files(labelled).tokens(tokenizer)
    tokens = files(labelled, group_by="subject").tokens(tokenizer)
    assert tokens.samples == plain.samples and plain.groups == ()
    assert tokens.groups == tuple("abc" * 4)
    assert files(labelled, group_by="year").tokens(tokenizer).groups == ("0",) * 6 + ("1",) * 6
    assert files(labelled, group_by="subject", num_samples=5).tokens(tokenizer).groups == tuple(
        "abcab"
    )
    parts = tokens.by_group()
    assert list(parts) == ["a", "b", "c"] and parts["b"].samples == plain.samples[1::3]
    assert plain.by_group() == {"": plain}


def test_groups_follow_their_samples(labelled: Path, tokenizer: Any) -> None:
    tokens = files(labelled, group_by="subject").tokens(tokenizer)
    pairs = sorted(zip(tokens.samples, tokens.groups, strict=True))
    for moved in (tokens.shuffled(3), tokens.by_length()):
        assert sorted(zip(moved.samples, moved.groups, strict=True)) == pairs
    assert tokens.shuffled(3).groups != tokens.groups
    assert tokens.take([4, 0]).groups == ("b", "a")


def test_one_group_is_an_ordinary_calibration_set(labelled: Path, tokenizer: Any) -> None:
    one = files(labelled, group_by="subject", group="b", num_samples=4).tokens(tokenizer)
    assert decoded(one, tokenizer) == ROWS[1::3] and one.groups == ()
    plain = files(labelled).tokens(tokenizer).take(range(1, 12, 3))
    assert one.fingerprint == plain.fingerprint
    with pytest.raises(UserError, match=r"5 samples were asked for.*only 4"):
        files(labelled, group_by="subject", group="b", num_samples=5).tokens(tokenizer)


def test_fingerprints_know_the_groups(labelled: Path, tokenizer: Any) -> None:
    plain = files(labelled).tokens(tokenizer).fingerprint
    by = [
        files(labelled, group_by=name).tokens(tokenizer).fingerprint for name in ("subject", "year")
    ]
    assert len({plain, *by}) == 3


def test_groups_that_are_not_there_are_refused(labelled: Path, tokenizer: Any) -> None:
    for options, message in (
        ({"group_by": "topic"}, r"group_by=topic: .*\['subject', 'text', 'year'\]"),
        ({"group_by": "subject", "group": "d"}, r"group=d: .* by subject there are a, b, c"),
        ({"group": "a"}, r"group=a needs the field.*group_by"),
        ({"group_by": "subject", "pack": True}, r"group_by=subject with pack=true"),
    ):
        with pytest.raises(UserError, match=message):
            files(labelled, **options).tokens(tokenizer)
    with pytest.raises(UserError, match=r"group_by=topic: .*one field .*, domain"):
        StandardLibrary(4, 16, group_by="topic").tokens(tokenizer)
    with pytest.raises(UserError, match=r"group=music: by domain there are prose, code"):
        StandardLibrary(4, 16, group_by="domain", group="music").tokens(tokenizer)
    with pytest.raises(UserError, match=r"group=code: by domain there are arithmetic, recall"):
        StandardQuestions(4, 16, group_by="domain", group="code").tokens(tokenizer)
    with pytest.raises(UserError, match="has no fields"):
        Endless(2, 8, group_by="domain").tokens(tokenizer)


@pytest.mark.parametrize("kind", [StandardLibrary, StandardQuestions])
def test_the_embedded_text_is_grouped_by_domain(kind: Any, tokenizer: Any) -> None:
    domains = (
        standard_library.DOMAINS if kind is StandardLibrary else standard_library.QUESTION_DOMAINS
    )
    plain = kind(24, 512).tokens(tokenizer)
    tokens = kind(24, 512, group_by="domain").tokens(tokenizer)
    assert tokens.samples == plain.samples
    assert set(tokens.groups) == set(domains)
    one = kind(24, 512, group_by="domain", group="arithmetic").tokens(tokenizer)
    assert len(one.samples) == 24 and one.groups == ()
    assert all("=" in sample for sample in decoded(one, tokenizer))
    assert one.samples == kind(24, 512, domains=("arithmetic",)).tokens(tokenizer).samples


def test_a_mixture_is_grouped_by_part(tokenizer: Any) -> None:
    parts = {
        name: {"weight": 1, "source": Endless(1, number)}
        for number, name in enumerate("ab", start=1)
    }
    tokens = Mixture(8, 64, parts=parts, group_by="part").tokens(tokenizer)
    assert tokens.samples == Mixture(8, 64, parts=parts).tokens(tokenizer).samples
    numbers = {"a": "1", "b": "2"}
    assert [words[-1] for words in decoded(tokens, tokenizer)] == [
        numbers[g] for g in tokens.groups
    ]
    assert sorted(set(tokens.groups)) == ["a", "b"]
    one = Mixture(8, 64, parts=parts, group_by="part", group="b").tokens(tokenizer)
    assert {words[-1] for words in decoded(one, tokenizer)} == {"2"} and len(one.samples) == 8
    for options, message in (
        ({"group_by": "domain"}, "one field to group by, part"),
        ({"group_by": "part", "group": "c"}, "group=c: by part there are a, b"),
    ):
        with pytest.raises(UserError, match=message):
            Mixture(8, 64, parts=parts, **options).tokens(tokenizer)
