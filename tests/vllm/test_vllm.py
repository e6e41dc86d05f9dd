"""The recursive form and vLLM. With a Python that has vLLM and rrtc in it, named by RRTC_VLLM_PYTHON: that vLLM
computes what transformers does. Without: what the source of its backend for transformers models (0.32, 0.33) asks of a
model, and a run of the model as that backend makes it, with stand-ins for vLLM's layers."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from exports import IDS, make_rrt, recipe
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from windowed import see_windows

from rrtc.errors import RrtcError
from rrtc.export import stage
from rrtc.model import RrtConfig, RrtForCausalLM, RrtModel
from rrtc.model.graft_rrt import RelaxedLinear
from rrtc.vllm import plugin as vllm_plugin

VARIABLE = "RRTC_VLLM_PYTHON"
HEADS = {"head_dim": 32}  # the smallest that vLLM's kernels for processors take

# Greedy tokens of vLLM and their log-probabilities. argv: folders and number formats, prompts, the file to write.
SERVE = """
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
cases, prompts, written = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}
sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
for folder, dtype in cases:
    llm = LLM(folder, dtype=dtype, max_model_len=96, enforce_eager=True, distributed_executor_backend="uni")
    outputs = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in prompts], sampling)]
    written[folder] = [[[t, p[t].logprob] for t, p in zip(o.token_ids, o.logprobs)] for o in outputs]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
open(sys.argv[3], "w").write(json.dumps(written))
"""


class Replicated(nn.Module):
    """In the place of vLLM's linear layers, which are no nn.Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Attention:
    """In the place of vLLM's attention of one layer, with a KV cache of its own. One sequence, all heads."""

    def __init__(self, sliding_window: int | None = None):
        self.keys = self.values = None
        self.sliding_window = sliding_window  # keys that a query sees, its own included

    def __call__(self, query, key, value, scaling):  # (1, heads, tokens, width) each
        self.keys = key if self.keys is None else torch.cat([self.keys, key], 2)
        self.values = value if self.values is None else torch.cat([self.values, value], 2)
        groups, new, past = query.shape[1] // key.shape[1], query.shape[2], self.keys.shape[2]
        keys, values = (x.repeat_interleave(groups, 1) for x in (self.keys, self.values))
        visible = torch.ones(new, past, dtype=torch.bool).tril(past - new)
        if self.sliding_window:
            visible = visible.triu(past - new - self.sliding_window + 1)
        return nn.functional.scaled_dot_product_attention(query, keys, values, visible, scale=scaling)


def attention_of_vllm(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    mixed = attention_instances[module.layer_idx](query, key, value, scaling)  # (1, heads, tokens, width)
    return mixed.transpose(1, 2).reshape(query.shape[2], -1), None


def replace_linears(module: nn.Module) -> int:
    """As vLLM's recursive_replace does: by the names of the children. Returns how many."""
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Replicated(child))
            replaced += 1
        else:
            replaced += replace_linears(child)
    return replaced


def own_first(folder: Path, **changes) -> Path:
    """As make_rrt, but the first visit, of whose class vLLM asks whether matrices can be fused, shares none of its
    matrices, and one that does comes second in its slot. The FFN of the last one is narrower."""
    make_rrt(folder, **changes)
    config = RrtConfig.from_pretrained(folder)
    first, last = config.visits[0], config.visits[-1]
    first["forms"], first["ranks"] = dict.fromkeys(first["ranks"], "own"), dict.fromkeys(first["ranks"], 0)
    wide, narrow = config.hidden_size, config.intermediate_size // 2
    last["forms"] = {f"mlp.{name}_proj": "low_rank" for name in ("gate", "up", "down")}
    last["shapes"] = dict.fromkeys(last["forms"], (wide, narrow)) | {"mlp.down_proj": (narrow, wide)}
    torch.manual_seed(0)
    model = RrtForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attention_of_vllm)


def as_vllm_builds(folder: Path) -> RrtModel:
    return build(AutoConfig.from_pretrained(folder))


def build(config: RrtConfig) -> RrtModel:
    config.get_text_config()._attn_implementation = "vllm"
    config.dtype = torch.float32
    with torch.device("meta"):
        model = AutoModel.from_config(config=config, dtype=torch.float32, trust_remote_code=False)
    assert type(model.get_decoder()) is RrtModel  # what vLLM compiles
    return model


