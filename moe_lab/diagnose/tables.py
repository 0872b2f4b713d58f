"""What a model's statistics say of its experts: tables by layer, by expert, by rank and by pair.

The figures follow Lo et al., "A Closer Look into Mixture-of-Experts in Large Language Models"
(2406.18219), where they have them. All of it is arithmetic on sums that a profile holds, and on the
similarity matrices of `similarity.py` where they were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from moe_lab.profile.layer import LayerStatistics

PROJECTIONS = ("gate", "up", "down")
MOST_PAIRS = 2016  # of a layer in pairs.csv: all of them for up to 64 experts
LEAST_EXPECTED = 0.5  # tokens; below, a ratio says nothing
ROUNDING = 1e-12  # a variance below this share of the mean square is a constant's
Similarities = Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Tables:
    """One row per layer; per layer and expert; per layer and rank; per layer and pair of experts.

    NaN where a figure does not exist: the mean norm of an expert without tokens, a correlation with
    something constant, the entropy of a router of unknown scoring, a similarity not asked for.
    """

    layers: pd.DataFrame
    experts: pd.DataFrame
    ranks: pd.DataFrame
    pairs: pd.DataFrame

    def save(self, folder: Path) -> None:
        """<name>.csv of each table, six digits a number."""
        for field in fields(self):
            table = getattr(self, field.name)
            table.to_csv(folder / f"{field.name}.csv", index=False, float_format="%.6g")

    def figures(self) -> dict[str, float]:
        """The model's figures: numbers of experts added up, the others as means over layers."""
        counts = ("dead_experts", "super_experts")
        means = ("usage_deviation", "gate_entropy", "gate_norm_correlation",
                 "weight_similarity", "output_similarity")  # fmt: skip
        totals = {name: int(self.layers[name].sum()) for name in counts}
        return totals | {name: float(self.layers[name].mean()) for name in means}


def tables(
    layers: Sequence[LayerStatistics],
    similarities: Similarities,
    super_experts: Mapping[int, Sequence[int]],
) -> Tables:
    """All figures of the layers. similarities: by layer index, see `similarity.py`; may be empty.

    super_experts: those of each layer that has some, by layer index.
    """
    rows: dict[str, list[pd.DataFrame]] = {"layers": [], "experts": [], "ranks": [], "pairs": []}
    for layer in layers:
        similar = similarities.get(layer.info.index, {})
        supers = super_experts.get(layer.info.index, ())
        experts = _experts(layer, similar, supers)
        rows["experts"].append(experts)
        rows["layers"].append(_layer(layer, similar, experts))
        rows["pairs"].append(_pairs(layer, similar))
        rows["ranks"].append(_ranks(layer))
    made = {name: pd.concat(parts, ignore_index=True) for name, parts in rows.items()}
    return Tables(**made)


