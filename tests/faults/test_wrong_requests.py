"""What a user can get wrong: exit code 2, one message with the way out, before any work."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from families import tiny_model
from mounting import mounted
from running import Job, Outcome


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, each of `words` in the message, no traceback, and no stage ran."""
    assert outcome.code == 2, outcome.text
    assert "Traceback" not in outcome.text
    missing = [word for word in words if word not in outcome.text]
    assert not missing, outcome.text
    assert outcome.stages() == []
    if outcome.report:
        assert outcome.report["status"] == "failed"
        assert all(word in outcome.report["error"] for word in words)


CONDENSE, TUNE, SUPERVISED = "method=condense", "finetune=experts", "finetune=experts_sft"
LM, SFT = "finetune.phases.lm", "finetune.phases.sft"
OWN_ANSWERS = [
    SUPERVISED,
    f"calibration@{SFT}.data=files",
    f"{SFT}.data.files=${{calibration.files}}",
    f"{SFT}.data.num_samples=8",
    "finetune.phases.lm.data.num_samples=8",
]
OVERRIDES = {
    # an unknown option, group or value
    "group": (["metod=prune"], ["metod", "method", "calibration"]),
    "added group": (["+metod=prune"], ["metod", "method", "calibration"]),
    "choice": (["method=pruning"], ["condense", "prune"]),
    "option": (["ratio.ration=0.5"], ["ratio.ration", "there are ratio"]),
    "no name": (["+diagnose=true"], ["was given bool", "diagnose=full"]),
    "nothing": (["eval=null"], ["was given null", "eval=none"]),
    # a recipe that the method's kind of plan leaves nothing to do
    "rows stay": (
        ["method.replacement=zero", "finetune=expert_dropping"],
        ["layers [1, 2, 3]", "method.replacement=nothing"],
    ),
    "rows are shared": (
        ["method=merge", "method.layers=last", "condense.num_layers=2", "finetune=expert_dropping"],
        ["layers [2, 3]", "method.router=dominant"],
    ),
    "listed for others": (
        [
            "method=merge",
            "method.layers=first",
            "condense.num_layers=2",
            "ratio=listed",
            "ratio.kept=[4,4,4]",
        ],
        ["3 numbers for 2 MoE layers", "[1, 2]"],
    ),
    "groups of one": (
        ["method=merge", "grouping=ream", "grouping.group_size=1"],
        ["grouping.group_size=1", "at least 2"],
    ),
    "no such grouping": (
        ["method=merge", "method.grouping=reams"],
        ["method.grouping='reams'", "hc_smoe, m_smoe, mergemoe, ream"],
    ),
    "nothing says how many stay": (
        ["method=merge", "method.ratio=null", "method.num_experts=null"],
        ["method.ratio=null and method.num_experts=null", "ratio.ratio=0.25"],
    ),
    "no ratio at all": (
        ["method.ratio=null"],
        ["method.ratio=null", "it must be a ratio"],
    ),
    "no gates": (
        ["finetune=experts", "finetune.experts=false", "finetune.gates=true"],
        ["condenses none", "method=condense"],
    ),
    "added option": (["+calibration.nam=3"], ["calibration.nam", "num_samples"]),
    "added inner option": (["eval=tiny", "+eval.held_out.x=3"], ["eval.held_out.x", "max_length"]),
    "no equals sign": (["foo"], ["'foo' is no option", "key=value", "group=option"]),
    "open bracket": (["calibration.files=[a"], ["calibration.files=[a]"]),
    "path of a search": (
        [CONDENSE, "condense.layers=research.none.choose"],
        ["condense.layers='research.none.choose' does not exist", "greedy_js", "PYTHONPATH"],
    ),
    "experts search": ([CONDENSE, "condense.experts=greedy"], ["greedy_js", "'greedy'"]),
    "layers search": ([CONDENSE, "condense.layers=greedy"], ["greedy_js", "'greedy'"]),
    "tracking": (["track.mode=sometimes"], ["track.mode=sometimes", "online, offline, off"]),
    "dtype": (["model.dtype=float99"], ["float99", "bfloat16"]),
    "task": (["eval=tiny", "eval.tasks=[tiny_poem]"], ["tiny_poem", "tiny_prose"]),
    "split": (["calibration=stdlib", "calibration.split=tests"], ["tests", "validation"]),
    "domain": (["calibration=stdlib", "calibration.domains=[art]"], ["art", "prose"]),
    # impossible numbers of experts and layers
    "ratio": (["ratio.ratio=0.75"], ["layer 1", "2 of 8", "chooses 3", "0.625"]),
    "ratio above 1": (["ratio.ratio=1.5"], ["ratio.ratio=1.5", "below 1"]),
    "negative ratio": (["ratio.ratio=-0.1"], ["ratio.ratio=-0.1", "at least 0"]),
    "layer": ([CONDENSE, "condense.layers=[0,2]"], ["[0]", "[1, 2, 3]", "condense.layers"]),
    "no layer": ([CONDENSE, "condense.layers=[]"], ["condense.layers=[]", "one or more"]),
    "layer twice": ([CONDENSE, "condense.layers=[1,1]"], ["condense.layers=[1, 1]", "once"]),
    "layers": ([CONDENSE, "condense.num_layers=4"], ["condense.num_layers=4", "3 MoE layers"]),
    "no layers": ([CONDENSE, "condense.num_layers=0"], ["condense.num_layers=0", "at least 1"]),
    "experts": ([CONDENSE, "condense.experts=[1,8]"], ["[8]", "0 to 7"]),
    "expert twice": ([CONDENSE, "condense.experts=[1,1]"], ["condense.experts=[1, 1]", "once"]),
    "more experts": ([CONDENSE, "condense.num_routed=9"], ["condense.num_routed=9", "8"]),
    "fewer experts": (
        [CONDENSE, "condense.num_routed=-1"],
        ["condense.num_routed=-1", "at least 0"],
    ),
    # values of the wrong kind
    "word": ([CONDENSE, "condense.num_layers=abc"], ["condense.num_layers=abc", "whole number"]),
    "fraction": ([CONDENSE, "condense.num_routed=1.5"], ["condense.num_routed=1.5", "whole"]),
    "one layer": ([CONDENSE, "condense.layers=3"], ["condense.layers=3", "list [a,b]"]),
    "word in a list": ([CONDENSE, "condense.layers=[x]"], ["condense.layers", "whole numbers"]),
    "word as ratio": (["ratio.ratio=half"], ["ratio.ratio=half", "a number"]),
    "no ratio": (["ratio.ratio=null"], ["ratio.ratio", "a number"]),
    "nan": ([TUNE, f"{LM}.learning_rate=nan"], [f"{LM}.learning_rate=nan", "a number"]),
    "one file": (["calibration.files=a.txt"], ["calibration.files=a.txt", "list [a,b]"]),
    "one task": (["eval=tiny", "eval.tasks=tiny_prose"], ["eval.tasks", "list [a,b]"]),
    "seed": (["seed=-1"], ["seed=-1", "from 0 to 4294967295"]),
    "seed in words": (["seed=one"], ["seed=one", "whole number"]),
    # negative and absurd numbers
    "samples": (["calibration.num_samples=-1"], ["num_samples", "-1", "at least 1"]),
    "length": (["calibration.max_length=0"], ["max_length", "at least 1"]),
    "batch": (["compute.batch_size=0"], ["compute.batch_size", "at least 1"]),
    "threads": (["compute.threads=-1"], ["compute.threads", "from 1 to 4096"]),
    "device": (["compute.device=tpu"], ["compute.device=tpu", "cpu"]),
    "device number": (["compute.device=cuda:99"], ["compute.device=cuda:99", "cpu"]),
    "epochs": ([TUNE, f"{LM}.epochs=0"], [f"{LM}.epochs=0", "at least 1"]),
    "validation": ([TUNE, "finetune.validate_every=0"], ["finetune.validate_every", "at least 1"]),
    "learning rate": ([TUNE, f"{LM}.learning_rate=-1"], [f"{LM}.learning_rate=-1", "above 0"]),
    "warm-up": ([TUNE, f"{LM}.warmup_ratio=2"], [f"{LM}.warmup_ratio=2", "0 to 1"]),
    "schedule": ([TUNE, f"{LM}.schedule=step"], [f"{LM}.schedule=step", "linear, cosine"]),
    "no phase": ([TUNE, f"{LM}=null"], ["finetune.phases is empty", "finetune=none"]),
    "nothing trains": ([TUNE, "finetune.experts=false"], ["trains nothing", "finetune=none"]),
    "computing": ([TUNE, "finetune.dtype=int8"], ["finetune.dtype=int8", "bfloat16"]),
    "tuning text": ([TUNE, f"{LM}.data.num_samples=0"], ["num_samples", "at least 1"]),
    "long prompts": (
        [SUPERVISED, f"{SFT}.data.max_length=8"],
        [f"{SFT}.data", "max_length=8", "skip_long=true"],
    ),
    "no answers": (
        [*OWN_ANSWERS, f"{SFT}.data.prompt='{{text}}'", f"{SFT}.data.answer='{{reply}}'"],
        [f"{SFT}.data", "'{reply}'", "['text']"],
    ),
    "half a pair": (
        [*OWN_ANSWERS, f"{SFT}.data.prompt='{{text}}'"],
        ["prompt='{text}'", "answer=None", "give both"],
    ),
    "items": (["eval=tiny", "eval.num_items=0"], ["eval.num_items", "at least 1"]),
    "limit": (["eval=tiny", "eval.limit=-3"], ["eval.limit", "at least 1"]),
    "repeats": (["measure=speed", "measure.repeats=0"], ["measure.repeats", "at least 1"]),
    # models and data that are not there
    "model path": (["model.path=???"], ["model.path"]),
    "folder": (["model.path=/no/such/folder"], ["/no/such/folder", "neither a folder"]),
    "model name": (["model.path=tiny"], ["'tiny'", "owner/name"]),
    "hub id": (["model.path=owner/name"], ["owner/name", "model.path=<folder>"]),
    "shipped": (["model.path=shipped:huge"], ["huge", "tiny_deepseek"]),
    "no files": (["calibration.files=[]"], ["calibration.files=[a.jsonl"]),
    "missing file": (["calibration.files=[/no/text.jsonl]"], ["/no/text.jsonl", "not a file"]),
    "tuning what is dropped": (
        ["method=drop_layers", "finetune=experts"],
        ["drop_layer", "finetune=none"],
    ),
    "beam": (
        ["method=condense", "condense.beam=2", "condense.layers=first"],
        ["condense.beam=2", "leave condense.beam at 1"],
    ),
    "gates": (
        ["method=condense", "condense.gates=median"],
        ["condense.gates='median'", "mean_all, mean_selected"],
    ),
    "cache": (["compute.cache_gib=-1"], ["compute.cache_gib", "at least 0"]),
    "field": (
        ["calibration.field=body"],
        ["line 1", "'body'", "['text']", "calibration.field=<name>"],
    ),
    "documents": (["calibration.num_samples=17"], ["17 samples", "only 16", "num_samples=16"]),
    "packed": (
        ["calibration.pack=true", "calibration.num_samples=99"],
        ["99 samples", "full samples of 32 tokens"],
    ),
    "no parts": (["calibration=mixture", "calibration.parts=null"], ["calibration.parts"]),
    "hub dataset": (["calibration=wikitext2"], ["Salesforce/wikitext", "calibration=files"]),
}


