"""Checkpoints, ordinary Hugging Face folders: finding, fingerprinting and loading them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import moe_lab.models.own_form  # noqa: F401  # by which `hook` builds what is loaded
from moe_lab.files import PACKAGE
from moe_lab.models.adapters.base import check_supported
from moe_lab.models.building import LOCAL, blamed_on, built_config, built_model
from moe_lab.models.checking import Stamp, check_folder, check_routing, check_tokens, stamp_of
from moe_lab.models.config_file import NAME, config_values
from moe_lab.models.families.base import (
    check_original,
    convert_weights,
    family_of,
    known_family,
)
from moe_lab.models.file_sums import sha256_sums
from moe_lab.models.folder import CODE_FILES, TEXT_FILES, copy_beside, text_files
from moe_lab.models.layers import moe_layers, num_parameters
from moe_lab.models.narrowing import fit_implementation
from moe_lab.models.opening import (
    empty_model,
    empty_tensors,
    model_class,
    no_bars,
    stored_dtype,
    text_config,
)
from moe_lab.models.quantised import quantised_as, widen
from moe_lab.models.routers import set_top_k
from moe_lab.models.stored import INDEX, Held, held_by
from moe_lab.models.weight_files import SINGLE, header_bytes, weight_files, weight_map
from moe_lab.types import LayerInfo, UserError

Model = PreTrainedModel  # what other rooms call it: none of them imports transformers
SHIPPED = "shipped:"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    dtype: in which to compute ("auto" is the one it is stored in); known_fingerprint: what tells
    its content where that is known without reading it, as of the store's own checkpoints. top_k:
    experts for each token, None for as many as its config says. ignored: patterns of the names, in
    its files, of tensors that its family does not know and that may be lost.
    """

    path: Path
    dtype: str = "auto"
    known_fingerprint: str | None = None
    top_k: int | None = None
    ignored: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex over the config and every byte of the weights, and top_k where it is another."""
        if self.top_k is not None and {one.top_k for one in self.layers()} != {self.top_k}:
            whole = replace(self, top_k=None).fingerprint
            return hashlib.sha256(f"{whole} top_k {self.top_k}".encode()).hexdigest()[:12]
        if self.known_fingerprint:
            return self.known_fingerprint
        # Where it was loaded from and which version wrote it do not change what a model computes.
        ignored = ("_name_or_path", "transformers_version")
        config = config_values(self.path)
        config = {key: value for key, value in config.items() if key not in ignored}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for one in sha256_sums(weight_files(self.path)):
            digest.update(one.encode())
        return digest.hexdigest()[:12]

    @functools.cached_property
    def texts_fingerprint(self) -> str:
        """12 hex over the tokenizer and generation files, which come along.

        Not in `fingerprint`: what a model computes of given tokens does not depend on them.
        """
        digest = hashlib.sha256()
        files = text_files(self.path)
        for file, one in zip(files, sha256_sums(files), strict=True):
            digest.update(file.name.encode() + b"\0" + one.encode())
        return digest.hexdigest()[:12]

    @functools.cached_property
    def config(self) -> Any:
        """Its config, as transformers reads it."""
        return built_config(self.path)

    @property
    def repeats_experts(self) -> bool:
        """Whether layers were filled up with copies of their experts (`saving.save_checkpoint`)."""
        return hasattr(self.config, "distinct_experts")

    def layers(self) -> list[LayerInfo]:
        """Its MoE layers, found on a model without weights; UserError where it has none.

        Their bytes are those that its weights take when saved again, with the headers of its files.
        """
        return list(_layers_of(self, stamp_of(self.path)))

    def held_by(self, model: PreTrainedModel) -> Held:
        """What its files hold of a model of its config, without reading any tensor."""
        return held_by(model, weight_files(self.path))

    def load(self, device: str = "cpu") -> PreTrainedModel:
        """The model with its weights, in evaluation mode."""
        model = load(self.path, self.dtype, device, self.ignored)
        if self.top_k is not None:
            set_top_k(model, self.top_k)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; UserError where it has none."""
        # Without any of these transformers makes an empty tokenizer, and says nothing.
        if not any(file for pattern in VOCABULARIES for file in self.path.glob(pattern)):
            raise UserError(f"{self.path} has no tokenizer: none of {', '.join(VOCABULARIES)}")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.path, **LOCAL)
        except Exception as error:  # the tokenizers' library raises plain ones
            told = " ".join(str(error).split())[:400]
            raise UserError(f"no tokenizer can be read from {self.path}: {told}") from error
        check_tokens(self.path, tokenizer, text_config(self.config).vocab_size)
        ready: PreTrainedTokenizerBase = tokenizer
        return ready


