"""LightEval 0.13: the tasks, the adapter for the engine, what ``accelerate`` lacks, and the repair it needs."""
