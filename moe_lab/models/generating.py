"""Generating text in ways that transformers' `generate` has not, as its `custom_generate`.

`generate` prepares prompts, masks, caches and stopping as always, and calls what is here in the
place of its own loop. Letters: V words of the vocabulary, N candidates; see `types.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_lab.types import UserError

Next = Callable[[Tensor], Tensor]  # of ids [B, L]: the next token of each row [B]


class Pass:
    """One model's forward passes over a growing text, with a cache of its own.

    prepared: what `generate` hands to its loops; a cache in it stays as it is, and a copy is used.
    """

    def __init__(self, model: PreTrainedModel, prepared: dict[str, Any], **further: Any):
        self.model: Any = model  # some of what a loop needs is typed as a tensor
        self.state = {
            name: value if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in (prepared | further).items()
        }
        self.begun = False

    def __call__(self, ids_BL: Tensor) -> Any:
        """The output for what is new in the text: all of it at first, then its last token."""
        length = 1 if self.begun and self.state.get("use_cache", True) else None
        given = self.model.prepare_inputs_for_generation(
            ids_BL, next_sequence_length=length, is_first_iteration=not self.begun, **self.state
        )
        output = self.model(**given, return_dict=True)
        self.state = self.model._update_model_kwargs_for_generation(output, self.state)
        self.begun = True
        return output

    def next_logits(self, ids_BL: Tensor) -> Tensor:
        """The logits [B, V] of the next token."""
        logits_BV: Tensor = self(ids_BL).logits[:, -1].float()
        return logits_BV

    def repeat(self, number: int) -> None:
        """Each row `number` times, one behind the other."""
        self._cache().batch_repeat_interleave(number)
        self._each_row(lambda tensor: tensor.repeat_interleave(number, dim=0))

    def select(self, rows: Tensor) -> None:
        """These rows alone."""
        self._cache().batch_select_indices(rows)
        self._each_row(lambda tensor: tensor[rows])

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, value in self.state.items():
            if isinstance(value, Tensor) and value.dim() > 1:
                self.state[name] = change(value)

    def _cache(self) -> Any:
        cache = self.state["past_key_values"]
        layers = getattr(cache, "layers", [])
        if any(not hasattr(layer, "batch_repeat_interleave") for layer in layers):
            raise UserError(
                f"decoding=contrastive: the cache of the family {self.model.config.model_type!r} "
                "(with states that are no keys and values) cannot be repeated for candidates; "
                "greedy, scmoe and dynamic work with it"
            )
        return cache


def extended(
    model: Any,
    ids_BL: Tensor,
    next_of: Next,
    stopping_criteria: Any,
    generation_config: Any,
) -> Tensor:
    """The ids with what follows, until every row is stopped; a stopped row gets padding.

    UserError where the task asks for what such a loop does not do.
    """
    if generation_config.do_sample or (generation_config.num_beams or 1) > 1:
        raise UserError(
            "the task asks for sampling or beams (its generation_kwargs), and eval.decoding "
            "decides the next token itself: decoding=greedy or dynamic leave that to the task"
        )
    pad = generation_config._pad_token_tensor
    running_B = torch.ones(len(ids_BL), dtype=torch.bool, device=ids_BL.device)

    def step(ids_BL: Tensor, running_B: Tensor) -> tuple[Tensor, Tensor]:
        next_B = next_of(ids_BL)
        if pad is not None:
            next_B = torch.where(running_B, next_B, pad.to(next_B.device))
        ids_BL = torch.cat([ids_BL, next_B[:, None]], dim=-1)
        return ids_BL, running_B & ~stopping_criteria(ids_BL, None)

    ids_BL, running_B = step(ids_BL, running_B)  # the prompts
    with model._optimize_model_for_decode():
        while bool(running_B.any()):
            ids_BL, running_B = step(ids_BL, running_B)
    return ids_BL


@dataclass(frozen=True)
class TwoPasses:
    """Each token by the logits of a model and of the same model routed otherwise.

    strongly, weakly: the contexts in which each of the passes is made; combine(strong_BV, weak_BV):
    the scores of which the highest is taken. The passes share no cache: each reads the prompt.
    """

    strongly: Callable[[], AbstractContextManager[None]]
    weakly: Callable[[], AbstractContextManager[None]]
    combine: Callable[[Tensor, Tensor], Tensor]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **prepared: Any,
    ) -> Tensor:
        """A loop of `generate`."""
        strong, weak = Pass(model, prepared), Pass(model, prepared)

        def next_of(ids_BL: Tensor) -> Tensor:
            with self.strongly():
                strong_BV = logits_processor(ids_BL, strong.next_logits(ids_BL))
            with self.weakly():
                weak_BV = weak.next_logits(ids_BL)
            return self.combine(strong_BV, weak_BV).argmax(dim=-1)

        return extended(model, input_ids, next_of, stopping_criteria, generation_config)


@dataclass(frozen=True)
class ContrastiveSearch:
    """Contrastive search (Su et al., 2202.06417): of the `candidates` likeliest tokens the one with
    the highest (1 - penalty) p(v) - penalty max_j cos(h_v, h_j).

    h_v is the last hidden state where the candidate is the next token, h_j those of all tokens
    before; padding is none of them. One forward of B * candidates rows a token, whose logits serve
    for the next one.
    """

    candidates: int
    penalty: float

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **prepared: Any,
    ) -> Tensor:
        """A loop of `generate`."""
        one = Pass(model, prepared, output_hidden_states=True)
        first = one(input_ids)
        logits_BV = first.logits[:, -1].float()
        states_BLD = F.normalize(first.hidden_states[-1].float(), dim=-1)
        mask = prepared.get("attention_mask")
        mask_BL = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()

        def next_of(ids_BL: Tensor) -> Tensor:
            nonlocal logits_BV, states_BLD, mask_BL
            scores_BV = logits_processor(ids_BL, logits_BV)
            likely_BN, token_BN = scores_BV.softmax(dim=-1).topk(self.candidates, dim=-1)
            one.repeat(self.candidates)
            looked = one(token_BN.reshape(-1, 1))
            state_BND = F.normalize(looked.hidden_states[-1][:, -1].float(), dim=-1)
            state_BND = state_BND.reshape(*token_BN.shape, -1)
            chosen_B1 = self._chosen(likely_BN, state_BND, states_BLD, mask_BL)
            rows_B = torch.arange(len(ids_BL), device=ids_BL.device)
            rows_B = rows_B * self.candidates + chosen_B1[:, 0]
            one.select(rows_B)
            logits_BV = looked.logits[rows_B, -1].float()
            newest = state_BND.gather(1, chosen_B1[..., None].expand(-1, -1, state_BND.shape[-1]))
            states_BLD = torch.cat([states_BLD, newest], dim=1)
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], dim=1)
            taken_B1: Tensor = token_BN.gather(1, chosen_B1)
            return taken_B1[:, 0]

        return extended(model, input_ids, next_of, stopping_criteria, generation_config)

    def _chosen(
        self, likely_BN: Tensor, state_BND: Tensor, states_BLD: Tensor, mask_BL: Tensor
    ) -> Tensor:
        """Which candidate [B, 1] of each row is taken."""
        cosine_BNL = state_BND @ states_BLD.mT
        degenerate_BN = cosine_BNL.masked_fill(~mask_BL[:, None], -torch.inf).amax(dim=-1)
        score_BN = (1 - self.penalty) * likely_BN - self.penalty * degenerate_BN
        chosen_B1: Tensor = score_BN.argmax(dim=-1, keepdim=True)
        return chosen_B1