@dataclass(frozen=True)
class Original(Checkpoint):
    """A checkpoint of a family that transformers does not read (`families/`), to be converted.

    Its config, layers and tokenizer are those of the native form, so that a request can be refused
    before anything is converted.
    """

    @property
    def family(self) -> ModuleType:
        """The family's file in `families/`."""
        return known_family(config_values(self.path)["model_type"])

    @functools.cached_property
    def config(self) -> Any:
        """The native form's config."""
        return AutoConfig.for_model(**self.family.native_config(config_values(self.path)))

    def held_by(self, model: PreTrainedModel) -> Held:
        """Nothing: its files have other tensors, which become the model's when it is converted."""
        return Held({}, {})

    def load(self, device: str = "cpu") -> PreTrainedModel:
        """Refused: it is loaded once it is converted."""
        return load(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as the converted checkpoint will have it."""
        with tempfile.TemporaryDirectory() as folder:
            self._write_texts(Path(folder))
            return Checkpoint(Path(folder)).tokenizer()

    def convert(self, target: Path) -> None:
        """Write the native form, which stock transformers loads, into the folder `target`.

        Memory: one weight file. Raises UserError, before it writes, for tensors that are missing,
        unknown or of another shape.
        """
        values, files = config_values(self.path), weight_files(self.path)
        check_original(self.family, values, files)
        expected = num_parameters(meta_model(self.config))
        target.mkdir(parents=True, exist_ok=True)
        self._write_texts(target)
        written = convert_weights(self.family, files, target)
        if written != expected:
            raise RuntimeError(
                f"{self.path}: {written} weights were written, its native form has {expected}"
            )

    def _write_texts(self, target: Path) -> None:
        for file in text_files(self.path):
            copy_beside(file, self.path, target)
        self.family.adapt_texts(target)
        config = self.family.native_config(config_values(self.path))
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def resolve(
    path: str | os.PathLike[str],
    revision: str | None = None,
    dtype: str = "auto",
    ignored: Sequence[str] = (),
) -> Checkpoint:
    """The checkpoint of a local folder, of a hub id (which is then downloaded), or "shipped:name".

    An `Original` where its family must be converted first. ignored: patterns of the names of
    tensors that its family does not know and that may be lost. Raises UserError where there is
    none, and for all that is wrong with it (`checking.check_folder`).
    """
    folder = Path(path).expanduser()
    if str(path).startswith(SHIPPED):
        home = PACKAGE / "checkpoints"
        folder = home / str(path).removeprefix(SHIPPED)
        if not folder.is_dir():
            there = ", ".join(sorted(file.parent.name for file in home.glob("*/config.json")))
            raise UserError(f"model.path={path}: no such model is shipped; there are {there}")
    if not folder.is_dir():
        folder = _download(str(path), revision)
    if dtype not in DTYPES:
        raise UserError(f"model.dtype={dtype} does not exist; there are {', '.join(DTYPES)}")
    folder = folder.resolve()
    check_folder(folder, ignored)
    if family_of(config_values(folder)["model_type"]):
        return Original(folder, dtype)
    return Checkpoint(folder, dtype, ignored=tuple(ignored))


def check_hub_name(name: str) -> None:
    """Refuse what can be no model of the hub."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model.path={name!r} is neither a folder here nor a hub id of the form owner/name"
        )


