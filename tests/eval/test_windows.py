"""A model whose visits see a window, evaluated: every way to its logits has the windows, and the report says what they
save."""

import shutil
from pathlib import Path

import pytest
import torch
from exports import make_rrt
from initialized import recipe as init_recipe
from pico import save_pico
from recursive_models import assert_equal
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from windowed import KINDS, SINKS, by_brute_force, see_windows, without_windows

from rrtc import scoring
from rrtc.cli import scores
from rrtc.eval import cost
from rrtc.eval.cost import NEW, speed_after
from rrtc.eval.passkey import Probe, found
from rrtc.eval.stage import evaluate
from rrtc.init.stage import init
from rrtc.io.report import read_report
from rrtc.io.source import content_hash, read_config
from rrtc.model import RrtForCausalLM
from rrtc.plan import KV_CONTEXTS
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_plan
from rrtc.stock.parts import Parts, states_of
from rrtc.text.windows import Windows

LENGTH = 150
TEXT = "It rained, and then it rained again. def f(x): return x * 0x1f\n" * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return see_windows(make_rrt(tmp_path_factory.mktemp("windows") / "rrt"))


@pytest.fixture(scope="module")
def model(folder) -> RrtForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_parts_of_a_model_have_its_windows(folder, model, ids, tmp_path):
    expected = by_brute_force(folder, ids)
    assert_equal(model(ids).logits, expected, 1e-4)
    full = AutoModelForCausalLM.from_pretrained(without_windows(folder, tmp_path / "full")).eval()
    assert (full(ids).logits - expected).abs().max() > 1e-2
    parts = Parts(model)
    hidden, outputs = parts.run(ids, range(len(parts.layers)))
    assert torch.equal(parts.head(hidden[0]), model(ids).logits[0])
    assert torch.equal(parts.after(ids, len(outputs) - 1, outputs[-1]), hidden)
    states = model(ids, output_hidden_states=True).hidden_states[1:-1]
    for output, state in zip(outputs, states, strict=False):
        assert torch.equal(states_of(output), state)
    place = len(outputs) // 2
    with parts.left_after(place):
        left = model(ids, use_cache=False).logits
        said = model.generate(ids[:1, :100], max_new_tokens=6, do_sample=False, pad_token_id=2)
        again = model.generate(ids[:1, :100], max_new_tokens=6, do_sample=False, pad_token_id=2, use_cache=False)
    assert torch.equal(left[0], parts.head(parts.after(ids, place, outputs[place])[0]))
    assert torch.equal(said, again)
    assert_equal(model(ids).logits, expected, 1e-4)  # nothing stands in any more


def test_scores_are_those_of_the_windows(folder, model, ids, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 64)  # so that a window takes several goes
    place = len(model.config.visits) // 2
    end, left = scoring.score_tokens(model, Windows(ids, 1.0), [place], model)
    log_p = by_brute_force(folder, ids)[:, :-1].log_softmax(-1)
    torch.testing.assert_close(end.loss, -log_p.gather(2, ids[:, 1:, None])[..., 0], atol=1e-4, rtol=0)
    assert end.kl.abs().max() < 1e-5 and end.top1_agreement.min() == 1
    with torch.no_grad(), Parts(model).left_after(place):
        logits = model(ids, use_cache=False).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(left.loss, expected, atol=1e-5, rtol=0)


def test_a_key_is_found_by_what_the_windows_show(folder, model, ids):
    logits = by_brute_force(folder, ids[:1])[0]
    said = int(logits[-1].argmax())
    probes = [Probe(LENGTH, 0.0, tuple(ids[0].tolist()), (key,)) for key in (said, said + 1)]
    assert found(model, probes).tolist() == [1, 0]


def test_windows_are_part_of_what_a_measurement_is_kept_under(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    assert content_hash(other) == content_hash(folder)
    see_windows(other, tuple(kind and kind | {"sinks": SINKS + 1} for kind in KINDS))
    assert content_hash(other) != content_hash(folder)


def test_both_models_read_a_long_prompt_once_and_say_as_much_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "CHUNK", 200)
    one = see_windows(make_rrt(tmp_path / "one", max_position_embeddings=350))
    dense, model = (AutoModelForCausalLM.from_pretrained(one).eval() for _ in range(2))
    calls, advanced = [], []
    for name, each in (("dense", dense), ("model", model)):
        each.register_forward_hook(lambda module, args, out, name=name: calls.append((name, args[0].shape[1])))
    found = speed_after(dense, model, 2, 8192, lambda: advanced.append(1))
    prompt = 350 - NEW
    assert (found["prompt_tokens"], found["new_tokens"]) == (prompt, NEW) and len(advanced) == 5
    assert calls[:4] == [("dense", 200), ("dense", prompt - 200), ("model", 200), ("model", prompt - 200)]
    assert [name for name, _ in calls[4::NEW]] == ["model", "dense", "dense", "model", "model", "dense"]
    assert {tokens for _, tokens in calls[4:]} == {1} and len(calls) == 4 + 6 * NEW
    assert 0 < found["decode"]["low"] <= found["decode"]["ratio"] <= found["decode"]["high"]
    assert speed_after(dense, model, 2, 288) is None  # as short as what is measured anyway


def printed(report: dict) -> str:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(scores.report(report))
    return shown.get()


@pytest.mark.slow
def test_an_evaluation_says_what_windows_save_and_what_they_cost(tmp_path):
    save_pico(tmp_path / "dense", max_position_embeddings=512)
    (tmp_path / "text.txt").write_text(TEXT)
    init(str(tmp_path / "dense"), str(tmp_path / "wide"), init_recipe(rank=4))
    shutil.copytree(tmp_path / "wide", tmp_path / "local")
    see_windows(tmp_path / "local")
    asked = {
        "text": [str(tmp_path / "text.txt")], "context": 64, "tokens": 8 * 64, "sample_tokens": 4,
        "passkey_lengths": [300], "passkey_trials": 2, "speed_rounds": 1,
    }  # fmt: skip
    report = evaluate(str(tmp_path / "local"), Recipe.model_validate({"eval": asked}), output=str(tmp_path / "report"))
    assert read_report(tmp_path / "report") == report
    plan = read_plan(read_config(tmp_path / "local"))
    dense, local = (row["cost"]["kv_bytes"] for row in report["models"])
    assert local == {str(context): plan.kv_bytes(context, 4) for context in KV_CONTEXTS}
    assert dense == {str(context): plan.architecture.kv_bytes(context, 4) for context in KV_CONTEXTS}
    assert report["speed"]["long"]["prompt_tokens"] == 512 - NEW
    assert [one["attention"] for one in report["layers"]] == [*KINDS, *KINDS]
    assert {one["kv_heads"] for one in report["layers"]} == {2}
    # The loss grows where there are more tokens before one than its window, and not before.
    wide = evaluate(str(tmp_path / "wide"), Recipe.model_validate({"eval": asked | {"speed_rounds": 0}}))
    ours, theirs = ([one["loss"]["value"] for one in r["models"][1]["by_position"]] for r in (report, wide))
    assert wide["speed"] is None and len(ours) == len(theirs) == 3
    assert all(abs(a - b) > 1e-3 for a, b in zip(ours[1:], theirs[1:], strict=True))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Which KV heads of which layers attend to everything" in page and "after 480 tokens" in page
    said = printed(report)
    assert "KV cache" in said and "generating after 480 tokens" in said and "300 tokens, 10 keys" in said
    for row in report["models"]:  # a report of an older version
        del row["cost"]["kv_bytes"]
        for one in row["passkey"]:
            del one["low"], one["high"]
    assert "KV cache" not in printed(report)
