"""The check before an export is called done: the written folder is loaded in a fresh process, and its logits are
compared with those of the model in memory. (One that is quantized is compared before that with the model it is made
from, and after it with the quantized one in memory.)

Where the export is rounded to 16 bits, the model in memory is given the same rounding (each tensor, or each W' + B·A,
not its parts, for a format in which they are multiplied out), so that the two must agree up to float32 arithmetic, and
the tolerance can be tight enough to catch one damaged matrix. What the rounding itself costs is measured beside it.
Only one model is in memory at a time, here or there; one that is too large for that is read from its files matrix by
matrix, in both places, as it is computed with.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from rrtc.errors import RrtcError
from rrtc.io.source import load_tokenizer, read_config
from rrtc.model import RrtForCausalLM
from rrtc.model.graft_rrt import RelaxedLinear
from rrtc.plan import read_visits
from rrtc.stock.architecture import attending_to_everything, windows_of
from rrtc.text.windows import longest_context

TEXT = "The quick brown fox jumps over the lazy dog, 1234567890 times."
ROWS, TOKENS = 2, 48
PROMPT, NEW_TOKENS = 8, 32  # of greedy generation
FAILED = "The export was written, but it is not the model it was made from: "
HINT = "This is a fault in rrtc: please report it with the model's config."
# Largest difference of a logit, as a part of the largest logit. In 16 bits a last digit of a product W' + B·A can round
# the other way when its sum is taken in another order.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# A model with a few huge states passes rounding on, enlarged, and two correct programs differ by more than that. NOISE
# times what the errors of its sums in float32 move a logit is allowed, too, up to MOST_NOISE of the largest logit.
NOISE, MOST_NOISE = 4, 0.01


@dataclass(frozen=True)
class Reference:
    """What the exported model must compute for `ids` (rows, tokens): `logits` (rows, tokens, vocabulary), float32, of
    the last TOKENS of them.

    rounding: how far the written dtype alone moves a logit at most. text_ids: the token ids of TEXT. noise: how far
    errors as large as those of sums in float32 move a logit.
    greedy: for a format that generates, the tokens that transformers' greedy generation adds to PROMPT tokens of the
    first row, and beside each by how much its logit surpassed the second largest.
    frequencies: for such a format, those of the model's rotary embedding, where it has one that does no more. window:
    as `shortest_window` has it, of the base model.
    """

    ids: Tensor
    logits: Tensor
    rounding: float
    text_ids: list[int]
    noise: float
    greedy: list[tuple[int, float]] = ()
    frequencies: Tensor | None = None
    window: int = 0

    def allowed(self, dtype: torch.dtype) -> float:
        """The largest difference of a logit that an export in `dtype` may have."""
        scale = self.logits.abs().max().item()
        return max(TOLERANCE[dtype] * scale, min(NOISE * self.noise, MOST_NOISE * scale))


def reference(
    folder: Path,
    dtype: torch.dtype | None,
    from_disk: bool = False,
    products: bool = False,
    generates: bool = False,
    windows: bool = True,
) -> Reference:
    """Runs the recursive model in `folder`, rounded to `dtype` (None: as the folder has it) as the export will be.

    from_disk: no more of it is in memory than the matrix that computes. products: each W' + B·A is rounded, not its
    parts. generates: greedy text is wanted too. windows: as in `loaded`. Raises RrtcError for a folder whose weights
    are not those its config tells of, or whose model computes no numbers.
    """
    text_ids = load_tokenizer(folder)(TEXT)["input_ids"]
    with placed(from_disk) as there:
        model = loaded(folder, there, windows)
        ids = fixed_ids(model.config)
        logits = logits_of(model, ids)
        if not torch.isfinite(logits).all():
            raise RrtcError(f"The model in {folder} computes NaN or infinity.", "Its weights are damaged.")
        rounded = logits
        if dtype not in (None, torch.float32):
            _round_when_run(model, dtype, products)
            rounded = logits_of(model, ids)
        greedy = greedy_of(model, ids[:1, :PROMPT]) if generates else ()
        frequencies = _frequencies_of(model) if generates else None
        window = shortest_window(model.config.base_config)
        _move_when_run(model)
        noise = (logits_of(model, ids) - rounded).abs().max().item()
    return Reference(ids, rounded, (rounded - logits).abs().max().item(), text_ids, noise, greedy, frequencies, window)


def loaded(folder: Path, there: dict, windows: bool = True) -> RrtForCausalLM:
    """The recursive model in `folder`, in float32 and eval mode. there: what `placed` gives. windows: whether visits
    see the windows that they have there, or everything. Raises RrtcError as `reference` does."""
    config = read_config(folder)
    try:
        model, info = RrtForCausalLM.from_pretrained(
            folder, config=config if windows else attending_to_everything(config), dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True, **there,
        )  # fmt: skip
    except (LookupError, TypeError, ValueError) as error:  # of the model class, about visits that cannot be
        raise RrtcError(f"The config in {folder} does not describe a model: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            name = sorted(map(str, info[kind]))[0]
            raise RrtcError(f"{folder} does not hold the weights of its config: {kind.removesuffix('_keys')} {name}.")
    return model.eval()


def fixed_ids(config) -> Tensor:
    """Token ids (rows, tokens) spread over the whole vocabulary, the same every time. Where visits see a window, the
    last TOKENS of them do not see the first."""
    visits = read_visits(getattr(config, "visits", ()))
    kept = max((visit.attention.most + 1 for visit in visits if visit.attention), default=0)
    tokens = longest_context(config, TOKENS + kept)
    return (torch.arange(ROWS * tokens) * 7919 % config.get_text_config().vocab_size).view(ROWS, tokens)


@torch.inference_mode()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the last TOKENS of them, (rows, tokens, vocabulary), float32."""
    return model(ids, use_cache=False, logits_to_keep=TOKENS).logits.float()


