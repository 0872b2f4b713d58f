"""Distillation from the intact model: the teacher on disk, the loss, the recipes that use it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_killed, start_two
from families import COMMON, FAMILIES, tiny_batch, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig

from moe_lab.compute import Compute
from moe_lab.data.embedded import StandardLibrary
from moe_lab.data.tokens import IGNORED, Tokens
from moe_lab.finetune import teacher
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.experts import Experts
from moe_lab.finetune.recipe import Phase
from moe_lab.finetune.router_kd import RouterKD
from moe_lab.finetune.teacher import IDS, LOG_PROBABILITIES, Teacher
from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.editing import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import Edit, Plan, UserError

KEPT = {1: (0, 1, 2, 5), 2: (3, 4, 6, 7), 3: (0, 2, 4, 6)}
COMPUTE = Compute("cpu", batch_size=4)


def samples(seed: int, count: int, prompts: bool = False) -> Tokens:
    """Samples of 4 to 10 tokens, the last one twice, with `prompts` 1 to 3 of which are given."""
    batch = tiny_batch(seed=seed, batch=count, padding=False)
    rows = [tuple(row[: 4 + i % 7].tolist()) for i, row in enumerate(batch["input_ids"])]
    rows[0] = rows[-1]
    given = tuple(1 + i % 3 for i in range(count)) if prompts else ()
    return Tokens(tuple(rows), pad_id=0, prompts=given)


TEXTS = {
    "lm/data": samples(1, 24),
    "lm/validation": samples(2, 6),
    "sft/data": samples(3, 10, prompts=True),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense/, pruned/ and its plan.json, and the dense model's teachers by their options."""
    folder = tmp_path_factory.mktemp("distillation")
    model = tiny_model("qwen2_moe")
    model.save_pretrained(folder / "dense")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    plan = Plan(tuple(Edit(index, names[index], "prune", kept=KEPT[index]) for index in KEPT))
    apply_plan(model, plan)
    save_checkpoint(model, folder / "pruned", folder / "dense")
    (folder / "plan.json").write_text(plan.to_text())
    for name, top_k, temperature in (("whole", None, 1.0), ("few", 8, 1.0), ("warm", 8, 2.0)):
        teach(folder, name, top_k, temperature)
    return folder


def teach(home: Path, name: str, top_k: int | None, temperature: float, **compute: object) -> None:
    (home / name).mkdir()
    dense = Checkpoint(home / "dense", "float32")
    how = dataclasses.replace(COMPUTE, **compute)
    teacher.write_teacher(dense, list(TEXTS.values()), top_k, temperature, how, home / name)


def reading(home: Path, name: str) -> Teacher:
    return Teacher(home / name, TEXTS.values())


def slow_rows(model: torch.nn.Module, tokens: Tokens, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / T) of all targets, one sample at a time and in float64."""
    rows = []
    prompts = tokens.prompts or (1,) * len(tokens.samples)
    with torch.no_grad():
        for ids, prompt in zip(tokens.samples, prompts, strict=True):
            logits = model(torch.tensor([ids])).logits[0].double()
            rows += [logits[at - 1] / temperature for at in range(prompt, len(ids))]
    return torch.stack(rows).log_softmax(-1)


# --------------------------------------------------------------------------- the teacher on disk


@pytest.mark.parametrize("text", TEXTS)
def test_the_teacher_is_the_intact_model(text: str, home: Path) -> None:
    """In any order, and without what is no target: each row against one sample's own forward."""
    tokens = TEXTS[text].shuffled(5)
    exact = slow_rows(load(home / "dense"), tokens)
    assert len(exact) == tokens.num_targets
    whole = reading(home, "whole").of(tokens)
    assert whole.keys() == {LOG_PROBABILITIES}
    torch.testing.assert_close(whole[LOG_PROBABILITIES].double(), exact, rtol=0, atol=1e-5)
    for name, temperature in (("few", 1.0), ("warm", 2.0)):
        exact = slow_rows(load(home / "dense"), tokens, temperature)
        found = reading(home, name).of(tokens)
        assert found[IDS].dtype == torch.int32
        for row, (ids, kept) in enumerate(zip(found[IDS], found[LOG_PROBABILITIES], strict=True)):
            order = sorted(range(96), key=lambda token: -exact[row, token].item())
            assert set(ids.tolist()) == set(order[:8])
            expected = [exact[row, token].item() for token in ids.tolist()]
            others = math.log(sum(exact[row, token].exp().item() for token in order[8:]))
            assert kept.tolist() == pytest.approx([*expected, others], abs=1e-5)


