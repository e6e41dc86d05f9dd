"""A dense model on disk, read layer by layer under the names that its stock class uses."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from rrtc.console import note
from rrtc.errors import RrtcError
from rrtc.io.source import Source
from rrtc.io.weights import FLOATS, row_blocks
from rrtc.model.attention_rrt import Rule
from rrtc.stock.architecture import decoder_layers, layers_path, stock_model, transposed_matrices
from rrtc.tying.norms import Fold, apply_folds


class DenseModel:
    """The layers and other tensors of a dense model, in float32, never more in memory than is asked for. Layers come
    with `folds` done.

    It is the model that transformers would load: tensors that the config ties and the files hold with other numbers
    are untied in `config`, which is then another one than the folder's. Raises RrtcError where the weights lack a
    tensor, or hold one of another shape than the config says, in a quantized format, or in place of a constant.
    """

    def __init__(self, source: Source, folds: Sequence[Fold] = ()):
        self.folds = list(folds)
        self.rules: dict[int, Rule] = {}  # as RecursiveModel's: it attends to all that its stock layers do
        self.weights = source.weights()
        self.config = source.config()
        self._stock = stock_model(self.config)
        self._disk_names = self._match_names()
        if untied := self._untied():
            self.config = copy.deepcopy(self.config)
            self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
            self._stock = stock_model(self.config)
            note(f"{untied} is stored with numbers of its own, although the config ties it: it is kept so.")
        self.parent, name = layers_path(self._stock)
        self._layers = decoder_layers(self._stock)
        self._layer_prefix = f"{self.parent}.{name}."
        self._turned = [{f"{path}.weight" for path in transposed_matrices(layer)} for layer in self._layers]
        self._check_tensors()
        self._check_buffers()

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
        for target, source in self._stock.get_expanded_tied_weights_keys().items():
            if source not in found and target in found:  # stored under the other one's name
                found[source] = found[target]
        return found

    def _untied(self) -> str | None:
        """A tensor that the config ties to another one and the files hold with other numbers; None where all agree."""
        for target, source in self._stock.get_expanded_tied_weights_keys().items():
            one, other = (self._disk_names.get(name) for name in (target, source))
            if one is not None and other is not None and one != other and not self._equal(one, other):
                return target
        return None

    def _equal(self, first: str, second: str) -> bool:
        """Whether two tensors on disk are the same, looking at some rows at a time."""
        shape = self.weights.shape(first)
        return shape == self.weights.shape(second) and all(
            torch.equal(self.weights.raw(first)[rows], self.weights.raw(second)[rows]) for rows in row_blocks(shape)
        )

    def _check_tensors(self) -> None:
        tied, folder = self._stock.get_expanded_tied_weights_keys(), self.weights.folder
        for name, parameter in self._stock.named_parameters(remove_duplicate=False):
            if name in self._disk_names:
                on_disk = self._disk_names[name]
                if self.weights.format(on_disk) not in FLOATS:
                    raise RrtcError(
                        f"{folder} holds {on_disk} as {self.weights.format(on_disk)}, a quantized format.",
                        "Use the model in 16 bits.",
                    )
                if (shape := self.weights.shape(on_disk)) != list(parameter.shape):
                    raise RrtcError(
                        f"The tensor {name} has shape {shape}, but the config asks for {list(parameter.shape)}.",
                        "config.json and the weights do not belong together.",
                    )
            elif name not in tied:
                raise RrtcError(f"The tensor {name} is missing from {folder}.", self._why_missing(name))

    def _why_missing(self, name: str) -> str:
        """A hint: what the files hold instead."""
        module, _, kind = name.rpartition(".")
        packed = next((o for o in self.weights if o.startswith(f"{module}.") and not o.endswith(".bias")), None)
        longer = next((other for other in self.weights if other.endswith(f".{name}")), None)
        if longer is not None:
            return f"It is there as {longer}: save the model itself, without what it was wrapped in."
        if kind == "weight" and packed is not None:
            return f"It is there as {packed}, as quantized models have it: use the model in 16 bits."
        return "Download it again."

    def _check_buffers(self) -> None:
        """Raises RrtcError where the files hold a buffer with other numbers than it has by the config: what is streamed
        has those, and transformers would load these."""
        stored, made = set(self._stock.state_dict()), dict(self._stock.named_buffers())
        for name in stored & made.keys() & set(self.weights):
            if not torch.equal(self.weights.raw(name).to(made[name].dtype), made[name]):
                raise RrtcError(
                    f"{self.weights.folder} holds the buffer {name} with numbers that the config does not give."
                )

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

    def finer_than(self, dtype: str) -> list[str]:
        """The tensors, by their names on disk, whose numbers `dtype` does not hold as they are."""
        held = {"float32": ("F32", "BF16", "F16"), "bfloat16": ("BF16",), "float16": ("F16",)}[dtype]
        return [name for name in dict.fromkeys(self._disk_names.values()) if self.weights.format(name) not in held]

    @property
    def depth(self) -> int:
        return len(self._layers)
