"""The forms in which a model leaves, a file each."""
