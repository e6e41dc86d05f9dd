"""The server without a network: a real OpenAI client, and requests by hand, against the ASGI application."""

import asyncio
import json
import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pico import VOCABULARY, pico_tokenizer
from said import greedy
from starlette.testclient import TestClient

from rrtc import api
from rrtc.errors import RrtcError, WrongUsage
from rrtc.generate.engine import Busy, Engine
from rrtc.generate.ways import FullDepth, Leave, Speculate
from rrtc.recipe.generate import AnswerOptions, ServeOptions
from rrtc.serve import place, server
from rrtc.serve.app import make_app
from rrtc.serve.place import bind, is_open, url_of
from rrtc.serve.worker import Worker

PROMPTS = ["Why is the sky blue?", "Once upon a time", "The end of the story is", "a"]
GREEDY = {"temperature": 0, "max_tokens": 12}
LONG, SHORT = (AnswerOptions(max_tokens=tokens, temperature=0) for tokens in (200, 5))


@contextmanager
def serving(folder, rows: int = 4, **given):
    """(the worker, the application) for a model."""
    way, waiting = given.pop("way", FullDepth), given.pop("waiting", 10)
    model, tokenizer = api.load(folder)
    with Worker(Engine(model, way, rows, 240, waiting=waiting), tokenizer, "pico") as worker:
        yield worker, make_app(worker, "pico", **given)


@pytest.fixture
def served(rrt):
    with serving(rrt) as made:
        yield made


@pytest.fixture
def worker(served):
    return served[0]


@pytest.fixture
def http(served):
    return TestClient(served[1], raise_server_exceptions=False)


@pytest.fixture
def client(http):
    return OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)


def is_empty(worker: Worker) -> bool:
    """Whether nothing of any request is left in the engine, when what was to be done is done."""
    worker.do(lambda: None).result()
    counts = {arrivals.count for row in worker.engine.store.arrivals for arrivals in row}
    return not worker.engine.busy and counts == {0} and not worker._known


# ---- answers ----


def test_a_client_completes_as_generate_does(dense, rrt):
    for folder in (dense("llama"), rrt):
        with serving(folder) as (_, app):
            client = OpenAI(base_url="http://testserver/v1", api_key="any", http_client=TestClient(app))
            found = client.completions.create(model="pico", prompt=PROMPTS[0], **GREEDY)
            assert found.choices[0].text == greedy(folder, PROMPTS[0])
            assert found.choices[0].finish_reason == "length"
            prompt = len(pico_tokenizer()(PROMPTS[0])["input_ids"])
            assert found.usage.model_dump(exclude_none=True) == {
                "prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12,
            }  # fmt: skip


def test_it_chats_through_the_template_or_goes_on_with_the_text(served, client, rrt):
    turns = [{"role": "developer", "content": "Be"}, {"role": "user", "content": [{"type": "text", "text": " brief"}]}]
    found = client.chat.completions.create(model="pico", messages=turns, max_completion_tokens=12, temperature=0)
    assert found.choices[0].message.content == greedy(rrt, "Be brief")
    assert found.choices[0].message.role == "assistant"
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    served[0]._tokenizer.chat_template = template
    found = client.chat.completions.create(model="pico", messages=turns, max_tokens=12, temperature=0)
    assert found.choices[0].message.content == greedy(rrt, "[system] Be[user]  brief")


def test_what_is_streamed_is_what_is_said_at_once(client, rrt):
    asked = {"model": "pico", "stream": True, "stream_options": {"include_usage": True}, **GREEDY}
    *chunks, counted = client.completions.create(prompt=PROMPTS[0], **asked)
    assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(rrt, PROMPTS[0])
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 6 and counted.choices == [] and counted.usage.completion_tokens == 12
    turns = [{"role": "user", "content": PROMPTS[0]}]
    first, *chunks, counted = client.chat.completions.create(messages=turns, **asked)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == greedy(rrt, PROMPTS[0])
    assert chunks[-1].choices[0].finish_reason == "length" and counted.usage.completion_tokens == 12


