"""The job of `job.py` by forward hooks on stock transformers: what a user would write in an hour.

    python experiments/bench/peers/reap_by_hooks.py [folder] [--rounds 3]

REAP's score (arXiv 2510.13999) of an expert is the mean, over the tokens that are sent to it, of
the router's weight times the norm of the expert's output. transformers computes all experts of a
layer in one module, so that a hook behind it computes each expert once more on its tokens to see
its output. The model is loaded whole, in the dtype of its files, pruned in place, and saved by
transformers. In moe_lab's own environment; prints PASS or FAIL beside each limit. Attention can be
had without its causal mask, to compare with a peer whose calibration has none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import job

CPU_LIMIT, MEMORY_LIMIT = 1.0, 1.0


def prune(dense: Path, text: Path, out: Path, unmasked: bool = False) -> None:
    """Of a process of its own: the job, and experts.json with those kept.

    unmasked: every token sees those behind it, too.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    if unmasked:
        attention = nn.functional.scaled_dot_product_attention
        nn.functional.scaled_dot_product_attention = lambda *states, **options: attention(
            *states, **(options | {"is_causal": False, "attn_mask": None})
        )
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
    blocks = [layer.mlp for layer in model.model.layers]
    sums = torch.zeros(len(blocks), job.EXPERTS, dtype=torch.float64)
    counts = torch.zeros(len(blocks), job.EXPERTS, dtype=torch.float64)

    def watched(index: int) -> object:
        def hook(experts: nn.Module, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
            hidden, chosen, weights = args
            for expert in range(job.EXPERTS):
                token, rank = torch.where(chosen == expert)
                gate, up = nn.functional.linear(hidden[token], experts.gate_up_proj[expert]).chunk(
                    2, dim=-1
                )
                output = nn.functional.linear(
                    nn.functional.silu(gate) * up, experts.down_proj[expert]
                )
                scores = weights[token, rank].double() * output.double().norm(dim=-1)
                sums[index, expert] += scores.sum()
                counts[index, expert] += len(token)

        return hook

    handles = [
        block.experts.register_forward_hook(watched(index)) for index, block in enumerate(blocks)
    ]
    with torch.inference_mode():
        for ids in job.tokens_of(text, dense):
            model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    number = job.EXPERTS - int(job.SHARE * job.EXPERTS)
    scores = sums / counts.clamp(min=1)
    kept = scores.topk(number, dim=1).indices.sort(dim=1).values
    for block, stay in zip(blocks, kept, strict=True):
        for owner, name in (
            (block.experts, "gate_up_proj"), (block.experts, "down_proj"), (block.gate, "weight"),
        ):  # fmt: skip
            setattr(owner, name, nn.Parameter(getattr(owner, name).data[stay].clone()))
        block.experts.num_experts = number
    model.config.num_experts = number
    model.save_pretrained(out / "checkpoint")
    AutoTokenizer.from_pretrained(dense).save_pretrained(out / "checkpoint")
    (out / "experts.json").write_text(json.dumps(kept.tolist()))


def command_for(dense: Path, text: Path, out: Path) -> list[str]:
    """What has a process of its own do the job."""
    return [sys.executable, __file__, "--of", *map(str, (dense, text, out))]


def kept_in(out: Path) -> dict[int, list[int]]:
    """The experts that stay, by layer."""
    return dict(enumerate(json.loads((out / "experts.json").read_text())))


def main() -> int:
    """Take turns, and compare; 1 where a limit is passed."""
    folder, rounds = job.asked(__doc__)
    dense = job.checkpoint_in(folder)
    text, out = job.text_in(folder), folder / "reap_by_hooks"
    commands = {"hooks": command_for(dense, text, out)}
    ours, theirs, kept = job.take_turns(dense, folder / "ours", commands, out, rounds)
    job.show_kept("ours and hooks", kept, kept_in(out))
    return job.compared(ours, theirs, CPU_LIMIT, MEMORY_LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--of"]:
        prune(*map(Path, sys.argv[2:5]), unmasked=sys.argv[5:] == ["unmasked"])
        sys.exit(0)
    sys.exit(main())
