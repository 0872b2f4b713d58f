"""What compression gains, and what moe_lab's own work costs, at the layers of published models.

`make gpu`: for the day that a GPU is there, in under eight minutes, and with nothing but this
environment. First the tests that compare a GPU's results with the processor's (`pytest -m gpu`),
then, with random weights in a few layers of DeepSeekMoE-16B's and Mixtral-8x7B's widths: prefill,
decoding and memory of the intact and of compressed models; a profile beside a plain forward; the
greedy searches; fine-tuning beside plain loops. Each part has a process and a budget of its own:
what fails or takes too long is told, and loses no other part. The tables go to
experiments/speed/<card>.md.

Without a GPU all of it runs at a fifth of the widths on the processor, which shows that it works
and says nothing of a GPU; the tables go to a temporary file, or with --write beside the others.

    python experiments/speed/gpu.py [--only measure observe] [--device cuda:1] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.finetune.experts import Experts
from moe_lab.finetune.recipe import Phase
from moe_lab.finetune.training import Training
from moe_lab.finetune.tuning import next_token_loss
from moe_lab.measure.speed import Measurement, fit_together, measure
from moe_lab.methods.condense.method import Condense
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers, num_parameters
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.provenance import commit, versions
from moe_lab.types import LayerInfo

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
SHRUNK = 5  # without a GPU
GIB = 2**30
BUDGETS = {"tests": 120, "measure": 120, "observe": 60, "search": 90, "finetune": 80}  # seconds
BUDGET_OF_CPU = 300  # of each part: a busy machine may take its time


@dataclass(frozen=True)
class Shape:
    """A published model. layers, condensed: its MoE layers, and how many CD-MoE condenses, of which
    so many routed experts stay; few: layers that are made of it here, at most."""

    name: str
    layers: int
    condensed: int
    routed: int
    few: int
    dense_layers: int
    config: dict[str, int]
    kind: tuple[type[Any], type[PreTrainedModel]]


SHAPES = (
    Shape(
        "DeepSeekMoE-16B", 27, 9, 6, 9, 1,
        {
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
            "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 2816,
        },
        (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    ),
    Shape(
        "Mixtral-8x7B", 32, 9, 2, 4, 0,
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        (MixtralConfig, MixtralForCausalLM),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Where it runs, and how much of it fits there."""

    device: str

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of models that are measured, observed and searched: what published ones are stored in."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def prompt(self) -> tuple[int, int]:
        """Sequences and their length."""
        return (8, 1024) if self.on_gpu else (1, 128)

    def config_of(self, shape: Shape, layers: int) -> Any:
        """So many layers in all, at the full width on a GPU."""
        values = dict(shape.config)
        if not self.on_gpu:
            heads = values["num_attention_heads"] // SHRUNK
            groups = values["num_attention_heads"] // values["num_key_value_heads"]
            heads -= heads % groups
            values |= {
                name: value // SHRUNK // 8 * 8
                for name, value in values.items()
                if name.endswith("intermediate_size") or name == "vocab_size"
            }
            values |= {
                "num_attention_heads": heads, "num_key_value_heads": heads // groups,
                "hidden_size": 128 * heads,
            }  # fmt: skip
        config, _ = shape.kind
        if shape.dense_layers:
            values["mlp_only_layers"] = list(range(shape.dense_layers))
        return config(**values, num_hidden_layers=layers, max_position_embeddings=4096)

    def model(self, shape: Shape, layers: int, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A random one, the same each time, made where it is used."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or self.dtype)
        try:
            with torch.device(self.device):
                model = shape.kind[1](self.config_of(shape, layers))
        finally:
            torch.set_default_dtype(before)
        return model.eval()

    def layers_of(self, shape: Shape, room: float = 0.25, dtype: torch.dtype | None = None) -> int:
        """How many layers in all: the few of the shape, or those that so much of a GPU holds."""
        few = shape.few if self.on_gpu else shape.dense_layers + 2
        if not self.on_gpu:
            return few
        with torch.device("meta"):
            one, two = (
                num_parameters(shape.kind[1](self.config_of(shape, shape.dense_layers + number)))
                for number in (1, 2)
            )
        free = torch.cuda.mem_get_info(self.device)[0] * room
        size = (dtype or self.dtype).itemsize
        most = int((free / size - one) // (two - one)) + 1 + shape.dense_layers
        if most <= shape.dense_layers + 1:
            raise MemoryError(f"two layers of {shape.name} take more than {room:.0%} of its memory")
        return min(few, most)

    def batches(self, model: PreTrainedModel, number: int) -> list[dict[str, Tensor]]:
        """Random tokens of the prompt's shape."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (number, *self.prompt), generator=generator)
        mask = torch.ones(self.prompt, dtype=torch.long)
        rows = [{"input_ids": one, "attention_mask": mask} for one in ids]
        return [{key: value.to(self.device) for key, value in row.items()} for row in rows]

    def seconds(self, work: Callable[[], object], rounds: int = 1) -> float:
        """Median seconds of a call, all of a GPU's work behind it counted."""
        times = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def wait(self) -> None:
        """Until all that was asked of a GPU is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak(self) -> float | None:
        """GiB that a GPU had to give since the last time this was asked, None without one."""
        if not self.on_gpu:
            return None
        most = torch.cuda.max_memory_allocated(self.device) / GIB
        torch.cuda.reset_peak_memory_stats(self.device)
        return most


Row = dict[str, Any]
MoE = list[LayerInfo]


def infos_of(model: PreTrainedModel) -> MoE:
    """The MoE layers of a model."""
    return [layer.info for layer in moe_layers(model)]


def condensing(shape: Shape, infos: MoE, number: int | None = None) -> Plan:
    """As large a share of the layers as CD-MoE condenses, to the shared experts and a few."""
    share = round(len(infos) * shape.condensed / shape.layers) if number is None else number
    edits: list[Edit] = []
    for info in infos[-max(1, share) :]:
        widths = [info.shared_width] * info.shared + [info.expert_width] * shape.routed
        gates = (1 / info.num_experts,) * shape.routed
        chosen = tuple(range(shape.routed))
        one = CondenseLayer(info.index, info.name, chosen, gates, 0.5, widths=tuple(widths))
        edits.append(one)
    return Plan(tuple(edits))


def pruning(infos: MoE, share: float) -> Plan:
    """That share of each layer's experts goes."""
    stay = {info.index: round(info.num_experts * (1 - share)) for info in infos}
    return Plan(
        tuple(PruneExperts(one.index, one.name, tuple(range(stay[one.index]))) for one in infos)
    )


def narrowing(infos: MoE, share: float) -> Plan:
    """That share of each expert's hidden units goes."""
    edits, tensors = [], {}
    for info in infos:
        width = round(info.expert_width * (1 - share)) // 8 * 8
        edits.append(NarrowExperts(info.index, info.name, (width,)))
        kept_EI = torch.zeros(info.num_experts, info.expert_width)
        kept_EI[:, :width] = 1
        tensors[f"layers.{info.index}.neurons"] = kept_EI
    return Plan(tuple(edits), tensors=tensors)


def measuring(setting: Setting, shape: Shape) -> Iterator[Row]:
    """Prefill, decoding and memory of each variant: `measure`, as a job calls it."""
    layers = setting.layers_of(shape)
    plans: dict[str, Callable[[MoE], Plan]] = {
        "dense": lambda infos: Plan(()),
        f"CD-MoE-SR-{shape.condensed}": lambda infos: condensing(shape, infos),
        "experts pruned 25 %": lambda infos: pruning(infos, 0.25),
        "experts pruned 50 %": lambda infos: pruning(infos, 0.5),
        "experts narrowed 50 %": lambda infos: narrowing(infos, 0.5),
    }
    sizes: list[int] = []

    def load(plan: Callable[[MoE], Plan]) -> PreTrainedModel:
        model = setting.model(shape, layers)
        if made := plan(infos_of(model)).edits:
            apply_plan(model, plan(infos_of(model)))
        sizes.append(len(made))
        return model

    batch, length = setting.prompt
    how = Measurement(length, batch, decode_tokens=16, repeats=5 if setting.on_gpu else 1)
    config = setting.config_of(shape, layers)
    with torch.device("meta"):
        dense = num_parameters(shape.kind[1](config)) * setting.dtype.itemsize
    figures = measure(
        {name: (lambda plan=plan: load(plan)) for name, plan in plans.items()},
        prompt_length=how.prompt_length, batch_size=how.batch_size,
        decode_tokens=how.decode_tokens, repeats=how.repeats, seed=0,
        vocabulary_size=config.vocab_size,
        together=fit_together([dense] * len(plans), setting.device),
    )  # fmt: skip
    for name, edits in zip(plans, sizes, strict=True):
        yield {
            "variant": name,
            "edited MoE layers": f"{edits} of {layers - shape.dense_layers}",
            "parameters (M)": figures[f"{name}/parameters"] / 1e6,
            "peak memory (GiB)": figures[f"{name}/peak_memory_bytes"] / GIB,
            "prefill (tokens/s)": batch * length / figures[f"{name}/prefill_seconds"],
            "against dense": figures[f"{name}/prefill_speedup"],
            "decode (ms/step)": 1e3 * figures[f"{name}/decode_seconds_per_token"],
            "decode against dense": figures[f"{name}/decode_speedup"],
        }


def observing(setting: Setting, shape: Shape) -> Iterator[Row]:
    """The pass of a profile beside plain forwards over the same tokens."""
    model = setting.model(shape, setting.layers_of(shape))
    batches = setting.batches(model, 4 if setting.on_gpu else 2)

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)

    passes: dict[str, Callable[[], object]] = {
        "plain forward": plain,
        "profile of routers": lambda: collect_statistics(model, batches, only_routers=True),
        "profile": lambda: collect_statistics(model, batches),
        "profile with hidden units": lambda: collect_statistics(model, batches, neurons=True),
    }
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    reference = None
    for name, work in passes.items():
        work()
        setting.peak()
        seconds = setting.seconds(work, 3 if setting.on_gpu else 1)
        reference = reference or seconds
        yield {
            "pass": name, "tokens/s": tokens / seconds, "against plain": seconds / reference,
            "peak memory (GiB)": setting.peak(),
        }  # fmt: skip


def searching(setting: Setting, shape: Shape) -> Iterator[Row]:
    """The greedy searches on a few layers; those of the whole model by how their work grows."""
    model = setting.model(shape, setting.layers_of(shape))
    batches = setting.batches(model, 1)
    found = collect_statistics(model, batches)
    layers = [one.info.index for one in found]
    here, whole = len(layers), shape.layers
    few = max(1, round(here * shape.condensed / whole))
    profile = Profile(found, lambda: LayerStream(model, batches))
    tokens = batches[0]["input_ids"].numel()

    def candidates(number: int, chosen: int) -> int:
        """Times layers behind them, which are computed again."""
        return sum(number - step for step in range(chosen)) * number

    experts = Condense(few, shape.routed, "greedy_js", layers[-few:])
    seconds = setting.seconds(lambda: experts.plan(profile))
    yield {
        "search": f"experts (greedy_js), {few} layers, {tokens} tokens", "seconds": seconds,
        f"all {whole} layers (s, extrapolated)": seconds / few * whole,
        "peak memory (GiB)": setting.peak(),
    }  # fmt: skip
    order = Condense(few, shape.routed, tuple(range(shape.routed)), "greedy_js")
    seconds = setting.seconds(lambda: order.plan(profile))
    yield {
        "search": f"layers (greedy_js), {few} of {here}, {tokens} tokens", "seconds": seconds,
        f"all {whole} layers (s, extrapolated)": seconds
        * candidates(whole, shape.condensed)
        / candidates(here, few),
        "peak memory (GiB)": setting.peak(),
    }  # fmt: skip


def tuning(setting: Setting, shape: Shape) -> Iterator[Row]:
    """A recipe's steps on a condensed model, beside plain loops over the same text."""
    layers = min(setting.layers_of(shape, 0.05, torch.float32), shape.dense_layers + 3)
    model = setting.model(shape, layers, torch.float32)
    plan = condensing(shape, infos_of(model), 1)
    apply_plan(model, plan)
    batch, length = (8, 512) if setting.on_gpu else (2, 64)
    steps = 6 if setting.on_gpu else 3
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch * steps, length), generator=generator)
    tokens = Tokens(tuple(map(tuple, ids.tolist())), pad_id=0)
    dtype = "bfloat16" if setting.on_gpu else "float32"
    phase = Phase(data=None, batch_size=batch, num_steps=steps)  # type: ignore[arg-type]
    recipe = Experts(phases={"lm": phase}, dtype=dtype)

    class Text:
        """What a phase says of its text; the tokens are here already."""

        def sources(self) -> list[str]:
            return ["random tokens"]

    object.__setattr__(phase, "data", Text())
    starts: list[float] = []

    def log(row: Row) -> None:
        if "tokens" in row:
            setting.wait()
            starts.append(time.perf_counter())

    def rate() -> float:
        """Tokens in a second, of the steps behind the first."""
        return batch * length * (len(starts) - 1) / (starts[-1] - starts[0])

    setting.peak()
    with tempfile.TemporaryDirectory() as folder:
        compute = Compute(setting.device)
        training = Training(
            model, plan, recipe, {"lm/data": tokens}, 0, compute, Path(folder), log=log
        )
        trained = list(training.trainable.values())
        training.run()
    recipes = rate()

    def plain(parameters: list[torch.nn.Parameter]) -> float:
        model.requires_grad_(False)
        for one in parameters:
            one.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        model.set_experts_implementation("grouped_mm")
        starts.clear()
        for step in range(steps):
            rows = tokens.take(range(step * batch, (step + 1) * batch)).labelled()
            rows = {key: value.to(setting.device) for key, value in rows.items()}
            with torch.autocast(setting.device.partition(":")[0], torch.bfloat16, setting.on_gpu):
                loss = next_token_loss(model, rows) / rows["input_ids"].numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log({"tokens": step})
        return rate()

    row = {"loop": "finetune=experts, one condensed layer", "trains (M)": sum_of(trained)}
    yield row | {"tokens/s": recipes, "peak memory (GiB)": setting.peak()}
    row = {"loop": "a plain loop, the same parameters", "trains (M)": sum_of(trained)}
    yield row | {"tokens/s": plain(trained), "peak memory (GiB)": setting.peak()}
    every = list(model.parameters())
    row = {"loop": "a plain loop, all parameters", "trains (M)": sum_of(every)}
    yield row | {"tokens/s": plain(every), "peak memory (GiB)": setting.peak()}


