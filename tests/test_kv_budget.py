"""What a KV budget allows: pure arithmetic on plans."""

import re
from dataclasses import replace

import pytest
from pico import pico_config

from rrtc.attention import Attention, Landmark, Linear
from rrtc.errors import WrongUsage
from rrtc.kv_budget import KvBudget, cheapest, predicted
from rrtc.patterns import make_plan
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import checked
from rrtc.stock.architecture import read_architecture


def made(architecture: str = "llama", changes: dict | None = None, losses=None, lookups=None, **recipe) -> Plan:
    dense = read_architecture(pico_config(architecture, **changes or {}))
    if losses and isinstance(next(iter(losses)), tuple):
        losses = alone(losses)
    asked = InitRecipe(**({"rank": 2, "kv_budget": 0.4} | recipe))
    if losses and not isinstance(next(iter(losses)), str):
        losses = {"window": losses}
    return KvBudget(dense, asked).spend(make_plan(dense, asked), losses or {}, lookups or {})


def alone(losses: dict[tuple[int, int], float]) -> dict[int, list[list[float]]]:
    """Of heads whose windows cost so much whatever the other head of the layer sees."""
    layers = {layer for layer, _ in losses}
    return {layer: [[losses[layer, 0], 0.0], [0.0, losses[layer, 1]]] for layer in layers}


def seeing(plan: Plan) -> dict[int, tuple[int, ...] | None]:
    """By layer the heads that see everything, None where all do."""
    return {visit.layer: visit.attention and visit.attention.heads for visit in plan.visits}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "phi3"])
@pytest.mark.parametrize("budget", [0.2, 0.4, 0.75, 1.0])
def test_the_plan_takes_no_more_than_the_budget_and_one_more_head_would(architecture, budget):
    plan = made(architecture, kv_budget=budget, kv_window=8, kv_sinks=2)
    dense = plan.architecture
    share = plan.kv_bytes(256, 1) / dense.kv_bytes(256, 1)
    assert share <= budget
    windows = [visit for visit in plan.visits if visit.attention is not None]
    if windows:
        layer = dense.layers[windows[0].layer]
        one_more = layer.kv_width // layer.kv_heads * (256 - windows[0].attention.kept(256)) / dense.kv_bytes(256, 1)
        assert share + one_more > budget
    assert bool(windows) == (budget < 1)


def test_the_heads_that_cost_most_see_everything():
    losses = {(layer, head): 0.01 * ((7 * layer + 3 * head) % 12) for layer in range(6) for head in range(2)}
    plan = made(losses=losses, kv_window=8, kv_lookups=0)
    kept = {(layer, head) for layer, heads in seeing(plan).items() for head in (range(2) if heads is None else heads)}
    dearest = sorted(losses, key=losses.get, reverse=True)
    assert kept == set(dearest[: len(kept)]) and len(kept) == 4
    assert predicted(plan, {"window": alone(losses)}) == pytest.approx(
        sum(losses[head] for head in dearest[len(kept) :])
    )


def test_a_window_is_judged_beside_those_that_are_there_still():
    losses = {layer: [[0.1, 0.0], [0.0, 0.1]] for layer in range(6)}
    losses[1] = [[0.4, -0.39], [-0.39, 0.4]]  # together they cost next to nothing
    losses[2] = [[0.3, 0.2], [0.2, 0.2]]
    kept = seeing(made(losses=losses, kv_window=8, kv_lookups=0))
    assert kept[1] == () and kept[2] is None
    plan = made(losses=losses, kv_window=8, kv_lookups=0)
    assert predicted(plan, {"window": losses}) == pytest.approx(0.02 + 2 * 0.1 * 4 - 0.2)


