"""Expert-only fine-tuning: what moves, what does not, its phases, and resuming."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from conftest import run_killed, start_two
from families import tiny_batch, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig

from moe_lab.compute import Compute
from moe_lab.data.embedded import StandardLibrary, StandardQuestions
from moe_lab.data.tokens import IGNORED, Tokens
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.experts import Experts, Gates
from moe_lab.finetune.recipe import Phase
from moe_lab.finetune.tuning import next_token_loss
from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.editing import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.report.card import model_card
from moe_lab.stages import finetune
from moe_lab.stages.outputs import RunReport
from moe_lab.store import Artifact, Store
from moe_lab.types import Edit, Plan, UserError

PLANS = {
    "condense": [
        dict(index=1, edit="condense", experts=(5, 2), gates=(0.4, 0.3), widths=(24, 16, 16)),
        dict(index=3, edit="condense", experts=(0,), gates=(0.2,), widths=(24, 16)),
    ],
    "prune": [dict(index=2, edit="prune", kept=(0, 1, 2, 5))],
    "merge": [
        dict(
            index=2, edit="merge", kept=(0, 3, 6), groups=((0, 1, 2), (3, 4, 5), (6, 7)),
            weights=((0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.5, 0.5)),
        )
    ],
}  # fmt: skip
# What must move: everything else must not, by a single bit.
MOVING = {
    "condense": ("layers.1.mlp.", "layers.3.mlp."),
    "prune": ("layers.2.mlp.experts.", "layers.2.mlp.shared_expert."),
    "merge": ("layers.2.mlp.experts.", "layers.2.mlp.shared_expert."),
}
GATES = ("layers.1.mlp.down_proj", "layers.3.mlp.down_proj")
RECIPE = {field.name for field in dataclasses.fields(Experts)}


def samples(seed: int, count: int, prompts: bool = False) -> Tokens:
    """Samples of 4 to 10 tokens, with `prompts` 1 to 3 of which are given."""
    batch = tiny_batch(seed=seed, batch=count, padding=False)
    rows = [tuple(row[: 4 + i % 7].tolist()) for i, row in enumerate(batch["input_ids"])]
    given = tuple(1 + i % 3 for i in range(count)) if prompts else ()
    return Tokens(tuple(rows), pad_id=0, prompts=given)


def recipe_of(supervised: bool = False, **changes: object) -> Experts:
    """A small recipe; changes: of the recipe, and of the phase `lm`."""
    ours = {key: value for key, value in changes.items() if key in RECIPE}
    rest = {key: value for key, value in changes.items() if key not in RECIPE}
    text = dict(data=StandardLibrary(24, 10), validation=StandardLibrary(6, 10, split="validation"))
    phases = {"lm": Phase(**(text | dict(batch_size=4, learning_rate=1e-2) | rest))}
    if supervised:
        phases["sft"] = Phase(
            data=StandardQuestions(10, 10), batch_size=2, gradient_accumulation=2, epochs=2,
            learning_rate=5e-3, schedule="cosine", weight_decay=0.1,
        )  # fmt: skip
    return Experts(phases=phases, **(dict(validate_every=3) | ours))


def training(model, plan: Plan, folder: Path, **changes: object) -> finetune_training.Training:
    recipe = recipe_of(**changes)
    tokens = {"lm/data": samples(1, 24), "lm/validation": samples(2, 6)}
    tokens["sft/data"] = samples(3, 10, prompts=True)
    return finetune_training.Training(
        model, plan, recipe, tokens, seed=0, compute=Compute("cpu"), folder=folder
    )


def compressed(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """A compressed checkpoint in folder/compressed, in bfloat16 as real ones are."""
    model = tiny_model("qwen2_moe").to(dtype)
    model.save_pretrained(folder / "source")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    edits = (Edit(name=names[edit["index"]], shared_gate=0.5, **edit) for edit in PLANS[kind])
    plan = Plan(tuple(edits))
    model = load(folder / "source", dtype="float32")
    apply_plan(model, plan)
    save_checkpoint(model, folder / "compressed", folder / "source", padding=1.0)
    return plan


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "curve.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict]:
    return [row for row in rows_of(folder) if "loss" in row]


# --------------------------------------------------------------------------- what moves


TRAINED = {
    "experts": {},
    "experts and gates": {"gates": True},
    "gates": {"gates": True, "experts": False},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "what"),
    [("prune", "experts"), ("merge", "experts"), *(("condense", what) for what in TRAINED)],
    ids=" ".join,
)
def test_only_what_trains_moves(kind: str, what: str, dtype: str, tmp_path: Path) -> None:
    plan = compressed(kind, tmp_path)
    model = load(tmp_path / "compressed", dtype="float32" if dtype == "float32" else "auto")
    changes = TRAINED[what] | dict(epochs=3, weight_decay=0.1, dtype=dtype)
    training(model, plan, tmp_path, **changes).run()
    save_checkpoint(model, tmp_path / "out", tmp_path / "compressed")
    before = load_file(tmp_path / "compressed" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:  # the compressed shapes, not the original's again
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = GATES if what == "gates" else MOVING[kind]
    allowed = {name for name in before if any(part in name for part in parts)}
    assert moved
    assert moved <= allowed, moved - allowed
    counted = json.loads((tmp_path / "trainable.json").read_text())
    gates = 5 if "gates" in what else 0  # two shared parts, three experts
    weights = sum(before[name].numel() for name in allowed) if "experts" in what else 0
    assert counted["parameters"] == weights + gates
    if kind == "condense":
        assert moved == allowed


@pytest.mark.parametrize("what", TRAINED)
def test_zero_padding_of_a_native_dense_layer_stays_zero(what: str, tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, weight_decay=0.1, **TRAINED[what]).run()
    block = model.model.layers[3].mlp  # shared 24 + one expert of 16, padded to the dense 56
    width = block.gate_proj.out_features
    assert width > 40
    assert block.gate_proj.weight[40:].abs().max() == 0
    assert block.down_proj.weight[:, 40:].abs().max() == 0
    assert block.gate_proj.weight[:40].abs().min() > 0


def test_a_gate_scales_its_own_part_and_is_folded_back(tmp_path: Path) -> None:
    """The factors of one layer, found again in the columns of its down projection."""
    plan = compressed("condense", tmp_path)
    model, untouched = (load(tmp_path / "compressed", dtype="float32") for _ in range(2))
    recipe = recipe_of(gates=True, experts=False)
    tuning = recipe.prepare(model, plan)
    named = tuning.trainable
    assert {name.split(".")[2]: tuple(p.shape) for name, p in named.items()} == {
        "1": (3,),
        "3": (2,),
    }
    batch = tiny_batch()
    assert torch.equal(model(**batch).logits, untouched(**batch).logits), "factors start at 1"
    with torch.no_grad():
        named["model.layers.1.mlp.gates"].copy_(torch.tensor([0.5, 2.0, 3.0]))
        named["model.layers.3.mlp.gates"].copy_(torch.tensor([1.5, -1.0]))
    found = model(**batch).logits
    tuning.finish()
    assert not any(isinstance(module, Gates) for module in model.modules())
    assert torch.allclose(model(**batch).logits, found, atol=1e-5)
    columns = {1: [0.5] * 24 + [2.0] * 16 + [3.0] * 16, 3: [1.5] * 24 + [-1.0] * 16 + [1.0] * 16}
    for index, expected in columns.items():
        down = model.model.layers[index].mlp.down_proj.weight
        before = untouched.model.layers[index].mlp.down_proj.weight
        assert torch.equal(down, before * torch.tensor(expected))
    assert model.state_dict().keys() == untouched.state_dict().keys()


def test_gates_need_the_widths_of_their_parts(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    for widths, message in (((), "make the plan again"), ((24, 16, 17), "layer 1 parts of")):
        first, second = plan.edits
        wrong = Plan((dataclasses.replace(first, widths=widths), second))
        assert recipe_of().prepare(model, wrong).trainable
        with pytest.raises(UserError, match=message):
            recipe_of(gates=True).prepare(model, wrong)


def test_the_trainable_share_of_deepseek_moe_16b() -> None:
    """CD-MoE-SR on 9 layers trains 3.80 % of the original model (2412.00069), counted on shapes."""
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=102400, hidden_size=2048, num_hidden_layers=28, intermediate_size=10944,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=6,
        moe_intermediate_size=1408, shared_expert_intermediate_size=2816, mlp_only_layers=[0],
        decoder_sparse_step=1, norm_topk_prob=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = meta_model(config)
    edits = [
        Edit(
            layer.info.index, layer.info.name, "condense", experts=tuple(range(6)),
            gates=(0.1,) * 6, widths=(2816, *(1408,) * 6),
        )
        for layer in moe_layers(model)[:9]
    ]  # fmt: skip
    plan = Plan(tuple(edits))
    apply_plan(model, plan)
    trainable = recipe_of().prepare(model, plan).trainable
    assert sum(parameter.numel() for parameter in trainable.values()) == 622_854_144
    assert round(100 * 622_854_144 / 16_375_728_128, 2) == 3.80
    gates = recipe_of(gates=True, experts=False).prepare(model, plan).trainable
    assert sum(parameter.numel() for parameter in gates.values()) == 9 * 7


# --------------------------------------------------------------------------- resuming


RESUMED = {
    "prune": ("prune", {}, 5, 4),
    "condense": ("condense", {}, 5, 4),
    "bfloat16, gates, both phases, in the first": ("condense", {"gates": True}, 5, 4),
    "bfloat16, gates, both phases, at the border": ("condense", {"gates": True}, 7, 6),
    "bfloat16, gates, both phases, in the second": ("condense", {"gates": True}, 10, 8),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_equals_uninterrupted(case: str, tmp_path: Path, monkeypatch) -> None:
    """To the bit: stopped within a phase, or where one ends, with a step after the last state."""
    kind, changes, stop, save_every = RESUMED[case]
    dtype = "auto" if "bfloat16" in case else "float32"
    if "both" in case:
        changes = changes | {"supervised": True, "dtype": "bfloat16"}
    else:
        changes = changes | {"epochs": 2}
    plan = compressed(kind, tmp_path)
    results = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "stopped":
            model = load(tmp_path / "compressed", dtype=dtype)
            first = training(model, plan, folder, **changes)
            run_killed(first, stop, save_every, monkeypatch)
            assert int(load_file(folder / finetune_training.STATE)["done"]) == save_every < stop
            assert len(steps_of(folder)) == stop
        model = load(tmp_path / "compressed", dtype=dtype)
        training(model, plan, folder, **changes).run()
        results.append((model.state_dict(), (folder / "curve.jsonl").read_text()))
    (whole, curve), (resumed, resumed_curve) = results
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert curve == resumed_curve
    assert [row["step"] for row in steps_of(folder)] == list(range(1, 13))


# --------------------------------------------------------------------------- the loop


def test_it_learns_and_the_curve_says_so(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, epochs=8).run()
    start, *rows = rows_of(tmp_path)
    assert start.keys() == {"phase", "step", "validation_loss"} and start["step"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert all(row["phase"] == "lm" and row["gradient_norm"] > 0 for row in rows)
    assert rows[-1]["tokens"] == 8 * samples(1, 24).num_tokens
    validated = [row["step"] for row in rows if "validation_loss" in row]
    assert validated == [step for step in range(1, 49) if step % 3 == 0 or step == 48]
    rates = [row["learning_rate"] for row in rows]
    peak = rates.index(max(rates))
    assert 0 < rates[0] < rates[peak] == pytest.approx(1e-2)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_phases_follow_each_other_with_fresh_optimizers(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, supervised=True, warmup_ratio=0.5).run()
    rows = steps_of(tmp_path)
    assert [row["phase"] for row in rows] == ["lm"] * 6 + ["sft"] * 6
    assert [row["step"] for row in rows] == list(range(1, 13))
    tokens = [row["tokens"] for row in rows]
    assert tokens == sorted(tokens)
    assert tokens[-1] == samples(1, 24).num_tokens + 2 * samples(3, 10).num_tokens
    rates = [row["learning_rate"] for row in rows]
    assert rates[5] < rates[2] == 1e-2 and rates[6] == 5e-3, "each phase has its own schedule"
    counted = json.loads((tmp_path / "trainable.json").read_text())
    assert counted["texts"] == {
        "lm/data": ["the standard library's train split"],
        "lm/validation": ["the standard library's validation split"],
        "sft/data": ["the standard questions' train split"],
    }


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 1.0])
def test_a_warm_up_warms_up(schedule: str, ratio: float) -> None:
    """The reference implementation asks for one and never gets it: the rate starts at its peak."""
    phase, num_steps = Phase(None, schedule=schedule, warmup_ratio=ratio), 40
    rates = [phase.rate(step, num_steps) for step in range(num_steps)]
    warmup = round(ratio * num_steps)
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    rest = rates[max(1, warmup) :]
    assert max(rates) == 1 and min(rates) > 0
    assert rest == sorted(rest, reverse=True)
    half = warmup + (num_steps - warmup) // 2
    if ratio < 1:
        assert phase.rate(half, num_steps) == pytest.approx(
            1 if schedule == "constant" else 0.5, abs=0.03
        )
        quarter = phase.rate(warmup + (num_steps - warmup) // 4, num_steps)
        expected = {"linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2, "constant": 1}
        assert quarter == pytest.approx(expected[schedule], abs=0.03)


@pytest.mark.parametrize("kind", PLANS)
def test_accumulated_gradients_are_the_large_batch(kind: str, tmp_path: Path) -> None:
    """Samples differ in length: a mean of the forwards' means would be another gradient."""
    plan = compressed(kind, tmp_path)
    found = []
    for size, times in ((16, 1), (4, 4), (3, 6)):
        model = load(tmp_path / "compressed", dtype="float32")
        trained = training(
            model, plan, tmp_path, batch_size=size, gradient_accumulation=times
        )  # fmt: skip
        rows = trained.tokens["lm/data"].take(range(16))
        loss = trained._backward(rows, size)["loss"]
        found.append((loss.item(), {n: p.grad for n, p in trained.trainable.items()}))
    (loss, gradients), *others = found
    assert len({len(row) for row in rows.samples}) > 3
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            error = (other[name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), name


def test_padding_and_prompts_enter_no_loss() -> None:
    model = tiny_model("qwen2_moe")
    rows = samples(3, 5, prompts=True)
    with torch.no_grad():
        padded = next_token_loss(model, rows.labelled())
        other = dataclasses.replace(rows, pad_id=7).labelled()
        assert torch.equal(padded, next_token_loss(model, other))
        total, targets = 0.0, 0
        for ids, prompt in zip(rows.samples, rows.prompts, strict=True):
            row = torch.tensor([ids])
            surprise = -model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            total += surprise[max(0, prompt - 1) :].sum().item()
            targets += len(ids) - prompt
    assert rows.num_targets == targets == int((rows.labelled()["labels"][:, 1:] != IGNORED).sum())
    assert padded.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", PLANS)
def test_gradient_checkpointing_computes_the_same(kind: str, tmp_path: Path) -> None:
    """Layers below the lowest trained one are computed once and stand in no graph."""
    plan = compressed(kind, tmp_path)
    found, calls = [], {}
    for checkpointing in (False, True):
        model = load(tmp_path / "compressed", dtype="float32")
        trained = training(model, plan, tmp_path, gradient_checkpointing=checkpointing)
        count = calls[checkpointing] = [0] * len(model.model.layers)
        graph = [None] * len(model.model.layers)
        for index, layer in enumerate(model.model.layers):

            def counting(module, args, output, index=index, count=count) -> None:
                count[index] += 1

            def note(module, args, output, index=index, graph=graph) -> None:
                graph[index] = (output[0] if isinstance(output, tuple) else output).requires_grad

            layer.self_attn.register_forward_hook(counting)
            layer.register_forward_hook(note)
        loss = trained._backward(trained.tokens["lm/data"].take(range(6)), 6)["loss"]
        found.append((loss, {n: p.grad for n, p in trained.trainable.items()}))
        lowest = plan.edits[0].index
        assert graph == [index >= lowest for index in range(4)]
    assert calls[False] == [1, 1, 1, 1]
    assert calls[True] == [2 if index >= lowest else 1 for index in range(4)]
    (loss, gradients), (other_loss, other) = found
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other[name]) for name in gradients)