def _download(name: str, revision: str | None) -> Path:
    check_hub_name(name)
    from huggingface_hub import snapshot_download

    try:
        texts = [SINGLE, INDEX, *TEXT_FILES, *CODE_FILES]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=texts))
        if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
            shards = sorted(set(weight_map(folder).values()))
            snapshot_download(name, revision=revision, allow_patterns=shards)
        return folder
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many kinds; each means: not to be had
        raise UserError(
            f"{name} is not a folder here, and the hub did not give it: {str(error).rstrip('.')}. "
            "Give a local "
            "folder with model.path=<folder>, or check the name, the network and HF_TOKEN"
        ) from error


def meta_model(config: Any) -> PreTrainedModel:
    """A model of this config without weights; UserError for families that cannot be compressed."""
    check_supported(config.model_type)
    return empty_model(config)


@functools.lru_cache(maxsize=64)  # a folder that has not changed is not looked through again
def _layers_of(checkpoint: Checkpoint, _: Stamp) -> tuple[LayerInfo, ...]:
    model = built_model(checkpoint.path, checkpoint.config)
    files = checkpoint.held_by(model)
    _set_saved_dtypes(model, files)
    layers = [layer.info for layer in moe_layers(model)]
    if not layers:
        raise UserError(
            f"{checkpoint.path} is not a Mixture-of-Experts model that moe_lab can read: its "
            f"family {checkpoint.config.model_type!r} has no experts modules of the common contract"
        )
    check_routing(checkpoint.path, layers)
    beside = sum(map(header_bytes, weight_files(checkpoint.path)))
    beside += sum(one.num_bytes for parts in files.others.values() for one in parts)
    return tuple(replace(info, model_bytes=info.model_bytes + beside) for info in layers)


def _set_saved_dtypes(model: PreTrainedModel, files: Held) -> None:
    """Give a model without weights the dtypes in which `saving.save_checkpoint` writes its tensors.

    Those of its files; tensors that these do not have are written in the config's.
    """
    default = stored_dtype(model.config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(files.dtype(name) or default)


def load(
    path: str | os.PathLike[str],
    dtype: str = "auto",
    device: str = "cpu",
    ignore_tensors: Sequence[str] = (),
) -> PreTrainedModel:
    """Load a checkpoint that moe_lab or transformers wrote, in evaluation mode.

    path: its folder. Quantised weights are dequantised. ignore_tensors: patterns of the names of
    tensors that its family does not know and that may be lost. Raises UserError for all that is
    wrong with the folder (`checking.check_folder`), and where its family must be converted first.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path} is no folder here; a checkpoint is loaded from its folder")
    check_folder(folder, ignore_tensors)
    _refuse_original(folder)
    config = built_config(folder)
    quantised = quantised_as(config)  # of which a dequantised model's config says nothing
    # Tensor by tensor straight to a GPU: the machine's memory need not hold the model.
    place = {} if device == "cpu" else {"device_map": {"": device}}
    try:
        with no_bars(), empty_tensors(), blamed_on(folder / NAME, config_values(folder)):
            loaded: Any = model_class(config).from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
                **place, **LOCAL,
            )  # fmt: skip
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
    model, info = loaded
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"{path} lacks {len(names)} tensors that its config asks for, such as {names[0]}"
        )
    if quantised and dtype != "auto":
        widen(model, getattr(torch, dtype))
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default one knows no float64
    fit_implementation(model)
    ready: PreTrainedModel = model.to(device).eval()
    return ready


def _refuse_original(path: Path) -> None:
    model_type = config_values(path)["model_type"]
    if family_of(model_type):
        raise UserError(
            f"{path} is a {model_type!r} checkpoint in its original layout, which transformers "
            f"does not read. `python run.py model=checkpoint model.path={path}` converts it "
            "once and works with the copy; "
            f'moe_lab.models.checkpoint.resolve("{path}").convert(<a pathlib.Path>) '
            "writes a copy wherever you like"
        )
