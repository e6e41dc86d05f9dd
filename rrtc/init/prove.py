"""The proof, before any work, that the model that is read layer by layer is the one that transformers loads."""

import math
import tempfile

import torch

from rrtc.console import quiet_libraries
from rrtc.errors import RrtcError
from rrtc.io.dense import DenseModel
from rrtc.io.recursive import RecursiveModel
from rrtc.io.source import load_model
from rrtc.stock.streamed import StreamedModel
from rrtc.text.windows import longest_context

TOKENS = 48
TOLERANCE = 1e-4  # of the loss: both are float32, and norms that are folded round otherwise


def prove(dense: DenseModel | RecursiveModel, device: torch.device) -> None:
    """Raises RrtcError where the loss of `dense`, streamed, on one window of fixed token ids is not that of the model
    which from_pretrained makes of its folder, or where that is not finite. That one is read from disk too, matrix by
    matrix, as it computes."""
    vocabulary = dense.config.get_text_config().vocab_size
    ids = (torch.arange(longest_context(dense.config, TOKENS)) * 7919 % vocabulary)[None]
    model = StreamedModel(dense.config, dense.raw, device)
    states = model.embed(ids)
    model.run(lambda number: dense.layer(number, device), states, dense.rules)
    streamed = model.loss(states, ids)
    with tempfile.TemporaryDirectory(prefix="rrtc-prove-") as scratch, quiet_libraries():
        try:
            # accelerate asks for the folder, and writes nothing into it where the weights are safetensors already.
            loaded = _loss(dense, ids, device_map={"": "disk"}, offload_folder=scratch)
        except KeyError:  # transformers does not find a tied table on disk that is stored under its other name
            loaded = _loss(dense, ids)
    if not math.isfinite(loaded):
        raise RrtcError(
            f"The model in {dense.weights.folder} computes NaN or infinity: transformers' loss on {ids.numel()} tokens "
            f"is {loaded}.",
            "Its weights are damaged, or too large for float32.",
        )
    if not abs(streamed - loaded) <= TOLERANCE * max(1.0, loaded):
        raise RrtcError(
            f"rrtc reads the model in {dense.weights.folder} otherwise than transformers does: on the same tokens its "
            f"loss is {streamed:.4f}, and should be {loaded:.4f}.",
            "This is a fault in rrtc: please report it with the model's config.",
        )


@torch.inference_mode()
def _loss(dense: DenseModel | RecursiveModel, ids: torch.Tensor, **placed) -> float:
    """The loss of the model that from_pretrained makes."""
    model = load_model(dense.weights.folder, dtype=torch.float32, **placed)
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
