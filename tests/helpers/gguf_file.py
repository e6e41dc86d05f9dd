"""A pico Llama as a GGUF file."""

import json

import gguf
import numpy
from pico import pico_model, pico_tokenizer

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(file, quantize: bool = False):
    """Writes a pico Llama as llama.cpp's converter would, in float32 or with matrices in Q8_0; returns the model."""
    model = pico_model("llama", hidden_size=64, intermediate_size=96, rms_norm_eps=1e-5)
    tokenizer = pico_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(learned["vocab"], key=learned["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(pair) for pair in learned["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, tensor in model.state_dict().items():
        path = name.removesuffix(".weight")
        prefix = ""
        if path.startswith("model.layers."):
            number, path = path.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        values = tensor.numpy()
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if path in heads:  # llama.cpp turns pairs of neighbors where transformers turns halves
            values = values.reshape(heads[path], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        values = numpy.ascontiguousarray(values)
        if quantize and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{prefix}{GGUF_NAMES[path]}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{prefix}{GGUF_NAMES[path]}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
