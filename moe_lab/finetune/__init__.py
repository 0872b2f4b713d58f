"""Fine-tuning recipes: what is trainable, which loss, which schedule."""
