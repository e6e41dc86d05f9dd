"""What the functions of rrtc/api return, and the commands write with --json: plain dictionaries, key by key.

Sizes are in bytes, losses in nats per token, times in seconds. A share is a number from 0 to 1.
"""

from typing import Any, NotRequired, TypedDict

Report = dict[str, Any]  # of an evaluation; its schema, which other programs read too, is in rrtc/io/report.py


class VisitResult(TypedDict):
    """One use of a slot, which stands for one layer of the dense model."""

    layer: int  # of the dense model
    slot: int  # whose shared weights it uses
    loop: int  # its place among the visits of that slot
    ranks: dict[str, int]  # LoRA rank of each matrix, by its path in the layer; 0: none
    forms: dict[str, str]  # of the matrices that are not "tied": "low_rank" or "own"
    shapes: dict[str, tuple[int, int]]  # (inputs, outputs) of the matrices that are smaller than in the dense layer
    attention: NotRequired[dict[str, Any]]  # as Attention.fields; absent where all heads see everything


class PlanResult(TypedDict):
    """Of `plan`, and of `rrtc init --dry-run`."""

    model: str  # as it was named
    model_type: str  # the dense model's architecture, as transformers calls it
    dtype: str  # the dtype that init would write
    recipe: dict[str, Any]  # the section init, with what its defaults stand for
    params_total: int | None  # None, as the next, where a size is counted in fewer bits and met by measuring
    params_non_embedding: int | None
    dense_params_total: int
    dense_params_non_embedding: int
    # By part: embeddings, head, shared, own, lora, low_rank, norms_and_biases; None where a budget is met by
    # measuring, as the next None ones.
    params_by_part: dict[str, int] | None
    bytes: int  # of the weights in that dtype; with quantize, of the export
    dense_bytes: int  # of the dense model's in the same
    source_bytes: int | None  # of the GGUF file that the dense model is read from; None where it is none
    flops_per_token: int | None  # of a forward pass, without attention over the context
    dense_flops_per_token: int
    kv_bytes_per_token: int  # that a token takes in the KV cache where nothing is let go of
    dense_kv_bytes_per_token: int
    kv_bytes: dict[int, int]  # of the KV cache, by the number of tokens in it
    dense_kv_bytes: dict[int, int]
    windows: str | None  # what a KV budget makes of the heads, in a sentence; None without one
    visits: list[VisitResult] | None
    init_peak_bytes: int  # memory that init will take, about


class LossResult(TypedDict):
    """The loss before any training."""

    tokens: int  # that were scored
    dense: NotRequired[float]
    given: NotRequired[float]  # in its place, of a model that was recursive already, before its attention was planned
    after_init: float


class AlternativeResult(TypedDict):
    """One way to tie the layers of a model, or none of them, at one size."""

    way: str  # in words
    flags: str  # of `rrtc init`, that choose it
    made: bool  # whether it is what init made; of the others a part of the slots was measured
    predicted_excess: float  # as in InitResult
    params_total: int
    flops_per_token: int
    exits: int  # places where it can be left early
    shared_params: int  # that several layers use


class InitResult(TypedDict):
    """Of `init`."""

    residual_energy_kept: NotRequired[dict[str, float]]  # tied as in the paper: share that LoRA restores, by matrix
    residual_energy_kept_by_layer: NotRequired[dict[int, float]]  # the same by layer of the dense model
    # What windows are predicted to cost, in nats a token; only with a KV budget, None where it is not measured.
    predicted_window_cost: NotRequired[float | None]
    kv_bytes: dict[int, int]  # of the KV cache, by the number of tokens in it
    dense_kv_bytes: dict[int, int]
    predicted_excess: NotRequired[float | None]  # a lower bound of what was lost on the calibration text
    alternatives: NotRequired[list[AlternativeResult]]  # with a size or a budget, where no pattern was asked for
    params_total: int
    params_non_embedding: int
    dense_params_total: int
    dense_params_non_embedding: int
    bytes: int  # of the weights
    dense_bytes: int  # of the dense model's in the same dtype
    bytes_on_disk: int  # of the weights files, headers and all
    quantized_bytes: NotRequired[int]  # of the weights that export will write with the quantize that was asked for
    flops_per_token: int  # of a forward pass, without attention over the context
    dense_flops_per_token: int
    source_bytes: int | None  # of the GGUF file that was read; None where it was none
    folded_norms: list[str]  # paths in the layer of the norms whose gains are in the matrices now
    loss: NotRequired[LossResult]  # not with measure_tokens=0
    seconds: float


