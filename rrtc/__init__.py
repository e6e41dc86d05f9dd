"""rrtc: pretrained language models, compressed into Relaxed Recursive Transformers."""

__version__ = "0.1.0"
