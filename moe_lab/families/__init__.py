"""What works for which MoE model type of the installed transformers, and how that is checked."""
