"""The figures of a report: one table of them, and what follows from it.

An entry of FIGURES is all that a figure costs beside the code that computes it: how it is written
and which way is better follow from it, titles, rows, columns and axes in tables, pictures and page,
and its line in docs/reference.md (`python docs/figures.py` writes it there).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moe_lab.report.units import (
    AS_MEASURED,
    BYTES,
    COUNT,
    IN_WORDS,
    NATS,
    NATS_PER_TOKEN,
    NUMBER,
    OPERATIONS,
    PART,
    PATH,
    SECONDS,
    SECONDS_OF_STAGE,
    SHARE,
    SHARE_OF_DENSE,
    SMALL_NUMBER,
    TIMES_DENSE,
    TRUTH,
    Unit,
    percent,
)

VARIANTS = ("dense", "compressed", "finetuned")
EDITED = VARIANTS[1:]
COMPRESSED = VARIANTS[1:2]
MISSING = "–"
MORE, LESS = 1, -1  # which way a figure is better
QUALITY, COST, EXPERTS = "Quality", "Cost", "What the experts do"  # headings of docs/reference.md


@dataclass(frozen=True)
class Figure:
    """A figure of a report, or all whose keys fit its pattern.

    key: in report.json; `<...>` stands for what differs. title: without its unit; by default the
    parts of the key. better: MORE, LESS, or 0 where nobody can say.

    Where it is shown: row: in the table of a run and of its model card (of a task's metric: it may
    stand for the task there). columns: the variants that a sweep's table shows it of by default.
    axis: quality is drawn against it where it is of section COST, and it is that quality where it
    is of QUALITY; 0: neither. Of costs the lowest number is proposed first; of qualities all those
    of the lowest number that were measured are drawn, and the page names those of the very lowest.
    picture: a cost that is drawn in a sweep's pictures too, not on its page alone.

    section, about, when: its heading, what it is and when it is there, for docs/reference.md.
    """

    key: str
    title: str = ""
    unit: Unit = NUMBER
    better: int = 0
    row: bool = False
    columns: tuple[str, ...] = ()
    axis: int = 0
    picture: bool = False
    section: str = ""
    about: str = ""
    when: str = ""

    @property
    def name(self) -> str:
        """Its key without the variant: "eval/average"."""
        head, _, rest = self.key.partition("/")
        return rest if head in ("<variant>", *VARIANTS) else self.key


# One entry a figure, in the order in which tables and pages show them.
FIGURES = (
    Figure("<variant>/eval/<task>/acc_norm", unit=SHARE, better=MORE, row=True),
    Figure("<variant>/eval/<task>/acc", unit=SHARE, better=MORE, row=True),
    Figure("<variant>/eval/<task>/exact_match", unit=SHARE, better=MORE, row=True),
    Figure("<variant>/eval/<task>/f1", unit=SHARE, better=MORE, row=True),
    Figure("<variant>/eval/<task>/bits_per_byte", better=LESS, row=True),
    Figure("<variant>/eval/<task>/byte_perplexity", better=LESS, row=True),
    Figure("<variant>/eval/<task>/<text>_perplexity", better=LESS),
    Figure("<variant>/eval/<task>/perplexity", better=LESS),
    Figure("<variant>/eval/<task>/<metric>", unit=AS_MEASURED, section=QUALITY, when="tasks",
           about="lm-eval's metric of a task; accuracies (`acc`, `acc_norm`, `exact_match`, `f1`) "
           "as shares"),
    Figure("<variant>/eval/average", "average accuracy", SHARE, MORE,
           row=True, columns=VARIANTS, axis=1, section=QUALITY, when="a task with accuracy",
           about="mean over the tasks of each one's accuracy: `acc`, or what `eval.metrics` says"),
    Figure("<variant>/kl", "KL to dense", NATS_PER_TOKEN, LESS,
           row=True, columns=EDITED, axis=1, section=QUALITY, when="held-out text",
           about="KL(dense ‖ variant) of the next-token distributions, mean over positions of the "
           "held-out text; 0 for dense"),
    Figure("<variant>/eval/held_out/perplexity", "perplexity of held-out text", NUMBER, LESS,
           axis=2, section=QUALITY, when="held-out text", about="of the held-out text"),
    Figure("<variant>/eval/routing/top_k", "experts per token", SMALL_NUMBER, row=True,
           section=QUALITY, when="held-out text, MoE layers", about="experts that a token gets"),
    Figure("<variant>/eval/routing/entropy", "router entropy", NATS, row=True,
           section=QUALITY, when="held-out text, MoE layers, a known scoring, no twins",
           about="of the router's full distribution, mean over MoE layers and tokens"),
    Figure("<variant>/eval/routing/weight_<rank>", unit=PART,
           section=QUALITY, when="held-out text, MoE layers",
           about="share of a token's routed weight that its heaviest, second, … expert has"),
    Figure("<variant>/eval/routing/stand_ins",
           section=QUALITY, when="held-out text, MoE layers, `method.replacement`",
           about="how many of a token's experts only stand in for removed ones"),
    Figure("<variant>/eval/routing/active_parameters", "active parameters, as routed", COUNT, LESS,
           section=QUALITY, when="held-out text, MoE layers",
           about="that a token uses on average as it is routed there: experts that a rule leaves "
           "out, and stand-ins, are none"),
    Figure("<variant>/eval/routing/expert_flops", "FLOPs of routed experts per token", OPERATIONS,
           LESS, section=QUALITY, when="held-out text, MoE layers",
           about="of their matrix products as routed there; a multiply-add is two"),
    Figure("<variant>/eval/routing/distinct_experts_<batch>", unit=SMALL_NUMBER, better=LESS,
           section=QUALITY, when="held-out text, MoE layers",
           about="how many different experts of a layer 1, 8, 16 or 32 tokens need together, mean "
           "over all such batches of the held-out tokens and over MoE layers: what a memory-bound "
           "decoding step of so many sequences reads"),
    Figure("compressed/eval/groups", section=QUALITY, when="`calibration.group_by`",
           about="how many groups were evaluated, each with its own experts"),
    Figure("<variant>/parameters", "parameters", COUNT, LESS,
           row=True, axis=6, section=COST, when="measured, or groups",
           about="of the whole model, tied ones once; of groups the mean"),
    Figure("<variant>/active_parameters", "active parameters", COUNT, LESS,
           row=True, axis=5, section=COST, when="measured",
           about="that one token uses: all but the routed experts, and K of those"),
    Figure("<variant>/parameter_ratio", "parameters left", SHARE_OF_DENSE, LESS,
           columns=COMPRESSED, axis=1, picture=True, section=COST, when="measured, or groups",
           about="of dense"),
    Figure("<variant>/flops_per_token", "FLOPs per token", OPERATIONS, LESS,
           row=True, axis=4, picture=True, section=COST, when="measured",
           about="of a forward over `measure.prompt_length` tokens; a multiply-add is two"),
    Figure("<variant>/bytes", "size on disk", BYTES, LESS,
           row=True, axis=3, picture=True, section=COST, when="measured",
           about="its safetensors files"),
    Figure("<variant>/bytes_ratio", "size on disk, of dense", SHARE_OF_DENSE, LESS,
           section=COST, when="measured", about="of dense"),
    Figure("<variant>/peak_memory_bytes", unit=BYTES, better=LESS, section=COST, when="measured",
           about="most memory of live tensors in a prefill, weights among them"),
    Figure("<variant>/memory_ratio", "peak memory of a forward", SHARE_OF_DENSE, LESS,
           row=True, columns=COMPRESSED, axis=2, picture=True, section=COST, when="measured",
           about="of dense"),
    Figure("<variant>/prefill_seconds", unit=SECONDS, better=LESS, section=COST, when="measured",
           about="median over `measure.repeats` turns"),
    Figure("<variant>/prefill_speedup", "prefill speed", TIMES_DENSE, MORE,
           row=True, columns=COMPRESSED, axis=7, picture=True, section=COST, when="measured",
           about="dense ÷ variant"),
    Figure("<variant>/decode_seconds_per_token", unit=SECONDS, better=LESS, section=COST,
           when="measured", about="median, one step through the cache"),
    Figure("<variant>/decode_speedup", "decode speed", TIMES_DENSE, MORE,
           row=True, columns=COMPRESSED, axis=8, picture=True, section=COST, when="measured",
           about="dense ÷ variant"),
    Figure("<variant>/decoding_seconds_per_token", unit=SECONDS, better=LESS, section=COST,
           when="measured, `eval.decoding` is not greedy",
           about="median, as the tasks are decoded, behind 32 tokens, which count, too"),
    Figure("<variant>/decoding_slowdown", "decoding, times greedy's seconds", better=LESS,
           row=True, section=COST, when="measured, `eval.decoding` is not greedy",
           about="the same ÷ greedy's in the same turns"),
    Figure("<variant>/vllm/prefill_tokens_per_second", "vLLM prefill, tokens per second", COUNT,
           MORE, section=COST, when="`measure=vllm`",
           about="prompt tokens of all `measure.requests` together; median over all turns' rounds"),
    Figure("<variant>/vllm/prefill_speedup", "prefill speed in vLLM", TIMES_DENSE, MORE,
           row=True, columns=COMPRESSED, axis=9, picture=True, section=COST, when="`measure=vllm`",
           about="variant ÷ dense"),
    Figure("<variant>/vllm/decode_tokens_per_second", "vLLM decoding, tokens per second", COUNT,
           MORE, section=COST, when="`measure=vllm`",
           about="tokens of all `measure.requests` in a step, over the median step of all turns"),
    Figure("<variant>/vllm/decode_speedup", "decode speed in vLLM", TIMES_DENSE, MORE,
           row=True, columns=COMPRESSED, axis=10, picture=True, section=COST,
           when="`measure=vllm`", about="variant ÷ dense"),
    Figure("<variant>/vllm/spread", "slowest ÷ fastest turn in vLLM", better=LESS, section=COST,
           when="`measure=vllm`",
           about="median of the slowest turn ÷ that of the fastest, of prefill or decoding, "
                 "whichever is more: no smaller difference of two variants means anything"),
    Figure("<variant>/checkpoint", unit=PATH, section=COST, about="its folder",
           when="always; with `calibration.group_by` the dense one alone"),
    Figure("<variant>/stock", "loads in stock transformers", TRUTH, row=True, section=COST,
           when="always", about="whether stock transformers loads it"),
    Figure("<variant>/family", unit=IN_WORDS, section=COST, when="always",
           about="the model type of its config.json; of our own form that inside"),
    Figure("<variant>/form", unit=IN_WORDS, section=COST, when="always",
           about="native or own form, and what is unusual about it beside the dense model's "
           "([the words](serving.md#forms))"),
    Figure("<variant>/serving", unit=IN_WORDS, section=COST, when="always",
           about="what each engine made of checkpoints of this family and form "
           "([serving.md](serving.md)), or that none was run"),
    Figure("<variant>/repeated_parameters", section=COST, when="there are some",
           about="of copies of experts that fill layers up (`finetune.twins`)"),
    Figure("finetuned/trainable_parameters", section=COST, when="a recipe", about="that trained"),
    Figure("finetuned/trainable_share", unit=PART, section=COST, when="a recipe",
           about="of the dense model's"),
    Figure("finetune/used_expert_<rank>", unit=PART, section=COST, when="`finetune=seer`",
           about="share of all training tokens that had a first, second, … expert"),
    Figure("finetune/experts_alive", section=COST, when="`finetune=expert_dropping`",
           about="mean number of experts left in a layer"),
    Figure("diagnosis/dead_experts", section=EXPERTS, when="`diagnose=full`",
           about="experts that no token was sent to, in all layers"),
    Figure("diagnosis/super_experts", section=EXPERTS, when="`diagnose=full`",
           about="experts with extreme activations (2507.23279), in all layers"),
    Figure("diagnosis/usage_deviation", section=EXPERTS, when="`diagnose=full`",
           about="standard deviation of the usage, 1 being even"),
    Figure("diagnosis/gate_entropy", unit=NATS, section=EXPERTS,
           when="`diagnose=full`, a known scoring", about="of the router's full distribution"),
    Figure("diagnosis/gate_norm_correlation", section=EXPERTS, when="`diagnose=full`",
           about="Pearson's, of router weight and output norm"),
    Figure("diagnosis/weight_similarity", section=EXPERTS, when="`diagnose.weights`",
           about="mean cosine of two experts' weights"),
    Figure("diagnosis/output_similarity", section=EXPERTS, when="`diagnose.num_samples` above 0",
           about="mean cosine of two experts' outputs"),
    Figure("<variant>/trace/tokens", unit=COUNT, section=EXPERTS, when="`trace=full`",
           about="tokens of prompts and behind them whose routing the trace holds"),
    Figure("<variant>/trace/distinct_experts", "experts that a request needs", unit=PART,
           section=EXPERTS, when="`trace=full`",
           about="share of all experts of all layers that at least one token of a request was "
           "sent to, mean over requests"),
    Figure("<variant>/trace/ahead_<distance>_top_1", unit=PART, section=EXPERTS,
           when="`trace.lookahead`",
           about="how often the heaviest expert so many MoE layers ahead is the one that its "
           "router names first for this layer's input"),
    Figure("<variant>/trace/ahead_<distance>_top_k", unit=PART, section=EXPERTS,
           when="`trace.lookahead`", about="share of a token's experts so many MoE layers ahead "
           "that their router chooses of this layer's input, too"),
    Figure("<variant>/trace/file", unit=PATH, section=EXPERTS, when="`trace=full`",
           about="the trace, for `python -m moe_lab.offload`"),
    Figure("plan/ratio", "share removed", SHARE, section=COST,
           when="a ratio decides, and no size",
           about="of what `ratio` asks for: what the plan gives, in whole experts (`ratio.of`)"),
    Figure("plan/target_gib", "GiB of weights", SMALL_NUMBER, section=COST,
           when="`ratio.target_gib`", about="GiB that the weights take by the plan"),
    Figure("seconds/<stage>", unit=SECONDS_OF_STAGE, better=LESS),
    Figure("cached/<stage>", unit=TRUTH),
)  # fmt: skip


def _of_tasks(figure: Figure) -> bool:
    return figure.name.startswith("eval/<task>/")


def _axes(section: str) -> tuple[Figure, ...]:
    """The figures of a section that are axes, in the order in which they are proposed."""
    found = (figure for figure in FIGURES if figure.section == section and figure.axis)
    return tuple(sorted(found, key=lambda figure: figure.axis))


RESULT_ROWS = tuple(figure for figure in FIGURES if figure.row and not _of_tasks(figure))
DEFAULT_VALUES = tuple(
    f"{variant}/{figure.name}" for figure in FIGURES for variant in figure.columns
)
QUALITIES, COSTS = _axes(QUALITY), _axes(COST)
MAIN_QUALITIES = tuple(one for one in QUALITIES if one.axis == QUALITIES[0].axis)
# A task may give several metrics; the first of these that it has stands for it.
MAIN_METRICS = tuple(
    figure.name.rpartition("/")[2] for figure in FIGURES if figure.row and _of_tasks(figure)
)
SHARES = frozenset(  # metrics of tasks, 0 to 1, shown in percent
    figure.name.rpartition("/")[2] for figure in FIGURES if _of_tasks(figure)
    and figure.unit is SHARE
)  # fmt: skip


@functools.cache
def figure_of(key: str) -> Figure | None:
    """The figure that a report's key is one of, by the end of the key; None for what is none.

    Of several whose patterns fit, that with the fewest placeholders: `eval/routing/top_k` is no
    metric of a task.
    """

    def fits(figure: Figure) -> bool:
        pattern = re.sub(r"<\w+>", ".+", re.escape(figure.name))
        return re.fullmatch(rf"(.*/)?{pattern}", key) is not None

    found = filter(fits, FIGURES)
    return min(found, key=lambda figure: figure.name.count("<"), default=None)


def unit_of(key: str) -> Unit:
    """What a figure is counted in; of what is no figure, that of numbers."""
    figure = figure_of(key)
    return figure.unit if figure else NUMBER


def main_metric(metrics: Iterable[str]) -> str:
    """The one metric that stands for a task: the first of MAIN_METRICS, else the first given."""
    given = list(metrics)
    return next((name for name in MAIN_METRICS if name in given), given[0])


def figure_text(key: str, value: Any) -> str:
    """One figure as text, in its unit: 12.3 %, 1.20×, 3.9 M, 0.1352."""
    if finite(value) is None:
        return MISSING
    text = unit_of(key).write(value)
    return text if re.search("[1-9]", text) else text.removeprefix("-")


def better(key: str) -> int:
    """1 where more of a figure is better, -1 where less is, 0 where nobody can say."""
    figure = figure_of(key)
    return figure.better if figure else 0


def difference_text(key: str, value: float) -> str:
    """A difference of figures with its sign: points of a percentage, else as it is shown."""
    if unit_of(key).write is percent:
        return signed(100 * value)
    size = figure_text(key, abs(value))
    return size if size == figure_text(key, 0.0) else ("+" if value > 0 else "−") + size


def is_truth(key: str) -> bool:
    """Whether a figure is a yes or a no."""
    return unit_of(key) is TRUTH


def is_timed(key: str) -> bool:
    """Whether a clock decides a figure, so that it is another one each time."""
    timed = (SECONDS, SECONDS_OF_STAGE, TIMES_DENSE)
    return "/vllm/" in key or unit_of(key) in timed or key.startswith("seconds/")


def titles_of(key: str) -> tuple[str, str]:
    """A figure's variant and its name, for people: ("compressed", "KL to dense")."""
    variant, _, rest = key.partition("/")
    if not rest or variant.partition("_top_")[0] not in VARIANTS:
        return "", key
    figure = figure_of(key)
    task, _, metric = rest.removeprefix("eval/").rpartition("/")
    name = figure.title if figure and figure.title else f"{task} {metric}".strip()
    return variant.replace("_top_", " top-"), name


def finite(value: Any) -> Any:
    """The value, or None for NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def signed(points: float) -> str:
    """A difference with its sign, a typographic minus, and no sign on zero."""
    text = f"{points:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text
