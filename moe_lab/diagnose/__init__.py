"""What a model's experts do: tables and pictures, beside any method or none."""
