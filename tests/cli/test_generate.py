"""rrtc generate: a text gone on with, and files of prompts, whole or not at all, and gone on with when interrupted."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pico import save_pico
from said import greedy
from typer.testing import CliRunner

from rrtc import api
from rrtc.cli.app import app
from rrtc.errors import RrtcError, WrongUsage
from rrtc.text.prompts import AnswersFile

PROMPTS = ["Why is the sky blue?", "Once upon a time", "The end of the story is"]
FEW = ["--max-tokens", "12", "--temperature", "0"]


def rrtc(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def fails(*arguments, says: str, code: int = 1) -> None:
    done = rrtc(*arguments)
    assert done.exit_code == code and done.stdout == "", done.output
    assert says in done.stderr, done.stderr


def written(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def questions(tmp_path) -> Path:
    return written(tmp_path / "questions.jsonl", [{"prompt": prompt, "id": n} for n, prompt in enumerate(PROMPTS)])


def test_a_text_is_gone_on_with_as_by_generate(dense, rrt):
    for folder in (dense("llama"), rrt):
        done = rrtc(folder, PROMPTS[0], *FEW)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith(re.split(r"[^ -~]", greedy(folder, PROMPTS[0]))[0])
        assert "12 tokens for 1 prompt" in done.stdout
        found = json.loads(rrtc(folder, PROMPTS[0], *FEW, "--json", "-").stdout)
        assert found["answers"] == [{"text": greedy(folder, PROMPTS[0]), "tokens": 12, "ended": "max_tokens"}]
        assert (found["way"], found["forecast"], found["drafted"]) == ("full depth", None, 0)


def test_a_file_of_prompts_becomes_a_file_of_answers(rrt, questions, tmp_path):
    for batch in (1, 8):
        output = tmp_path / f"answers{batch}.jsonl"
        done = rrtc(rrt, "--prompts", questions, "-o", output, *FEW, "--batch", batch)
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(row["id"], row["prompt"], row["text"]) for row in rows] == [
            (number, prompt, greedy(rrt, prompt)) for number, prompt in enumerate(PROMPTS)
        ]
        assert sorted(file.name for file in tmp_path.iterdir() if "partial" in file.name) == []
    shown = rrtc(rrt, "--prompts", questions, *FEW).stdout.splitlines()
    assert [json.loads(line) for line in shown[:3]] == rows


def interrupted_after_two(model: Path, prompts: Path, output: Path, **given) -> None:
    add = AnswersFile.add

    def interrupted(self, number, answer):
        add(self, number, answer)
        if number == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AnswersFile, "add", interrupted)
        api.generate_file(model, prompts, output, **given)
    assert not output.exists()


def answers_in(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_what_an_interrupted_run_has_answered_is_not_answered_again(rrt, questions, tmp_path):
    output, given = tmp_path / "answers.jsonl", {"max_tokens": 12, "temperature": 0, "batch": 1}
    interrupted_after_two(rrt, questions, output, **given)
    with open(tmp_path / "answers.jsonl.partial", "a") as stream:
        stream.write('[2, {"text": "cut o')
    with pytest.raises(RrtcError, match="holds the answers of an interrupted run"):
        api.generate_file(rrt, questions, output, **given)
    with pytest.raises(RrtcError, match="was made of other prompts, another model or other settings"):
        api.generate_file(rrt, questions, output, **given | {"max_tokens": 13}, resume=True)
    result = api.generate_file(rrt, questions, output, **given, resume=True)
    assert len(result["answers"]) == 1
    assert answers_in(output) == [greedy(rrt, prompt) for prompt in PROMPTS]
    assert not (tmp_path / "answers.jsonl.partial").exists()
    with pytest.raises(RrtcError, match="is there already"):
        api.generate_file(rrt, questions, output, **given, resume=True)
    with pytest.raises(RrtcError, match="There is nothing to resume"):
        api.generate_file(rrt, questions, tmp_path / "other.jsonl", **given, resume=True)


def test_a_run_that_goes_on_draws_what_the_whole_one_would(rrt, tmp_path):
    same = written(tmp_path / "same.jsonl", [{"prompt": PROMPTS[0]}] * 4)
    given = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "batch": 1}
    api.generate_file(rrt, same, tmp_path / "whole.jsonl", **given)
    interrupted_after_two(rrt, same, tmp_path / "cut.jsonl", **given)
    api.generate_file(rrt, same, tmp_path / "cut.jsonl", **given, resume=True)
    assert answers_in(tmp_path / "cut.jsonl") == answers_in(tmp_path / "whole.jsonl")
    assert len(set(answers_in(tmp_path / "whole.jsonl"))) == 4


@pytest.mark.parametrize(
    ("file", "content"), [("generation_config.json", '{"repetition_penalty": 3.0}'), ("chat_template.jinja", "{{ 1 }}")]
)
def test_a_run_does_not_go_on_with_a_model_that_answers_otherwise(rrt, questions, tmp_path, file, content):
    model = shutil.copytree(rrt, tmp_path / "model")
    given = {"max_tokens": 12, "batch": 1}
    interrupted_after_two(model, questions, tmp_path / "out.jsonl", **given)
    (model / file).write_text(content)
    with pytest.raises(RrtcError, match="was made of other prompts, another model or other settings"):
        api.generate_file(model, questions, tmp_path / "out.jsonl", **given, resume=True)


def test_a_run_that_stops_while_it_begins_to_go_on_keeps_what_was_answered(rrt, questions, tmp_path, monkeypatch):
    given, partial = {"max_tokens": 12, "temperature": 0, "batch": 1}, tmp_path / "out.jsonl.partial"
    interrupted_after_two(rrt, questions, tmp_path / "out.jsonl", **given)
    before = partial.read_text()
    assert len(before.splitlines()) == 3

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", stopped)  # by which what is written anew takes the place of what was there
    with pytest.raises(KeyboardInterrupt):
        api.generate_file(rrt, questions, tmp_path / "out.jsonl", **given, resume=True)
    assert partial.read_text() == before


def test_a_run_that_is_refused_leaves_nothing_that_stands_in_the_way_of_the_next(rrt, questions, tmp_path):
    written(tmp_path / "long.jsonl", [{"prompt": "a b c d " * 200}])
    for prompts, given, says in (
        (tmp_path / "long.jsonl", {}, "and .* can see 256"),
        (questions, {"speculate": 3}, "exits"),
    ):
        with pytest.raises(WrongUsage, match=says):
            api.generate_file(rrt, prompts, tmp_path / "out.jsonl", max_tokens=4, **given)
        assert not (tmp_path / "out.jsonl.partial").exists()
    api.generate_file(rrt, questions, tmp_path / "out.jsonl", max_tokens=4)


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"prompt": "a"', "Line 2 of {file} is not JSON."),
        ('["a"]', "Line 2 of {file} has neither a prompt nor messages."),
        ('{"text": "a"}', "Line 2 of {file} has neither a prompt nor messages."),
        ('{"prompt": "a", "messages": []}', "Line 2 of {file} has both a prompt and messages."),
        ('{"prompt": "a", "text": "b"}', "Line 2 of {file} has a field 'text', which is where the answer goes."),
        ('{"messages": [], "ended": 1}', "Line 2 of {file} has a field 'ended', which is where the answer goes."),
        ('{"prompt": "  "}', "Line 2 of {file} has an empty prompt."),
        ('{"prompt": 3}', "Line 2 of {file} has a prompt that is neither text nor messages."),
        ('{"messages": []}', "Line 2 of {file} has a prompt that is neither text nor messages."),
        ('{"messages": [{"role": "user"}]}', "Line 2 of {file} has a prompt that is neither text nor messages."),
    ],
)
def test_a_line_that_is_no_prompt_is_named_before_any_work(tmp_path, line, says):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    fails(tmp_path / "absent", "--prompts", file, "-o", tmp_path / "out.jsonl", says=says.format(file=file))


def test_messages_go_through_the_chat_template_or_are_gone_on_with(rrt):
    turns = [{"role": "user", "content": PROMPTS[0]}]
    found = api.generate(rrt, turns, max_tokens=12, temperature=0)
    assert [answer["text"] for answer in found["answers"]] == [greedy(rrt, PROMPTS[0])]


def with_defaults(folder: Path, **defaults) -> Path:
    """A pico model with generation defaults of its own."""
    file = save_pico(folder) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    return folder


def test_stop_strings_of_the_model_end_an_answer_unless_others_are_asked_for(tmp_path):
    whole = greedy(save_pico(tmp_path / "plain"), PROMPTS[0], 24)
    own, other = re.search("[ -~]{2}", whole[3:])[0], re.search("[ -~]", whole)[0]
    for number, stops in enumerate((own, ["no such text", own])):
        folder = with_defaults(tmp_path / str(number), stop_strings=stops)
        (answer,) = api.generate(folder, PROMPTS[0], max_tokens=24, temperature=0)["answers"]
        assert answer["text"] == whole[: whole.index(own)] and answer["ended"] == "stopped"
    (answer,) = api.generate(folder, PROMPTS[0], max_tokens=24, temperature=0, stop=[other])["answers"]
    assert answer["text"] == whole[: whole.index(other)]


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"num_beams": 4}, "num_beams=4"), ({"max_time": 9.5}, "max_time=9.5"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"), ({"dola_layers": "low"}, "dola generation"),
    ],
)  # fmt: skip
def test_what_the_models_defaults_ask_for_and_would_not_get_is_refused(tmp_path, asked, says):
    says = f"The model's generation defaults ask for {says}, which the engine for many requests does not do."
    fails(with_defaults(tmp_path / "asks", **asked), PROMPTS[0], says=says)


def test_bad_input_is_one_sentence_before_any_work(dense, rrt, questions, tmp_path):
    fails(rrt, says="There has to be one kind of prompts.", code=2)
    fails(rrt, "a", "--prompts", questions, says="There has to be one kind of prompts.", code=2)
    fails(rrt, "a", "-o", tmp_path / "x", says="-o and --resume are for the prompts of a file.", code=2)
    fails(rrt, "", says="The prompt is empty.", code=2)
    fails(tmp_path / "absent", "a", says="absent")
    fails(rrt, "--prompts", tmp_path / "none.jsonl", says="cannot be read")
    fails(rrt, "a", "--top-k", 3, "--temperature", 0, says="top_k says nothing", code=2)
    fails(rrt, "a", "--speculate", 2, "--exit-threshold", 0.5, says="two ways to use exits", code=2)
    fails(rrt, "a", "--catch-up", says="catch_up is for tokens that have left", code=2)
    fails(rrt, "a", "--exit-quality", 0, says="'exit_quality'", code=2)
    for flag in (["--speculate", 2], ["--exit-threshold", 0.5], ["--exit-quality", 0.1]):
        fails(rrt, "a", *flag, says="The model has no exits that were trained.", code=2)
    long = written(tmp_path / "long.jsonl", [{"prompt": "a"}, {"prompt": "a b c d e f " * 200}])
    fails(rrt, "--prompts", long, says="Prompt 2 has", code=2)
    with pytest.raises(WrongUsage, match="There are no prompts."):
        api.generate(rrt, [])


@pytest.fixture(scope="module")
def with_exits(tmp_path_factory) -> Path:
    """A recursive pico model whose exits were trained, for two steps."""
    folder = tmp_path_factory.mktemp("exits")
    dense = save_pico(folder / "dense", num_hidden_layers=4)
    api.init(dense, folder / "tied", sharing="cycle", rank=4, measure_tokens=0)
    training = {"context": 32, "tokens": 256, "batch_size": 4, "micro_batch": 4, "precision": "float32"}
    api.uptrain(folder / "tied", folder / "healed", exits=True, **training)
    return folder / "healed"


@pytest.mark.slow
def test_exits_that_were_trained_are_used_as_they_are_asked_for(with_exits, capsys):
    expected = greedy(with_exits, PROMPTS[0])
    for options in ({}, {"speculate": 3}, {"speculate": 0}):
        found = api.generate(with_exits, PROMPTS[0], max_tokens=12, temperature=0, **options)
        assert found["answers"][0]["text"] == expected
        assert (found["forecast"] is None) == (options.get("speculate") == 0)
        if found["way"] == "full depth" and found["forecast"] is not None:
            assert found["forecast"] < 1.05 and "as full depth, which it therefore is." in found["why"]
    left = api.generate(with_exits, PROMPTS, max_tokens=12, temperature=0, exit_threshold=0.0001)
    assert left["way"] == "early exits" and left["loops"] == 2
    assert left["left"] == [3 * 12 - 3, 0]  # all but the first token of each, which a prompt leads to
    never = api.generate(with_exits, PROMPTS, max_tokens=12, temperature=0, exit_threshold=1.5)
    assert [answer["text"] for answer in never["answers"]] == [greedy(with_exits, prompt) for prompt in PROMPTS]
    found = api.generate(with_exits, PROMPTS[0], max_tokens=12, temperature=0, exit_quality=5.0)
    assert "Leaving where an exit is surer than" in found["why"]


def test_a_folder_that_rrtc_did_not_write_has_no_trained_exits(rrt, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(rrt, folder)
    (folder / "rrtc.yaml").unlink()
    assert api.generate(folder, "a", max_tokens=3)["way"] == "full depth"
