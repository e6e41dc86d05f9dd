"""Folders made to harm: none of their code runs, no file outside them is read, and one sentence refuses them."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from gguf_file import write_gguf
from pico import pico_tokenizer, save_pico
from safetensors.torch import load_file
from typer.testing import CliRunner

from rrtc.cli.app import app
from rrtc.console import notes_shown
from rrtc.errors import RrtcError, WrongUsage
from rrtc.eval.candidates import check_holds_model
from rrtc.eval.stage import _curve
from rrtc.export import stage
from rrtc.export.formats import FORMATS
from rrtc.io.cache import cache_folder
from rrtc.io.license import find_license
from rrtc.io.provenance import read_provenance
from rrtc.io.source import find_base, find_model, load_tokenizer, read_config
from rrtc.io.trust import check_folder, text_of_folder
from rrtc.recipe.schema import Recipe, load_recipe

opened: list[str] = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


class Trap:
    """A folder outside the malicious ones, with files that must not be read, and a file that any code that runs
    makes."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.ran = folder, folder.parent / "code-ran"
        shutil.copytree(model, folder)
        (folder / "secret.safetensors").write_bytes((model / "model.safetensors").read_bytes())

    @property
    def code(self) -> str:
        return f"open({str(self.ran)!r}, 'w')\n"

    @property
    def tag(self) -> str:
        """YAML that runs code in whoever reads it carelessly."""
        return f"!!python/object/apply:builtins.exec [{json.dumps(self.code)}]"

    def check(self) -> None:
        assert not self.ran.exists()
        assert not [path for path in opened if path.startswith(str(self.folder) + os.sep)]


@pytest.fixture
def trap(dense, tmp_path) -> Iterator[Trap]:
    trap = Trap(tmp_path / "outside", dense("llama"))
    opened.clear()
    yield trap
    trap.check()


@pytest.fixture
def models(dense, rrt, tmp_path) -> tuple[Path, Path]:
    """Copies to spoil of a dense model and of an rrtc folder."""
    return tuple(shutil.copytree(folder, tmp_path / name) for name, folder in (("dense", dense("llama")), ("rrt", rrt)))


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def link(name: str) -> Callable:
    def make(folder: Path, trap: Trap) -> None:
        (trap.folder / name).touch()
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(os.path.relpath(trap.folder / name, folder))

    return make


def index(place: Callable[[Trap], str]) -> Callable:
    def make(folder: Path, trap: Trap) -> None:
        (folder / "model.safetensors").unlink()
        names = load_file(trap.folder / "secret.safetensors")
        values = {"metadata": {}, "weight_map": dict.fromkeys(names, place(trap))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(values))

    return make


def header(length: int, text: bytes = b"{}", data: int = 16) -> Callable:
    def make(folder: Path, trap: Trap) -> None:
        (folder / "model.safetensors").write_bytes((length or len(text)).to_bytes(8, "little") + text + bytes(data))

    return make


def entry(**values) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | values}).encode()


def pickled(folder: Path, trap: Trap) -> None:
    (folder / "model.safetensors").unlink()
    attack = f"cbuiltins\nexec\n(V{trap.code.strip()}\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(attack)


def adapter(folder: Path, trap: Trap) -> None:
    change_json(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(trap.folder))


def own_architecture(folder: Path, trap: Trap) -> None:
    (folder / "evil.py").write_text(trap.code)
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_json(folder / "config.json", model_type="evil", auto_map=code)


def other_weights(folder: Path, trap: Trap) -> None:
    names = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../outside/secret.safetensors"}})
    (folder / "my.safetensors.index.json").write_text(names)
    change_json(folder / "config.json", transformers_weights="my.safetensors.index.json")


def kernel(folder: Path, trap: Trap) -> None:
    change_json(folder / "config.json", attn_implementation="somebody/kernel")


