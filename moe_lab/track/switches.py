"""W&B's own switches in the environment, beside track.mode: the one that shows less decides."""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)
MODES = ("off", "offline", "online")  # each shows more than the one before
OF_WANDB = {
    "disabled": "off", "offline": "offline", "dryrun": "offline", "online": "online",
    "run": "online", "shared": "online",
}  # fmt: skip
TRUE = ("1", "t", "true", "y", "yes", "on")


def mode_of(asked: str, environment: Mapping[str, str]) -> str:
    """How a run is tracked by track.mode and W&B's switches; what contradicts is said.

    Neither a config's online uploads what WANDB_MODE or WANDB_DISABLED keeps here, nor the other
    way about.
    """
    if asked not in MODES:  # about to be refused
        return "off"
    said = {"track.mode": (asked, asked)}
    word = environment.get("WANDB_MODE", "").strip()
    if word.lower() in OF_WANDB:
        said["WANDB_MODE"] = (word, OF_WANDB[word.lower()])
    elif word:
        logger.warning(
            "WANDB_MODE=%s is none of %s: track.mode=%s decides", word, ", ".join(OF_WANDB), asked
        )
    if environment.get("WANDB_DISABLED", "").strip().lower() in TRUE:
        said["WANDB_DISABLED"] = (environment["WANDB_DISABLED"], "off")
    name = min(said, key=lambda one: MODES.index(said[one][1]))
    word, mode = said[name]
    others = [f"{one}={said[one][0]}" for one in said if said[one][1] != mode]
    if others:
        logger.warning("W&B: %s=%s decides, not %s", name, word, " or ".join(others))
    return mode