def test_heads_that_look_up_come_first_up_to_their_share():
    losses = {(layer, head): float(layer) for layer in range(6) for head in range(2)}
    lookups = {(0, 0): 0.5, (0, 1): 0.01, (1, 1): 0.9, (2, 0): 0.3}
    kept = seeing(made(losses=losses, lookups=lookups, kv_window=8, kv_lookups=0.5))
    assert kept == {0: (0,), 1: (1,), 2: (), 3: (), 4: (), 5: None}  # (2, 0) is one too many, (0, 1) looks up nothing
    assert seeing(made(losses=losses, lookups=lookups, kv_window=8, kv_lookups=0))[1] == ()


def test_whole_visits_by_place_and_by_cost():
    assert [layer for layer, heads in seeing(made(kv_choice="last", kv_window=8)).items() if heads is None] == [4, 5]
    assert [layer for layer, heads in seeing(made(kv_choice="even", kv_window=8)).items() if heads is None] == [1, 4]
    losses = {(layer, head): float(layer in (0, 3)) for layer in range(6) for head in range(2)}
    plan = made(losses=losses, kv_grain="visits", kv_window=8)
    assert [layer for layer, heads in seeing(plan).items() if heads is None] == [0, 3]
    assert all(heads in (None, ()) for heads in seeing(plan).values())


def test_a_layer_with_a_window_of_its_own_keeps_it():
    plan = made("gemma3", kv_window=16, kv_budget=0.6)
    assert all(plan.visits[number].attention is None for number in (0, 2, 4))
    assert any(plan.visits[number].attention for number in (1, 3, 5))
    with pytest.raises(WrongUsage, match="^The attention of layer 0 has a window of its own already, of 8 tokens.$"):
        Plan(plan.architecture, (with_window(plan, 0), *plan.visits[1:]), plan.norms)


def with_window(plan: Plan, number: int, **attention):
    return replace(plan.visits[number], attention=Attention(**({"window": 8} | attention)))


@pytest.mark.parametrize(
    ("attention", "sentence"),
    [
        ({"window": 0}, "has a window below 1"),
        ({"sinks": -1}, "less than no sinks"),
        ({"heads": (2,)}, "KV heads that are not there"),
        ({"heads": (1, 0)}, "not in order"),
        ({"heads": (0, 0)}, "not in order"),
        ({"landmark": Landmark(0, 2, 0)}, "blocks of less than a token, or none"),
        ({"landmark": Landmark(9, 2, 0)}, "blocks of 9 tokens, which are larger than the window of 8"),
    ],
)
def test_attention_that_no_layer_has_is_refused(attention, sentence):
    plan = made(kv_budget=1)
    with pytest.raises(WrongUsage, match=sentence):
        Plan(plan.architecture, (with_window(plan, 0, **attention), *plan.visits[1:]), plan.norms)


def test_a_window_is_at_least_as_large_as_half_of_the_budget_allows():
    def window(budget: float, context: int) -> int:
        dense = read_architecture(pico_config("llama", max_position_embeddings=context))
        return KvBudget(dense, InitRecipe(kv_budget=budget)).window.window

    assert window(0.5, 256) == 64
    assert window(0.2, 256) == 16
    assert window(0.2, 8192) == 512
    assert window(0.5, 32768) == 512


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("kinds", ["window", "landmark", "linear"])
@pytest.mark.parametrize("grain", ["heads", "visits"])
@pytest.mark.parametrize("budget", [0.3, 0.45, 0.6])
def test_what_is_left_of_the_budget_makes_windows_longer(architecture, kinds, grain, budget):
    changes = {"max_position_embeddings": 2048}
    recipe = {"kv_budget": budget, "kv_grain": grain, "kv_kinds": kinds}
    plan = made(architecture, changes, **recipe)
    dense, limit = plan.architecture, budget * plan.architecture.kv_bytes(2048, 2)
    shortest = KvBudget(dense, InitRecipe(**recipe)).kinds[kinds]
    near = [visit for visit in plan.visits if visit.attention]
    assert near and all(visit.attention.window >= shortest[visit.layer].window for visit in near)
    assert plan.kv_bytes(2048, 2) <= limit
    too_long = 2 if kinds == "linear" else 1  # the bytes of sums are rounded up to whole tokens
    longer = {
        visit.layer: replace(visit, attention=replace(visit.attention, window=visit.attention.window + too_long))
        for visit in near
    }
    visits = tuple(longer.get(visit.layer, visit) for visit in plan.visits)
    assert replace(plan, visits=visits).kv_bytes(2048, 2) > limit


