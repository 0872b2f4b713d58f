"""Fine-tuning: the recipes, a file each, and the loop that trains them."""
