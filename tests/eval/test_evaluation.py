"""A whole evaluation: everything that is asked, of every model, once, and on two processes with the same result."""

import copy
import io
import json
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import ready
import torch
from pico import pico_model, pico_tokenizer, save_pico
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rrtc.cli import scores
from rrtc.cli.app import app
from rrtc.errors import RrtcError, WrongUsage
from rrtc.eval import measurements
from rrtc.eval.candidates import Candidate
from rrtc.eval.sample import sample
from rrtc.eval.stage import evaluate
from rrtc.init.stage import init
from rrtc.io import remembered as cache
from rrtc.io.provenance import read_provenance
from rrtc.io.remembered import remembered
from rrtc.io.report import read_report
from rrtc.io.source import load_for_scoring, read_config
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_plan
from rrtc.uptrain.stage import uptrain

pytestmark = pytest.mark.slow

CONTEXT, WINDOWS = 64, 8
TEXT = "It rained, and then it rained again. def f(x): return x * 0x1f\n" * 60
ASKED = {
    "context": CONTEXT, "tokens": WINDOWS * CONTEXT, "sample_tokens": 4, "passkey_lengths": [300], "passkey_trials": 2,
    "speed_rounds": 0,
}  # fmt: skip


def recipe(**asked) -> Recipe:
    return Recipe.model_validate({"eval": ASKED | asked})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a dense model, two tied ones of different ranks, one of them with exits, and a text."""
    root = tmp_path_factory.mktemp("evaluation")
    save_pico(root / "dense", max_position_embeddings=512)
    (root / "text.txt").write_text(TEXT)
    for name, rank in (("small", 2), ("large", 8)):
        settings = {"init": {"rank": rank, "measure_tokens": 0}}
        init(str(root / "dense"), str(root / name), Recipe.model_validate(settings))
    learned = {"data": [str(root / "text.txt")], "context": 32, "tokens": 256, "exits": True}
    uptrain(str(root / "large"), str(root / "exits"), Recipe.model_validate({"uptrain": learned}))
    return root


@pytest.fixture()
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "eval"


@pytest.fixture()
def loaded(monkeypatch) -> list:
    """The folders of the models that are loaded to be measured."""
    folders, load = [], load_for_scoring
    monkeypatch.setattr(
        measurements, "load_for_scoring", lambda folder: folders.append(Path(folder).name) or load(folder)
    )
    return folders


def text_of(models: Path) -> dict:
    return {"text": [str(models / "text.txt")]}


def test_every_model_and_exit_is_asked_everything(models):
    report = evaluate(str(models / "exits"), recipe(**text_of(models)))
    rows = {row["model"]: row for row in report["models"]}
    assert list(rows) == ["dense", "after init", "after uptrain", "exit after loop 1"]
    assert [row["kind"] for row in rows.values()] == ["dense", "stage", "stage", "exit"]
    for name in ("dense", "after uptrain", "exit after loop 1"):
        assert [(one["length"], one["items"]) for one in rows[name]["passkey"]] == [(300, 2)] * 5
    assert "passkey" not in rows["after init"]
    assert rows["dense"]["passkey"][0]["difference"] is None is not rows["after uptrain"]["passkey"][0]["difference"]
    for row in rows.values():
        assert sum(row["parts"].values()) == row["params_total"]
    assert "cost" in rows["dense"] and "cost" in rows["after uptrain"] and "cost" not in rows["after init"]
    cost = rows["after uptrain"]["cost"]
    assert cost["kv_bytes_per_token"] == rows["dense"]["cost"]["kv_bytes_per_token"]  # looping saves none
    assert cost["flops_per_token"] > rows["dense"]["cost"]["flops_per_token"]  # LoRA comes on top
    assert report["of"]["stage"] == "uptrain" and report["speed"] is None and not report["not_run"]
    (curve,) = report["training"]
    assert curve["stage"] == "exits" and curve["points"][-1][0] == 256


def test_a_cache_that_cannot_be_written_to_ends_no_evaluation(models, tmp_path, monkeypatch, capsys):
    asked = recipe(**text_of(models))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "file"))
    found = evaluate(str(models / "small"), asked)
    said = capsys.readouterr().err
    assert said.count(f"Measurements cannot be kept in {tmp_path / 'file' / 'eval'}") == 1
    monkeypatch.undo()
    expected = evaluate(str(models / "small"), asked)
    assert [row["scores"] for row in found["models"]] == [row["scores"] for row in expected["models"]]


def test_the_loss_by_position_is_that_of_the_tokens_there(models):
    report = evaluate(str(models / "small"), recipe(**text_of(models)))
    model = AutoModelForCausalLM.from_pretrained(models / "small").eval()
    tokenizer = pico_tokenizer()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][: WINDOWS * CONTEXT]).view(WINDOWS, CONTEXT)
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
    loss = -log_p.gather(2, ids[:, 1:, None])[..., 0].mean(0)  # of the token with 1, 2, … before it
    found = report["models"][-1]["by_position"]
    assert [(one["from"], one["to"]) for one in found] == [(1, 16), (16, 32), (32, 64)]
    for one in found:
        assert one["loss"]["value"] == pytest.approx(loss[one["from"] - 1 : one["to"] - 1].mean().item(), abs=1e-4)


def test_layers_have_their_ranks_and_what_is_lost_after_them(models):
    report = evaluate(str(models / "small"), recipe(**text_of(models)))
    plan = read_plan(read_config(models / "small"))
    assert [(one["layer"], one["slot"], one["loop"]) for one in report["layers"]] == [
        (visit.layer, visit.slot, visit.loop) for visit in plan.visits
    ]
    assert all(one["tied"] and set(one["ranks"].values()) == {2} for one in report["layers"])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("small", "dense"))
    ids = torch.tensor(pico_tokenizer()(TEXT)["input_ids"][: 4 * CONTEXT]).view(4, CONTEXT)
    with torch.no_grad():
        states = [model(ids, output_hidden_states=True).hidden_states[1:-1] for model in (ours, theirs)]
    for one, h, g in zip(report["layers"], *states, strict=False):  # the last state is behind the final norm
        share = ((h - g).square().sum(-1) / g.square().sum(-1)).mean().item()
        assert one["residual"] == pytest.approx(share, rel=1e-3)
    kept = Recipe.model_validate({"init": {"rank": 2, "keep": 1, "measure_tokens": 0}})
    init(str(models / "dense"), str(models / "kept"), kept)
    first, second, *_ = evaluate(str(models / "kept"), recipe(**text_of(models)))["layers"]
    assert not first["tied"] and set(first["ranks"].values()) == {None} and second["tied"]


def test_nothing_is_measured_twice(models, own_cache, loaded, capsys):
    first = evaluate(str(models / "small"), recipe(**text_of(models)))
    assert loaded == ["dense", "small"]
    again = evaluate(str(models / "small"), recipe(**text_of(models)))
    assert again == first and len(loaded) == 2
    assert "measurements had been made before" in capsys.readouterr().err
    evaluate(str(models / "large"), recipe(**text_of(models)))  # the dense model is needed for its KL
    assert loaded[2:] == ["dense", "large"]
    more = evaluate(str(models / "small"), recipe(passkey_lengths=[320], **text_of(models)))
    assert more["models"][0]["scores"] == first["models"][0]["scores"]
    assert more["models"][0]["passkey"] != first["models"][0]["passkey"]
    # Measured anew, every number is the same.
    for file in own_cache.iterdir():
        file.unlink()
    assert evaluate(str(models / "small"), recipe(**text_of(models))) == first


def test_an_interrupted_evaluation_goes_on(models, own_cache, loaded, monkeypatch, tmp_path):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(measurements, "found", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(str(models / "small"), recipe(**text_of(models)), output=str(tmp_path / "report"))
    assert not (tmp_path / "report").exists() and loaded == ["dense"]
    kept = {file.name for file in own_cache.iterdir()}
    assert len(kept) == 1  # the text, scored by the dense model
    (own_cache / next(iter(kept))).write_bytes(b"half")  # and what is damaged is measured again
    evaluate(str(models / "small"), recipe(**text_of(models)), output=str(tmp_path / "report"))
    assert read_report(tmp_path / "report")["models"] and kept < {file.name for file in own_cache.iterdir()}


def test_a_measurement_is_made_again_where_the_tokenizer_or_the_code_is_another(
    models, own_cache, monkeypatch, tmp_path
):
    asked = recipe(**text_of(models), sample_tokens=4, passkey_trials=0)
    first = evaluate(str(models / "small"), asked)
    kept = {file.name for file in own_cache.iterdir()}
    other = shutil.copytree(models / "small", tmp_path / "small")  # the same weights and config
    file = other / "tokenizer_config.json"
    said = json.loads(file.read_text()) | {"chat_template": "{{ messages[0]['content'] }}"}
    file.write_text(json.dumps(said))
    again = evaluate(str(other), asked)
    made = {file.name for file in own_cache.iterdir()} - kept
    assert len(made) == 2 and again["models"][1]["scores"] == first["models"][1]["scores"]  # the two samples alone
    monkeypatch.setattr(cache, "_code", lambda: "another")
    evaluate(str(models / "small"), asked)
    assert len({file.name for file in own_cache.iterdir()}) == 2 * len(kept) + 2


@pytest.mark.parametrize("damage", ["cut off", "other numbers", "other names", "not a number"])
def test_a_measurement_that_is_not_as_it_was_written_is_made_again(damage, own_cache):
    made = {"loss": numpy.arange(12.0).reshape(3, 4)}
    assert remembered({"model": "x"}, lambda: made) == (made, False)
    (file,) = own_cache.iterdir()
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        numbers = {"other numbers": made["loss"] + 1, "not a number": made["loss"] * numpy.nan}.get(
            damage, made["loss"]
        )
        name = "kl" if damage == "other names" else "loss"
        with safe_open(file, "numpy") as stored:
            save_file({name: numbers}, file, stored.metadata())
    found, was_there = remembered({"model": "x"}, lambda: made)
    assert not was_there and found is made
    found, was_there = remembered({"model": "x"}, lambda: pytest.fail("it is there"))
    assert was_there and (found["loss"] == made["loss"]).all()


def test_too_few_windows_are_said(models):
    report = evaluate(str(models / "small"), recipe(**text_of(models), tokens=3 * CONTEXT))
    (said,) = report["not_run"]
    assert said["task"] == "intervals of 'text.txt'" and said["why"].startswith("It has 3 windows, and it takes 8")
    assert report["models"][1]["scores"]["loss"]["difference"] | {"value": 0} == {"value": 0, "low": None, "high": None}


@pytest.mark.parametrize(
    ("prompt", "added", "says"),
    [("", None, "the prompt has no tokens"), ("say <far>", "<far>", "and the model only 320")],
)
def test_a_prompt_that_the_model_cannot_read_costs_the_sample_alone(prompt, added, says):
    tokenizer = copy.deepcopy(pico_tokenizer())
    tokenizer.add_tokens([f"<{n}>" for n in range(8)] + ([added] if added else []))
    assert says in sample(pico_model("llama"), tokenizer, prompt, 4)


def test_a_head_that_has_numbers_of_its_own_is_counted(tmp_path):
    """Where the config ties it to the embedding: init counts it, too."""
    tied = save_pico(tmp_path / "dense", tie_word_embeddings=True)
    assert Candidate("dense", "dense", tied).counted.head == 0
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_torch(tensors, tied / "model.safetensors", {"format": "pt"})
    assert Candidate("dense", "dense", tied).counted.head == tensors["lm_head.weight"].numel()


@pytest.mark.parametrize("template", ["{% endfor %}", "{{ messages[7].content.none }}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails_costs_the_sample_alone(template, models, own_cache, tmp_path):
    broken = shutil.copytree(models / "small", tmp_path / "small")
    file = broken / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    report = evaluate(str(broken), recipe(**text_of(models), sample_tokens=4, passkey_trials=0))
    assert all("no sample: the chat template fails" in sample["text"] for sample in report["samples"])
    assert report["models"][1]["scores"]["loss"]["value"] > 0


def test_several_folders_are_compared_in_one_table(models, tmp_path):
    folders = [str(models / name) for name in ("small", "large", "exits")]
    result = CliRunner().invoke(
        app,
        ["eval", *folders, "-o", str(tmp_path / "report"), "--text", str(models / "text.txt"), "--context", "64"]
        + ["--tokens", str(WINDOWS * CONTEXT), "--passkey-trials", "0", "--speed-rounds", "1", "--sample-tokens", "4"]
        + ["--prompt", "How long will it rain?"],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.stderr
    report = read_report(tmp_path / "report")
    names = ["dense", "small", "large", "exits", "exits, exit after loop 1"]
    rows = {row["model"]: row for row in report["models"]}
    assert report["layers"] == [] and report["speed"] is None
    for name in names[1:4]:
        assert len(rows[name]["layers"]) == 6 and rows[name]["speed"]["rounds"] == 1
        assert f"{name} takes" in result.stdout
    assert not rows["dense"].keys() & {"layers", "speed"} and "layers" not in rows[names[-1]]
    assert [curve["stage"] for curve in report["training"]] == ["exits"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "small: rank by layer" in page and "large: rank by layer" in page
    assert "Asked: How long will it rain?" in page and "Asked: How long will it rain?" in result.stdout
    assert "KV cache" not in result.stdout  # it is the same for all of them
    assert [row["model"] for row in report["models"]] == names and report["of"] is None
    wide = Console(width=200, height=50, file=io.StringIO())
    wide.print(scores.report(report))
    assert [name for name in names if name not in wide.file.getvalue()] == []
    alone = evaluate(folders[1], recipe(passkey_trials=0, **text_of(models)))
    assert report["models"][2]["scores"] == alone["models"][-1]["scores"]
    assert report["models"][2]["layers"] == alone["layers"]


def test_a_folder_called_dense_is_not_taken_for_the_dense_model(models, tmp_path, monkeypatch):
    shutil.copytree(models / "small", tmp_path / "dense")
    shutil.copytree(models / "large", tmp_path / "large")
    monkeypatch.chdir(tmp_path)
    few = recipe(passkey_trials=0, sample_tokens=0, **text_of(models))
    report = evaluate(["dense", "large"], few, output="report")
    dense, small, large = report["models"]
    names = ["dense", str(tmp_path / "dense"), str(tmp_path / "large")]
    assert [dense["model"], small["model"], large["model"]] == names
    assert dense["scores"]["loss"]["value"] != small["scores"]["loss"]["value"]
    assert list(read_provenance(tmp_path / "report")["measured"]["eval"])[:3] == names


def test_the_dense_model_counts_in_the_narrowest_numbers_of_those_that_are_compared(models, tmp_path):
    asked = {"rank": 2, "measure_tokens": 0, "dtype": "bfloat16"}
    init(str(models / "dense"), str(tmp_path / "narrow"), Recipe.model_validate({"init": asked}))
    few = recipe(passkey_trials=0, sample_tokens=0, **text_of(models))
    for folders in ([models / "small", tmp_path / "narrow"], [tmp_path / "narrow", models / "small"]):
        rows = {row["model"]: row for row in evaluate(list(map(str, folders)), few)["models"]}
        assert rows["dense"]["bytes"] == 2 * rows["dense"]["params_total"]
        assert rows["narrow"]["bytes"] < rows["dense"]["bytes"] < rows["small"]["bytes"]


@pytest.mark.parametrize("changed", ["longer", "shorter", "another"])
def test_text_that_is_not_what_was_trained_on_any_more_holds_nothing_out(models, tmp_path, changed, capfd):
    text, healed = tmp_path / "text.txt", shutil.copytree(models / "exits", tmp_path / "healed")
    said = (healed / "rrtc.yaml").read_text().replace(str(models / "text.txt"), str(text))
    (healed / "rrtc.yaml").write_text(said)
    text.write_text(TEXT)
    few = {"passkey_trials": 0, "sample_tokens": 0}
    assert evaluate(str(healed), recipe(**few))["tokens"].keys() == {"held out"}
    text.write_text({"longer": TEXT + "More.", "shorter": TEXT[:-9], "another": TEXT[::-1]}[changed])
    with pytest.raises(RrtcError, match="text.txt is not the text any more that .*healed was trained on"):
        evaluate(str(healed), recipe(**few))
    assert "was trained on" not in capfd.readouterr().err
    evaluate(str(healed), recipe(**few, text=[str(text)]))
    said = f"Note: {healed} was trained on {text}, so its score is better than on new text."
    assert said in capfd.readouterr().err


def test_scores_on_what_was_learned_are_said_to_be_that(models, tmp_path, capfd):
    few = {"passkey_trials": 0, "sample_tokens": 0}
    (tmp_path / "copy.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    for model, text, said in (("exits", "copy", 1), ("exits", "other", 0), ("small", "copy", 0)):
        evaluate(str(models / model), recipe(**few, text=[str(tmp_path / f"{text}.txt")]))
        assert capfd.readouterr().err.count(f"exits was trained on {tmp_path / 'copy.txt'}") == said, (model, text)


def test_what_cannot_be_compared_is_refused(models, tmp_path):
    small, exits = str(models / "small"), str(models / "exits")
    with pytest.raises(WrongUsage, match="named twice"):
        evaluate([small, small + "/"], recipe(**text_of(models)))
    with pytest.raises(WrongUsage, match="not trained on the same text.*none to compare them on"):
        evaluate([small, exits], recipe())
    save_pico(tmp_path / "other", "gpt2")
    init(str(tmp_path / "other"), str(tmp_path / "tied"), Recipe.model_validate({"init": {"measure_tokens": 0}}))
    with pytest.raises(WrongUsage, match="were made from different models"):
        evaluate([small, str(tmp_path / "tied")], recipe(**text_of(models)))
    with pytest.raises(WrongUsage, match="for one folder"):
        evaluate([small, exits], recipe(baselines=True, **text_of(models)))
    with pytest.raises(RrtcError, match="fewer than one context of 64"):
        (tmp_path / "short.txt").write_text("Too short.")
        evaluate(small, recipe(text=[str(tmp_path / "short.txt")]))


def test_a_report_of_another_version_is_refused(models, tmp_path):
    evaluate(str(models / "small"), recipe(**text_of(models)), output=str(tmp_path / "report"))
    file = tmp_path / "report" / "report.json"
    report = json.loads(file.read_text())
    for changed, words in ((report | {"schema": 1}, "another version"), ({"schema": 2}, "damaged")):
        file.write_text(json.dumps(changed))
        with pytest.raises(RrtcError, match=words):
            read_report(tmp_path / "report")


def test_two_processes_find_what_one_does(models, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\nfrom rrtc.eval.stage import evaluate\nfrom rrtc.recipe.schema import Recipe\n"
        "report = evaluate(sys.argv[1], Recipe.model_validate_json(sys.argv[2]), output=sys.argv[3])\n"
    )
    asked = recipe(tokens=5 * CONTEXT, **text_of(models))  # an odd number of windows
    run = ready.run_two([sys.executable, script, models / "exits", asked.model_dump_json(), tmp_path / "report"])
    assert run.returncode == 0, run.stderr
    theirs, ours = read_report(tmp_path / "report"), evaluate(str(models / "exits"), asked)
    theirs, ours = (_rounded(copy.deepcopy(report)) for report in (theirs, ours))
    assert theirs == ours


def _rounded(value):
    """Sums may be taken in another order."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def test_ways_to_generate_are_timed_beside_what_was_to_be_expected(models, tmp_path, monkeypatch):
    for name in ("TRIAL_NEW", "NEW"):
        monkeypatch.setattr(f"rrtc.eval.engine.{name}", 6)
    asked = recipe(**text_of(models), engine=True, speed_rounds=1)
    report = evaluate(str(models / "exits"), asked, output=str(tmp_path / "report"))
    engine = read_report(tmp_path / "report")["engine"]
    assert engine == report["engine"] and engine["loops"] == 2 and 0 <= engine["right"] <= 1
    ways = {(way["way"].partition(",")[0], way["requests"]) for way in engine["ways"]}
    assert ways >= {(name, n) for name in ("full depth", "speculation", "transformers") for n in (1, 8)}
    for way in engine["ways"]:
        assert way["low"] <= way["ratio"] <= way["high"]
        assert (way["forecast"] is None) == way["way"].startswith(("full", "trans"))
        if way["way"] == "full depth":
            assert way["ratio"] == 1.0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Ways to generate" in page and f"about {engine['right']:.0%} of what the model says itself" in page
    without = evaluate(str(models / "small"), asked)["engine"]
    assert without["right"] is None and without["thresholds"] == []
    assert {way["way"] for way in without["ways"]} == {"full depth", "transformers, one by one"}
