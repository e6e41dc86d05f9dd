"""The section `export` of a recipe."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rrtc.recipe.section import OWN_TEXT, Amount, Section

# What each format can be quantized to.
NUMBERS = {
    "recursive": ("int8", "int4"),
    "dense": ("int8", "int4"),
    "onnx": ("int8", "int4"),
    "gguf": ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m"),
}


class ExportRecipe(Section):
    """The format in which the model leaves."""

    format: Literal["recursive", "dense", "onnx", "gguf"] = Field(
        "recursive",
        description="recursive: small, shared weights stored once; dense: the stock architecture; onnx: small, for "
        "ONNX Runtime and transformers.js; gguf: dense, for llama.cpp, whose folder RRTC_LLAMA_CPP names.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights written; auto: as they are, or float32 for onnx."
    )
    max_shard_size: str = Field(
        "4GB",
        description="Largest size of the tensors in one weights file; for onnx 2GB at most, gguf is always one file.",
    )
    quantize: Literal["none", "int8", "int4", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m"] = Field(
        "none",
        description="Fewer bits. int8, int4: matrices, rounded by what all their uses see, and of the recursive form "
        "embeddings and output projection in 8 (compressed-tensors, which transformers and vLLM read); LoRA is not "
        "quantized, and chosen anew. The others are llama.cpp's, for gguf: all matrices, by its own quantizer.",
    )
    calibrate_on: list[str] = Field(
        [],
        description="For quantize: text to learn from, as uptrain's data; and for a format without windows, to measure "
        "a model on that has some. By default what the model was trained on, or calibrated on, as the folder names it: "
        "files are read, a dataset of the hub only where a recipe names it too.",
    )
    calibrate_tokens: Amount = Field(16_384, ge=1, le=10**12, description="For quantize: tokens of that text in all.")
    calibrate_context: int = Field(512, ge=8, le=10**9, description="For quantize: tokens in one window of that text.")
    text_field: str = Field(
        "text", description="The field of a row that holds it; else messages or conversations, as chat data has."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="For quantize: which pieces of that text are taken.")

    @model_validator(mode="after")
    def _check_quantize(self) -> "ExportRecipe":
        if self.quantize not in ("none", *(known := NUMBERS[self.format])):
            about = f"quantize {self.quantize} is not for the format {self.format}"
            raise ValueError(f"{about}: there it is one of {', '.join(known)}")
        if self.quantize != "none" and OWN_TEXT in self.calibrate_on:
            raise ValueError(f"quantizing learns from text that there is, so calibrate_on cannot be {OWN_TEXT}")
        return self

    @field_validator("calibrate_on", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