def sum_of(parameters: list[torch.nn.Parameter]) -> float:
    """Millions of numbers."""
    return sum(one.numel() for one in parameters) / 1e6


PARTS: dict[str, tuple[str, Callable[[Setting, Shape], Iterator[Row]]]] = {
    "measure": ("Prefill, decoding, memory", measuring),
    "observe": ("A profile beside a plain forward", observing),
    "search": ("CD-MoE's greedy searches", searching),
    "finetune": ("Fine-tuning", tuning),
}


def run_part(part: str, setting: Setting) -> None:
    """In a process of its own: print each row as it is known, and what fails."""
    for shape in SHAPES:
        layers: int | None = None
        try:
            layers = setting.layers_of(shape)
            for row in PARTS[part][1](setting, shape):
                print(json.dumps({"shape": shape.name, "layers": layers, "row": row}), flush=True)
        except Exception as error:  # noqa: BLE001  # whatever it is, the next shape can be tried
            traceback.print_exc()
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(json.dumps({"shape": shape.name, "layers": layers, "failed": told}), flush=True)


def part_of(part: str, device: str, budget: float) -> tuple[list[Row], str]:
    """The rows of a part, and what became of its process, where that is not well."""
    command = [sys.executable, __file__, "--part", part, "--device", device]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        told = ""
        try:
            done = subprocess.run(
                command, stdout=out, stderr=errors, timeout=budget, env=environment, check=False
            )
            if done.returncode:
                told = f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            told = f"stopped at its budget of {budget:.0f} s"
        for stream in (out, errors):
            stream.seek(0)
        rows = [json.loads(line) for line in out if line.startswith("{")]
        text = errors.read()
        if told or any("failed" in row for row in rows):
            print(text[-3000:], file=sys.stderr, flush=True)
        return rows, told


