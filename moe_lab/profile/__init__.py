"""What is measured of an intact model: the sums of one pass, and more where somebody asks."""
