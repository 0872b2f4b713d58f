"""The intact model's next-token distributions over a text: a teacher that is read from disk.

It is computed once, and is not in memory while its students train. Of each distribution the
`top_k` likeliest tokens are kept, and the rest as one more class, "the others together": the
divergence from it is a proper one between two coarsened distributions, at most the exact one, and
0 for a student that agrees in all that was kept.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lab import processes
from moe_lab.compute import Compute
from moe_lab.data.tokens import IGNORED, Tokens, chunks
from moe_lab.integrity import PARTIAL, write_whole
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.layers import num_parameters
from moe_lab.models.layerwise import LayerwiseModel, computing_dtype
from moe_lab.models.predictions import divergence_terms, exact, log_probabilities
from moe_lab.models.stream import LayerStream
from moe_lab.progress import progress
from moe_lab.types import NotFinite

SHARD_BYTES = 2**28  # a file is closed once it has as many
CHUNK_VALUES = 2**24  # logits that are worked on at a time
ROWS = "first_rows.json"
IDS, LOG_PROBABILITIES = "teacher_ids", "teacher_log_probabilities"


def coarsened(logits_NV: Tensor, ids_NK: Tensor | None, temperature: float) -> Tensor:
    """log softmax(logits / T): of the tokens `ids_NK`, and of all others together [N, K + 1].

    Where ids_NK is None, of every token [N, V].
    """
    scaled_NV = logits_NV / temperature
    if ids_NK is None:
        return log_probabilities(scaled_NV)
    others_NV = scaled_NV.scatter(1, ids_NK, float("-inf"))
    parts = scaled_NV.gather(1, ids_NK), others_NV.logsumexp(dim=-1, keepdim=True)
    return torch.cat(parts, dim=1) - scaled_NV.logsumexp(dim=-1, keepdim=True)


def divergence(teacher: dict[str, Tensor], logits_NV: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) [N] in nats, of what `Teacher.of` gave and a student's logits.

    Both at the temperature T at which the teacher was written. T^2 keeps the gradient's size where
    T grows (Hinton et al., 1503.02531).
    """
    log_p = teacher[LOG_PROBABILITIES]
    ids_NK = teacher[IDS].long() if IDS in teacher else None
    log_q = coarsened(logits_NV, ids_NK, temperature)
    return temperature**2 * divergence_terms(log_p, log_q).sum(dim=-1)


def distinct_samples(texts: Iterable[Tokens]) -> Tokens:
    """Every sample of some texts once for each prompt of it, in one order whatever theirs is."""
    texts = list(texts)
    pairs = {pair for text in texts for pair in _pairs(text)}
    samples, prompts = zip(*sorted(pairs, key=lambda pair: (len(pair[0]), pair)), strict=True)
    return Tokens(samples, texts[0].pad_id, prompts)


def _pairs(text: Tokens) -> Iterator[tuple[tuple[int, ...], int]]:
    """Each sample, and how many of its tokens are no target: its first one never is."""
    prompts = text.prompts or [1] * len(text.samples)
    return zip(text.samples, (max(1, prompt) for prompt in prompts), strict=True)


def teacher_bytes(texts: Iterable[Tokens], vocabulary: int, top_k: int | None) -> int:
    """Bytes on disk of a teacher over these texts."""
    kept = _kept(top_k, vocabulary)
    row = 4 * vocabulary if kept is None else 8 * kept + 4
    return distinct_samples(texts).num_targets * row


def _kept(top_k: int | None, vocabulary: int) -> int | None:
    """How many tokens of each distribution are kept; None for all."""
    return None if top_k is None or top_k >= vocabulary else top_k


def write_teacher(
    checkpoint: Checkpoint,
    texts: Sequence[Tokens],
    top_k: int | None,
    temperature: float,
    compute: Compute,
    folder: Path,
) -> None:
    """Put a model's distributions over the targets of all texts into a folder.

    Several processes read a part of the samples each. Row after row in the order of
    `distinct_samples`, in files <number>.safetensors of about SHARD_BYTES:
    the ids [N, K] int32 of the likeliest tokens, and in float32 what `coarsened` gives for them;
    with top_k=None, or as many as there are, log-probabilities [N, V] alone. At temperature T they
    are those of softmax(logits / T), the others' included: from sparse ones of another temperature
    that could not be known.
    """
    text = distinct_samples(texts)
    numbers = _consecutive(range(len(text.samples)))
    parts = [text.take(part) for part in chunks(numbers, compute.batch_size)]
    held: list[dict[str, Tensor]] = []
    counts: list[int] = []  # the rows of each file
    size = 0

    def close() -> None:
        whole = {name: torch.cat([part[name] for part in held]) for name in held[0]}
        save_file(whole, folder / _of_process(processes.index(), len(counts)))
        counts.append(len(whole[LOG_PROBABILITIES]))

    def named(sample: tuple[int, ...]) -> str:
        numbers = (one.samples.index(sample) for one in texts if sample in one.samples)
        return f"document {next(numbers)} of the tuning text"

    with torch.no_grad():
        for rows in _distributions(checkpoint, parts, top_k, temperature, compute, folder, named):
            held.append(rows)
            size += sum(tensor.numel() * tensor.element_size() for tensor in rows.values())
            if size >= SHARD_BYTES:
                close()
                held, size = [], 0
    if held:
        close()
    every = processes.gather(counts)
    if processes.is_main():
        _put_together(every, folder)


