"""Metrics of neurons that ask the gradient of the model's loss: their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.methods.metrics.base import Metric
from moe_lab.models.backward import LABEL_KINDS, LossLabels
from moe_lab.option import Option
from moe_lab.profile.gradients import NeuronGradients, neuron_gradients
from moe_lab.profile.profile import Profile


@dataclass(frozen=True)
class ByGradient(Metric):
    """Which loss it is, and on which text. Shared experts have no score."""

    labels: Annotated[
        str, Option("the loss's next tokens: the text's, or the model's own", among=LABEL_KINDS)
    ] = "text"
    samples: Annotated[
        int, Option("of labels=sampled: draws for each position, a backward pass each", least=1)
    ] = 4
    seed: Annotated[int, Option("of labels=sampled: seed of what is drawn", least=0)] = 0
    num_samples: Annotated[
        int | None, Option("first calibration samples, null for all of them", least=1)
    ] = None

    needs_model = True
    scores_shared = False

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that decide: nothing is drawn where the labels are the text."""
        unused = ("samples", "seed") if self.labels == "text" else ()
        return {name: value for name, value in options.items() if name not in unused}

    def gradients(self, profile: Profile) -> list[NeuronGradients]:
        """What there is of each layer in order."""
        labels = LossLabels(self.labels, self.samples, self.seed)
        return neuron_gradients(profile, labels, self.num_samples)