def test_a_family_without_checkpointing_says_so(tmp_path: Path) -> None:
    plan = compressed("prune", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"finetune\.gradient_checkpointing=false"):
        training(model, plan, tmp_path, gradient_checkpointing=True)


def test_bfloat16_computes_in_it_and_trains_in_float32(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = load(tmp_path / "compressed", dtype="float32" if dtype == "float32" else "auto")
        trained = training(model, plan, tmp_path, dtype=dtype, gates=True)
        seen = set()
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda m, a, output, seen=seen: seen.add(output.dtype))
        trained.run()
        assert seen == {getattr(torch, dtype)}
        assert {p.dtype for p in trained.trainable.values()} == {torch.float32}
        losses[dtype] = [row["loss"] for row in steps_of(tmp_path)]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_the_stage_is_remembered_by_text_not_by_path(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    planned = tmp_path / "planned"
    planned.mkdir()
    (planned / "plan.json").write_text(plan.to_text())
    store, recipe = Store(tmp_path / "store"), recipe_of(gates=True)
    tokens = {"lm/data": samples(1, 8), "lm/validation": samples(2, 4), "held_out": samples(5, 2)}

    def run(path: str, **changes: Tokens) -> Artifact:
        options = {"gates": True, "phases": {"lm": {"data": {"files": [path]}}, "sft": None}}
        artifact = Artifact("plan", "key", planned, True, 0.0)
        dense = Checkpoint(tmp_path / "compressed", "float32")
        given = tokens | {name.replace("_", "/", 1): part for name, part in changes.items()}
        return finetune.finetune(
            store, dense, artifact, recipe, options, given, seed=0, compute=Compute("cpu")
        )

    first = run("here.jsonl")
    assert not first.cached
    files = {path.name for path in first.folder.iterdir()}
    assert files == {"checkpoint", "form.json", "curve.jsonl", "trainable.json", "artifact.json"}
    tuned = load_file(first.folder / "checkpoint" / "model.safetensors")
    assert tuned.keys() == load_file(tmp_path / "compressed" / "model.safetensors").keys()
    assert run("there.jsonl").key == first.key
    assert run("here.jsonl", heldout=samples(6, 2)).key == first.key
    assert run("here.jsonl", lm_data=samples(7, 8)).key != first.key
    recorder = RunReport({}, tmp_path)
    recorder.add_checkpoints(
        {
            "dense": Checkpoint(tmp_path / "source"),
            "finetuned": Checkpoint(first.folder / "checkpoint"),
        }
    )
    dense = load(tmp_path / "source").num_parameters()
    number = 2 * 3 * 32 * 56 + 5
    assert recorder.report["finetuned/trainable_parameters"] == number
    assert recorder.report["finetuned/trainable_share"] == number / dense
    assert recorder.report["finetune/lm/data"] == "the standard library's train split"


def test_the_report_line_counts_what_trains(tmp_path: Path, caplog) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    total = sum(parameter.numel() for parameter in model.parameters())
    with caplog.at_level(logging.INFO):
        training(model, plan, tmp_path).run()
    number = 2 * 3 * 32 * 56
    share = f"{100 * number / total:.2f} %"
    assert f"fine-tuning trains {number:,} of {total:,} parameters ({share})" in caplog.text


def test_the_card_names_the_splits_that_were_seen() -> None:
    """Supervised sets hold the training splits of the tasks that they are later measured on."""
    seen = {"finetune/lm/data": "C4 (train)", "finetune/sft/data": "ARC (train), BoolQ (train)"}
    report = {"finetuned/stock": True, "method": "condense", "model": "m", "commit": "c"} | seen
    report |= {"fingerprint/model": "1", "fingerprint/data": "2", "finetune/lm/validation": "C4"}
    config = dict.fromkeys(("model", "calibration", "method", "finetune", "seed"))
    made = model_card("finetuned", report, config, "")
    assert "- lm: C4 (train)\n- sft: ARC (train), BoolQ (train)\n\n```python" in made
    report["compressed/stock"] = True
    assert "C4" not in model_card("compressed", report, config, "")


def test_divergence_is_reported_with_the_way_out(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"lower finetune\.phases\.lm\.learning_rate"):
        training(model, plan, tmp_path).run()


PROCESS = """
import sys
from pathlib import Path
import torch
import test_finetune as t
torch.set_num_threads(1)
t.train_one(Path(sys.argv[1]))
"""


def train_one(folder: Path) -> torch.Tensor:
    """Train through both phases what lies in the folder's parent; what a layer became."""
    edits = json.loads((folder.parent / "edits.json").read_text())
    plan = Plan(tuple(Edit.from_json(values) for values in edits))
    model = load(folder.parent / "compressed", dtype="float32")
    done = training(model, plan, folder, supervised=True)
    done.run()
    if done.processes.is_main_process:
        torch.save(model.model.layers[1].mlp.down_proj.weight, folder / "weight.pt")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Started as torchrun does it: the same steps, each process on its half of every batch."""
    plan = compressed("condense", tmp_path)
    (tmp_path / "edits.json").write_text(json.dumps([edit.to_json() for edit in plan.edits]))
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    started = start_two(PROCESS, str(two))
    train_one(one)
    assert [process.wait(timeout=500) for process in started] == [0, 0]
    losses, others = ([row["loss"] for row in steps_of(folder)] for folder in (one, two))
    assert others == pytest.approx(losses, rel=1e-4)
    assert len(rows_of(one)) == len(rows_of(two)) == 14
    weight, other = (torch.load(folder / "weight.pt") for folder in (one, two))
    # Adam amplifies the rounding of gradients near 0 to a step's size; few are.
    difference = (weight - other).abs()
    assert difference.mean() < 1e-5 < (weight.std() / 100)


# --------------------------------------------------------------------------- refusals


WRONG = {
    "epochs": ({"epochs": 0}, r"finetune.phases.lm.epochs=0: .* at least 1"),
    "batch": ({"batch_size": -2}, r"finetune.phases.lm.batch_size=-2: .* at least 1"),
    "accumulation": ({"gradient_accumulation": 0}, r"phases.lm.gradient_accumulation=0"),
    "rate": ({"learning_rate": 0.0}, r"finetune.phases.lm.learning_rate=0.0: .* above 0"),
    "schedule": ({"schedule": "step"}, r"schedule=step: there are linear, cosine, constant"),
    "warm-up": ({"warmup_ratio": 1.5}, r"warmup_ratio=1.5: .* from 0 to 1"),
    "decay": ({"weight_decay": -1.0}, r"weight_decay=-1.0: .* at least 0"),
    "clip": ({"gradient_clip": 0.0}, r"finetune.gradient_clip=0.0: .* above 0"),
    "validation": ({"validate_every": 0}, r"finetune.validate_every=0: .* at least 1"),
    "dtype": ({"dtype": "int8"}, r"finetune.dtype=int8: there are float32, bfloat16"),
    "nothing": ({"experts": False}, r"trains nothing.*finetune=none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_recipes_are_refused(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        recipe_of(**changes)


@pytest.mark.parametrize("phases", [{}, None, {"lm": None}])
def test_a_recipe_without_phases_is_refused(phases: dict | None) -> None:
    with pytest.raises(UserError, match=r"finetune.phases is empty.*finetune=none"):
        Experts(phases=phases)


def test_a_phase_may_count_in_steps(tmp_path: Path) -> None:
    """More than an epoch has: then every epoch has its own order, as with epochs."""
    assert [Phase(None, epochs=3, batch_size=4).steps(n) for n in (4, 5)] == [3, 6]
    assert Phase(None, epochs=3, batch_size=4, num_steps=7).steps(1000) == 7
    found = []
    for options in ({"epochs": 2}, {"num_steps": 2 * 3}):
        plan = compressed("prune", tmp_path)
        model = load(tmp_path / "compressed", dtype="float32")
        (folder := tmp_path / str(len(found))).mkdir()
        trained = training(model, plan, folder, batch_size=8, **options)
        trained.run()
        found.append((trained.done, model.state_dict()))
    (steps, weights), (other_steps, others) = found
    assert steps == other_steps
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_a_phase_can_be_left_out() -> None:
    assert list(Experts(phases={"lm": None, "sft": Phase(None)}).phases) == ["sft"]


def test_a_plan_in_which_nothing_can_train_is_refused() -> None:
    model = tiny_model("qwen2_moe")
    prune = Edit(1, "model.layers.1.mlp", "prune", kept=(0, 1, 2))
    block = Edit(2, "model.layers.2", "drop_block")
    for recipe, edits, message in (
        (recipe_of(), (), "it changes nothing"),
        (recipe_of(), (Edit(1, "model.layers.1.mlp", "keep"),), "it changes nothing"),
        (recipe_of(), (block,), r"edits none so \(drop_block\): finetune=none"),
        (recipe_of(), (prune, block), "drops whole layers and edits others"),
        (recipe_of(gates=True, experts=False), (prune,), "this plan condenses none"),
    ):
        with pytest.raises(UserError, match=message):
            recipe.prepare(model, Plan(edits))
