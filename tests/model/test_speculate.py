"""Guessing by an exit: the tokens are those of plain generation, however the exit guesses and whatever is asked for."""

import copy
import threading
from collections import Counter

import pytest
import torch
from pico import pico_config, pico_tokenizer
from recursive_models import everywhere, randomize, recursive, rrt_config, tokens
from torch import nn
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from rrtc.model import RrtForCausalLM, halves_rrt, speculate_rrt
from rrtc.model.attention_rrt import KeptLayer
from rrtc.model.graft_rrt import find_layers
from rrtc.model.speculate_rrt import Worth, speculate
from rrtc.plan import ends_of_loops, read_visits

NEW = 30  # with the prompt, several times a window of the pico models
SETTINGS = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 2, "do_sample": False}
SAMPLED = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 2, "do_sample": True}


class Guessing(Worth):
    """Guesses again and again, whatever comes of it; `lengths` in turn."""

    lengths = (0, 3, 1, 8)
    rounds: list[tuple[int, int]] = []  # tokens run and said

    def rests(self) -> bool:
        return len(self.rounds) % 7 == 6 and not self.rounds.append((0, 0))

    def goes_on(self, sure: float) -> bool:
        self._guesses += 1
        return self._guesses <= self.lengths[len(self.rounds) % len(self.lengths)]

    def end(self, tokens: int, said: int) -> None:
        self.rounds.append((tokens, said))


@pytest.fixture
def guessing(monkeypatch) -> type[Guessing]:
    monkeypatch.setattr(Guessing, "rounds", [])
    monkeypatch.setattr(speculate_rrt, "Worth", Guessing)
    return Guessing


def layers_of(model: RrtForCausalLM) -> list[nn.Module]:
    parent, name = find_layers(model.stock, len(model.config.visits))
    return list(getattr(parent, name))


def with_exit(architecture: str = "llama", number: int = 0, **recipe) -> RrtForCausalLM:
    """A model of the test's own that is asked to guess at one of its exits; in float64, so that nothing is a matter of
    rounding."""
    model = copy.deepcopy(recursive(architecture, **recipe)).double()
    model.generation_config.speculate = {"exit": ends_of_loops(read_visits(model.config.visits))[number]}
    return model


def idle_after_the_exit(model: RrtForCausalLM) -> RrtForCausalLM:
    """Lets the later layers compute and write their cache, and adds nothing of it: then the exit is always right."""
    for layer in layers_of(model)[model.generation_config.speculate["exit"] + 1 :]:

        def idle(hidden, *args, forward=layer.forward, **kwargs):
            forward(hidden, *args, **kwargs)
            return hidden

        layer.forward = idle
    return model


def plain(model: RrtForCausalLM, *args, **kwargs):
    return model.generate(*args, speculate=False, **kwargs)


def both(model: RrtForCausalLM, asked: dict) -> list:
    """What plain generation returns, and generation with guesses where it makes some."""
    found = []
    for generate in (plain, RrtForCausalLM.generate):
        torch.manual_seed(0)
        found.append(generate(model, **SETTINGS | {"max_new_tokens": 8} | copy.deepcopy(asked)))
    return found


# -- the same tokens


@everywhere
@pytest.mark.parametrize("recipe", [{"sharing": "middle_cycle"}, {"loops": 3}], ids=["middle_cycle", "three_loops"])
def test_every_architecture_says_what_plain_generation_says(architecture, recipe, guessing):
    for number in range(recipe.get("loops", 2) - 1):
        model = with_exit(architecture, number, **recipe)
        expected = plain(model, tokens(1, 11), **SETTINGS)
        guessing.rounds.clear()
        assert torch.equal(model.generate(tokens(1, 11), **SETTINGS), expected)
        assert any(ran > 1 for ran, _ in guessing.rounds)


@everywhere
def test_the_same_seed_draws_the_same_tokens_and_leaves_the_same_random_numbers(architecture, guessing):
    model = with_exit(architecture, sharing="middle_cycle")
    for asked in ({}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}):
        found = []
        for generate in (plain, RrtForCausalLM.generate):
            torch.manual_seed(7)
            found.append((generate(model, tokens(1, 11), **SAMPLED, **asked), torch.rand(3)))
        assert all(map(torch.equal, *found))