def kernel_of_a_part(folder: Path, trap: Trap) -> None:
    change_json(folder / "config.json", base_config={"attn_implementation": "somebody/kernel"})


def tokenizer_elsewhere(folder: Path, trap: Trap) -> None:
    change_json(folder / "tokenizer_config.json", vocab_file=str(trap.folder / "tokenizer.json"))


def newer_tokenizer_elsewhere(folder: Path, trap: Trap) -> None:
    (trap.folder / "tokenizer.1.0.json").write_text("{}")
    change_json(folder / "tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.1.0.json"])


def sentencepiece_elsewhere(folder: Path, trap: Trap) -> None:
    inside = {"model_file": str(trap.folder / "tokenizer.json")}
    change_json(folder / "tokenizer_config.json", sp_model_kwargs=inside)


def damaged_tokenizer_config(folder: Path, trap: Trap) -> None:
    """It could not be looked through."""
    (folder / "tokenizer_config.json").write_text('{"x": ' + "[" * 5000 + "]" * 5000 + ', "vocab_file": "/etc/passwd"}')


def many_layers(folder: Path, trap: Trap) -> None:
    change_json(folder / "config.json", num_hidden_layers=10**9)


def many_layers_of_a_part(folder: Path, trap: Trap) -> None:
    change_json(folder / "config.json", text_config={"n_layer": 10**30})


def moved(change: Callable) -> Callable:
    """Other offsets of tensors in the header, the data as long as they say."""

    def make(folder: Path, trap: Trap) -> None:
        content = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        entries.pop("__metadata__", None)
        data = change(sorted(entries.values(), key=lambda e: e["data_offsets"]), data)
        text = json.dumps(entries).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)

    return make


def hole(entries: list[dict], data: bytes) -> bytes:
    entries[-1]["data_offsets"] = [offset + 8 for offset in entries[-1]["data_offsets"]]
    return data + bytes(8)


def overlap(entries: list[dict], data: bytes) -> bytes:
    norms = [e for e in entries if len(e["shape"]) == 1]
    norms[1]["data_offsets"] = norms[0]["data_offsets"]
    return data


def templates_elsewhere(folder: Path, trap: Trap) -> None:
    (trap.folder / "templates").mkdir(exist_ok=True)
    (trap.folder / "templates" / "default.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(trap.folder / "templates")


def pipe(folder: Path, trap: Trap) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def false_cache(folder: Path, trap: Trap) -> Path:
    """Looks like a snapshot in a hub's cache, but what should be the files beside it are elsewhere."""
    snapshot = folder.parent / f"{folder.name}-cache" / "models--a--b" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot.parents[1] / "blobs").symlink_to(trap.folder)
    (snapshot / "model.safetensors").symlink_to("../../blobs/secret.safetensors")
    return snapshot


