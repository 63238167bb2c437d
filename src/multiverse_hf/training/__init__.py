"""Shared parts of the training recipes. They need the ``train`` extra."""
