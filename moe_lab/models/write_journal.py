"""How far a checkpoint that is being written has come: noted, and checked on the way."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.integrity import PARTIAL, Seals, put_in_place
from moe_lab.models.layerwise import LayerSource
from moe_lab.models.reading_back import FewTokens
from moe_lab.models.stream import check_state
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
JOURNAL = "written.safetensors"  # beside the checkpoint, until it is whole


class WriteJournal:
    """What is done of a checkpoint that is being written, in a file that is there whole or not.

    done: the seals of finished files, by their names; next_layer: the decoder layer that the few
    tokens come to, and hidden, what it gets of them: None where nothing was noted. They are those
    of an attempt at the very same files. path: None, and nothing is noted.
    """

    def __init__(self, path: Path | None):
        self.path, self.digest = path, ""
        self.done: Seals = {}
        self.next_layer = 0
        self.hidden: Tensor | None = None

    def of(self, digest: str) -> bool:
        """Read what an earlier attempt noted of these files; whether there is something."""
        self.digest = digest
        if self.path is None:
            return False
        try:
            with safe_open(self.path, "pt") as file:
                noted = json.loads(file.metadata()["written"])
                hidden = file.get_tensor("hidden")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return False
        if noted["digest"] != digest:
            return False
        self.done, self.next_layer = noted["done"], noted["next_layer"]
        self.hidden = hidden if hidden.numel() else None
        logger.info("writing goes on: %d files are written", len(self.done))
        return True

    def note(self, done: Seals, replay: Replay | None = None) -> None:
        """Note what is done by now; replay: the few tokens, where some are on their way."""
        if self.path is None:
            return
        next_layer = replay.next_layer if replay else 0
        noted = {
            "digest": self.digest,
            "done": dict(sorted(done.items())),
            "next_layer": next_layer,
        }
        hidden = replay.hidden if replay and replay.resumable else torch.empty(0)
        partial = self.path.with_name(self.path.name + PARTIAL)
        save_file({"hidden": hidden.contiguous()}, partial, {"written": json.dumps(noted)})
        put_in_place(partial, self.path)

    def remove(self) -> None:
        """Forget all, when the checkpoint is whole."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Replay:
    """The few tokens on their way through the edited layers, from where an attempt broke off.

    checked: through which ones, all where layers hand on more than the hidden state.
    """

    def __init__(
        self,
        source: LayerSource,
        numbers: Collection[int],
        compared: Sequence[int],
        journal: WriteJournal,
    ):
        self.few: FewTokens | None = None
        self.next_layer = 0
        try:
            self.few = FewTokens(source)
        except UserError as error:
            logger.info("%s", error)
        if self.few and self.few.hands_on and 0 not in numbers:
            self.few = None  # what the first layer hands on would be missing
        self.checked = list(numbers if self.few and self.few.hands_on else compared)
        if self.few is None:
            self.next_layer = len(source.layers)
        elif self.resumable and journal.hidden is not None:
            self.next_layer, self.few.hidden = journal.next_layer, journal.hidden

    @property
    def resumable(self) -> bool:
        """Whether the hidden state is all that the next layer gets."""
        return self.few is not None and not self.few.hands_on

    @property
    def hidden(self) -> Tensor:
        """What the next layer gets."""
        assert self.few is not None
        return self.few.hidden

    def awaits(self, index: int) -> bool:
        """Whether the tokens go through a decoder layer, and are not behind it."""
        return self.few is not None and index in self.checked and index >= self.next_layer

    def through(self, index: int) -> None:
        """Through a decoder layer, which is open, if the tokens go there.

        NotFinite where what comes out of it is not finite.
        """
        if self.few is not None and self.awaits(index):
            self.few.through(index)
            check_state(self.few.hidden, index)
            self.next_layer = index + 1

    def logits(self) -> Tensor | None:
        """The edited model's logits, behind all layers; None where they cannot be had."""
        return self.few.logits() if self.few is not None else None
