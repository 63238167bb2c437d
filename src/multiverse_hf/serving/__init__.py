"""An endpoint for OpenAI's clients, whose answers branch: all requests share the engine's steps."""
