"""The ONNX format: one graph with the KV cache as inputs and outputs, as transformers.js and Optimum expect it.

    onnx/model.onnx         the graph: input_ids, attention_mask, position_ids, past_key_values.N.key and .value
                            -> logits, present.N.key and .value; N counts the visits
    onnx/model.onnx_data    the weights; a shared matrix is there once, however many visits use it. What does not fit
                            one file goes on in model.onnx_data_1, model.onnx_data_2 and so on. In 4 bits it is
                            model_q4.onnx, in 8 model_quantized.onnx (onnx_blocks.py)
    config.json             that of the stock architecture, which is how transformers.js knows the cache

Numbers are float32 inside. Weights written in 16 bits are cast where the graph begins, so that they take half the space
and the graph computes the same wherever it runs. The cache keeps every position, in sliding windows too: their masks
are in the graph. Nothing here knows an architecture.
"""

import contextlib
import importlib.util
import json
import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rrtc.console import note
from rrtc.errors import RrtcError
from rrtc.export.formats import dense, onnx_blocks, recursive
from rrtc.export.formats.writing import Texts, round_written
from rrtc.export.verify import (
    PROMPT,
    Reference,
    check_loaded,
    check_logits,
    greedy_of,
    loaded,
    logits_of,
)
from rrtc.io.folder import copy_companions
from rrtc.io.shard_writer import check_fits
from rrtc.io.source import load_tokenizer
from rrtc.io.weights import Weights, disk_error
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.plan import SAVINGS_CONTEXT, savings
from rrtc.recipe.export import ExportRecipe
from rrtc.stock.architecture import read_plan
from rrtc.storage import BITS

LIBRARY, TAGS, QUANTIZED_TAGS = "transformers.js", ("onnx",), ()
FROM_DISK, TIMES_IN_MEMORY = False, 2  # beside the model, its graph has it once more
MULTIPLIED_OUT = False
GENERATES = True
WINDOWS = False

NEEDED = ("onnx", "onnxscript", "onnxruntime")
# The graph's file by what it is quantized to, and what transformers.js calls that.
NAMES = {"none": ("model.onnx", "fp32"), "int8": ("model_quantized.onnx", "q8"), "int4": ("model_q4.onnx", "q4")}
# Lengths to trace with; all different, and none 0 or 1, so that nothing takes one for another or for a constant.
ROWS, PAST, TOKENS = 2, 3, 5
LARGEST = 2_000_000_000  # bytes of a weights file: browsers fail to fetch more than 2 GiB as one array
MOST_FILES = 100  # of weights, that transformers.js reads
INSIDE = 256  # bytes: a tensor that is no larger stays in the graph
FOLDED = 1024  # elements: larger constants are not worked out in advance, which would store a matrix twice


def check(recipe: ExportRecipe, base: PreTrainedConfig, made: RrtConfig | None = None) -> None:
    """Raises RrtcError where the packages of the extra `onnx` are not installed, and as the recursive format does where
    it is to be quantized."""
    recursive.check(recipe, base, made)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RrtcError(
            f"The ONNX format needs {' and '.join(missing)}, which is not installed.",
            "Install what it needs with 'pip install rrtc[onnx]'.",
        )


def number_format(asked: str, stored: str) -> torch.dtype:
    """What the weights are cast to, where the recipe says `asked`; by default float32, in which every device
    computes."""
    return getattr(torch, "float32" if asked == "auto" else asked)


def bytes_written(weights: Weights, config: RrtConfig, dtype: torch.dtype) -> int:
    """About how many bytes of weights `write` will write."""
    return _parameters(weights, config) * dtype.itemsize


def _parameters(weights: Weights, config: RrtConfig) -> int:
    """Those that a whole forward pass computes with, shared ones once: the graph has no maps of exits."""
    return weights.parameters - read_plan(config).parts.get("exits", 0)


