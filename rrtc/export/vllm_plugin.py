"""What vLLM calls in each of its processes where rrtc is installed (entry point vllm.general_plugins), so that it
serves the recursive form. Nothing else of rrtc imports vLLM, and the dense form needs none of this.

The model runs in vLLM's backend for transformers models. That backend wants an attention module of its own for each of
num_hidden_layers, which says its layer_idx and calls the attention interface once; a visit is a stock decoder layer
with a layer_idx of its own, so each has its place in the KV cache, while the shared matrices are there once. Left to
itself, vLLM would take the model for a multimodal one, because its config holds another; so the text backend is named.

Untested: no vLLM has run this. What its source (0.33) asks of the model is asserted in tests/test_vllm.py, which also
runs the model as that backend would, with stand-ins for its layers. In that version as it reads:

- one GPU. With tensor parallelism every matrix is replicated (there is no plan for it), and pipeline parallelism is
  refused (the layers that hold the weights are not one list);
- attention projections and gates are not fused, since their matrices are shared;
- a plan in which some layers have full matrices of their own and others of the same kind share theirs (forms "own")
  may be fused wrongly, because vLLM decides by class: use the dense form for it.
"""

ARCHITECTURE = "RrtForCausalLM"
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Tells transformers and vLLM of the architecture; as often as it is called."""
    from vllm import ModelRegistry

    import rrtc.model  # noqa: F401 - registers config and model with transformers' Auto classes

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # As a string, so that nothing touches CUDA before vLLM forks.
        ModelRegistry.register_model(ARCHITECTURE, BACKEND)