class CacheResult(TypedDict):
    """Of an uptraining with a teacher cache."""

    windows: int  # different ones
    reused: int  # of them, that the cache had before
    bytes_per_token: float
    seconds: float


class UptrainResult(TypedDict):
    """Of `uptrain`. Other losses that were minimized, and those of exits, have a first_… and a last_… too."""

    tokens: int
    steps: int
    epochs: float | None  # times through the text; None where it was longer than what was used
    seconds: float
    tokens_per_second: float
    processes: int
    device: str  # cpu, cuda …
    learning_rate: float  # at its peak
    temperature: float  # at which the KL figures are
    exits: str  # how they were trained, or none
    lost_before: float | None  # nats a token that the model had lost before this run; None where that is not known
    text_sha256: dict[str, str]  # of each text that was read, by its name in the recipe
    arithmetic: str  # float32 or bfloat16
    teacher: str | None  # URI; None where there was none
    first_loss: float | None  # on the training text, the mean over the first twentieth of the steps; None where only
    last_loss: float | None  # linear attention or exits learned
    first_kl: float | None  # from the teacher; None where there was none
    last_kl: float | None
    teacher_cache: NotRequired[CacheResult]


class EstimateResult(TypedDict):
    """Of `estimate`, and of `rrtc uptrain --dry-run`."""

    steps: int
    tokens: int
    tokens_per_step: int
    learning_rate: float  # at its peak
    flops_per_token: int  # of training, without attention over the context
    flops_total: int
    measured_steps: int
    seconds_before: float  # in which gains are set and exits fitted
    seconds_per_step: float
    seconds_total: float  # of both, without loading
    peak_memory_bytes: int  # of one process: on the accelerator, or on a CPU all that it holds
    checkpoint_bytes: int  # disk space that checkpoints take on the way
    device: str
    # With `stability`, of each branch of each visit: layer, slot, loop, branch (the module that it ends in), the mean
    # variances dense_branch, dense_stream, tied_branch and tied_stream, and the gain (None where nothing is tied).
    profile: NotRequired[list[dict[str, Any]]]


class ExportResult(TypedDict):
    """Of `export`."""

    format: str  # recursive, dense, onnx or gguf
    dtype: str
    bytes: int  # of the weights files
    parameters: int  # shared ones once
    max_logit_difference: float  # of the export, loaded in a fresh process, from the model in memory
    largest_logit: float
    rounding_logit_difference: float  # what the dtype costs by itself
    # Of a format that attends to everything, where the model has windows: tokens and context that were scored, and the
    # losses of the model with its windows and with full attention.
    full_attention: NotRequired[dict[str, float]]
    speculate: NotRequired[dict[str, int]]  # recursive, where exits were trained: after which layer `generate` guesses
    quantize: NotRequired[str]  # int8 or int4, or for gguf one of llama.cpp's types
    bits_per_byte: NotRequired[dict[str, float]]  # of a quantized model, on held-out text: plain, nearest, calibrated
    parts: NotRequired[dict[str, dict[str, str | int]]]  # of a quantized model: number, bytes of layers, tables, rest
    without_window: NotRequired[int]  # gguf: the tokens that layers see, which the file says nothing of
    read_by: NotRequired[str]  # gguf: the package whose logits were compared
    llama_cpp: NotRequired[dict[str, Any] | None]  # gguf: what llama.cpp computed; None where it is not installed
    files: list[str]
    seconds: float
    pushed_to: NotRequired[str]  # URL


class RunResult(TypedDict):
    """Of `run`."""

    init: InitResult
    uptrain: UptrainResult
    eval: Report
    export: ExportResult


class TrainingPlanResult(TypedDict):
    """What a recipe says of its training, where the model can see as long a context as it names."""

    steps: int
    tokens: int
    flops_total: int | None  # without attention over the context; None where a budget is met by measuring


