"""`rrtc init --kv-budget`: what is planned of the KV cache is what is written, chosen by measuring."""

import json
import shutil

import pytest
import torch
from exports import make_rrt
from pico import pico_model, pico_tokenizer, save_pico
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from windowed import see_windows

from rrtc import api
from rrtc.attention import Owner
from rrtc.errors import RrtcError, WrongUsage
from rrtc.init import stage
from rrtc.init.calibrate import bytes_on_disk
from rrtc.io.provenance import read_provenance
from rrtc.io.source import read_config
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_architecture, read_plan
from rrtc.stock.streamed import StreamedModel
from rrtc.text.windows import scoring_texts

READER = {"window": 16, "sinks": 0, "heads": [], "owner": {"loop": 1}}
SMALL = {"calibrate_tokens": 1024, "kv_window": 16, "measure_tokens": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_pico(tmp_path_factory.mktemp("dense") / "model", "llama", initializer_range=0.3)


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """Its weights as they are, and 0.3 of its KV cache."""
    folder = tmp_path_factory.mktemp("made") / "long"
    result = api.init(dense, folder, budget=1, kv_budget=0.3, **SMALL | {"measure_tokens": 1024})
    return folder, result


def test_with_budget_1_the_weights_are_the_dense_models(dense, made):
    folder, _ = made
    ours, theirs = load_file(folder / "model.safetensors"), load_file(dense / "model.safetensors")
    for name, tensor in theirs.items():
        visit = name.replace("model.layers.", "").partition(".")[0]
        inside = name.partition(f"layers.{visit}.")[2]
        places = [name, f"model.slots.{visit}.shared.{inside}", f"model.slots.{visit}.loops.0.{inside}"]
        (found,) = (ours[place] for place in places if place in ours)
        assert torch.equal(found, tensor), name
    assert sum(tensor.numel() for tensor in ours.values()) == sum(tensor.numel() for tensor in theirs.values())


def test_the_cache_is_what_the_plan_says_and_within_the_budget(made):
    folder, result = made
    plan = read_plan(read_config(folder))
    assert plan.kv_bytes(256, 4) <= 0.3 * plan.architecture.kv_bytes(256, 4)
    assert result["kv_bytes"] == {context: plan.kv_bytes(context, 4) for context in (2048, 8192, 32768)}
    assert read_provenance(folder)["measured"]["init"]["kv_bytes"] == result["kv_bytes"]
    found = api.inspect(folder)
    assert found["kv_bytes"] == result["kv_bytes"] and any("attention" in visit for visit in found["visits"])
    model, _ = api.load(folder)
    with torch.no_grad():
        cache = model(torch.arange(200)[None] % 300, use_cache=True).past_key_values
    parts = (part for layer in cache.layers for part in getattr(layer, "parts", [layer]))
    live = sum(tensor.nbytes for part in parts for tensor in (part.keys, part.values))
    assert live == plan.kv_bytes(200, 4)


def test_the_closing_measurement_is_of_the_model_with_its_windows(dense, made):
    folder, result = made
    tokenizer = AutoTokenizer.from_pretrained(dense)
    asked = Recipe.model_validate({"eval": {"context": 256}})
    ids = next(iter(scoring_texts(asked, tokenizer, 320, 256, 1024).values())).ids
    model, _ = api.load(folder, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(dense).eval()
    for one, name in ((model, "after_init"), (stock, "dense")):
        with torch.no_grad():
            logits = one(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
        assert result["loss"][name] == pytest.approx(loss, abs=2e-4)
    assert abs(result["loss"]["after_init"] - result["loss"]["dense"]) > 0.005


def test_what_is_chosen_costs_less_than_what_the_conventions_choose(dense, made, tmp_path):
    """The sum of what the windows of its heads cost; measured on the same text."""
    kl = {}
    stock = AutoModelForCausalLM.from_pretrained(dense).eval()
    ids = torch.randint(3, 300, (4, 256), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = stock(ids).logits.log_softmax(-1)
    for choice in ("measured", "even", "last"):
        folder = tmp_path / choice
        api.init(dense, folder, budget=1, kv_budget=0.4, kv_choice=choice, kv_lookups=0, **SMALL)
        with torch.no_grad():
            found = api.load(folder)[0](ids, use_cache=False).logits.log_softmax(-1)
        kl[choice] = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert kl["measured"] < min(kl["even"], kl["last"])


@pytest.mark.slow
def test_without_a_named_window_the_one_of_three_is_taken_that_is_measured_to_cost_least(dense, tmp_path):
    costs = {}
    for window in (None, 32, 64, 99):  # half of 0.4 of 256 tokens are 51
        options = {"budget": 1, "kv_budget": 0.4, "kv_lookups": 0, **SMALL, "kv_window": window}
        result = api.init(dense, tmp_path / str(window), **options)
        plan = read_plan(read_config(tmp_path / str(window)))
        windows = {visit.attention.window for visit in plan.visits if visit.attention}
        costs[window] = (result["predicted_window_cost"], *windows)
    named = [costs[window] for window in (32, 64, 99)]
    assert [windows for _, *windows in named] == [[32], [64], [99]] and len(dict(named)) == 3
    cost, window = min(named)
    assert costs[None] == (cost, {32: 48, 64: 68, 99: 99}[window])  # which gets what bytes are left over


def test_a_dry_run_says_the_most_that_cache_and_maps_may_take(dense, tmp_path):
    options = {"budget": 1, "kv_budget": 0.4, **SMALL, "kv_window": 80, "kv_kinds": ["linear"]}
    planned, result = api.plan(dense, **options), api.init(dense, tmp_path / "linear", **options)
    more = result["params_total"] - planned["params_total"]
    sentence = f"The feature maps of linear attention are not counted here: up to {more:,} parameters more."
    assert more > 0 and planned["windows"].endswith(sentence)
    assert api.plan(dense, **options | {"kv_kinds": ["window", "linear"]})["windows"].endswith(sentence)

    options |= {"kv_window": None, "kv_kinds": ["window"], "kv_lookups": 0}
    planned = api.plan(dense, **options)
    each = [api.plan(dense, **options | {"kv_window": window})["kv_bytes"] for window in (48, 68, 99)]  # what 32, 64
    assert planned["kv_bytes"] == {n: max(one[n] for one in each) for n in (2048, 8192, 32768)}  # and 99 come to
    assert planned["windows"].endswith("Of the cache, figures here are the most that any of these takes.")


def test_weights_and_cache_are_planned_together(dense, tmp_path):
    options = {"budget": 0.7, "kv_budget": 0.3} | SMALL
    planned = api.plan(dense, **options)
    result = api.init(dense, tmp_path / "small", **options)
    plan = read_plan(read_config(tmp_path / "small"))
    assert plan.non_embedding <= 0.7 * plan.architecture.non_embedding
    assert result["kv_bytes"] == planned["kv_bytes"] == {n: plan.kv_bytes(n, 4) for n in (2048, 8192, 32768)}
    assert "KV heads see everything, the others the last 16 tokens and the first 4" in planned["windows"]
    assert result["predicted_window_cost"] > 0 and result["predicted_excess"] > 0


def test_a_model_whose_early_loop_reads_the_last_one_is_made_and_measured(dense, tmp_path):
    asked = SMALL | {"loops": 2, "rank": 4, "kv_budget": 0.6, "kv_choice": "last", "kv_kinds": "last_loop"}
    result = api.init(dense, tmp_path / "read", **asked | {"measure_tokens": 512})
    assert "loss" not in result  # layer by layer, it cannot be run
    plan = read_plan(read_config(tmp_path / "read"))
    assert "owner" in plan.features and plan.kv_bytes(256, 4) <= 0.6 * plan.architecture.kv_bytes(256, 4)
    report = api.evaluate(
        [str(tmp_path / "read")], output=str(tmp_path / "report"), text="pydoc", tokens=512, context=128,
        passkey_trials=0, speed_rounds=1, sample_tokens=4,
    )  # fmt: skip
    found = report["models"][1]["scores"]["loss"]["value"]
    ids = next(iter(scoring_texts(
        Recipe.model_validate({"eval": {"context": 128, "text": ["pydoc"]}}), AutoTokenizer.from_pretrained(dense), 320,
        128, 512,
    ).values())).ids  # fmt: skip
    model, _ = api.load(tmp_path / "read", dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item(), abs=2e-4)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Two loops, the first of which adds next to nothing, so that its layers see much what those of the second do."""
    folder = tmp_path_factory.mktemp("tied")
    model = pico_model("llama", initializer_range=0.3)
    for early, late in zip(model.model.layers[:3], model.model.layers[3:], strict=True):
        late.load_state_dict(early.state_dict())
        for matrix in (early.self_attn.o_proj, early.mlp.down_proj):
            matrix.weight.data *= 0.003
    model.save_pretrained(folder / "dense")
    pico_tokenizer().save_pretrained(folder / "dense")
    api.init(folder / "dense", folder / "small", loops=2, rank=48, measure_tokens=0)
    return folder / "small"


READS = {"kv_budget": 0.75, "kv_grain": "visits", "kv_kinds": ["window", "last_loop"]} | SMALL


def test_of_a_tied_model_it_is_measured_what_reading_the_last_loop_costs(tied, tmp_path):
    result = api.init(tied, tmp_path / "reads", **READS)
    alike = api.init(tied, tmp_path / "windows", **READS | {"kv_kinds": ["window"]})
    plan, windows = (read_plan(read_config(tmp_path / name)) for name in ("reads", "windows"))
    near = {visit.layer: visit.attention for visit in plan.visits if visit.attention is not None}
    assert near.keys() == {0, 2} and near[0].owner == Owner(1) and near[2].owner is None  # which costs less there
    assert plan.kv_bytes(256, 2) == windows.kv_bytes(256, 2)
    assert result["predicted_window_cost"] < alike["predicted_window_cost"]


def test_a_broken_off_pricing_of_the_last_loop_goes_on_to_the_same_bytes(tied, tmp_path, monkeypatch):
    api.init(tied, tmp_path / "whole", **READS)
    layers, back = [], StreamedModel.back_through

    def breaks(self, number, *args):
        layers.append(number)
        if number == 1 and layers.count(1) == 1:
            raise KeyboardInterrupt
        return back(self, number, *args)

    monkeypatch.setattr(StreamedModel, "back_through", breaks)
    with pytest.raises(KeyboardInterrupt):
        api.init(tied, tmp_path / "reads", **READS)
    assert {file.name for file in (tmp_path / "reads.partial" / "work").glob("kept-*")} == {
        "kept-3.safetensors", "kept-4.safetensors"
    }  # fmt: skip
    api.init(tied, tmp_path / "reads", resume=True, **READS)
    assert layers == [5, 4, 3, 2, 1, 1, 0]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "reads" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_the_last_loop_costs_is_only_asked_of_a_model_that_has_one(dense, made, tmp_path):
    for model, sentence in (
        (dense, "once the model is tied, and this one is dense"),
        (made[0], "There is nothing for"),
    ):
        for ask in (api.plan, lambda folder, **options: api.init(folder, tmp_path / "out", **options)):
            with pytest.raises(WrongUsage, match=sentence):
                ask(model, **READS)
    assert not list(tmp_path.iterdir())


def test_the_cache_of_a_recursive_model_is_planned_anew(made, tmp_path):
    folder, _ = made
    result = api.init(folder, tmp_path / "wider", kv_budget=0.6, **SMALL | {"measure_tokens": 512})
    before, after = (read_plan(read_config(place)) for place in (folder, tmp_path / "wider"))
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "wider" / "model.safetensors").read_bytes()
    assert before.kv_bytes(256, 1) < after.kv_bytes(256, 1) <= 0.6 * after.architecture.kv_bytes(256, 1)
    said = read_provenance(tmp_path / "wider")
    asked = said["recipe"]["replan"]  # what the heads were chosen on, and not the weights
    assert asked["model"] == str(folder) and asked["init"]["kv_budget"] == 0.6
    assert asked["init"]["calibrate_tokens"] == SMALL["calibrate_tokens"]
    assert asked["init"]["calibrate_on"] == ["pydoc"]
    assert said["measured"]["windows"] == result and said["history"][0]["path"] == str(folder)
    assert said["recipe"]["init"]["kv_budget"] == 0.6 and said["recipe"]["init"]["budget"] == 1
    assert set(result["loss"]) == {"tokens", "given", "after_init"}
    config = json.loads((tmp_path / "wider" / "config.json").read_text())
    assert config | {"visits": 0} == json.loads((folder / "config.json").read_text()) | {"visits": 0}


def test_an_export_that_is_planned_anew_asks_for_no_code_that_is_not_there(made, tmp_path):
    folder, _ = made
    config = json.loads((folder / "config.json").read_text())
    exported = shutil.copytree(folder, tmp_path / "exported")
    asks = {"auto_map": {"AutoModelForCausalLM": "modeling_rrt.RrtForCausalLM"}}
    (exported / "config.json").write_text(json.dumps(config | asks))
    api.init(exported, tmp_path / "wider", kv_budget=0.6, **SMALL)
    assert json.loads((tmp_path / "wider" / "config.json").read_text()).keys() == config.keys()


def test_of_several_kinds_each_visit_gets_what_measures_cheapest(dense, tmp_path):
    options = {"budget": 1, "kv_budget": 0.5, **SMALL, "kv_window": 100}
    costs, plans = {}, {}
    for kinds in ("window", "linear", "window,landmark,linear"):
        asked = options | {"kv_kinds": kinds}
        result = api.init(dense, tmp_path / kinds, **asked)
        costs[kinds], plans[kinds] = result["predicted_window_cost"], read_plan(read_config(tmp_path / kinds))
        assert plans[kinds].kv_bytes(256, 2) <= plans["window"].kv_bytes(256, 2)
        if "," not in kinds:
            assert api.plan(dense, **asked)["kv_bytes"] == result["kv_bytes"]
    several = [visit.attention for visit in plans["window,landmark,linear"].visits if visit.attention is not None]
    assert any(one.landmark for one in several) and costs["window,landmark,linear"] <= costs["window"]
    linear = [visit.attention for visit in plans["linear"].visits if visit.attention is not None]
    assert all(one.linear for one in linear) and api.load(tmp_path / "linear")[0](torch.arange(9)[None]).logits.any()
    said = api.plan(dense, **options, kv_kinds="landmark,window")["windows"]
    assert said.endswith("Each visit gets what costs its heads least, which is known once they are measured.")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "is compressed already.$"),
        ({"kv_budget": 0.5, "rank": 4}, "its weights stay as they are, and rank is about them"),
        ({"kv_budget": 0.5, "budget": 0.5}, "its weights stay as they are, and budget is about them"),
    ],
)
def test_nothing_else_of_a_recursive_model_is_planned_anew(made, tmp_path, options, sentence):
    for ask in (api.plan, lambda folder, **options: api.init(folder, tmp_path / "out", **options)):
        with pytest.raises(WrongUsage, match=sentence):
            ask(made[0], **options)
    assert not list(tmp_path.iterdir())


def test_without_moments_calibration_is_given_room_for_states_alone(dense):
    architecture = read_architecture(read_config(dense))
    sizes = [size for layer in architecture.layers for m in layer.matrices for size in (m.inputs, m.outputs)]
    states = 4 * (6 + 2) * 1000 * 48
    assert bytes_on_disk(architecture, 1000, moments=False) == states
    assert bytes_on_disk(architecture, 1000, moments=True) == states + 4 * sum(size**2 for size in sizes)


def test_what_cannot_be_met_is_said_before_any_work(dense, tmp_path):
    for options, sentence in (
        ({"kv_budget": 0.01}, "cannot be met: where every head that can have one has a window of 16 tokens"),
        ({"kv_budget": 0.5, "kv_context": 1000}, "to count at 1,000 tokens, but this model can see 256"),
        ({"kv_budget": 0.5, "kv_kinds": "landmark"}, "A window of 16 tokens leaves no room for landmark blocks of 16"),
    ):
        for ask in (api.plan, lambda folder, **options: api.init(folder, tmp_path / "out", **options)):
            with pytest.raises(WrongUsage, match=sentence):
                ask(dense, budget=1, **SMALL | options)
    assert not list(tmp_path.iterdir())


def test_what_kinds_cannot_be_had_of_a_model_is_said_before_any_work(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "prove", None)  # the first work there is
    gemma = save_pico(tmp_path / "gemma", "gemma2", attn_logit_softcapping=30.0)
    owned = see_windows(make_rrt(tmp_path / "owned"), (READER, *[None] * 5))
    linear, last = {"kv_kinds": "linear", "kv_window": 70}, {"kv_kinds": "last_loop", "kv_choice": "last"}
    for model, options, sentence in (
        (gemma, linear | {"budget": 1, "kv_budget": 0.8}, "'gemma2' model caps its scores, which linear attention can"),
        (dense, last | {"budget": 1, "kv_budget": 0.3}, "There is nothing for last_loop to read"),
        (dense, last | {"size": "70%", "kv_budget": 0.1}, "There is nothing for last_loop to read"),
        (dense, last | {"size": "70%", "sharing": "auto", "kv_budget": 0.5}, "There is nothing for last_loop to read"),
        (
            owned,
            {"kv_budget": 0.3},
            "Running layer by layer is not for models with visits that read keys and values of another loop",
        ),
    ):
        for ask in (api.plan, lambda folder, **options: api.init(folder, tmp_path / "out", **options)):
            with pytest.raises(RrtcError, match=sentence):
                ask(model, **SMALL | options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_replanned_model_can_be_uptrained_and_evaluated_where_its_parents_are_gone(dense, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    api.init(dense, first, budget=1, kv_budget=0.5, **SMALL)
    api.init(first, second, kv_budget=0.3, **SMALL)
    shutil.rmtree(first)
    api.uptrain(second, tmp_path / "healed", context=64, tokens=512, batch_size=4, micro_batch=2, data=["pydoc"])
    plans = [read_plan(read_config(place)) for place in (second, tmp_path / "healed")]
    assert plans[0] == plans[1] and plans[0].features
    api.evaluate(tmp_path / "healed", tmp_path / "report", tokens=512, context=64, passkey_trials=0, speed_rounds=0)
