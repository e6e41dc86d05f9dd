"""The part of a model card that says how the export is loaded."""

import re

from rrtc.export.forms import stock_class
from rrtc.model import RrtConfig

CHAT = """inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Why is the sky blue?"}], add_generation_prompt=True, return_tensors="pt"
)"""
TEXT = 'inputs = tokenizer("The sky is blue because", return_tensors="pt")'

# How to load the ONNX form, whose folder is called {name}.
ONNX_LOADING = """In a browser or in Node, with [transformers.js](https://huggingface.co/docs/transformers.js), from
version 3 on; `{name}` is this folder below `localModelPath`, or its id on the hub:

```js
import {{ env, pipeline }} from "@huggingface/transformers";

env.localModelPath = "./";
env.allowLocalModels = true;
const generator = await pipeline("text-generation", "{name}");
console.log(await generator("The sky is blue because", {{ max_new_tokens: 40, do_sample: false }}));
```

In Python, with `onnxruntime` and, for the tokenizer, `transformers`:

```python
import numpy
import onnxruntime
from transformers import AutoTokenizer

folder = "{name}"  # where this folder is
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(folder + "/onnx/model.onnx")
caches = [value for value in session.get_inputs() if value.name.startswith("past")]
past = {{value.name: numpy.zeros((1, value.shape[1], 0, value.shape[3]), "float32") for value in caches}}
tokens, done = list(tokenizer("The sky is blue because")["input_ids"]), 0
for _ in range(40):
    given = {{
        "input_ids": numpy.array([tokens[done:]]),
        "attention_mask": numpy.ones((1, len(tokens)), "int64"),
        "position_ids": numpy.arange(done, len(tokens))[None],
    }}
    logits, *present = session.run(None, given | past)
    past, done = dict(zip(past, present)), len(tokens)
    tokens.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(tokens, skip_special_tokens=True))
```"""

# How to run the GGUF form.
GGUF_LOADING = """With [llama.cpp](https://github.com/ggml-org/llama.cpp):

```sh
llama-cli -m {file} -p "The sky is blue because" -n 40{flag}
```

`llama-quantize {file} {name}-Q8_0.gguf Q8_0` makes a smaller file of it. In Python, with `llama-cpp-python`:

```python
from llama_cpp import Llama

model = Llama("{name}/{file}", n_ctx=2048, verbose=False)  # where this folder is
print(model("The sky is blue because", max_tokens=40, temperature=0)["choices"][0]["text"])
```"""


def how_to_load(exported: dict, name: str, config: RrtConfig, chat: bool) -> str:
    """Markdown. exported: what the export measured. name: of its folder. chat: whether the tokenizer has a chat
    template."""
    form = exported["format"]
    if form == "gguf":
        file = next(file for file in exported["files"] if file.endswith(".gguf"))
        return GGUF_LOADING.format(name=name, file=file, flag="" if chat else " -no-cnv")
    if form == "onnx":
        return ONNX_LOADING.format(name=name)
    needs = "Needs `transformers` (5.16 or later) and `torch`."
    if "quantize" in exported:
        needs = "Needs `transformers` (5.16 or later), `torch` and `compressed-tensors`."
    trust = ""
    if form == "recursive":
        trust = ", trust_remote_code=True"
        needs += (
            " `trust_remote_code` runs the two Python files of this folder, which import nothing but torch and "
            "transformers (the tokenizer's class reads the config, so it has to be told too). Where rrtc is installed, "
            "`import rrtc.model` makes it unnecessary."
        )
    else:
        needs += f" Nothing else: this is a stock `{stock_class(config)}`."
    return f"""{needs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # where this folder is
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
{CHAT if chat else TEXT}
output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```{_adapting(config) if form == "recursive" and "quantize" not in exported else ""}"""


def _adapting(config: RrtConfig) -> str:
    """How to train an adapter on top: a regex that names the shared matrices, and neither containers nor norms."""
    tied = {m: None for visit in config.visits for m in visit["ranks"] if visit["forms"].get(m, "tied") == "tied"}
    if not tied:
        return ""
    names = "|".join(re.escape(name) for name in tied)
    return f"""

With PEFT, adapt the shared matrices; each adapter then works in all layers that share the matrix:

```python
LoraConfig(r=16, target_modules=r".*\\.shared\\.({names})", task_type="CAUSAL_LM")
```"""
