"""How much a plan may take: what a recipe asks for as a size or a budget. Answers are in the unit of the question."""

import math
from dataclasses import dataclass

from rrtc.errors import WrongUsage
from rrtc.plan import Architecture, Plan
from rrtc.recipe.init import InitRecipe
from rrtc.storage import NUMBER_BYTES, header_bytes, tensor_bytes
from rrtc.units import parse_extent, parse_size, size


@dataclass(frozen=True)
class Target:
    """What plans of `architecture`, stored in `dtype`, may take.

    limit: bytes of their tensors. headers: bytes that the headers of the weights files may take beside them. said: what
    was asked for, in words. is_budget: whether it was parameters without embeddings; else it was the size of the files.
    """

    architecture: Architecture
    dtype: str
    limit: int
    headers: int
    said: str
    is_budget: bool

    def taken(self, plan: Plan) -> int:
        """What `plan` takes of the limit, in bytes."""
        return tensor_bytes(plan, self.dtype)

    @property
    def number(self) -> int:
        """What one more number takes of the limit, in bytes."""
        return NUMBER_BYTES[self.dtype]

    @property
    def parameters(self) -> int:
        """How many there can be in all."""
        return self.limit // self.number

    def check(self, least: int) -> None:
        """Raises WrongUsage where plans that take `least` bytes are the smallest, and that is more than the limit."""
        if least <= self.limit:
            return
        if self.is_budget:
            dense = self.architecture
            share = (least / self.number - dense.embedding - dense.head) / dense.non_embedding
            raise WrongUsage(
                f"{self.said} cannot be met: the least possible is {math.ceil(1000 * share) / 1000:g}.",
                "Ask for a larger one, tie more layers (loops), or none: with --loops 1 layers can be as small as you "
                "like.",
            )
        smaller = ", or for --dtype bfloat16, which halves every size" if self.number > 2 else ""
        raise WrongUsage(
            f"{self.said} cannot be met: the least possible is {_at_least(least + self.headers)}.",
            f"Ask for more{smaller}; or tie more layers (loops), or none: with --loops 1 only embeddings are a limit.",
        )


def _at_least(n: int) -> str:
    """Bytes as people read them, rounded up, so that to ask for them is enough."""
    step = 10 ** max(len(str(n)) - 4, 0)
    return size(-(-n // step) * step)


def target_of(architecture: Architecture, recipe: InitRecipe, dtype: str) -> Target:
    """What `recipe`, which has a size or a budget, allows. Raises WrongUsage for a size that is larger than the dense
    model, or smaller than its embeddings."""
    width = NUMBER_BYTES[dtype]
    tables = width * (architecture.embedding + architecture.head)
    if recipe.budget is not None:
        limit = tables + width * int(recipe.budget * architecture.non_embedding)
        return Target(architecture, dtype, limit, 0, f"The budget of {recipe.budget:g}", True)
    assert recipe.size is not None
    extent, dense = parse_extent(recipe.size), width * architecture.parameters
    whole = f"the dense model's {size(dense)} in {dtype}"
    asked = extent if isinstance(extent, int) else int(extent * dense)
    if asked > dense:
        raise WrongUsage(
            f"The size of {size(asked)} is more than {whole}.",
            "There is nothing to leave out. --size 1 keeps all weights as they are, for a KV budget.",
        )
    said = f"The size of {size(asked)}" + ("" if isinstance(extent, int) else f" ({extent:g} of {whole})")
    headers = header_bytes(architecture, asked, parse_size(recipe.max_shard_size))
    if asked < tables:
        sixteen = "--dtype bfloat16 halves them, and " if width > 2 else ""
        raise WrongUsage(
            f"{said} is less than the embeddings alone take, {size(tables)} in {dtype}.",
            f"Tying makes embeddings no smaller: {sixteen}what is asked for has to be more than they take.",
        )
    return Target(architecture, dtype, asked - headers, headers, said, False)
