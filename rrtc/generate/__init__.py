"""Inference that recursion pays for: many requests in one batch, each at the loop that it is at."""
