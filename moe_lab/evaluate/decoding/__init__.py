"""How a model's text is decoded in evaluation: a file each."""
