"""What a visit attends to where it is not everything, as a plan and config.json have it. Pure arithmetic, no torch.

What it does is in model/attention_rrt.py, and in a file beside it for each of what heads can have beyond a window.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ConfigDict

from rrtc.errors import WrongUsage

SUM_BYTES = 4  # of a number in the sums of linear attention
MOST_TOKENS = 10**9  # in a window, and of whatever else there is beside it: columns are counted in 64 bits
MOST_FEATURES = 10**5  # a map is drawn in memory before there are weights
MOST_SEED = 2**63


@dataclass(frozen=True)
class Landmark:
    """`count` blocks of `size` tokens each, drawn by lot from those that have left a window (model/landmark_rrt.py).
    seed: of the lots."""

    size: int
    count: int
    seed: int
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Owner:
    """Whose keys and values heads with a window read behind it: those of the same KV head in another visit of the slot,
    that of `loop`. It stores them all, and the reader none of them."""

    loop: int
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Linear:
    """What a KV head with a window keeps of the keys that have left it: sums over them for so many random `features`
    (rrtc/model/linear_rrt.py). seed: from which the maps of the visit are drawn."""

    features: int
    seed: int = 0
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    def numbers(self, width: int) -> int:
        """Numbers in the cache for a head whose keys have that width, float32 whatever the others are."""
        return self.features * (width + 1)

    def parameters(self, width: int) -> int:
        """Of one such head: its map, and its gain."""
        return self.features * width + 1


@dataclass(frozen=True)
class Attention:
    """What a visit attends to where it is not everything: its KV heads `heads` see all keys, the others the last
    `window`, the query's own included, and the first `sinks` of its document, and what there is beyond, of which there
    is one thing at most: blocks (`landmark`), sums of what has left the window (`linear`), or what another visit stores
    (`owner`)."""

    window: int
    sinks: int = 0
    heads: tuple[int, ...] = ()
    landmark: Landmark | None = None
    linear: Linear | None = None
    owner: Owner | None = None
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    @property
    def most(self) -> int:
        """How many tokens the cache holds for a head with a window at most."""
        blocks = self.landmark.size * self.landmark.count if self.landmark else 0
        return self.sinks + self.window - 1 + blocks

    def kept(self, context: int) -> int:
        """The same after `context` tokens."""
        return min(context, self.most)

    def fields(self) -> dict[str, Any]:
        """As config.json has it: what is not there does not say so."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return fields | {"heads": list(self.heads)}


def in_sight(attention: Mapping[str, Any]) -> str:
    """What a KV head with a window sees, for people. attention: as Attention.fields."""
    seen = [f"the last {attention['window']} tokens"]
    if landmark := attention.get("landmark"):
        seen.append(f"{landmark['count']} blocks of {landmark['size']} before them")
    if attention["sinks"]:
        seen.append(f"the first {attention['sinks']}")
    if linear := attention.get("linear"):
        seen.append(f"sums of the others in {linear['features']} features")
    if owner := attention.get("owner"):
        seen.append(f"what loop {owner['loop']} keeps of the others")
    return " and ".join([", ".join(seen[:-1]), seen[-1]][len(seen) == 1 :])


def check_attention(attention: Attention, where: str, kv_heads: int, window: int) -> None:
    """Raises WrongUsage where so many heads, of a layer that has that `window` of its own (0: none), cannot have it."""
    if window:
        raise WrongUsage(f"The attention {where} has a window of its own already, of {window} tokens.")
    if not kv_heads:
        raise WrongUsage(f"The keys and values {where} have no heads that could see less than all.")
    check_numbers(attention, where)
    if sorted(set(attention.heads) & set(range(kv_heads))) != list(attention.heads):
        raise WrongUsage(f"The attention {where} names KV heads that are not there, or not in order.")
    if len(beyond := sorted(attention.fields().keys() - {"window", "sinks", "heads"})) > 1:
        raise WrongUsage(f"The attention {where} has {' and '.join(beyond)} beyond its window, and can have one.")
    if (landmark := attention.landmark) is not None and landmark.size > attention.window:
        raise WrongUsage(
            f"The landmark in the attention {where} has blocks of {landmark.size} tokens, which are larger than the "
            f"window of {attention.window}."
        )
    if attention.linear is not None and len(attention.heads) == kv_heads:
        raise WrongUsage(f"The linear attention {where} has no KV head with a window that it could stand behind.")


def check_numbers(attention: Attention, where: str) -> None:
    """Raises WrongUsage where no model could have the numbers of `attention`."""
    landmark, linear = attention.landmark, attention.linear
    if attention.window < 1 or attention.sinks < 0:
        raise WrongUsage(f"The attention {where} has a window below 1, or less than no sinks.")
    if landmark is not None and min(landmark.size, landmark.count) < 1:
        raise WrongUsage(f"The landmark in the attention {where} has blocks of less than a token, or none.")
    if linear is not None and not 1 <= linear.features <= MOST_FEATURES:
        few = "no features" if linear.features < 1 else f"more than {MOST_FEATURES:,} features"
        raise WrongUsage(f"The linear attention {where} has {few}.", "Give it 1 or more, such as 64.")
    if max(attention.window, attention.sinks, *((landmark.size, landmark.count) if landmark else ())) > MOST_TOKENS:
        raise WrongUsage(f"The attention {where} counts more than {MOST_TOKENS:,} tokens or blocks.")
    if any(drawn is not None and not 0 <= drawn.seed < MOST_SEED for drawn in (landmark, linear)):
        raise WrongUsage(f"The attention {where} has a seed below 0, or of more than 63 bits.")
