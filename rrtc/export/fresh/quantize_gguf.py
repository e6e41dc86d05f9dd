"""Quantizes a GGUF file by llama.cpp's own quantizer. A program of its own: that may abort its process.

    python -P quantize_gguf.py JOB.json

JOB.json: file, target (the file to write), type (of llama.cpp's, such as Q4_K_M), importance (safetensors: for
tensors of the file, by their names there, the mean squares of their inputs, (inputs,) float32; null for none), and
`report`, JSON with `version`, that of llama-cpp-python, to write.
"""

import ctypes
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["rrtc"] = None  # "import rrtc" now fails, installed or not


def main(job: dict) -> dict:
    import llama_cpp
    from safetensors.numpy import load_file

    said: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level, text, data):
        said.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['type']}")
    importance = load_file(job["importance"]) if job["importance"] else {}
    # An array that ends with an entry without a name.
    entries = (llama_cpp.llama_model_imatrix_data * (1 + len(importance)))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(job["file"].encode(), job["target"].encode(), params):
        sys.exit("".join(said).strip().splitlines()[-1])
    return {"version": llama_cpp.__version__}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["report"]).write_text(json.dumps(main(job)))
