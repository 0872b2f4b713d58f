"""The stages of a run; each says what its result depends on and makes its folder.

Here is what the pipeline needs between them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe_lab import diagnosis, report
from moe_lab.checkpoint import Checkpoint, meta_model
from moe_lab.editing import apply_plan
from moe_lab.finetune import sources
from moe_lab.moe import moe_layers, num_parameters
from moe_lab.routing import set_top_k
from moe_lab.store import Artifact
from moe_lab.sums import LayerStatistics
from moe_lab.tokens import Tokens
from moe_lab.types import LayerInfo, Plan, UserError

CURVE, USAGE = "curve.jsonl", "usage.csv"


def tokenize(parts: dict[str, Any], tokenizer: Any) -> dict[str, Tokens]:
    """All text of a run: calibration, and where they are asked for <phase>/data, held_out."""
    _check_groups(parts)
    texts = {"calibration": parts["calibration"]}
    if parts["finetune"]:
        texts |= sources(parts["finetune"].phases)
    if parts["eval"] and parts["eval"].held_out:
        texts["held_out"] = parts["eval"].held_out
    if parts["eval"]:
        parts["eval"].check()
    found = {name: _tokens(name, source, tokenizer) for name, source in texts.items()}
    if parts["eval"] and found["calibration"].groups:
        parts["eval"].check_groups(list(found["calibration"].by_group()))
    return found


def _check_groups(parts: dict[str, Any]) -> None:
    """Refuse a plan for each group where the method makes one for all, or a tuning follows."""
    source = parts["calibration"]
    if source.group_by is None or source.group is not None:
        return
    asked = f"calibration.group_by={source.group_by} makes a plan for each group"
    one = "; for a single group's checkpoint name it: calibration.group=<value>"
    if not getattr(parts["method"], "takes_groups", False):
        raise UserError(
            f"{asked}, which only method=prune can do, with statistics of the intact model alone "
            f"and nothing in the place of the experts that go{one}"
        )
    if parts["finetune"]:
        raise UserError(
            f"{asked} and no checkpoint that could be fine-tuned: set finetune=none{one}"
        )
    if getattr(parts["eval"], "top_k", None):
        raise UserError(f"{asked}, evaluated with the model's own number of experts: leave out "
                        f"eval.top_k{one}")  # fmt: skip


def _tokens(name: str, source: Any, tokenizer: Any) -> Tokens:
    try:
        return source.tokens(tokenizer)
    except UserError as error:
        if "/" not in name:
            raise
        where = name.replace("/", ".")
        raise UserError(f"finetune.phases.{where}: {error}") from error


def publish_plan(planned: Artifact, folder: Path, found: dict[str, Any]) -> bool:
    """Put plan.json, and the groups' plans/, into the run's folder; found: what it rests on.

    True where plan.json changes anything: a plan for each group changes no checkpoint.
    """
    if (planned.folder / "plans").is_dir():
        shutil.copytree(planned.folder / "plans", folder / "plans", dirs_exist_ok=True)
    text = (planned.folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text)
    plan = Plan.load(folder / "plan.json")
    if "statistics" in plan.notes:
        found["statistics"] = plan.notes["statistics"]
    return bool(plan.edited())


def publish_usage(profiled: Artifact, folder: Path) -> None:
    """Put usage.csv into the run's folder: layer, expert, tokens, and usage, 1 being even."""
    rows = ["layer,expert,tokens,usage"]
    for values in json.loads((profiled.folder / "layers.json").read_text()):
        info = LayerInfo(**values)
        path = profiled.folder / f"layer_{info.index:03d}.safetensors"
        with safe_open(path, framework="pt") as file:  # two of the sums, of which some are large
            sums = {name: file.get_tensor(name) for name in ("count", "tokens")}
        usage = diagnosis.usage(LayerStatistics(info, sums))
        rows += [
            f"{info.index},{expert},{tokens:.0f},{share:.6g}"
            for expert, (tokens, share) in enumerate(
                zip(sums["count"].tolist(), usage.tolist(), strict=True)
            )
        ]
    (folder / USAGE).write_text("\n".join(rows) + "\n")


def checkpoint_of(artifact: Artifact, dense: Checkpoint) -> Checkpoint:
    """The checkpoint of a finished compress or finetune stage, known by the stage's key."""
    return Checkpoint(artifact.folder / "checkpoint", dense.dtype, artifact.key)


def with_top_k(
    variants: dict[str, Checkpoint], wanted: Sequence[int], suite: Any
) -> dict[str, Checkpoint]:
    """The variants, each followed by itself with other numbers of experts per token.

    Those are named <variant>_top_<k>. A variant that has fewer experts, or no MoE layer any more,
    has no such follower, nor has one with repeated experts, where a token's second would be its
    first once more; one that has that k as its own only where the suite names it, so that all can
    be compared.
    """
    named = getattr(suite, "top_k", None) or ()
    if not wanted:
        return variants
    found = {}
    for name, checkpoint in variants.items():
        found[name] = checkpoint
        layers = [layer.info for layer in moe_layers(meta_model(checkpoint.config))]
        for top_k in wanted if layers else ():
            own = top_k == layers[0].top_k
            possible = top_k <= _most_top_k(layers) and not checkpoint.repeats_experts
            if top_k in named if own else possible:
                found[f"{name}_top_{top_k}"] = replace(checkpoint, top_k=top_k)
    return found


