"""What a run was asked for, in the numbers that its cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.forecast.shape import ModelShape


@dataclass(frozen=True)
class Text:
    """The tokens of each sample, and how many samples, and tokens, are in a forward at most."""

    lengths: tuple[int, ...]
    batch_size: int
    batch_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return sum(self.lengths)

    @property
    def num_batches(self) -> int:
        """Forwards."""
        by_tokens = -(-self.num_tokens // self.batch_tokens) if self.batch_tokens else 0
        return max(by_tokens, -(-len(self.lengths) // self.batch_size))

    @property
    def rows(self) -> int:
        """Samples in the largest forward."""
        most = self.batch_size
        if self.batch_tokens and self.longest:
            most = max(1, min(most, self.batch_tokens // self.longest))
        return min(most, len(self.lengths))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths, default=0)

    @property
    def at_once(self) -> int:
        """Tokens in the largest forward, padding among them."""
        return self.rows * self.longest


@dataclass(frozen=True)
class Weights:
    """A model: its shape, the bytes of a parameter in memory, and those of its files.

    converted: whether it is computed in another dtype than the files', so that each tensor is
    copied as it is read. Else tensors that are in the model what they are in a file stay there: the
    process has them mapped, and the system may take their memory and read them again. shared: bytes
    of the files that are links to others, and take no room.
    """

    shape: ModelShape
    itemsize: int
    file_bytes: int
    converted: bool = True
    shared: int = 0

    @property
    def bytes(self) -> int:
        """All of it in memory."""
        return self.shape.parameters * self.itemsize

    @property
    def expert_bytes(self) -> int:
        """Its routed experts, each of whose tensors is made of several in the files."""
        return sum(one.expert_parameters for one in self.shape.decoders) * self.itemsize

    @property
    def mapped_bytes(self) -> int:
        """What stays in files where all of it is loaded."""
        return 0 if self.converted else self.bytes - self.expert_bytes

    @property
    def outside_bytes(self) -> int:
        """What is in no decoder layer."""
        return self.shape.outside * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """The largest decoder layer."""
        return self.shape.largest * self.itemsize


@dataclass(frozen=True)
class ProfilingWork:
    """A profile; layerwise: one decoder layer in memory at a time; ahead: and the next one."""

    text: Text
    layerwise: bool
    cache_bytes: int
    only_routers: bool = False
    neurons: bool = False
    ahead: bool = True


@dataclass(frozen=True)
class Search:
    """What a plan asks of the model beside its statistics.

    passes: of the calibration set through all decoder layers, as many as are known before;
    candidates: sets of experts of a layer that are compared, over all layers. known: whether that
    is all. all_experts: whether every expert computes every token.
    """

    passes: float = 0.0
    candidates: int = 0
    known: bool = True
    all_experts: bool = False


@dataclass(frozen=True)
class TuningWork:
    """A fine-tuning.

    steps: updates; text: of one step's forward; validation: of all forwards that only look.
    trainable: parameters that train; first: the first decoder layer with some; itemsize: bytes of
    a parameter that does not train; narrow_bytes: how many fewer the frozen experts take, which
    stay as they are stored; converted: whether that is another dtype than the files';
    layerwise: whether its teacher is read one decoder layer at a time.
    """

    steps: int
    accumulation: int
    text: Text
    validation: Text | None
    trainable: int
    first: int
    itemsize: int
    narrow_bytes: int = 0
    converted: bool = True
    checkpointing: bool = False
    teacher_bytes: int = 0
    layerwise: bool = False


@dataclass(frozen=True)
class EvaluatingWork:
    """An evaluation: held-out text, and the sequences of all tasks; None where there are none."""

    held_out: Text | None
    tasks: Text | None
    variants: int = 1


@dataclass(frozen=True)
class MeasuringWork:
    """What `measure` runs: prompts at once and their length, steps of decoding, rounds."""

    batch_size: int
    prompt_length: int
    decode_tokens: int
    repeats: int


@dataclass(frozen=True)
class TracingWork:
    """What `trace` runs: prompts, and the tokens that are generated behind each."""

    prompts: Text
    new_tokens: int


@dataclass(frozen=True)
class QuantizingWork:
    """Matrices that are packed: their bytes before and after.

    text: what a quantizer looks at, None where it needs none.
    """

    before: float
    after: float
    text: Text | None = None


@dataclass(frozen=True)
class Work:
    """A run.

    dense: the model; edited: what the plan leaves of it, None where nothing is edited; converts:
    whether it is converted first. What is None was not asked for.
    """

    dense: Weights
    edited: Weights | None
    profiling: ProfilingWork
    search: Search
    converts: bool = False
    diagnosed: Text | None = None
    tuning: TuningWork | None = None
    quantizing: QuantizingWork | None = None
    evaluating: EvaluatingWork | None = None
    measuring: MeasuringWork | None = None
    tracing: TracingWork | None = None

    @property
    def variants(self) -> dict[str, Weights]:
        """The checkpoints that there will be, by name."""
        behind = self.edited or self.dense
        found = {"dense": self.dense} | ({"compressed": self.edited} if self.edited else {})
        made = {"finetuned": self.tuning, "quantized": self.quantizing}
        return found | {name: behind for name, asked in made.items() if asked}