def test_a_window_that_is_named_is_kept():
    plan = made(kv_window=10, kv_budget=0.5)
    assert {visit.attention.window for visit in plan.visits if visit.attention} == {10}


@pytest.mark.parametrize(
    ("changes", "recipe", "sentence"),
    [
        (
            {},
            {"kv_budget": 0.01, "kv_window": 64},
            "cannot be met: .* of 64 tokens, the cache takes 0.262 .* 256 tokens",
        ),
        ({}, {"kv_context": 257}, "to count at 257 tokens, but this model can see 256"),
    ],
)
def test_what_cannot_be_met_is_one_sentence(changes, recipe, sentence):
    with pytest.raises(WrongUsage, match=sentence):
        made(changes=changes, **recipe)


def test_where_the_config_names_no_context_it_must_be_said():
    dense = replace(read_architecture(pico_config("llama")), context=0)
    with pytest.raises(WrongUsage, match="does not say how many tokens it can see"):
        KvBudget(dense, InitRecipe(kv_budget=0.5))
    assert KvBudget(dense, InitRecipe(kv_budget=0.5, kv_context=100)).context == 100


@pytest.mark.parametrize(("sinks", "near"), [(4, "the last 8 tokens and the first 4"), (0, "the last 8 tokens")])
def test_what_is_made_of_it_is_a_sentence(sinks, near):
    plan = made(kv_budget=0.5, kv_window=8, kv_sinks=sinks)
    budget = KvBudget(plan.architecture, InitRecipe(rank=2, kv_budget=0.5, kv_window=8, kv_sinks=sinks))
    share = plan.kv_bytes(256, 1) / plan.architecture.kv_bytes(256, 1)
    assert budget.explain(plan, {}) == (
        f"5 of 12 KV heads see everything, the others {near}: at 256 tokens the KV cache takes {share:.3f} of the "
        "dense model's."
    )


KINDS = {"kv_kinds": "window,landmark", "kv_window": 64, "kv_lookups": 0}


def test_each_visit_gets_the_kind_that_costs_its_heads_least_at_the_same_bytes():
    windows = {layer: [[0.1, 0.0], [0.0, 0.1]] for layer in range(6)}
    blocks = {layer: [[0.2, -0.12], [-0.12, 0.05]] for layer in range(6)}
    blocks[3] = [[0.3, 0.0], [0.0, 0.3]]
    windows[5] = [[0.9, 0.0], [0.0, 0.1]]  # head 0 sees everything
    losses = {"window": windows, "landmark": blocks}
    plan, alone = made(losses=losses, **KINDS), made(losses=losses, kv_window=64, kv_lookups=0)
    assert seeing(plan) == seeing(alone) == {0: (0,), 1: (), 2: (), 3: (), 4: (), 5: (0,)}  # by windows
    near = [visit.attention for visit in plan.visits]
    assert [one.landmark and one.landmark.seed for one in near] == [0, 1, 2, None, 4, 5]
    assert {(one.window, one.landmark.size, one.landmark.count) for one in near if one.landmark} == {(32, 16, 2)}
    assert near[3] == alone.visits[3].attention
    assert [plan.kv_bytes(n, 1) for n in range(256)] == [alone.kv_bytes(n, 1) for n in range(256)]
    assert predicted(plan, losses) == pytest.approx(0.05 + 3 * 0.01 + 0.2 + 0.05)
    budget = KvBudget(plan.architecture, InitRecipe(rank=2, kv_budget=0.4, **KINDS))
    assert budget.explain(plan, losses).endswith(
        "the others the last 64 tokens and the first 4, or the last 32 tokens, 2 blocks of 16 before them and the "
        "first 4: at 256 tokens the KV cache takes 0.385 of the dense model's. Instead of window: "
        "landmark in layers 0 1 2 4 5 (0.670 nats a token less)."
    )
    dear = {"window": windows, "landmark": dict.fromkeys(range(6), blocks[3])}
    assert made(losses=dear, **KINDS) == alone
    assert budget.explain(alone, dear).endswith("Of window, landmark, window costs least in all 6 layers.")


