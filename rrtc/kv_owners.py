"""Plans in which visits read keys and values of another loop. Pure arithmetic, no torch."""

from collections.abc import Mapping
from dataclasses import replace

from rrtc.attention import Attention, Owner
from rrtc.plan import Plan, Visit, keeps_for

LOOPS: Mapping[str, int] = {"first_loop": 0, "last_loop": -1}  # what an owner is called, and its place in its slot


def local_but(plan: Plan, owner: str, window: int, sinks: int) -> Plan:
    """`plan`, in which the visits of a slot see a window, all but one, where the slot has several: that of the loop
    which `owner` names. Layers with a window of their own keep it."""
    visits = []
    for visit in plan.visits:
        layer, kept = plan.architecture.layers[visit.layer], _owner(plan, visit, owner)
        local = len(plan.slots[visit.slot]) > 1 and visit.loop != kept and layer.kv_heads and not layer.window
        visits.append(replace(visit, attention=Attention(window, sinks) if local else None))
    return replace(plan, visits=tuple(visits))


def with_owners(plan: Plan, owner: str) -> Plan:
    """`plan`, in which heads with a window read on in the visit of their slot which `owner` names, where that stores
    what they read. The bytes of the cache stay what they are."""
    visits = []
    for visit in plan.visits:
        loop, attention = _owner(plan, visit, owner), visit.attention
        if attention is not None and loop != visit.loop:
            theirs, layers = plan.slots[visit.slot][loop], plan.architecture.layers
            has_near = len(attention.heads) < layers[visit.layer].kv_heads
            if has_near and keeps_for(theirs, visit, layers):
                visit = replace(visit, attention=replace(attention, owner=Owner(loop)))
        visits.append(visit)
    return replace(plan, visits=tuple(visits))


def readable(plan: Plan, owner: str) -> dict[int, int]:
    """By the layer of each visit that could read the one of its slot which `owner` names, if that stored everything:
    the layer of that one."""
    found = {}
    for visit in plan.visits:
        layer, loop = plan.architecture.layers[visit.layer], _owner(plan, visit, owner)
        theirs = plan.slots[visit.slot][loop]
        if (
            loop != visit.loop
            and layer.kv_heads
            and not layer.window
            and not plan.architecture.layers[theirs.layer].window
        ):
            found[visit.layer] = theirs.layer
    return found


def _owner(plan: Plan, visit: Visit, owner: str) -> int:
    """The loop of the visit in the slot of `visit` that `owner` names."""
    return plan.slots[visit.slot][LOOPS[owner]].loop