def tests_on(device: str, budget: float) -> str:
    """One line: what the tests marked `gpu` say."""
    if not device.startswith("cuda"):
        return "not run: no GPU here"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=budget, check=False
        )
    except subprocess.TimeoutExpired:
        return f"FAILED: stopped at its budget of {budget:.0f} s"
    print(done.stdout[-6000:], flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return last if done.returncode == 0 else f"FAILED: {last}"


def table(rows: list[Row]) -> list[str]:
    """Rows as a table in Markdown."""
    names = [name for name in rows[0] if any(row.get(name) is not None for row in rows)]

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return lines + ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]


def section(part: str, rows: list[Row], told: str) -> list[str]:
    """What a part found, and what it did not."""
    lines = [f"## {PARTS[part][0]}", ""]
    for shape in SHAPES:
        mine = [row for row in rows if row["shape"] == shape.name]
        lines += [f"**{shape.name}**" + (f", {mine[0]['layers']} layers" if mine else ""), ""]
        if found := [row["row"] for row in mine if "row" in row]:
            lines += [*table(found), ""]
        lines += [f"FAILED: {row['failed']}\n" for row in mine if "failed" in row]
        lines += [] if mine else ["FAILED: nothing was found\n"]
    return lines + ([f"FAILED: the process {told}\n"] if told else [])


