"""rrtc chat: what is shown is what the model says, turn after turn, and nothing in it commands the terminal."""

import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from pico import pico_tokenizer, save_pico
from said import greedy
from typer.testing import CliRunner

from rrtc import api
from rrtc.cli.app import app
from rrtc.errors import RrtcError, WrongUsage

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
PROMPT = "Why is the sky blue?"


def rrtc(*arguments, stdin: bytes | None = None):
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=stdin, env=environment)


def fails(*arguments, says: str, code: int = 1, stdin: bytes | None = None) -> None:
    done = rrtc(*arguments, stdin=stdin)
    assert done.exit_code == code and done.stdout == "", done.output
    assert says in done.stderr, done.stderr


def with_template(folder: Path, template: str = TEMPLATE, **changes) -> Path:
    save_pico(folder, **changes)
    tokenizer = pico_tokenizer().__class__.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def with_defaults(folder: Path, **defaults) -> Path:
    """A pico model with generation defaults of its own."""
    file = save_pico(folder) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    return folder


@pytest.fixture(scope="module")
def templated(tmp_path_factory) -> Path:
    return with_template(tmp_path_factory.mktemp("chat") / "templated")


# ---- one answer ----


def test_an_answer_is_what_generate_says(dense, rrt):
    for folder in (dense("llama"), rrt):
        shown = rrtc(folder, "--prompt", PROMPT, "--max-tokens", "24")
        expected = greedy(folder, PROMPT, 24)
        assert shown.exit_code == 0, shown.output
        assert shown.stdout.count("\n") == expected.count("\n") + 1
        found = json.loads(rrtc(folder, "--prompt", PROMPT, "--max-tokens", "24", "--json", "-").stdout)
        (answer,) = found["answers"]
        assert (found["prompt"], answer["text"], answer["model"]) == (PROMPT, expected, str(folder))
        assert not answer["chat_template"] and 1 <= answer["tokens"] <= 24
        assert f"{folder}: going on with the text, without a chat template" in shown.stderr


def test_text_comes_through_a_pipe(dense, tmp_path):
    for stdin in (PROMPT.encode(), f"{PROMPT}\n".encode()):
        piped = rrtc(dense("llama"), "--max-tokens", "8", "--json", tmp_path / "answer.json", "-q", stdin=stdin)
        assert piped.exit_code == 0 and piped.stderr == ""
        found = json.loads((tmp_path / "answer.json").read_text())
        assert found["prompt"] == PROMPT
        assert found["answers"][0]["text"] == greedy(dense("llama"), PROMPT, 8)


def test_the_dense_original_answers_beside_it(dense, rrt):
    shown = rrtc(rrt, "--prompt", PROMPT, "--against", "dense", "--max-tokens", "8")
    assert shown.exit_code == 0, shown.output
    assert re.search(rf"\A{rrt}:\n.*^{dense('llama')}:\n", shown.stdout, re.DOTALL | re.MULTILINE)
    other = dense("qwen2")
    asked = ["--prompt", PROMPT, "--max-tokens", "8", "--json", "-"]
    for named, folder in (("dense", dense("llama")), (other, other)):
        answers = json.loads(rrtc(rrt, *asked, "--against", named).stdout)["answers"]
        assert [answer["model"] for answer in answers] == [str(rrt), str(folder)]
        assert [answer["text"] for answer in answers] == [greedy(one, PROMPT, 8) for one in (rrt, folder)]


