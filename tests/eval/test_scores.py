"""eval: the report's arithmetic, checked against the models themselves."""

import math
from pathlib import Path

import pytest
import torch
from pico import pico_tokenizer, save_pico
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rrtc.api import inspect
from rrtc.errors import RrtcError
from rrtc.eval.stage import evaluate
from rrtc.export.stage import export
from rrtc.init.stage import init
from rrtc.io.report import read_report
from rrtc.io.weights import Weights
from rrtc.recipe.schema import Recipe
from rrtc.uptrain.stage import uptrain

pytestmark = pytest.mark.slow

TEXTS = {"prose.txt": "It rained, and then it rained again. " * 60, "code.txt": "def f(x): return x * 0x1f\n" * 40}
CONTEXT = 32
TEXT_ALONE = {"passkey_trials": 0, "speed_rounds": 0, "context": CONTEXT}
QUICK = {"tokens": 300, "sample_tokens": 4} | TEXT_ALONE


def recipe(**sections) -> Recipe:
    return Recipe.model_validate({"eval": QUICK} | sections)


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A folder with a dense GPT-2 (whose positions end), its tied model, the healed one, and a dense export."""
    root = tmp_path_factory.mktemp("eval")
    save_pico(root / "dense", "gpt2")
    for name, text in TEXTS.items():
        (root / name).write_text(text)
    small = {"init": {"rank": 4, "measure_tokens": 0}, "export": {"format": "dense"}}
    learned = {"data": [str(root / "prose.txt")], "context": CONTEXT, "tokens": 600}
    all_of_it = recipe(**small, uptrain=learned)
    init(str(root / "dense"), str(root / "tied"), all_of_it)
    uptrain(str(root / "tied"), str(root / "healed"), all_of_it)
    export(str(root / "healed"), str(root / "stock"), all_of_it)
    return root


def scores_by_hand(folder: Path, dense: Path, text: str) -> dict:
    """Loss, KL, agreement and bits per byte of the model in `folder`, one token at a time and in float64."""
    tokenizer = pico_tokenizer()
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    windows = torch.tensor(ids[: min(320, len(ids)) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    model, reference = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, dense))
    loss = kl = same = scored = 0
    with torch.no_grad():
        for window in windows:
            p = model(window[None]).logits[0].double().softmax(-1)
            q = reference(window[None]).logits[0].double().softmax(-1)
            for at in range(CONTEXT - 1):
                loss -= math.log(p[at, window[at + 1]])
                kl += (q[at] * (q[at] / p[at]).log()).sum().item()
                same += int(p[at].argmax() == q[at].argmax())
                scored += 1
    kept = windows.flatten().tolist()
    letters = sum(len(t) for t in tokenizer.convert_ids_to_tokens(kept) if t != tokenizer.eos_token)
    bits = loss / scored / math.log(2) * len(kept) / letters
    return {"loss": loss / scored, "kl": kl / scored, "top1_agreement": same / scored, "bits_per_byte": bits}


def test_the_scores_of_every_stage_and_text_are_right(stages):
    texts = [str(stages / name) for name in TEXTS]
    report = evaluate(str(stages / "healed"), recipe(eval={"text": texts} | QUICK))
    assert [row["model"] for row in report["models"]] == ["dense", "after init", "after uptrain"]
    for row, folder in zip(report["models"], ("dense", "tied", "healed"), strict=True):
        for name, text in TEXTS.items():
            expected = scores_by_hand(stages / folder, stages / "dense", text)
            for key, value in expected.items():
                if key in row["texts"][name]:
                    assert row["texts"][name][key]["value"] == pytest.approx(value, abs=1e-4), (folder, name, key)
    assert report["models"][0]["texts"]["prose.txt"].keys() == {"loss", "bits_per_byte", "calibration_error"}
    dense, _, healed = report["models"]
    both = healed["texts"].values()
    whole = healed["scores"]["loss"]
    assert whole["value"] == pytest.approx(sum(s["loss"]["value"] for s in both) / 2)  # as many tokens of each
    assert whole["difference"]["value"] == pytest.approx(whole["value"] - dense["scores"]["loss"]["value"])
    low, high = sorted(s["bits_per_byte"]["value"] for s in both)
    assert low < healed["scores"]["bits_per_byte"]["value"] < high


def bits(row: dict) -> float:
    return row["scores"]["bits_per_byte"]["value"]


def test_the_sizes_are_those_of_the_folders(stages):
    report = evaluate(str(stages / "stock"), recipe())
    for row, folder in zip(report["models"], ("dense", "tied", "healed", "stock"), strict=True):
        weights = Weights(stages / folder)
        assert row["params_total"] == sum(math.prod(weights.shape(name)) for name in weights), folder
        assert row["params_non_embedding"] < row["params_total"]
        if folder != "dense":
            assert row["bytes"] == weights.bytes_on_disk
    assert report["models"][0]["bytes"] == 4 * report["models"][0]["params_total"]
    stock, healed = report["models"][3], report["models"][2]
    assert bits(stock) == pytest.approx(bits(healed), abs=1e-5)


def test_what_training_held_out_is_scored(stages):
    """Without a text, the end of the text it was trained on; not what the default recipe would train on."""
    report = evaluate(str(stages / "healed"), recipe())
    text = TEXTS["prose.txt"]
    expected = scores_by_hand(stages / "healed", stages / "dense", text[len(text) - len(text) // 10 :])
    assert report["models"][2]["scores"]["loss"]["value"] == pytest.approx(expected["loss"], abs=1e-4)


def test_the_report_is_written_and_read_back(stages, tmp_path):
    report = evaluate(str(stages / "healed"), recipe(), output=str(tmp_path / "report"))
    assert read_report(tmp_path / "report") == report
    assert inspect(str(tmp_path / "report"))["report"] == report
    assert all(sample["text"] for sample in report["samples"]) and len(report["samples"]) == 3


def test_a_report_is_only_for_the_model_it_measured(stages, tmp_path):
    evaluate(str(stages / "tied"), recipe(), output=str(tmp_path / "report"))
    with pytest.raises(RrtcError, match="is about another model"):
        export(str(stages / "healed"), str(tmp_path / "out"), recipe(), str(tmp_path / "report"))
    assert not (tmp_path / "out").exists()


def test_a_sample_stops_where_the_model_does(stages):
    report = evaluate(str(stages / "tied"), recipe(eval=QUICK | {"tokens": 64, "sample_tokens": 1000}))
    assert len(report["samples"]) == 2
    long = recipe(eval=QUICK | {"tokens": 64, "prompt": "Why? " * 400})
    assert "leaves no room" in evaluate(str(stages / "tied"), long)["samples"][0]["text"]


def test_another_dense_model_is_named(stages, tmp_path, capsys):
    save_pico(tmp_path / "other", "gpt2", num_hidden_layers=2)
    report = evaluate(str(stages / "tied"), recipe(), against=str(tmp_path / "other"))
    assert "is not the model" in capsys.readouterr().err
    with safe_open(tmp_path / "other" / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert report["models"][0]["params_total"] == sum(weights.get_tensor(name).numel() for name in names)
