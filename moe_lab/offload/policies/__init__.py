"""What a cache of experts keeps, drops and fetches ahead: a file for each policy."""
