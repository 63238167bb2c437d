"""Equality of answers, for the evaluation and the curator. It imports no model."""