def test_shards_batches_and_layers_change_nothing(home: Path, monkeypatch) -> None:
    """Many small files, one row at a time, other batches, and one layer in memory at a time."""
    monkeypatch.setattr(teacher, "SHARD_BYTES", 1500)
    monkeypatch.setattr(teacher, "CHUNK_VALUES", 3 * 96)
    for name, compute in (("single", {"batch_size": 1}), ("layerwise", {"layerwise": True})):
        teach(home, name, 8, 1.0, **compute)
        files = list((home / name).glob("*.safetensors"))
        assert len(files) > 5 and max(file.stat().st_size for file in files) < 2500
        turned = Teacher(home / name, list(TEXTS.values())[::-1])
        for tokens in TEXTS.values():
            expected, found = reading(home, "few").of(tokens), turned.of(tokens)
            order = [rows[IDS].sort(dim=1) for rows in (expected, found)]
            assert torch.equal(order[0].values, order[1].values)
            a, b = (
                rows[LOG_PROBABILITIES].gather(1, sort.indices)
                for rows, sort in zip((expected, found), order, strict=True)
            )
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_sample_without_targets_has_no_rows(home: Path, tmp_path: Path) -> None:
    tokens = Tokens(((5,), (5, 6, 7), (8, 9)), pad_id=0, prompts=(1, 2, 2))
    dense = Checkpoint(home / "dense", "float32")
    teacher.write_teacher(dense, [tokens], 4, 1.0, COMPUTE, tmp_path)
    found = Teacher(tmp_path, [tokens])
    assert [len(found.of(tokens.take([i]))[IDS]) for i in range(3)] == [0, 1, 0]
    assert len(found.of(tokens)[LOG_PROBABILITIES]) == 1
    size = (tmp_path / "0.safetensors").stat().st_size
    assert 0 <= size - teacher.teacher_bytes([tokens], 96, 4) < 300


# --------------------------------------------------------------------------- the loss


def rows_of_two(number: int = 7, vocabulary: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, number, vocabulary, generator=generator) * 3
    return both[0], both[1].requires_grad_()


def taught(logits: torch.Tensor, top_k: int | None, temperature: float) -> dict[str, torch.Tensor]:
    ids = None if top_k is None else logits.topk(top_k).indices
    found = {LOG_PROBABILITIES: teacher.coarsened(logits, ids, temperature)}
    return found if ids is None else found | {IDS: ids.int()}


def slow_divergence(p_logits: list, q_logits: list, top_k: int | None, temperature: float) -> float:
    """T^2 KL of one row, class by class in Python."""

    def shares(logits: list) -> list[float]:
        exponentials = [math.exp(value / temperature) for value in logits]
        return [value / sum(exponentials) for value in exponentials]

    p, q = shares(p_logits), shares(q_logits)
    if top_k is not None:
        order = sorted(range(len(p)), key=lambda token: -p[token])
        kept, rest = order[:top_k], order[top_k:]
        p, q = ([one[i] for i in kept] + [sum(one[i] for i in rest)] for one in (p, q))
    total = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 11])