@everywhere
def test_an_exit_that_is_always_right_saves_passes_through_the_later_layers(architecture, monkeypatch):
    monkeypatch.setattr(halves_rrt, "PART", 1)
    model = idle_after_the_exit(with_exit(architecture))
    passes, layers, new = Counter(), layers_of(model), 60
    for name, layer in (("early", layers[0]), ("late", layers[-1])):
        layer.register_forward_hook(lambda *args, name=name: passes.update([name]))
    expected = plain(model, tokens(1, 11), **SETTINGS | {"max_new_tokens": new})
    assert passes == {"early": new, "late": new}
    passes.clear()
    assert torch.equal(model.generate(tokens(1, 11), **SETTINGS | {"max_new_tokens": new}), expected)
    assert passes["early"] <= new and passes["late"] < new / 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it by that name
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_what_peft_puts_before_the_prompt_is_heard(kind, guessing):
    import peft

    torch.manual_seed(1)
    settings = getattr(peft, kind)(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=5)
    model = peft.get_peft_model(with_exit(), settings).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    found = [model.generate(input_ids=tokens(1, 11), **SETTINGS, speculate=guesses) for guesses in (False, None)]
    assert torch.equal(*found) and not torch.equal(found[0], plain(with_exit(), tokens(1, 11), **SETTINGS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_the_judgment_that_users_have_it_says_the_same(dtype):
    for model in (with_exit("gemma3"), idle_after_the_exit(with_exit("gemma3"))):
        model.to(dtype)
        assert torch.equal(model.generate(tokens(1, 11), **SETTINGS), plain(model, tokens(1, 11), **SETTINGS))


@pytest.mark.slow
def test_the_distribution_is_that_of_the_model(guessing):
    """A chi-square test on all texts of three tokens, of five there are; at the level 1e-4."""
    from scipy.stats import chisquare

    config = rrt_config("llama", pico_config("llama", vocab_size=5, initializer_range=0.3, pad_token_id=None))
    torch.manual_seed(0)
    model = randomize(RrtForCausalLM(config))
    model.generation_config.speculate = {"exit": 2}
    prompt = torch.tensor([[3, 1, 4]])
    texts = torch.cartesian_prod(*[torch.arange(5)] * 3)
    with torch.no_grad():
        log_p = model(torch.cat([prompt.expand(125, -1), texts], 1)).logits[:, 2:-1].log_softmax(-1)
    expected = log_p.gather(-1, texts[..., None]).sum((1, 2)).double().exp()
    torch.manual_seed(1)
    drawn = Counter()
    for _ in range(400):
        said = model.generate(prompt, **SAMPLED | {"max_new_tokens": 4, "top_k": 0, "pad_token_id": 0})[0, 3:]
        drawn[tuple(said[:3].tolist())] += 1
    counts = torch.tensor([drawn[tuple(text.tolist())] for text in texts]).double()
    common = expected * 400 >= 5  # the others together
    found, wanted = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, 400 * expected / expected.sum()))
    assert len(found) > 10 and chisquare(found, wanted).pvalue > 1e-4
    assert any(ran > 1 for ran, _ in guessing.rounds)


# -- where a text ends, and what it may cost


@pytest.mark.parametrize("place", range(5))
def test_a_text_ends_where_plain_generation_ends_it_within_a_round(place, guessing):
    guessing.lengths = (4,)
    model = idle_after_the_exit(with_exit())
    said = plain(model, tokens(1, 11), **SETTINGS)[0, 11:].tolist()
    end = said[place]
    for settings in ({"eos_token_id": end}, {"eos_token_id": [end, said[-1]]}, {"max_new_tokens": place + 1}):
        expected = plain(model, tokens(1, 11), **SETTINGS | settings)
        assert torch.equal(model.generate(tokens(1, 11), **SETTINGS | settings), expected)
        assert expected.shape[1] == 11 + said.index(end) + 1 or "max_new_tokens" in settings


