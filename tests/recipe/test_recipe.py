"""The recipe: what is accepted, and what the user is told about what is not."""

import math

import pytest

from rrtc.errors import WrongUsage, nearest
from rrtc.recipe.eval import EvalRecipe
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.init import MATRIX_GROUPS, InitRecipe
from rrtc.recipe.schema import Recipe, checked, load_recipe, with_flags
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.units import parse_count, parse_size


def load(tmp_path, text: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf8")
    return load_recipe(str(file))


def refused(tmp_path, text: str) -> WrongUsage:
    with pytest.raises(WrongUsage) as error:
        load(tmp_path, text)
    assert error.value.exit_code == 2
    assert "recipe.yaml" in error.value.sentence
    return error.value


def test_without_a_file_or_with_an_empty_one_all_is_default(tmp_path):
    assert load_recipe(None) == Recipe() == load(tmp_path, "") == load(tmp_path, "# only a comment\n")


def test_a_heading_with_nothing_below_it_changes_nothing(tmp_path):
    assert load(tmp_path, "init:\nuptrain:\n  # tokens: 5\n") == Recipe()


def test_values_in_a_file_replace_the_defaults_and_only_those(tmp_path):
    recipe = load(tmp_path, "model: some/where\ninit:\n  loops: 3\nuptrain: {tokens: 60_000_000_000, data: a.txt}\n")
    assert recipe == Recipe(
        model="some/where", init=InitRecipe(loops=3), uptrain=UptrainRecipe(tokens=60 * 10**9, data=["a.txt"])
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"losses": {"next_token": 1}, "teacher_cache": "x"}, "a teacher_cache keeps what a teacher says"),
        ({"losses": {"next_token": 1}, "teacher": "x"}, "a teacher is named, and these losses ask none"),
        ({"exit_weight": 0.3}, "exit_weight says nothing without exits"),
        ({"decay": 0.5}, "decay says nothing without schedule warmup_stable_decay"),
        ({"losses": ["forward_kl=1", "forward_kl=2"]}, "forward_kl is there twice"),
    ],
)
def test_what_would_say_nothing_is_refused(fields, says):
    with pytest.raises(WrongUsage, match=says):
        checked(UptrainRecipe, fields, "a test")


def test_what_says_something_is_not(tmp_path):
    for fields in (
        {"losses": {"next_token": 1}, "teacher": "x", "data": ["self"]},
        {"losses": {"next_token": 1}, "exits": "frozen", "teacher": "x", "teacher_cache": "y"},
        {"exits": "joint", "exit_weight": 0.3},
        {"schedule": "warmup_stable_decay", "decay": 0.5},
    ):
        checked(UptrainRecipe, fields, "a test")