def test_the_divergence_is_the_formula(top_k: int | None, temperature: float) -> None:
    p_logits, q_logits = rows_of_two()
    known = taught(p_logits, top_k, temperature)
    found = teacher.divergence(known, q_logits, temperature)
    for row, value in enumerate(found.tolist()):
        p, q = p_logits[row].tolist(), q_logits[row].tolist()
        assert value == pytest.approx(slow_divergence(p, q, top_k, temperature), abs=1e-5)
    assert torch.equal(teacher.divergence(known, p_logits, temperature), torch.zeros(len(p_logits)))
    exact = F.kl_div(
        (q_logits / temperature).log_softmax(-1), (p_logits / temperature).log_softmax(-1),
        reduction="none", log_target=True,
    ).sum(-1) * temperature**2  # fmt: skip
    assert (found >= 0).all() and (found <= exact + 1e-5).all()
    if top_k in (None, 11):  # one token left over is a class of its own
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), q_logits, retain_graph=True)
        (expected,) = torch.autograd.grad(exact.sum(), q_logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    else:
        assert (found < exact - 1e-4).all()


def test_the_divergence_has_the_gradient_of_its_value() -> None:
    p_logits, q_logits = (rows.detach().double() for rows in rows_of_two())
    for top_k in (None, 1, 4):
        known = taught(p_logits, top_k, 2.0)
        q_logits.requires_grad_(True)
        assert torch.autograd.gradcheck(
            lambda q, known=known: teacher.divergence(known, q, 2.0), q_logits
        )


def test_the_others_are_told_apart_from_nothing() -> None:
    """A student that puts all its probability on tokens that the teacher does not name is far."""
    p_logits = torch.tensor([[4.0, 3.0, 0.0, 0.0]])
    far = torch.tensor([[0.0, 0.0, 60.0, 0.0]])
    assert teacher.divergence(taught(p_logits, 2, 1.0), far, 1.0).item() > 40
    certain = torch.tensor([[200.0, 0.0, 0.0, 0.0]])  # the others have probability 0 in float32
    assert torch.isfinite(teacher.divergence(taught(certain, 1, 1.0), far, 1.0)).all()


# --------------------------------------------------------------------------- training with it


def recipe_of(kind: type = Experts, supervised: bool = True, **changes: object):
    """A small recipe; changes: of the recipe, and of the phase `lm`."""
    names = {field.name for field in dataclasses.fields(kind)}
    ours = {key: value for key, value in changes.items() if key in names}
    rest = {key: value for key, value in changes.items() if key not in names}
    text = dict(data=StandardLibrary(24, 10), validation=StandardLibrary(6, 10, split="validation"))
    phases = {"lm": Phase(**(text | dict(batch_size=4, learning_rate=1e-2) | rest))}
    if supervised:
        phases["sft"] = Phase(
            data=StandardLibrary(10, 10), batch_size=2, gradient_accumulation=2, learning_rate=5e-3
        )
    return kind(phases=phases, **(dict(validate_every=3, teacher_top_k=8) | ours))


def training(
    home: Path, folder: Path, known: str | None, **changes: object
) -> finetune_training.Training:
    """A training of the pruned model that begins when it is run."""
    plan = Plan.load(home / "plan.json")
    model = load(home / "pruned", dtype="float32")
    known_by = reading(home, known) if known else None
    recipe = recipe_of(**changes)
    return finetune_training.Training(model, plan, recipe, TEXTS, 0, COMPUTE, folder, known_by)


def curve(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "curve.jsonl").read_text().splitlines()]


def divergence_of(home: Path, model: torch.nn.Module, tokens: Tokens) -> float:
    """The mean exact KL(intact || model) over the targets."""
    p, q = slow_rows(load(home / "dense"), tokens), slow_rows(model, tokens)
    return (p.exp() * (p - q)).sum().item() / len(p)


