"""Calibration: what the layers of a dense model see of text, and how much the loss feels of each of them.

One pass forward gathers for each matrix the moment of its inputs, E[x x^T]; one pass back that of the gradients with
respect to its outputs, E[g g^T], for the log likelihood of tokens drawn from the model itself (so that this is the
Fisher information, and needs no labels). Where it is asked for, the way back also finds what the loss would feel of
each KV head that saw no more than a window, or what may be in its place. The model is run layer by layer: one layer's
weights and the hidden states of all windows are in memory at a time; what enters each layer waits on disk for the way
back. After every layer there is enough on disk to go on from.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrtc.architecture import Architecture
from rrtc.errors import RrtcError
from rrtc.io.dense import DenseModel
from rrtc.io.folder import whole_file
from rrtc.io.weights import all_finite
from rrtc.model.attention_rrt import Rule
from rrtc.model.owner_rrt import OwnerRule
from rrtc.stock.heads import Losses
from rrtc.stock.streamed import StreamedModel
from rrtc.tying.moments import Gathering, Moment
from rrtc.tying.neurons import Neurons
from rrtc.tying.whiten import Seen

LOSSES = " losses"  # behind a kind, such as window: a name that no matrix has


def bytes_on_disk(architecture: Architecture, tokens: int, moments: bool, read: Collection[int] = ()) -> int:
    """What `calibrate` writes at most: what enters every layer, two more of that size (what leaves the last one, and a
    gradient), their `moments`, if these are wanted, and keys and values of the layers `read`; all float32."""
    matrices = [m for layer in architecture.layers for m in layer.matrices]
    states = (len(architecture.layers) + 2) * tokens * architecture.layers[0].matrices[0].inputs
    sizes = [size for m in matrices for size in (m.inputs, m.outputs)]
    kept = tokens * sum(architecture.layers[number].kv_width for number in read)
    return 4 * (states + moments * sum(min(tokens, size) * size for size in sizes) + kept)


def layers_done(folder: Path, depth: int) -> tuple[int, int]:
    """Of how many layers, counted from the first, `folder` has the inputs, and of how many, counted from the last, it
    has the gradients."""
    return tuple(
        sum((Path(folder) / f"{kind}-{number}.safetensors").exists() for number in range(depth))
        for kind in ("inputs", "output-gradients")
    )


class Calibration:
    """What was gathered about the layers, kept in `folder`: one file a layer and pass."""

    def __init__(self, folder: Path, tokens: int):
        self._folder, self._tokens = Path(folder), tokens

    def losses(self, number: int) -> dict[str, list[list[float]]]:
        """By kind of rule, for every two KV heads of layer `number` what it costs, in nats a token, if both see no more
        than it lets them (stock/heads.py)."""
        with safe_open(self._folder / f"output-gradients-{number}.safetensors", "pt") as file:
            named = [name for name in file.keys() if name.endswith(LOSSES)]  # noqa: SIM118 - no dictionary
            return {name.removesuffix(LOSSES): file.get_tensor(name).tolist() for name in named}

    def seen(self, number: int, tensors: dict[str, Tensor]) -> "SeenLayer":
        """How each matrix of layer `number` is seen, by path. `tensors`: of that layer, norms folded."""
        files = [self._folder / f"{side}-{number}.safetensors" for side in ("inputs", "output-gradients")]
        return SeenLayer(*files, self._tokens, tensors)


class SeenLayer(Mapping[str, Seen]):
    """How the matrices of one layer are seen, by path. Moments are read when they are asked for and kept no longer than
    someone has them: those of a whole layer can be larger than the layer."""

    def __init__(self, inputs: Path, gradients: Path, tokens: int, tensors: dict[str, Tensor]):
        self._inputs, self._gradients, self._tokens, self._tensors = inputs, gradients, tokens, tensors
        with safe_open(inputs, "pt") as file:
            self._keys = {name: key for key in file.keys() for name in key.split(",")}  # noqa: SIM118 - no dictionary
        self._alive: WeakValueDictionary[tuple[Path, str], Moment] = WeakValueDictionary()

    def __getitem__(self, name: str) -> Seen:
        weight = self._tensors[f"{name}.weight"]
        inputs = self._moment(self._inputs, self._keys[name], weight.device)
        return Seen(weight, inputs, self._moment(self._gradients, name, weight.device))

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
    """What the matrices of one layer see of `tokens` tokens, by the names of those that see the same."""

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._gatherings: dict[str, Gathering] = {}
        self.beside: dict[str, Tensor] = {}  # what is saved with them

    def add(self, name: str, rows: Tensor, diagonal: bool = False) -> None:
        """rows: (tokens of a batch, size). diagonal: of the outer products no more than that."""
        self._gatherings.setdefault(name, Gathering(self._tokens, only_diagonal=diagonal)).add(rows)

    def save(self, file: Path) -> None:
        found = {name: gathering.finish() for name, gathering in self._gatherings.items()} | self.beside
        for name, kept in found.items():
            if not all_finite(kept):
                raise RrtcError(
                    f"The model computes NaN or infinity on the calibration text ({file.stem}, {name}).",
                    "Its weights are finite; is it the result of a merge, or trained in a wider dtype?",
                )
        with whole_file(file) as temporary:
            save_file({name: kept.cpu() for name, kept in found.items()}, temporary)


def calibrate(
    dense: DenseModel,
    model: StreamedModel,
    neurons: list[Neurons],
    ids: Tensor,
    folder: Path,
    device: torch.device,
    advance: Callable[[int], None],
    rules: Mapping[int, Mapping[str, Rule]] | None = None,
    moments: bool = True,
) -> Calibration:
    """Runs `model`, streamed from `dense`, over windows `ids` (windows, context) and keeps what it gathers in `folder`.
    advance(windows) is called for every batch of every layer, on the way forward and on the way back.

    Goes on after the last layer that is finished in `folder` (see `layers_done`). For that, states-k is what enters
    layer k, and gradient-k the gradient with respect to it; kept-k is the keys and values of layer k, where a rule of
    another reads them. Each is there before the layer that it comes from counts as finished, and gone when it has
    served.
    Of the output gradients of matrices that produce `neurons`, only the diagonal is gathered: neurons are wide, and the
    rest of it was measured to make no difference (benchmarks/LOG.md).
    rules: for the layers whose KV heads may see a window, by kind the rules by which all of them do. moments: whether
    these are wanted at all.
    """
    folder, depth, tokens = Path(folder), dense.depth, ids.numel()
    forward, back = layers_done(folder, depth)
    if back == depth:
        return Calibration(folder, tokens)
    if not _states_file(folder, "gradient", depth - back).exists():
        _go_forward(dense, model, ids, folder, forward, device, advance, moments)
    gradient = _load(folder, "gradient", depth - back)
    producers = {name for inner in neurons for name in inner.producers}
    owners = {
        n: rule.owner for n, tried in (rules or {}).items() for rule in tried.values() if isinstance(rule, OwnerRule)
    }
    for number in reversed(range(depth - back)):
        gathered = Gathered(tokens)

        def gather_gradients(name, gradients, gathered=gathered):
            gathered.add(name, gradients, diagonal=name in producers)

        entering, of_kinds = _load(folder, "states", number), (rules or {}).get(number, {})
        theirs = load_file(_states_file(folder, "kept", owners[number])) if number in owners else None
        is_read = number in owners.values()
        losses = Losses(tokens, of_kinds, theirs, keeps=is_read)
        with model.attending(number, next(iter(of_kinds.values())), losses.sight) if of_kinds else nullcontext():
            watch = gather_gradients if moments else None
            model.back_through(number, dense.layer(number, device), entering, gradient, watch, advance)
        gathered.beside |= {kind + LOSSES: found for kind, found in losses.finish().items()}
        del entering, theirs
        if number:
            _save(gradient, folder, "gradient", number)
        if is_read:
            with whole_file(_states_file(folder, "kept", number)) as file:
                save_file(losses.kept(), file)
        gathered.save(folder / f"output-gradients-{number}.safetensors")
        if number in owners and number == min(reader for reader in owners if owners[reader] == owners[number]):
            _states_file(folder, "kept", owners[number]).unlink()
        _states_file(folder, "gradient", number + 1).unlink()
        _states_file(folder, "states", number).unlink()
    return Calibration(folder, tokens)


def _go_forward(
    dense: DenseModel,
    model: StreamedModel,
    ids: Tensor,
    folder: Path,
    first: int,
    device: torch.device,
    advance: Callable[[int], None],
    moments: bool,
) -> None:
    """The way forward, from layer `first`, up to the gradient with respect to what leaves the last layer."""
    if first:
        states = _load(folder, "states", first)
    else:
        states = model.embed(ids)
        _save(states, folder, "states", 0)
    for number in range(first, dense.depth):
        gathered = Gathered(ids.numel())

        def gather_inputs(names, inputs, gathered=gathered):
            gathered.add(",".join(names), inputs)

        model.run_layer(number, dense.layer(number, device), states, gather_inputs if moments else None, advance)
        _save(states, folder, "states", number + 1)
        gathered.save(folder / f"inputs-{number}.safetensors")
    gradient, _ = model.loss_gradient(states, ids)
    _save(gradient, folder, "gradient", dense.depth)
    _states_file(folder, "states", dense.depth).unlink()


def _states_file(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number}.safetensors"


def _save(states: Tensor, folder: Path, kind: str, number: int) -> None:
    with whole_file(_states_file(folder, kind, number)) as file:
        save_file({kind: states}, file)


def _load(folder: Path, kind: str, number: int) -> Tensor:
    # A copy, in memory of its own: where a tensor begins in memory can change the last bit of what comes of it.
    return load_file(_states_file(folder, kind, number))[kind].clone()
