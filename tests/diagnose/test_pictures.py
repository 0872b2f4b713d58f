"""Pictures of a diagnosis: pages, colours that all layers share, what is left out of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from pictured_runs import check

from moe_lab.diagnose import pictures
from moe_lab.diagnose.tables import Tables


def drawn(folder: Path, name: str, *matrices: np.ndarray, factors: bool = False) -> list[bytes]:
    """The bytes of each page."""
    layers = dict(enumerate(matrices))
    paths = pictures.by_pair(layers, folder / name, "Pairs", "unit", factors=factors)
    return [path.read_bytes() for path in paths]


def test_many_layers_are_pages_of_twelve(tmp_path: Path) -> None:
    matrices = {3 * layer: np.eye(4) * 0.5 + layer / 10 for layer in range(14)}
    paths = pictures.by_pair(matrices, tmp_path / "pairs", "Similarity", "cosine")
    assert [path.name for path in paths] == ["pairs_1.png", "pairs_2.png"]
    for path in paths:
        check(path)
    assert [path.name for path in tmp_path.glob("*.png") if path not in paths] == []
    (one,) = pictures.by_pair({0: np.eye(4)}, tmp_path / "one", "Similarity", "cosine")
    assert one.name == "one.png"


def test_an_expert_beside_itself_is_not_shown(tmp_path: Path) -> None:
    matrix = np.arange(16.0).reshape(4, 4)
    other = matrix + np.diag([7.0, 70.0, 700.0, -7.0])
    plain = drawn(tmp_path, "a", matrix)
    assert plain == drawn(tmp_path, "b", other) != drawn(tmp_path, "c", matrix.T)
    assert matrix[3, 3] == 15, "what was given stays as it was"


def test_factors_beyond_four_take_the_last_colour(tmp_path: Path) -> None:
    more, much_more, less, much_less, even = (
        drawn(tmp_path, str(value), np.full((4, 4), value), factors=True)
        for value in (4.0, 99.0, 1 / 4, 1 / 99, 1.0)
    )
    assert more == much_more and less == much_less
    assert more != less and even not in (more, less)


def test_a_lift_of_nothing_is_the_lowest_colour_and_no_hole(tmp_path: Path) -> None:
    """Experts that no token chose together; grey is where none was to be expected."""
    never, seldom, unknown = (
        drawn(tmp_path, name, np.full((4, 4), value), factors=True)
        for name, value in (("never", 0.0), ("seldom", 0.01), ("unknown", np.nan))
    )
    assert never == seldom != unknown


def test_all_pictures_of_a_diagnosis(tmp_path: Path) -> None:
    experts = pd.DataFrame({"layer": [1, 1, 2, 2], "expert": [0, 1, 0, 1]})
    for number, column in enumerate(pictures.BY_EXPERT):
        experts[column] = [0.1 + number, 0.5, 0.2, 0.9]
    experts["dead"] = experts["super"] = [False, True, False, False]
    layers = pd.DataFrame({"layer": [1, 2], "usage_deviation": [0.5, 0.7], "chosen_norm": np.nan})
    shares = [(layer, rank, share) for layer in (1, 2) for rank, share in ((1, 0.7), (2, 0.3))]
    ranks = pd.DataFrame(shares, columns=["layer", "rank", "share"])
    matrices = {1: np.eye(2) + 0.5, 2: np.eye(2) + 0.25}
    made = Tables(layers, experts, ranks, pd.DataFrame())
    pictures.draw_experts(made, matrices, {"weight": matrices, "output": matrices}, tmp_path)
    names = "coactivation depth gate_norm_correlation max_activation norms ranks router_norm"
    expected = [*names.split(), "similarity_output", "similarity_weight", "usage"]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == expected
    assert sorted(path.stem for path in tmp_path.glob("*.pdf")) == expected


def test_lines_and_bars_are_pictures(tmp_path: Path) -> None:
    layers = pd.DataFrame({"layer": [1, 2, 5], "a": [0.1, 0.5, 0.2], "b_experts": [0, 1, 0]})
    panels = [("a", {"a": "one"}), ("experts", {"b_experts": "dead"})]
    pictures.over_depth(layers, panels, tmp_path / "depth.png", "Over depth")
    shares = [(layer, rank, 0.7 if rank == 1 else 0.3) for layer in (1, 2) for rank in (1, 2)]
    ranks = pd.DataFrame(shares, columns=["layer", "rank", "share"])
    pictures.by_rank(ranks, tmp_path / "ranks.png", "Ranks")
    for name in ("depth", "ranks"):
        check(tmp_path / f"{name}.png")
