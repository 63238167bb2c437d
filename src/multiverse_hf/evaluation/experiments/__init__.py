"""The paper's experiments, each with its results, summary and figure."""
