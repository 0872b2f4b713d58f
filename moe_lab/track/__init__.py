"""Where runs are tracked: Weights & Biases, TensorBoard."""
