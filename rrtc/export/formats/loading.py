"""For the card: how transformers loads the recursive and the dense format."""

NEEDS = "Needs `transformers` (5.16 or later) and `torch`."
NEEDS_QUANTIZED = "Needs `transformers` (5.16 or later), `torch` and `compressed-tensors`."
CHAT = """inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Why is the sky blue?"}], add_generation_prompt=True, return_tensors="pt"
)"""
TEXT = 'inputs = tokenizer("The sky is blue because", return_tensors="pt")'


def in_transformers(exported: dict, name: str, chat: bool, remark: str, has_code: bool = False) -> str:
    """Markdown. exported: what the export measured. name: of its folder. chat: whether the tokenizer has a chat
    template. remark: what there is to say before the code. has_code: whether the model needs the folder's code; the
    tokenizer does not, and transformers asks at a terminal unless it is told."""
    told = {of: f", trust_remote_code={of == 'model'}" if has_code else "" for of in ("model", "tokenizer")}
    return f"""{NEEDS_QUANTIZED if "quantize" in exported else NEEDS} {remark}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # where this folder is
tokenizer = AutoTokenizer.from_pretrained(folder{told["tokenizer"]})
model = AutoModelForCausalLM.from_pretrained(folder{told["model"]})
{CHAT if chat else TEXT}
output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""