ATTACKS: dict[str, tuple[Callable, str]] = {
    "index with ..": (index(lambda trap: "../outside/secret.safetensors"), "is no weights file in its folder"),
    "index with a path": (index(lambda trap: str(trap.folder / "secret.safetensors")), "is no weights file in its"),
    "weights as a link": (link("model.safetensors"), "link to a file outside"),
    "config as a link": (link("config.json"), "link to a file outside"),
    "tokenizer as a link": (link("tokenizer.json"), "link to a file outside"),
    "license as a link": (link("LICENSE"), "link to a file outside"),
    "chat templates as a link": (templates_elsewhere, "link to a file outside"),
    "false cache": (false_cache, "link to a file outside"),
    "pipe": (pipe, "neither a file nor a folder"),
    "header of 2^63 bytes": (header(2**63), "truncated or damaged"),
    "header of 2^64 - 1 bytes": (header(2**64 - 1), "truncated or damaged"),
    "header as long as the file": (header(18), "truncated or damaged"),
    "header of a million brackets": (header(0, b"[" * 1_000_000), "truncated or damaged"),
    "data before the file": (header(0, entry(data_offsets=[-(10**6), 16])), "truncated or damaged"),
    "data behind the file": (header(0, entry(data_offsets=[0, 10**15])), "truncated or damaged"),
    "shape below zero": (header(0, entry(shape=[-2, -2])), "truncated or damaged"),
    "absurd shape": (header(0, entry(shape=[10**30])), "truncated or damaged"),
    "shape of more than the data": (header(0, entry(shape=[5])), "truncated or damaged"),
    "no number format": (header(0, entry(dtype=None)), "truncated or damaged"),
    "pickles": (pickled, "as a pickle"),
    "adapter": (adapter, "holds an adapter"),
    "own architecture": (own_architecture, "needs Python code of its own"),
    "other weights": (other_weights, "names a weights file of its own"),
    "kernel": (kernel, "asks for code from a hub"),
    "kernel of a part": (kernel_of_a_part, "asks for code from a hub"),
    "tokenizer elsewhere": (tokenizer_elsewhere, "names a file outside it"),
    "newer tokenizer elsewhere": (newer_tokenizer_elsewhere, "names a file outside it (fast_tokenizer_files"),
    "sentencepiece elsewhere": (sentencepiece_elsewhere, "names a file outside it (model_file"),
    "damaged tokenizer config": (damaged_tokenizer_config, "tokenizer_config.json cannot be read"),
    "10^9 layers": (many_layers, "no model has more than 1,000"),
    "10^30 layers of a part": (many_layers_of_a_part, "no model has more than 1,000"),
    "tensors with a hole": (moved(hole), "truncated or damaged"),
    "tensors that overlap": (moved(overlap), "truncated or damaged"),
    "metadata that are no text": (header(0, entry()[:-1] + b', "__metadata__": {"a": 1}}'), "truncated or damaged"),
}


