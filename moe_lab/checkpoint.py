"""Checkpoints: finding, fingerprinting, loading and saving them.

A checkpoint is an ordinary Hugging Face folder. Where the family's own config can say an edited
structure, it is saved so and stock transformers loads it. Otherwise `config.json` carries it in
"moe_lab", and it is replayed on the model before the weights come in: `load(path)`, or plain
`from_pretrained(path)` after `import moe_lab`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moe_lab.moe import (
    COUNT_FIELDS,
    DenseMLP,
    MoELayer,
    check_kept,
    moe_layers,
    prune_layer,
    set_block,
)
from moe_lab.types import LayerInfo, UserError

SHIPPED = "shipped:"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")
DENSE_WIDTHS = ("dense_intermediate_size", "prefix_dense_intermediate_size", "intermediate_size")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    dtype: in which to compute ("auto" is the one it is stored in); known_fingerprint: what tells
    its content where that is known without reading it, as of the store's own checkpoints.
    """

    path: Path
    dtype: str = "auto"
    known_fingerprint: str | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex over the config and every byte of the weights."""
        if self.known_fingerprint:
            return self.known_fingerprint
        # Where it was loaded from and which version wrote it do not change what a model computes.
        ignored = ("_name_or_path", "transformers_version")
        config = json.loads((self.path / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in ignored}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for file in weight_files(self.path):
            digest.update(_sha256(file).encode())
        return digest.hexdigest()[:12]

    @functools.cached_property
    def config(self) -> Any:
        """Its config, as transformers reads it."""
        try:
            return AutoConfig.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}/config.json cannot be read: {error}") from error

    def layers(self) -> list[LayerInfo]:
        """Its MoE layers, found on a model without weights; UserError where it has none."""
        layers = [layer.info for layer in moe_layers(meta_model(self.config))]
        if not layers:
            raise UserError(
                f"{self.path} is not a Mixture-of-Experts model that moe_lab can read: its family "
                f"{self.config.model_type!r} has no experts modules of the common contract"
            )
        return layers

    def load(self, device: str = "cpu") -> PreTrainedModel:
        """The model with its weights, in evaluation mode."""
        return load(self.path, dtype=self.dtype, device=device)

    def tokenizer(self) -> Any:
        """Its tokenizer; UserError where it has none."""
        # Without any of these transformers makes an empty tokenizer, and says nothing.
        if not any(file for pattern in VOCABULARIES for file in self.path.glob(pattern)):
            raise UserError(f"{self.path} has no tokenizer: none of {', '.join(VOCABULARIES)}")
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer can be read from {self.path}: {error}") from error


def resolve(
    path: str | os.PathLike, revision: str | None = None, dtype: str = "auto"
) -> Checkpoint:
    """The checkpoint of a local folder, of a hub id (which is then downloaded), or "shipped:name".

    Raises UserError where there is none, files are missing, or the weights are not safetensors.
    """
    folder = Path(path).expanduser()
    if str(path).startswith(SHIPPED):
        home = Path(__file__).parent / "checkpoints"
        folder = home / str(path).removeprefix(SHIPPED)
        if not folder.is_dir():
            there = ", ".join(sorted(file.parent.name for file in home.glob("*/config.json")))
            raise UserError(f"model.path={path}: no such model is shipped; there are {there}")
    if not folder.is_dir():
        folder = _download(str(path), revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no checkpoint: config.json is missing")
    if dtype not in DTYPES:
        raise UserError(f"model.dtype={dtype} does not exist; there are {', '.join(DTYPES)}")
    for file in weight_files(folder):
        _check_readable(file)
    return Checkpoint(folder.resolve(), dtype)


def _download(name: str, revision: str | None) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model.path={name!r} is neither a folder here nor a hub id of the form owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = [*WEIGHTS, *TEXT_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds; each means: not to be had
        raise UserError(
            f"{name} is not a folder here, and the hub did not give it: {error}. Give a local "
            "folder with model.path=<folder>, or check the name, the network and HF_TOKEN"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; UserError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} cannot be read: {error!r}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files that its index names: "
                f"{', '.join(missing[:4])}"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = sorted(file.name for pattern in ("*.bin", "*.pt") for file in folder.glob(pattern))
        hint = f" (only {', '.join(other[:3])}: convert it to safetensors first)" if other else ""
        raise UserError(f"{folder} holds no *.safetensors weights{hint}")
    return files


def _check_readable(file: Path) -> None:
    """Refuse a corrupt or truncated file by its header, without reading its tensors."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is damaged or incomplete ({file.stat().st_size} bytes): {error}. Copy or "
            "download it again"
        ) from error


