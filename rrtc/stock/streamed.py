"""A dense model run layer by layer over many windows of text, for models larger than memory.

In memory at a time are the weights of one layer, the hidden states of all windows (float32, on the CPU), and the
activations of TOKENS_AT_ONCE tokens. No architecture is written out here: the stock model is run in `Parts`.

The two large tables are never whole in memory. Of the embedding, the rows of the tokens at hand are turned to float32;
the head is a block of vocabulary rows at a time. Whatever the stock forward does to logits (scaling, capping, a bias)
it does to the blocks: exact, because it treats every entry of the vocabulary alike.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rrtc.errors import RrtcError
from rrtc.model.attention_rrt import Rule
from rrtc.model.graft_rrt import matrices_of
from rrtc.stock.architecture import stock_model
from rrtc.stock.parts import Parts, watching

TOKENS_AT_ONCE = 2048  # in a batch, rounded to whole windows and at least one
# Of the head's rows in float32 at a time, and of the logits that a batch gets from them, of which there are a few
# copies. glibc gives blocks of more than 32 MiB back as soon as they are freed.
HEAD_BYTES = 40_000_000


class StreamedModel:
    """The model of `config` without its decoder layers' weights, which `run_layer` is given.

    read(name) is the tensor of that name in the stock model, in any dtype. It is asked for a table again at every use
    of some of its rows, so it should answer with a view of a file. `device` is where batches are computed.
    `groups[number]` says which matrices of that layer read the same input, in the order in which they run; while
    `attending(number, rule)` is entered, the layer attends to what the rule says (Parts.attending).
    Raises RrtcError for a model whose layers need the tokens, or that has no head.
    """

    def __init__(self, config: PreTrainedConfig, read: Callable[[str], Tensor], device: torch.device):
        self._read, self._device = read, device
        stock = stock_model(config)
        stock._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # buffers are real
        self._parts = Parts(stock, device)
        self.layers = self._parts.layers
        self._width = config.get_text_config().hidden_size
        self._tied = stock.get_expanded_tied_weights_keys()
        self._embedding, self._head = stock.get_input_embeddings(), stock.get_output_embeddings()
        if self._head is None:
            raise RrtcError(f"The output head of this '{config.model_type}' model was not found.")
        self._paths = {module: path for path, module in stock.named_modules()}
        self._embedding.padding_idx = None  # it matters for training only, and may lie outside the rows looked up
        self._embedding.forward = self._look_up
        inside = {id(parameter) for parameter in self.layers.parameters()}
        for module in self._paths:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if module not in (self._embedding, self._head) and id(parameter) not in inside:
                    self._load(module, name, slice(None))
        self.attending = self._parts.attending
        self.groups = self._parts.groups
        self._parts.check_needs_no_tokens()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states that enter the first layer, (windows, context, width), float32, on the CPU. `ids` are
        token ids, (windows, context), int64."""
        states = torch.empty(*ids.shape, self._width)
        for part in _batches(ids):
            states[part] = self._parts.embed(ids[part])
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
        matrices = matrices_of(self.layers[number])
        watched = {} if watch is None else {
            matrices[names[0]]: lambda inputs, names=names: watch(names, inputs.flatten(0, -2))
            for names in self.groups[number]
        }  # fmt: skip
        with watching(inputs=watched):
            for part in _batches(states):
                # A copy, because a matrix may read it as it is, and what is watched should outlast the next line.
                batch = self._parts.run_layer(number, tensors, states[part].to(self._device, copy=True))
                states[part] = batch
                advance(len(batch))
        return states

    def run(
        self,
        layer: Callable[[int], dict[str, Tensor]],
        states: Tensor,
        rules: Mapping[int, Rule] | None = None,
        advance: Callable[[int], None] = lambda windows: None,
    ) -> Tensor:
        """Runs all layers over `states` in place, as `run_layer` does one; returns them. layer(number): the tensors of
        that layer. rules: what layers attend to where it is not what the stock layer does."""
        for number in range(len(self.layers)):
            rule = (rules or {}).get(number)
            with self.attending(number, rule) if rule else nullcontext():
                self.run_layer(number, layer(number), states, advance=advance)
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
                by_logits = (logits.detach() - normalizer[part].to(self._device).unsqueeze(-1)).exp()
                inside, place = _places(labels[part].to(self._device) - start, by_logits)
                by_logits.scatter_add_(-1, place, -inside.to(by_logits.dtype))
                gradient[part] += torch.autograd.grad(logits, given, by_logits)[0].cpu()
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

        def watch_output(name: str, output: Tensor) -> None:
            def see(gradient: Tensor) -> None:
                watch(name, gradient.flatten(0, -2))

            output.register_hook(see)

        matrices = {} if watch is None else matrices_of(self.layers[number])
        watched = {module: partial(watch_output, name) for name, module in matrices.items()}
        with watching(outputs=watched), torch.enable_grad():
            for part in _batches(states):
                given = states[part].to(self._device).detach().requires_grad_()
                output = self._parts.run_layer(number, tensors, given)
                leaving = gradient[part].to(self._device, copy=True)  # a copy for the same reason as in run_layer
                gradient[part] = torch.autograd.grad(output, given, leaving)[0]
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
                yield part, start, given, self._parts.logits(ids[part], given)


def _batches(windows: Tensor) -> list[slice]:
    """Batches of TOKENS_AT_ONCE tokens, as slices of (windows, context, ...)."""
    count, context = windows.shape[:2]
    at_once = max(1, TOKENS_AT_ONCE // context)
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def _places(labels: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """(whether it lies in the block, where), both (windows, context, 1), for labels counted from the block's start."""
    labels = labels.unsqueeze(-1)
    return (labels >= 0) & (labels < block.shape[-1]), labels.clamp(0, block.shape[-1] - 1)
