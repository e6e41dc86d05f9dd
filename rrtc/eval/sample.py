"""A sample continuation, so that a reader sees what the numbers mean."""

import torch


def prompt_ids(tokenizer, prompt: str) -> torch.Tensor:
    """Token ids (1, length) of `prompt`, through the chat template where the tokenizer has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


SAID_AT_LEAST = 12  # tokens: a model that would stop at once still shows what it would say


@torch.inference_mode()
def sample(model, tokenizer, ids: torch.Tensor, length: int) -> str:
    """What `model` says next, greedily, in at most `length` tokens."""
    ids = ids.to(model.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=min(SAID_AT_LEAST, length),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=padding,
    )
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
