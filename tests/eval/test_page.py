"""report.html: that it says what the report says, needs nothing else, and stands up to what a report can hold."""

import copy
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rrtc.eval.page import write_page
from rrtc.io.report import KEYS
from rrtc.plan import KV_CONTEXTS

LENGTHS, DEPTHS = (256, 512), (0.0, 0.5, 1.0)


def score(value: float, dense: float | None) -> dict:
    difference = (
        None if dense is None else {"value": value - dense, "low": value - dense - 0.01, "high": value - dense + 0.01}
    )
    return {"value": value, "stderr": 0.0123, "difference": difference}


def row(name: str, kind: str, bits: float, dense: float | None = 1.1837, share: float = 1.0) -> dict:
    texts = {"loss": score(2 * bits, dense and 2 * dense), "bits_per_byte": score(bits, dense)}
    if dense is not None:
        texts |= {"kl": score(0.4917, None), "top1_agreement": score(0.6471, None)}
    positions = [(1, 16), (16, 32), (32, 64)]
    made = {
        "model": name, "kind": kind, "layers_computed": share, "params_total": 105_415_104,
        "params_non_embedding": 77_103_552, "bytes": 210_895_800, "scores": texts, "texts": {"held out": texts},
        "parts": {"embeddings": 28_311_552, "head": 0, "shared": 70_000_000, "lora": 7_100_000, "norms_and_biases": 52},
        "by_position": [{"from": a, "to": b, "loss": score(2 * bits, dense and 2 * dense)} for a, b in positions],
    }  # fmt: skip
    if kind != "stage" or name == "after uptrain":
        made["tasks"] = {
            "piqa": {"metric": "acc_norm", "items": 500, **score(0.6121, dense and 0.6821)},
            "lambada_openai": {"metric": "acc", "items": 400, **score(0.3525, dense and 0.4825)},
        }
        made["task_average"] = score(0.4825, dense and 0.5825)
        made["passkey"] = [
            {"length": length, "depth": depth, "items": 4, **score(0.75, dense and 1.0)}
            for length in LENGTHS
            for depth in DEPTHS
        ]
        cache = {str(context): context * 23040 for context in KV_CONTEXTS}
        made["cost"] = {"kv_bytes_per_token": 23040, "kv_bytes": cache, "flops_per_token": 2.7e8,
                        "peak_memory_bytes": 841_500_000}  # fmt: skip
    return made