def test_a_number_may_have_an_exponent(tmp_path):
    """YAML 1.1 takes 2e-4 for text."""
    assert load(tmp_path, "uptrain: {learning_rate: 2e-4}").uptrain.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("modle: x", "'modle'", "Did you mean 'model'?"),
        ("init: {lops: 3}", "'init.lops'", "Did you mean 'loops'?"),
        ("init: {share_init: lower}", "'init.share_init'", "Did you mean 'shared_init'?"),
        ("uptrain: {learningrate: 1}", "'uptrain.learningrate'", "Did you mean 'learning_rate'?"),
        ("eval: {promt: Hello}", "'eval.promt'", "Did you mean 'prompt'?"),
        ("eval: {xyz: 1}", "'eval.xyz'", f"Valid: {', '.join(EvalRecipe.model_fields)}."),
        ("loops: 3", "'loops'", "Valid: model, init, uptrain, eval, export."),
    ],
)
def test_a_misspelled_key_names_the_nearest_valid_one(tmp_path, text, key, hint):
    error = refused(tmp_path, text)
    assert f"There is no key {key} in a recipe" in error.sentence
    assert error.hint == hint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("init: {loops: 0}", "'init.loops' is wrong: it should be greater than or equal to 1."),
        ("init: {loops: two}", "'init.loops' is wrong: it should be a valid integer"),
        ("init: {keep: -1}", "'init.keep' is wrong"),
        ("uptrain: {tokens: many}", "'uptrain.tokens' is wrong: 'many' is not a count. Write it as 200k, 90M or 1.5B."),
        ("uptrain: {tokens: 0.1}", "'uptrain.tokens' is wrong: it should be a valid integer"),
        ("init: {rank: -3}", "'init.rank' is wrong: a rank is a whole number from 0 up"),
        ("init: {rank: 2.5}", "'init.rank' is wrong: a rank is a whole number from 0 up"),
        ("init: {rank: true}", "'init.rank' is wrong: a rank is a whole number from 0 up"),
        ("init: {rank: many}", "not 'many'."),
        ("init: {rank: [64]}", "not '[64]'."),
        ("init: {rank: {q: 4, ffn: lots}}", "not 'lots'."),
        ("init: {rank: {qq: 4}}", "there is no matrix group 'qq'. Did you mean 'q'?"),
        ("init: {sharing: middle_cycle, keep: 2}", "'middle_cycle' keeps one layer at each end, but keep is 2."),
        ("init: 3", "'init' is wrong: it should hold keys of its own."),
        ("init: [loops, 3]", "'init' is wrong: it should hold keys of its own."),
        ("uptrain: {data: []}", "'uptrain.data' is wrong: it should have at least 1 item"),
        ("uptrain: {data: [1]}", "'uptrain.data.0' is wrong: it should be a valid string."),
        ("uptrain: {warmup: 1}", "'uptrain.warmup' is wrong: it should be less than 1."),
        ("uptrain: {losses: {next_token: 0, forward_kl: 0}}", "no loss has a weight above 0"),
        ("uptrain: {losses: {forward_lk: 1}}", "there is no loss 'forward_lk'. Did you mean 'forward_kl'?"),
        ("uptrain: {losses: {forward_kl: -1}}", "the weight of forward_kl is -1.0"),
        ("uptrain: {losses: {forward_kl: much}}", "'uptrain.losses.forward_kl' is wrong"),
        ("uptrain: {batch_size: 9, micro_batch: 2}", "batch_size 9 is not a multiple of micro_batch 2."),
        ("eval: {context: 4}", "'eval.context' is wrong"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence_that_names_its_key(tmp_path, text, says):
    sentence = refused(tmp_path, text).sentence
    assert says in sentence
    assert "\n" not in sentence and not sentence.endswith("..") and "pydantic" not in sentence


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("init: {sharing: cycel}", "Did you mean 'cycle'?"),
        ("init: {shared_init: averege}", "Did you mean 'average'?"),
        ("init: {lora_init: random}", "Valid: svd, zero."),
        ("export: {format: densest}", "Did you mean 'dense'?"),
    ],
)
def test_a_misspelled_value_names_the_nearest_valid_one(tmp_path, text, hint):
    assert refused(tmp_path, text).hint == hint


