"""Evaluation tasks for the Language Model Evaluation Harness."""
