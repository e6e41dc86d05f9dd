"""Files that are damaged at random, by a seed, and what reads them: see tests/test_fuzz.py and benchmarks/fuzz.py.

A Kind is a kind of file: where a whole one lies, how it is spoiled, and what of rrtc reads it. Whatever was done to it,
reading ends, and returns something or raises RrtcError: everything else is a fault.
"""

import contextlib
import copy
import io
import json
import random
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from gguf_file import write_gguf
from pico import save_pico
from rich.console import Console
from uptraining import make_rrt

from rrtc import api
from rrtc.cli import scores
from rrtc.cli.description import description
from rrtc.errors import RrtcError
from rrtc.eval.stage import _curve
from rrtc.export.card import _eval_results, _measured
from rrtc.io.gguf import _gguf_parameters
from rrtc.io.license import find_license
from rrtc.io.provenance import base_seen_from, earlier_stages, next_history, read_provenance, without_places
from rrtc.io.report import read_report
from rrtc.io.resumable import Resumable
from rrtc.io.source import find_model, load_tokenizer, read_config
from rrtc.io.trust import check_folder
from rrtc.io.weights import Weights
from rrtc.plain import to_yaml
from rrtc.recipe.schema import Recipe, load_recipe, with_flags
from rrtc.runs import STAGES, check_sizes
from rrtc.stock.architecture import read_architecture, read_plan
from rrtc.text.files import texts_in
from rrtc.text.tokens import encoded
from rrtc.uptrain.checkpoints import last_sound, mark_whole