def test_one_kind_is_what_all_get():
    plan = made(kv_kinds=["landmark"], kv_window=64, kv_choice="last")
    assert all(visit.attention is None or visit.attention.landmark for visit in plan.visits)
    with pytest.raises(WrongUsage, match="A window of 31 tokens leaves no room for landmark blocks of 16"):
        made(kv_kinds="landmark", kv_window=31)


def test_linear_attention_takes_what_its_sums_do_from_the_window():
    windows = {layer: [[0.2, 0.0], [0.0, 0.2]] for layer in range(6)}
    losses = {"window": windows, "linear": windows | {2: [[0.1, 0.0], [0.0, 0.1]]}}
    given = {"kv_window": 100, "kv_lookups": 0, "kv_budget": 0.5}
    plan, alone = made(losses=losses, kv_kinds="window,linear", **given), made(losses=losses, **given)
    near = plan.visits[2].attention
    assert near.linear == Linear(64, seed=2) and near.window == 100 - 70  # 64 · 13 numbers of 4 bytes, 24 of 2 a token
    assert [v for v in plan.visits if v.layer != 2] == [v for v in alone.visits if v.layer != 2]
    one = plan.architecture.layers[0].kv_width // 2 * 2  # bytes of a token of one head
    assert 0 <= alone.kv_bytes(256, 2) - plan.kv_bytes(256, 2) < 2 * one
    assert predicted(plan, losses) == pytest.approx(predicted(alone, {"window": windows}) - 0.2)
    with pytest.raises(WrongUsage, match="A window of 64 tokens leaves no room for the sums .* take the bytes of 70"):
        made(kv_kinds="window,linear", kv_window=64)


def test_earlier_loops_read_what_the_last_one_keeps_at_the_same_bytes():
    given = {"kv_choice": "last", "kv_budget": 0.6, "kv_window": 8}
    plan, alone = made(kv_kinds="last_loop", **given), made(**given)
    assert [v.attention and v.attention.owner and v.attention.owner.loop for v in plan.visits] == [1] * 3 + [None] * 3
    assert seeing(plan) == seeing(alone) and plan.kv_bytes(256, 1) == alone.kv_bytes(256, 1)
    budget = KvBudget(plan.architecture, InitRecipe(rank=2, kv_kinds="last_loop", **given))
    assert budget.explain(plan, {}) == (
        budget.explain(alone, {}) + " 3 visits read behind their windows what the last loop of their slot keeps."
    )
    for less in ({"kv_budget": 0.1}, {"loops": 1}):
        with pytest.raises(WrongUsage, match="There is nothing for last_loop to read"):
            made(kv_kinds="last_loop", **given | less)


