"""One training step as a thing that can be run again."""