# In a line each: what is asked for, and words of the answer.
LINES = """
model.path=/a/lr=3e-4 => Hydra cannot read model.path=/a/lr=3e-4 ; "model.path='/a/lr=3e-4'"
model.path=/a[1] => "model.path='/a[1]'"
model.path=(a => "model.path='(a'"
model.path={a => "model.path='{a'"
model.path=it's => quote the value
model.path="x => quote the value
model.path=/é/日本 => "model.path='/é/日本'"
model.path=/a,b => several values ; "model.path='/a,b'" ; add -m
model.path=/a{b} => "model.path='/a{b}'"
ratio.ratio=0,5 => ratio.ratio=0,5 is several values
seed==1 => seed==1
seed=[1 => seed=[1]
seed=range(0,3) => --multirun
model.path=${nope} => Interpolation key 'nope' not found ; model
seed=${seed} => Recursive interpolation
compute.device=${oc.env:MOE_LAB_NOT_SET} => compute.device ; MOE_LAB_NOT_SET
model.path=[x] => model.path=[x]: it must be text ; "model.path='[x]'"
model.path=7 => model.path=7: it must be text ; "model.path='7'"
model.path=null => model.path=null: it must be text
model.path= => model.path= is empty
model.name= => model.name= is empty
model.name=true => "model.name='true'"
model.dtype=null => model.dtype=null
model.revision=7 => text or null
store=null => store=null: it must be text
store= => store= is empty
store=7 => "store='7'"
store=/dev/null/store => store=<folder>
run_dir=null => run_dir=null: it must be text
run_dir= => run_dir= is empty
run_dir=/dev/null/x => /dev/null is a file
seed=4294967296 => from 0 to 4294967295
seed=99999999999999999999 => seed=99999999999999999999
seed=1.5 => a whole number
seed=true => a whole number
seed=null => a whole number
seed=0x10 => a whole number
calibration.seed=-1 => from 0 to 4294967295
calibration.seed=18446744073709551616 => calibration.seed=18446744073709551616
resume=maybe => true or false
resume=null => true or false
table.expected=/no/such.csv => /no/such.csv is not there ; table.expected
table.rows=metric => a list [a,b] of text
+table.colums=[a] => table.colums is no option ; columns
~seed => seed
~method => method was taken out
nothing=1 => nothing is no option
a.b.c=1 => a is no option
=1 => a group was given
method= => prune
method=[a] => method/a
method._target_=moe_lab.nope => moe_lab.nope does not exist
method._target_=os.system => no option
metric._target_=7 => _target_: 7
calibration._target_=-1e30 => _target_: -1e+30
compute._target_={a:1} => _target_: {'a': 1}
compute._target_=${seed} => _target_: 0
grouping._target_=moe_lab.types => no class and no function
metric._target_= => _target_:
eval=[1] => a group is chosen by a name
measure=[nan] => a group is chosen by a name
finetune=[null] => a group
eval=[[1]] => a group
seed=[1.5] => seed=[1.5]: it must be a whole number
method=condense condense.experts=[] => condense.experts=[] ; condense.num_routed=0
method=condense condense.experts=null => whole numbers
method=condense condense.experts=7 => condense.experts=7
method=condense condense.experts=[[1,2]] => condense.experts=[[1,2]]
method=condense condense.layers=[1.5] => condense.layers=[1.5]
method=condense condense.layers=[-1] => [1, 2, 3]
method=condense condense.layers=[99] => [1, 2, 3]
method=condense condense.beam=0 => at least 1
method=drop_layers method.num_layers=99 => 3 MoE layers
method=drop_layers method.layers=[] => each once
method=drop_blocks method.num_layers=0 => at least 1
method=merge method.grouping=null => method.grouping=null ; it must be a grouping or text
method=merge method.router=none => all, dominant, mean, sum
method.replacement=others => nothing, zero, constant, copy
method.propagate=perhaps => true or false
method.lm_head=maybe => auto, tied, untied
method.mtp=remove => prune, keep, drop
eval=tiny eval.tasks=[tiny_prose,tiny_prose] => tiny_prose twice
eval=tiny eval.tasks=[7] => a list [a,b] of text
eval=tiny eval.tasks=null => a list
eval=tiny eval.num_fewshot=-1 => at least 0
eval=tiny eval.top_k=[99] => 1 to 8
eval=tiny eval.mirror=/no/such => is no folder
eval=tiny eval.held_out=7 => eval.held_out=7
ratio.ratio=1 => below 1
ratio.ratio=true => a number
ratio.ratio=[0.5] => a number
ratio.of=layers => experts, parameters, bytes
ratio.target_gib=0 => above 0
ratio.round_to=0 => at least 1
ratio.floor=99 => only 8 experts
ratio=listed ratio.kept=[] => 0 numbers for 3 MoE layers
ratio=listed ratio.kept=[9,9,9] => not 9
ratio=coverage ratio.coverage=2 => at most 1
calibration.files=null => a list
calibration.files=[''] => names '', which is no file
calibration.files=[7] => of text
calibration.field= => no field ''
calibration.field=null => calibration.field=null
calibration.template='{nope}' => line 1 ; ['text'] ; nope
calibration.template='{' => Single '{'
calibration.num_samples=1e3 => a whole number
calibration.max_length=true => a whole number
calibration.group_by=nope => line 1 ; nope
calibration.group=x => group_by=<field>
calibration.loss_on=prompt => answer, all
calibration.pack=perhaps => true or false
calibration=stdlib calibration.group_by=field => domain
compute.batch_size=1.5 => a whole number
compute.device=cuda:x => cuda:x
compute.device=7 => must be text
compute.cache_gib=nan => a number
compute.threads=99999999999 => from 1 to 4096
track.mode=null => track.mode=null
track.mode= => online, offline, off
track.project=7 => "track.project='7'"
+track.nope=1 => track.nope is no option ; project
finetune=experts finetune.phases.lm.epochs=1.5 => a whole number
finetune=experts finetune.phases.lm.learning_rate=0 => above 0
finetune=experts finetune.phases.lm.learning_rate=inf => a number
finetune=experts finetune.phases.lm.weight_decay=-1 => at least 0
finetune=experts finetune.distillation=2 => from 0 to 1
finetune=experts finetune.phases.lm.data=null => finetune.phases.lm.data=null
finetune=seer finetune.top_k=99 => 1 to 3
measure=speed measure.decode_tokens=-1 => at least 1
measure=vllm measure.python=/no/python => /no/python
method.unit=neuron => experts, neurons
method.unit=neurons metric=reap => no score of them ; method.unit=experts ; camera, energy
metric=energy => no score of them ; method.unit=neurons ; naee, random, reap
metric=reap method.widths=by_layer => method.widths=by_layer ; method.unit=neurons
metric=reap method.shared=true => method.shared=true ; method.unit=neurons
NEURONS method.widths=by_neuron => by_layer, by_expert
NEURONS method.replacement=zero => all experts stay ; method.replacement=nothing
NEURONS method.protect=super_experts => method.widths=by_expert ; method.protect=null
NEURONS ratio.ratio=0.999 => 0 of 16 hidden units of each expert ; At most 0.9375
NEURONS ratio=global ratio.ratio=0.999 => of 384 ; at least 24 together (one of each expert)
NEURONS ratio.floor=12 ratio.ratio=0.5 => 8 of 16 hidden units of each ; ratio.floor=12 ; At most
NEURONS ratio.floor=99 => only 16 hidden units
NEURONS ratio.round_to=16 => all 384 hidden units ; ratio.round_to=15 would remove 24
NEURONS ratio.round_to=17 => no multiple of 17
NEURONS ratio.ratio=0.01 => removes nothing ; ratio.ratio=0.0417 would remove 24
NEURONS ratio.target_gib=0.0000001 => 1e-07 is too little ; hidden units of each expert
NEURONS ratio=listed ratio.kept=[8,8,17] => 16 hidden units of each expert ; not 17
NEURONS ratio=listed ratio.kept=[8,8,0] => 0 of 16 hidden units of each expert ; 1 to 16
NEURONS compute.profile=routers => method.unit=experts with metric= ; compute.profile=all
NEURONS metric=camera metric.alpha=2 => metric.alpha=2 ; from 0 to 1
"""
NEURONS = "method=prune method.unit=neurons metric=energy"  # what a line says in a word


