"""What the dtype of a model is that is to be measured."""

import json

import torch
from pico import save_pico
from safetensors.torch import save_file

from rrtc.eval.candidates import stored_dtype


def test_of_a_quantized_export_it_is_that_of_what_is_not_quantized(tmp_path):
    folder = save_pico(tmp_path / "dense")
    assert stored_dtype(folder) == torch.float32
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"dtype": "bfloat16"}
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}}))
    packed = torch.zeros(8, 8, dtype=torch.int32)  # most of the numbers
    save_file(
        {"q.weight_packed": packed, "norm.weight": torch.ones(8, dtype=torch.bfloat16)}, folder / "model.safetensors"
    )
    assert stored_dtype(folder) == torch.bfloat16