def size_in_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in weight_files(folder))


def _sha256(file: Path) -> str:
    # A hub cache names its blobs by their sha256: then nothing needs to be read.
    target = Path(os.path.realpath(file)).name
    if len(target) == 64 and set(target) <= set("0123456789abcdef"):
        return target
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def meta_model(config: Any) -> PreTrainedModel:
    """A model of this config without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def load(path: str | os.PathLike, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load a checkpoint that moe_lab or transformers wrote, in evaluation mode.

    Raises UserError where weights are missing or do not fit the config.
    """
    try:
        with _no_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"{path} lacks {len(names)} tensors that its config asks for, such as {names[0]}"
        )
    return model.to(device).eval()


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence transformers' own bars, which finish before anyone reads them."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# --------------------------------------------------------------------------- structure


def apply_structure(model: nn.Module, structure: dict[str, Any]) -> None:
    """Give a model without weights the layers that `config.moe_lab` lists; idempotent."""
    layers = {str(layer.info.index): layer for layer in moe_layers(model)}
    for index, wanted in structure["layers"].items():
        layer = layers.get(index)
        if layer is None:
            continue
        if "width" in wanted:
            dense = DenseMLP(layer.info.hidden_size, wanted["width"], layer.experts.act_fn)
            set_block(model, layer.info.name, dense)
        elif wanted["num_experts"] < layer.info.num_experts:
            prune_layer(layer, range(wanted["num_experts"]))


def save(model: PreTrainedModel, folder: Path, source: Path) -> bool:
    """Write an edited model as a checkpoint; True where stock transformers can load it.

    Parameters are written in the dtype of the checkpoint at `source`, whose tokenizer comes along.
    The model itself is not changed except for its dtype and config.
    """
    dense = {name: module for name, module in model.named_modules() if type(module) is DenseMLP}
    layers = moe_layers(model)
    original = AutoConfig.from_pretrained(source, local_files_only=True)
    model.config = _saved_config(model, original, layers, dense)
    native = getattr(model.config, "moe_lab", None) is None
    if dense and native:
        _make_native(model, dense)
    _to_stored_dtype(model, original.dtype)
    # A model that came from fused files would be written fused; engines want per-expert names.
    model._weight_conversions = None
    with _no_bars():
        model.save_pretrained(folder)
    _write_count_aliases(folder / "config.json", model.config)
    copy_text_files(source, folder)
    return native


def _saved_config(
    model: PreTrainedModel, original: Any, layers: list[MoELayer], dense: dict[str, DenseMLP]
) -> Any:
    counts = {layer.info.num_experts for layer in layers}
    uniform = copy.deepcopy(original)
    if hasattr(uniform, "moe_lab"):
        del uniform.moe_lab
    if len(counts) <= 1:
        for count in counts:
            set_num_experts(uniform, count)
        config = native_config(uniform, dense)
        if config is not None:
            return config
    ours = copy.deepcopy(original)
    ours.moe_lab = {"version": 1, "layers": {}}
    for layer in layers:
        ours.moe_lab["layers"][str(layer.info.index)] = {"num_experts": layer.info.num_experts}
    for name, module in dense.items():
        index = next(part for part in reversed(name.split(".")) if part.isdigit())
        ours.moe_lab["layers"][index] = {"width": module.gate_proj.out_features}
    return ours


def set_num_experts(config: Any, count: int) -> None:
    """Write the number of routed experts under each name that this config knows."""
    for field in COUNT_FIELDS:
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, count)