class RunPlanResult(TypedDict):
    """Of one run that `plan_run` describes, and `rrtc run --dry-run`."""

    recipe: dict[str, Any]  # whole, with what its defaults stand for
    plan: PlanResult
    uptrain: TrainingPlanResult


class SweptResult(TypedDict):
    """Of one run of a sweep."""

    folder: str  # that of the healed model
    init: InitResult
    uptrain: UptrainResult


class SweepResult(TypedDict):
    """Of `sweep`, and of `rrtc run --sweep`."""

    runs: dict[str, SweptResult]  # by name, such as rank=64
    report: Report


class AnswerResult(TypedDict):
    """What one model said."""

    model: str  # as it was named; of a dense original, as its rrtc.yaml names it
    chat_template: bool  # whether it was asked through its chat template; if not, it went on with the text
    text: str
    tokens: int
    seconds: float
    forgotten: int  # of the oldest questions, with their answers, because the model cannot see so far
    ended: str  # by itself, max_tokens, or context: the model can see no more


class ChatResult(TypedDict):
    """Of an answer in a conversation that `chat` began, and of `rrtc chat --prompt`."""

    prompt: str
    answers: list[AnswerResult]  # of the model, and of the one to compare it with


class GeneratedResult(TypedDict):
    """One of the answers of `generate`."""

    text: str
    tokens: int
    ended: str  # by itself, stopped (by a text that was to end it), max_tokens, or context: the model can see no more


class GenerateResult(TypedDict):
    """Of `generate`."""

    model: str  # as it was named
    answers: list[GeneratedResult]  # in the order of the prompts
    way: str  # full depth, speculation or early exits
    why: str  # where another way was looked at
    forecast: float | None  # times as fast as full depth, before it was tried; None where no way but that was looked at
    tokens: int  # of all answers that were made now
    seconds: float
    loops: int  # that a token of full depth goes through
    passes: int  # tokens that went through a loop, those of prompts included
    left: list[int]  # with early exits: tokens that were said after each loop, the last one included
    drafted: int  # tokens
    accepted: int  # of those


class ServeResult(TypedDict):
    """Of `serve`, when it has been stopped."""

    model: str  # the name by which clients ask for it
    url: str
    answered: int  # prompts that were answered to the end
    tokens: int  # that were said, those of other answers included
    seconds: float  # from when it listened


class BaseResult(TypedDict):
    """The dense model that a folder was made from."""

    uri: str
    path: str
    relative_path: str  # from the folder
    sha256: str
    bytes: int
    license: NotRequired[dict[str, Any]]  # empty where it is not known
    params_total: NotRequired[int]
    params_non_embedding: NotRequired[int]


class InspectResult(TypedDict):
    """Of `inspect`: what the folder's rrtc.yaml says, and what is read off its files."""

    folder: str
    rrtc: str  # version
    stage: str  # init, uptrain, eval or export
    path: str  # where it was written
    made: str  # when, ISO 8601
    versions: dict[str, str]  # of torch and transformers
    base: BaseResult
    recipe: dict[str, Any]  # model, and the sections that were used
    measured: dict[str, Any]  # by stage, as that stage returned it
    history: list[dict[str, str]]  # stage, path and made of the folders it was made from, oldest first
    dtype: NotRequired[str]  # these two where the folder holds a model
    bytes_on_disk: NotRequired[int]  # of the weights
    visits: NotRequired[list[VisitResult] | None]  # None for a dense form
    kv_bytes: NotRequired[dict[int, int]]  # of the KV cache, by the number of tokens in it, in the dtype of the weights
    dense_kv_bytes: NotRequired[dict[int, int]]
    report: NotRequired[Report]  # of an eval folder


class DeviceResult(TypedDict):
    """What rrtc would compute on."""

    type: str  # cpu, cuda …
    name: str
    count: int
    memory_bytes: int | None  # of one; None where it is not known


class EnvResult(TypedDict):
    """Of `env`: what a bug report should say."""

    rrtc: str  # version
    python: str
    platform: str
    packages: dict[str, str | None]  # versions; None where one is not installed
    device: DeviceResult
    cores: int | None
    memory_bytes: int
    cache_folder: str
