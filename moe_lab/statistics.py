"""What one pass over the calibration set collects at each MoE layer.

Every statistic is a sum in float64 over valid tokens, so that sums of batches, processes and
restarts add up to the same values; nothing is divided before a metric needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from moe_lab.observing import observe
from moe_lab.types import LayerInfo, Routing, UserError

SCORINGS = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


class LayerStatistics:
    """The sums of one layer.

    Per expert [E]: count, tokens that the router sent to it; gate_sum, of its router weight over
    them; probability_sum, of the router's full probability over all tokens (SEER-MoE 2404.05089,
    soft count); norm_sum, of the l2 norm of its output; gate_norm_sum, of weight times norm.
    Per pair of experts [E, E]: logit_product_sum, of the products of their router logits.
    Scalars [1]: tokens; shared_gate_sum, of the shared expert's sigmoid gate over all tokens;
    block_cosine_sum and layer_cosine_sum, of the cosine between what enters and what leaves the
    decoder layer, or its MoE sublayer alone (x and x + MoE(norm(x)); He et al. 2406.02500).
    """

    def __init__(self, info: LayerInfo, sums: dict[str, Tensor] | None = None):
        self.info = info
        self.sums = sums or {}
        self.scoring: str | None = None

    def add(self, routing: Routing) -> None:
        """Add one batch."""
        num_experts, tokens = self.info.num_experts, len(routing.x_TD)
        if self.scoring is None and tokens:
            self.scoring = router_scoring(routing)
        # Norms of half-precision outputs would overflow and round: at least float32 is used.
        exact = torch.promote_types(routing.y_SD.dtype, torch.float32)
        norm_S = torch.linalg.vector_norm(routing.y_SD, dim=-1, dtype=exact).double()
        weight_S = routing.weight_S.double()
        expert_S = routing.expert_S

        def per_expert(values_S: Tensor | None) -> Tensor:
            return torch.bincount(expert_S, weights=values_S, minlength=num_experts).double()

        self._add("tokens", torch.tensor([float(tokens)], dtype=torch.float64))
        self._add("count", per_expert(None))
        self._add("gate_sum", per_expert(weight_S))
        self._add("norm_sum", per_expert(norm_S))
        self._add("gate_norm_sum", per_expert(weight_S * norm_S))
        logits_TE = routing.logits_TE.double()
        self._add("logit_product_sum", logits_TE.T @ logits_TE)
        if routing.leaving_TD is not None:
            leaving = routing.leaving_TD.to(exact)
            for name, state in (("block", routing.entering_TD), ("layer", routing.residual_TD)):
                cosine_T = F.cosine_similarity(state.to(exact), leaving, dim=-1)
                self._add(f"{name}_cosine_sum", cosine_T.sum(dtype=torch.float64)[None])
        if self.scoring is not None:
            probability_TE = SCORINGS[self.scoring](routing.logits_TE.to(exact))
            self._add("probability_sum", probability_TE.sum(dim=0, dtype=torch.float64))
        if routing.shared_gate_T is not None:
            self._add("shared_gate_sum", routing.shared_gate_T.double().sum()[None])

    def _add(self, name: str, value: Tensor) -> None:
        value = value.cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sums:
            reason = (
                "its router's weights follow none of the known scorings "
                f"({', '.join(SCORINGS)}), so it has no full probability"
                if name == "probability_sum"
                else f"it has {sorted(self.sums)}"
            )
            raise UserError(f"layer {self.info.index} has no statistic {name!r}: {reason}")
        return self.sums[name]

    def mean_cosine(self, name: str) -> float:
        """Mean over tokens of the `name` ("block" or "layer") cosine."""
        return float(self[f"{name}_cosine_sum"] / self["tokens"])

    def logit_cosine(self) -> Tensor:
        """Cosine [E, E] of the experts' router logits over all tokens; 0 for logits always 0."""
        product = self["logit_product_sum"]
        norm = product.diagonal().sqrt()
        scale = norm[:, None] * norm[None, :]
        return torch.where(scale > 0, product / scale, torch.zeros_like(product))

    def mean(self, name: str) -> Tensor:
        """A sum over routed tokens divided by their count; 0 for experts that saw no token."""
        count = self["count"]
        return torch.where(count > 0, self[name] / count.clamp(min=1), torch.zeros_like(count))


def router_scoring(routing: Routing) -> str | None:
    """Which function of the logits the router's weights are, up to one factor per token.

    Found by looking, since no config field says it in all families: the weights of the chosen
    experts are proportional to softmax(logits) also where they are renormalised, scaled, or a
    softmax over the chosen logits alone. None where no known function fits.
    """
    weight = routing.weight_TK.double()
    for name, score in SCORINGS.items():
        chosen = score(routing.logits_TE.double()).gather(1, routing.index_TK)
        if weight.shape[1] == 1:  # one expert: the factor must be the same for all tokens
            ratio = weight / chosen
            spread = (ratio / ratio[:1] - 1).abs().amax()
        else:
            shares = chosen / chosen.sum(dim=1, keepdim=True)
            spread = (weight / weight.sum(dim=1, keepdim=True) - shares).abs().amax()
        if spread < 2e-2 if routing.weight_TK.dtype != torch.float32 else spread < 1e-4:
            return name
    return None


def collect(model: torch.nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[LayerStatistics]:
    """All statistics of a model in one pass over `batches` (input_ids, attention_mask [B, L])."""
    layers: dict[int, LayerStatistics] = {}

    def add(info: LayerInfo, routing: Routing) -> None:
        layers.setdefault(info.index, LayerStatistics(info)).add(routing)

    with torch.inference_mode(), observe(model, add) as observation:
        for batch in batches:
            observation.valid = batch["attention_mask"].bool()
            # Only the last position's logits: nobody reads them, and they would dominate.
            model(**batch, use_cache=False, logits_to_keep=1)
    return [layers[index] for index in sorted(layers)]


def save(layers: Iterable[LayerStatistics], folder: Path) -> None:
    """One safetensors file a layer, and `layers.json` that names them."""
    infos = []
    for layer in layers:
        sums = {name: value.contiguous() for name, value in layer.sums.items()}
        save_file(sums, folder / f"layer_{layer.info.index:03d}.safetensors")
        infos.append(asdict(layer.info))
    (folder / "layers.json").write_text(json.dumps(infos, indent=1) + "\n")


def load(folder: Path) -> list[LayerStatistics]:
    """Read what `save` wrote."""
    infos = [LayerInfo(**values) for values in json.loads((folder / "layers.json").read_text())]
    return [
        LayerStatistics(info, load_file(folder / f"layer_{info.index:03d}.safetensors"))
        for info in infos
    ]
