"""How much a plan may take: sizes and budgets, and answers in the unit of the question."""

import dataclasses

import pytest
from pico import pico_config

from rrtc.architecture import Architecture, Layer, Matrix
from rrtc.errors import WrongUsage
from rrtc.init.alternatives import ways
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe, checked
from rrtc.runs import check_run
from rrtc.stock.architecture import read_architecture
from rrtc.storage import HEADER_ROOM, LARGE_SHARD, Numbers, header_bytes
from rrtc.target import target_of
from rrtc.units import parse_extent


def model(layers: int = 6, embedding: int = 100_000) -> Architecture:
    """A made-up model with a million numbers in each layer."""
    layer = Layer((Matrix("mlp.up", 1000, 1000, False, (("ffn", 1000),)),), (("norm.weight", 8),))
    return Architecture("made up", (layer,) * layers, embedding, 0, embedding, 8)


@pytest.mark.parametrize(
    ("text", "extent"),
    [(0.5, 0.5), ("0.5", 0.5), ("50%", 0.5), (" 12.5 % ", 0.125), (1, 1.0), ("100%", 1.0), ("300MB", 300_000_000),
     ("1.5 gb", 1_500_000_000), ("1B", 1), ("70k", 70_000)],
)  # fmt: skip
def test_an_extent_is_a_part_or_bytes(text, extent):
    found = parse_extent(text)
    assert found == extent and type(found) is type(extent)


@pytest.mark.parametrize(
    "text", ["300", 300, 0, "0%", "150%", -0.5, "half", "MB", "", "nan", True, "3 apples", "1e-400"]
)
def test_what_is_neither_is_refused(text):
    with pytest.raises(WrongUsage):
        parse_extent(text)


def test_a_size_is_of_the_weights_files_in_the_dtype_that_is_written():
    dense, half = model(), InitRecipe(size=0.5)
    whole = dense.parameters
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        target = target_of(dense, half, dtype)
        assert target.limit + target.headers == whole * width // 2
        assert 0 < target.headers < 20_000 and target.parameters == target.limit // width
        assert target.said == f"The size of {0.5 * whole * width / 1e6:.4g} MB (0.5 of the dense model's " + (
            f"{whole * width / 1e6:.4g} MB in {dtype})"
        )
    named = target_of(dense, InitRecipe(size="7MB"), "bfloat16")
    assert named.limit + named.headers == 7_000_000 and named.said == "The size of 7 MB"
    assert target_of(dense, InitRecipe(budget=0.5), "float32").parameters == 100_000 + dense.non_embedding // 2


def test_large_files_leave_room_for_their_headers():
    dense = model()
    assert header_bytes(dense, LARGE_SHARD - 1, 4 * 10**9) < 20_000
    assert header_bytes(dense, LARGE_SHARD, 4 * 10**9) == HEADER_ROOM
    assert header_bytes(dense, 10**10, 4 * 10**9) == 6 * HEADER_ROOM
    assert header_bytes(dense, 10**9, 10**6) < 200_000  # of many small ones


