"""Calibration: what the layers of a dense model see of text, and how much the loss feels of each of them.

One pass forward gathers for each matrix the moment of its inputs, E[x x^T]; one pass back that of the gradients with
respect to its outputs, E[g g^T], for the log likelihood of tokens drawn from the model itself (so that this is the
Fisher information, and needs no labels). The model is run layer by layer: one layer's weights and the hidden states of
all windows are in memory at a time; what enters each layer waits on disk for the way back.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrtc.init.dense import DenseModel
from rrtc.init.moments import Moment
from rrtc.init.neurons import Neurons
from rrtc.init.streamed import StreamedModel
from rrtc.init.whiten import Seen
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
    sizes = [size for m in matrices for size in (m.inputs, m.outputs)]
    return 4 * (entering + sum(min(tokens, size) * size for size in sizes))


class Calibration:
    """What was gathered about the layers, kept in `folder`: one file a layer and pass."""

    def __init__(self, folder: Path, tokens: int):
        self._folder, self._tokens = Path(folder), tokens

    def seen(self, number: int, tensors: dict[str, Tensor]) -> "SeenLayer":
        """How each matrix of layer `number` is seen, by path. `tensors`: of that layer, norms folded."""
        files = [self._folder / f"{side}-{number}.safetensors" for side in ("inputs", "slopes")]
        return SeenLayer(*files, self._tokens, tensors)


class SeenLayer(Mapping[str, Seen]):
    """How the matrices of one layer are seen, by path. Moments are read when they are asked for and kept no longer than
    someone has them: those of a whole layer can be larger than the layer."""

    def __init__(self, inputs: Path, slopes: Path, tokens: int, tensors: dict[str, Tensor]):
        self._inputs, self._slopes, self._tokens, self._tensors = inputs, slopes, tokens, tensors
        with safe_open(inputs, "pt") as file:
            self._keys = {name: key for key in file.keys() for name in key.split(",")}  # noqa: SIM118 - no dictionary
        self._alive: WeakValueDictionary[tuple[Path, str], Moment] = WeakValueDictionary()

    def __getitem__(self, name: str) -> Seen:
        weight = self._tensors[f"{name}.weight"]
        inputs = self._moment(self._inputs, self._keys[name], weight.device)
        return Seen(weight, inputs, self._moment(self._slopes, name, weight.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _moment(self, file: Path, key: str, device: torch.device) -> Moment:
        found = self._alive.get((file, key))
        if found is None:
            with safe_open(file, "pt") as tensors:
                found = Moment.estimated(tensors.get_tensor(key).to(device), self._tokens)
            self._alive[file, key] = found
        return found


class Gathered:
    """What the matrices of one layer see of `tokens` tokens, put together batch by batch in the form that takes least:
    the inputs themselves where there are fewer tokens than inputs, or else the sum of their outer products."""

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._kept: dict[str, Tensor] = {}
        self._filled: Counter[str] = Counter()

    def add(self, name: str, rows: Tensor, diagonal: bool = False) -> None:
        """rows: (tokens of a batch, size). diagonal: of the outer products no more than that."""
        size, start = rows.shape[1], self._filled[name]
        if name not in self._kept:
            self._kept[name] = rows.new_zeros((size,) if diagonal else (min(self._tokens, size), size))
        kept = self._kept[name]
        if diagonal:
            kept += rows.square().sum(0)
        elif self._tokens < size:
            kept[start : start + len(rows)] = rows
        else:
            kept.addmm_(rows.T, rows)
        self._filled[name] += len(rows)

    def save(self, file: Path) -> None:
        for kept in self._kept.values():
            if kept.dim() == 1 or len(kept) == kept.shape[1]:
                kept /= self._tokens
        save_file({name: kept.cpu() for name, kept in self._kept.items()}, file)


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
        gathered = Gathered(tokens)

        def gather_inputs(names, inputs, gathered=gathered):
            gathered.add(",".join(names), inputs)

        model.run_layer(number, dense.layer(number, device), states, gather_inputs, advance)
        gathered.save(folder / f"inputs-{number}.safetensors")
    gradient, _ = model.loss_gradient(states, ids)
    del states
    for number in reversed(range(dense.depth)):
        states_file = folder / f"states-{number}.safetensors"
        gathered = Gathered(tokens)

        def gather_slopes(name, slopes, gathered=gathered):
            gathered.add(name, slopes, diagonal=name in producers)

        entering = load_file(states_file)["states"]
        model.back_through(number, dense.layer(number, device), entering, gradient, gather_slopes, advance)
        del entering
        states_file.unlink()
        gathered.save(folder / f"slopes-{number}.safetensors")
    return Calibration(folder, tokens)
