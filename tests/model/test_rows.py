"""Embeddings and output projection in int8 rows: what the model computes, what it keeps in memory, what it refuses."""

import copy

import pytest
import torch
from recursive_models import assert_equal, everywhere, recursive, tokens
from torch import nn

from rrtc.model import RrtForCausalLM, rows_rrt
from rrtc.model.halves_rrt import PART, DraftHead
from rrtc.model.rows_rrt import Rows, RowsHead, tables_of
from rrtc.model.speculate_rrt import Worth
from rrtc.plan import ends_of_loops, read_visits


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 numbers, scale) of a table."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def in_rows(architecture: str, **recipe) -> tuple[RrtForCausalLM, RrtForCausalLM]:
    """(a model whose tables are in rows, the plain model with the same tables as floating-point numbers)."""
    plain = copy.deepcopy(recursive(architecture, **recipe))
    config = copy.deepcopy(plain.config)
    config.table_bits = 8
    model, state = RrtForCausalLM(config).eval(), plain.state_dict()
    with torch.no_grad():
        for name, module in tables_of(plain.stock)[0].items():
            numbers, scale = rounded(module.weight)
            module.weight.copy_(numbers * scale)
            state[f"{name}.table.numbers"], state[f"{name}.table.scale"] = numbers, scale
    wanted = model.state_dict()
    model.load_state_dict({name: state[name] for name in wanted})
    return model, plain


@everywhere
def test_rows_compute_what_the_rounded_tables_do(architecture, monkeypatch):
    model, plain = in_rows(architecture)
    with torch.no_grad():
        expected = plain(tokens()).logits
        assert_equal(model(tokens()).logits, expected, 1e-6)
        monkeypatch.setitem(rows_rrt.BLOCK, "cpu", 1000)  # many blocks, the last one smaller
        assert_equal(model(tokens()).logits, expected, 1e-6)
        low = model.to(torch.bfloat16)(tokens()).logits
    assert low.dtype == torch.bfloat16 and (low.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert {m.numbers.dtype for m in model.modules() if isinstance(m, Rows)} == {torch.int8}


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_every_table_is_there_once_and_in_int8(architecture):
    model, plain = in_rows(architecture)
    tables = [module for module in model.modules() if isinstance(module, Rows)]
    tied = plain.config.tie_word_embeddings
    assert len(tables) == {"llama": 2, "gemma3": 1, "gpt2": 2}[architecture]
    assert (model.get_output_embeddings().table is model.get_input_embeddings().table) is tied
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    before = {t.data_ptr(): t.nbytes for t in [*plain.parameters(), *plain.buffers()]}
    saved = sum(3 * t.numbers.numel() - 4 * len(t.numbers) for t in tables)
    assert sum(held.values()) == sum(before.values()) - saved


def test_a_head_in_rows_adds_its_bias():
    torch.manual_seed(0)
    head = nn.Linear(12, 20)
    numbers, scale = rounded(head.weight.data)
    head.weight.data = numbers * scale
    made = RowsHead(head, None)
    made.table.numbers.copy_(numbers)
    made.table.scale.copy_(scale)
    x = torch.randn(3, 12)
    torch.testing.assert_close(made(x), head(x), atol=1e-6, rtol=0)


def test_a_tied_head_computes_where_its_table_is():
    """As where device_map="auto" spreads a model: the head, which has no weights, comes last."""
    model = copy.deepcopy(in_rows("gemma3")[0])
    model.get_input_embeddings().to("meta")
    assert model.get_output_embeddings()(torch.zeros(2, 3, 48)).device.type == "meta"


def test_gradients_go_through_a_head_in_rows(monkeypatch):
    model, plain = in_rows("gemma3")
    monkeypatch.setitem(rows_rrt.BLOCK, "cpu", 1000)
    found = []
    for one in (model, plain):
        norm = one.stock.model.norm.weight
        (gradient,) = torch.autograd.grad(one(tokens(), labels=tokens()).loss, norm)
        found.append(gradient)
    assert_equal(found[0], found[1], 1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_generation_and_guesses_say_the_same_text(architecture, monkeypatch):
    guesses, forward = [], DraftHead.forward

    def guess(self, hidden):
        guesses.append(self.first)
        return forward(self, hidden)

    monkeypatch.setattr(DraftHead, "forward", guess)
    monkeypatch.setattr(Worth, "rests", lambda self: False)
    model, plain = (one.double() for one in in_rows(architecture, sharing="middle_cycle"))
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = plain.generate(tokens(1, 11), **settings)
    assert torch.equal(model.generate(tokens(1, 11), **settings), expected)
    assert not guesses
    model.generation_config.speculate = {"exit": ends_of_loops(read_visits(model.config.visits))[0]}
    assert torch.equal(model.generate(tokens(1, 11), **settings), expected)
    assert set(guesses) == {320 // PART}


def test_it_is_saved_and_loaded_again(tmp_path):
    for architecture in ("llama", "gemma3"):
        model, _ = in_rows(architecture)
        model.save_pretrained(tmp_path / architecture)
        loaded, info = RrtForCausalLM.from_pretrained(tmp_path / architecture, output_loading_info=True)
        assert not any(info.values())
        with torch.no_grad():
            assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
        low = RrtForCausalLM.from_pretrained(tmp_path / architecture, dtype=torch.bfloat16)
        table = low.get_input_embeddings().table
        assert (table.numbers.dtype, table.scale.dtype) == (torch.int8, torch.bfloat16)


def test_what_would_change_a_table_is_refused():
    model, _ = in_rows("gemma3")
    for change in (
        lambda: model.resize_token_embeddings(400),
        lambda: model.set_input_embeddings(nn.Embedding(400, 48)),
        lambda: model.set_output_embeddings(nn.Linear(48, 400)),
    ):
        with pytest.raises(ValueError, match="are in 8 bits, and cannot be resized or replaced"):
            change()
    with torch.no_grad():
        before = model(tokens()).logits
        model.tie_weights()
        assert torch.equal(model(tokens()).logits, before)


def test_no_other_number_of_bits_is_taken():
    config = copy.deepcopy(recursive("llama").config)
    config.table_bits = 4
    with pytest.raises(ValueError, match="table_bits is 4"):
        RrtForCausalLM(config)
