"""The recursive format: the tensors as they are, shared weights once. The modeling code goes along, so that it loads
anywhere."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig

import rrtc.model
from rrtc.errors import RrtcError
from rrtc.export.formats.loading import in_transformers
from rrtc.export.formats.writing import Tensors, Texts, round_written, write_tensors
from rrtc.export.quantize import check_installed
from rrtc.export.verify import Reference, check_loaded
from rrtc.io.provenance import check_not_quantized
from rrtc.io.recursive import trained_exits
from rrtc.io.source import load_tokenizer, read_config
from rrtc.io.trust import without_code
from rrtc.io.weights import Weights
from rrtc.model import RrtConfig
from rrtc.plain import read_json
from rrtc.recipe.export import ExportRecipe
from rrtc.stock.architecture import read_plan

LIBRARY, TAGS, QUANTIZED_TAGS = "transformers", ("custom_code",), ("compressed-tensors",)
FROM_DISK, TIMES_IN_MEMORY = True, 1
MULTIPLIED_OUT = False
GENERATES = False
WINDOWS = True

# AutoModel is there for vLLM, which refuses remote code without it.
AUTO_MAP = {
    "AutoConfig": "configuration_rrt.RrtConfig",
    "AutoModel": "modeling_rrt.RrtModel",
    "AutoModelForCausalLM": "modeling_rrt.RrtForCausalLM",
    "AutoModelForSequenceClassification": "modeling_rrt.RrtForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_rrt.RrtForTokenClassification",
}


def check(recipe: ExportRecipe, base: PreTrainedConfig, made: RrtConfig | None = None) -> None:
    """base: the config of the dense model. made: that of the recursive one, where there is one already. Raises
    RrtcError where the model has no matrices to quantize."""
    if recipe.quantize == "none":
        return
    check_installed()
    if made is None:
        return
    forms = {visit["forms"].get(name, "tied") for visit in made.visits for name in visit["ranks"]}
    if forms == {"low_rank"}:
        raise RrtcError(
            "Every matrix of this model is a low-rank product, and those are not quantized.",
            "Add --format dense to multiply them out.",
        )


def number_format(asked: str, stored: str) -> torch.dtype | None:
    """What the tensors are cast to, where the recipe says `asked` and most are `stored` in; None: each is as it was."""
    return None if asked == "auto" else getattr(torch, asked)


def bytes_written(weights: Weights, config: RrtConfig, dtype: torch.dtype | None) -> int:
    """About how many bytes of weights `write` will write."""
    return weights.bytes_on_disk if dtype is None else weights.parameters * dtype.itemsize


def write(source: Path, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> int:
    """Writes the rrtc model in `source` into the existing `folder`, without checking it; returns its parameter count,
    shared ones once.

    dtype: as `number_format` gives it. Raises RrtcError for a tensor with NaN or infinity.
    """
    config = recursive_config(source)  # raises for another model
    weights = Weights(source)
    write_config(source, folder, dtype or getattr(torch, weights.dtype))

    def tensors(each: Callable) -> Tensors:
        for name in weights:
            yield name, weights.blocks(name, dtype, each)

    parameters = write_tensors(source, folder, shard_bytes, len(list(weights)), tensors)
    _name_tokenizer_class(source, folder)
    _ask_for_guesses(source, folder, config)
    return parameters


def write_quantized(
    source: Path,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    number: str,
    texts: Texts,
    expected: Reference,
) -> tuple[int, Reference, dict]:
    """The same with its matrices in fewer bits; see rrtc.export.formats."""
    return write(source, folder, dtype, shard_bytes), *round_written(folder, number, texts, shard_bytes, expected)


def guesses(source: Path) -> dict | None:
    """What the generation config of the export of the model in `source` says of guessing by an exit, as
    rrtc/model/speculate_rrt.py reads it; None where no exit was trained."""
    exits = trained_exits(source)
    return {"exit": exits[0]} if exits else None


def _ask_for_guesses(source: Path, folder: Path, config: RrtConfig) -> None:
    """Lets the generation defaults in `folder` ask for guesses, where an exit was trained to make them."""
    file, asked = folder / "generation_config.json", guesses(source)
    said = read_json(file) if file.exists() else {}
    if asked == said.get("speculate"):
        return
    if not said:  # what transformers then takes from config.json
        said = GenerationConfig.from_model_config(config).to_diff_dict()
    # With the mark of a file that was made of a config, transformers reads nothing from it but what it knows.
    said = {key: value for key, value in said.items() if key not in ("speculate", "_from_model_config")}
    said |= {} if asked is None else {"speculate": asked}
    file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf8")


def _name_tokenizer_class(source: Path, folder: Path) -> None:
    """Lets tokenizer_config.json say the tokenizer's class: where it does not, transformers looks for it in the config,
    which needs code."""
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}
    if said.get("tokenizer_class") is None:
        said["tokenizer_class"] = type(load_tokenizer(source)).__name__
        file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def write_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the config, with its auto_map, and the modeling code: all of rrtc.model that an export needs is
    in files whose names end in _rrt.py."""
    config = without_code(json.loads((source / "config.json").read_text(encoding="utf8")))
    config |= {"architectures": ["RrtForCausalLM"], "auto_map": AUTO_MAP, "dtype": str(dtype).removeprefix("torch.")}
    config["base_config"].pop("_name_or_path", None)  # a place on the machine that made it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    for file in Path(rrtc.model.__file__).parent.glob("*_rrt.py"):
        shutil.copyfile(file, folder / file.name)


