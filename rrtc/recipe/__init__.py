"""The recipe: every choice a run makes, in one typed schema, a section a file."""