@pytest.mark.parametrize("text", ["a: [", "init: {loops: 2", "\tinit: 2"])
def test_broken_yaml_is_refused(tmp_path, text):
    assert "is not valid YAML" in refused(tmp_path, text).sentence


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "3"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    assert "holds no keys" in refused(tmp_path, text).sentence


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(WrongUsage, match="The recipe .*nowhere.yaml cannot be read: No such file or directory."):
        load_recipe(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(WrongUsage, match="cannot be read: Is a directory."):
        load_recipe(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(WrongUsage, match="cannot be read"):
        load_recipe(str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (64, {"q": 64, "kv": 64, "o": 64, "ffn": 64}),
        ("64", {"q": 64, "kv": 64, "o": 64, "ffn": 64}),
        (0, {"q": 0, "kv": 0, "o": 0, "ffn": 0}),
        ("q=64,kv=32,o=16,ffn=128", {"q": 64, "kv": 32, "o": 16, "ffn": 128}),
        (" q = 64 , ffn = 8 ", {"q": 64, "kv": 0, "o": 0, "ffn": 8}),
        ({"ffn": 8}, {"q": 0, "kv": 0, "o": 0, "ffn": 8}),
        ({"q": "8"}, {"q": 8, "kv": 0, "o": 0, "ffn": 0}),
    ],
)
def test_ranks_can_be_one_number_or_one_for_each_matrix_group(given, expected):
    recipe = InitRecipe(rank=given)
    assert {group: recipe.rank_of(group) for group in MATRIX_GROUPS} == expected


@pytest.mark.parametrize(
    ("sharing", "keep", "order", "kept"),
    [
        ("cycle", 0, "cycle", 0),
        ("sequence", 2, "sequence", 2),
        ("middle_cycle", 0, "cycle", 1),
        ("middle_sequence", 1, "sequence", 1),
    ],
)
def test_middle_sharings_are_keep_1_by_another_name(sharing, keep, order, kept):
    recipe = InitRecipe(sharing=sharing, keep=keep)
    assert (recipe.order, recipe.kept_at_each_end) == (order, kept)


def test_flags_override_the_file_and_those_not_given_do_not(tmp_path):
    section = load(tmp_path, "init: {loops: 3, rank: 8, norms: shared}").init
    assert with_flags(section, {"loops": None, "rank": None}, "the command line") is section
    changed = with_flags(section, {"loops": 2, "rank": "q=4,ffn=2", "keep": None}, "the command line")
    assert changed == InitRecipe(loops=2, rank={"q": 4, "ffn": 2}, norms="shared")
    assert with_flags(section, {"rank": 0}, "the command line").rank == 0


def test_flags_are_checked_as_the_file_is():
    with pytest.raises(WrongUsage, match="In the command line, 'rank' is wrong: .* not 'x'."):
        with_flags(InitRecipe(), {"rank": "q=64,kv=x"}, "the command line")
    with pytest.raises(WrongUsage, match="it should be 'recursive', 'dense', 'onnx' or 'gguf'"):
        with_flags(ExportRecipe(), {"format": "pickle"}, "the command line")
    with pytest.raises(WrongUsage, match="keeps one layer at each end, but keep is 3"):
        with_flags(InitRecipe(keep=3), {"sharing": "middle_cycle"}, "the command line")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f"{part}.seed", value) for part in ("init", "uptrain", "eval", "export") for value in (-1, 2**32)),
        ("uptrain.tokens", 10**20),
        ("uptrain.losses", ["forward_kl=1e308"]),
        ("uptrain.losses", ["forward_kl=nan"]),
        ("uptrain.learning_rate", math.inf),
        ("uptrain.learning_rate", "nan"),
        ("uptrain.temperature", 1e-300),
        ("uptrain.data_weights", "1e308"),
        ("uptrain.shared_lr_scale", "1e308"),
        ("init.rank", 10**30),
        ("init.rank", "q=99999999999999999999"),
        ("init.budget", math.nan),
        ("init.loops", 10**9),
        ("eval.passkey_lengths", [256] * 1000),
        ("init.sharing", "\ud800"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(field, value):
    part, name = field.split(".")
    with pytest.raises(WrongUsage, match=f"{name}.* is wrong|is wrong: .*{name}|is no text"):
        with_flags(getattr(Recipe(), part), {name: value}, "the command line")


@pytest.mark.parametrize("text", ["9" * 400, "1" * 19 + "B", "inf", "nan", "-1M"])
def test_sizes_and_counts_have_bounds(text):
    for parse in (parse_size, parse_count):
        with pytest.raises(WrongUsage):
            parse(text)


@pytest.mark.parametrize(("text", "number"), [("200k", 200_000), ("1.5B", 1.5e9), ("20_000", 20_000), ("7", 7)])
def test_amounts_of_text_are_written_as_people_write_them(tmp_path, text, number):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"init: {{calibrate_tokens: {text}, measure_tokens: {text}}}\nuptrain: {{tokens: {text}}}\n")
    recipe = load_recipe(str(file))
    assert recipe.uptrain.tokens == recipe.init.calibrate_tokens == recipe.init.measure_tokens == number
    assert with_flags(Recipe().eval, {"tokens": text}, "the command line").tokens == number


def test_a_recipe_survives_being_written_down():
    recipe = Recipe(model="m", init=InitRecipe(rank="q=3,ffn=5", sharing="middle_cycle"))
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_every_field_has_a_line_of_help():
    for name, field in Recipe.model_fields.items():
        if name == "model":
            assert field.description
            continue
        assert field.annotation.__doc__
        assert all(inner.description for inner in field.annotation.model_fields.values()), name


def test_a_recipe_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().init.loops = 3


def test_the_nearest_name_is_offered_or_else_all():
    assert nearest("lops", ["loops", "keep"]) == "Did you mean 'loops'?"
    assert nearest("xyz", ["loops", "keep"]) == "Valid: loops, keep."