def _consecutive(samples: range) -> range:
    """The part of the samples that this process reads: the parts follow each other."""
    number, index = processes.number(), processes.index()
    return samples[len(samples) * index // number : len(samples) * (index + 1) // number]


def _of_process(index: int, file: int) -> str:
    return f"of_{index}_{file}.safetensors{PARTIAL}"


def _put_together(counts: Sequence[Sequence[int]], folder: Path) -> None:
    """Name the files of all processes, which have so many rows, as those of one."""
    first_rows = [0]
    for index, rows in enumerate(counts):
        for file, count in enumerate(rows):
            place = folder / f"{len(first_rows) - 1}.safetensors"
            (folder / _of_process(index, file)).replace(place)
            first_rows.append(first_rows[-1] + count)
    write_whole(folder / ROWS, json.dumps(first_rows) + "\n")


def _distributions(
    checkpoint: Checkpoint,
    parts: Sequence[Tokens],
    top_k: int | None,
    temperature: float,
    compute: Compute,
    folder: Path,
    named: Callable[[tuple[int, ...]], str],
) -> Iterator[dict[str, Tensor]]:
    """What goes to disk, for a few rows at a time."""
    batches = [
        {key: value.to(compute.device) for key, value in part.pad(part.samples).items()}
        for part in parts
    ]
    all_logits = _logits(checkpoint, batches, compute, folder)
    for part, logits_BLV in zip(parts, all_logits, strict=True):
        targets = part.labelled()["labels"][:, 1:] != IGNORED
        for sample, logits_LV, is_target in zip(
            part.samples, logits_BLV[:, :-1], targets, strict=True
        ):
            vocabulary = logits_LV.shape[1]
            chosen = logits_LV[is_target.to(logits_LV.device)]
            for rows in chosen.split(max(1, CHUNK_VALUES // vocabulary)):
                logits, kept = exact(rows), _kept(top_k, vocabulary)
                ids = None if kept is None else logits.topk(kept, dim=-1).indices
                row = {LOG_PROBABILITIES: coarsened(logits, ids, temperature).float().cpu()}
                if bool(row[LOG_PROBABILITIES].sum().isnan()):  # -inf is a class that cannot be
                    raise NotFinite(f"the intact model's logits are not finite at {named(sample)}")
                yield row if ids is None else row | {IDS: ids.int().cpu()}


def _logits(
    checkpoint: Checkpoint, batches: list[dict[str, Tensor]], compute: Compute, folder: Path
) -> Iterator[Tensor]:
    """The logits [B, L, V] of each batch; layer by layer where the model is too large for more."""
    size = num_parameters(meta_model(checkpoint.config)) * computing_dtype(checkpoint).itemsize
    if not compute.goes_layerwise(size):
        model = checkpoint.load(compute.device)
        for batch in progress(batches, "teacher"):
            yield model(**batch, use_cache=False).logits
        return
    cache = Activations(int(compute.cache_gib * 2**30), folder, compute.device)
    stream = LayerStream(LayerwiseModel(checkpoint, compute.device), batches, cache)
    cache.announce({"hidden states": stream.state_bytes()})
    for index in progress(range(len(stream.layers)), "teacher, layer by layer"):
        with stream.layer(index):
            for number in range(len(batches)):
                hidden = stream.replay(index, number, cache["input", number])
                cache["input", number] = hidden
    for number in range(len(batches)):
        yield stream.logits(number, cache["input", number])


class Teacher:
    """Reads what `write` wrote for the same texts.

    A sample's rows are found by its tokens and prompt: the same in every order, batch and process,
    and shared by samples that are there twice.
    """

    def __init__(self, folder: Path, texts: Iterable[Tokens]):
        self.folder = folder
        self.first_rows: list[int] = json.loads((folder / ROWS).read_text())
        pairs = list(_pairs(distinct_samples(texts)))
        ends = list(accumulate(max(0, len(sample) - prompt) for sample, prompt in pairs))
        self.rows = dict(zip(pairs, zip([0, *ends], ends, strict=False), strict=True))
        self._shards: dict[int, safe_open] = {}

    def of(self, tokens: Tokens) -> dict[str, Tensor]:
        """The teacher's rows for the targets of some samples, one sample after the other.

        teacher_log_probabilities [N, K + 1] and teacher_ids [N, K], or the former [N, V] alone:
        the rows in the order of a batch's targets (`Tokens.labelled`).
        """
        by_name: dict[str, list[Tensor]] = {}
        for pair in _pairs(tokens):
            for name, part in self._read(*self.rows[pair]):
                by_name.setdefault(name, []).append(part)
        return {name: torch.cat(parts) for name, parts in by_name.items()}

    def _read(self, first: int, last: int) -> Iterator[tuple[str, Tensor]]:
        """The rows from `first` up to `last`, which may lie in several files; none as no row."""
        while True:
            shard = bisect_right(self.first_rows[:-1], first) - 1
            start, end = self.first_rows[shard], self.first_rows[shard + 1]
            handle = self._opened(shard)
            for name in list(handle.keys()):  # the handle itself cannot be iterated
                yield name, handle.get_slice(name)[first - start : min(last, end) - start]
            if last <= end:
                return
            first = end

    def _opened(self, shard: int) -> safe_open:
        if shard not in self._shards:
            path = self.folder / f"{shard}.safetensors"
            self._shards[shard] = safe_open(path, "pt").__enter__()
        return self._shards[shard]
