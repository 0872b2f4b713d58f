"""One function for each stage: from what is asked to what it needs.

Formulas are told in docs/dry_run.md. Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moe_lab.forecast.costs import FLOAT, Costs, calls_of, parts_of_forward, saved_parts
from moe_lab.forecast.need import Need
from moe_lab.forecast.shape import ModelShape
from moe_lab.forecast.work import QuantizingWork, Text, TracingWork, Weights, Work
from moe_lab.models.layerwise import layers_read

SUM_BYTES = 8  # sums of a profile are float64
SUMS_BY_EXPERT = 21  # of its sums, those with a number for each expert
NEURON_SUMS = 8  # with a number for each hidden unit of an expert
BACKWARD = 2.0  # a backward pass costs two forwards
TEACHER_SHARD = 2**28
ROUNDED = 2e8  # bytes of 16-bit weights that a processor rounds and packs in a second, roughly
TRAINED = 16  # bytes of a parameter that trains: itself, its gradient and Adam's two, in float32


def needs(work: Work, costs: Costs) -> Iterator[Need]:
    """Those of all stages that were asked for, in order."""
    if work.converts:
        yield need_of_convert(work)
    yield need_of_profile(work, costs)
    if work.diagnosed:
        yield need_of_diagnose(work, work.diagnosed, costs)
    yield need_of_plan(work, costs)
    if work.edited:
        yield need_of_compress(work, work.edited, costs)
    if work.tuning and work.tuning.teacher_bytes:
        yield need_of_teach(work, costs)
    if work.tuning:
        yield need_of_finetune(work, costs)
    if work.quantizing:
        yield need_of_quantize(work, work.quantizing)
    if work.evaluating:
        yield from need_of_evaluate(work, costs)
    if work.tracing:
        yield from need_of_trace(work, work.tracing, costs)
    if work.measuring:
        yield need_of_measure(work, costs)


def loaded(model: Weights, workspace: float, costs: Costs) -> tuple[float, float]:
    """Memory of a model that is loaded whole and works with so much beside; what of it is mapped.

    Loading takes more than the model, for pieces of its experts that are put together.
    """
    kind = "load_converted" if model.converted else "load"
    loading = costs.bytes_of(kind, {"experts": model.expert_bytes})
    return model.bytes + max(loading, workspace), model.mapped_bytes


def streamed(model: Weights, workspace: float, layers: int) -> tuple[float, float]:
    """The same of one of which so many decoder layers are in memory at once."""
    held = (layers - 1 + layers_read(model.converted)) * model.layer_bytes
    mapped = 0 if model.converted else model.outside_bytes
    return model.outside_bytes + held + workspace, mapped


def need_of_convert(work: Work) -> Need:
    """One file at a time becomes one of the native form."""
    dense = work.dense
    return Need(
        "convert",
        memory=2.0 * dense.layer_bytes + dense.outside_bytes,
        read=dense.file_bytes,
        kept=dense.file_bytes,
        on_device=False,
    )


def need_of_profile(work: Work, costs: Costs) -> Need:
    """One forward with sums at each MoE layer; layer by layer where the model is large."""
    asked, dense, shape = work.profiling, work.dense, work.dense.shape
    text, flops = asked.text, shape.flops(asked.text.lengths, with_head=False)
    parts = parts_of_forward(shape, text)
    sums = _profile_bytes(shape, asked.neurons)
    states = states_of(dense, text)
    if asked.layerwise:
        held = min(states, asked.cache_bytes)
        workspace = held + sums + costs.bytes_of("profile_layerwise", parts)
        memory, mapped = streamed(dense, workspace, 1 + asked.ahead)
        spilled = max(0.0, states - asked.cache_bytes)
    else:
        memory, mapped = loaded(dense, sums + costs.bytes_of("profile", parts), costs)
        spilled = 0.0
    counts = {"flops": flops, "calls": calls_of(shape, text)}
    return Need(
        "profile",
        memory=memory,
        mapped=mapped,
        read=dense.file_bytes,
        kept=sums,
        scratch=spilled,
        flops=flops,
        seconds=costs.seconds_of(_typed("profile", dense.itemsize), counts),
        itemsize=dense.itemsize,
    )


def need_of_diagnose(work: Work, text: Text, costs: Costs) -> Need:
    """All experts on all tokens of some samples, layer by layer."""
    dense, shape = work.dense, work.dense.shape
    most = max(one.num_experts for one in shape.decoders)
    outputs = FLOAT * most * text.at_once * shape.hidden_size
    workspace = states_of(dense, text) + 2.0 * outputs + costs.bytes_of("diagnose", {})
    memory, mapped = streamed(dense, workspace, 1)
    flops = shape.flops(text.lengths, with_head=False) + _all_experts(shape, text)
    counts = {"flops": flops, "calls": calls_of(shape, text)}
    return Need(
        "diagnose",
        memory=memory,
        mapped=mapped,
        read=dense.file_bytes,
        kept=sum(one.num_experts**2 * 4.0 * 4 for one in shape.decoders),
        flops=flops,
        seconds=costs.seconds_of(_typed("profile", dense.itemsize), counts),
        itemsize=dense.itemsize,
    )


def need_of_plan(work: Work, costs: Costs) -> Need:
    """Statistics alone, or a search that opens the model layer by layer."""
    dense, shape, asked, search = work.dense, work.dense.shape, work.profiling, work.search
    sums = _profile_bytes(shape, asked.neurons)
    note = "" if search.known else "at least: how far its search goes is known when it ends"
    if not search.passes and search.known:
        memory = 2.0 * sums + costs.bytes_of("plan", {})
        return Need("plan", memory=memory, on_device=False, seconds=costs.seconds_of("plan", {}))
    text, passes = asked.text, max(1.0, search.passes)
    states = states_of(dense, text)
    layers = min(len(shape.decoders), 1 + asked.cache_bytes // dense.layer_bytes)
    held = min(4.0 * states, asked.cache_bytes)
    most = max(one.num_experts for one in shape.decoders)
    parts = parts_of_forward(shape, text)
    parts["all_experts"] = FLOAT * most * text.at_once * shape.hidden_size
    memory, mapped = streamed(dense, held + costs.bytes_of("search", parts), layers)
    flops = passes * shape.flops(text.lengths, with_head=False)
    flops += _all_experts(shape, text) if search.all_experts else 0.0
    compared = search.candidates * text.num_tokens * float(shape.hidden_size)
    counts = {"flops": flops, "compared": compared}
    return Need(
        "plan",
        memory=memory,
        mapped=mapped,
        read=dense.file_bytes,
        scratch=max(0.0, 4.0 * states - asked.cache_bytes),
        flops=flops,
        seconds=costs.seconds_of(_typed("search", dense.itemsize), counts),
        itemsize=dense.itemsize,
        note=note,
    )


def need_of_compress(work: Work, edited: Weights, costs: Costs) -> Need:
    """One decoder layer at a time is read, edited and written."""
    dense = work.dense
    parts = {
        "outside": dense.outside_bytes,
        "layer": dense.layer_bytes,
        "experts_in_all": sum(one.num_experts for one in dense.shape.decoders),
    }
    moved = dense.file_bytes + edited.file_bytes
    return Need(
        "compress",
        memory=costs.bytes_of("compress", parts),
        read=dense.file_bytes + edited.file_bytes,  # what was written is read back
        kept=edited.file_bytes - edited.shared,
        seconds=costs.seconds_of("compress", {"bytes": moved}),
        on_device=False,
    )


def need_of_teach(work: Work, costs: Costs) -> Need:
    """The intact model's distributions over the tuning text."""
    dense, tuning = work.dense, work.tuning
    assert tuning is not None
    text = tuning.text
    parts = parts_of_forward(dense.shape, text)
    workspace = costs.bytes_of("evaluate_held_out", parts) + min(
        tuning.teacher_bytes, TEACHER_SHARD
    )
    if tuning.layerwise:
        memory, mapped = streamed(dense, workspace + states_of(dense, text), 1)
    else:
        memory, mapped = loaded(dense, workspace, costs)
    flops = dense.shape.flops(text.lengths) * tuning.steps
    return Need(
        "teacher",
        memory=memory,
        mapped=mapped,
        read=dense.file_bytes,
        kept=tuning.teacher_bytes,
        flops=flops,
        seconds=costs.seconds_of(_typed("forward", dense.itemsize), {"flops": flops}),
        itemsize=dense.itemsize,
    )


