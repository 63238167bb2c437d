"""The curator: from a reasoning trace to a checked parallel document, in five stages (Multiverse Curator)."""
