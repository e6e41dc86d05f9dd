"""The engine against transformers' own `generate`, which says what a model answers."""

import copy
import functools
from functools import partial
from itertools import pairwise

import pytest
import torch
from pico import COMMON, pico_model, pico_tokenizer
from recursive_models import (
    double,
    everywhere,
    idle_after_the_first_loop,
    nearly_idle,
    randomize,
    recursive,
    rrt_config,
    tokens,
)
from scipy.stats import chisquare
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from rrtc.errors import RrtcError, WrongUsage
from rrtc.generate.choice import choose
from rrtc.generate.engine import Busy, Engine
from rrtc.generate.sampling import Drawing
from rrtc.generate.ways import KNOWN, REMEMBERED, FullDepth, Leave, Speculate
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.graft_rrt import find_layers
from rrtc.recipe.generate import EngineOptions

NEW, CONTEXT = 10, 64
IDS = tokens(5, 40)
PROMPTS = [IDS[0, :21].tolist(), IDS[1, :7].tolist(), IDS[2].tolist(), IDS[3, :1].tolist(), IDS[4, :30].tolist()]
GREEDY = {"do_sample": False}


def by_transformers(model: PreTrainedModel, prompt: list[int], **settings) -> list[int]:
    return model.generate(torch.tensor([prompt]), max_new_tokens=NEW, **GREEDY | settings)[0, len(prompt) :].tolist()


def by_engine(engine: Engine, prompts=PROMPTS, **settings) -> list[list[int]]:
    requests = [engine.submit(prompt, NEW, **GREEDY | settings) for prompt in prompts]
    engine.run()
    return [request.said for request in requests]


WAYS = {
    "full depth": FullDepth,
    "speculating": partial(Speculate, drafts=3),
    "never sure enough": partial(Leave, threshold=1.0),
}


@everywhere
@pytest.mark.parametrize("recipe", [{"sharing": "middle_cycle"}, {"loops": 3}], ids=["middle_cycle", "3 loops"])
def test_it_says_what_generate_says_alone_in_company_and_in_chunks(architecture, recipe):
    model = double(architecture, **recipe)
    expected = [by_transformers(model, prompt) for prompt in PROMPTS]
    for name, way in WAYS.items():
        assert by_engine(Engine(model, way, rows=5, context=CONTEXT)) == expected, name
        assert by_engine(Engine(model, way, rows=2, context=CONTEXT, chunk=5)) == expected, name  # fewer than requests


