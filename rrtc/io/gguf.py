"""Reading a model from a GGUF file, as safetensors."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rrtc.errors import RrtcError
from rrtc.io.folder import check_space
from rrtc.io.trust import check_counts, leads_outside
from rrtc.io.weights import missing_tensors


def dequantize(file: Path, folder: Path) -> None:
    """Writes the GGUF model `file` into `folder` as float32 safetensors with config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rrtc.machine import is_too_large, too_large
    from rrtc.stock.architecture import quiet_warnings

    with quiet_warnings(), _read_once():
        parameters = _gguf_parameters(file)
        if is_too_large(parameters, torch.float32):
            raise too_large("To be dequantized", parameters, torch.float32, "Name the model's safetensors instead.")
        check_space(folder, 4 * parameters)
        kind: Any = AutoModelForCausalLM  # for what is returned with output_loading_info, it has no types
        try:
            with tempfile.TemporaryDirectory() as alone:  # whatever else lies beside the file has no say
                Path(alone, "model.gguf").symlink_to(file.resolve())
                loaded, found = kind.from_pretrained(
                    alone, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
                )
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
        except Exception as error:  # gguf and transformers raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise RrtcError(f"The GGUF file {file} cannot be read: {reason}") from error
        if missing := missing_tensors(found):
            raise RrtcError(
                f"The GGUF file {file} has no {missing}, which its metadata ask for: it is damaged, or a part.",
                "Download all of it again.",
            )
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers refuses to save what it believes is still quantized
        if hasattr(config, "rms_norm_eps"):
            config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF stores 1e-5 as the nearest float32
        with torch.device("meta"):
            model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict(), assign=True)  # the same tensors: one model in memory
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    license = next(filter(Path.is_file, file.parent.glob("LICENSE*")), None)
    if license is not None and not leads_outside(license, file.parent):
        shutil.copyfile(license, folder / license.name)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads a GGUF file anew for its config, its weights and its tokenizer, every word of the vocabulary
    by itself, which is most of the work. Meanwhile whoever asks for a reader of a file gets the same one again."""
    import gguf

    reader = gguf.GGUFReader
    made: dict[str, Any] = {}

    def once(path, *others):
        real = os.path.realpath(path)
        if real not in made:
            made[real] = reader(path, *others)
        return made[real]

    vars(gguf)["GGUFReader"] = once
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = reader


def _gguf_parameters(file: Path) -> int:
    """How many numbers the GGUF file has. Raises RrtcError where it is damaged, or says absurd things."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        said = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except Exception as error:  # gguf raises many kinds
        raise RrtcError(f"The GGUF file {file} cannot be read: it is damaged.", "Download it again.") from error
    check_counts(said, file)
    if (parts := said.get("split.count", 1)) > 1:
        raise RrtcError(
            f"The GGUF file {file} is one of {parts} parts of a model, which rrtc does not put together.",
            "Join them with llama.cpp: llama-gguf-split --merge FIRST_PART WHOLE.gguf.",
        )
    return parameters
