"""Wrappers: opened whole, edited in their text model, and everything else left as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from running import Job
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from wrappers import EACH_WRAPPER, WRAPPERS, image_prompt, tiny_wrapper, write_wrapper

from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.depth import drop_decoders
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import decoders_path, moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.observing import observe
from moe_lab.models.opening import is_wrapper, model_class, text_config, text_values
from moe_lab.models.routers import set_top_k
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stream import LayerStream, States
from moe_lab.types import UserError

KEPT = (0, 1, 3, 4, 5, 7)
pytestmark = pytest.mark.filterwarnings("ignore")
# Loads each folder with the class that transformers itself has for it, and computes once more.
FRESH = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
assert "moe_lab" not in sys.modules
found = {}
for folder in sys.argv[1:]:
    auto = getattr(transformers, open(folder + "/class").read())
    model, info = auto.from_pretrained(folder + "/model", output_loading_info=True)
    clean = not info["missing_keys"] and not info["unexpected_keys"]
    found[folder] = [] if clean else [str(info)]
    for name in ("text", "image"):
        saved = load_file(f"{folder}/{name}.safetensors")
        want = saved.pop("logits")
        saved = {k: v.bool() if k == "pixel_mask" else v for k, v in saved.items()}
        with torch.no_grad():
            got = model.eval()(**saved).logits
        found[folder].append(float((got - want).abs().max()))
print("RESULT" + json.dumps(found))
"""


def prompts(kind: str) -> dict[str, dict[str, Tensor]]:
    """What is asked of both models: text, and text around an image where it sees any."""
    return {
        "text": tiny_batch(),
        "image": tiny_batch(1) if kind == "mistral4" else image_prompt(kind),
    }