def test_only_routers_move_and_come_nearer(home: Path, tmp_path: Path) -> None:
    before = divergence_of(home, load(home / "pruned", dtype="float32"), TEXTS["lm/data"])
    done = training(home, tmp_path, "whole", kind=RouterKD, supervised=False, epochs=8)
    frozen = {name: value.clone() for name, value in done.model.state_dict().items()}
    done.run()
    moved = {n for n, value in done.model.state_dict().items() if not torch.equal(value, frozen[n])}
    assert moved == {f"model.layers.{index}.mlp.gate.weight" for index in KEPT}
    assert moved == set(json.loads((tmp_path / "trainable.json").read_text())["tensors"])
    start, *rows = curve(tmp_path)
    assert start.keys() == {"phase", "step", "validation_loss", "validation_distillation"}
    assert {"loss", "distillation", "gradient_norm"} <= rows[0].keys()
    after = divergence_of(home, done.model, TEXTS["lm/data"])
    assert after < 0.8 * before
    # What the curve says is what was measured, also of text that it did not train on.
    held = divergence_of(home, done.model, TEXTS["lm/validation"])
    assert rows[-1]["validation_distillation"] == pytest.approx(held, rel=1e-4)
    surprise = -slow_rows(done.model, TEXTS["lm/validation"])
    targets = [token for sample in TEXTS["lm/validation"].samples for token in sample[1:]]
    mean = surprise[range(len(targets)), targets].mean().item()
    assert rows[-1]["validation_loss"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(("share", "temperature"), [(0.3, 1.0), (1.0, 1.0), (0.5, 2.0)])
def test_the_gradient_is_that_of_the_shared_loss(
    share: float, temperature: float, home: Path, tmp_path: Path
) -> None:
    """Against a plain forward over each sample, without a teacher on disk."""
    known = "warm" if temperature == 2 else "whole"
    options = {"distillation": share, "temperature": temperature}
    done = training(home, tmp_path, known, teacher_top_k=8, **options)
    rows = TEXTS["sft/data"].take(range(6))
    found = done._backward(rows, 3)
    gradients = {name: p.grad.clone() for name, p in done.trainable.items()}
    for parameter in done.trainable.values():
        parameter.grad = None
    p, loss, apart, at = slow_rows(load(home / "dense"), rows, temperature), 0.0, 0.0, 0
    for ids, prompt in zip(rows.samples, rows.prompts, strict=True):
        logits = done.model(torch.tensor([ids])).logits[0]
        for position in range(prompt, len(ids)):
            row, p_row, at = logits[position - 1].double(), p[at].exp(), at + 1
            loss = loss - row.log_softmax(-1)[ids[position]]
            q_row = (row / temperature).softmax(-1)
            if known == "warm":
                kept = p_row.topk(8).indices
                rest = [one.sum() - one[kept].sum() for one in (p_row, q_row)]
                p_row = torch.cat([p_row[kept], rest[0][None]])
                q_row = torch.cat([q_row[kept], rest[1][None]])
            apart = apart + temperature**2 * (p_row * (p_row / q_row).log()).sum()
    (((1 - share) * loss + share * apart) / at).backward()
    assert found["loss"].item() == pytest.approx(loss.item() / at, rel=1e-5)
    assert found["distillation"].item() == pytest.approx(apart.item() / at, rel=1e-4)
    for name, parameter in done.trainable.items():
        error = (gradients[name] - parameter.grad).abs().max()
        assert error <= 1e-4 * parameter.grad.abs().max(), name


def test_accumulated_gradients_are_the_large_batch(home: Path, tmp_path: Path) -> None:
    found = []
    for size in (16, 4, 3):
        done = training(home, tmp_path, "few", distillation=0.5)
        losses = done._backward(TEXTS["lm/data"].take(range(16)), size)
        found.append((losses, {name: p.grad for name, p in done.trainable.items()}))
    (losses, gradients), *others = found
    for other_losses, other in others:
        for name in ("loss", "distillation"):
            assert other_losses[name].item() == pytest.approx(losses[name].item(), rel=1e-6)
        for name, gradient in gradients.items():
            error = (other[name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), name


def test_without_distillation_nothing_is_different(home: Path, tmp_path: Path) -> None:
    done = training(home, tmp_path, None, distillation=0.0)
    done.run()
    assert done.tuning.weights == {}
    assert not [key for row in curve(tmp_path) for key in row if "distillation" in key]


def test_resumed_equals_uninterrupted(home: Path, tmp_path: Path, monkeypatch) -> None:
    """To the bit, with a step after the last saved state, and through both phases."""
    results = []
    for name, stop in (("whole", None), ("stopped", 5)):
        (folder := tmp_path / name).mkdir()
        if stop:
            first = training(home, folder, "few", distillation=0.5)
            run_killed(first, stop, save_every=4, monkeypatch=monkeypatch)
            assert int(load_file(folder / finetune_training.STATE)["done"]) == 4
        done = training(home, folder, "few", distillation=0.5)
        done.run()
        results.append((done.model.state_dict(), (folder / "curve.jsonl").read_text()))
    (whole, text), (resumed, resumed_text) = results
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert text == resumed_text
    assert len(text.splitlines()) == 1 + 6 + 1 + 3


PROCESS = """
import sys
from pathlib import Path
import torch
import test_distillation as t
torch.set_num_threads(1)
t.train_one(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def train_one(home: Path, folder: Path) -> None:
    """Distil through both phases; what the routers became."""
    done = training(home, folder, "few", kind=RouterKD)
    done.run()
    if done.processes.is_main_process:
        torch.save({name: p.detach() for name, p in done.trainable.items()}, folder / "routers.pt")


def test_two_processes_train_as_one(home: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    started = start_two(PROCESS, str(home), str(two))
    train_one(home, one)
    assert [process.wait(timeout=500) for process in started] == [0, 0]
    rows, others = curve(one), curve(two)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for key in ("loss", "distillation", "validation_distillation"):
        values, found = ([row[key] for row in found if key in row] for found in (rows, others))
        assert found == pytest.approx(values, rel=1e-4) and len(values) > 1
    routers, found = (torch.load(folder / "routers.pt") for folder in (one, two))
    for name in routers:  # Adam amplifies the rounding of gradients near 0 to a step's size
        assert (routers[name] - found[name]).abs().mean() < 1e-4 * routers[name].std()


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_every_family_train(family: str, tmp_path: Path) -> None:
    """Every router gets a gradient, and correction biases, which choose alone, stay."""
    dense = tiny_model(family)
    model = tiny_model(family)
    groups = moe_layers(model)[0].info.groups
    kept = (0, 1, 2, 4, 5, 6) if groups > 1 else (0, 1, 3, 4, 6)
    edits = [Edit(one.info.index, one.info.name, "prune", kept=kept) for one in moe_layers(model)]
    apply_plan(model, plan := Plan(tuple(edits[:1])))
    tuning = recipe_of(RouterKD).prepare(model.requires_grad_(False), plan)
    routers = [one.router for one in moe_layers(model)]
    assert len(tuning.trainable) >= len(routers) == len(edits)
    assert all("bias" not in name or family == "gpt_oss" for name in tuning.trainable)
    for parameter in tuning.trainable.values():
        parameter.requires_grad_(True)
    batch = TEXTS["lm/data"].take(range(6)).labelled()
    with torch.no_grad():
        logits = dense(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
        targets = batch["labels"][:, 1:] != IGNORED
        batch |= taught(logits[:, :-1][targets], 8, 1.0)
    losses = tuning.losses(batch)
    losses["distillation"].backward()
    assert losses["distillation"] > 0
    for name, parameter in tuning.trainable.items():
        assert parameter.grad.abs().max() > 0, name


def test_a_correction_bias_that_is_a_parameter_does_not_train() -> None:
    """Most families have it as a buffer; ernie4_5_moe keeps a parameter, inside the router."""
    numbers = dict(moe_num_experts=8, moe_k=2, moe_intermediate_size=16, intermediate_size=48)
    model = meta_model(AutoConfig.for_model("ernie4_5_moe", **COMMON, **numbers))
    routers = [layer.router for layer in moe_layers(model)]
    inside = [name for router in routers for name, _ in router.named_parameters()]
    assert len(inside) == 2 * len(routers) and any("correction_bias" in name for name in inside)
    trainable = recipe_of(RouterKD).prepare(model, Plan(())).trainable
    assert {name.rpartition(".mlp.")[2] for name in trainable} == {"gate.weight"}
    assert len(trainable) == len(routers)


def test_routers_learn_whatever_their_rows_lead_to(home: Path, tmp_path: Path) -> None:
    """Layers of different sizes, stand-ins and merged experts: a checkpoint in our own form."""
    model = load(home / "dense")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    groups = ((0, 1, 2), (3, 4, 5), (6, 7))
    merged = dict(kept=(0, 3, 6), groups=groups, weights=((1 / 3,) * 3, (1 / 3,) * 3, (0.5, 0.5)))
    edits = (
        Edit(1, names[1], "prune", kept=(0, 1, 2, 5, 7)),
        Edit(2, names[2], "prune", kept=(3, 4, 6), replacement="constant"),
        Edit(3, names[3], "merge", router="all", align="none", **merged),
    )
    plan = Plan(edits, tensors={"layers.2.constants": torch.linspace(-1, 1, 160).view(5, 32)})
    apply_plan(model, plan)
    save_checkpoint(model, tmp_path / "own", home / "dense")
    for kind in ({"kind": RouterKD}, {"distillation": 1.0}):
        model = load(tmp_path / "own", dtype="float32")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        recipe = recipe_of(**kind, supervised=False, epochs=6, learning_rate=3e-3)
        folder = tmp_path / type(recipe).__name__
        folder.mkdir()
        given = plan, recipe, TEXTS, 0, COMPUTE, folder, reading(home, "few")
        finetune_training.Training(model, *given).run()
        found = [row["distillation"] for row in curve(folder) if "distillation" in row]
        assert sum(found[-6:]) < 0.9 * sum(found[:6]), "the last epoch against the first"
        save_checkpoint(model, folder / "saved", tmp_path / "own")
        after = load(folder / "saved", dtype="float32").state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        routers = {name for name in before if name.endswith("mlp.gate.weight")}
        if isinstance(recipe, RouterKD):
            assert moved == routers and len(routers) == 3
            assert [len(after[name]) for name in sorted(routers)] == [5, 8, 8]
        else:
            assert moved.isdisjoint(routers) and "model.layers.2.mlp.experts.constants" in moved


# --------------------------------------------------------------------------- whole jobs


FEW = [
    "metric=reap", "ratio.ratio=0.5", "finetune=router_kd", "finetune.teacher_top_k=16",
    "finetune.phases.lm.data.num_samples=16", "finetune.phases.lm.data.max_length=24",
    "finetune.phases.lm.validation.num_samples=4", "finetune.phases.lm.validation.max_length=24",
    "finetune.phases.lm.batch_size=4",
]  # fmt: skip


def test_one_teacher_for_all_jobs(job) -> None:
    first = job(*FEW)
    assert first.code == 0, first.text
    assert first.report["cached/teacher"] is False and first.report["seconds/teacher"] > 0
    assert first.report["finetune/temperature"] == 1.0
    second = job(*FEW, "ratio.ratio=0.25", "finetune.phases.lm.learning_rate=1e-3")
    third = job(*FEW, "finetune=experts", "finetune.distillation=0.5")
    for other in (second, third):
        assert other.code == 0, other.text
        assert other.report["cached/teacher"] is True and other.report["cached/finetune"] is False
    assert third.report["finetune/distillation"] == 0.5
    plain = job(*FEW, "finetune=experts")
    assert plain.code == 0 and "cached/teacher" not in plain.report
    warm = job(*FEW, "finetune.temperature=2")
    assert warm.report["cached/teacher"] is False
    assert len(list((first.store / "teacher").glob("*/artifact.json"))) == 2


def test_a_disk_without_room_is_found_out_before_any_work(job, monkeypatch) -> None:
    room = shutil.disk_usage("/")._replace(free=4 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    outcome = job(*FEW, "finetune.teacher_top_k=null", "finetune.phases.lm.data.num_samples=512")
    assert outcome.code == 2 and not outcome.stages()
    for words in ("finetune.teacher_top_k=None keeps 259", "has 0.00 GiB free", "fewer prob"):
        assert words in outcome.text


def test_what_cannot_be_is_refused(job, tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1, vocab_size=259)
    model.save_pretrained(tmp_path / "one")
    for options, words in (
        (["method=drop_layers", "condense.num_layers=3"], ["MoE layers", "the plan leaves none"]),
        (["finetune.temperature=0"], ["finetune.temperature=0", "above 0"]),
        (["finetune.teacher_top_k=0"], ["finetune.teacher_top_k=0", "at least 1, or null"]),
        (["finetune=experts", "finetune.distillation=1.5"], ["=1.5", "from 0", "to 1"]),
    ):
        outcome = job(*FEW, *options)
        assert outcome.code == 2 and not outcome.stages(), outcome.text
        assert all(word in outcome.text for word in words), outcome.text
    always_one = Checkpoint(tmp_path / "one")
    with pytest.raises(UserError, match=r"always 1.*finetune\.distillation=1"):
        recipe_of(RouterKD).check_model(always_one.config, always_one.layers())
    two = tiny_model("mixtral").config
    recipe_of(RouterKD).check_model(two, [one.info for one in moe_layers(meta_model(two))])
    outcome = job(*FEW, "method=none")  # nothing to learn: the intact model is the teacher
    assert outcome.code == 0 and "seconds/finetune" not in outcome.report