def test_a_visit_reads_the_last_loop_where_that_stores_what_it_reads_and_is_measured_to_cost_less():
    """Layers 0 to 2 are the first loop, 3 to 5 the last. Layer 3 sees everything, layer 4 in one head, layer 5 not."""
    dear = {(3, 0): 3.0, (3, 1): 3.0, (4, 1): 3.0, (1, 0): 2.0}
    windows = alone({(layer, head): dear.get((layer, head), 0.2) for layer in range(6) for head in range(2)})
    reads = {layer: alone({(layer, head): 0.05 for head in range(2)})[layer] for layer in range(3)}
    given = {"kv_budget": 0.4, "kv_window": 8, "kv_lookups": 0}
    plan = made(losses={"window": windows, "last_loop": reads}, kv_kinds="window,last_loop", **given)
    assert seeing(plan) == {0: (), 1: (0,), 2: (), 3: None, 4: (1,), 5: ()}
    assert [v.attention and v.attention.owner and v.attention.owner.loop for v in plan.visits] == [1, 1] + [None] * 4
    alike = made(losses=windows, **given)
    assert plan.kv_bytes(256, 1) == alike.kv_bytes(256, 1)
    losses = {"window": windows, "last_loop": reads}
    assert predicted(plan, losses) == pytest.approx(predicted(alike, {"window": windows}) - 3 * (0.2 - 0.05))
    budget = KvBudget(plan.architecture, InitRecipe(rank=2, kv_kinds="window,last_loop", **given))
    assert "Instead of window: last_loop in layers 0 1 (0.450 nats a token less)." in budget.explain(plan, losses)
    dear = {layer: [[0.3, 0.0], [0.0, 0.3]] for layer in range(3)}
    assert made(losses={"window": windows, "last_loop": dear}, kv_kinds="window,last_loop", **given) == alike
    assert "the others the last 8 tokens and the first 4: at 256" in budget.explain(alike, {"window": windows} | losses)


def test_models_without_heads_to_choose_from():
    with pytest.raises(WrongUsage, match="every layer of this model has a window of its own"):
        made("mistral")
    from transformers import GPTNeoConfig

    config = GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]], vocab_size=320)
    with pytest.raises(WrongUsage, match="every layer of this model cannot be told what to see"):
        KvBudget(read_architecture(config), InitRecipe(kv_budget=0.5))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"kv_window": 8}, "kv_window says how a KV budget is met; add kv_budget"),
        ({"kv_budget": 0}, "kv_budget"),
        ({"kv_budget": 0.5, "kv_choice": "evn"}, "even"),
        (
            {"kv_budget": 0.5, "kv_kinds": "window,landmrk"},
            "should be 'window', 'landmark', 'linear' or 'last_loop'. Did you mean 'landmark'",
        ),
        ({"kv_budget": 0.5, "kv_kinds": []}, "kv_kinds"),
        ({"kv_budget": 0.5, "kv_kinds": "linear", "budget": 0.5}, "feature maps of kv_kinds 'linear' are parameters"),
        ({"kv_budget": 0.5, "kv_kinds": "first_loop"}, "kv_kinds.0' is wrong: it should be 'window', 'landmark',"),
        ({"kv_budget": 0.5, "kv_kinds": "last_loop"}, "name window first, or it alone with kv_choice 'last'"),
        ({"kv_budget": 0.5, "kv_kinds": "last_loop,window"}, "name window first, or it alone with kv_choice 'last'"),
        ({"kv_budget": 0.5, "kv_kinds": "last_loop,window", "kv_choice": "last"}, "kv_choice 'last', name one"),
        ({"kv_budget": 0.5, "kv_kinds": "window,landmark", "kv_choice": "last"}, "kv_choice 'last', name one"),
        ({"kv_kinds": "landmark"}, "kv_kinds says how a KV budget is met; add kv_budget"),
    ],
)
def test_a_recipe_that_contradicts_itself(values, sentence):
    with pytest.raises(WrongUsage) as error:
        checked(InitRecipe, values, "a test")
    assert re.search(sentence, f"{error.value} {error.value.hint}")


def ways(**recipe) -> tuple[list[KvBudget], Plan]:
    dense, asked = read_architecture(pico_config("llama")), InitRecipe(**({"rank": 2, "kv_budget": 0.4} | recipe))
    return KvBudget(dense, asked).ways, make_plan(dense, asked)


