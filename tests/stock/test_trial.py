"""What one layer on random weights tells of an architecture."""

import pytest
from pico import COMMON, EVERY_ARCHITECTURE, pico_config
from transformers import BitNetConfig, DiffLlamaConfig

from rrtc.errors import WrongUsage
from rrtc.stock.trial import check_kinds, find_folds, find_neurons

FUSED = {"phi3": ("mlp.gate_up_proj",), "gpt2": ("mlp.c_fc",), "gpt_neox": ("mlp.dense_h_to_4h",)}
READERS = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}
AFTER_THE_BLOCKS = {"olmo2"}  # its norms are read by no matrix


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_every_architecture_has_neurons_and_norms_that_can_be_folded(architecture):
    config = pico_config(architecture)
    (neurons,) = find_neurons(config)
    assert neurons.reader == READERS.get(architecture, "mlp.down_proj")
    assert neurons.producers == FUSED.get(architecture, ("mlp.gate_proj", "mlp.up_proj"))
    folds, _ = find_folds(config)
    assert bool(folds) == (architecture not in AFTER_THE_BLOCKS)
    assert all(len(set(fold.readers)) == len(fold.readers) > 0 for fold in folds)


def test_a_norm_inside_an_ffn_is_given_what_is_as_wide_as_that():
    folds, others = find_folds(BitNetConfig(**COMMON))
    assert "mlp.down_proj" in {reader for fold in folds for reader in fold.readers}
    assert not others


def test_attention_that_calls_its_kernel_twice_can_have_no_windows():
    with pytest.raises(WrongUsage, match="'diffllama' model calls its kernel 2 times in a layer"):
        check_kinds(DiffLlamaConfig(**COMMON), ["window"])
