"""What may happen to a layer: a file for each kind of edit, and plans, which are made of them."""
