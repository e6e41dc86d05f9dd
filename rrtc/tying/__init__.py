"""The mathematics of tying, as pure functions on tensors. Nothing here knows files, models or the console."""
