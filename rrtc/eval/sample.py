"""A sample continuation, so that a reader sees what the numbers mean."""

import torch
from transformers import GenerationConfig

from rrtc.errors import short
from rrtc.text.windows import longest_context

SAID_AT_LEAST = 12  # tokens: a model that would stop at once still shows what it would say


@torch.inference_mode()
def sample(model, tokenizer, prompt: str, tokens: int) -> str:
    """What `model` says next, greedily, in at most so many tokens, or in brackets why there is nothing to show.

    Of the model's own generation defaults, only the tokens that end a text are used: others, such as beams or
    penalties, would make something else of it.
    """
    try:
        ids = _prompt_ids(tokenizer, prompt).to(model.device)
    except Exception as error:  # a chat template is a program, which can fail in any way
        reason = short(error)
        return f"(no sample: the chat template fails with '{reason}')"
    if not ids.numel():
        return "(no sample: the prompt has no tokens)"
    if ids.max() >= (rows := model.get_input_embeddings().weight.shape[0]):
        return f"(no sample: the tokenizer knows token {ids.max()} and the model only {rows})"
    length = longest_context(model.config, ids.shape[1] + tokens) - ids.shape[1]
    if length <= 0:
        return "(no sample: the prompt leaves no room)"
    end = model.generation_config.eos_token_id if model.generation_config is not None else None
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=min(SAID_AT_LEAST, length),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=padding,
        )
    finally:
        model.generation_config = defaults
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _prompt_ids(tokenizer, prompt: str) -> torch.Tensor:
    """Token ids (1, length) of `prompt`, through the chat template where the tokenizer has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]
