"""What transformers' own `generate` says, to compare with."""

from pathlib import Path

from rrtc import api


def greedy(folder: Path, text: str, tokens: int = 12) -> str:
    """What the model in `folder` says after `text`, which goes on as it is."""
    model, tokenizer = api.load(folder)
    ids = tokenizer(text, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