@pytest.mark.parametrize("bits", [4, 8])
def test_a_whole_model_in_few_bits_takes_what_its_parts_do(bits):
    dense = read_architecture(pico_config("llama"))
    numbers = Numbers("bfloat16", bits)
    alone = make_plan(dense, InitRecipe(loops=1, rank=0))
    assert numbers.bytes(alone) == numbers.whole(dense)
    rows = {48: 16, 80: 16}  # inputs of its matrices, and how many of them have a scale in common
    full = sum(
        m.outputs * (-(-m.inputs * bits // 32) * 4 + 2 * m.inputs // rows[m.inputs]) + 16
        for layer in dense.layers
        for m in layer.matrices
    )
    tables = 2 * 320 * (48 + 2)
    assert numbers.bytes(alone) == full + tables + 2 * (dense.rest + sum(n for x in dense.layers for _, n in x.vectors))
    relaxed = make_plan(dense, InitRecipe(loops=2, rank=4))
    lora = relaxed.parts["lora"]
    assert numbers.bytes(relaxed) - numbers.bytes(make_plan(dense, InitRecipe(loops=2, rank=0))) == 2 * lora


@pytest.mark.parametrize("choices", [{}, {"budget": 0.5}, {"rank": 8}])
def test_only_a_size_is_counted_in_few_bits(choices):
    with pytest.raises(WrongUsage, match="quantize says in which numbers a size is counted; add a size"):
        checked(InitRecipe, {"quantize": "int4"} | choices, "the command line")


def test_a_run_exports_what_init_planned():
    planned = {"size": "60MB", "quantize": "int4"}
    for export in ({}, {"quantize": "int8"}, {"quantize": "int4", "format": "dense"}):
        with pytest.raises(WrongUsage, match="init.quantize plans for a recursive export in int4, and export makes a "):
            check_run(Recipe(init=planned, export=export))
    check_run(Recipe(init=planned, export={"quantize": "int4"}))


WHOLE = "0.1 of the dense model's"


@pytest.mark.parametrize(
    ("recipe", "dtype", "sentence", "hint"),
    [
        ({"size": "60MB"}, "bfloat16", "60 MB is more than the dense model's 12.2 MB in bfloat16.", "--size 1"),
        ({"size": "199KB"}, "bfloat16", "199 kB is less than the embeddings alone take, 200 kB in bfloat16.",
         "--quantize int8 or int4 plans for an export that has them in 8 bits, 100 kB; what is asked for"),
        ({"size": "99KB", "quantize": "int4"}, "bfloat16", "99 kB in int4 is less than the embeddings alone take, 100 "
         "kB in 8 bits.", "Tying makes embeddings no smaller: what is asked for has to be more"),
        ({"size": 0.5, "quantize": "int4"}, "bfloat16", "(0.5 of the dense model's 12.2 MB in bfloat16) in int4 is "
         "more than the whole dense model takes so, 3.", "nothing to leave out"),
        ({"size": "500KB", "quantize": "int8"}, "bfloat16", "500 kB in int8 cannot be met: the least possible is ",
         "or for --quantize int4"),
        ({"size": 0.01}, "float32", "244 kB (0.01 of the dense model's 24.4 MB in float32) is less than the "
         "embeddings alone take, 400 kB in float32.", "--dtype bfloat16 halves them"),
        ({"size": 0.1}, "bfloat16", f"1.22 MB ({WHOLE} 12.2 MB in bfloat16) cannot be met: the least possible is ",
         "Ask for more, or for --quantize int4, to be exported in 4 bits; or tie more layers (loops), or none: with "
         "--loops 1"),
        ({"size": 0.1}, "float32", f"2.44 MB ({WHOLE} 24.4 MB in float32) cannot be met: the least possible is ",
         "--dtype bfloat16, which halves every size"),
        ({"budget": 0.1}, "bfloat16", "budget of 0.1 cannot be met: the least possible is 0.", "tie more layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused_in_the_unit_of_the_question(recipe, dtype, sentence, hint):
    with pytest.raises(WrongUsage) as refused:
        make_plan(model(), InitRecipe(**recipe), dtype)
    assert sentence in refused.value.sentence and hint in refused.value.hint


def test_what_is_said_to_be_possible_is_so():
    dense = model()
    for asked in ({"size": 0.1}, {"budget": 0.1}):
        with pytest.raises(WrongUsage) as refused:
            make_plan(dense, InitRecipe(**asked), "bfloat16")
        least = refused.value.sentence.split(" is ")[-1].rstrip(".").replace(" ", "")
        assert make_plan(dense, InitRecipe(**{next(iter(asked)): least}), "bfloat16").slots


@pytest.mark.parametrize(
    ("recipe", "pattern", "kept"),
    [
        ({"size": 0.5}, "middle_cycle", 1),
        ({"budget": 0.5}, "middle_cycle", 1),
        ({"size": 0.5, "keep": 2}, "cycle", 2),
        ({"size": 0.5, "keep": 0}, "cycle", 0),
        ({"size": 0.5, "sharing": "auto"}, "auto", 0),
        ({}, "cycle", 0),
        ({"size": 1}, "auto", 0),
        ({"budget": 1, "kv_budget": 0.2}, "auto", 0),
    ],
)
def test_a_size_without_a_pattern_ties_loops(recipe, pattern, kept):
    asked = InitRecipe(**recipe)
    assert (asked.pattern, asked.kept_at_each_end) == (pattern, kept)
    assert (asked.resolved()["sharing"], asked.resolved()["keep"]) == (pattern, kept)


@pytest.mark.parametrize("recipe", [{"size": 1}, {"size": "100%"}, {"budget": 1}])
def test_all_of_it_keeps_every_weight(recipe):
    plan = make_plan(model(), InitRecipe(**recipe))
    assert plan.parameters == plan.architecture.parameters and len(plan.slots) == 6


def test_layers_that_the_default_cannot_tie_are_refused_with_what_can():
    with pytest.raises(WrongUsage, match="7 layers less 2 kept ones cannot be divided into 2 loops.") as refused:
        make_plan(model(7), InitRecipe(size=0.8))
    assert "--sharing auto" in refused.value.hint and "--loops 1" in refused.value.hint
    for ways_out in ({"sharing": "auto"}, {"loops": 1}, {"loops": 5}):
        make_plan(model(7), InitRecipe(size=0.8, **ways_out))
    other = dataclasses.replace(model().layers[0], vectors=(("norm.weight", 9),))
    unlike = dataclasses.replace(model(), layers=(*model().layers[:-2], other, model().layers[0]))
    with pytest.raises(WrongUsage, match="cannot share weights") as refused:
        make_plan(unlike, InitRecipe(size=0.8))
    assert "--sharing auto" in refused.value.hint


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ({}, ["--sharing middle_cycle", "--sharing middle_sequence", "--loops 1"]),
        ({"loops": 1}, ["--sharing middle_cycle", "--sharing middle_sequence", "--loops 1"]),
        ({"loops": 4}, ["--sharing middle_cycle --loops 4", "--sharing middle_sequence --loops 4", "--loops 1"]),
        ({"keep": 2}, ["--sharing cycle --keep 2", "--sharing sequence --keep 2", "--loops 1"]),
    ],
)
def test_the_flags_of_a_way_choose_it(recipe, flags):
    from typer.main import get_command

    from rrtc.cli.app import app

    asked = InitRecipe(size=0.9, **recipe)
    found = list(ways(asked))
    assert [said for _, said, _ in found] == flags
    dense = read_architecture(pico_config("llama"))
    for _, said, way in found:
        given = get_command(app).commands["init"].make_context("init", ["m", "--size", "0.9", *said.split()]).params
        chosen = InitRecipe(**{name: given[name] for name in ("size", "sharing", "loops", "keep") if given[name]})
        assert make_plan(dense, chosen).slots == make_plan(dense, way).slots
    assert [way for *_, way in found if (way.pattern, way.loops) == (asked.pattern, asked.loops)]


def test_recipes_of_old_say_what_is_called_otherwise_now():
    with pytest.raises(WrongUsage, match="target_bytes is called size now: write size: 180MB."):
        checked(InitRecipe, {"target_bytes": "180MB"}, "old.yaml")
    with pytest.raises(WrongUsage, match="target_params is no more: say how large the file may be"):
        checked(InitRecipe, {"target_params": "90M"}, "old.yaml")
    assert checked(InitRecipe, {"target_bytes": None, "target_params": None}, "old.yaml") == InitRecipe()