def need_of_finetune(work: Work, costs: Costs) -> Need:
    """Forwards and backwards of a recipe, and the tuned model as a checkpoint."""
    model, tuning = work.edited or work.dense, work.tuning
    assert tuning is not None
    shape, text = model.shape, tuning.text
    first = len(shape.decoders) - 1 if tuning.checkpointing else tuning.first
    parts = saved_parts(shape, text, first)
    weights = replace(model, itemsize=tuning.itemsize, converted=tuning.converted)
    trained = tuning.trainable * (TRAINED - tuning.itemsize) - tuning.narrow_bytes
    looking = 0.0
    if tuning.validation:
        looking = costs.bytes_of("evaluate_held_out", parts_of_forward(shape, tuning.validation))
    workspace = trained + max(costs.bytes_of("finetune", parts), looking)
    memory, mapped = loaded(weights, workspace, costs)
    forward = shape.flops(text.lengths) * tuning.accumulation
    share = _share_behind(shape, text, tuning.first)
    again = share if tuning.checkpointing else 0.0
    flops = tuning.steps * forward * (1.0 + BACKWARD * share + again)
    if tuning.validation:
        flops += shape.flops(tuning.validation.lengths)
    calls = calls_of(shape, text) * tuning.steps * tuning.accumulation
    return Need(
        "finetune",
        memory=memory,
        mapped=mapped,
        read=model.file_bytes,
        kept=model.file_bytes,
        scratch=2.0 * 12 * tuning.trainable,
        flops=flops,
        seconds=costs.seconds_of("finetune", {"flops": flops, "calls": calls}),
        itemsize=tuning.itemsize,
    )