def test_a_stop_string_ends_a_text(guessing):
    model, tokenizer, drawn = with_exit(), pico_tokenizer(), {"inputs": tokens(1, 11), "do_sample": True}
    said = both(model, drawn | {"max_new_tokens": NEW})[0][0, 11:].tolist()
    word = next(piece for piece in map(tokenizer.decode, said[5:]) if piece.isalpha() and piece.isascii())
    theirs, ours = both(model, drawn | {"max_new_tokens": NEW, "stop_strings": [word], "tokenizer": tokenizer})
    assert torch.equal(theirs, ours) and theirs.shape[1] < 11 + NEW


def test_a_text_may_take_the_last_position_that_there_is(guessing):
    """GPT-2 has no embedding of another one."""
    prompt = torch.randint(3, 320, (1, 250), generator=torch.Generator().manual_seed(3))
    assert torch.equal(*both(with_exit("gpt2"), {"inputs": prompt, "max_new_tokens": None, "max_length": 256}))


def test_tokens_are_streamed_as_they_are_said(guessing):
    class Kept(TextStreamer):
        def __init__(self):
            self.put_in, self.ended = [], 0

        def put(self, value):
            self.put_in.append(value.tolist())

        def end(self):
            self.ended += 1

    model, streamers = with_exit(), (Kept(), Kept())
    for generate, streamer in zip((plain, RrtForCausalLM.generate), streamers, strict=True):
        generate(model, tokens(1, 11), streamer=streamer, **SETTINGS)
    assert streamers[0].put_in == streamers[1].put_in and len(streamers[0].put_in) == 1 + NEW
    assert streamers[0].ended == streamers[1].ended == 1


@pytest.mark.parametrize("more", [0.0, 0.55])
def test_an_exit_that_is_never_right_costs_little(more):
    for early, late, draft in ((1.0, 1.5, 0.13), (1.0, 2.8, 0.2), (2.0, 1.8, 0.2), (1.0, 1.15, 0.04)):
        worth, spent, said = Worth(early, late, draft, more), 0.0, 0
        while said < 256:
            said += 1
            spent += 1
            if not worth.rests():
                worth.begin()
                assert not worth.goes_on(0.9)  # nothing is built on an exit that was never right
                worth.learn(0.9, False)
                worth.end(1, 1)
                spent += worth.draft + worth.FIXED
        assert spent <= 1.01 * said


def test_an_exit_that_begins_or_ceases_to_be_right_is_noticed():
    worth, spent, said = Worth(1.0, 1.5, 0.13, 0.0), [], []
    for right, until in ((False, 300), (True, 1200), (False, 1800)):
        spent.append(0.0)
        said.append(0)
        while sum(said) < until:
            if worth.rests():
                said[-1], spent[-1] = said[-1] + 1, spent[-1] + 1
                continue
            worth.begin()
            tokens_run = 1
            while worth.goes_on(0.5):
                tokens_run += 1
            for _ in range(tokens_run if right else 1):
                worth.learn(0.5, right)
            new = tokens_run if right else 1
            worth.end(tokens_run, new)
            said[-1] += new
            spent[-1] += tokens_run * (worth.early + worth.draft) + worth.late * (1 + 0.05 * (tokens_run - 1)) + 0.03
    speeds = [a / b for a, b in zip(said, spent, strict=True)]
    assert speeds[0] > 0.98 and speeds[1] > 1.3 and speeds[2] > 0.97


# -- what it leaves behind