@pytest.fixture()
def report() -> dict:
    """One with everything in it."""
    layers = [
        {"layer": n, "slot": n % 15, "loop": n // 15, "tied": 0 < n < 29,
         "ranks": {"self_attn.q_proj": 12, "mlp.up_proj": None if n in (0, 29) else 3 * n}, "residual": 0.01 * n,
         "kv_heads": 3, "window": 0, "attention": None}
        for n in range(30)
    ]  # fmt: skip
    return {
        "schema": 2, "of": {"stage": "uptrain", "made": "2026-11-22T10:00:00+0000"}, "against": "maker/model",
        "made_with": {"versions": {"rrtc": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "dtype": "float32", "seed": 0,
                      "resamples": 1000},
        "tokens": {"held out": 4080},
        "models": [
            row("dense", "dense", 1.1837, None),
            row("after init", "stage", 1.3765),
            row("after uptrain", "stage", 1.2677),
            row("exit after loop 1", "exit", 1.9, share=0.5),
            row("whitened SVD", "baseline", 1.7),
        ],
        "not_run": [{"task": "hellaswag", "why": "There is no network."}], "layers": layers,
        "speed": {"device": "cpu", "rounds": 5, "prompt_tokens": 256, "new_tokens": 32,
                  "prefill": {"ratio": 0.97, "low": 0.95, "high": 0.99},
                  "decode": {"ratio": 1.21, "low": 1.15, "high": 1.3}},
        "training": [{"stage": "uptrain", "points": [[512 * n, 4 / n, 1 / n] for n in range(1, 40)]}],
        "engine": None, "source_bytes": None, "samples": [{"model": "dense", "text": "The sky is <b>blue</b> & wide."}],
        "prompt": "Why is the sky <blue>?",
    }  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of it: the words, and what it would fetch or run."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.sources, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        self.words += [value for name, value in attributes if name == "alt"]

    def handle_data(self, data):
        self.words.append(data)


def page_of(report: dict, folder: Path) -> tuple[str, Page]:
    write_page(report, folder / "report.html")
    text = (folder / "report.html").read_text()
    return text, Page(text)


def test_the_page_says_what_the_report_says(report, tmp_path):
    assert report.keys() == {"schema", *KEYS}
    text, page = page_of(report, tmp_path)
    words = " ".join(" ".join(page.words).split())
    for said in (
        "Measured against maker/model", "held out (4.08k tokens)", "1.2677 ± 0.0123", "+0.0840 [+0.0740, +0.0940]",
        "0.4917 ± 0.0123", "64.7 % ± 1.2", "piqa (acc_norm, 500 items)", "61.2 ± 1.2 (-7.0 [-8.0, -6.0])", "average",
        "exit after loop 1", "50%", "28.31M", "LoRA", "23.04 kB", "841.5 MB", "reading a prompt", "0.97 [0.95, 0.99]",
        "generating", "1.21 [1.15, 1.30]", "after uptrain takes 100% of the dense model's bytes",
        "Asked: Why is the sky <blue>?", "a token saves no arithmetic and saves no KV cache",
        "hellaswag: There is no network.", "The sky is <b>blue</b>",
        "seed 0, 1000 bootstrap samples", "torch 2.13.0",
    ):  # fmt: skip
        assert said in words, said
    assert page.tags.count("img") == 8 and "script" not in page.tags
    assert not (tmp_path / "report.html").read_text().count("low rank")  # there is none in it


def test_the_page_needs_nothing_else_and_its_pictures_are_whole(report, tmp_path):
    _, page = page_of(report, tmp_path)
    assert page.sources and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    for source in page.sources:
        picture = ElementTree.fromstring(b64decode(source.partition(",")[2]))
        assert picture.tag.endswith("svg") and len(list(picture.iter())) > 50


@pytest.mark.slow
def test_the_same_report_gives_the_same_page(report, tmp_path):
    assert page_of(report, tmp_path)[0] == page_of(copy.deepcopy(report), tmp_path)[0]


def test_names_cannot_run_anything(report, tmp_path):
    evil = "<script>alert(1)</script>"
    report["against"] = report["models"][2]["model"] = report["samples"][0]["text"] = evil
    report["not_run"][0]["why"] = report["training"][0]["stage"] = evil
    report["tokens"] = {evil: 10}
    text, page = page_of(report, tmp_path)
    assert "script" not in page.tags and text.count("&lt;script&gt;") >= 5


def test_what_was_not_measured_has_no_section(report, tmp_path):
    for one in report["models"]:
        for key in ("tasks", "task_average", "passkey", "cost", "layers_computed"):
            one.pop(key, None)
    report["models"] = [one for one in report["models"] if one["kind"] != "exit"][:2]
    report |= {"not_run": [], "layers": [], "speed": None, "training": [], "samples": []}
    _, page = page_of(report, tmp_path)
    words = " ".join(page.words)
    for missing in ("Tasks", "Cost", "Not run", "What they say", "layers computed", "Pass keys", "Speed"):
        assert missing not in words
    assert page.tags.count("img") == 2  # quality against size, loss by position


@pytest.mark.slow
def test_reports_at_their_limits(report, tmp_path):
    def without_errors(value):
        if isinstance(value, dict):
            if "stderr" in value:
                value["stderr"] = None
                if value["difference"]:
                    value["difference"] |= {"low": None, "high": None}
            for one in value.values():
                without_errors(one)
        elif isinstance(value, list):
            for one in value:
                without_errors(one)

    without_errors(report)
    tasks = {f"a_task_with_a_long_name_{n}": report["models"][0]["tasks"]["piqa"] for n in range(30)}
    for one in report["models"]:
        one["model"] = one["model"] + " of a model with a long name" * 3
        if "tasks" in one:
            one["tasks"] = tasks
    report["layers"] = [dict(layer, layer=n) for n, layer in enumerate(report["layers"] * 4)]
    report["of"] = None
    _, page = page_of(report, tmp_path)
    assert page.tags.count("img") == 8 and "±" not in " ".join(page.words).replace("(±", "")


def test_models_that_are_compared_keep_their_pictures_and_speeds(report, tmp_path):
    layers, speed = report["layers"], report["speed"]
    first, second = report["models"][1:3]
    first |= {"layers": layers, "speed": speed, "cost": second["cost"]}
    second |= {"layers": layers[:15], "speed": speed | {"decode": {"ratio": 1.4, "low": 1.3, "high": 1.5}}}
    curve = report["training"][0]["points"]
    report |= {"of": None, "layers": [], "speed": None}
    report["training"] = [{"stage": name, "points": curve} for name in ("after init", "after uptrain")]
    _, page = page_of(report, tmp_path)
    words = " ".join(" ".join(page.words).split())
    for said in (
        "after init takes", "after uptrain takes", "1.21 [1.15, 1.30]", "1.40 [1.30, 1.50]",
        "after init: rank by layer", "after uptrain: rank by layer", "What is lost, by layer", "Training",
    ):  # fmt: skip
        assert said in words, said
    assert page.tags.count("img") == 9  # a picture of ranks more


def with_windows(report: dict) -> dict:
    """`report`, as one of a model whose KV heads mostly see a window."""
    for n, layer in enumerate(report["layers"]):
        if n % 3:
            layer["attention"] = {"window": 256, "sinks": 4, "heads": [n % 2] if n % 5 == 0 else []}
        else:
            layer["window"] = 512 * (n % 2)
    for one, kept in zip([one for one in report["models"] if "cost" in one], (1, 0.2, 0.2, 0.9), strict=True):
        one["cost"]["kv_bytes"] = {str(context): int(context * 23040 * kept) for context in KV_CONTEXTS}
    report["speed"]["long"] = {
        "prompt_tokens": 8160, "new_tokens": 32, "decode": {"ratio": 1.63, "low": 1.6, "high": 1.7},
    }  # fmt: skip
    return report


def test_a_model_with_windows_has_pictures_of_its_heads_and_of_its_cache(report, tmp_path):
    _, page = page_of(with_windows(report), tmp_path)
    words = " ".join(" ".join(page.words).split())
    for said in (
        "Which KV heads of which layers attend to everything, and which to a window",
        "KL of each model from the dense one over the bytes of its KV cache at 8,192 tokens",
        "188.7 MB", "37.75 MB", "saves 80.0% of the KV cache at 8,192 tokens of context",
        "Generating after 8,160 tokens: 1.63 [1.60, 1.70]", "256 tokens (12 keys) 75 [47, 91]",
    ):  # fmt: skip
        assert said in words, said
    assert page.tags.count("img") == 10