@everywhere
def test_a_dense_model_is_the_case_of_one_loop(architecture):
    model = copy.deepcopy(pico_model(architecture)).double()
    engine = Engine(model, WAYS["speculating"], rows=3, context=CONTEXT)
    assert engine.stages.loops == 1
    assert by_engine(engine) == [by_transformers(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("recipe", [{"sharing": "sequence"}, {"norms": "shared"}, {"rank": 0}, {"loops": 1}], ids=str)
def test_every_kind_of_plan_runs(recipe):
    model = double("llama", **recipe)
    for way in WAYS.values():
        assert by_engine(Engine(model, way, rows=3, context=CONTEXT)) == [by_transformers(model, p) for p in PROMPTS]


def test_loops_that_differ_in_kind_run_one_after_the_other():
    model = double("gemma3")  # in a cycle of two loops, layers with a window are tied to layers without
    engine = Engine(model, WAYS["speculating"], context=CONTEXT)
    assert engine.stages.loops == 1
    assert by_engine(engine) == [by_transformers(model, prompt) for prompt in PROMPTS]


@functools.cache
def windowed(sharing: str) -> RrtForCausalLM:
    """A recursive pico model whose KV heads see everything, a window, both within one visit, and landmark blocks."""
    config = rrt_config("llama", sharing=sharing)
    values = copy.deepcopy(config.visits)
    near = {"window": 5, "sinks": 2}
    for number, visit in enumerate(values):
        landmark = {"size": 2, "count": 3, "seed": number}
        visit["attention"] = [
            near | {"heads": [1]}, {"window": 9, "sinks": 0, "heads": []}, None,
            near | {"heads": [0], "landmark": landmark},
        ][number % 4]  # fmt: skip
    torch.manual_seed(1)
    made = RrtConfig(base_config=config.base_config, visits=values, norms=config.norms)
    return randomize(RrtForCausalLM(made)).double()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
def test_heads_with_a_window_see_what_they_are_to_and_keep_no_more(way, sharing):
    model = windowed(sharing)
    engine = Engine(model, WAYS[way], rows=2, context=CONTEXT, chunk=6)
    assert by_engine(engine) == [by_transformers(model, prompt) for prompt in PROMPTS]
    kept = [shelf.keys.shape[2] for made in engine.store._shelves.values() for shelf in made]
    assert set(kept) == {CONTEXT, 5 + 2 + 6, 9 + 6}


@pytest.mark.parametrize("loops", [2, 3])
def test_steps_and_passes_are_saved_where_drafts_are_right(loops):
    model = idle_after_the_first_loop(loops)
    for drafts in (0, 1, 4):
        engine = Engine(model, partial(Speculate, drafts=drafts), rows=1, context=CONTEXT)
        assert by_engine(engine, PROMPTS[:1]) == [by_transformers(model, PROMPTS[0])]
        assert engine.way.accepted == engine.way.drafted
    # The prompt takes a step a loop; then 1 + 9 tokens are two rounds of 4 drafts and one token more each, but the last
    # has no room for more than 3 drafts.
    assert engine.steps == loops + (5 + loops - 1) + (4 + loops - 1)
    assert engine.passes == loops * (len(PROMPTS[0]) + 5 + 4)


def test_wrong_drafts_cost_passes_and_change_nothing():
    model = double("llama")
    engine = Engine(model, partial(Speculate, drafts=4), rows=1, context=CONTEXT)
    assert by_engine(engine, PROMPTS[:1]) == [by_transformers(model, PROMPTS[0])]
    assert engine.way.accepted < engine.way.drafted


def test_drafts_that_are_not_worth_it_are_not_made():
    way = partial(Speculate, drafts=4, best=lambda said, most: 0)
    engine = Engine(double("llama"), way, rows=1, context=256)
    request = engine.submit(PROMPTS[1], 80, **GREEDY)
    engine.run()
    assert KNOWN <= engine.way.drafted < 4 * (KNOWN + 2)  # until it is known, and one every so many tokens
    want = double("llama").generate(torch.tensor(PROMPTS[1:2]), max_new_tokens=80, **GREEDY)
    assert request.tokens == want[0].tolist()


@pytest.mark.parametrize("rounds", [[3, 0], [0, 1, 2, 3], [3]], ids=str)
def test_what_rounds_say_is_learned_from_rounds(rounds):
    """Rounds of 3 drafts, of which so many were right: what a round of 3 drafts says is their mean, and one more."""
    asked = []
    way = Speculate(2, 8, drafts=3, best=lambda said, most: asked.append([said(n) for n in range(most + 1)]) or 2)
    for _ in range(REMEMBERED):
        for right in rounds:
            assert way.wanted == (2 if asked else 3)
            way._learn(min(right + 1, 3), right)
    assert len(asked[-1]) == 4 and asked[-1][0] == 1
    assert asked[-1][3] == pytest.approx(1 + sum(rounds) / len(rounds), abs=0.1)
    assert asked[-1][1] == pytest.approx(1 + sum(right > 0 for right in rounds) / len(rounds), abs=0.05)


def without_what_left(model: RrtForCausalLM, prompt: list[int], threshold: float) -> tuple[list[int], int]:
    """What is said by one who leaves after the first loop where its exit is surer than that, and how often: each token
    by a pass of its own over everything, with a mask for every loop that hides what has not come so far."""
    ids, hidden, left = list(prompt), [], 0
    visits = model.config.visits
    parent, name = find_layers(model.stock, len(visits))
    layers, depth = getattr(parent, name), len(visits) // 2
    for _ in range(NEW):
        length = len(ids)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        later = seen.clone()
        later[:, hidden] = False
        states = {}

        def masked(visit, mask, forward, at, states=states):
            def run(x, *args, **kwargs):
                kwargs["attention_mask"] = torch.zeros(mask.shape).double().masked_fill(~mask, -1e300)[None, None]
                states[at] = forward(x, *args, **kwargs)
                return states[at]

            return run

        for at, visit in enumerate(layers):
            visit.forward = masked(visit, seen if at < depth else later, type(visit).forward.__get__(visit), at)
        try:
            end = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        finally:
            for visit in layers:
                del visit.forward
        early = model.stock.lm_head(model.stock.model.norm(states[depth - 1]))[0, -1]
        leaves = len(ids) >= len(prompt) + 1 and early.softmax(-1).max() > threshold
        if leaves:
            hidden.append(length - 1)
            left += 1
        ids.append(int((early if leaves else end).argmax()))
    return ids[len(prompt) :], left


def test_a_token_that_has_left_is_not_seen_at_the_loops_that_it_did_not_go_through():
    model, threshold = double("llama"), 0.02
    expected, left = without_what_left(model, PROMPTS[0], threshold)
    assert 1 < left < NEW - 2
    for rows in (1, 5):
        engine = Engine(model, partial(Leave, threshold=threshold), rows=rows, context=CONTEXT)
        assert by_engine(engine)[0] == expected
    one = Engine(model, partial(Leave, threshold=threshold), context=CONTEXT)
    assert by_engine(one, PROMPTS[:1]) == [expected]
    assert one.way.left == [left, NEW - 1 - left]
    assert one.passes == 2 * (len(PROMPTS[0]) + NEW - 1) - left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_how_sure_an_exit_is_counts_in_float32(dtype):
    """In 16 bits, what is between 0.998 and 1 would be one number or the other, and so would the threshold."""
    model = copy.deepcopy(recursive("llama"))
    model.get_output_embeddings().weight.data *= 25
    sure, threshold = [], 0.999

    class Watched(Leave):
        def after(self, request, span, states, logits, store):
            said = len(request.said)
            super().after(request, span, states, logits, store)
            if said and span.loop == 0:
                surest = float(logits[-1].float().softmax(-1).max())
                sure.append((surest > threshold, len(request.said) > said))

    by_engine(Engine(model.to(dtype), partial(Watched, threshold=threshold), rows=5, context=CONTEXT))
    assert all(is_sure == left for is_sure, left in sure) and {left for _, left in sure} == {True, False}


def test_processors_that_remember_are_not_asked_about_drafts():
    model = copy.copy(double("llama"))
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.guidance_scale = 1.5
    expected = by_engine(Engine(model, FullDepth, rows=1, context=CONTEXT))
    speculating = Engine(model, partial(Speculate, drafts=3), rows=1, context=CONTEXT)
    assert by_engine(speculating) == expected and speculating.way.drafted == 0
    chosen = choose(model, pico_tokenizer(), EngineOptions(speculate=3), True, 1, "")
    assert chosen.name == "full depth" and chosen.why.startswith("No tokens are drafted")
    model.generation_config.guidance_scale = None
    assert by_engine(speculating) != expected and speculating.way.drafted > 0


def test_who_catches_up_is_seen_by_those_behind():
    model, threshold = double("llama"), 0.02
    engine = Engine(model, partial(Leave, threshold=threshold, catch_up=True), rows=1, context=CONTEXT)
    request = engine.submit(PROMPTS[0], NEW, **GREEDY)
    engine.run()
    early = 0
    for number in range(1, NEW):  # each token by itself, after those that were said, whose keys are all there
        ids = torch.tensor([request.prompt + request.said[:number]])
        out = model(ids, use_cache=False, output_hidden_states=True)
        middle = model.stock.lm_head(model.stock.model.norm(out.hidden_states[len(model.config.visits) // 2]))[0, -1]
        leaves = bool(middle.softmax(-1).max() > threshold)
        early += leaves
        assert request.said[number] == int((middle if leaves else out.logits[0, -1]).argmax())
    assert engine.way.left[0] == early > 0


def test_it_ends_where_generate_ends():
    model = double("llama")
    said = by_transformers(model, PROMPTS[0])
    for way in WAYS.values():
        engine = Engine(model, way, context=CONTEXT)
        request = engine.submit(PROMPTS[0], NEW, **GREEDY, eos_token_id=[said[4]])
        engine.run()
        assert request.said == said[: said.index(said[4]) + 1]
        assert request.ended == "by itself"


def test_a_draft_behind_the_end_is_not_said():
    model = idle_after_the_first_loop()
    said = by_transformers(model, PROMPTS[0])
    engine = Engine(model, partial(Speculate, drafts=8), context=CONTEXT)
    request = engine.submit(PROMPTS[0], NEW, **GREEDY, eos_token_id=said[3])
    engine.run()
    assert request.said == said[: said.index(said[3]) + 1]


@pytest.mark.parametrize("way", WAYS)
def test_nobody_reads_what_a_cancelled_request_has_left(way):
    model = double("llama", sharing="middle_cycle")
    engine = Engine(model, WAYS[way], rows=1, context=CONTEXT)
    gone = engine.submit(PROMPTS[2], NEW, **GREEDY)
    for _ in range(4):
        engine.step()
    engine.cancel(gone)
    for made in engine.store._shelves.values():
        for shelf in made:
            with torch.inference_mode():
                shelf.keys.fill_(torch.nan)
                shelf.values.fill_(torch.nan)
    assert by_engine(engine, PROMPTS[:2]) == [by_transformers(model, prompt) for prompt in PROMPTS[:2]]
    assert gone.ended == "stopped" and not engine.active and not engine.queue


@pytest.mark.parametrize(
    "way, model, read",
    [
        ("full depth", lambda: double("llama"), [4, 1]),
        ("full depth", lambda: windowed("cycle"), [4, 26]),  # of what has left a window, nothing is there any more
        ("speculating", lambda: double("llama"), None),
    ],
    ids=["full depth", "windows", "speculating"],
)
def test_what_a_row_keeps_is_not_read_again(way, model, read):
    model = model()
    engine, passes = Engine(model, WAYS[way], rows=1, context=CONTEXT, chunk=6, keeps=True), []
    (said,) = by_engine(engine, PROMPTS[:1])
    longer, back = PROMPTS[0] + said + [7, 8], PROMPTS[0] + said[:4] + [7]
    for prompt in (longer, back):
        before = engine.passes
        assert by_engine(engine, [prompt]) == [by_transformers(model, prompt)]
        passes.append(engine.passes - before - (NEW - 1))
    assert read is None or passes == read


@pytest.mark.parametrize("model", [lambda: windowed("cycle"), lambda: double("mistral")], ids=["windows", "mistral"])
def test_what_later_tokens_have_overwritten_is_read_again_however_often_a_row_was_taken_back(model):
    model, prompts = model(), [PROMPTS[2], PROMPTS[2][:35] + [5], PROMPTS[2][:30] + [6], PROMPTS[2][:25] + [7]]
    engine, passes = Engine(model, rows=1, context=CONTEXT, chunk=6, keeps=True), [0]
    for prompt in prompts:
        request = engine.submit(prompt, 1, **GREEDY)  # so short that what was taken back is not written anew
        engine.run()
        assert request.said == by_transformers(model, prompt)[:1]
        passes.append(engine.passes)
    # Of what the first has written, the second lacks 5 tokens, and the third 10: there, only 6 can be taken back.
    assert [after - before for before, after in pairwise(passes)] == [40, 1, 31, 1]


def test_one_that_waits_can_be_cancelled():
    engine = Engine(double("llama"), rows=1, context=CONTEXT)
    first, second, third = (engine.submit(prompt, NEW, **GREEDY) for prompt in PROMPTS[:3])
    engine.step()
    engine.cancel(second)
    engine.run()
    assert (len(first.said), second.said, len(third.said)) == (NEW, [], NEW)


def test_the_context_ends_an_answer_and_says_so():
    engine = Engine(double("llama"), context=25)
    request = engine.submit(PROMPTS[0], NEW, **GREEDY)
    engine.run()
    assert len(request.said) == 4 and request.ended == "context"
    assert request.said == by_transformers(double("llama"), PROMPTS[0])[:4]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("diffllama", "The attention of this 'diffllama' model cannot be told which keys to see."),  # two kernels
        ("gpt_bigcode", "The engine cannot run this 'gpt_bigcode' model: shape "),
    ],
)
def test_models_whose_code_counts_on_what_is_not_so_are_refused(kind, says):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**COMMON)).eval()
    with pytest.raises(RrtcError, match=says):
        by_engine(Engine(model, context=CONTEXT))


def test_what_cannot_be_answered_is_refused_and_others_go_on():
    engine = Engine(double("llama"), rows=1, context=25, waiting=1)
    first = engine.submit(PROMPTS[0], NEW, **GREEDY)
    engine.step()
    with pytest.raises(WrongUsage, match="The prompt has 30 tokens, and with its answer there is room for 25."):
        engine.submit(PROMPTS[4], NEW)
    with pytest.raises(WrongUsage, match="There is nothing in the prompt"):
        engine.submit([], NEW)
    engine.submit(PROMPTS[1], NEW, **GREEDY)
    with pytest.raises(Busy, match="1 requests wait already."):
        engine.submit(PROMPTS[1], NEW)
    with pytest.raises(RrtcError, match="The model cannot generate: .*temperature"):
        Engine(double("llama"), context=25).submit(PROMPTS[1], NEW, do_sample=True, temperature=-1.0)
    engine.run()
    assert first.said == by_transformers(double("llama"), PROMPTS[0])[:4]


def test_the_model_is_as_it_was():
    model = double("llama", sharing="middle_cycle")
    before, state = model(IDS).logits, {name: id(module) for name, module in model.named_modules()}
    engine = Engine(model, WAYS["speculating"], context=CONTEXT)
    by_engine(engine)
    engine.submit(PROMPTS[0], NEW)
    engine.stages.layers[3].slot().loops[0].mlp.act_fn.forward, broken = (lambda x: 1 / 0), None
    with pytest.raises(ZeroDivisionError):
        engine.step()
    del engine.stages.layers[3].slot().loops[0].mlp.act_fn.forward
    assert broken is None
    assert {name: id(module) for name, module in model.named_modules()} == state
    assert torch.equal(model(IDS).logits, before)
    assert not [module for module in model.modules() if "forward" in vars(module)]


SETTINGS = [
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"do_sample": True, "temperature": 1.3, "top_k": 0, "min_p": 0.01, "repetition_penalty": 1.5},
    {"do_sample": True},
    {"do_sample": False, "repetition_penalty": 2.0, "no_repeat_ngram_size": 2},
    {"do_sample": False, "min_new_tokens": 9, "suppress_tokens": [3, 4]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_are_drawn_as_by_generate(settings):
    model = double("llama")
    for prompt in PROMPTS[:2]:
        torch.manual_seed(5)
        expected = by_transformers(model, prompt, **settings)
        for rows in (1, 3):
            engine = Engine(model, rows=rows, context=CONTEXT)
            requests = [engine.submit(prompt, NEW, seed=5, **settings)]
            requests += [engine.submit(other, NEW, **settings) for other in PROMPTS[2:]]
            engine.run()
            assert requests[0].said == expected


def test_the_same_seed_draws_the_same_whatever_the_company_and_another_one_does_not():
    model = double("llama")
    for way in (WAYS["speculating"], partial(Leave, threshold=0.02)):
        said = []
        for rows, seed in ((1, 3), (4, 3), (4, 4)):
            engine = Engine(model, way, rows=rows, context=CONTEXT)
            first = engine.submit(PROMPTS[0], NEW, seed=seed, do_sample=True)
            for prompt in PROMPTS[1:]:
                engine.submit(prompt, NEW, do_sample=True)
            engine.run()
            said.append(first.said)
        assert said[0] == said[1] != said[2]


def test_greedy_repetition_penalties_hold_for_drafts_too():
    model = double("llama")
    settings = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2}
    engine = Engine(model, WAYS["speculating"], context=CONTEXT)
    assert by_engine(engine, **settings) == [by_transformers(model, prompt, **settings) for prompt in PROMPTS]


@pytest.mark.parametrize("drafts", [1, 3])
def test_with_a_seed_it_draws_what_full_depth_does_however_many_drafts_there_are(drafts):
    model, said, kept = nearly_idle(2), [], 0
    for way in (FullDepth, partial(Speculate, drafts=drafts), partial(Speculate, drafts=3, best=lambda said, most: 2)):
        engine = Engine(model, way, rows=3, context=CONTEXT)
        requests = [engine.submit(p, 24, seed, do_sample=True, temperature=1.5) for seed, p in enumerate(PROMPTS)]
        engine.run()
        said.append([request.said for request in requests])
        kept += getattr(engine.way, "accepted", 0)
    assert said[0] == said[1] == said[2] and kept > 10


def test_the_better_the_exit_the_more_of_its_draws_are_right():
    scores, others = torch.tensor([0.0, 1.0, 1.5, -2.0, 0.3]), torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    p, q = scores.double().softmax(-1), others.double().softmax(-1)
    drawing = Drawing(double("llama"), PROMPTS[0], NEW, 0, do_sample=True, top_k=0)
    said, same = [], 0
    for _ in range(4000):
        same += drawing.pick(others) == (token := drawing.pick(scores))
        said.append(token)
        drawing.go_on()
    counts = torch.bincount(torch.tensor(said), minlength=5)
    assert chisquare(counts.numpy(), (4000 * p).numpy()).pvalue > 0.01
    expected = sum(1 / torch.maximum(p / p[i], q / q[i]).sum() for i in range(5))  # Daliri et al., Theorem 1's proof
    assert same / 4000 == pytest.approx(float(expected), abs=0.03)


def test_one_whose_token_cannot_be_drawn_ends_and_the_others_go_on():
    engine = Engine(double("llama"), rows=3, context=CONTEXT)
    requests = [engine.submit(prompt, NEW, **GREEDY) for prompt in PROMPTS[:3]]
    requests[1].drawing.pick = lambda scores, ahead=0: 1 / 0
    engine.run()
    assert (requests[1].ended, requests[1].said, type(requests[1].error)) == ("failed", [], ZeroDivisionError)
    expected = [by_transformers(double("llama"), prompt) for prompt in PROMPTS[:3]]
    assert [requests[0].said, requests[2].said] == [expected[0], expected[2]]
    assert sorted(engine._free) == [0, 1, 2]


def test_those_who_have_no_row_yet_wait_too():
    engine = Engine(double("llama"), rows=2, context=CONTEXT, waiting=1)
    for prompt in PROMPTS[:3]:
        engine.submit(prompt, NEW, **GREEDY)
    with pytest.raises(Busy):
        engine.submit(PROMPTS[3], NEW)