def fails(*arguments, says: str) -> None:
    """Runs a command that must fail with one sentence."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and says in errors[0], result.stderr


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_folder_is_refused_by_whatever_reads_it(attack, models, trap, tmp_path):
    spoil, says = ATTACKS[attack]
    dense, rrt = (spoil(folder, trap) or folder for folder in models)
    out = tmp_path / "written"
    opened.clear()
    fails("init", dense, "-o", out, "--rank", "4", "--measure-tokens", "0", says=says)
    fails("export", rrt, "-o", out, says=says)
    fails("export", rrt, "-o", out, "--format", "dense", says=says)
    fails("inspect", rrt, says=says)
    fails("eval", rrt, "-o", out, says=says)
    fails("uptrain", rrt, "-o", out, says=says)
    assert not list(tmp_path.glob("written*"))


@pytest.mark.slow
def test_code_that_is_not_needed_is_neither_run_nor_passed_on(models, trap, tmp_path):
    dense, rrt = models
    for folder in models:
        (folder / "tokenizer_evil.py").write_text(trap.code)
        (folder / "evil.py").write_text(trap.code)
        code = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
        pipelines = {"text-generation": {"impl": "evil.P", "pt": ["AutoModelForCausalLM"]}}
        change_json(folder / "config.json", auto_map=code, custom_pipelines=pipelines)
        change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenizer_evil.T", None]})
    inside = json.loads((rrt / "config.json").read_text())["base_config"]
    change_json(rrt / "config.json", base_config=inside | {"auto_map": code, "custom_pipelines": pipelines})
    arguments = ["init", str(dense), "-o", str(tmp_path / "out"), "--rank", "4", "--measure-tokens", "0"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    # The recursive form is loaded with trust_remote_code to be verified: what goes along with it would run here.
    stage.export(str(rrt), str(tmp_path / "recursive"), Recipe())
    (tmp_path / "stock").mkdir()
    FORMATS["dense"].write(rrt, tmp_path / "stock", torch.float32, 10**9)
    for folder in (tmp_path / name for name in ("out", "recursive", "stock")):
        assert not list(folder.glob("*evil*"))
        assert all("evil" not in file.read_text() for file in folder.glob("*.json"))
        assert load_tokenizer(folder)("Hello")["input_ids"] == pico_tokenizer()("Hello")["input_ids"]


def test_yaml_tags_are_not_obeyed(models, trap, tmp_path):
    rrt = models[1]
    said = (rrt / "rrtc.yaml").read_text()
    (rrt / "rrtc.yaml").write_text(f"{said}\nevil: {trap.tag}\n")
    for command in (["inspect"], ["eval"], ["export", "-o", tmp_path / "out"], ["uptrain", "-o", tmp_path / "out"]):
        fails(command[0], rrt, *command[1:], says="rrtc.yaml is damaged")
    (rrt / "README.md").write_text(f"---\nlicense: {trap.tag}\n---\n")
    assert find_license(rrt) == {}
    (tmp_path / "recipe.yaml").write_text(f"model: {trap.tag}\n")
    with pytest.raises(WrongUsage, match="is not valid YAML"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_yaml_that_does_not_end_is_refused(models, tmp_path):
    rrt = models[1]
    said = (rrt / "rrtc.yaml").read_text()
    for bomb in ("measured: &m\n  zz: *m\n", "measured:\n  a: &a [x, x]\n  b: [*a, *a]\n", "measured: " + "[" * 3000):
        (rrt / "rrtc.yaml").write_text(said.replace("measured:", "before:") + bomb)
        for command in (["inspect"], ["eval"], ["export", "-o", tmp_path / "out"], ["uptrain", "-o", tmp_path / "out"]):
            fails(command[0], rrt, *command[1:], says="rrtc.yaml is damaged")
        (tmp_path / "recipe.yaml").write_text(bomb)
        with pytest.raises(WrongUsage, match="is not valid YAML"):
            load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    "key", ["rrtc", "versions", "base", "base.bytes", "stage", "path", "made", "recipe", "measured"]
)
def test_provenance_that_lacks_something_is_refused(key, models):
    rrt = models[1]
    said = yaml.safe_load((rrt / "rrtc.yaml").read_text())
    *inside, last = key.split(".")
    del (said[inside[0]] if inside else said)[last]
    (rrt / "rrtc.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(RrtcError, match=f"rrtc.yaml is damaged: {key}: field required"):
        read_provenance(rrt)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda visits: visits[2].pop("slot"),
        lambda visits: visits[2].update(slot=10**9),
        lambda visits: visits[2].update(slot="0"),
        lambda visits: visits[2].update(layer=99),
        lambda visits: visits[2]["ranks"].popitem(),
        lambda visits: visits[2]["ranks"].update({"self_attn.q_proj": -1}),
        lambda visits: visits[2]["ranks"].update({"self_attn.q_proj": 10**9}),
        lambda visits: visits[2].update(shapes={"mlp.up_proj": [1]}),
        lambda visits: visits[2].update(own=True),
        lambda visits: visits.pop(),
        lambda visits: visits.clear(),
    ],
)
def test_damaged_visits_are_met_before_any_work(spoil, models, tmp_path):
    config = models[1] / "config.json"
    values = json.loads(config.read_text())
    spoil(values["visits"])
    config.write_text(json.dumps(values))
    for read in (
        lambda: check_holds_model(models[1]),
        lambda: stage.export(str(models[1]), str(tmp_path / "out"), Recipe()),
    ):
        with pytest.raises(RrtcError):
            read()
    assert not list(tmp_path.glob("out*"))


def test_text_that_a_folder_names_is_read_only_from_a_disk(models, tmp_path, capsys):
    rrt, (text, link, fifo) = models[1], (tmp_path / name for name in ("text.txt", "link.txt", "fifo.txt"))
    text.write_text("Some text.")
    link.symlink_to("/proc/self/environ")
    os.mkfifo(fifo)
    (tmp_path / "folder").mkdir()
    with notes_shown(True):
        found = text_of_folder(rrt, ["pydoc", "self", str(text), str(tmp_path / "folder")], (), "--text")
    assert found == ["pydoc", "self", str(text), str(tmp_path / "folder")]
    assert f"Reading the text that {rrt} was made with: {text}, {tmp_path / 'folder'}" in capsys.readouterr().err
    for named in ("/proc/self/environ", "/dev/zero", "/dev/null", "/", "/dev", str(link), str(fifo), "maker/dataset"):
        with pytest.raises(RrtcError, match="no file or folder on this machine's disks") as refused:
            text_of_folder(rrt, [named], (), "--text")
        assert "--text TEXT" in refused.value.hint
        assert text_of_folder(rrt, [named], [named], "--text") == [named]  # the user has named it


@pytest.mark.parametrize("data", ["/proc/self/environ", "/dev/zero", "maker/dataset"])
def test_what_reads_the_text_of_a_folder_asks(data, models, tmp_path):
    rrt = models[1]
    said = yaml.safe_load((rrt / "rrtc.yaml").read_text())
    said["recipe"]["uptrain"] = {"data": [data], "text_field": "text"}
    (rrt / "rrtc.yaml").write_text(yaml.safe_dump(said))
    opened.clear()
    fails("eval", rrt, "--against", models[0], says="does not read it without being asked to")
    fails("export", rrt, "-o", tmp_path / "out", "--quantize", "int8", says="does not read it without being asked to")
    assert data not in opened


def test_a_training_curve_is_read_or_refused(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for text in (
        "{}\n",
        "[]\n",
        "5\n",
        "[" * 5000,
        '{"tokens": "x", "loss": 1}\n',
        '{"tokens": 1, "loss": [1]}\n',
        "x",
    ):
        file.write_text(text)
        with pytest.raises(RrtcError, match="metrics.jsonl is damaged"):
            _curve(tmp_path)
    file.write_text("")
    assert _curve(tmp_path) is None
    file.write_text('{"tokens": 64, "loss": 2.5}\n')
    assert _curve(tmp_path)["points"] == [[64, 2.5, None]]


def test_a_folder_whose_name_is_no_text_is_described(models):
    folder = models[1].rename(os.fsdecode(os.fsencode(models[1]) + b"\xff"))
    result = CliRunner().invoke(app, ["inspect", str(folder), "--json", "-"])
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["folder"] == str(folder)


def test_the_users_own_cache_can_have_its_files_on_another_disk(models, tmp_path, monkeypatch):
    snapshot = false_cache(models[0], Trap(tmp_path / "disk", models[0]))
    with pytest.raises(RrtcError, match="link to a file outside"):
        check_folder(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(snapshot.parents[2]))
    check_folder(snapshot)


def test_a_base_that_is_a_pipe_is_not_opened(models, tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(RrtcError, match="neither a folder nor a .gguf file"):
        find_model(str(tmp_path / "pipe.gguf"))


@pytest.mark.parametrize(
    "change",
    [
        {"base": 3},
        {"base": {"uri": 1, "path": "x", "relative_path": "x", "sha256": "0"}},
        {"base": {"uri": "a/b"}},
        {"history": [3]},
        {"history": "words"},
        {"history": [{"stage": "init", "path": ["/"], "made": "now"}]},
        {"made": ["now"]},
        {"recipe": 3},
        {"measured": None},
    ],
)
def test_provenance_of_other_kinds_is_refused(change, models, trap):
    rrt = models[1]
    (rrt / "rrtc.yaml").write_text(yaml.safe_dump(yaml.safe_load((rrt / "rrtc.yaml").read_text()) | change))
    with pytest.raises(RrtcError, match="rrtc.yaml is damaged"):
        read_provenance(rrt)


@pytest.mark.parametrize(
    "uri", ["package://outer_evil.inner/x", "package://pico_found/../outside", "package://os.path/x"]
)
def test_a_base_that_provenance_names_runs_and_reaches_nothing_else(uri, models, trap, tmp_path, monkeypatch):
    rrt = models[1]
    (tmp_path / "outer_evil").mkdir()
    (tmp_path / "outer_evil" / "__init__.py").write_text(trap.code)
    (tmp_path / "pico_found").mkdir()
    (tmp_path / "pico_found" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = yaml.safe_load((rrt / "rrtc.yaml").read_text())
    said["base"] |= {"uri": uri, "path": "/nowhere", "relative_path": "nowhere"}
    (rrt / "rrtc.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(RrtcError, match="no longer where it was"):
        find_base(rrt, None, "--against")


@pytest.mark.slow
def test_an_export_asks_nothing_of_the_place_that_provenance_calls_its_base(models, trap, tmp_path):
    rrt = models[1]
    (trap.folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (trap.folder / "LICENSE").write_text("MIT License")
    opened.clear()
    said = yaml.safe_load((rrt / "rrtc.yaml").read_text())
    said["base"] |= {"path": str(trap.folder), "license": ["mit"]}
    (rrt / "rrtc.yaml").write_text(yaml.safe_dump(said))
    stage.export(str(rrt), str(tmp_path / "out"), Recipe())
    assert "state none" in (tmp_path / "out" / "README.md").read_text()


def test_what_lies_beside_a_gguf_has_no_say(trap, tmp_path, monkeypatch):
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(folder / "pico.gguf")
    adapter(folder, trap)
    (folder / "tokenizer_evil.py").write_text(trap.code)
    code = {"AutoTokenizer": ["tokenizer_evil.T", None]}
    change_json(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="Evil")
    (trap.folder / "LICENSE").write_text("secret")
    (folder / "LICENSE").symlink_to(trap.folder / "LICENSE")
    opened.clear()
    source = find_model(str(folder / "pico.gguf"))
    assert source.folder.is_relative_to(cache_folder()) and not list(source.folder.glob("LICENSE*"))
    assert load_tokenizer(source.folder)("Hello")["input_ids"] == pico_tokenizer()("Hello")["input_ids"]


def test_folders_that_do_no_harm_are_read(trap, tmp_path, dense):
    """A hub's cache, with blobs of one model and of all; a folder that is a link; an old tokenizer's stale paths."""
    cache = tmp_path / "hub"
    snapshot, blobs, shared = (
        cache / "models--a--b" / name for name in ("snapshots/1", "blobs", "../blobs/00")
    )  # fmt: skip
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(dense("llama").iterdir())):
        shutil.copy(file, (shared if number % 2 else blobs) / f"{number}-file")
        if number % 2:
            (blobs / f"{number}-file").symlink_to(f"../../blobs/00/{number}-file")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}-file")
    (tmp_path / "named").symlink_to(snapshot)
    expected = load_file(dense("llama") / "model.safetensors")
    for folder in (snapshot, tmp_path / "named"):
        source = find_model(str(folder))
        assert all(torch.equal(source.weights().read(name), tensor) for name, tensor in expected.items())
        assert source.config().model_type == "llama" and load_tokenizer(folder) is not None

    old = save_pico(tmp_path / "old")
    change_json(old / "tokenizer_config.json", special_tokens_map_file="/root/.cache/huggingface/gone.json")
    (old / "elsewhere").symlink_to(trap.folder)  # a folder, which nobody asks for
    assert find_model(str(old)).config().model_type == "llama"
    assert load_tokenizer(old)("Hello")["input_ids"] == pico_tokenizer()("Hello")["input_ids"]


def test_a_config_of_own_code_is_refused_wherever_it_is_read(models, trap):
    own_architecture(models[0], trap)
    with pytest.raises(RrtcError, match="needs Python code of its own") as error:
        read_config(models[0])
    assert "runs no code" in error.value.hint