def test_drawing_is_by_the_models_own_defaults_unless_it_is_said(tmp_path):
    folder = with_defaults(tmp_path / "drawn", do_sample=True, temperature=0.9, top_k=20)

    def answer(**options) -> str:
        return api.chat(folder, max_tokens=16, **options).answer(PROMPT)["answers"][0]["text"]

    model, tokenizer = api.load(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    for options, said in (({}, {}), ({"temperature": 2.0, "top_p": 0.5}, {"temperature": 2.0, "top_p": 0.5})):
        torch.manual_seed(5)
        drawn = model.generate(**ids, max_new_tokens=16, **said)[0, ids["input_ids"].shape[1] :]
        assert answer(seed=5, **options) == tokenizer.decode(drawn, skip_special_tokens=True)
    assert answer(temperature=0) == greedy(folder, PROMPT, 16) != answer(seed=5)
    state = torch.random.get_rng_state()
    answer(seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_in_an_answer_commands_the_terminal(tmp_path):
    escape, newline = (pico_tokenizer().encode(text)[0] for text in ("\x1b", "\n"))
    for token, shown in ((escape, r"\x1b" * 3), (newline, "\n\n\n")):
        folder = with_defaults(tmp_path / str(token), sequence_bias=[[[token], 1000.0]])
        done = rrtc(folder, "--prompt", PROMPT, "--max-tokens", "3")
        assert done.stdout == f"{shown}\n", done.output
    written = rrtc(tmp_path / str(escape), "--prompt", "\x9b\u202e", "--max-tokens", "3", "--json", "-").stdout
    assert not {"\x1b", "\x9b", "\u202e"} & set(written)
    assert json.loads(written)["answers"][0]["text"] == "\x1b" * 3 and json.loads(written)["prompt"] == "\x9b\u202e"


# ---- a conversation ----


def test_turns_go_through_the_chat_template(templated):
    chat, pieces = api.chat(templated, max_tokens=10), []
    first = chat.answer("One?", pieces.append)["answers"][0]
    assert first["text"] == "".join(pieces) == greedy(templated, "[user] One?\n[assistant] ", 10)
    assert first["chat_template"] and first["ended"] == "max_tokens" and first["tokens"] == 10
    before = f"[user] One?\n[assistant] {first['text']}\n"
    (speaker,) = chat.speakers
    passes = speaker._engine.passes
    asked = "[user] One?\n[assistant] ", f"{before}[user] Two?\n[assistant] "
    second = chat.answer("Two?")["answers"][0]
    assert second["text"] == greedy(templated, asked[1], 10)
    first_ids, second_ids = speaker.tokenizer(list(asked))["input_ids"]
    read = speaker._engine.passes - passes - (second["tokens"] - 1)
    assert read <= len(second_ids) - len(first_ids)  # what was read for the first answer is not read again
    chat.clear()
    assert chat.answer("One?")["answers"][0]["text"] == first["text"]


def test_without_a_template_what_is_typed_next_begins_a_line(dense):
    chat = api.chat(dense("llama"), max_tokens=6)
    first = chat.answer("One")["answers"][0]["text"]
    assert chat.answer("Two")["answers"][0]["text"] == greedy(dense("llama"), f"One{first}\nTwo", 6)


def test_a_model_that_the_engine_cannot_run_is_asked_by_transformers(rrt, tmp_path):
    folder = shutil.copytree(rrt, tmp_path / "owners")
    config = json.loads((folder / "config.json").read_text())
    for visit in config["visits"]:
        if visit["loop"]:
            visit["attention"] = {"window": 9, "sinks": 0, "heads": [], "owner": {"loop": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    chat, pieces = api.chat(folder, max_tokens=24), []
    (answer,) = chat.answer(PROMPT, pieces.append)["answers"]
    assert answer["text"] == "".join(pieces) == greedy(folder, PROMPT, 24)
    assert chat.speakers[0]._engine is None and answer["tokens"] == 24


def test_an_answer_ends_where_the_models_own_defaults_say(tmp_path, dense):
    stop = re.search("[ -~]{2}", greedy(dense("llama"), PROMPT, 24)[3:])[0]
    folder = with_defaults(tmp_path / "stops", stop_strings=[stop])
    (answer,) = api.chat(folder, max_tokens=24).answer(PROMPT)["answers"]
    assert stop in answer["text"] and answer["ended"] == "by itself" and answer["tokens"] < 24
    assert greedy(dense("llama"), PROMPT, 24).startswith(answer["text"])


@pytest.mark.parametrize("asked", [{"num_beams": 3}, {"max_time": 1000.0}], ids=str)
def test_what_the_engine_does_not_do_is_done_by_transformers(tmp_path, dense, asked):
    folder = with_defaults(tmp_path / "asks", **asked)
    (answer,) = api.chat(folder, max_tokens=12).answer(PROMPT)["answers"]
    model, tokenizer = api.load(folder)
    said = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12)
    assert answer["text"] == tokenizer.decode(said[0, len(tokenizer(PROMPT)["input_ids"]) :], skip_special_tokens=True)
    assert (answer["text"] == greedy(dense("llama"), PROMPT, 12)) == ("num_beams" not in asked)


def test_drawing_from_everything_does_not_ask_for_drawing(dense):
    (answer,) = api.chat(dense("llama"), max_tokens=16, top_p=1).answer(PROMPT)["answers"]
    assert answer["text"] == greedy(dense("llama"), PROMPT, 16)


def test_the_oldest_turns_are_forgotten_where_there_is_no_room(templated):
    chat = api.chat(templated, max_tokens=8)
    (speaker,) = chat.speakers
    forgotten = [chat.answer(f"Question {n}: {'and so on, ' * 8}?")["answers"][0]["forgotten"] for n in range(4)]
    assert forgotten[0] == 0 and sum(forgotten) == 4 - len(speaker.turns) // 2 > 0
    assert speaker.turns[0]["role"] == "user" and "Question 0" not in speaker.turns[0]["content"]
    assert [turn["role"] for turn in speaker.turns] == ["user", "assistant"] * (len(speaker.turns) // 2)
    turns = list(speaker.turns)
    with pytest.raises(WrongUsage, match=r"The prompt has \d+ tokens, and .* can see 256\."):
        chat.answer("word " * 300)
    assert speaker.turns == turns


def test_an_answer_ends_where_the_model_sees_no_more(templated):
    (answer,) = api.chat(templated).answer("word " * 60)["answers"]
    assert answer["ended"] in ("context", "by itself") and answer["tokens"] < 256


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(templated):
    (speaker,) = api.chat(templated, max_tokens=20).speakers

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speaker.answer(PROMPT, stop)
    assert [turn["role"] for turn in speaker.turns] == ["user", "assistant"] and speaker.turns[1]["content"]


def read_until(terminal: int, pattern: str, seconds: float = 60) -> str:
    """What the terminal shows until it shows `pattern`."""
    shown, end = "", time.monotonic() + seconds
    while not re.search(pattern, shown):
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, shown
        try:
            shown += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            assert re.search(pattern, shown), shown
    return shown


@pytest.mark.slow
def test_a_conversation_in_a_terminal(tmp_path, request):
    gone: list[int] = []
    folder = with_template(tmp_path / "model", max_position_embeddings=100_000)
    bias = [[[pico_tokenizer().encode(" ")[0]], 1000.0]]
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sequence_bias": bias}))
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command = [sys.executable, "-m", "rrtc", "chat", str(folder), "--max-tokens", "90000"]
        os.execve(sys.executable, command, os.environ | {"TERM": "dumb", "COLUMNS": "300"})

    def say(text: str, shows: str) -> str:
        os.write(terminal, text.encode())
        return read_until(terminal, shows)

    request.addfinalizer(lambda: child in gone or os.kill(child, signal.SIGKILL))
    read_until(terminal, r"Ctrl-C stops an answer\.\r\n> ")
    say(f"{PROMPT}\n", " {6}")
    say("\x03", r"Stopped\.\r\n> ")
    say("/cler\n", r"There is no command /cler\. Did you mean '/clear'\?\r\n> ")
    say("/clear\n", r"What was said is forgotten\.\r\n> ")
    say("half a line", "half a line")
    while psutil.Process(child).status() != psutil.STATUS_SLEEPING:  # until it waits for more, as for any person
        time.sleep(0.01)
    say("\x03", r"> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(child, 0)
    gone.append(child)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


# ---- what cannot be ----


def test_what_is_wrong_is_said_in_a_sentence_before_any_model_is_loaded(dense, rrt, tmp_path):
    asked = ["--prompt", PROMPT]
    fails(tmp_path / "nowhere", *asked, says=f"There is no model at {tmp_path / 'nowhere'}.")
    fails(tmp_path, *asked, says="it has no config.json.")
    fails(dense("llama"), *asked, "--against", "dense", says="nothing says which dense model it was made from.")
    fails(rrt, *asked, "--against", tmp_path / "nowhere", says="There is no model at")
    fails(rrt, "--prompt", " ", says="The prompt is empty.", code=2)
    fails(rrt, says="The prompt is empty.", code=2, stdin=b"\n")
    fails(rrt, says="The prompt holds bytes that are no text.", code=2, stdin=b"\xff\xfe")
    fails(rrt, *asked, "--temperature", "-1", says="'temperature' is wrong: it should be greater than", code=2)
    fails(rrt, *asked, "--temperature", "0", "--top-p", "0.5", says="so top_p says nothing.", code=2)
    fails(rrt, *asked, "--max-tokens", "0", says="'max_tokens' is wrong", code=2)
    bare = save_pico(tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    fails(bare, *asked, says=f"There is no tokenizer in {bare}.")


def test_a_template_that_fails_and_defaults_that_cannot_be(tmp_path):
    broken = with_template(tmp_path / "broken", "{{ raise_exception('no users') }}")
    with pytest.raises(RrtcError, match="The chat template of .*broken fails with 'no users'"):
        api.chat(broken).answer(PROMPT)
    odd = with_defaults(tmp_path / "odd", do_sample=True, temperature=-3.0)
    with pytest.raises(RrtcError):
        api.chat(odd).answer(PROMPT)
