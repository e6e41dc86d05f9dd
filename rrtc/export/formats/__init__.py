"""The formats in which a model leaves, a file each. Each of these modules says all that is particular to its format:

    LIBRARY, TAGS      for the hub: the library that loads it, and its tags beside those of every export
    QUANTIZED_TAGS     for the hub: those that are added where it is quantized
    FROM_DISK          whether it can be made and checked without the whole model in memory
    TIMES_IN_MEMORY    how many times the model is in memory while it is made, in float32
    MULTIPLIED_OUT     whether each W' + B·A is one matrix in it, and rounded as one
    GENERATES          whether the fresh process that checks it also generates text greedily
    WINDOWS            whether visits see in it the windows that they have; else it attends to everything
    check              raises RrtcError where what the format takes is not installed, or the model cannot have it
    number_format      the dtype its tensors are cast to
    bytes_written      about how many bytes will be written
    write              writes it, without checking it
    write_quantized    writes it with its matrices in fewer bits; takes also the number format that the recipe names,
                       the texts to calibrate on and to score on, and what the model must compute before it is rounded.
                       Returns what `write` does, what it must compute now, and for the record bits_per_byte on held-out
                       text: plain, nearest (rounded without calibration) and calibrated (as it is written); and parts:
                       what is in which number format, and its bytes
    weights_bytes      the size of its weights files
    kv_bytes           the bytes of its KV cache at a context, in the number format it is computed with
    verify             loads it in a fresh process, and compares what that computes
    summary            for the card: what this format is
    limits             for the card: what it does not do
    how_to_load        for the card: code that loads it

What visits can have that a format does not carry is in rrtc/features.py. The other modules ask for a format by its name
here, and never by what the name is.
"""

from rrtc.export.formats import dense, gguf, onnx, recursive

FORMATS = {"recursive": recursive, "dense": dense, "onnx": onnx, "gguf": gguf}
