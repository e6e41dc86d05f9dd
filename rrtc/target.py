"""How much a plan may take: what a recipe asks for as a size or a budget. Answers are in the unit of the question."""

import math
from dataclasses import dataclass

from rrtc.architecture import Architecture
from rrtc.errors import WrongUsage
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.storage import BITS, Numbers, header_bytes
from rrtc.units import parse_extent, parse_size, size


@dataclass(frozen=True)
class Target:
    """What plans of `architecture`, stored in `numbers`, may take.

    limit: bytes of their tensors. headers: bytes that the headers of the weights files may take beside them. said: what
    was asked for, in words. is_budget: whether it was parameters without embeddings; else it was the size of the files.
    """

    architecture: Architecture
    numbers: Numbers
    limit: int
    headers: int
    said: str
    is_budget: bool

    def taken(self, plan: Plan) -> int:
        """What `plan` takes of the limit, in bytes."""
        return self.numbers.bytes(plan)

    @property
    def number(self) -> int:
        """What one more number in the dtype takes of the limit, in bytes."""
        return self.numbers.width

    @property
    def parameters(self) -> int | None:
        """How many there can be in all; None where that is a matter of which are in fewer bits."""
        return self.limit // self.number if self.numbers.bits is None else None

    @property
    def written(self) -> int:
        """Bytes at most of the tensors of such a plan in the dtype, in which init writes all of them."""
        return self.limit if self.numbers.bits is None else self.limit * 8 * self.number // self.numbers.bits

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
        smaller += "" if self.numbers.bits == 4 else ", or for --quantize int4, to be exported in 4 bits"
        raise WrongUsage(
            f"{self.said} cannot be met: the least possible is {_at_least(least + self.headers)}.",
            f"Ask for more{smaller}; or tie more layers (loops), or none: with --loops 1 only embeddings are a limit.",
        )


def _at_least(n: int) -> str:
    """Bytes as people read them, rounded up, so that to ask for them is enough."""
    step = 10 ** max(len(str(n)) - 4, 0)
    return size(-(-n // step) * step)


def numbers_of(recipe: InitRecipe, dtype: str) -> Numbers:
    """What the size that `recipe` asks for is counted in."""
    return Numbers(dtype, BITS.get(recipe.quantize))


def target_of(architecture: Architecture, recipe: InitRecipe, dtype: str) -> Target:
    """What `recipe`, which has a size or a budget, allows. Raises WrongUsage for a size that is larger than the dense
    model, or smaller than its embeddings."""
    numbers = numbers_of(recipe, dtype)
    width, tables = numbers.width, numbers.tables(architecture)
    if recipe.budget is not None:
        limit = tables + width * int(recipe.budget * architecture.non_embedding)
        return Target(architecture, numbers, limit, 0, f"The budget of {recipe.budget:g}", True)
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
    quantized = numbers.bits is not None
    if quantized:
        said += f" in {recipe.quantize}"
        if asked > (most := numbers.whole(architecture)):
            raise WrongUsage(
                f"{said} is more than the whole dense model takes so, {size(most)}.",
                "There is nothing to leave out: ask for less, or for more bits.",
            )
    headers = header_bytes(architecture, asked, parse_size(recipe.max_shard_size), quantized)
    if asked < tables:
        ways = ""
        if not quantized:
            ways = "--dtype bfloat16 halves them, and " if width > 2 else ""
            in_rows = size(Numbers(dtype, BITS["int4"]).tables(architecture))
            ways += f"--quantize int8 or int4 plans for an export that has them in 8 bits, {in_rows}; "
        raise WrongUsage(
            f"{said} is less than the embeddings alone take, {size(tables)} in {'8 bits' if quantized else dtype}.",
            f"Tying makes embeddings no smaller: {ways}what is asked for has to be more than they take.",
        )
    return Target(architecture, numbers, asked - headers, headers, said, False)