def other_top_k(suite: Any, recipe: Any, config: Any, layers: Sequence[LayerInfo]) -> list[int]:
    """At which numbers of experts per token all variants are evaluated beside their own.

    Those that the suite names, else the one that the recipe ends with. UserError for impossible
    ones, and for a model of this config whose routers do not obey.
    """
    wanted = getattr(suite, "top_k", None)
    if wanted is None:
        wanted = [k] if (k := getattr(recipe, "top_k", None)) else []
    most = _most_top_k(layers)
    for top_k in wanted:
        if not 1 <= top_k <= most:
            raise UserError(f"eval.top_k={list(wanted)}: a token can get 1 to {most} experts")
        if top_k != layers[0].top_k:
            set_top_k(meta_model(config), top_k)
    return list(dict.fromkeys(wanted))


def _most_top_k(layers: Sequence[LayerInfo]) -> int:
    """The most experts per token: no layer has more within the groups that a token may use."""
    return min(info.num_experts // info.groups * info.groups_used for info in layers)


def _form(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a checkpoint was saved; nothing more than that it is stock where no stage of ours did."""
    file = checkpoint.path.parent / "form.json"
    return json.loads(file.read_text()) if file.is_file() else {"stock": True}


TOLD = ("used_expert_", "experts_alive")  # what recipes say of a whole training


class Recorder:
    """Writes what the stages found into a run's report, and the report into the run's folder."""

    def __init__(self, found: dict[str, Any], folder: Path):
        self.report, self.folder = found, folder

    def __call__(self, stage: str, artifact: Artifact) -> Artifact:
        """Note how long a stage took (when it was made), if it was there, and what it is.

        The report is written after each stage, so that a killed run tells how far it came.
        """
        self.report[f"seconds/{stage}"] = round(artifact.seconds, 3)
        self.report[f"cached/{stage}"] = artifact.cached
        self.report[f"artifact/{stage}"] = f"{artifact.kind}/{artifact.folder.name}"
        report.write(self.folder, self.report)
        return artifact

    def checkpoints(self, variants: dict[str, Checkpoint]) -> None:
        """Where each variant lies, whether stock transformers loads it, and what trained in it."""
        for name, checkpoint in variants.items():
            form = _form(checkpoint)
            self.report[f"{name}/checkpoint"] = str(checkpoint.path)
            self.report[f"{name}/stock"] = form["stock"]
            if form.get("repeated_parameters"):
                self.report[f"{name}/repeated_parameters"] = form["repeated_parameters"]
        if "finetuned" in variants:
            self._trained(variants["finetuned"].path.parent, variants["dense"])
            shutil.copy(variants["finetuned"].path.parent / CURVE, self.folder / CURVE)

    def _trained(self, folder: Path, dense: Checkpoint) -> None:
        """How many parameters trained, their share of the dense model's, and the text they saw.

        And from the curve's last row, which share of all tokens had a k-th expert, and the like.
        """
        trained = json.loads((folder / "trainable.json").read_text())
        total = num_parameters(meta_model(dense.config))
        self.report["finetuned/trainable_parameters"] = trained["parameters"]
        self.report["finetuned/trainable_share"] = trained["parameters"] / total
        for text, seen in trained["texts"].items():
            self.report[f"finetune/{text}"] = ", ".join(seen)
        last = json.loads((folder / "curve.jsonl").read_text().splitlines()[-1])
        found = {key: value for key, value in last.items() if key.startswith(TOLD)}
        self.report |= {f"finetune/{key}": value for key, value in found.items()}

    def groups(self, planned: Artifact, dense: Checkpoint) -> None:
        """The parameters that a group's experts and all else have, on average over the groups."""
        sizes = []
        for file in sorted((planned.folder / "plans").glob("*.json")):
            model = meta_model(dense.config)
            apply_plan(model, Plan.load(file))
            sizes.append(num_parameters(model))
        whole = num_parameters(meta_model(dense.config))
        self.report["compressed/parameters"] = sum(sizes) / len(sizes)
        self.report["compressed/parameter_ratio"] = sum(sizes) / len(sizes) / whole

    def evaluation(self, name: str, results: dict[str, float]) -> None:
        """The scores of one variant; without its entropy where experts are repeated in it.

        A repeated expert shares its probability with its twin: more entropy, and the same function.
        """
        if f"{name.partition('_top_')[0]}/repeated_parameters" in self.report:
            results = {key: value for key, value in results.items() if key != "routing/entropy"}
        for key, value in results.items():
            self.report[f"{name}/kl" if key == "kl" else f"{name}/eval/{key}"] = value