def recursive_config(folder: Path) -> RrtConfig:
    """The config of the rrtc model in `folder`. Raises RrtcError where that is another model."""
    config = read_config(folder)
    if not isinstance(config, RrtConfig):
        raise RrtcError(
            f"{folder} holds a '{config.model_type}' model, not a recursive one.",
            "Export the folder that 'rrtc init' or 'rrtc uptrain' wrote.",
        )
    check_not_quantized(folder, config)
    return config


def weights_bytes(folder: Path) -> int:
    """The size of the weights files in `folder`."""
    return Weights(folder).bytes_on_disk


def kv_bytes(config: RrtConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of the KV cache after `context` tokens, computed with `dtype`."""
    return read_plan(config).kv_bytes(context, dtype.itemsize)


def verify(folder: Path, expected: Reference, dtype: torch.dtype, from_disk: bool) -> tuple[float, dict]:
    """(the largest difference of a logit, and which exit guesses, if one does). Raises RrtcError as `check_loaded`
    does."""
    difference = check_loaded(folder, expected, dtype, from_disk=from_disk, trust_remote_code=True)
    file = folder / "generation_config.json"
    asked = read_json(file).get("speculate") if file.exists() else None
    return difference, {"speculate": asked} if asked else {}


def summary(config: RrtConfig) -> str:
    return "The shared weights are stored once." if read_plan(config).ties else ""


def limits(exported: dict, config: RrtConfig) -> str:
    plan = read_plan(config)
    return f"""- {"Tying saves memory and disk. " * plan.ties}{plan.savings} It passes through {len(config.visits)} \
layers, each with a place of its own in the cache.
- It is not the base model: what tying cost is above, as far as it was measured.
- transformers' own `assistant_early_exit` fails with models of the GPT-2 and GPT-NeoX kind, and leaves them \
changed: load the model again."""


def how_to_load(exported: dict, name: str, config: RrtConfig, chat: bool) -> str:
    """Markdown. exported: what the export measured. name: of its folder. chat: whether the tokenizer has a chat
    template."""
    code = [file for file in exported["files"] if file.endswith(".py")]
    remark = (
        f"`trust_remote_code` runs the {len(code)} Python files of this folder, which import nothing but torch and "
        "transformers; the tokenizer does without. Where rrtc is installed, `import rrtc.model` makes it unnecessary."
    )
    shown = in_transformers(exported, name, chat, remark, has_code=True) + _guessing(exported, config)
    return shown if "quantize" in exported else shown + _adapting(config)


def _guessing(exported: dict, config: RrtConfig) -> str:
    """What `generate` does with an exit that was trained."""
    if "speculate" not in exported:
        return ""
    return f"""

`generate` is faster where it can be: after {exported["speculate"]["exit"] + 1} of {len(config.visits)} layers an exit \
guesses the next tokens, and the other layers check several at once, on the same KV cache. The text is the same, also \
when it is sampled with the same seed, but where two tokens are equally good up to rounding. Where the exit is seldom \
right, it stops guessing; for several prompts at once, beams, scores or padding, it works as always. To switch it off: \
`model.generate(..., speculate=False)`, or `model.generation_config.speculate = False`. vLLM and SGLang have no such \
thing, and run all layers."""


def _adapting(config: RrtConfig) -> str:
    """How to train an adapter on top: a regex that names the shared matrices, and neither containers nor norms."""
    tied = {m: None for visit in config.visits for m in visit["ranks"] if visit["forms"].get(m, "tied") == "tied"}
    if not tied:
        return ""
    names = "|".join(re.escape(name) for name in tied)
    exits = r', exclude_modules=r".*\.exit"' if any(visit.get("exit") for visit in config.visits) else ""
    return f"""

With PEFT, adapt the shared matrices; each adapter then works in all layers that share the matrix:

```python
LoraConfig(r=16, target_modules=r".*\\.shared\\.({names})", task_type="CAUSAL_LM")
```

`target_modules="all-linear"{exits}` does the same for all matrices."""
