"""W&B's switches in the environment: honoured, and said where they contradict track.mode."""

from __future__ import annotations

import pytest

from moe_lab.track.switches import mode_of


@pytest.mark.parametrize(
    ("asked", "environment", "mode", "told"),
    [
        ("online", {}, "online", ""),
        ("offline", {"WANDB_MODE": "offline"}, "offline", ""),
        ("offline", {"WANDB_MODE": "dryrun"}, "offline", ""),
        ("off", {"WANDB_DISABLED": "true"}, "off", ""),
        ("online", {"WANDB_MODE": ""}, "online", ""),
        ("online", {"WANDB_DISABLED": "false"}, "online", ""),
        ("online", {"WANDB_MODE": "offline"}, "offline", "WANDB_MODE=offline decides, not track.m"),
        ("online", {"WANDB_MODE": "disabled"}, "off", "WANDB_MODE=disabled decides, not track.mo"),
        ("offline", {"WANDB_MODE": "Disabled"}, "off", "decides, not track.mode=offline"),
        (
            "offline",
            {"WANDB_MODE": "online"},
            "offline",
            "track.mode=offline decides, not WANDB",
        ),
        ("off", {"WANDB_MODE": "online"}, "off", "track.mode=off decides, not WANDB_MODE=online"),
        ("online", {"WANDB_DISABLED": "1"}, "off", "WANDB_DISABLED=1 decides, not track.mode=onl"),
        (
            "offline",
            {"WANDB_DISABLED": "Yes", "WANDB_MODE": "online"},
            "off",
            "or WANDB_MODE",
        ),
        ("online", {"WANDB_MODE": "sometimes"}, "online", "WANDB_MODE=sometimes is none of"),
    ],
)
def test_the_one_that_shows_less_decides(
    asked: str,
    environment: dict[str, str],
    mode: str,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("WARNING"):
        assert mode_of(asked, environment) == mode
    assert told in caplog.text if told else not caplog.text
