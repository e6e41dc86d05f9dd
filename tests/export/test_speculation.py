"""Exports of a model with trained exits: `generate` guesses by them where rrtc is not, and the text stays the same."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from exports import IDS, make_rrt, recipe, run_python
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2LMHeadModel

from rrtc.errors import RrtcError
from rrtc.export import stage
from rrtc.export.formats import FORMATS
from rrtc.export.formats.recursive import recursive_config
from rrtc.io.provenance import PROVENANCE
from rrtc.model import RrtForCausalLM, halves_rrt

# What a stranger's machine says with and without guesses, how many passes went to the last layer, and what was loaded.
STRANGER = """
import importlib, json, sys
sys.modules["rrtc"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
speculation = importlib.import_module(type(model).__module__.replace("modeling_rrt", "speculate_rrt"))
class Often(speculation.Worth):
    rounds = []
    def rests(self):
        return False
    def goes_on(self, sure):
        self._guesses += 1
        return self._guesses <= 3
    def end(self, tokens, said):
        self.rounds.append([tokens, said])
speculation.Worth = Often
said, settings = {"greedy": [], "drawn": [], "pipeline": []}, {"max_new_tokens": 20, "eos_token_id": None}
settings["attention_mask"] = torch.ones_like(ids)
talk = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
for way in ({}, {"speculate": False}):
    torch.manual_seed(0)
    said["greedy"].append(model.generate(ids, do_sample=False, **settings, **way).tolist())
    said["drawn"].append(model.generate(ids, do_sample=True, top_p=0.9, **settings, **way).tolist())
    said["pipeline"].append(talk("It rained", max_new_tokens=8, do_sample=False, **way)[0]["generated_text"])
model.save_pretrained("again")
print(json.dumps(said | {"rounds": Often.rounds}))
"""


def with_trained_exits(folder: Path, trained: str | bool = "after", architecture: str = "llama") -> Path:
    """An rrtc folder whose rrtc.yaml says when its exits were trained."""
    make_rrt(folder, architecture)
    value = yaml.safe_load((folder / PROVENANCE).read_text())
    value["recipe"]["uptrain"] = {"data": ["pydoc"], "text_field": "text", "exits": trained}
    (folder / PROVENANCE).write_text(yaml.safe_dump(value))
    return folder


def defaults(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.slow
def test_it_guesses_where_rrtc_is_not(tmp_path):
    source = with_trained_exits(tmp_path / "rrt")
    result = stage.export(str(source), str(tmp_path / "out"), recipe())
    assert result["speculate"] == {"exit": 2} and {"halves_rrt.py", "speculate_rrt.py"} < set(result["files"])
    said = json.loads(run_python(STRANGER, str(tmp_path / "out"), json.dumps(IDS[:1].tolist()), cwd=tmp_path))
    for name in ("greedy", "drawn", "pipeline"):
        assert said[name][0] == said[name][1]
    assert any(ran > 1 for ran, _ in said["rounds"])
    expected = RrtForCausalLM.from_pretrained(source).generate(IDS[:1], max_new_tokens=20, do_sample=False,
                                                                eos_token_id=None, pad_token_id=2)  # fmt: skip
    assert said["greedy"][0] == expected.tolist()
    card = " ".join((tmp_path / "out/README.md").read_text().split())
    assert "after 3 of 6 layers an exit guesses the next tokens" in card and "speculate=False" in card
    assert "`assistant_early_exit` fails with models of the GPT-2 and GPT-NeoX kind" in card
    assert defaults(tmp_path / "again")["speculate"] == {"exit": 2}
    assert (tmp_path / "again/speculate_rrt.py").exists()


def test_only_exits_that_were_trained_guess(tmp_path):
    for number, trained in enumerate((False, "none", "joint", True)):
        source, target = with_trained_exits(tmp_path / f"rrt{number}", trained), tmp_path / f"out{number}"
        before = json.loads((source / "generation_config.json").read_text())
        target.mkdir()
        FORMATS["recursive"].write(source, target, None, 10**9)
        asked = trained in ("joint", True)
        assert defaults(target).get("speculate") == ({"exit": 2} if asked else None)
        kept = {key: value for key, value in defaults(target).items() if key != "speculate"}
        assert kept == {key: value for key, value in before.items() if not (asked and key == "_from_model_config")}
        shown = FORMATS["recursive"].how_to_load(
            {"files": [], **({"speculate": {"exit": 2}} if asked else {})}, "out", recursive_config(source), False
        )
        assert ("guesses" in shown) is asked


def test_generation_defaults_are_made_where_there_are_none_and_forget_what_is_no_longer_true(tmp_path):
    source = with_trained_exits(tmp_path / "rrt")
    (source / "generation_config.json").unlink()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    FORMATS["recursive"].write(source, tmp_path / "first", None, 10**9)
    read = GenerationConfig.from_pretrained(tmp_path / "first")
    assert (read.speculate, read.eos_token_id, read.pad_token_id, read.bos_token_id) == ({"exit": 2}, 1, 2, 0)
    (source / "generation_config.json").write_text((tmp_path / "first/generation_config.json").read_text())
    value = yaml.safe_load((source / PROVENANCE).read_text())
    value["recipe"]["uptrain"]["exits"] = "none"  # healed again
    (source / PROVENANCE).write_text(yaml.safe_dump(value))
    FORMATS["recursive"].write(source, tmp_path / "second", None, 10**9)
    read = GenerationConfig.from_pretrained(tmp_path / "second")
    assert not hasattr(read, "speculate") and read.eos_token_id == 1


@pytest.mark.slow
def test_an_export_that_says_something_else_with_guesses_is_noticed(tmp_path, monkeypatch):
    source, code = with_trained_exits(tmp_path / "rrt"), Path(halves_rrt.__file__)
    changed = code.read_text().replace("torch.cat(outputs, 1)", "-torch.cat(outputs, 1)")
    write = FORMATS["recursive"].write_config

    def spoiled(folder, target, dtype):
        write(folder, target, dtype)
        (target / code.name).write_text(changed)

    monkeypatch.setattr(FORMATS["recursive"], "write_config", spoiled)
    with pytest.raises(RrtcError, match="with guesses of its exit, greedy generation differs from token"):
        stage.export(str(source), str(tmp_path / "out"), recipe())
    assert not (tmp_path / "out").exists()


def test_a_dense_export_asks_for_no_guesses(tmp_path):
    source = with_trained_exits(tmp_path / "rrt", architecture="gpt2")
    (tmp_path / "dense").mkdir()
    FORMATS["dense"].write(source, tmp_path / "dense", torch.float32, 10**9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert isinstance(model, GPT2LMHeadModel) and not hasattr(model.generation_config, "speculate")


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_what_the_card_warns_of_is_so(architecture, tmp_path):
    model = RrtForCausalLM.from_pretrained(make_rrt(tmp_path / "rrt", architecture))
    with pytest.raises(IndexError):
        model.generate(IDS[:1], max_new_tokens=4, do_sample=False, assistant_early_exit=3, pad_token_id=2)
    assert model.config.num_hidden_layers == 3  # of 6
