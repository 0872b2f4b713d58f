"""A run's result: one flat JSON object, and the tables, pictures, card and page made from it."""
