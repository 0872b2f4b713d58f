"""Tables and pictures of whole jobs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from running import Job

PICTURES = ("usage", "norms", "max_activation", "router_norm", "gate_norm_correlation", "ranks",
            "depth", "coactivation", "similarity_weight", "similarity_router")  # fmt: skip


def check_picture(path: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert 300 <= height <= 1800 and 600 <= width <= 1900, path.name
    colours = np.unique((pixels * 255).astype(int) @ [65536, 256, 1])
    assert pixels.std() > 0.05 and len(colours) > 20, path.name


def test_a_whole_job(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asked = ("method=none", "diagnose=full", "diagnose.num_samples=4")
    first = job(*asked)
    assert first.code == 0, first.text
    home = tmp_path / "job" / "diagnosis"
    names = {path.stem for path in home.glob("*.png")}
    assert names == {*PICTURES, "similarity_output"}
    for path in home.glob("*.png"):
        check_picture(path)
    assert {path.stem for path in home.glob("*.pdf")} == names
    read = {path.stem: pd.read_csv(path) for path in home.glob("*.csv")}
    assert {name: len(table) for name, table in read.items()} == {
        "layers": 3, "experts": 24, "ranks": 9, "pairs": 84,
    }  # fmt: skip
    assert list(read["layers"]["layer"]) == [1, 2, 3] and not read["layers"].isna().any().any()
    assert first.report["diagnosis/dead_experts"] == read["experts"]["dead"].sum()
    for name in ("usage_deviation", "gate_entropy", "gate_norm_correlation", "weight_similarity",
                 "output_similarity"):  # fmt: skip
        found = first.report[f"diagnosis/{name}"]
        assert found == pytest.approx(read["layers"][name].mean(), rel=1e-4)
    assert first.report["cached/diagnose"] is False
    assert first.stages() == ["diagnose", "plan", "profile", "similarity"]
    assert (
        "every expert on every token" in first.text
        and "weights of all experts are read" in first.text
    )
    again = job(*asked)
    assert again.report["cached/diagnose"] is True
    alike = {key for key in first.report if key.startswith("diagnosis/")}
    assert len(alike) == 7 and all(first.report[key] == again.report[key] for key in alike)


def test_the_profile_alone(job: Job, tmp_path: Path) -> None:
    done = job("diagnose=full", "diagnose.num_samples=0", "diagnose.weights=false",
               "ratio.ratio=0.25")  # fmt: skip
    assert done.code == 0, done.text
    names = {path.stem for path in (tmp_path / "job" / "diagnosis").glob("*.png")}
    assert names == {name for name in PICTURES if not name.startswith("similarity")}
    assert done.report["diagnosis/weight_similarity"] is None
