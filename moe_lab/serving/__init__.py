"""What serving engines make of the checkpoints that moe_lab writes: right, refused, or wrong."""
