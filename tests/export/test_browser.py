"""The page for the browser, opened in a real one: what it writes is what ONNX Runtime and transformers write."""

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from chromium import Page
from exports import make_rrt, recipe
from onnx_graph import DATA, HYBRID, LAYERS, padded_greedy
from transformers import AutoTokenizer, GenerationConfig

from rrtc.export import stage
from rrtc.export.formats import onnx as onnx_format
from rrtc.model import RrtForCausalLM

VARIABLE = "RRTC_TRANSFORMERS_JS"
CHROMIUM = shutil.which("chromium")
BROWSER = Path(__file__).parents[2] / "recipes/browser"
PROMPT, TOKENS = "The statement is", 24
PRESS = "document.getElementById('go').click();"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        VARIABLE not in os.environ,
        reason="needs transformers.js: npm install --ignore-scripts @huggingface/transformers@4 in a folder that "
        f"{VARIABLE} names",
    ),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """(a folder as the page's own words tell to make it, but for the model; its address)."""
    folder = tmp_path_factory.mktemp("site")
    for file in BROWSER.iterdir():
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(Path(os.environ[VARIABLE], "node_modules").absolute())
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    with Page(CHROMIUM, tmp_path_factory.mktemp("chromium") / "profile") as page:
        yield page


def state_after(page: Page, passing: str) -> list[str]:
    """[state of the page, what it says], as soon as that is none of the states `passing`."""
    page.wait_until(f"!{passing.split()}.includes(document.body.dataset.state)")
    return page.evaluate("[document.body.dataset.state, document.getElementById('status').textContent]")


def written_by_page(page: Page, address: str, then: str = "") -> list:
    """[tokens, text] that somebody gets who opens the address, presses the button and does what `then` says."""
    page.open(address)
    state, words = state_after(page, "loading")
    assert state == "ready", words
    page.evaluate(PRESS + then)
    state, words = state_after(page, "ready busy")
    assert state == "done", words
    return page.evaluate("[JSON.parse(document.body.dataset.tokens), document.getElementById('text').textContent]")


@pytest.mark.parametrize(
    ("architecture", "options", "files"),
    [
        ("llama", {}, 1),
        ("gemma3", {"dtype": "float16", "max_shard_size": "32KB"}, 3),
    ],
)
def test_the_page_writes_what_the_export_writes(tmp_path, site, page, architecture, options, files):
    folder, address = site
    changes = HYBRID if architecture == "gemma3" else LAYERS
    source, target = make_rrt(tmp_path / "rrt", architecture, **changes), folder / architecture
    stage.export(str(source), str(target), recipe(format="onnx", **options))
    assert len(list(target.glob(f"{DATA}*"))) == files

    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected, _ = padded_greedy(target, ids, torch.ones_like(ids), TOKENS)
    model = RrtForCausalLM.from_pretrained(source).eval()
    onnx_format.round_tensors(model, getattr(torch, options.get("dtype", "float32")))
    model.generation_config = GenerationConfig(pad_token_id=2)
    assert torch.equal(model.generate(ids, max_new_tokens=TOKENS, do_sample=False), expected)

    opened = f"{address}?model={architecture}&prompt={PROMPT}&tokens={TOKENS}"
    tokens, text = written_by_page(page, opened)
    assert tokens == expected[0, ids.shape[1] :].tolist()
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True)

    empty = "document.getElementById('prompt').value = '';"
    stopped, _ = written_by_page(page, opened, then=f"{empty} {PRESS}")  # the second time it says "Stop"
    assert 0 < len(stopped) < TOKENS
    assert stopped == tokens[: len(stopped)]


def test_the_page_runs_a_model_in_four_bits(tmp_path, site, page):
    folder, address = site
    source, target = make_rrt(tmp_path / "rrt", "gemma3", **HYBRID), folder / "four"
    asked = {"calibrate_tokens": 1024, "calibrate_context": 128}
    stage.export(str(source), str(target), recipe(format="onnx", quantize="int4", **asked))
    ids = AutoTokenizer.from_pretrained(target)(PROMPT, return_tensors="pt")["input_ids"]
    expected, _ = padded_greedy(target, ids, torch.ones_like(ids), TOKENS)
    tokens, _ = written_by_page(page, f"{address}?model=four&prompt={PROMPT}&tokens={TOKENS}")
    assert tokens == expected[0, ids.shape[1] :].tolist()


def test_another_model_under_the_same_name_is_another_model(tmp_path, site, page):
    folder, address = site
    found = []
    for architecture in ("llama", "qwen3"):
        shutil.rmtree(folder / "model", ignore_errors=True)
        stage.export(
            str(make_rrt(tmp_path / architecture, architecture, **LAYERS)), str(folder / "model"), recipe(format="onnx")
        )
        found.append(written_by_page(page, f"{address}?prompt={PROMPT}&tokens=8")[0])
    assert found[0] != found[1]


def test_the_page_says_what_is_missing(site, page):
    page.open(f"{site[1]}?model=nowhere")
    assert state_after(page, "loading") == [
        "failed",
        "Beside this page is no model “nowhere”: rrtc export … -o nowhere --format onnx makes one.",
    ]
    page.open((site[0] / "index.html").as_uri())
    assert "has to come from a server" in state_after(page, "loading")[1]