def states(cache: DynamicCache) -> list[torch.Tensor]:
    parts = [layer.parts if isinstance(layer, KeptLayer) else [layer] for layer in cache.layers]
    return [tensor for layer in parts for part in layer for tensor in (part.keys, part.values)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_cache_that_the_user_gave_is_as_plain_generation_leaves_it(architecture, guessing):
    model = with_exit(architecture)
    model.generation_config.eos_token_id = plain(model, tokens(1, 11), **SETTINGS)[0, 11 + 17].item()
    settings = {name: value for name, value in SETTINGS.items() if name != "eos_token_id"}
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for generate, cache in zip((plain, RrtForCausalLM.generate), caches, strict=True):
        said = generate(model, tokens(1, 11), past_key_values=cache, **settings)
        generate(model, torch.cat([said, tokens(1, 4)], 1), past_key_values=cache, **settings)  # a second turn
    for ours, theirs in zip(*map(states, caches), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not any(getattr(layer, "record_past", False) for layer in caches[1].layers)


def test_after_an_error_model_cache_and_random_numbers_are_whole(guessing):
    class Fails(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            if ids.shape[1] == 11 + 6:
                raise KeyboardInterrupt
            return torch.zeros(1, dtype=torch.bool)

    guessing.lengths = (8,)
    model = idle_after_the_exit(with_exit("gemma3"))
    modules, attributes = list(model.named_modules()), {name: set(vars(m)) for name, m in model.named_modules()}
    states_after = []
    for generate in (plain, RrtForCausalLM.generate):
        cache = DynamicCache(config=model.config)
        torch.manual_seed(5)
        with pytest.raises(KeyboardInterrupt):
            generate(model, tokens(1, 11), stopping_criteria=StoppingCriteriaList([Fails()]), past_key_values=cache,
                     **SAMPLED)  # fmt: skip
        states_after.append((torch.rand(2), *states(cache)))
    for ours, theirs in zip(*states_after, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert list(model.named_modules()) == modules
    assert {name: set(vars(m)) for name, m in modules} == attributes


def test_the_model_may_be_used_by_others_meanwhile(guessing):
    model, found = with_exit(), {}
    expected = plain(model, tokens(1, 11), **SETTINGS)
    logits = model(tokens()).logits

    def generate(number):
        found[number] = model.generate(tokens(1, 11), **SETTINGS)

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert torch.equal(model(tokens()).logits, logits)
    assert len(found) == 3 and all(torch.equal(said, expected) for said in found.values())


# -- where there is no guessing


class Odd(LogitsProcessor):
    """Counts how often it is asked, which is no function of tokens and scores."""

    def __init__(self):
        self.asked = 0

    def __call__(self, ids, scores):
        self.asked += 1
        return scores.roll(self.asked, -1)


def test_what_cannot_be_checked_is_left_to_plain_generation(guessing):
    model = with_exit()
    prompt, padded = {"inputs": tokens(1, 11)}, torch.cat([torch.full((1, 3), 2), tokens(1, 11)], 1)
    for asked in (
        prompt | {"num_beams": 2},
        prompt | {"num_return_sequences": 2, "do_sample": True},
        prompt | {"prompt_lookup_num_tokens": 3},
        prompt | {"use_cache": False},
        prompt | {"cache_implementation": "static"},
        prompt | {"prefill_chunk_size": 4},
        prompt | {"guidance_scale": 1.5},
        prompt | {"logits_processor": LogitsProcessorList([Odd()])},
        prompt | {"position_ids": torch.arange(3, 14)[None]},
        {"inputs": tokens(2, 11)},
        {"inputs_embeds": model.get_input_embeddings()(tokens(1, 11)).detach()},
        {"inputs": padded, "attention_mask": (padded != 2).long()},
    ):
        assert torch.equal(*both(model, asked)), asked.keys()
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    theirs, ours = both(model, prompt | outputs)
    assert theirs.keys() == ours.keys() and all(map(torch.equal, theirs.scores, ours.scores))
    assert not guessing.rounds


def test_what_stands_in_for_a_forward_pass_or_watches_it_is_asked_for_every_token(guessing):
    def flipped(module, args, output):
        output.logits = output.logits.flip(-1)
        return output

    class Other(RrtForCausalLM):
        def forward(self, *args, **kwargs):
            return flipped(self, args, super().forward(*args, **kwargs))

    def replace_forward(model):
        forward = model.forward
        model.forward = lambda *args, **kwargs: flipped(model, args, forward(*args, **kwargs))

    model, settings = with_exit(), {"inputs": tokens(1, 11)}
    unchanged = plain(model, **settings, **SETTINGS)
    for change in (
        lambda it: setattr(it, "__class__", Other),
        lambda it: it.register_forward_hook(flipped),
        lambda it: it.stock.register_forward_hook(flipped),
        replace_forward,
    ):
        change(changed := copy.deepcopy(model))
        theirs, ours = both(changed, settings)
        assert torch.equal(theirs, ours) and not torch.equal(theirs, unchanged[:, : theirs.shape[1]])


@pytest.mark.parametrize("asked", [{"exit": 5}, {"exit": -1}, {"exit": "2"}, {"exit": True}, {"at": 2}, True, [2]])
def test_an_exit_that_cannot_be_is_refused(asked):
    model = with_exit()
    with pytest.raises(ValueError, match="names no layer of this model that others follow"):
        model.generate(tokens(1, 11), speculate=asked, **SETTINGS)


def test_it_can_be_given_to_generate(guessing):
    model = with_exit()
    expected = plain(model, tokens(1, 11), **SETTINGS)
    assert torch.equal(model.generate(tokens(1, 11), custom_generate=speculate, **SETTINGS), expected)
    assert any(ran > said for ran, said in guessing.rounds)  # an untrained exit is often wrong
    beams = plain(model, tokens(1, 11), num_beams=2, **SETTINGS)
    assert torch.equal(model.generate(tokens(1, 11), custom_generate=speculate, num_beams=2, **SETTINGS), beams)


# -- windows, and the part of the vocabulary


@everywhere
def test_visits_that_see_a_window_say_the_same_and_keep_as_little(architecture, guessing):
    model = with_exit(architecture)
    config = copy.deepcopy(model.config)
    types = getattr(config, "layer_types", None) or ["full_attention"] * 6
    landmark = {"size": 2, "count": 2, "seed": 1}
    kinds = {"window": 9, "sinks": 3, "heads": [1]}, {"window": 6, "sinks": 0, "heads": [], "landmark": landmark}
    for number, kind in enumerate(types):
        if kind == "full_attention" and number != 2 and architecture != "mistral":
            config.visits[number]["attention"] = kinds[number % 2]
    local = RrtForCausalLM(config).double().eval()
    local.load_state_dict(model.state_dict())
    local.generation_config.speculate = model.generation_config.speculate
    caches = [DynamicCache(config=config) for _ in range(2)]
    said = [
        generate(local, tokens(1, 11), past_key_values=cache, **SETTINGS)
        for generate, cache in zip((plain, RrtForCausalLM.generate), caches, strict=True)
    ]
    assert torch.equal(*said)
    for ours, theirs in zip(*map(states, caches), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # eager softmax (Gemma 2's) is in float32


@pytest.mark.parametrize("bias", [False, True])
def test_the_draft_head_is_a_part_of_the_head(bias):
    torch.manual_seed(0)
    whole, hidden = nn.Linear(6, 40, bias=bias), torch.randn(3, 6)
    head = halves_rrt.DraftHead(whole, torch.tensor([[1, 30, 2, 30]]))
    for token in (12, 30, 3, 39):
        head.add(token)
    rows = [*range(10), 30, 12, 39]
    torch.testing.assert_close(head(hidden), whole(hidden)[:, rows])
    assert [head.token(column) for column in range(13)] == rows
    scores = head.over_all(head(hidden)[0])
    torch.testing.assert_close(scores[0, rows], whole(hidden)[0, rows])
    assert scores.shape == (1, 40) and scores.isneginf().sum() == 27
    assert not list(head.parameters())  # they are the model's


def test_where_all_that_is_guessed_is_forbidden_nothing_is_guessed(guessing):
    model = with_exit()
    prompt = torch.arange(80)[None]  # the first fourth of the vocabulary
    forbidden = {"no_repeat_ngram_size": 1, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(*both(model, {"inputs": prompt, "do_sample": True, **forbidden}))
    assert guessing.rounds and guessing.rounds[0] == (1, 1)
