"""What a dense model is made of: its layers, their matrices, and what they cost. Pure arithmetic, no torch.

`rrtc.stock.architecture` reads it off a config.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a decoder layer, y = W x + b.

    `parts` are the projections it holds, as (group, outputs): one, or several where the architecture fuses them.
    """

    name: str  # path inside the layer, such as self_attn.q_proj
    inputs: int
    outputs: int
    bias: bool
    parts: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its matrices, and the sizes of its other parameters (norms and the like) by name.

    kv_heads: how many heads its keys and values have; 0 where that is not known. window: how many keys a query of the
    stock layer sees, itself included; 0: all. Neither is a matter of weights: layers that differ in them can be tied.
    """

    matrices: tuple[Matrix, ...]
    vectors: tuple[tuple[str, int], ...]
    kv_heads: int = field(default=0, compare=False)
    window: int = field(default=0, compare=False)

    @property
    def kv_width(self) -> int:
        """Numbers that the layer stores in the KV cache for one token."""
        return sum(outputs for matrix in self.matrices for group, outputs in matrix.parts if group == "kv")

    def kv_numbers(self, context: int) -> int:
        """Numbers in the stock layer's KV cache after `context` tokens: behind a window, what the next query sees."""
        return self.kv_width * (min(context, self.window - 1) if self.window else context)


@dataclass(frozen=True)
class Architecture:
    """A dense model, in parameters."""

    model_type: str
    layers: tuple[Layer, ...]
    embedding: int  # all embedding tables
    head: int  # the output projection; 0 where it is tied to the embedding
    head_flops: int  # multiply-adds of the output projection for one token
    rest: int  # what is left: the final norm
    context: int = 0  # tokens that the model can see; 0 where its config does not say
    table_rows: int = 0  # of all embedding tables, and of an output projection of its own
    width: int = 0  # numbers in a hidden state

    @property
    def parameters(self) -> int:
        return self.embedding + self.head + self.non_embedding

    @property
    def non_embedding(self) -> int:
        return self.rest + sum(
            sum(m.size + m.bias * m.outputs for m in layer.matrices) + sum(size for _, size in layer.vectors)
            for layer in self.layers
        )

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part, as in Plan.parts."""
        own = sum(matrix.size for layer in self.layers for matrix in layer.matrices)
        rest = self.non_embedding - own
        return {"embeddings": self.embedding, "head": self.head, "own": own, "norms_and_biases": rest}

    def kv_bytes_per_token(self, width: int) -> int:
        """Bytes that one token takes in the KV cache, at `width` bytes a number."""
        return width * sum(layer.kv_width for layer in self.layers)

    def kv_bytes(self, context: int, width: int) -> int:
        """Bytes of the KV cache after `context` tokens, at `width` bytes a number."""
        return width * sum(layer.kv_numbers(context) for layer in self.layers)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass, without attention over the context."""
        return 2 * (self.head_flops + sum(m.size for layer in self.layers for m in layer.matrices))