@pytest.mark.parametrize("norms", ["per_visit", "shared"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "phi3", "gpt2"])
def test_the_backend_finds_one_attention_module_for_each_visit(architecture, norms, tmp_path, backend):
    model = as_vllm_builds(make_rrt(tmp_path, architecture, norms))
    assert RrtModel.is_backend_compatible() and RrtModel._can_set_attn_implementation()
    assert {"input_ids", "inputs_embeds", "position_ids"} <= inspect.signature(RrtModel.forward).parameters.keys()
    found = []
    for module in model.modules():
        source = inspect.getsource(type(module).forward)
        if "= ALL_ATTENTION_FUNCTIONS" in source:
            assert source.count(" attention_interface(") == 1
            assert module.config._attn_implementation == "vllm"
            found.append(module.layer_idx)
    assert sorted(found) == list(range(model.config.num_hidden_layers)) and all(type(i) is int for i in found)


def filled(model: RrtModel, whole: RrtForCausalLM) -> RrtModel:
    """`model`, which is on the meta device, with the weights of `whole`."""
    model = model.to_empty(device="cpu")
    given = {name.removeprefix("model."): tensor for name, tensor in whole.state_dict().items()}
    model.load_state_dict({name: given[name] for name in model.state_dict()})
    for name, buffer in whole.named_buffers():  # vLLM leaves buffers where they are
        model.get_buffer(name.removeprefix("model.")).copy_(buffer)
    return model


def in_steps(model: RrtModel, ids: torch.Tensor, instances: dict[int, Attention]) -> torch.Tensor:
    """The hidden states (1, tokens, width) of `ids` (1, 24), read in parts, each attention with its own cache."""
    return torch.cat(
        [
            model(
                input_ids=part, inputs_embeds=None, use_cache=False, position_ids=positions[None],
                attention_instances=instances, return_dict=False,
            )[0]
            for part, positions in zip(
                ids.split([20, 1, 1, 2], 1), torch.arange(ids.shape[1]).split([20, 1, 1, 2]), strict=True
            )
        ],
        1,
    )  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("norms", ["per_visit", "shared"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "smollm3"])
def test_it_computes_the_same_with_vllms_layers_and_one_kv_cache_for_each_visit(architecture, norms, tmp_path, backend):
    folder = make_rrt(tmp_path, architecture, norms)
    whole = RrtForCausalLM.from_pretrained(folder).eval()
    ids = IDS[:1]
    expected = whole(ids, output_hidden_states=True).hidden_states[-1]
    model = as_vllm_builds(folder).eval()
    assert replace_linears(model) == len({w for n, w in whole.named_parameters() if ".shared." in n and w.dim() == 2})
    instances = {number: Attention() for number in range(model.config.num_hidden_layers)}
    states = in_steps(filled(model, whole), ids, instances)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    assert {instance.keys.shape[2] for instance in instances.values()} == {ids.shape[1]}