def gate_norm_correlation(layer: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Pearson correlation of router weight and l2 norm of the output, over routed tokens.

    ([], [E]): over all pairs of a token and an expert of the layer, and over each expert's tokens;
    NaN where weight or norm is constant.
    """
    names = ("count", "gate_sum", "norm_sum", "gate_norm_sum", "gate_square_sum", "norm_square_sum")
    sums = [layer[name] for name in names]
    return _pearson(*(one.sum() for one in sums)), _pearson(*sums)


def _pearson(count: Tensor, x: Tensor, y: Tensor, xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Correlations from the sums of x, y, xy, x^2, y^2."""
    mean_x, mean_y = x / count, y / count
    variance_x, variance_y = xx / count - mean_x**2, yy / count - mean_y**2
    varies = (variance_x > ROUNDING * xx / count) & (variance_y > ROUNDING * yy / count)
    correlation = (xy / count - mean_x * mean_y) / (variance_x * variance_y).sqrt()
    return torch.where(varies, correlation, math.nan)


def coactivation(layer: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Tokens that chose both experts, observed and expected, [E, E]; the diagonals are 0.

    Expected of experts that are independent but for a token's never choosing one twice: a_i a_j,
    with the a for which every expert is in as many pairs as it is in fact (quasi-independence). The
    product of the experts' frequencies would expect too much: with even usage it is K^2 / E^2 of
    the tokens, where K (K - 1) / (E (E - 1)) have the pair.
    """
    observed = layer["pair_count"].clone().fill_diagonal_(0)
    pairs_E = observed.sum(dim=1)
    factor = pairs_E / pairs_E.sum().clamp(min=1).sqrt()
    for _ in range(1000):
        others = (factor.sum() - factor).clamp(min=torch.finfo(torch.float64).tiny)
        before, factor = factor, (factor * pairs_E / others).sqrt()
        if torch.allclose(before, factor, rtol=1e-10, atol=0):
            break
    return observed, torch.outer(factor, factor).fill_diagonal_(0)


def lift(observed: Tensor, expected: Tensor) -> Tensor:
    """Observed over expected tokens of each pair; NaN where less than half a token is expected."""
    return torch.where(expected >= LEAST_EXPECTED, observed / expected, math.nan)


def weight_similarity(similar: Mapping[str, Tensor]) -> Tensor | None:
    """The mean over an expert's matrices of their cosines, [E, E]; None where not asked for."""
    matrices = [similar[name] for name in PROJECTIONS if name in similar]
    return torch.stack(matrices).mean(dim=0) if matrices else None


def mean_of_pairs(matrix: Tensor | None) -> float:
    """The mean over pairs of different experts."""
    if matrix is None or len(matrix) < 2:
        return math.nan
    num_experts = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (num_experts * (num_experts - 1)))


def _layer(
    layer: LayerStatistics, similar: Mapping[str, Tensor], experts: pd.DataFrame
) -> pd.DataFrame:
    info, tokens = layer.info, float(layer["tokens"])
    entropy = float(layer["entropy_sum"]) / tokens if "entropy_sum" in layer.sums else math.nan
    choice = info.num_experts > 1  # else there is nothing to be uncertain of
    row = {
        "layer": info.index,
        "experts": info.num_experts,
        "top_k": info.top_k,
        "tokens": int(tokens),
        "usage_deviation": float(layer.usage().std(correction=0)),
        "most_used": int(layer["count"].argmax()),
        "most_used_share": float(layer["count"].max() / layer["count"].sum()),
        "dead_experts": int(experts["dead"].sum()),
        "super_experts": int(experts["super"].sum()),
        "gate_entropy": entropy,
        "gate_entropy_share": entropy / math.log(info.num_experts) if choice else math.nan,
        "first_share": float(layer["rank_share_sum"][0]) / tokens,
        "gate_norm_correlation": float(gate_norm_correlation(layer)[0]),
        "weight_similarity": mean_of_pairs(weight_similarity(similar)),
    }
    row |= {f"{name}_similarity": mean_of_pairs(similar.get(name))
            for name in (*PROJECTIONS, "router", "output")}  # fmt: skip
    row["chosen_norm"] = float(similar["chosen_norm"]) if "chosen_norm" in similar else math.nan
    return pd.DataFrame([row])


def _experts(
    layer: LayerStatistics, similar: Mapping[str, Tensor], supers: Sequence[int]
) -> pd.DataFrame:
    """An expert's figures; by weight and by output also the expert that is most like it."""
    count = layer["count"]
    seen = torch.where(count > 0, 1.0, math.nan)
    columns = {
        "layer": layer.info.index,
        "expert": range(layer.info.num_experts),
        "tokens": count.long(),
        "usage": layer.usage(),
        "mean_weight": layer.mean("gate_sum") * seen,
        "mean_norm": layer.mean("norm_sum") * seen,
        "max_activation": layer["max_activation"].double() * seen,
        "router_norm": layer["router_norm"],
        "gate_norm_correlation": gate_norm_correlation(layer)[1],
        "dead": count == 0,
        "super": [expert in supers for expert in range(layer.info.num_experts)],
    }
    for name, matrix in (("weight", weight_similarity(similar)), ("output", similar.get("output"))):
        if matrix is not None:
            nearest = matrix.clone().fill_diagonal_(-math.inf).max(dim=1)
            columns |= {
                f"nearest_{name}": nearest.indices,
                f"nearest_{name}_cosine": nearest.values,
            }
    return pd.DataFrame(columns)


def _ranks(layer: LayerStatistics) -> pd.DataFrame:
    """The mean share that the heaviest, second, ... expert has of a token's weight; from rank 1."""
    share_K = layer["rank_share_sum"] / layer["tokens"]
    ranks = range(1, len(share_K) + 1)
    return pd.DataFrame({"layer": layer.info.index, "rank": ranks, "share": share_K})


def _pairs(layer: LayerStatistics, similar: Mapping[str, Tensor]) -> pd.DataFrame:
    """A layer's pairs; those most above what is expected (in Poisson deviations) come first."""
    observed, expected = coactivation(layer)
    one, other = torch.triu_indices(layer.info.num_experts, layer.info.num_experts, offset=1)
    deviations = (observed - expected) / expected.clamp(min=LEAST_EXPECTED).sqrt()
    columns = {
        "layer": layer.info.index,
        "expert": one,
        "other": other,
        "tokens": observed[one, other].long(),
        "expected": expected[one, other],
        "lift": lift(observed, expected)[one, other],
        "deviations": deviations[one, other],
    }
    columns |= {
        f"{name}_cosine": similar[name][one, other]
        for name in (*PROJECTIONS, "router", "output")
        if name in similar
    }
    table = pd.DataFrame(columns).sort_values("deviations", ascending=False, kind="stable")
    return table.head(MOST_PAIRS)
