"""Jobs and sweeps, from start to end; `python -m moe_lab.runs FOLDER` looks after them."""