@pytest.mark.parametrize("line", LINES.strip().splitlines())
def test_refused_in_a_line(line: str, job: Job) -> None:
    asked, _, answer = line.partition(" => ")
    outcome = job(*asked.replace("NEURONS", NEURONS).split(" "))
    assert_refused(outcome, *answer.split(" ; "))


@pytest.mark.parametrize("name", OVERRIDES)
def test_refused(name: str, job: Job) -> None:
    overrides, words = OVERRIDES[name]
    assert_refused(job(*overrides), *words)


@pytest.mark.parametrize("advice", ["ratio.ratio=0.0417", "ratio.ratio=0.9375", "ratio.floor=8"])
def test_what_is_advised_of_hidden_units_is_accepted(advice: str, job: Job) -> None:
    outcome = job(*NEURONS.split(" "), "ratio.ratio=0.5", advice)
    assert outcome.code == 0, outcome.text
    assert outcome.stages() == ["compress", "plan", "profile"]


def test_a_plan_of_experts_is_no_list_of_hidden_units(job: Job, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    rows = [{"index": 1, "name": "x", "edit": "prune", "kept": [0, 1, 2, 3]}]
    plan.write_text(json.dumps({"layers": rows, "searched": []}))
    outcome = job(*NEURONS.split(" "), "ratio=listed", f"ratio.plan={plan}")
    assert_refused(outcome, "numbers of experts", "hidden units", "ratio.kept=")


def test_shared_experts_that_are_not_there_cannot_be_narrower(job: Job, copy: Path) -> None:
    tiny_model("mixtral", vocab_size=259).save_pretrained(copy)
    outcome = job(*NEURONS.split(" "), "method.shared=true", f"model.path={copy}")
    assert_refused(outcome, "method.shared=true", "no shared experts", "method.shared=false")


def test_a_layer_whose_rows_lead_elsewhere_cannot_be_narrower(job: Job, checkpoint: Path) -> None:
    first = job("method.replacement=zero", "ratio.ratio=0.25")
    assert first.code == 0, first.text
    compressed = first.report["compressed/checkpoint"]
    outcome = job(*NEURONS.split(" "), f"model.path={compressed}")
    assert outcome.code == 2 and "Traceback" not in outcome.text
    assert "router rows lead to" in outcome.text
    assert "method.replacement=nothing" in outcome.text


def test_the_least_that_is_accepted(job: Job) -> None:
    outcome = job("ratio.ratio=0.625")
    assert outcome.code == 0, outcome.text
    assert outcome.stages() == ["compress", "plan", "profile"]


# --------------------------------------------------------------------------- checkpoints


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def test_a_model_that_is_not_an_moe(job: Job, copy: Path, tokenizer: object) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(copy)
    assert_refused(job(f"model.path={copy}"), str(copy), "not a Mixture-of-Experts", "'llama'")


def test_a_weight_file_is_missing(job: Job, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    tiny_model("qwen2_moe", vocab_size=259).save_pretrained(copy, max_shard_size="30KB")
    shards = sorted(copy.glob("model-*.safetensors"))
    shards[1].unlink()
    numbers = f"1 of {len(shards)} weight files"
    assert_refused(job(f"model.path={copy}"), numbers, shards[1].name)


def test_the_index_is_damaged(job: Job, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text("{")
    assert_refused(job(f"model.path={copy}"), "model.safetensors.index.json", "cannot be read")


def test_only_bin_weights(job: Job, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert_refused(job(f"model.path={copy}"), "no weights", "pytorch_model.bin", "safetensors only")


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights(job: Job, copy: Path, kept: int) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    told = "damaged" if kept else "is empty"
    assert_refused(job(f"model.path={copy}"), str(weights), told, "download it again")


def test_corrupt_weights(job: Job, copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not a safetensors file " * 50)
    assert_refused(job(f"model.path={copy}"), "model.safetensors", "damaged")


def test_a_tensor_is_missing(job: Job, copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if "self_attn.q_proj.weight" in name)
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    outcome = job(f"model.path={copy}")
    assert outcome.code == 2 and "Traceback" not in outcome.text
    assert name in outcome.text and "lacks 1 tensor" in outcome.text


def test_a_truncated_config(job: Job, copy: Path) -> None:
    config = copy / "config.json"
    config.write_text(config.read_text()[:100])
    assert_refused(job(f"model.path={copy}"), str(config), "cannot be read")


def test_an_unknown_family(job: Job, copy: Path) -> None:
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"qwen2_moe"', '"qwen99_moe"'))
    assert_refused(job(f"model.path={copy}"), str(config), "qwen99_moe")


def test_no_config(job: Job, copy: Path) -> None:
    (copy / "config.json").unlink()
    assert_refused(job(f"model.path={copy}"), str(copy), "config.json is missing")


def test_no_tokenizer(job: Job, copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert_refused(job(f"model.path={copy}"), "has no tokenizer", str(copy))


# --------------------------------------------------------------------------- calibration files

FILES = {
    "empty text": ("a.txt", b"", ["a.txt", "is empty (0 bytes)"]),
    "empty lines": ("a.jsonl", b"\n\n", ["a.jsonl", "holds only 0 documents", "2 rows without"]),
    "blank text": ("a.txt", b" \n\t\n", ["a.txt", "holds only 0 documents", "1 rows without"]),
    "not UTF-8": ("a.txt", b"caf\xe9", ["a.txt, line 1", "cannot be read as UTF-8", "0xe9"]),
    "lines not UTF-8": ("a.jsonl", b'{"text": "caf\xe9"}\n', ["a.jsonl, line 1", "0xe9"]),
    "broken line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl", "line 2", "not JSON"]),
    "numbers": ("a.jsonl", b"1\n2\n", ["a.jsonl, line 1", "'text'", "int", "it is 1"]),
    "no text": ("a.jsonl", b'{"text": 3}\n', ["line 1", "'text' holds 3 (int)", "=<name>"]),
    "null": ("a.jsonl", b"null\n", ["a.jsonl", "left out were 1 rows without text"]),
    "a lone surrogate": ("a.jsonl", b'{"text": "x\\ud800"}\n', ["line 1", "lone surrogate"]),
    "messages in text": ("a.jsonl", b'{"text": ["a"]}\n', ["line 1", "role and content", "'a'"]),
    "no template": (
        "a.jsonl", b'{"text": [{"role": "user", "content": "Hello"}]}\n',
        ["line 1", "no chat template"],
    ),
    "another column": ("a.csv", b"body\nx\n", ["a.csv, line 2", "'text'", "['body']"]),
    "a ragged row": ("a.csv", b"text,n\nx\n", ["a.csv, line 2", "1 cells", "2 columns"]),
    "an open quote": ("a.tsv", b'text\n"x\n', ["a.tsv, line 2", "no CSV"]),
    "no array": ("a.json", b'[{"text": "a"},\n', ["a.json", "not JSON"]),
    "torn": ("a.jsonl.gz", b"\x1f\x8b\x08\x00", ["a.jsonl.gz", "cannot be read"]),
    "not packed": ("a.jsonl.zst", b'{"text": "a"}', ["a.jsonl.zst", "cannot be read"]),
    "not Parquet": ("a.parquet", b"something else", ["a.parquet", "cannot be read"]),
    "empty Parquet": ("a.parquet", b"", ["a.parquet", "is empty"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_unreadable_text(name: str, job: Job, tmp_path: Path) -> None:
    file, content, words = FILES[name]
    (tmp_path / file).write_bytes(content)
    overrides = [f"calibration.files=[{tmp_path / file}]", "calibration.num_samples=1"]
    if name == "broken line":
        overrides[1] = "calibration.num_samples=2"
    assert_refused(job(*overrides), *words)


def test_a_folder_as_file(job: Job, tmp_path: Path) -> None:
    assert_refused(job(f"calibration.files=[{tmp_path}]"), str(tmp_path), "is a folder, not a file")


# --------------------------------------------------------------------------- disks


def test_a_store_below_a_file(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(job(f"store={tmp_path / 'file' / 'store'}"), "cannot write", "store=<folder>")


def test_too_little_space(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    assert_refused(job(), "needs about", "0.00 MiB are free", "store=<folder>")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=800k") as folder:
        yield folder


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "ro") as folder:
        yield folder


def test_a_full_disk_is_found_before_any_work(job: Job, small_disk: Path) -> None:
    (small_disk / "large").write_bytes(b"x" * 700_000)
    assert_refused(job(f"store={small_disk / 'store'}"), "needs about", str(small_disk))


def test_a_disk_that_fills_up_loses_nothing(
    job: Job, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(small_disk)._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    (small_disk / "large").write_bytes(b"x" * 600_000)
    store = small_disk / "store"
    outcome = job(f"store={store}")
    assert outcome.code == 2 and "Traceback" not in outcome.text
    assert "is full" in outcome.report["error"] and "kept" in outcome.report["error"]
    done = {path.parent.parent.name for path in store.glob("*/*/artifact.json")}
    assert done == {"profile", "plan"}
    (small_disk / "large").unlink()
    again = job(f"store={store}")
    assert again.code == 0, again.text
    assert again.report["cached/profile"] and again.report["cached/plan"]


def test_a_read_only_store(job: Job, read_only_disk: Path) -> None:
    assert_refused(job(f"store={read_only_disk / 'store'}"), "Read-only", "store=<folder>")


# --------------------------------------------------------------------------- in its own process


def test_refusals_of_the_command(run_py: Callable, small: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "broken.yaml").write_text("a: [1\nb: }")
    (tmp_path / "mine" / "latin.yaml").write_bytes(b"caf\xe9: 1")
    cases = {
        ("method=pruning",): "condense",
        ("ratio.ration=0.5",): "ratio.ration is no option; there are ratio",
        ("model=checkpoint",): "model.path",
        (f"run_dir={file}/run",): "run_dir=<folder>",
        ("run_dir=",): "run_dir= is empty",
        ("model.path=/a/lr=3e-4",): "model.path='/a/lr=3e-4'",
        ("~method",): "method was taken out",
        ("-m", "seed=range(0,0)"): "has no jobs",
        ("-m", f"hydra.sweep.dir={file}"): "hydra.sweep.dir=<folder>",
        ("-m", "hydra.sweep.dir="): "hydra.sweep.dir=: it must be a folder",
        ("--config-dir=mine", "--config-name=broken"): "broken.yaml",
        ("--config-dir=mine", "--config-name=latin"): "latin is no UTF-8",
        ("--config-dir=none",): "none' not found",
        ("--multirn",): "unrecognized arguments: --multirn",
        ("model.path=/a\udcff",): "no UTF-8",
        (*small, "method=prune", "ratio.ratio=0.99"): "top-k",
    }
    for overrides, word in cases.items():
        done = (
            run_py(*overrides, "track=off", f"run_dir={tmp_path / 'run'}")
            if not any(one.startswith("run_dir") for one in overrides)
            else run_py(*overrides, "track=off")
        )
        assert done.returncode == 2, done.stderr
        assert word in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["status"] == "failed" and "ratio.ratio=0.99" in report["error"]
    assert not (tmp_path / "outputs" / "store" / "profile").exists()
    assert not (tmp_path / "report.json").exists(), "and nothing was written here"
