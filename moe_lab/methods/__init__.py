"""From a profile to a plan that says what happens to each layer: a file for each method."""
