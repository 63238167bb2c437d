"""What a checkpoint needs at run time: tags, layout, attention, cache, engine and the model class."""
