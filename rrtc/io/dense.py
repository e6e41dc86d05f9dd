"""A dense model on disk, read layer by layer under the names that its stock class uses."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from rrtc.errors import RrtcError
from rrtc.io.source import Source
from rrtc.stock.architecture import decoder_layers, layers_path, stock_model, transposed_matrices
from rrtc.tying.norms import Fold, apply_folds


class DenseModel:
    """The layers and other tensors of a dense model, in float32, never more in memory than is asked for. Layers come
    with `folds` done.

    Raises RrtcError where the weights lack a tensor or hold one of another shape than the config says.
    """

    def __init__(self, source: Source, folds: Sequence[Fold] = ()):
        self.folds = list(folds)
        self.weights = source.weights()
        self.config = source.config()
        self._stock = stock_model(self.config)
        self.parent, name = layers_path(self._stock)
        self._layers = decoder_layers(self._stock)
        self._layer_prefix = f"{self.parent}.{name}."
        self._disk_names = self._match_names()
        self._turned = [{f"{path}.weight" for path in transposed_matrices(layer)} for layer in self._layers]
        self._check_shapes()

    def _match_names(self) -> dict[str, str]:
        """Model name -> name on disk. transformers knows the renamings of older checkpoints; a checkpoint of the bare
        decoder lacks the prefix that a causal language model puts before its names."""
        wanted = {name for name, _ in self._stock.named_parameters(remove_duplicate=False)}
        renamings = [t for t in get_model_conversion_mapping(self._stock) if isinstance(t, WeightRenaming)]
        found = {}
        for on_disk in self.weights:
            name = on_disk
            for renaming in renamings:
                name = renaming.rename_source_key(name)[0]
            for candidate in (name, f"{self._stock.base_model_prefix}.{name}"):
                if candidate in wanted:
                    found[candidate] = on_disk
                    break
        return found

    def _check_shapes(self) -> None:
        tied = self._stock.get_expanded_tied_weights_keys()
        for name, parameter in self._stock.named_parameters(remove_duplicate=False):
            if name in self._disk_names:
                on_disk = self.weights.shape(self._disk_names[name])
                if on_disk != list(parameter.shape):
                    raise RrtcError(
                        f"The tensor {name} has shape {on_disk}, but the config asks for {list(parameter.shape)}.",
                        "config.json and the weights do not belong together.",
                    )
            elif name not in tied:
                raise RrtcError(f"The tensor {name} is missing from {self.weights.folder}.", "Download it again.")

    def layer(self, number: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors of one decoder layer by their path in it, in float32; matrices as (outputs, inputs)."""
        names = {name: self._disk_names[f"{self._layer_prefix}{number}.{name}"] for name in self.paths(number)}
        vectors = {
            n: self.weights.read(on_disk).to(device)
            for n, on_disk in names.items()
            if len(self.weights.shape(on_disk)) < 2
        }
        tensors = apply_folds(vectors, self.folds)
        for name in names.keys() - vectors.keys():  # one at a time, because folding makes a copy
            matrix = self.weights.read(names[name]).to(device)
            if name in self._turned[number]:
                matrix = matrix.T.contiguous()
            folded = apply_folds(vectors | {name: matrix}, self.folds)
            own = name.removesuffix("weight")
            tensors |= {key: tensor for key, tensor in folded.items() if key.startswith(own)}  # the bias too
        return {name: tensors[name] for name in names}

    def others(self) -> list[str]:
        """The names of all tensors that belong to no decoder layer. A head that is tied to the embedding is not among
        them, even where the file has a copy of it."""
        copies = {n for n, source in self._stock.get_expanded_tied_weights_keys().items() if source in self._disk_names}
        return [n for n in self._disk_names if not n.startswith(self._layer_prefix) and n not in copies]

    def blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor of that model name in `dtype`, as blocks of its rows: a table can be larger than a layer."""
        return self.weights.blocks(self._disk_names[name], dtype)

    def raw(self, name: str) -> Tensor:
        """The tensor of that model name as it is stored: a view of the file, mapped anew at every call."""
        return self.weights.raw(self._disk_names[name])

    def paths(self, number: int) -> list[str]:
        """The names of the tensors of one decoder layer, within it."""
        return [name for name, _ in self._layers[number].named_parameters()]

    @property
    def depth(self) -> int:
        return len(self._layers)
