"""Calibration: what the layers of a dense model see of text, and how much the loss feels of each of them.

One pass forward gathers for each matrix the moment of its inputs, E[x x^T]; one pass back that of the gradients with
respect to its outputs, E[g g^T], for the log likelihood of tokens drawn from the model itself (so that this is the
Fisher information, and needs no labels). The model is run layer by layer: one layer's weights and the hidden states of
all windows are in memory at a time; what enters each layer waits on disk for the way back.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrtc.init.dense import DenseModel
from rrtc.init.neurons import Neurons
from rrtc.init.streamed import StreamedModel
from rrtc.init.whiten import Moment, Seen
from rrtc.plan import Architecture
from rrtc.recipe import BUILT_IN_TEXT, InitRecipe
from rrtc.text import Windows, beginning, documents, pack, split


def calibration_windows(recipe: InitRecipe, tokenizer, context: int) -> Windows:
    """About `calibrate_tokens` tokens in windows, as many from each text of `calibrate_on`.

    A text is cut into pieces of about a window, taken in the order of their hashes from what training may see: so the
    order of its documents does not matter, and a file's preface does not stand for the whole. Raises RrtcError as
    `documents` and `pack` do.
    """
    share = max(context, recipe.calibrate_tokens // len(recipe.calibrate_on))
    parts = []
    for source in recipe.calibrate_on:
        training, _ = split(_found(source, recipe.text_field, share))
        pieces = [piece for document in training for piece in _pieces(document, 4 * context)]
        pieces.sort(key=lambda piece: hashlib.sha256(f"{recipe.seed} {piece}".encode()).digest())
        parts.append(pack(pieces, tokenizer, context, share))
    bytes_per_token = sum(part.bytes_per_token for part in parts) / len(parts)
    return Windows(torch.cat([part.ids for part in parts]), bytes_per_token)


def _found(source: str, field: str, tokens: int) -> list[str]:
    """All documents of a text on this machine; of a data set that is streamed from elsewhere, some from its start."""
    if source == BUILT_IN_TEXT or Path(source).exists():
        return list(documents(source, field))
    return beginning(source, field, tokens)


def _pieces(document: str, characters: int) -> Iterator[str]:
    """`document` in pieces of at most so many characters, cut between words where it has any."""
    while document:
        end = len(document) if len(document) <= characters else document.rfind(" ", 1, characters) + 1 or characters
        yield document[:end]
        document = document[end:]


def bytes_on_disk(architecture: Architecture, tokens: int) -> int:
    """What `calibrate` writes at most: what enters every layer, and their moments; all float32."""
    matrices = [m for layer in architecture.layers for m in layer.matrices]
    entering = len(architecture.layers) * tokens * architecture.layers[0].matrices[0].inputs
    return 4 * (entering + sum(m.inputs**2 + m.outputs**2 for m in matrices))


class Calibration:
    """What was gathered about the layers, kept in `folder`: one file a layer and pass."""

    def __init__(self, folder: Path, tokens: int):
        self._folder, self._tokens = Path(folder), tokens

    def seen(self, number: int, tensors: dict[str, Tensor]) -> dict[str, Seen]:
        """How each matrix of layer `number` is seen, by path. `tensors`: of that layer, norms folded."""
        inputs = load_file(self._folder / f"inputs-{number}.safetensors")
        slopes = load_file(self._folder / f"slopes-{number}.safetensors")
        found = {}
        for names, mean in inputs.items():
            weights = {name: tensors[f"{name}.weight"] for name in names.split(",")}
            device = next(iter(weights.values())).device
            moment = Moment.estimated(mean.to(device), self._tokens)
            for name, weight in weights.items():
                found[name] = Seen(weight, moment, Moment.estimated(slopes[name].to(device), self._tokens))
        return found


def calibrate(
    dense: DenseModel,
    model: StreamedModel,
    neurons: list[Neurons],
    ids: Tensor,
    folder: Path,
    device: torch.device,
    advance: Callable[[int], None],
) -> Calibration:
    """Runs `model`, streamed from `dense`, over windows `ids` (windows, context) and keeps what it gathers in `folder`.
    advance(windows) is called for every batch of every layer, on the way forward and on the way back.

    Of the slopes of matrices that produce `neurons`, only the diagonal is gathered: neurons are wide, and the rest of
    it was measured to make no difference (benchmarks/LOG.md).
    """
    folder = Path(folder)
    producers = {name for inner in neurons for name in inner.producers}
    states = model.embed(ids)
    tokens = ids.numel()
    for number in range(dense.depth):
        save_file({"states": states}, folder / f"states-{number}.safetensors")
        sums: dict[str, Tensor] = {}

        def gather_inputs(names, inputs, sums=sums):
            product = inputs.T @ inputs
            key = ",".join(names)
            sums[key] = sums[key].add_(product) if key in sums else product

        model.run_layer(number, dense.layer(number, device), states, gather_inputs, advance)
        _save_means(sums, tokens, folder / f"inputs-{number}.safetensors")
    gradient, _ = model.loss_gradient(states, ids)
    del states
    for number in reversed(range(dense.depth)):
        states_file = folder / f"states-{number}.safetensors"
        sums = {}

        def gather_slopes(name, slopes, sums=sums):
            product = slopes.square().sum(0) if name in producers else slopes.T @ slopes
            sums[name] = sums[name].add_(product) if name in sums else product

        entering = load_file(states_file)["states"]
        tensors = dense.layer(number, device)
        model.back_through(number, tensors, entering, gradient, gather_slopes, advance)
        del entering
        states_file.unlink()
        _save_means(sums, tokens, folder / f"slopes-{number}.safetensors")
    return Calibration(folder, tokens)


def _save_means(sums: dict[str, Tensor], tokens: int, file: Path) -> None:
    save_file({name: (total / tokens).cpu().contiguous() for name, total in sums.items()}, file)
