"""Whether two answers say the same: what the evaluation and the curator judge by. It imports no model."""
