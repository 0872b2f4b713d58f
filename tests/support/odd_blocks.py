"""Families that are made up: Qwen2-MoE with a block, or a decoder layer, that does something else.

Each is what some family of transformers does, or what one of tomorrow might do.
"""

from __future__ import annotations

from typing import Any

import torch
from families import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeDecoderLayer,
    Qwen2MoeRMSNorm,
    Qwen2MoeSparseMoeBlock,
)


class Scaled(Qwen2MoeSparseMoeBlock):
    """Multiplies its routed sum by a factor."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.view(-1, hidden_states.shape[-1])
        shared = self.shared_expert(x_TD) * self.shared_expert_gate(x_TD).sigmoid()
        _, weight, index = self.gate(x_TD)
        return (2.5 * self.experts(x_TD, index, weight) + shared).view(hidden_states.shape)


class Averaged(Qwen2MoeSparseMoeBlock):
    """Is the average of its routed and its shared sum."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / 2


class Normed(Qwen2MoeSparseMoeBlock):
    """Ends in a norm that no other family has."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = super().forward(hidden_states)
        return y / (1 + y.abs().amax(dim=-1, keepdim=True))


class Doubled(Qwen2MoeSparseMoeBlock):
    """Hands its experts something else than its router."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.view(-1, hidden_states.shape[-1])
        shared = self.shared_expert(x_TD) * self.shared_expert_gate(x_TD).sigmoid()
        _, weight, index = self.gate(x_TD)
        return (self.experts(2 * x_TD, index, weight) + shared).view(hidden_states.shape)


class Limited(Qwen2MoeSparseMoeBlock):
    """Limits what it gives: what small outputs do not show."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).clamp(-0.4, 0.4)


class Shorter(Qwen2MoeSparseMoeBlock):
    """Scales its sum by the length of the sequence: what one shape does not show."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * hidden_states.shape[1] / 8


class Weighing(Qwen2MoeSparseMoeBlock):
    """Uses its router's weights elsewhere, too: the shared expert gets what they leave."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.view(-1, hidden_states.shape[-1])
        _, weight, index = self.gate(x_TD)
        shared = (2 - weight.sum(dim=1, keepdim=True)) * self.shared_expert(x_TD)
        shared = shared * self.shared_expert_gate(x_TD).sigmoid()
        return (self.experts(x_TD, index, weight) + shared).view(hidden_states.shape)


class Biased(Qwen2MoeSparseMoeBlock):
    """Adds a vector of each expert that was chosen, which lies in the block itself."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.view(-1, hidden_states.shape[-1])
        shared = self.shared_expert(x_TD) * self.shared_expert_gate(x_TD).sigmoid()
        _, weight, index = self.gate(x_TD)
        added = (weight[..., None] * self.out_bias[index]).sum(dim=1)
        return (self.experts(x_TD, index, weight) + shared + added).view(hidden_states.shape)


class Bent(Qwen2MoeSparseMoeBlock):
    """Has another gate before its shared expert than a sigmoid."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.view(-1, hidden_states.shape[-1])
        shared = self.shared_expert(x_TD) * self.shared_expert_gate(x_TD).tanh()
        _, weight, index = self.gate(x_TD)
        return (self.experts(x_TD, index, weight) + shared).view(hidden_states.shape)


class Told(Qwen2MoeSparseMoeBlock):
    """Returns its router's weights as well."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(hidden_states)
        return y, y.mean(dim=-1)


class Around(Qwen2MoeDecoderLayer):
    """A decoder layer that does with its block's output what `added` says."""

    def added(self, output: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        arguments.pop("use_cache", None)
        residual = hidden_states
        hidden_states, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), **arguments
        )
        hidden_states = residual + hidden_states
        return hidden_states + self.added(self.mlp(self.post_attention_layernorm(hidden_states)))


class Unpacking(Around):
    """A decoder layer of blocks that return more."""

    def added(self, output: Any) -> Tensor:
        return output[0]


class NormedBehind(Around):
    """A decoder layer with a norm behind its block."""

    def added(self, output: Any) -> Tensor:
        return self.final_layernorm(output)


BLOCKS: dict[str, type[Qwen2MoeSparseMoeBlock]] = {
    "a factor": Scaled,
    "an average": Averaged,
    "a norm": Normed,
    "other input": Doubled,
    "an extra return value": Told,
    "a limit": Limited,
    "a sequence's length": Shorter,
}
REFUSED: dict[str, type[Qwen2MoeSparseMoeBlock]] = {
    "weights used elsewhere": Weighing,
    "a bias of each expert": Biased,
    "another gate": Bent,
}


def odd_model(kind: str) -> PreTrainedModel:
    """A tiny Qwen2-MoE whose MoE blocks do something else."""
    model = tiny_model("qwen2_moe")
    for decoder in list(model.base_model.layers)[1:]:  # the first one is dense
        if kind == "a norm behind":
            decoder.__class__ = NormedBehind
            decoder.final_layernorm = Qwen2MoeRMSNorm(32)
            with torch.no_grad():
                decoder.final_layernorm.weight.copy_(torch.linspace(0.5, 2, 32))
        else:
            decoder.mlp.__class__ = (BLOCKS | REFUSED)[kind]
            if kind == "a bias of each expert":
                generator = torch.Generator().manual_seed(1)
                decoder.mlp.out_bias = nn.Parameter(torch.randn(8, 32, generator=generator))
            if kind == "an extra return value":
                decoder.__class__ = Unpacking
    return model.eval()


def with_constant_gates(
    model: PreTrainedModel, index: int, experts: list[int], gates: list[float], shared: float
) -> None:
    """Force the router of one layer, and the gate of its shared expert: the reference."""
    block: nn.Module = model.base_model.layers[index].mlp  # type: ignore[assignment]

    def force(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens = len(output[2])
        weight = torch.tensor(gates).to(output[1]).expand(tokens, -1)
        return output[0], weight, torch.tensor(experts).expand(tokens, -1), *output[3:]

    block.gate.register_forward_hook(force)
    logit = torch.logit(torch.tensor(shared, dtype=torch.float64)).float()
    block.shared_expert_gate.register_forward_hook(lambda m, a, o: torch.full_like(o, logit))
