"""rrtc serve as a user has it: a process that listens, real OpenAI clients, and signals that end it."""

import json
import os
import re
import signal
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import APIError, NotFoundError, OpenAI
from ready import Ready
from said import greedy
from typer.testing import CliRunner

from rrtc.cli.app import app
from rrtc.results import ServeResult

pytestmark = pytest.mark.slow

PROMPTS = ["Why is the sky blue?", "Once upon a time", "The end of the story is", "a", "A longer prompt, of two parts."]


class Served(Ready):
    """`rrtc serve`, listening. Ended in any case with the block."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "rrtc", "serve", *map(str, arguments), "--port", "0"]
        super().__init__(command, os.environ | {"COLUMNS": "200", "NO_COLOR": "1"})
        self.url = self.says(r"Serving '\w+' at (http://\S+)/v1; ")

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error) -> None:
        if self.poll() is None:
            self.kill()

    def says(self, pattern: str) -> str:
        """Waits until it says this on stderr."""
        until = time.monotonic() + 300
        while not (found := re.search(pattern, self.stderr)):
            assert self.poll() is None and time.monotonic() < until, self.stderr
            time.sleep(0.02)
        return found[1] if found.groups() else found[0]

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)

    def load(self) -> dict:
        return json.loads(urllib.request.urlopen(f"{self.url}/health").read())

    def is_idle(self) -> None:
        """Waits until it answers nobody any more."""
        until = time.monotonic() + 300
        while self.load() != {"status": "ok", "active": 0, "waiting": 0}:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_many_clients_at_once_are_answered_as_by_generate(rrt):
    def ask(number: int) -> str:
        asked = {"model": "rrt", "max_tokens": 10 + 5 * number, "temperature": 0}
        turns = [{"role": "user", "content": PROMPTS[number]}]
        if number % 2:
            chunks = client.chat.completions.create(messages=turns, stream=True, **asked)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        if number == 4:
            return client.chat.completions.create(messages=turns, **asked).choices[0].message.content
        return client.completions.create(prompt=PROMPTS[number], **asked).choices[0].text

    with Served(rrt, "--batch", "3", "--json", "-") as served:
        client = served.client
        assert [model.id for model in client.models.list()] == ["rrt"]
        with ThreadPoolExecutor(5) as threads:
            found = list(threads.map(ask, range(5)))
        assert found == [greedy(rrt, prompt, 10 + 5 * number) for number, prompt in enumerate(PROMPTS)]
        with pytest.raises(NotFoundError, match="It is 'rrt'."):
            client.completions.create(model="gpt", prompt="a")
        for stream in (True, False):  # who goes before the answer is whole
            with served.client as gone:
                if stream:
                    next(iter(gone.completions.create(model="rrt", prompt="a", max_tokens=200, stream=True)))
                else:
                    with pytest.raises(APIError):
                        gone.with_options(timeout=0.3).completions.create(model="rrt", prompt="a", max_tokens=240)
            served.is_idle()
        busy = CliRunner().invoke(app, ["serve", str(rrt), "--port", served.url.rpartition(":")[2]])
        assert busy.exit_code == 1 and "Nothing can listen at 127.0.0.1" in busy.stderr
        served.send_signal(signal.SIGINT)
        assert served.wait() == 0
        result = json.loads(served.stdout)
        assert result.keys() == ServeResult.__required_keys__
        assert result["url"] == served.url and result["model"] == "rrt" and result["answered"] >= 5
        assert "Traceback" not in served.stderr, served.stderr


@pytest.mark.parametrize("twice", [False, True])
def test_what_is_answered_when_it_is_stopped_ends_or_is_told(tmp_path, twice):
    from pico import save_pico

    folder = save_pico(tmp_path / "pico", max_position_embeddings=100_000, eos_token_id=None)
    with Served(folder, "--context", "90000", "--batch", "2", "--host", "0.0.0.0") as served:
        assert "Whoever reaches http://0.0.0.0:" in served.stderr
        served.url = served.url.replace("0.0.0.0", "127.0.0.1")
        endless = served.client.completions.create(model="pico", prompt="a", max_tokens=80000, stream=True)
        next(iter(endless))
        short = served.client.completions.create(model="pico", prompt="a", max_tokens=5, stream=True)
        next(iter(short))
        served.terminate()
        assert [chunk.choices[0].finish_reason for chunk in short][-1] == "length"
        if twice:
            served.says("Ctrl-C stops at once")
            served.send_signal(signal.SIGINT)
        with pytest.raises(APIError, match="The server was stopped."):
            list(endless)
        assert served.wait() == 0
        assert "Stopping: what is being answered has 5 s to end" in served.stderr
        assert "Traceback" not in served.stderr, served.stderr


def test_what_is_wrong_is_said_before_any_model_is_loaded(dense, tmp_path):
    def fails(*arguments, says: str, code: int = 1) -> None:
        done = CliRunner().invoke(app, ["serve", *map(str, arguments), "--port", "0"], env={"COLUMNS": "200"})
        assert done.exit_code == code and says in done.stderr, done.output

    fails(tmp_path / "nowhere", says="There is no model at")
    fails(dense("llama"), "--host", "no such host", says="Nothing can listen at no such host, port 0:")
    fails(dense("llama"), "--context", "1", says="'context' is wrong", code=2)
    fails(dense("llama"), "--context", "257", says="can see 256 tokens.", code=2)
    fails(dense("llama"), "--speculate", "2", says="The model has no exits that were trained.", code=2)
    fails(dense("llama"), "--exit-threshold", "0.5", "--speculate", "2", says="two ways to use exits", code=2)
