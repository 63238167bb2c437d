"""The paper's experiments, each with its numbers, summary and figure."""