def write(source: Path, folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    """Writes the rrtc model in `source` into the existing `folder`, without checking it; returns its parameter count.

    dtype: the dtype of the weights. shard_bytes: of one weights file, LARGEST at most; a tensor that is larger
    has a file of its own. The model is in memory twice, in float32. Raises RrtcError for a tensor that does not fit
    `dtype`, for a model that torch cannot trace or ONNX cannot express, and for more files than MOST_FILES.
    """
    note("Tracing the model")
    weights = Weights(source)
    for name in weights:
        for block in weights.blocks(name, dtype):
            check_fits(name, block)
    model = RrtForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if dtype != torch.float32:
        round_tensors(model, dtype)
    graph = _small(_trace(model))
    if dtype != torch.float32:
        _halve(graph, dtype)
    _write_folder(graph, source, folder, model.config, dtype, shard_bytes, "none")
    return _parameters(weights, model.config)


def write_quantized(
    source: Path, folder: Path, dtype: torch.dtype, shard_bytes: int, number: str, texts: Texts, expected: Reference
) -> tuple[int, Reference, dict]:
    """The same with its matrices in fewer bits, those of the quantized recursive format; see rrtc.export.formats."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="recursive-") as scratch:
        between = Path(scratch)
        recursive.write(source, between, dtype, shard_bytes)
        expected, found = round_written(between, number, texts, shard_bytes, expected)
        model, rounded = loaded(source, {}), onnx_blocks.read_rounded(between, BITS[number])
        onnx_blocks.fill(model, between, rounded)
    check_logits(logits_of(model, expected.ids), expected, torch.float32)
    expected = replace(expected, greedy=greedy_of(model, expected.ids[:1, :PROMPT]))
    note("Tracing the model")
    graph = _small(_trace(model))
    onnx_blocks.in_blocks(graph, rounded)
    if dtype != torch.float32:
        _halve(graph, dtype)
    parts = onnx_blocks.parts_of(graph, rounded, dtype)
    _write_folder(graph, source, folder, model.config, dtype, shard_bytes, number)
    return _parameters(Weights(source), model.config), expected, found | {"parts": parts}


def _write_folder(
    graph, source: Path, folder: Path, config: RrtConfig, dtype: torch.dtype, shard_bytes: int, number: str
) -> None:
    """Writes `graph`, and all that is beside it. number: what it is quantized to, or none."""
    name, called = NAMES[number]
    shards = _save(graph, folder / "onnx" / name, min(shard_bytes, LARGEST))
    dense.write_config(config, folder, dtype)
    written = json.loads((folder / "config.json").read_text(encoding="utf8"))
    # What transformers.js has to be told: the graph it would not ask for by itself on a processor, and how many files
    # of weights there are beside it.
    written["transformers.js_config"] = {"dtype": called, "use_external_data_format": {name: shards}}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf8")
    copy_companions(source, folder)
    tokenizer = getattr(load_tokenizer(source), "backend_tokenizer", None)
    if tokenizer is not None and not (folder / "tokenizer.json").exists():
        tokenizer.save(str(folder / "tokenizer.json"))  # what transformers.js reads, and nothing else


class _Cached(nn.Module):
    """A causal language model whose KV cache goes in and comes out as tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list):
        """input_ids, position_ids: (rows, tokens); attention_mask: (rows, past + tokens); past: (key, value) of each
        visit, (rows, heads, past, width). Returns the logits (rows, tokens, vocabulary) and the longer cache."""
        from transformers import DynamicCache

        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=DynamicCache(past), use_cache=True,
        )  # fmt: skip
        return output.logits, _entries(output.past_key_values)