def need_of_quantize(work: Work, asked: QuantizingWork) -> Need:
    """Each matrix is read and rounded; what is packed is written, and two layers are read again.

    Roughly: seconds are those of rounding to nearest and packing, a forward's where text is read.
    """
    model = work.edited or work.dense
    kept = model.file_bytes - asked.before + asked.after
    flops = model.shape.flops(asked.text.lengths, with_head=False) if asked.text else 0.0
    return Need(
        "quantize",
        memory=2.0 * model.outside_bytes + 3.0 * model.layer_bytes,
        read=model.file_bytes + kept,
        kept=kept,
        scratch=asked.after if asked.text else 0.0,
        flops=flops,
        seconds=asked.before / ROUNDED,
        itemsize=model.itemsize,
        on_device=asked.text is not None,
        note="roughly",
    )


def need_of_evaluate(work: Work, costs: Costs) -> Iterator[Need]:
    """Each variant on tasks and on held-out text, for which the dense model comes before it."""
    asked, dense = work.evaluating, work.dense
    assert asked is not None
    for name, model in work.variants.items():
        pair = name != "dense" and asked.held_out is not None
        workspaces, flops, calls = [0.0], 0.0, 0.0
        mapped = max(model.mapped_bytes, pair * dense.mapped_bytes)
        before = 0.0
        for kind, text in (("tasks", asked.tasks), ("held_out", asked.held_out)):
            if text is None:
                continue
            parts = parts_of_forward(model.shape, text)
            workspace = costs.bytes_of(f"evaluate_{kind}", parts)
            if kind == "tasks":
                workspace += (1 + model.itemsize / FLOAT) * parts["logits"]  # and their logarithms
            elif asked.tasks:  # what lm-eval keeps
                workspace += costs.bytes_of("evaluate_tasks", {})
            flops += model.shape.flops(text.lengths)
            calls += calls_of(model.shape, text)
            if kind == "held_out" and pair:
                # Its head stays, with what goes into that.
                workspace += dense.outside_bytes + costs.bytes_of("evaluate_pair", parts)
                workspace += states_of(dense, text)
                reading = costs.bytes_of("evaluate_held_out", parts_of_forward(dense.shape, text))
                before, _ = loaded(dense, reading, costs)
                flops += dense.shape.flops(text.lengths)
                calls += calls_of(dense.shape, text)
            workspaces.append(workspace)
        memory, _ = loaded(model, max(workspaces), costs)
        counts = {"flops": flops, "calls": calls}
        seconds = costs.seconds_of(_typed("forward", model.itemsize), counts)
        yield Need(
            f"evaluate_{name}",
            memory=max(memory, before),
            mapped=mapped,
            read=model.file_bytes + (dense.file_bytes if pair else 0),
            flops=flops * asked.variants,
            seconds=seconds * asked.variants,
            itemsize=model.itemsize,
        )