def main() -> int:
    """Run the parts, write the tables; 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: the first GPU, or the processor")
    parser.add_argument("--only", nargs="*", choices=list(BUDGETS), help="some of the parts")
    parser.add_argument("--write", action="store_true", help="also where there is no GPU")
    parser.add_argument("--part", choices=PARTS, help="one part, in this process")
    given = parser.parse_args()
    device = given.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    setting = Setting(device)
    if given.part:
        run_part(given.part, setting)
        return 0
    card = torch.cuda.get_device_name(device) if setting.on_gpu else "cpu"
    started, parts = time.perf_counter(), given.only or list(BUDGETS)
    machine = Compute(device).hardware()
    batch, length = setting.prompt
    lines = [
        f"# {card}", "", f"{date.today()}, {machine}; commit {commit()}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + f". Random weights in {str(setting.dtype).removeprefix('torch.')}, {batch} sequences of "
        f"{length} tokens"
        + ("." if setting.on_gpu else f", at 1/{SHRUNK} of the widths: nothing of a GPU's speed."),
        "",
    ]  # fmt: skip
    if "tests" in parts:
        told = tests_on(device, BUDGETS["tests"])
        print(f"tests: {told}", flush=True)
        lines += [f"Tests against the processor (`pytest -m gpu`): {told}", ""]
    for part in (part for part in parts if part in PARTS):
        begun = time.perf_counter()
        rows, told = part_of(part, device, BUDGETS[part] if setting.on_gpu else BUDGET_OF_CPU)
        found = section(part, rows, told)
        print("\n".join(found), f"({time.perf_counter() - begun:.0f} s)", flush=True)
        lines += found
    lines.append(f"All of it took {time.perf_counter() - started:.0f} s.")
    name = re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_") + ".md"
    folder = FOLDER if setting.on_gpu or given.write else Path(tempfile.mkdtemp())
    (folder / name).write_text("\n".join(lines) + "\n")
    print(f"written to {folder / name}")
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
