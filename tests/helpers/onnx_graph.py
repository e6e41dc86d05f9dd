"""ONNX exports of two layers, and greedy generation by ONNX Runtime."""

from pathlib import Path

import numpy
import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime", reason="needs rrtc[onnx]")

GRAPH, DATA = "onnx/model.onnx", "onnx/model.onnx_data"
LAYERS = {"num_hidden_layers": 2}  # one slot, visited twice

HYBRID = LAYERS | {"layer_types": ["sliding_attention", "full_attention"]}


def padded_greedy(folder: Path, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> tuple:
    """(tokens, logits of each step) of greedy generation with the graph in `folder`, in a batch with padding."""
    (graph,) = (folder / "onnx").glob("*.onnx")
    session = onnxruntime.InferenceSession(graph)
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    past = {value.name: numpy.zeros((len(ids), value.shape[1], 0, value.shape[3]), "float32") for value in caches}
    sequence, mask, given, steps = ids.numpy(), mask.numpy(), ids.numpy(), []
    for _ in range(new_tokens):
        positions = numpy.maximum(mask.cumsum(1) - 1, 0)[:, -given.shape[1] :]
        feed = {"input_ids": given, "attention_mask": mask, "position_ids": positions} | past
        logits, *present = session.run(None, feed)
        past = dict(zip(past, present, strict=True))
        steps.append(logits[:, -1])
        given = logits[:, -1:].argmax(-1)
        sequence, mask = numpy.append(sequence, given, 1), numpy.append(mask, numpy.ones_like(given), 1)
    return torch.tensor(sequence), torch.tensor(numpy.stack(steps))
