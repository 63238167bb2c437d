"""What a model is trained on: mixtures, collation and synthetic problems."""