def greedy_of(model: nn.Module, prompt: Tensor) -> list[tuple[int, float]]:
    """The tokens that greedy generation adds to `prompt` (1, tokens), at most NEW_TOKENS of them, and the lead of each
    one's logit over the second largest. What the model's own generation defaults ask for is left aside."""
    model.generation_config = GenerationConfig()
    new = longest_context(model.config, prompt.shape[1] + NEW_TOKENS) - prompt.shape[1]
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(output.logits)[:, 0].float().topk(2).values
    return list(zip(output.sequences[0, prompt.shape[1] :].tolist(), (best[:, 0] - best[:, 1]).tolist(), strict=True))


def shortest_window(config: PreTrainedConfig) -> int:
    """The fewest tokens that a layer of a stock model sees, where that is less than the model can; otherwise 0."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min((window for window in windows_of(config) if 0 < window < (context or math.inf)), default=0)


def rotary_of(model: nn.Module) -> list[nn.Module]:
    """Its rotary embeddings, those that have one set of frequencies."""
    return [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]


def _frequencies_of(model: nn.Module) -> Tensor | None:
    match rotary_of(model):
        case [one] if getattr(one, "attention_scaling", 1.0) == 1.0:
            return one.inv_freq.float()
    return None


def _round_when_run(model: nn.Module, dtype: torch.dtype, products: bool) -> None:
    """Has each module of a float32 model round its own parameters to what `dtype` can hold before it computes: later
    may be the first time that they are in memory. products: as the dense format is rounded, each W' + B·A, not its
    parts."""
    for module in model.modules():
        name = _forward_of(module)
        if isinstance(module, RelaxedLinear) and products:
            setattr(module, name, _product_forward(module, dtype))
        elif list(module.parameters(recurse=False)):
            change = partial(_round, dtype=dtype)
            setattr(module, name, _changed_forward(module, getattr(module, name), change))


def _move_when_run(model: nn.Module) -> None:
    """Has each module of a float32 model move its own parameters, before it computes, by as much as a sum of products
    with them is wrong: each by half a last digit times the root of how many are summed (Higham 2002, §2.8), up or
    down."""
    change = partial(_move, chance=torch.Generator().manual_seed(0))
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            name = _forward_of(module)
            setattr(module, name, _changed_forward(module, getattr(module, name), change))


def _forward_of(module: nn.Module) -> str:
    """accelerate's hook, which reads the parameters from disk, comes first."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _round(parameter: Tensor, dtype: torch.dtype) -> None:
    parameter.copy_(parameter.to(dtype))


