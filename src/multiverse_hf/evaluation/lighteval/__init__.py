"""LightEval 0.13: tasks, an adapter for the engine, measures for ``accelerate``, and repairs."""
