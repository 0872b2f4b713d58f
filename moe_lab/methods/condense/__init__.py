"""CD-MoE (2412.00069): which layers become dense, with which experts and which gates."""