def _move(parameter: Tensor, chance: torch.Generator) -> None:
    summed = parameter.shape[-1] if parameter.dim() > 1 else 1
    half = 2.0**-24 * summed**0.5
    parameter.mul_(1 + half * (2 * torch.rand(parameter.shape, generator=chance) - 1))


def _changed_forward(module: nn.Module, forward, change: Callable[[Tensor], None]):
    def changed(*args, **kwargs):
        for parameter in module.parameters(recurse=False):
            change(parameter)
        return forward(*args, **kwargs)

    return changed


def _product_forward(module: RelaxedLinear, dtype: torch.dtype):
    def forward(x: Tensor) -> Tensor:  # (..., inputs) -> (..., outputs)
        weight, bias = module.B @ module.A if module.rank else 0, module.bias
        if module.shared is not None:
            shared = module.shared()
            with align_module_device(shared):
                weight, bias = shared.weight + weight, shared.bias if bias is None else bias
        if module.gain is not None:
            weight = module.gain[:, None] * weight
            bias = bias if module.bias is not None or bias is None else module.gain * bias
        bias = None if bias is None else bias.to(dtype).float()
        return nn.functional.linear(x, weight.to(dtype).float(), bias)

    return forward


@contextlib.contextmanager
def placed(from_disk: bool) -> Iterator[dict]:
    """What from_pretrained is told so that the model stays in its files, where it should."""
    with tempfile.TemporaryDirectory(prefix="rrtc-verify-") as scratch:
        # accelerate asks for the folder, and writes nothing into it where the weights are safetensors already.
        yield {"device_map": {"": "disk"}, "offload_folder": scratch} if from_disk else {}


def check_loaded(
    folder: Path,
    expected: Reference,
    dtype: torch.dtype,
    *,
    program: str = "reload.py",
    hint: str = HINT,
    needs_tokenizer: bool = True,
    from_disk: bool = False,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    frequencies: Tensor | None = None,
) -> float:
    """Loads the export in `folder` in a fresh process, by `program`, and returns the largest difference of a logit.

    dtype: the dtype most of it is written in. hint: for the user, where it is another model. needs_tokenizer:
    whether it is a failure that transformers cannot build the tokenizer of a GGUF file. from_disk: as in `reference`.
    gguf_file: the file's name, for that format. frequencies: what its rotary embedding is to have there.

    Raises RrtcError where the folder does not load, where a tensor is missing or left over, where the tokenizer is
    another one, where a logit differs by more than is allowed, or where greedy generation, if it is compared (with the
    model in memory, or, where an exit guesses, with the same model without that), takes another token that is not as
    good up to that.
    """
    about = {
        "folder": str(Path(folder).absolute()),
        "gguf_file": gguf_file,
        "trust_remote_code": trust_remote_code,
        "from_disk": from_disk,
        "frequencies": None if frequencies is None else frequencies.tolist(),
    }
    report, logits = in_fresh_process(
        program,
        about,
        expected,
        "The export was written, but does not load in a fresh process: ",
        "Where memory ran out, free some; otherwise this is a fault in rrtc: please report it.",
    )
    if report["problems"]:
        raise RrtcError(f"{FAILED}on loading, {', '.join(report['problems'][:3])}.", hint)
    if report["token_ids"] is None and needs_tokenizer:
        raise RrtcError(
            "The GGUF file was written, but transformers cannot build its tokenizer, so nothing says that it is right.",
            "Have llama.cpp check it: pip install rrtc[gguf]",
        )
    if report["token_ids"] not in (expected.text_ids, None):
        raise RrtcError(f"{FAILED}its tokenizer gives other tokens.", hint)
    if not report.get("hidden_difference", 0.0) <= TOLERANCE[dtype]:
        raise RrtcError(f"{FAILED}AutoModel and AutoModelForCausalLM compute different things.", hint)
    difference = check_logits(logits, expected, dtype, hint)
    within = expected.allowed(dtype)
    if "guessed" in report:
        plain = replace(expected, greedy=report["greedy"])
        equal_tokens(plain, report["guessed"], within, f"{FAILED}with guesses of its exit, ", hint)
    elif "greedy" in report:
        equal_tokens(expected, report["greedy"], within, FAILED, hint)
    return difference


