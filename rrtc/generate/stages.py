"""A forward pass in which every token is at a loop of its own.

The stock forward pass runs. Where the first loop's visits stand, copies of its layers stand in for them: they run the
slot once, over the tokens of all loops. W' is multiplied once for all of them; LoRA, norms and biases of each loop take
that loop's tokens. Where later loops stand, nothing is done. Tokens are the first dimension everywhere, each a batch of
its own, and they are sorted by loop, so that those of a loop lie next to each other.

    fresh tokens ──▶ embedding ─▶ prelude ─┐
                                           ├─▶ the slots, once ─▶ carried on to their next loop, or left to the head
    carried tokens ────────────────────────┘                 └──▶ coda ─▶ norm ─▶ head

prelude, coda: layers before and after the tied ones (`keep`).
"""

import copy
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils import _pytree as pytree
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rrtc.errors import RrtcError
from rrtc.features import check_carried
from rrtc.generate.store import Sighting, Store
from rrtc.model.attention_rrt import Rule, added
from rrtc.model.configuration_rrt import turns_at
from rrtc.model.eyes_rrt import MASKED_KERNELS, KernelConfig, attention_of, eager_kernel
from rrtc.model.graft_rrt import RelaxedLinear, Visit, leave, rule_of
from rrtc.plan import features_of, read_visits
from rrtc.stock.architecture import decoder_layers, windows_of
from rrtc.stock.parts import standing_in, states_of

KERNEL = "rrt_rows"  # the name of `attend` among transformers' attention functions
INSTEAD = "Generate with transformers: load it with AutoModelForCausalLM, or use 'rrtc chat'."


@dataclass(eq=False)
class Span:
    """Tokens of one row that are at the same loop. Fresh ones have `ids`, (tokens,), int64; carried ones what the loop
    before made of them, `states`, (tokens, width)."""

    row: int
    loop: int
    positions: Tensor  # (tokens,), int64
    ids: Tensor | None = None
    states: Tensor | None = None
    reads: slice | None = None  # of which of its tokens the head is asked, after this loop
    sightings: dict[Rule | None, Sighting] = field(default_factory=dict)
    at: slice = field(default_factory=lambda: slice(0))  # its place among the tokens of the step

    def __len__(self) -> int:
        return len(self.positions)


class Step:
    """What the pass that runs is about. spans: sorted by loop."""

    def __init__(self, spans: Sequence[Span]):
        self.spans, start = list(spans), 0
        for span in self.spans:
            span.at = slice(start, start + len(span))
            start += len(span)
        self.tokens = start
        loops = sorted({span.loop for span in self.spans})
        self.slices = {loop: self._slice([span for span in self.spans if span.loop == loop]) for loop in loops}
        self.running = self.spans  # those on whose tokens a layer works at the moment
        self.within = slice(0, start)  # where these tokens are
        self.loops = self.slices  # the same as places among them, by loop

    @staticmethod
    def _slice(spans: list[Span]) -> slice:
        return slice(spans[0].at.start, spans[-1].at.stop) if spans else slice(0, 0)

    def of(self, loop: int) -> "list[Span]":
        return [span for span in self.spans if span.loop == loop]

    def work_on(self, loop: int | None) -> slice:
        """Says that layers work on the tokens of one loop alone, or of all; where these are."""
        self.running = self.spans if loop is None else self.of(loop)
        self.within = self._slice(self.running)
        self.loops = self.slices if loop is None else {0: slice(0, self.within.stop - self.within.start)}
        return self.within


class Mixed(nn.Module):
    """The modules that stand at one place in the loops of a slot: each is given the tokens that are at its loop."""

    def __init__(self, now: "Stages", loops: list[nn.Module]):
        super().__init__()
        self.__dict__.update(now=now, loops=loops)  # not registered: they are where they were

    def forward(self, x: Tensor) -> Tensor:  # (tokens, …, inputs) -> (tokens, …, outputs)
        slices = self.now.step.loops
        if len(slices) == 1:
            return self.loops[next(iter(slices))](x)
        return torch.cat([self.loops[loop](x[part]) for loop, part in slices.items()])


class MixedLinear(Mixed):
    """The same for RelaxedLinear with one W', which is multiplied once: y = W'x + B(Ax) + b, each with its loop's A, B,
    b and gain."""

    def forward(self, x: Tensor) -> Tensor:
        slices = self.now.step.loops
        if len(slices) == 1:
            return self.loops[next(iter(slices))](x)
        y = self.loops[0].shared()(x)
        for loop, part in slices.items():
            own = self.loops[loop]
            if own.rank:
                y[part] += linear(linear(x[part], own.A), own.B)
            if own.gain is not None:
                y[part] *= own.gain
            if own.bias is not None:
                y[part] += own.bias
        return y