def keep_experts(model: Any, kept: tuple[int, ...], layers: slice = slice(None)) -> None:
    infos = [layer.info for layer in moe_layers(model)][layers]
    apply_plan(model, Plan(tuple(PruneExperts(one.index, one.name, kept=kept) for one in infos)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind as a source, saved whole and pruned, with the logits before it was saved."""
    home = tmp_path_factory.mktemp("wrappers")
    for kind in WRAPPERS:
        source = home / f"{kind}_source"
        write_wrapper(kind, source)
        for how in ("whole", "pruned"):
            folder = home / f"{kind}_{how}"
            folder.mkdir()
            model = Checkpoint(source).load()
            if how == "pruned":
                keep_experts(model, KEPT)
            for name, prompt in prompts(kind).items():
                logits = logits_of(tiny_wrapper(kind) if how == "whole" else model, prompt)
                plain = {k: v.int() if k == "pixel_mask" else v for k, v in prompt.items()}
                save_file(plain | {"logits": logits}, folder / f"{name}.safetensors")
            assert save_checkpoint(model, folder / "model", source).stock
            (folder / "class").write_text(model_class(model.config).__name__)
    return home


def test_stock_transformers_computes_the_same_on_text_and_on_images(saved: Path) -> None:
    folders = [str(saved / f"{kind}_{how}") for kind in WRAPPERS for how in ("whole", "pruned")]
    found = fresh.result(FRESH, *folders)
    assert found == {folder: [0.0, 0.0] for folder in folders}


@EACH_WRAPPER
def test_what_is_no_expert_and_no_router_comes_out_byte_for_byte(kind: str, saved: Path) -> None:
    source = load_file(saved / f"{kind}_source" / "model.safetensors")
    whole = load_file(saved / f"{kind}_whole" / "model" / "model.safetensors")
    pruned = load_file(saved / f"{kind}_pruned" / "model" / "model.safetensors")
    assert whole.keys() == source.keys()
    assert all(_bytes(whole[key]) == _bytes(source[key]) for key in source)
    routed = {key for key in source if ".experts." in key or key.split(".mlp.")[-1] in ROUTERS}
    assert routed
    assert all(_bytes(pruned[key]) == _bytes(source[key]) for key in source.keys() - routed)
    assert not pruned.keys() - source.keys()


ROUTERS = ("gate.weight", "router.weight", "gate.e_score_correction_bias")


def _bytes(tensor: Tensor) -> tuple[torch.dtype, bytes]:
    return tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()


@EACH_WRAPPER
def test_only_the_count_changes_in_the_config_and_files_beside_it_stay(
    kind: str, saved: Path
) -> None:
    source, pruned = saved / f"{kind}_source", saved / f"{kind}_pruned" / "model"
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, pruned)
    )
    config = AutoConfig.from_pretrained(source)
    inner = text_values(before, config)
    counts = [key for key in inner if key in COUNTS]
    assert counts and all(inner[key] == 8 for key in counts)
    inner |= dict.fromkeys([*counts, *ALIASES.get(kind, ())], 6)
    assert after == before
    for file in source.glob("*.j*"):
        if file.name not in ("config.json", "generation_config.json"):
            assert (pruned / file.name).read_bytes() == file.read_bytes()


COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ALIASES = {  # as older versions of transformers read the count
    "qwen3_vl_moe": ("num_experts",),
    "glm4v_moe": ("num_local_experts",),
    "mistral4": ("num_local_experts",),
}


@EACH_WRAPPER
def test_the_text_model_is_observed_and_streamed_through_the_wrapper(
    kind: str, saved: Path
) -> None:
    checkpoint = Checkpoint(saved / f"{kind}_source")
    model, batch, seen = checkpoint.load(), tiny_batch(), []
    before = logits_of(model, batch)
    with observe(model, lambda info, routing: seen.append(info.index)) as observation:
        observation.valid = batch["attention_mask"].bool()
        assert torch.equal(logits_of(model, batch), before)
    infos = checkpoint.layers()
    assert seen == [info.index for info in infos] and infos[0].top_k == 2
    for source in (model, LayerwiseModel(checkpoint)):
        stream = LayerStream(source, [batch])
        states = States(stream)
        with torch.no_grad():
            states.move_to(len(stream.layers))
            assert torch.equal(stream.logits(0, states[0]), before)


@EACH_WRAPPER
def test_own_form_and_other_depths_and_top_k_are_said_on_the_text_config(
    kind: str, saved: Path, tmp_path: Path
) -> None:
    source, batch = saved / f"{kind}_source", tiny_batch()
    model = load(source)
    keep_experts(model, (0, 2, 3, 7), slice(1))
    want = logits_of(model, batch)
    assert not save_checkpoint(model, tmp_path / "own", source).stock
    again = load(tmp_path / "own")
    assert torch.equal(logits_of(again, batch), want)
    keep_experts(again, KEPT[:5], slice(1, None))
    want = logits_of(again, batch)
    save_checkpoint(again, tmp_path / "twice", tmp_path / "own")
    assert torch.equal(logits_of(load(tmp_path / "twice"), batch), want)
    model = load(source)
    set_top_k(model, 1)
    if kind != "qwen3_5_moe":
        drop_decoders(model, decoders_path(moe_layers(model)[0].info.name), [2])
    want = logits_of(model, batch)
    assert save_checkpoint(model, tmp_path / "other", source).stock
    assert torch.equal(logits_of(load(tmp_path / "other"), batch), want)


def test_the_class_is_the_one_that_holds_all_of_it() -> None:
    classes = {kind: type(meta_model(_config(kind))).__name__ for kind in WRAPPERS}
    assert classes == {
        "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
        "glm4v_moe": "Glm4vMoeForConditionalGeneration",
        "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
        "aria": "AriaForConditionalGeneration",
        "mistral4": "Mistral4ForCausalLM",
    }
    assert [kind for kind in WRAPPERS if not is_wrapper(_config(kind))] == ["mistral4"]
    text = tiny_model("qwen3_moe").config
    assert model_class(text).__name__ == "AutoModelForCausalLM" and text_config(text) is text


def test_a_whole_run_compresses_tunes_evaluates_and_measures_a_wrapper(
    job: Job, tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "wrapper"
    write_wrapper("qwen3_vl_moe", source, tokenizer)
    few = (
        f"model.path={source}", "eval.num_items=1", "eval.held_out.num_samples=2",
        "finetune=experts", "finetune.phases.lm.data.num_samples=8",
        "finetune.phases.lm.batch_size=4", "finetune.phases.lm.validation.num_samples=2",
        "measure=speed", "measure.repeats=1", "measure.prompt_length=8", "measure.decode_tokens=2",
    )  # fmt: skip
    pruned = job("method=prune", "eval=perplexity", *few)
    assert pruned.code == 0, pruned.text
    condensed = job("method=condense", "eval=tiny", *few)
    assert condensed.code == 0, condensed.text
    dense = load_file(source / "model.safetensors")
    for report in (pruned.report, condensed.report):
        assert 0 == report["dense/kl"] < report["finetuned/kl"]
        assert report["compressed/decode_seconds_per_token"] > 0
        for variant in ("compressed", "finetuned"):
            folder = Path(report[f"{variant}/checkpoint"])
            assert type(load(folder)).__name__ == "Qwen3VLMoeForConditionalGeneration"
            made = load_file(folder / "model.safetensors")
            tower = [key for key in dense if "visual" in key]
            assert tower and all(torch.equal(made[key], dense[key]) for key in tower)
            assert (folder / "video_preprocessor.json").is_file()
    assert condensed.report["finetuned/eval/tiny_perplexity_code/bits_per_byte"] > 0


def _config(kind: str) -> Any:
    return AutoConfig.for_model(kind, **WRAPPERS[kind])


def test_the_class_that_wrote_a_checkpoint_opens_it() -> None:
    config = _config("qwen3_5_moe")
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    assert type(meta_model(config)).__name__ == "Qwen3_5MoeForCausalLM"


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("nllb-moe", "is an encoder-decoder"),
        ("switch_transformers", "is an encoder-decoder"),
        ("openai_privacy_filter", "no language model of this type"),
        ("qwen3_omni_moe", "has no forward pass of its own"),
    ],
)
def test_families_without_a_causal_language_model_are_refused(family: str, why: str) -> None:
    with pytest.raises(UserError, match=f"{family!r} cannot be opened: .*{why}"):
        model_class(AutoConfig.for_model(family))


def test_two_blocks_in_one_layer_are_refused() -> None:
    config = AutoConfig.for_model("ernie4_5_vl_moe", text_config={"num_hidden_layers": 2})
    with pytest.raises(
        UserError, match=r"two MoE blocks in one decoder layer.*text_moe.*vision_moe"
    ):
        moe_layers(meta_model(config))


def test_experts_of_a_tower_for_images_are_left_alone() -> None:
    text = {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["sliding_attention", "indexed_attention", "sliding_attention"],
    }
    model = meta_model(AutoConfig.for_model("dots3_note", text_config=text))
    towers = [name for name, _ in model.named_modules() if name.endswith("mlp.experts")]
    assert any("vision" in name for name in towers)
    names = [layer.info.name for layer in moe_layers(model)]
    assert names == [f"model.language_model.layers.{index}.mlp" for index in (1, 2)]
