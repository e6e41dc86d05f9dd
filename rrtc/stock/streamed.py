"""A dense model run layer by layer over many windows of text, for models larger than memory.

In memory at a time are the weights of one layer, the hidden states of all windows (float32, on the CPU), and the
activations of TOKENS_AT_ONCE tokens. No architecture is written out here. The stock model does everything outside its
decoder layers, with other things in their place: recorders that learn with which arguments each layer is called, or
pass-throughs that hand on hidden states. Windows have one length and no padding, so that those arguments (masks,
positions) depend on nothing but the shape of a batch; this is checked.

The two large tables are never whole in memory. Of the embedding, the rows of the tokens at hand are turned to float32;
the head is a block of vocabulary rows at a time. Whatever the stock forward does to logits (scaling, capping, a bias)
it does to the blocks: exact, because it treats every entry of the vocabulary alike.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rrtc.errors import RrtcError
from rrtc.model.modeling_rrt import matrices_of
from rrtc.stock.architecture import decoder_layers, stock_model

TOKENS_AT_ONCE = 2048  # in a batch, rounded to whole windows and at least one
# Of the head's rows in float32 at a time, and of the logits that a batch gets from them, of which there are a few
# copies. glibc gives blocks of more than 32 MiB back as soon as they are freed.
HEAD_BYTES = 40_000_000


class StreamedModel:
    """The model of `config` without its decoder layers' weights, which `run_layer` is given.

    read(name) is the tensor of that name in the stock model, in any number format. It is asked for a table again at
    every use of some of its rows, so it should answer with a view of a file. `device` is where batches are computed.
    `groups[number]` says which matrices of that layer read the same input, in the order in which they run.
    Raises RrtcError for a model whose layers need the tokens, or that has no head.
    """

    def __init__(self, config: PreTrainedConfig, read: Callable[[str], Tensor], device: torch.device):
        self._read, self._device = read, device
        self._stock = stock_model(config)
        self._stock._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # buffers are real
        self._layers = decoder_layers(self._stock)
        self._width = config.get_text_config().hidden_size
        self._tied = self._stock.get_expanded_tied_weights_keys()
        self._embedding, self._head = self._stock.get_input_embeddings(), self._stock.get_output_embeddings()
        if self._head is None:
            raise RrtcError(f"The output head of this '{config.model_type}' model was not found.")
        self._paths = {module: path for path, module in self._stock.named_modules()}
        self._embedding.padding_idx = None  # it matters for training only, and may lie outside the rows looked up
        self._embedding.forward = self._look_up
        inside = {id(parameter) for parameter in self._layers.parameters()}
        for module in self._paths:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if module not in (self._embedding, self._head) and id(parameter) not in inside:
                    self._load(module, name, slice(None))
        self._calls: dict[tuple[int, int], list[tuple]] = {}  # by (windows, context) of a batch
        self._beside: list[tuple | None] = [None] * len(self._layers)  # what a layer returns beside hidden states
        self.groups: list[list[tuple[str, ...]]] = [[] for _ in self._layers]
        self._try_layers()
        first, other = (self._record(torch.full((1, 2), token, device=device)) for token in (0, 1))
        pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(other), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
            raise RrtcError(f"The layers of this '{config.model_type}' model need the tokens, not hidden states alone.")

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states that enter the first layer, (windows, context, width), float32, on the CPU. `ids` are
        token ids, (windows, context), int64."""
        states = torch.empty(*ids.shape, self._width)
        for part in _batches(ids):

            def keep(number, hidden, *args, part=part, **kwargs):
                if number == 0:
                    states[part] = hidden
                return self._returned(number, hidden)

            with self._instead_of_layers(keep):
                self._stock.base_model(ids[part].to(self._device), use_cache=False)
        return states

    @torch.no_grad()
    def run_layer(
        self,
        number: int,
        tensors: dict[str, Tensor],
        states: Tensor,
        watch: Callable[[tuple[str, ...], Tensor], None] | None = None,
        advance: Callable[[int], None] = lambda windows: None,
    ) -> Tensor:
        """Runs decoder layer `number` over `states`, (windows, context, width), in place; returns them.

        tensors: all parameters of the layer by their path in it, on the model's device, float32, matrices as (outputs,
        inputs). watch(names, inputs): called for each of `groups[number]` and batch with the input that these matrices
        read, (tokens, inputs). advance(windows): called after each batch.
        """
        matrices = matrices_of(self._layers[number])
        tensors = self._as_stored(number, tensors)
        with contextlib.ExitStack() as hooks:
            for names in self.groups[number] if watch is not None else []:

                def show(module, args, names=names):
                    watch(names, args[0].flatten(0, -2))

                hooks.callback(matrices[names[0]].register_forward_pre_hook(show).remove)
            for part in _batches(states):
                # A copy, because a matrix may read it as it is, and what is watched should outlast the next line.
                batch = self._run(number, tensors, states[part].to(self._device, copy=True))
                states[part] = batch
                advance(len(batch))
        return states

    @torch.no_grad()
    def loss(self, states: Tensor, ids: Tensor) -> float:
        """Mean loss in nats of every token but the first of each window, as scoring.score has it. `states`, (windows,
        context, width), have left the last layer; `ids`, (windows, context)."""
        labels = ids[:, 1:]
        normalizer, chosen = torch.full(labels.shape, -torch.inf), torch.zeros(labels.shape)
        for part, start, _, logits in self._logits(states, ids):
            logits = logits[:, :-1]
            normalizer[part] = normalizer[part].logaddexp(logits.logsumexp(-1).cpu())
            inside, place = _places(labels[part].to(self._device) - start, logits)
            chosen[part] += logits.gather(-1, place).where(inside, 0).squeeze(-1).cpu()
        return (normalizer - chosen).double().mean().item()

    def loss_gradient(
        self, states: Tensor, ids: Tensor, labels: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(gradient, labels): of the summed negative log likelihood of `labels`, with respect to `states` that have
        left the last layer; shaped as they are, float32.

        labels, (windows, context): what each token, the last too, is to predict; those of `ids` are ids shifted by one.
        Where there are none, each is sampled from the model's own distribution, which makes squared gradients the
        Fisher information.
        """
        generator = torch.Generator(self._device).manual_seed(seed)
        normalizer, sampled = torch.full(ids.shape, -torch.inf), torch.zeros(ids.shape, dtype=torch.long)
        with torch.no_grad():
            for part, start, _, logits in self._logits(states, ids):
                block = logits.logsumexp(-1).cpu()
                normalizer[part] = normalizer[part].logaddexp(block)
                if labels is None:
                    # A sample so far gives way to one from this block as often as the block weighs among all so far.
                    chance = (block - normalizer[part]).exp().to(self._device)
                    drawn = torch.rand(chance.shape, device=self._device, generator=generator) < chance
                    if drawn.any():
                        entries = logits[drawn].softmax(-1).multinomial(1, generator=generator).squeeze(-1)
                        sampled[part][drawn.cpu()] = (start + entries).cpu()
        labels = sampled if labels is None else labels
        gradient = torch.zeros_like(states)
        with torch.enable_grad():
            for part, start, given, logits in self._logits(states, ids):
                # d(-log p[label]) / d(logits) = p - onehot(label)
                slope = (logits.detach() - normalizer[part].to(self._device).unsqueeze(-1)).exp()
                inside, place = _places(labels[part].to(self._device) - start, slope)
                slope.scatter_add_(-1, place, -inside.to(slope.dtype))
                gradient[part] += torch.autograd.grad(logits, given, slope)[0].cpu()
        return gradient, labels

    def back_through(
        self,
        number: int,
        tensors: dict[str, Tensor],
        states: Tensor,
        gradient: Tensor,
        watch: Callable[[str, Tensor], None] | None = None,
        advance: Callable[[int], None] = lambda windows: None,
    ) -> Tensor:
        """Takes `gradient`, with respect to what leaves layer `number`, back to what enters it, in place; returns it.

        tensors: as for `run_layer`. states: what enters the layer, left as they are. watch(name, gradient): called for
        each matrix and batch with the gradient with respect to its output, (tokens, outputs).
        """
        tensors = self._as_stored(number, tensors)
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for name, module in matrices_of(self._layers[number]).items() if watch is not None else ():

                def show(module, args, output, name=name):
                    def show_gradient(gradient):
                        watch(name, gradient.flatten(0, -2))

                    output.register_hook(show_gradient)

                hooks.callback(module.register_forward_hook(show).remove)
            for part in _batches(states):
                given = states[part].to(self._device).detach().requires_grad_()
                output = self._run(number, tensors, given)
                slope = gradient[part].to(self._device, copy=True)  # a copy for the same reason as in run_layer
                gradient[part] = torch.autograd.grad(output, given, slope)[0]
                advance(len(given))
        return gradient

    def _load(self, module: nn.Module, name: str, rows: slice | Tensor) -> None:
        """Gives `module` those rows of its parameter `name`. A tied one is read where the weights have it."""
        full = f"{self._paths[module]}.{name}".removeprefix(".")
        value = self._read(self._tied.get(full, full))[rows].to(self._device, torch.float32)
        setattr(module, name, nn.Parameter(value, requires_grad=False))

    def _look_up(self, ids: Tensor) -> Tensor:
        """The forward of the token embedding: its own class's, on the rows of `ids` alone."""
        used, places = ids.unique(return_inverse=True)
        self._load(self._embedding, "weight", used.cpu())
        return type(self._embedding).forward(self._embedding, places)

    @contextlib.contextmanager
    def _instead_of_layers(self, forward: Callable) -> Iterator[None]:
        """Has forward(number, hidden_states, *args, **kwargs) called where the stock model calls a layer. The layer
        itself stays in its place, because stock forwards read attributes off it."""
        for number, layer in enumerate(self._layers):
            layer.forward = functools.partial(forward, number)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _returned(self, number: int, hidden: Tensor):
        """`hidden` as layer `number` returns hidden states: as they are, or first in a tuple."""
        beside = self._beside[number]
        return hidden if beside is None else (hidden, *beside)

    @torch.no_grad()
    def _try_layers(self) -> None:
        """Runs every layer once without data, on the meta device: finds what it returns and which matrices share an
        input."""
        trials = [copy.deepcopy(layer).to("meta") for layer in self._layers]

        def attempt(number, hidden, *args, **kwargs):
            read: list[tuple[str, Tensor]] = []  # tensors kept alive, so that identity means something
            for name, module in matrices_of(trials[number]).items():
                module.register_forward_pre_hook(lambda module, args, name=name: read.append((name, args[0])))
            given = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (hidden, args, kwargs))
            output = trials[number](given[0], *given[1], **given[2])
            self._beside[number] = None if isinstance(output, Tensor) else output[1:]
            names: dict[int, list[str]] = {}
            for name, tensor in read:
                names.setdefault(id(tensor), []).append(name)
            self.groups[number] = [tuple(group) for group in names.values()]
            return self._returned(number, hidden)

        with self._instead_of_layers(attempt):
            self._stock.base_model(torch.zeros(1, 2, dtype=torch.long, device=self._device), use_cache=False)

    @torch.no_grad()
    def _record(self, ids: Tensor) -> list[tuple]:
        """The (args, kwargs) beside hidden states with which the stock model calls each layer for a batch of `ids`."""
        calls = []

        def keep(number, hidden, *args, **kwargs):
            calls.append((args, kwargs))
            return self._returned(number, hidden)

        with self._instead_of_layers(keep):
            self._stock.base_model(ids, use_cache=False)
        return calls

    def _as_stored(self, number: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer with the matrices of transposed linear layers as those have them."""
        turned = {f"{n}.weight" for n, m in matrices_of(self._layers[number]).items() if isinstance(m, Conv1D)}
        return {name: tensor.T if name in turned else tensor for name, tensor in tensors.items()}

    def _run(self, number: int, tensors: dict[str, Tensor], batch: Tensor) -> Tensor:
        """Layer `number` on (windows, context, width) hidden states."""
        shape = batch.shape[:2]
        if shape not in self._calls:
            self._calls[shape] = self._record(torch.zeros(shape, dtype=torch.long, device=self._device))
        args, kwargs = self._calls[shape][number]
        output = functional_call(self._layers[number], tensors, (batch, *args), kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def _logits(self, states: Tensor, ids: Tensor) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
        """Logits block by block of the vocabulary, and batch by batch within: (the batch, the first entry of the block,
        the batch's hidden states, its logits (windows, context, entries)). The head is read once."""
        name = f"{self._paths[self._head]}.weight"
        vocabulary, width = self._read(self._tied.get(name, name)).shape
        batches = _batches(states)
        tokens = ids[batches[0]].numel()
        entries = max(1, HEAD_BYTES // (4 * max(width, tokens)))
        for start in range(0, vocabulary, entries):
            for parameter, _ in list(self._head.named_parameters()):
                self._load(self._head, parameter, slice(start, start + entries))
            for part in batches:
                given = states[part].to(self._device).detach().requires_grad_(torch.is_grad_enabled())

                def give(number, hidden, *args, given=given, **kwargs):
                    return self._returned(number, given)

                with self._instead_of_layers(give):
                    logits = self._stock(ids[part].to(self._device), use_cache=False).logits
                yield part, start, given, logits


def _batches(windows: Tensor) -> list[slice]:
    """Batches of TOKENS_AT_ONCE tokens, as slices of (windows, context, ...)."""
    count, context = windows.shape[:2]
    at_once = max(1, TOKENS_AT_ONCE // context)
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def _places(labels: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """(whether it lies in the block, where), both (windows, context, 1), for labels counted from the block's start."""
    labels = labels.unsqueeze(-1)
    return (labels >= 0) & (labels < block.shape[-1]), labels.clamp(0, block.shape[-1] - 1)
