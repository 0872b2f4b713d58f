"""Writing an edited model that is in memory, so that stock transformers reads it where possible.

Where the family's own config can say an edited structure, it is saved so. Otherwise in our own form
(`own_config.py`), whose structures are replayed on the model before the weights come in. It is
written as any other checkpoint is (`streamed.py`), a decoder layer at a time.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from moe_lab.models.edited_model import Saving
from moe_lab.models.forms import Form
from moe_lab.models.layerwise import WholeModel
from moe_lab.models.streamed import write_model
from moe_lab.types import LmHeadName, MtpName


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    source: Path,
    padding: float | None = None,
    twins: float = 0.0,
    convert: str | None = None,
    mtp: MtpName = "prune",
    lm_head: LmHeadName = "auto",
) -> Form:
    """Write an edited model as a checkpoint, in the form that is returned.

    Parameters are written in the dtype of the checkpoint at `source`, whose tokenizer comes along.
    For the others see `edited_model.Saving`. The model is not changed except for its config, the
    rounding of its tensors, and the experts and dense layers that are filled up. What was written
    is read back and compared (`shard_writer.py`, `reading_back.py`), and its config with its folder
    (`promises.py`).
    """
    how = Saving(padding, convert, mtp, lm_head, twins)
    return write_model(WholeModel(model), folder, source, how)
