"""Embeddings and output projection in 8 bits, in memory as on disk: rows of int8 numbers, each with a scale of its own.

    RowsEmbedding    in the place of a stock embedding, which goes on to do what else it does (Gemma's scale theirs)
    RowsHead         in the place of the output projection; tied to the embedding, it reads the embedding's rows

Only the rows that are looked up become floating-point numbers, and for logits a block of them at a time.

This file is shipped in every export beside modeling_rrt.py and imports nothing but torch.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BITS = 8
BLOCK = {"cpu": 1 << 18}  # numbers of a block: on a processor it stays in its cache
LARGE_BLOCK = 1 << 26  # elsewhere: every block is a kernel to be started


class Rows(nn.Module):
    """A table (rows, width) as `numbers` (rows, width), int8, times `scale` (rows, 1)."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        # Buffers, because nothing trains them.
        self.register_buffer("numbers", torch.zeros(rows, width, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(rows, 1))

    @property
    def outline(self) -> Tensor:
        """A tensor of the table's shape and floating-point dtype that has no contents, for code that asks for these."""
        return torch.empty(self.numbers.shape, dtype=self.scale.dtype, device="meta")

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scale.nbytes

    def rows(self, index: slice | list[int]) -> Tensor:
        """These rows in floating point, (rows, width)."""
        return self.numbers[index].to(self.scale.dtype) * self.scale[index]

    def look_up(self, ids: Tensor) -> Tensor:  # (...) -> (..., width)
        return F.embedding(ids, self.numbers).to(self.scale.dtype) * F.embedding(ids, self.scale)

    def project(self, hidden: Tensor, bias: Tensor | None, stop: int | None = None) -> Tensor:
        """(..., width) -> (..., rows); of the rows before `stop`, where it is given. It is done where the table is: a
        head that is tied to it has no weights of its own, and can be put elsewhere (device_map="auto")."""
        stop, width = len(self.numbers) if stop is None else stop, self.numbers.shape[1]
        hidden, bias = hidden.to(self.numbers.device), None if bias is None else bias.to(self.numbers.device)
        at_once = min(stop, max(1, BLOCK.get(self.numbers.device.type, LARGE_BLOCK) // width))
        # One place for all blocks: new memory for each takes longer than what is done there. Where gradients are
        # wanted, autograd keeps the blocks.
        wants_gradients = torch.is_grad_enabled() and hidden.requires_grad
        place = None if wants_gradients else self.scale.new_empty(at_once, width)
        parts = []
        for start in range(0, stop, at_once):
            rows = slice(start, min(start + at_once, stop))
            if place is None:
                block = self.rows(rows)
            else:
                block = place[: rows.stop - start].copy_(self.numbers[rows]).mul_(self.scale[rows])
            parts.append(F.linear(hidden, block, None if bias is None else bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class RowsEmbedding(nn.Embedding):
    """An embedding whose table is a `Rows`; made of a stock one by `put_in_rows`."""

    table: Rows

    @property
    def weight(self) -> Tensor:
        return self.table.outline

    def forward(self, input: Tensor) -> Tensor:
        return self.table.look_up(input)


class RowsHead(nn.Module):
    """An output projection y = W x + b whose W is a `Rows`: its own, or that of the embedding it is tied to."""

    def __init__(self, head: nn.Linear, table: Rows | None):
        """table: of the embedding that `head` is tied to, if it is."""
        super().__init__()
        self.in_features, self.out_features, self.bias = head.in_features, head.out_features, head.bias
        if table is None:
            self.table = Rows(head.out_features, head.in_features)
        else:
            self.__dict__["table"] = table  # not a child: it is the embedding's

    @property
    def weight(self) -> Tensor:
        return self.table.outline

    def forward(self, hidden: Tensor) -> Tensor:
        return self.table.project(hidden, self.bias)

    def extra_repr(self) -> str:
        tied = "table" not in self._modules
        return f"{self.in_features} -> {self.out_features}, tied={tied}, bias={self.bias is not None}"


@functools.cache
def _embedding_class(stock: type) -> type:
    """`stock`, a kind of nn.Embedding, with RowsEmbedding where nn.Embedding was."""
    return RowsEmbedding if stock is nn.Embedding else type(f"Rows{stock.__name__}", (stock, RowsEmbedding), {})


def tables_of(model: nn.Module) -> tuple[dict[str, nn.Module], str | None]:
    """(the modules of a stock `model` that hold an embedding table or an output projection of its own, by their names;
    the name of the output projection, if there is one that can be in rows, tied or not)."""
    names = {module: name for name, module in model.named_modules()}
    found = {name: module for module, name in names.items() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return found, None
    if _tied_to(model, names[head]) is None:
        found[names[head]] = head
    return found, names[head]


def put_in_rows(model: nn.Module) -> None:
    """Replaces the embeddings and the output projection of a stock `model`, in place, by empty ones in rows."""
    tables, head = tables_of(model)
    for name, module in tables.items():
        if name != head:
            del module.weight
            module.__class__ = _embedding_class(type(module))
            module.table = Rows(module.num_embeddings, module.embedding_dim)
    if head is not None:
        source = _tied_to(model, head)
        table = None if source is None else model.get_submodule(source).table
        model.set_output_embeddings(RowsHead(model.get_submodule(head), table))


def _tied_to(model: nn.Module, head: str) -> str | None:
    """The name of the embedding that the output projection `head` has its weight of."""
    source = model.all_tied_weights_keys.get(f"{head}.weight")
    return None if source is None else source.removesuffix(".weight")
