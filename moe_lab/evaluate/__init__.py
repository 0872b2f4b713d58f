"""How good a model is: tasks through lm-eval, and held-out text."""