def _entries(cache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def round_tensors(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds every tensor of a float32 model in place to what `dtype` can hold."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def _trace(model: RrtForCausalLM):
    """The graph of `model`, as onnx_ir has it, with an empty or a filled cache and any lengths."""
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
    try:
        with torch.no_grad():
            one = _entries(model(ids[:1, :1], use_cache=True).past_key_values)
        past = [tuple(torch.zeros(ROWS, t.shape[1], PAST, t.shape[3]) for t in entry) for entry in one]
        given = (
            ids,
            torch.ones(ROWS, PAST + TOKENS, dtype=torch.long),
            torch.arange(PAST, PAST + TOKENS).expand(ROWS, TOKENS).contiguous(),
            past,
        )
        batch, cache = {0: "batch_size"}, {0: "batch_size", 2: "past_sequence_length"}
        lengths = (
            batch | {1: "sequence_length"},
            batch | {1: "total_sequence_length"},
            batch | {1: "sequence_length"},
            [(cache, cache)] * len(past),
        )
        entries = [f"{number}.{kind}" for number in range(len(past)) for kind in ("key", "value")]
        with _quiet():
            program = torch.onnx.export(
                _Cached(model).eval(), given, dynamo=True, verbose=False, optimize=False, dynamic_shapes=lengths,
                input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{e}" for e in entries)],
                output_names=["logits", *(f"present.{e}" for e in entries)],
            )  # fmt: skip
    except Exception as error:  # every architecture has its own way to be more than a graph of ONNX operations
        cause = error
        while cause.__cause__ is not None:  # torch wraps what went wrong in pages of advice to its developers
            cause = cause.__cause__
        reason = f"{type(cause).__name__} {cause}".splitlines()[0][:200]
        raise RrtcError(
            f"This '{model.config.base_config.model_type}' model cannot be written as an ONNX graph: {reason}",
            "Export it with --format recursive or dense.",
        ) from error
    return program.model


@contextlib.contextmanager
def _quiet():
    """Silence for the remarks of torch's exporter about packages and axes that do not matter here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _small(graph):
    """`graph`, simplified, with no constant stored twice.

    The order matters: each visit transposes the matrix it shares, and only when those transpositions have become one
    can it be worked out in advance without storing the matrix once for each visit.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import optimize_ir

    common.ClearMetadataAndDocStringPass()(graph)  # where in the source each node came from: most of the file
    common.CommonSubexpressionEliminationPass()(graph)
    optimize_ir(graph, input_size_limit=FOLDED, output_size_limit=FOLDED)
    common.ClearMetadataAndDocStringPass()(graph)
    return graph


def _halve(graph, dtype: torch.dtype) -> None:
    """Stores the matrices of `graph` in `dtype`, each with one cast to float32 where the graph begins.

    Only where that changes no number: the model was rounded before it was traced, its tables of positions were not.
    """
    import onnx_ir as ir

    casts = []
    for name, value in list(graph.graph.initializers.items()):
        tensor = torch.from_numpy(value.const_value.numpy())
        if tensor.dim() < 2 or tensor.dtype != torch.float32 or not torch.equal(tensor.to(dtype).float(), tensor):
            continue
        stored = ir.Value(name=f"{name}.stored", const_value=ir.tensor(tensor.to(dtype), name=f"{name}.stored"))
        stored.shape, stored.type = value.shape, ir.TensorType(stored.const_value.dtype)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        value.replace_all_uses_with(cast.outputs[0])
        graph.graph.initializers.pop(name)
        graph.graph.register_initializer(stored)
        casts.append(cast)
    graph.graph.insert_before(graph.graph[0], casts)


def _save(graph, file: Path, shard_bytes: int) -> int:
    """Writes the graph as `file`, with its weights beside it, and returns the number of weights files. Their names are
    those that transformers.js works out."""
    import onnx_ir as ir

    shards, written = [[]], 0
    for value in graph.graph.initializers.values():
        size = value.const_value.nbytes
        if size > INSIDE:
            if shards[-1] and written + size > shard_bytes:
                shards.append([])
                written = 0
            shards[-1].append(value)
            written += size
    if len(shards) > MOST_FILES:
        raise RrtcError(
            f"The weights would be {len(shards)} files, and transformers.js reads at most {MOST_FILES}.",
            "Choose a larger --max-shard-size.",
        )
    inside = file.parent
    inside.mkdir()
    try:
        for number, values in enumerate(shards):
            name = f"{file.name}_data" + (f"_{number}" if number else "")
            stored = ir.external_data.convert_tensors_to_external([v.const_value for v in values], inside, name)
            for value, tensor in zip(values, stored, strict=True):
                value.const_value = tensor
        ir.save(graph, file)
    except OSError as error:
        raise disk_error(file, error) from error
    return len(shards)


def weights_bytes(folder: Path) -> int:
    """The size of the graph and its weights files in `folder`."""
    return sum(file.stat().st_size for file in (folder / "onnx").glob("*"))


def kv_bytes(config: RrtConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of the KV cache after `context` tokens: every position in float32, whatever the weights are in."""
    return context * read_plan(config).architecture.kv_bytes_per_token(torch.float32.itemsize)


def verify(folder: Path, expected: Reference, dtype: torch.dtype, from_disk: bool) -> tuple[float, dict]:
    """(the largest difference of a logit, nothing else that was measured). Raises RrtcError as `check_loaded` does."""
    return check_loaded(folder, expected, dtype, program="reload_onnx.py"), {}


def summary(config: RrtConfig) -> str:
    return f"This is an ONNX graph{', in which the shared weights are stored once' * read_plan(config).ties}."


def limits(exported: dict, config: RrtConfig) -> str:
    plan = read_plan(config)
    cache = kv_bytes(config, SAVINGS_CONTEXT, torch.float32)
    saved = savings(plan.flops_per_token, plan.architecture.flops_per_token, cache, cache)
    return f"""- Tying saves download and disk. {saved} It passes through {len(plan.visits)} layers, and the \
cache of each keeps every position.
- ONNX Runtime may lay out a shared matrix once for each layer that uses it, and then takes more memory than disk.
- It is not the base model: what tying cost is above, as far as it was measured."""


def how_to_load(exported: dict, name: str, config: RrtConfig, chat: bool) -> str:
    """Markdown. exported: what the export measured. name: of its folder."""
    graph = next(file for file in exported["files"] if file.endswith(".onnx"))
    return LOADING.format(name=name, graph=graph)


LOADING = """In a browser or in Node, with [transformers.js](https://huggingface.co/docs/transformers.js), from
version 3 on; `{name}` is this folder below `localModelPath`, or its id on the hub:

```js
import {{ env, pipeline }} from "@huggingface/transformers";

env.localModelPath = "./";
env.allowLocalModels = true;
const generator = await pipeline("text-generation", "{name}");
console.log(await generator("The sky is blue because", {{ max_new_tokens: 40, do_sample: false }}));
```

In Python, with `onnxruntime` and, for the tokenizer, `transformers`:

```python
import numpy
import onnxruntime
from transformers import AutoTokenizer

folder = "{name}"  # where this folder is
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(folder + "/{graph}")
caches = [value for value in session.get_inputs() if value.name.startswith("past")]
past = {{value.name: numpy.zeros((1, value.shape[1], 0, value.shape[3]), "float32") for value in caches}}
tokens, done = list(tokenizer("The sky is blue because")["input_ids"]), 0
for _ in range(40):
    given = {{
        "input_ids": numpy.array([tokens[done:]]),
        "attention_mask": numpy.ones((1, len(tokens)), "int64"),
        "position_ids": numpy.arange(done, len(tokens))[None],
    }}
    logits, *present = session.run(None, given | past)
    past, done = dict(zip(past, present)), len(tokens)
    tokens.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(tokens, skip_special_tokens=True))
```"""
