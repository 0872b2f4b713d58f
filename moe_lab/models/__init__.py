"""All knowledge of transformers: what an MoE layer is, how it is watched, edited and saved."""
