"""Models that are there: what rrtc says of one, and how it is loaded; one that is tied in memory; and the machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rrtc.api.call import Place, home, work
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.provenance import read_provenance
from rrtc.io.report import read_report
from rrtc.io.source import find_model, read_config
from rrtc.io.weights import Weights
from rrtc.plain import read_json
from rrtc.plan import read_visits
from rrtc.results import EnvResult, InspectResult
from rrtc.storage import said_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrtc.model import RrtForCausalLM
    from rrtc.plan import Plan


def inspect(folder: Place) -> InspectResult:
    """What rrtc.yaml says of `folder`, with the visits of its model, and its size on disk and its number formats where
    it holds a model. Needs no torch. Raises RrtcError where rrtc did not write the folder, or where its weights are
    damaged."""
    place = home(folder)
    path = Path(place)
    found: dict[str, Any] = {"folder": place} | read_provenance(path)
    exported = found["measured"].get("export") if found["stage"] == "export" else None
    exported = exported if isinstance(exported, dict) else {}
    if exported.get("format") in ("onnx", "gguf"):  # whose weights are no safetensors
        found["dtype"] = " and ".join(filter(None, (exported.get("quantize"), exported.get("dtype")))) or None
        found["bytes_on_disk"] = sum(file.stat().st_size for file in [*path.glob("onnx/*"), *path.glob("*.gguf")])
    elif (path / "config.json").exists():
        weights = Weights(path)
        quantized, parts = exported.get("quantize"), exported.get("parts")
        if quantized and isinstance(parts, dict) and parts and all(isinstance(part, dict) for part in parts.values()):
            found["dtype"] = said_numbers(parts)
        else:  # an rrtc that wrote no parts left all but the layers' matrices in the other format
            found["dtype"] = f"{quantized} and {exported.get('dtype')}" if quantized else weights.dtype
        found["bytes_on_disk"] = weights.bytes_on_disk
        found["visits"] = _visits(path / "config.json")
        of_init = found["measured"].get("windows") or found["measured"].get("init")
        if found["visits"] is not None and isinstance(of_init, dict):
            found |= {name: of_init[name] for name in ("kv_bytes", "dense_kv_bytes") if name in of_init}
    if found["stage"] == "eval":
        found["report"] = read_report(path)
    return cast(InspectResult, found)


def load(model: Place, dtype: Any = "auto", device: Any = "cpu") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """(model, tokenizer) of a folder that rrtc wrote, exported or not, or of any other model that rrtc reads.

    dtype: a torch.dtype or its name; "auto": as it is stored. The model is in eval mode. No code from the folder is
    run. To load an unexported folder with transformers alone, `import rrtc.model` first, which registers its classes.
    Raises RrtcError where there is no such model, where its files lack a tensor, or where it has no tokenizer;
    WrongUsage for a dtype that is none, and a device that this machine does not have.
    """
    _check_arithmetic(dtype, device)
    with work(False, ""):
        folder = find_model(home(model)).folder
        Weights(folder)  # refuses what it holds besides safetensors, and paths in its index
        from rrtc.io.source import load_model, load_tokenizer
        from rrtc.model import RrtConfig  # and with it the recursive model is registered
        from rrtc.stock.architecture import read_plan

        config = read_config(folder)  # raises for what transformers has no model for
        if isinstance(config, RrtConfig):
            read_plan(config)  # raises for visits that cannot be
        return load_model(folder, dtype=dtype).to(device), load_tokenizer(folder)


def _check_arithmetic(dtype: Any, device: Any) -> None:
    import torch

    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (dtype in ("auto", None) or isinstance(known, torch.dtype) and known.is_floating_point):
        raise WrongUsage(f"A model cannot have the dtype {dtype!r}.", "auto, float32, bfloat16 and float16 are some.")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:  # of what torch was built without, too
        raise WrongUsage(f"There is no device {device!r} here: {str(error).splitlines()[0]}") from error


def tie(model: "PreTrainedModel", plan: "Plan") -> "RrtForCausalLM":
    """The recursive model that `plan` makes of a dense `model` that is in memory, tied as in the paper (Average and
    SVD). `model` stays as it is.

        from rrtc.patterns import make_plan
        from rrtc.recipe.init import InitRecipe
        from rrtc.stock.architecture import read_architecture

        plan = make_plan(read_architecture(model.config), InitRecipe(loops=2, rank=64))
        recursive = api.tie(model, plan)

    Raises WrongUsage where the plan is of another architecture, or has forms that `init` alone can choose.
    """
    from rrtc.init.in_memory import tie_in_memory

    return tie_in_memory(model, plan)


def env() -> EnvResult:
    """What a bug report should say: versions, the machine, and where rrtc keeps what it can make again."""
    from rrtc.environment import describe_environment

    return describe_environment()


def _visits(file: Path) -> list[dict] | None:
    """The visits in a config.json, with all their fields; None where it is that of a dense model."""
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise RrtcError(f"The config {file} cannot be read.") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind is None or (kind != "rrt" and "auto_map" in values):
        read_config(file.parent)  # refuses it; or transformers knows the model, and needs no code from the folder
    if kind != "rrt":
        return None
    try:
        return [visit.fields() for visit in read_visits(values.get("visits"))]
    except ValueError as error:
        raise RrtcError(f"The config {file} of a 'rrt' model cannot be used: its visits are damaged.") from error
