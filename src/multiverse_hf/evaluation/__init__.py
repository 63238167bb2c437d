"""Evaluation: tasks, metrics, resumable runs, comparison, and the paper's experiments."""