@pytest.mark.parametrize("cheapest_one", [32, 64, 99])
def test_the_window_that_is_predicted_to_cost_least_is_taken_and_the_others_named(cheapest_one):
    all_three, plan = ways(kv_lookups=0)
    # Half of 0.4 of 256 tokens are 51; and no head sees everything beside the longest.
    assert [way.window.window for way in all_three] == [32, 64, 99]
    each = {window: 0.01 if window == cheapest_one else 0.1 for window in (32, 64, 99)}
    heads = {(layer, head) for layer in range(6) for head in range(2)}
    measured = [(way, {"window": alone(dict.fromkeys(heads, each[way.window.window]))}) for way in all_three]
    made, cost, said = cheapest(measured, plan, {})
    seen = {way.window.window: way.seeing_everything(way.spend(plan, losses, {})) for way, losses in measured}
    left = {window: 12 - len(everything) for window, everything in seen.items()}
    assert left[32] < left[64] < left[99] == 12
    in_all = {way.window.window: way.lengthened(seen[way.window.window]) for way in all_three}  # with bytes left over
    assert in_all == {32: 48, 64: 68, 99: 99}
    assert {visit.attention.window for visit in made.visits if visit.attention} == {in_all[cheapest_one]}
    assert cost == pytest.approx(0.01 * left[cheapest_one])
    for other in {32, 64, 99} - {cheapest_one}:
        cost = 0.1 * left[other]
        assert f"With windows of {in_all[other]}, {12 - left[other]} would, for {cost:.3f} nats a token." in said
    assert f"the others the last {in_all[cheapest_one]} tokens" in said
    assert made.kv_bytes(256, 1) <= 0.4 * made.architecture.kv_bytes(256, 1)


def test_what_windows_may_become_is_said_before_they_are_measured():
    (first, *_), plan = ways(kv_lookups=0)
    said = first.explain(first.spend(plan, {}, {}), {})
    assert said.endswith(" Or 68 or 99 and fewer such heads, if that is measured to cost less.")


def test_two_ways_that_come_to_the_same_plan_are_named_once():
    """Where whole visits see everything or not, what bytes are left over is much."""
    all_three, plan = ways(kv_budget=0.85, kv_grain="visits")
    losses = {"window": alone({(layer, head): 0.1 for layer in range(6) for head in range(2)})}
    plans = [way.spend(plan, losses, {}) for way in all_three]
    windows = [way.lengthened(way.seeing_everything(made)) for way, made in zip(all_three, plans, strict=True)]
    assert plans[0] == plans[1] != plans[2] and windows[0] == windows[1] != windows[2]
    made, _, said = cheapest([(way, losses) for way in all_three], plan, {})
    assert made == plans[0] and said.count(f"{windows[0]} tokens") == 1 and f"With windows of {windows[0]}," not in said
    assert f"With windows of {windows[2]}," in said
    assert f" Or {windows[2]} and fewer" in all_three[0].explain(made, {})

    (first, *others), plan = ways(kv_budget=0.8, kv_grain="visits")  # of which the others come to one plan
    dear = {"window": alone({(layer, head): 9.0 for layer in range(6) for head in range(2)})}
    made, _, said = cheapest([(first, losses), *((way, dear) for way in others)], plan, {})
    assert (
        made == first.spend(plan, losses, {}) and said.count("With windows of 150") == said.count("With windows") == 1
    )


def test_a_longer_window_leaves_as_many_heads_that_look_up():
    both, plan = ways(kv_budget=0.5)
    losses = {"window": alone({(layer, head): float(layer) for layer in range(6) for head in range(2)})}
    lookups = {(layer, head): 0.5 for layer in (0, 1) for head in range(2)}
    spent = [seeing(way.spend(plan, losses, lookups)) for way in both]
    first, second = ({(n, h) for n, h in lookups if one[n] is None or h in one[n]} for one in spent)
    assert first == second
    assert len(first) == round(0.5 * len(both[0].seeing_everything(both[0].spend(plan, losses, {}))))
    assert both[1].window.window > both[0].window.window


def test_there_is_one_window_where_it_is_named_or_nothing_is_measured():
    for recipe in ({"kv_window": 16}, {"kv_choice": "even"}, {"kv_budget": 1.0, "kv_context": 1, "kv_sinks": 0}):
        assert len(ways(**recipe)[0]) == 1