class Backend(nn.Module):
    """In the place of vLLM's TransformersForCausalLM: it finds the attention modules by walking down the model, and
    makes attention layers by what the config says then."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.text_config = self.config.get_text_config()
        self.model = build(self.config)
        self.logits_processor = types.SimpleNamespace(scale=1.0)
        self.attention_fusers = {}
        self.recursive_replace()
        self.attention_instances = self.create_attention_instances()

    def recursive_replace(self):
        self.kinds = {path: type(module) for path, module in self.named_modules()}
        for path, module in self.named_modules():
            if "= ALL_ATTENTION_FUNCTIONS" in inspect.getsource(type(module).forward):
                self.attention_fusers[module.layer_idx] = path, "a fuser"

    def create_attention_instances(self):
        types = getattr(self.text_config, "layer_types", None)
        return {
            number: Attention(
                self.text_config.sliding_window if types and types[number] == "sliding_attention" else None
            )
            for number in range(self.text_config.num_hidden_layers)
        }


def config_for_vllm(folder: Path):
    return types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=AutoConfig.from_pretrained(folder)))


@pytest.fixture
def vllm_model(monkeypatch):
    """rrtc.vllm.model, with stand-ins for what it imports."""
    for name, content in {"config": {"VllmConfig": None}, "model_executor.models.transformers": {}}.items():
        module = types.ModuleType(f"vllm.{name}")
        vars(module).update(content or {"TransformersForCausalLM": Backend})
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "rrtc.vllm.model", raising=False)
    yield importlib.import_module("rrtc.vllm.model")
    del sys.modules["rrtc.vllm.model"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "granite"])
def test_vllm_finds_the_number_of_a_visit_and_no_other_in_the_name_of_its_attention(
    architecture, tmp_path, backend, vllm_model
):
    model = vllm_model.RrtForCausalLM(vllm_config=config_for_vllm(make_rrt(tmp_path, architecture)))
    assert model.attention_fusers.keys() == set(range(6))
    for number, (path, fuser) in model.attention_fusers.items():
        assert [int(part) for part in path.split(".") if part.isdigit()] == [number]
        assert (model.get_submodule(path).layer_idx, fuser) == (number, "a fuser")
    assert model.logits_processor.scale == (0.5 if architecture == "granite" else 1.0)


WHOLE = {"window": 8, "sinks": 0, "heads": []}  # as wide as those that the stock layers of pico models have


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "smollm3"])
def test_windows_of_whole_visits_are_vllms_windows(architecture, tmp_path, backend, vllm_model):
    folder = see_windows(make_rrt(tmp_path, architecture), (WHOLE, None))
    whole = RrtForCausalLM.from_pretrained(folder).eval()
    expected = whole(IDS[:1], output_hidden_states=True).hidden_states[-1]
    asked = config_for_vllm(folder)
    config = asked.model_config.hf_config
    before = {name: vars(config.base_config).get(name) for name in ("layer_types", "sliding_window")}
    for _ in range(2):  # as often as vLLM builds it
        made = vllm_model.RrtForCausalLM(vllm_config=asked)
    assert {name: vars(config.base_config).get(name) for name in before} == before
    assert [visit.get("attention") for visit in config.visits] == [v.get("attention") for v in whole.config.visits]
    windows = {number for number, instance in made.attention_instances.items() if instance.sliding_window == 8}
    own = {n for n, kind in enumerate(before["layer_types"] or []) if kind == "sliding_attention"}
    assert windows == own | {n for n, visit in enumerate(config.visits) if "attention" in visit} != own
    found = in_steps(filled(made.model.eval(), whole), IDS[:1], made.attention_instances)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    full = in_steps(made.model, IDS[:1], {number: Attention() for number in made.attention_instances})
    assert (full - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("architecture", "kinds", "sentence"),
    [
        (
            "llama",
            ({"window": 8, "sinks": 0, "heads": [1]},),
            "visits of which only some KV heads see a window",
        ),
        (
            "llama",
            (None, {"window": 8, "sinks": 2, "heads": []}),
            "KV heads that see the first tokens beyond their window",
        ),
        (
            "llama",
            (WHOLE | {"landmark": {"size": 2, "count": 1, "seed": 0}},),
            "KV heads that see blocks of tokens beyond their window",
        ),
        ("llama", (WHOLE, WHOLE | {"window": 9}), "whose layers have windows of 8 and 9 tokens: it knows one width"),
        ("gemma3", (WHOLE | {"window": 20},), "whose layers have windows of 8 and 20 tokens: it knows one width"),
    ],
)
def test_what_vllm_cannot_be_told_is_refused(architecture, kinds, sentence, tmp_path, backend, vllm_model):
    folder = see_windows(make_rrt(tmp_path, architecture), kinds)
    with pytest.raises(RrtcError, match=f"vLLM .*{sentence}"):
        vllm_model.RrtForCausalLM(vllm_config=config_for_vllm(folder))


def test_a_vllm_that_does_not_take_the_windows_is_noticed(tmp_path, backend, vllm_model, monkeypatch):
    folder = see_windows(make_rrt(tmp_path), (WHOLE,))
    monkeypatch.setattr(Backend, "create_attention_instances", lambda self: {n: Attention() for n in range(6)})
    with pytest.raises(RrtcError, match="This vLLM does not give layer 0 the window of 8 tokens that it has"):
        vllm_model.RrtForCausalLM(vllm_config=config_for_vllm(folder))


def test_modules_with_relaxed_matrices_have_a_class_of_their_own_for_vllm(tmp_path, backend, vllm_model):
    model = vllm_model.RrtForCausalLM(vllm_config=config_for_vllm(own_first(tmp_path)))
    holders = {False: set(), True: set()}
    for path, module in model.named_modules():
        if ".loops." in path and path.endswith((".self_attn", ".mlp")):
            holders[any(isinstance(child, RelaxedLinear) for child in module.children())].add(model.kinds[path])
    assert {kind.__name__ for kind in holders[False]} == {kind.__name__ for kind in holders[True]}
    assert not holders[False] & holders[True] and len(holders[True]) == 2


@torch.inference_mode()
def test_tables_in_rows_reach_vllm_as_floating_point_numbers(tmp_path, backend, vllm_model, monkeypatch):
    config = RrtConfig.from_pretrained(make_rrt(tmp_path))
    config.table_bits = 8
    whole = RrtForCausalLM(config).eval()
    for table in (whole.get_input_embeddings().table, whole.get_output_embeddings().table):
        table.numbers.random_(-128, 128)
        table.scale.uniform_(0.001, 0.002)
    whole.save_pretrained(tmp_path)
    given = {}
    monkeypatch.setattr(Backend, "load_weights", lambda self, weights: given.update(weights), raising=False)
    made = vllm_model.RrtForCausalLM(vllm_config=config_for_vllm(tmp_path))
    assert made.config.table_bits == 8 and type(made.model.get_input_embeddings()) is nn.Embedding
    made.load_weights(iter(sorted(whole.state_dict().items(), key=lambda item: item[0][::-1])))
    assert not any(".table." in name for name in given)
    config = RrtConfig.from_pretrained(tmp_path)
    config.table_bits = None
    plain = RrtForCausalLM(config).eval()
    plain.load_state_dict(given)
    torch.testing.assert_close(plain(IDS).logits, whole(IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"needs a Python with vLLM and rrtc, named by {VARIABLE}")
def test_vllm_computes_what_transformers_does(tmp_path):
    own = own_first(tmp_path / "own", **HEADS)
    dense, int4 = tmp_path / "dense", tmp_path / "int4"
    stage.export(str(own), str(dense), recipe(format="dense"))
    even = make_rrt(tmp_path / "even", hidden_size=64, intermediate_size=96, **HEADS)
    stage.export(str(even), str(int4), recipe(quantize="int4", calibrate_tokens=512))
    tolerances = {
        own: 1e-4,  # before the others: vLLM decides by class, once in a process
        dense: 1e-4,
        make_rrt(tmp_path / "llama", "llama", "shared", **HEADS): 1e-4,
        make_rrt(tmp_path / "gemma3", "gemma3", **HEADS): 1e-4,  # windows of 8 tokens
        make_rrt(tmp_path / "granite", "granite", hidden_size=128): 1e-4,  # divides its logits
        see_windows(make_rrt(tmp_path / "windows", **HEADS), (WHOLE, None)): 1e-4,
        int4: 0.1,  # in bfloat16, the only format that all of vLLM's kernels for it compute in
    }
    formats = {folder: "bfloat16" if folder == int4 else "float32" for folder in tolerances}
    prompts = [[(i * 37 + start) % 320 for i in range(24 + 5 * start)] for start in range(3)]
    file = tmp_path / "tokens.json"
    subprocess.run(
        [os.environ[VARIABLE], "-c", SERVE, json.dumps([(str(f), d) for f, d in formats.items()]),
         json.dumps(prompts), str(file)],
        env=os.environ | {
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        },
        check=True,
    )  # fmt: skip
    served = json.loads(file.read_text())
    for folder, tolerance in tolerances.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, formats[folder])).eval()
        for prompt, pairs in zip(prompts, served[str(folder)], strict=True):
            tokens, found = [token for token, _ in pairs], torch.tensor([value for _, value in pairs])
            assert len(tokens) == 24
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            # Another token than transformers' is only one that it thinks as good.
            assert (expected.amax(-1) - chosen).max() <= tolerance, folder.name
            torch.testing.assert_close(found, chosen, atol=tolerance, rtol=0, msg=lambda m, f=folder: f"{f.name}: {m}")


def test_the_plugin_registers_the_text_backend_once(monkeypatch):
    registered = {}
    registry = types.SimpleNamespace(
        get_supported_archs=registered.keys,
        register_model=lambda architecture, where: registered.setdefault(architecture, []).append(where),
    )
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    vllm_plugin.register()
    vllm_plugin.register()
    assert registered == {"RrtForCausalLM": [vllm_plugin.BACKEND]}


@pytest.mark.slow
def test_the_entry_point_names_it_and_nothing_else_of_rrtc_imports_vllm():
    root = Path(__file__).parents[2]
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = points["rrtc"].partition(":")
    assert getattr(importlib.import_module(module), function) is vllm_plugin.register
    code = "import sys, rrtc.vllm.plugin; print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    asking = {file.name for file in (root / "rrtc").rglob("*.py") if "vllm import" in file.read_text()}
    assert asking == {"plugin.py"} and importlib.util.find_spec(vllm_plugin.BACKEND.partition(":")[0])
    asking = {file.name for file in (root / "rrtc").rglob("*.py") if "from vllm." in file.read_text()}
    assert asking == {"model.py"}