SECONDS = 5.0  # of this process's own time, in which a file is read or refused
DEEP = "@@deep@@"  # stands for more brackets than can be written by a recursive writer
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 255, 2**31, 2**63, -(2**63), 10**9, 10**12, 10**20, 10**30, 10**400, 0.5, -0.0,
    1e-320, 1e308, -1e308, float("nan"), float("inf"), "", " ", "x", "0", "1e5", "-1", "é", "\x1b[2J\x07", "[/x]",
    "\x00", "\ud800", "\u202e", "..", "../outside/x", "/etc/passwd", "/dev/zero", "/proc/self/environ", "a/b", "~",
    "a" * 10_000, "2024-99-99", [], {}, [[]], [None], [0] * 1000, {"a": None}, {"": {}}, {"a": [{"b": [{}]}]}, DEEP,
]  # fmt: skip
WORDS = (
    b"*a", b"&a ", b"<<: ", b"!!int x", b"!!python/object/apply:os.getcwd []", b"? ", b"- ", b"{", b"[", b"]" * 99,
    b"\xff\xfe", b"\x00", b"9" * 5000, b"\n", b"\t", b'"', b"'", b": ", b"#", b"%", b"|", b"2024-01-01", b"NaN",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """spoil(content, draw): the content of a spoiled file. heavy: whether a case takes a tenth of a second or more."""

    name: str
    file: Path
    spoil: Callable[[bytes, random.Random], bytes]
    read: Callable[[], object]
    heavy: bool = False


@dataclass(frozen=True)
class Outcome:
    """what: read, refused, or fault; of a fault, error says which and where."""

    what: str
    error: str = ""


class TooSlow(BaseException):
    pass


def try_case(kind: Kind, content: bytes) -> Outcome:
    """What reading does where the file of that kind has that content. The file is as it was afterwards."""

    def too_slow(*_: object) -> None:
        raise TooSlow(f"it took more than {SECONDS} s")

    whole, before = kind.file.read_bytes(), signal.signal(signal.SIGPROF, too_slow)
    kind.file.write_bytes(content)
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            kind.read()
        return Outcome("read")
    except RrtcError:
        return Outcome("refused")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        places = [
            f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__) if "/rrtc/" in f.filename
        ]
        return Outcome("fault", f"{type(error).__name__}: {' '.join(str(error).split())[:200]} at {places[-1:]}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        kind.file.write_bytes(whole)


def spoiled(kind: Kind, seed: int, number: int) -> bytes:
    """The content of the case of that number: the same for the same seed."""
    return kind.spoil(kind.file.read_bytes(), random.Random(f"{seed} {kind.name} {number}"))


# ---- how files are spoiled


def bytes_spoiled(content: bytes, draw: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at, length = draw.randrange(len(made) + 1), draw.choice((1, 1, 4, 8, 100))
        way = draw.randrange(7)
        if way == 0:
            del made[at:]
        elif way == 1:
            del made[at : at + length]
        elif way == 2:
            made[at : at + length] = draw.randbytes(length)
        elif way == 3:
            made[at:at] = draw.choice(WORDS)
        elif way == 4:
            made[at : at + length] = draw.choice((b"\x00", b"\xff", b"\x7f")) * length
        elif way == 5:
            made[at:at] = bytes(made[at : at + draw.choice((1, 10, 1000))]) * draw.choice((1, 3))
        else:
            made += draw.randbytes(length)
    return bytes(made)


def value_spoiled(value: Any, draw: random.Random) -> Any:
    """`value` with some odd parts: the only way to come past whoever reads the form alone."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(draw.choice(ODD))
        inside, key = draw.choice(places)
        way = draw.randrange(6)
        if way == 0:
            del inside[key]
        elif way == 1:
            other, name = draw.choice(places)
            inside[key] = copy.deepcopy(other[name])
        elif way == 2 and isinstance(inside, dict):
            inside[draw.choice([odd for odd in ODD if isinstance(odd, str)])] = inside[key]
        elif way == 3 and isinstance(inside, list):
            inside += [inside[key]] * draw.choice((1, 100))
        elif way == 4 and isinstance(inside[key], int) and abs(inside[key]) < 10**100:
            inside[key] = inside[key] * draw.choice((-1, 1, 2, 10**6)) + draw.choice((0, 1, -1))
        else:
            inside[key] = copy.deepcopy(draw.choice(ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _with_depth(text: str, draw: random.Random) -> bytes:
    depth = draw.choice((60, 70, 1000, 5000, 100_000))
    return (
        text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).replace(DEEP, "[" * depth).encode("utf8", "surrogatepass")
    )


def json_spoiled(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return bytes_spoiled(content, draw)
    made = value_spoiled(json.loads(content), draw)
    return _with_depth(json.dumps(made, ensure_ascii=draw.random() < 0.5), draw)


def lines_spoiled(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines()
    number = draw.randrange(len(lines))
    lines[number] = json_spoiled(lines[number], draw)
    return b"\n".join(lines)


def yaml_spoiled(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return bytes_spoiled(content, draw)
    made = value_spoiled(yaml.safe_load(content), draw)
    if draw.random() < 0.1:  # an alias
        made = {"a": made, "b": made}
        return yaml.safe_dump(made, sort_keys=False).encode("utf8", "surrogatepass")
    return _with_depth(to_yaml(made), draw)


def header_spoiled(content: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if draw.random() < 0.3:
        return bytes_spoiled(content[: 8 + length], draw) + content[8 + length :]
    header = json_spoiled(content[8 : 8 + length], draw)
    size = draw.choice((len(header),) * 9 + (2**63,))
    return size.to_bytes(8, "little") + header + content[8 + length :]


# ---- what reads them


def kinds(folder: Path) -> list[Kind]:
    """All kinds, with whole files to spoil in `folder`."""
    dense = save_pico(folder / "dense", "llama")
    rrt = make_rrt(folder / "rrt", dense)
    (rrt / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [a, b]\n---\n\n# A model\n")
    (rrt / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    (rrt / "metrics.jsonl").write_text("".join(
        json.dumps({"step": n, "tokens": 64 * n, "loss": 5.0 / n, "kl": None, "objective": 5.0 / n}) + "\n"
        for n in range(1, 9)
    ))  # fmt: skip
    indexed = shutil.copytree(dense, folder / "indexed")
    names = list(Weights(dense))
    (indexed / "model.safetensors").rename(indexed / "model-00001-of-00001.safetensors")
    index = indexed / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    report = folder / "report"
    report.mkdir()
    (report / "report.json").write_text(json.dumps(sample_report()))
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml({"model": "a/b"} | json.loads(Recipe().model_dump_json(exclude={"model"}))))
    gguf = folder / "model.gguf"
    write_gguf(gguf)
    checkpoint = folder / "out.partial" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"1")
    (checkpoint / "optimizer.pt").write_bytes(b"2")
    mark_whole(checkpoint)
    started = checkpoint.parent / "started.json"
    same = {"recipe": {"tokens": 5}, "data": "0" * 64}
    started.write_text(json.dumps({"rrtc": "0", "fingerprint": same}))
    resumable = Resumable(folder / "out", "checkpoints", lambda: [checkpoint], list, shutil.rmtree)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Text {n}.", "n": n}) + "\n" for n in range(20)))
    table = folder / "rows.csv"
    table.write_text("n,text\n" + "".join(f'{n},"Text, {n}"\n' for n in range(20)))
    flags = folder / "flags.json"
    flags.write_text(Recipe().model_dump_json())

    def shown(value) -> None:
        with open("/dev/null", "w") as nowhere:
            Console(file=nowhere, width=120).print(value)

    def weights(model: Path) -> None:
        found = Weights(model)
        assert found.parameters >= 0 and found.bytes_on_disk > 0 and found.dtype
        for name in list(found)[:3]:
            found.raw(name)

    def provenance() -> None:
        said = read_provenance(rrt)
        next_history(said), base_seen_from(folder / "x", rrt, said), without_places(said), to_yaml(said)
        earlier_stages(rrt)

    def inspect() -> None:
        shown(description(api.inspect(rrt)))

    def evaluated() -> None:
        found = read_report(report)
        shown(scores.report(found))
        exported = {"dtype": "float32", "bytes": 1, "parameters": 1, "max_logit_difference": 0.0, "largest_logit": 1.0,
                    "rounding_logit_difference": 0.0}  # fmt: skip
        _eval_results(found), _measured({"measured": {}}, exported, without_places(found))

    def recipe_from_file() -> None:
        found = load_recipe(str(recipe))
        check_sizes(found)
        found.init.resolved()

    def recipe_from_flags() -> None:
        for part, given in json.loads(flags.read_bytes()).items():
            if part in STAGES and isinstance(given, dict):
                section = getattr(Recipe(), part)
                with_flags(section, {key: given[key] for key in given if key in type(section).model_fields}, "the call")

    def config() -> None:
        check_folder(dense)
        read_config(dense)

    def architecture() -> None:
        config()
        read_architecture(read_config(dense))

    def plan() -> None:
        check_folder(rrt)
        read_plan(read_config(rrt))

    def dequantized() -> None:
        shutil.rmtree(find_model(str(gguf)).folder)  # it is in the cache

    def tokenizer() -> None:
        check_folder(dense)
        list(encoded(["Some text."], load_tokenizer(dense), 320, sizes=True))

    return [
        Kind("safetensors header", dense / "model.safetensors", header_spoiled, lambda: weights(dense)),
        Kind("weights index", index, json_spoiled, lambda: weights(indexed)),
        Kind("config.json", dense / "config.json", json_spoiled, config),
        Kind("config.json, built", dense / "config.json", json_spoiled, architecture, heavy=True),
        Kind("config.json, recursive", rrt / "config.json", json_spoiled, inspect),
        Kind("config.json, planned", rrt / "config.json", json_spoiled, plan, heavy=True),
        Kind("rrtc.yaml", rrt / "rrtc.yaml", yaml_spoiled, provenance),
        Kind("rrtc.yaml, inspected", rrt / "rrtc.yaml", yaml_spoiled, inspect),
        Kind("model card", rrt / "README.md", bytes_spoiled, lambda: find_license(rrt)),
        Kind("license", rrt / "LICENSE", bytes_spoiled, lambda: find_license(rrt)),
        Kind("metrics.jsonl", rrt / "metrics.jsonl", lines_spoiled, lambda: _curve(rrt)),
        Kind("recipe", recipe, yaml_spoiled, recipe_from_file),
        Kind("flags", flags, value_json_spoiled, recipe_from_flags),
        Kind("tokenizer_config.json", dense / "tokenizer_config.json", json_spoiled, lambda: check_folder(dense)),
        Kind("tokenizer_config.json, used", dense / "tokenizer_config.json", json_spoiled, tokenizer, heavy=True),
        Kind("tokenizer.json, used", dense / "tokenizer.json", json_spoiled, tokenizer, heavy=True),
        Kind("report.json", report / "report.json", json_spoiled, evaluated),
        Kind("checkpoint's mark", checkpoint / "rrtc-whole", json_spoiled, lambda: last_sound([checkpoint])),
        Kind("started.json", started, json_spoiled, lambda: resumable.check_same(same)),
        Kind("GGUF", gguf, gguf_spoiled, lambda: _gguf_parameters(gguf)),
        Kind("GGUF, dequantized", gguf, gguf_spoiled, dequantized, heavy=True),
        Kind("rows, jsonl", rows, lines_spoiled, lambda: list(texts_in(rows, "text"))),
        Kind("rows, csv", table, bytes_spoiled, lambda: list(texts_in(table, "text"))),
    ]


def value_json_spoiled(content: bytes, draw: random.Random) -> bytes:
    """Values alone: a command line has no form that could be broken."""
    made = value_spoiled(json.loads(content), draw)
    return json.dumps(made).encode()


def gguf_spoiled(content: bytes, draw: random.Random) -> bytes:
    """Its header, which is a fiftieth of it, more than its numbers."""
    head = len(content) // (50 if draw.random() < 0.8 else 1)
    return bytes_spoiled(content[:head], draw) + content[head:]


def sample_report() -> dict:
    """A small report with everything in it."""

    def score(value: float, other: float | None = None) -> dict:
        difference = None if other is None else {"value": value - other, "low": -0.1, "high": 0.1}
        return {"value": value, "stderr": 0.01, "difference": difference}

    def row(name: str, kind: str) -> dict:
        other = None if kind == "dense" else 1.2
        texts = {key: score(1.5, other) for key in ("loss", "bits_per_byte", "calibration_error")}
        texts |= {} if other is None else {"kl": score(0.4), "top1_agreement": score(0.6)}
        return {
            "model": name, "kind": kind, "layers_computed": 1.0, "params_total": 100_000,
            "params_non_embedding": 70_000, "bytes": 400_000,
            "parts": {"embeddings": 30_000, "shared": 70_000}, "scores": texts,
            "texts": {"held out": texts}, "by_position": [{"from": 1, "to": 16, "loss": score(1.5, other)}],
            "tasks": {"piqa": {"metric": "acc", "items": 50, **score(0.6, other)}}, "task_average": score(0.6, other),
            "passkey": [{"length": 256, "depth": 0.5, "items": 4, **score(0.7, other), "low": 0.3, "high": 0.9}],
            "cost": {"kv_bytes_per_token": 100, "kv_bytes": {"2048": 204_800, "8192": 819_200, "32768": 3_276_800},
                     "flops_per_token": 1000, "peak_memory_bytes": None},
        }  # fmt: skip

    ratio = {"ratio": 1.0, "low": 0.9, "high": 1.1}
    return {
        "schema": 2, "of": {"stage": "uptrain", "made": "2026-11-22T10:00:00+0000"}, "against": "a/b",
        "made_with": {"versions": {"rrtc": "0"}, "device": "cpu", "dtype": "float32", "seed": 0, "resamples": 1000},
        "tokens": {"held out": 1000}, "models": [row("dense", "dense"), row("after init", "stage"), row("e", "exit")],
        "not_run": [{"task": "x", "why": "It is not there."}], "layers": [],
        "speed": {"device": "cpu", "rounds": 1, "prompt_tokens": 8, "new_tokens": 8, "prefill": ratio, "decode": ratio,
                  "long": {"prompt_tokens": 64, "new_tokens": 8, "decode": ratio}},
        "training": [{"stage": "uptrain", "points": [[64, 5.0, None]]}], "source_bytes": 5,
        "samples": [{"model": "dense", "text": "Hello."}], "prompt": "What do you say?",
    }  # fmt: skip