def check_logits(found: Tensor, expected: Reference, dtype: torch.dtype, hint: str = HINT) -> float:
    """The largest difference of a logit. Raises RrtcError, with `hint`, where an export in `dtype` may not differ by so
    much, or that is no number."""
    difference, scale = (found - expected.logits).abs().max().item(), expected.logits.abs().max().item()
    if not difference <= expected.allowed(dtype):
        raise RrtcError(f"{FAILED}a logit differs by {difference:.3g}, and the largest is {scale:.3g}.", hint)
    return difference


def equal_tokens(expected: Reference, found: list[int], within: float, failed: str, hint: str) -> int:
    """How many of the greedy tokens are also `found`, up to the first that is not. Raises RrtcError, which begins with
    `failed`, where that one's lead over the second best was more than `within`: a logit's rounding. Otherwise the two
    were equally good, and from there on the texts are different ones."""
    for number, ((token, lead), other) in enumerate(zip(expected.greedy, found, strict=True)):
        if token != other:
            if lead > within:
                raise RrtcError(f"{failed}greedy generation differs from token {number + 1} on.", hint)
            return number
    return len(found)


def in_fresh_process(program: str, about: dict, expected: Reference, failed: str, hint: str) -> tuple[dict, Tensor]:
    """(what `program`, a file in fresh/, reports; the logits it computed) on a job of `about` and the inputs of
    `expected`. Raises RrtcError as `run_fresh` does."""
    with tempfile.TemporaryDirectory(prefix="rrtc-verify-") as scratch:
        job = about | {
            "ids": expected.ids.tolist(),
            "logits_to_keep": expected.logits.shape[1],
            "text": TEXT,
            "prompt": expected.ids[0, :PROMPT].tolist(),
            "new_tokens": len(expected.greedy),
            "scratch": f"{scratch}/offloaded",
            "logits": f"{scratch}/logits.safetensors",
        }
        return run_fresh(program, job, failed, hint), load_file(job["logits"])["logits"]


def run_fresh(program: str, job: dict, failed: str, hint: str) -> dict:
    """What `program`, a file in fresh/, reports on `job`, in a process of its own. It asks nobody on the network, and
    works in a temporary folder, which goes. Raises RrtcError, which begins with `failed`, where it ends with an
    error."""
    with tempfile.TemporaryDirectory(prefix="rrtc-verify-") as scratch:
        report = Path(scratch, "report.json")
        Path(scratch, "job.json").write_text(json.dumps(job | {"report": str(report)}))
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        child = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).parent / "fresh" / program), f"{scratch}/job.json"],
            cwd=scratch, env=os.environ | offline, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or [f"it ended with code {child.returncode}"])[-1][:300]
            raise RrtcError(f"{failed}{reason.rstrip('.')}.", hint)
        return json.loads(report.read_text())