def native_config(config: Any, dense: dict[str, DenseMLP]) -> Any | None:
    """The config with which the family itself builds these dense layers, or None.

    Tried on a model without weights: every other layer must come out as it was.
    """
    if not dense:
        return config
    model = meta_model(config)
    moe = {layer.info.index for layer in moe_layers(model)}
    condensed = {int(next(p for p in reversed(n.split(".")) if p.isdigit())) for n in dense}
    all_dense = set(range(config.num_hidden_layers)) - moe | condensed
    wanted = copy.deepcopy(config)
    if not _list_dense(wanted, sorted(all_dense)):
        return None
    field = next((name for name in DENSE_WIDTHS if hasattr(wanted, name)), None)
    if field is None:
        return None
    width = max(module.gate_proj.out_features for module in dense.values())
    setattr(wanted, field, max(width, getattr(wanted, field) if len(all_dense - condensed) else 0))
    built = meta_model(wanted)
    if {layer.info.index for layer in moe_layers(built)} != moe - condensed:
        return None
    return wanted if all(_is_gated_mlp(built.get_submodule(name)) for name in dense) else None


def _list_dense(config: Any, dense: list[int]) -> bool:
    """Name the dense layers in whichever form this config has; False where it cannot."""
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = dense
    elif getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = [
            "dense" if index in dense else "sparse" for index in range(config.num_hidden_layers)
        ]
    elif hasattr(config, "first_k_dense_replace") and dense == list(range(len(dense))):
        config.first_k_dense_replace = len(dense)
    elif hasattr(config, "num_dense_layers") and dense == list(range(len(dense))):
        config.num_dense_layers = len(dense)
    else:
        return False
    return True


def _is_gated_mlp(module: nn.Module) -> bool:
    names = {"gate_proj", "up_proj", "down_proj"}
    return {name for name, _ in module.named_children() if name.endswith("proj")} == names


@torch.no_grad()
def _make_native(model: PreTrainedModel, dense: dict[str, DenseMLP]) -> None:
    """Replace our dense MLPs by the family's, zero-padded to its one width for dense layers."""
    built = meta_model(model.config)
    own = {n: m for n, m in built.named_modules() if _is_gated_mlp(m) and n in _dense_names(model)}
    for name, target in own.items():
        source = model.get_submodule(name)
        reference = source.gate_proj.weight
        target.to_empty(device=reference.device).to(reference.dtype)
        for parameter in target.parameters():
            parameter.zero_()
        for projection in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(source, projection).weight
            rows, columns = weight.shape
            getattr(target, projection).weight[:rows, :columns] = weight
            bias = getattr(getattr(source, projection), "bias", None)
            if bias is not None:
                getattr(target, projection).bias[:rows] = bias
        set_block(model, name, target)


def _dense_names(model: PreTrainedModel) -> set[str]:
    """Paths of the dense MLPs that stand where other decoder layers have their MoE block."""
    tails = {"mlp", "feed_forward", "mixer", "block_sparse_moe"}
    return {n for n, m in model.named_modules() if n.split(".")[-1] in tails and _is_gated_mlp(m)}


def _to_stored_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    kept = (model._keep_in_fp32_modules or set()) | (model._keep_in_fp32_modules_strict or set())
    for name, parameter in model.named_parameters():
        if dtype and parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _write_count_aliases(path: Path, config: Any) -> None:
    # transformers 5 writes Qwen3-MoE's count as num_local_experts alone, 4.x reads num_experts.
    values = json.loads(path.read_text())
    written = [field for field in COUNT_FIELDS if field in values]
    for field in ("num_experts", "num_local_experts"):
        if written and field not in values and hasattr(config, field):
            values[field] = values[written[0]]
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def copy_text_files(source: Path, folder: Path) -> None:
    """Bring the tokenizer and generation files of a checkpoint along, byte for byte."""
    for pattern in TEXT_FILES:
        for file in source.glob(pattern):
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)


def check_plan(layers: Iterable[LayerInfo], edits: Iterable[Any]) -> None:
    """Refuse a plan that names layers which are not there or keeps too few experts."""
    known = {info.index: info for info in layers}
    for edit in edits:
        if edit.index not in known:
            raise UserError(f"layer {edit.index} is no MoE layer; they are {sorted(known)}")
        if edit.edit == "prune":
            check_kept(known[edit.index], len(edit.kept))