class Stages:
    """A causal language model whose layers run as stages over a `Store`.

    loops: how many a token goes through; 1 where the layers run one after the other, as in a dense model.
    """

    def __init__(self, model: PreTrainedModel, by_depth: bool = True):
        """by_depth: whether tokens at different loops go through a slot together, where the plan of `model` allows it.

        Raises RrtcError where the attention of a layer cannot be told which keys to see, or where it sees them in a way
        of its own.
        """
        self.model, self.layers, self._model_type = model, decoder_layers(model), model.config.model_type
        self.attentions = [attention_of(_stock(layer)) for layer in self.layers]
        if None in self.attentions:
            raise self._no_kernel()
        self.rules = stage_rules(model.config)
        order = _order(model) if by_depth else None
        self.prelude, self.body, self.loops = order or ((), tuple(range(len(self.layers))), 1)
        tied = len(self.prelude) + len(self.body) * self.loops
        self.coda = tuple(range(tied, len(self.layers)))
        self.depths = [
            min(max(place - len(self.prelude), 0) // len(self.body), self.loops - 1)
            for place in range(len(self.layers))
        ]
        self.step: Step | None = None
        self.store: Store | None = None
        self._names = list(inspect.signature(type(_stock(self.layers[0])).forward).parameters)[1:]
        self._wrap = lambda states: states
        self._asked = False  # the kernel, in the layer that runs
        self._made = {place: self._stage(place) for place in (*self.prelude, *self.body, *self.coda)}
        self._forwards = {layer: partial(self._run, place) for place, layer in enumerate(self.layers)}

    def _no_kernel(self) -> RrtcError:
        return RrtcError(f"The attention of this '{self._model_type}' model cannot be told which keys to see.", INSTEAD)

    def new_store(self, rows: int, context: int, most: int) -> Store:
        """Room for requests; see `Store`. Raises RrtcError as `check_context` does."""
        check_context(self.model.config, context)
        return Store(self.rules, self.depths, rows, context, most, self.model.device)

    @torch.no_grad()
    def run(self, spans: Sequence[Span], store: Store) -> tuple[list[Tensor], list[Tensor]]:
        """One pass: (what the loop made of each span, (tokens, width); the logits of the tokens that the span reads,
        (tokens read, vocabulary)). The arrivals of all spans have been noted in `store`."""
        step, device = Step(spans), self.model.device
        ids = [torch.zeros_like(span.positions) if span.ids is None else span.ids for span in step.spans]
        positions = torch.cat([span.positions for span in step.spans])[:, None]
        for span in step.spans:
            for kind in store.kinds(span.loop):
                arrivals = store.arrivals[span.row][span.loop]
                span.sightings[kind] = Sighting(kind, arrivals, len(span), store.ring(kind))
        self.step, self.store, self._left = step, store, None
        try:
            with standing_in(self._forwards):
                given = {"input_ids": torch.cat(ids)[:, None].to(device), "position_ids": positions, "use_cache": False}
                if any(span.reads is not None for span in step.spans):
                    logits = self.model(**given).logits[:, 0]
                else:  # the head is a large part of a small model
                    logits = self.model.base_model(**given)[0][:0, 0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of stock code that counts on as many tokens after a layer as before it
            raise RrtcError(f"The engine cannot run this '{self._model_type}' model: {error}.", INSTEAD) from error
        finally:
            self.step = self.store = None
        sizes = [len(span.positions[span.reads]) if span.reads is not None else 0 for span in step.spans]
        read = logits[: sum(sizes)].split(sizes)
        return [self._left[span.at] for span in step.spans], list(read)

    def _run(self, place: int, hidden: Tensor, *args, **kwargs):
        """What stands in for the layer at `place`. hidden: (tokens, 1, width)."""
        step = self.step
        given = self._given(args, kwargs)
        if place in self.prelude:
            hidden = self._part(place, 0, hidden, given)
        elif place in self.body:
            if place == self.body[0]:
                carried = [span.states[:, None].to(hidden.dtype) for span in step.spans if span.states is not None]
                fresh = step.slices.get(0, slice(0, 0)).stop
                hidden = torch.cat([hidden[:fresh], *carried]) if carried else hidden
            step.work_on(None)
            hidden = self._layer(place, hidden, given)
            if place == self.body[-1]:
                self._left = hidden[:, 0]
        elif place in self.coda:
            hidden = self._part(place, self.loops - 1, hidden, given)
        if place == len(self.layers) - 1:
            hidden = self._wanted(hidden)
        return self._wrap(hidden)

    def _part(self, place: int, loop: int, hidden: Tensor, given: dict) -> Tensor:
        """A layer that only the tokens of one loop go through."""
        within, tokens = self.step.work_on(loop), self.step.tokens
        if within.stop == within.start:
            return hidden
        if within.stop - within.start == tokens:
            return self._layer(place, hidden, given)

        def cut(value):
            return value[within] if isinstance(value, Tensor) and value.shape[:1] == (tokens,) else value

        done = self._layer(place, hidden[within], pytree.tree_map(cut, given))
        return torch.cat([hidden[: within.start], done, hidden[within.stop :]])

    def _layer(self, place: int, hidden: Tensor, given: dict) -> Tensor:
        self._asked = False
        output = self._made[place](hidden, **given)
        if not isinstance(output, Tensor):
            self._wrap = lambda states, beside=output[1:]: (states, *beside)
        return states_of(output)

    def _wanted(self, hidden: Tensor) -> Tensor:
        """The tokens that the head is asked about; one where that is none, which stock code does not expect."""
        parts = []
        for span in self.step.spans:
            if span.reads is not None:
                end = self.layers[self.body[-1] + span.loop * len(self.body)]  # of its loop
                parts.append(leave(end, hidden[span.at][span.reads]))
        return torch.cat(parts) if parts else hidden[:1]

    def _given(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of a layer by name, beside hidden states, without caches and masks."""
        given = dict(zip(self._names[1:], args, strict=False)) | kwargs
        given["attention_mask"] = None
        return {name: None if isinstance(value, Cache) else value for name, value in given.items()}

    def _stage(self, place: int) -> nn.Module:
        """The layer that stands in at `place`, with our kernel, for all its loops."""
        places = [place]
        if place in self.body:
            places = [place + loop * len(self.body) for loop in range(self.loops)]
        return self._mixed([_stock(self.layers[one]) for one in places], [self.attentions[one] for one in places])

    def _mixed(self, modules: list[nn.Module], attentions: list[nn.Module]) -> nn.Module:
        """A copy of the first of `modules`, which stand at one path of a slot's loops, in which everything below that
        has parameters serves all of them."""
        first = modules[0]
        if not first._modules or isinstance(first, RelaxedLinear):
            return self._leaf(modules)
        if len(modules) > 1 and any(parameter is not None for parameter in first._parameters.values()):
            raise RrtcError(f"A {type(first).__name__} of this model holds raw parameters, of each loop its own.")
        made = copy.copy(first)
        children = {name: [module._modules[name] for module in modules] for name in first._modules}
        made.__dict__["_modules"] = {
            name: self._mixed(same, attentions) for name, same in children.items() if same[0] is not None
        }
        if first is attentions[0]:
            made.config = RowsConfig(_stock_config(first))
            made.__dict__["seen_by"] = partial(self._attend, made, [module.layer_idx for module in modules])
        return made

    def _leaf(self, modules: list[nn.Module]) -> nn.Module:
        if len(modules) == 1 or all(module is modules[0] for module in modules):
            return modules[0]
        if not any(True for module in modules for _ in module.parameters()) and not _shares(modules):
            return modules[0]
        return (MixedLinear if _shares(modules) else Mixed)(self, modules)

    def _attend(
        self, made: nn.Module, places: list[int], query: Tensor, key: Tensor, value: Tensor, **kwargs
    ) -> Tensor:
        """Attention of all running spans, each over its own row. query, key, value: (tokens, heads, 1, width); returns
        (tokens, 1, heads, width). Raises RrtcError where they are of other forms, or the layer has been here before:
        then what goes into the store is not all that the layer keeps."""
        if self._asked or {query.dim(), key.dim(), value.dim()} != {4} or key.shape[:3] != value.shape[:3]:
            raise self._no_kernel()
        self._asked = True
        chosen = made.config.stock._attn_implementation
        run = ALL_ATTENTION_FUNCTIONS.get_interface(chosen if chosen in MASKED_KERNELS else "sdpa", eager_kernel(made))
        query, key, value = (tensor.squeeze(2).transpose(0, 1)[None] for tensor in (query, key, value))
        offset, outputs = self.step.within.start, []
        for span in self.step.running:
            at = slice(span.at.start - offset, span.at.stop - offset)
            place = places[span.loop if len(places) > 1 else 0]
            ours = [tensor[:, :, at] for tensor in (query, key, value)]
            outputs.append(self._attend_in(span, place, partial(run, made, **kwargs), chosen == "eager", *ours))
        return torch.cat(outputs, 1).transpose(0, 1) if len(outputs) > 1 else outputs[0].transpose(0, 1)

    def _attend_in(self, span: Span, place: int, run, adds_mask: bool, query: Tensor, key: Tensor, value: Tensor):
        """The same for one span: (1, heads, tokens, width) each; returns (1, tokens, heads, width)."""
        heads, output = key.shape[1], None
        for shelf in self.store.shelves(place, heads):
            sighting = span.sightings[shelf.rule]
            shelf.write(self.store.rows, span.row, sighting.columns, key, value)
            keys, values = shelf.read(span.row, sighting.width)
            mask = added(sighting.mask, query.dtype) if adds_mask and sighting.mask is not None else sighting.mask
            if len(shelf.heads) == heads:
                return run(query, keys, values, mask)[0]
            group = query.shape[1] // heads
            queries = [head * group + number for head in shelf.heads for number in range(group)]
            found = run(query[:, queries], keys, values, mask)[0]
            if output is None:
                output = found.new_empty(*found.shape[:2], query.shape[1], found.shape[3])
            output[:, :, queries] = found
        return output


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, dropout=0.0, **kwargs):
    """The attention function of stages."""
    return module.seen_by(query, key, value, **kwargs), None


AttentionInterface.register(KERNEL, attend)


class RowsConfig(KernelConfig):
    """The config that the attention of a stage reads."""

    _attn_implementation = KERNEL


def _stock(layer: nn.Module) -> nn.Module:
    """The stock decoder layer behind a visit, or the layer itself."""
    return layer.slot().loops[layer.loop] if isinstance(layer, Visit) else layer


def _stock_config(attention: nn.Module):
    config = attention.config
    return config.stock if isinstance(config, KernelConfig) else config


def _shares(modules: list[nn.Module]) -> bool:
    """Whether all of them are views of one W'."""
    if not all(isinstance(module, RelaxedLinear) and module.shared is not None for module in modules):
        return False
    return len({(id(module.shared.container), module.shared.name) for module in modules}) == 1


def stage_rules(config: PreTrainedConfig) -> list[Rule | None]:
    """What the heads of each layer see; None where that is everything. Raises RrtcError where Stages cannot do it."""
    visits = getattr(config, "visits", None) or []
    check_carried("The engine for many requests", features_of(read_visits(visits)), INSTEAD)
    windows = windows_of(config)
    return [
        rule_of(visit) or (Rule(window, 0, ()) if window else None)
        for visit, window in zip(visits or [{}] * len(windows), windows, strict=True)
    ]


def check_context(config: PreTrainedConfig, context: int) -> None:
    """Raises RrtcError where a text of so many tokens has other positions than the beginning of it had: requests of all
    lengths share passes here, and no token is read twice."""
    limit = turns_at(config)
    if limit is not None and context > limit:
        raise RrtcError(
            f"The engine for many requests runs this model up to {limit:,} tokens, beyond which it encodes positions "
            f"by the length of the text; a prompt and its answer may have {context:,} here.",
            f"Keep them within {limit:,} tokens. Or else: {INSTEAD}",
        )


def _order(model: PreTrainedModel) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """(the places before the tied layers, those of the first loop, how many loops there are); None where tokens cannot
    go through a slot at different loops: nothing is tied, the visits of a slot follow each other, or they differ in
    kind, as where one of two has a window."""
    visits = getattr(model.config, "visits", None)
    if not visits:
        return None
    uses = Counter(visit["slot"] for visit in visits)
    tied = [place for place, visit in enumerate(visits) if uses[visit["slot"]] > 1]
    loops = max(uses.values())
    if loops == 1 or len(tied) % loops or tied != list(range(tied[0], tied[-1] + 1)):
        return None
    body = tied[: len(tied) // loops]
    layers = decoder_layers(model)
    for place in body:
        same = [place + loop * len(body) for loop in range(loops)]
        if len({visits[one]["slot"] for one in same}) > 1 or len({_kind(_stock(layers[one])) for one in same}) > 1:
            return None
    return tuple(range(tied[0])), tuple(body), loops


def _kind(layer: nn.Module) -> tuple:
    """What a layer's modules do beside their weights, as far as plain values say it: rotary embeddings or none."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (path, name, value)
        for path, module in layer.named_modules()
        if not isinstance(module, RelaxedLinear | nn.Linear)
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) and name not in ("layer_idx", "training")
    )