def test_answers_are_written_as_openai_types_them(http):
    turns = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    Completion.model_validate_json(http.post("/v1/completions", json={"prompt": "a"}).text, strict=True)
    ChatCompletion.model_validate_json(http.post("/v1/chat/completions", json=turns).text, strict=True)
    for path, kind, body in (
        ("completions", Completion, {"prompt": "a"}),
        ("chat/completions", ChatCompletionChunk, turns),
    ):
        streamed = http.post(f"/v1/{path}", json=body | {"stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        *events, end = streamed.text.removesuffix("\n\n").split("\n\n")
        assert end == "data: [DONE]"
        # Until the end it is null, as OpenAI's own, though its type for completions does not say so.
        texts = [
            event.removeprefix("data: ").replace('"finish_reason": null', '"finish_reason": "stop"') for event in events
        ]
        chunks = [kind.model_validate_json(text, strict=True) for text in texts]
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_several_prompts_and_token_ids(client, rrt):
    found = client.completions.create(model="pico", prompt=PROMPTS, **GREEDY)
    expected = [greedy(rrt, prompt) for prompt in PROMPTS]
    assert [(choice.index, choice.text) for choice in found.choices] == list(enumerate(expected))
    assert found.usage.completion_tokens == 12 * len(PROMPTS)
    ids = [pico_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    assert [choice.text for choice in client.completions.create(model="pico", prompt=ids, **GREEDY).choices] == expected
    assert client.completions.create(model="pico", prompt=ids[0], **GREEDY).choices[0].text == expected[0]
    streamed = [""] * len(PROMPTS)
    for chunk in client.completions.create(model="pico", prompt=PROMPTS, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_answers_are_drawn_and_ended_as_by_generate(client, rrt):
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "max_tokens": 20}
    more = {"top_k": 30, "repetition_penalty": 1.2}
    expected = api.generate(rrt, PROMPTS[0], **drawn, **more)["answers"][0]["text"]
    for _ in range(2):
        found = client.completions.create(model="pico", prompt=PROMPTS[0], extra_body=more, **drawn)
        assert found.choices[0].text == expected
    stop = expected[len(expected) // 2 :][:2]
    found = client.completions.create(model="pico", prompt=PROMPTS[0], extra_body=more, stop=stop, **drawn)
    assert found.choices[0].text == expected[: expected.index(stop)]
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens < 20
    assert client.completions.create(model="pico", prompt=PROMPTS[0]).usage.completion_tokens <= 16


def test_stop_strings_of_the_model_end_an_answer_unless_others_are_asked_for(worker, client, rrt):
    whole = greedy(rrt, PROMPTS[0])
    own, other = whole[6:8], whole[4:6]
    worker.engine.model.generation_config.stop_strings = [own]
    for asked, stop in (({}, own), ({"stop": other}, other)):
        found = client.completions.create(model="pico", prompt=PROMPTS[0], **GREEDY, **asked).choices[0]
        assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_exits_change_nothing_where_they_are_checked_or_never_sure(rrt):
    for way in (partial(Speculate, drafts=3), partial(Leave, threshold=1.0)):
        with serving(rrt, way=way) as (worker, app):
            client = OpenAI(base_url="http://testserver/v1", api_key="any", http_client=TestClient(app))
            chunks = client.completions.create(model="pico", prompt=PROMPTS[0], stream=True, **GREEDY)
            assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(rrt, PROMPTS[0])
            assert is_empty(worker) and worker.engine.stages.loops == 2


def test_requests_share_the_steps(worker, rrt):
    async def all_of_them() -> list[str]:
        gate = threading.Event()
        worker.do(gate.wait)  # until all are there
        lengths = [AnswerOptions(max_tokens=10 + 5 * n, temperature=0) for n in range(4)]
        asked = [asyncio.ensure_future(worker.submit([p], o)) for p, o in zip(PROMPTS, lengths, strict=True)]
        await asyncio.sleep(0)
        gate.set()
        texts = []
        for answers in await asyncio.gather(*asked):
            texts.append("".join([event async for _, event in answers if isinstance(event, str)]))
        return texts

    assert asyncio.run(all_of_them()) == [greedy(rrt, p, 10 + 5 * n) for n, p in enumerate(PROMPTS)]
    assert worker.engine.steps == 25  # of the longest; one after the other they are 70
    assert (worker.answered, worker.tokens) == (4, 70) and is_empty(worker)


def test_a_call_has_as_many_prompts_as_can_go_on_and_wait(rrt):
    with serving(rrt, rows=2, waiting=3) as (worker, app):
        http = TestClient(app)
        for _ in range(2):
            found = http.post("/v1/completions", json={"prompt": ["a"] * 5, "max_tokens": 3, "temperature": 0})
            assert [choice["text"] for choice in found.json()["choices"]] == [greedy(rrt, "a", 3)] * 5
        found = http.post("/v1/completions", json={"prompt": ["a"] * 6})
        assert found.status_code == 400 and "6 prompts, and this server takes 5 at once." in found.text
        assert is_empty(worker)


# ---- what cannot be answered ----

CHAT = "/v1/chat/completions"
REFUSED = [
    ('{"prompt"', "The request is not JSON in UTF-8."),
    ('{"prompt": "\\ud800"}', "The request is not JSON in UTF-8."),
    (b'{"prompt": "\xff"}', "The request is not JSON in UTF-8."),
    ("[" * 10_000, "The request is not JSON in UTF-8."),
    ("[]", "The request is JSON, but no object with fields."),
    ({}, "The request has no 'prompt' that is text, token ids, or a list of those."),
    ({"prompt": ["a", 3]}, "The request has no 'prompt' that is text, token ids, or a list of those."),
    ({"prompt": []}, "The request has no 'prompt' that is text, token ids, or a list of those."),
    ({"prompt": [True]}, "The request has no 'prompt' that is text, token ids, or a list of those."),
    ({"prompt": ""}, "The request has an empty prompt."),
    ({"prompt": ["a", " "]}, "The request has an empty prompt."),
    ({"prompt": [1, VOCABULARY]}, "The prompt has token ids that pico does not know."),
    ({"prompt": [-1]}, "The prompt has token ids that pico does not know."),
    ({"prompt": "a " * 300}, "The prompt has 301 tokens, and with its answer there is room for 240."),
    ({"prompt": ["fine", "a " * 400]}, "The prompt has 401 tokens, and with its answer there is room for 240."),
    ({"prompt": "a", "n": 2}, "'n' is not supported by this server. Leave it out."),
    ({"prompt": "a", "n": True}, "'n' is not supported"),
    ({"prompt": "a", "logprobs": 0}, "'logprobs' is not supported"),
    ({"prompt": "a", "echo": True}, "'echo' is not supported"),
    ({"prompt": "a", "presence_penalty": 0.5}, "'presence_penalty' is not supported"),
    ({"prompt": "a", "logit_bias": {"3": 1}}, "'logit_bias' is not supported"),
    ({"prompt": "a", "max_token": 3}, "There is no field 'max_token' in such a request. Did you mean 'max_tokens'?"),
    ({"prompt": "a", "temperature": -1}, "In the request, 'temperature' is wrong: it should be greater than"),
    ({"prompt": "a", "temperature": 1e-9}, "a temperature below 0.001 is 0, or greater than that"),
    ({"prompt": "a", "max_tokens": 0}, "In the request, 'max_tokens' is wrong"),
    ({"prompt": "a", "top_p": "much"}, "In the request, 'top_p' is wrong"),
    ({"prompt": "a", "seed": -1}, "In the request, 'seed' is wrong"),
    ({"prompt": "a", "stop": ["x", ""]}, "In the request, 'stop' is wrong"),
    ({"prompt": "a", "stream": "yes"}, "'stream' is true or false."),
    ({"prompt": "a", "stream_options": {}}, "'stream_options' is an object, for requests with 'stream'."),
    ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "There is no field 'usage' in such"),
    ({"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}}, "'include_obfuscation' is not"),
    ({"prompt": "a", "stream": True, "stream_options": {"user": "me"}}, "There is no field 'user' in such a request."),
    ({"prompt": ["a"] * 15}, "The request has 15 prompts, and this server takes 14 at once."),
    ({"messages": []}, "The request has no 'messages'."),
    ({"messages": ["a"]}, "Message 1 is no object with a role and content."),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "Message 2 has no role that"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "Message 1 has no role that is supported here."),
    ({"messages": [{"role": "user"}]}, "Message 1 has content that is no text."),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "Message 1 has content that is no text."),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "Message 1 has 'tool_calls', which is not"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "Message 1 has 'x', which"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "'tools' is not supported"),
    ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "max_completion_tokens": 4}, "different things"),
    ({"messages": [{"role": "user", "content": ""}]}, "There is nothing in the prompt"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(rrt):
    with serving(rrt) as (worker, app):
        yield worker, TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("body, says", REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_cannot_be_answered_is_a_400_with_one_sentence(shared, body, says):
    worker, http = shared
    path = CHAT if isinstance(body, dict) and "messages" in body else "/v1/completions"
    content = json.dumps(body) if isinstance(body, dict) else body
    answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert says in error["message"]
    assert is_empty(worker)


def test_what_asks_for_nothing_is_no_matter(http):
    idle = {
        "n": 1, "best_of": 1, "logprobs": None, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "user": "me", "suffix": None, "stop": None, "seed": None, "temperature": 0, "top_p": 1,
    }  # fmt: skip
    plain = http.post("/v1/completions", json={"prompt": "a", "temperature": 0}).json()
    assert http.post("/v1/completions", json={"prompt": "a", **idle}).json()["choices"] == plain["choices"]
    plain = http.post("/v1/completions", json={"prompt": "a"}).json()  # the model is greedy, unless something is asked
    for idle in ({"top_p": 1}, {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1, "seed": 3}):
        assert http.post("/v1/completions", json={"prompt": "a", **idle}).json()["choices"] == plain["choices"]
    idle = {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False, "more": None}}
    assert http.post("/v1/completions", json={"prompt": "a", **idle}).status_code == 200
    idle = {
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "parallel_tool_calls": True,
        "modalities": ["text"], "metadata": {"a": "b"}, "store": False, "max_completion_tokens": 3,
    }  # fmt: skip
    turn = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": [], "name": "x"}
    assert http.post(CHAT, json={"messages": [turn], **idle}).status_code == 200


def test_other_statuses(http, client):
    def refused(answer, status: int, says: str) -> None:
        assert answer.status_code == status and says in answer.json()["error"]["message"], answer.text

    refused(http.post("/v1/completions", json={"prompt": "a", "model": "gpt"}), 404, "It is 'pico'.")
    refused(http.get("/v1/models/gpt"), 404, "The model 'gpt' is not served here.")
    refused(http.post("/v1/completions", content='{"prompt": "a"}'), 415, "application/json")
    refused(http.post("/v1/completions", json={"prompt": "a" * 1_100_000}), 413, "has more than 1,015,360 bytes")
    refused(http.get("/v1/nothing"), 404, "There is nothing at GET /v1/nothing.")
    refused(http.get("/v1/completions"), 405, "There is nothing at GET /v1/completions.")
    assert [model.id for model in client.models.list()] == ["pico"] == [client.models.retrieve("pico").id]
    assert http.get("/health").json() == {"status": "ok", "active": 0, "waiting": 0}


def test_with_a_key_who_has_none_is_refused(rrt):
    with serving(rrt, api_key="sécret") as (_, app):
        http = TestClient(app)
        for key in (None, "Bearer wrong", "sécret".encode(), "Bearer "):
            headers = {} if key is None else {"Authorization": key}
            for answer in (http.get("/v1/models", headers=headers), http.post(CHAT, json={}, headers=headers)):
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200
    with serving(rrt, api_key="secret") as (_, app):
        client = OpenAI(base_url="http://testserver/v1", api_key="secret", http_client=TestClient(app))
        assert client.completions.create(model="pico", prompt="a").choices[0].text


def test_a_site_whose_name_leads_to_this_machine_is_not_answered(rrt):
    with serving(rrt, only_here=True) as (_, app):
        for host in ("localhost:8000", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"):
            assert TestClient(app, f"http://{host}").get("/v1/models").status_code == 200
        for host in ("evil.example:8000", "192.168.0.7", "localhost.evil.example"):
            http = TestClient(app, f"http://{host}")
            for answer in (http.get("/v1/models"), http.post(CHAT, json={})):
                assert answer.status_code == 403 and "Call it by localhost" in answer.json()["error"]["message"]


def test_a_full_queue_refuses_and_who_is_in_it_is_answered(rrt):
    with serving(rrt, rows=1, waiting=1) as (worker, app):

        async def crowd() -> str:
            first = await worker.submit([PROMPTS[0]], LONG)
            second = await worker.submit([PROMPTS[1]], SHORT)
            with pytest.raises(Busy):
                await worker.submit(["a"], SHORT)
            answer = TestClient(app).post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert "requests wait already." in answer.json()["error"]["message"]
            first.cancel()
            return "".join([event async for _, event in second if isinstance(event, str)])

        assert asyncio.run(crowd()) == greedy(rrt, PROMPTS[1], 5)
        assert worker.answered == 1 and is_empty(worker)


def test_a_step_that_fails_ends_those_in_it_and_no_others(http, worker):
    layer = worker.engine.stages.layers[0].slot().loops[0].mlp.act_fn
    layer.forward = lambda x: 1 / 0
    for stream in (False, True):
        answer = http.post("/v1/completions", json={"prompt": "a", "stream": stream})
        assert answer.status_code == (200 if stream else 500)
        assert "The answer could not be made: division by zero" in answer.text and "[DONE]" not in answer.text
    del layer.forward
    assert is_empty(worker)
    assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_without_its_thread_it_says_that_it_failed(rrt):
    with serving(rrt) as (worker, app):
        http = TestClient(app)
    assert not worker.alive
    assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "failed")
    answer = http.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 500 and "The engine has stopped." in answer.text


# ---- clients that go ----


def sent_until_gone(app, body: dict, messages: int) -> list[dict]:
    """What the application sends to a client that goes after so many messages."""

    async def talk() -> list[dict]:
        sent, gone = [], asyncio.Event()
        asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> dict:
            if asked:
                return asked.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)
            if len(sent) == messages:
                gone.set()

        if not messages:
            asyncio.get_running_loop().call_later(0.05, gone.set)
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "query_string": b"",
            "path": "/v1/completions", "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        await app(scope, receive, send)
        return sent

    return asyncio.run(talk())


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_leaves_nothing_behind(served, stream):
    worker, app = served
    body = {"prompt": PROMPTS, "max_tokens": 200, "temperature": 0, "stream": stream}
    sent = sent_until_gone(app, body, messages=3 if stream else 0)
    assert is_empty(worker) and worker.answered == 0
    assert len(sent) < 50


def test_who_waits_and_goes_leaves_nothing_behind(rrt):
    with serving(rrt, rows=1) as (worker, app):
        for stream in (True, False):

            async def others() -> str:
                first = await worker.submit([PROMPTS[0]], SHORT)
                await asyncio.to_thread(sent_until_gone, app, {"prompt": "a", "stream": stream}, int(stream))  # noqa: B023
                return "".join([event async for _, event in first if isinstance(event, str)])

            assert asyncio.run(others()) == greedy(rrt, PROMPTS[0], 5)
            assert is_empty(worker)


# ---- before it listens ----


def test_a_place_to_listen_at():
    with bind("127.0.0.1", 0) as free:
        assert url_of(free) == f"http://127.0.0.1:{free.getsockname()[1]}" and not is_open(free)
        free.listen()
        with pytest.raises(RrtcError, match=rf"Nothing can listen at 127.0.0.1, port {free.getsockname()[1]}: "):
            bind("127.0.0.1", free.getsockname()[1])
    with bind("0.0.0.0", 0) as free:
        assert is_open(free)
    for host in ("no such host", "a" * 100):
        with pytest.raises(RrtcError, match="Nothing can listen at"):
            bind(host, 0)


def test_what_has_to_be_installed_is_named(rrt, monkeypatch):
    monkeypatch.setattr(place, "NEEDED", ("starlette", "no_such_package"))
    with pytest.raises(RrtcError, match="Serving needs no_such_package, which is not installed."):
        api.serve(rrt)


def test_room_for_all_requests_is_there_or_it_is_said(rrt, monkeypatch):
    model, tokenizer = api.load(rrt)
    engine = server._engine("pico", model, tokenizer, ServeOptions(batch=3, context=100), False, "")
    assert server._memory(model, type(engine.way), 3, 100) == 3 * 100 * 6 * 2 * 2 * 12 * 4
    engine.submit([5], 3)
    engine.run()
    assert engine.store.bytes == 3 * 100 * 6 * 2 * 2 * 12 * 4  # visits, KV heads, keys and values, width, float32
    assert server._engine("pico", model, tokenizer, ServeOptions(), False, "").context == 256
    with pytest.raises(WrongUsage, match="pico can see 256 tokens."):
        server._engine("pico", model, tokenizer, ServeOptions(context=257), False, "")
    monkeypatch.setattr(server, "free_memory", lambda device: 1000)
    with pytest.raises(RrtcError, match="Keys and values of 8 requests at once, of 256 tokens each, take 2.359 MB"):
        server._engine("pico", model, tokenizer, ServeOptions(), False, "")
    assert torch.is_inference(engine.store.shelves(0, 2)[0].keys)
