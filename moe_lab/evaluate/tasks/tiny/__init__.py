"""Small offline evaluation tasks, made at run time from the embedded text's test split."""
