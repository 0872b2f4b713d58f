"""The largest component that an expert ever put out."""

import torch

from moe_lab.profile.layer import LayerStatistics


def max_activation(layer: LayerStatistics) -> torch.Tensor:
    """Largest absolute component of an expert's output over its routed tokens [E].

    S_j = max_{x in X_j} ||f_j(x)||_inf, by which Su et al. (2507.23279) find super experts. 0 for
    an expert that saw no token.
    """
    return layer["max_activation"]