def need_of_trace(work: Work, asked: TracingWork, costs: Costs) -> Iterator[Need]:
    """Each variant continues the prompts; roughly, since a token behind a prompt is one call."""
    prompts, steps = asked.prompts, asked.new_tokens - 1
    one = Text((1,) * len(prompts.lengths), prompts.batch_size)
    tokens = prompts.at_once + steps * prompts.rows
    for name, model in work.variants.items():
        shape = model.shape
        inputs = FLOAT * tokens * (shape.hidden_size + 4.0) * len(shape.decoders)
        memory, mapped = loaded(
            model, inputs + costs.bytes_of("measure", parts_of_forward(shape, prompts)), costs
        )
        flops = shape.flops(prompts.lengths, False) + steps * shape.flops(one.lengths)
        calls = calls_of(shape, prompts) + steps * calls_of(shape, one)
        seconds = costs.seconds_of(_typed("forward", model.itemsize),
                                   {"flops": flops, "calls": calls})  # fmt: skip
        yield Need(f"trace_{name}", memory=memory, mapped=mapped, read=model.file_bytes,
                   flops=flops, seconds=seconds, itemsize=model.itemsize)  # fmt: skip


def need_of_measure(work: Work, costs: Costs) -> Need:
    """All variants side by side in one process."""
    asked, dense = work.measuring, work.dense
    assert asked is not None
    models = list(work.variants.values())
    *others, last = models
    text = Text((asked.prompt_length,) * asked.batch_size, asked.batch_size)
    parts = parts_of_forward(dense.shape, text)
    memory, _ = loaded(last, costs.bytes_of("measure", parts), costs)
    rounds = asked.repeats + 3
    steps = Text((1,) * asked.batch_size, asked.batch_size)
    flops = sum(
        rounds * (one.shape.flops(text.lengths, False) + asked.decode_tokens
                  * one.shape.flops(steps.lengths)) for one in models
    )  # fmt: skip
    calls = sum(
        rounds * (calls_of(one.shape, text) + asked.decode_tokens * calls_of(one.shape, steps))
        for one in models
    )
    counts = {"flops": flops, "calls": calls}
    return Need(
        "measure",
        memory=sum(one.bytes for one in others) + memory,
        mapped=sum(one.mapped_bytes for one in models),
        read=sum(one.file_bytes for one in models),
        flops=flops,
        seconds=costs.seconds_of(_typed("forward", dense.itemsize), counts),
        itemsize=dense.itemsize,
    )


def _typed(kind: str, itemsize: int) -> str:
    """The name of a rate: processors are slower with numbers of two bytes."""
    return f"{kind}_{8 * itemsize}"


def states_of(dense: Weights, text: Text) -> float:
    """A hidden state of every token, padding included."""
    ordered, padded = sorted(text.lengths), 0
    size = max(1, text.rows)
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        padded += len(batch) * batch[-1]
    return float(padded * dense.shape.hidden_size * max(dense.itemsize, 4))


def _all_experts(shape: ModelShape, text: Text) -> float:
    """Operations of every expert on every token."""
    return 2.0 * text.num_tokens * sum(one.expert_parameters for one in shape.decoders)


def _profile_bytes(shape: ModelShape, neurons: bool) -> float:
    numbers = 0.0
    for one in shape.decoders:
        count = one.num_experts
        numbers += count * (shape.hidden_size + 2 * count + one.top_k + SUMS_BY_EXPERT)
        numbers += NEURON_SUMS * count * one.expert_width if neurons else 0
    return numbers * SUM_BYTES


def _share_behind(shape: ModelShape, text: Text, first: int) -> float:
    """Which share of a forward lies in the layers from `first` on, the head among it."""
    behind = sum(one.flops(text.lengths) for one in shape.decoders[first:])
    head = shape.head_flops * text.num_tokens
    return (behind + head) / shape.flops(text.lengths)
