"""The stages of a run; each says what its result depends on, and makes its folder."""
