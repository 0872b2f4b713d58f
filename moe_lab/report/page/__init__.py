"""One page for a sweep: a single file that works offline and asks no network."""
