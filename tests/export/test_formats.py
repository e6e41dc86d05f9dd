"""The modules of the formats are alike, and the programs that check exports know nothing of rrtc."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from exports import make_rrt, run_python

import rrtc.model
from rrtc.export import formats, fresh
from rrtc.export.formats import FORMATS
from rrtc.export.formats.recursive import recursive_config, write_config
from rrtc.plan import Plan

PROGRAMS = sorted(Path(fresh.__file__).parent.glob("[a-z]*.py"))
MEMBERS = {name for line in re.findall(r"^    (\w+(?:, \w+)?)  ", formats.__doc__, re.M) for name in line.split(", ")}


def test_the_modules_of_all_formats_have_the_same_members():
    assert {"LIBRARY", "TAGS", "check", "number_format", "write", "verify", "how_to_load"} < MEMBERS
    for name in sorted(MEMBERS):
        found = [vars(module)[name] for module in FORMATS.values()]
        # dense.write has one parameter more, for the GGUF format, which is made of it
        assert len({tuple(inspect.signature(f).parameters)[:4] for f in found if callable(f)}) <= 1, name


def test_all_code_of_the_model_goes_along_and_the_card_counts_it(tmp_path, monkeypatch):
    source, target, model = make_rrt(tmp_path / "rrt"), tmp_path / "out", tmp_path / "model"
    model.mkdir()
    for name in ("__init__", "configuration_rrt", "modeling_rrt", "attention_rrt"):
        (model / f"{name}.py").write_text(f"# {name}")
    target.mkdir()
    monkeypatch.setattr(rrtc.model, "__file__", str(model / "__init__.py"))
    write_config(source, target, rrtc.model.RrtForCausalLM.from_pretrained(source).dtype)
    code = ["attention_rrt.py", "configuration_rrt.py", "modeling_rrt.py"]
    assert sorted(file.name for file in target.glob("*.py")) == code
    shown = FORMATS["recursive"].how_to_load({"files": [*code, "README.md"]}, "out", recursive_config(source), False)
    assert "runs the 3 Python files of this folder" in shown


def test_a_card_says_what_this_model_saves(tmp_path, monkeypatch):
    config = recursive_config(make_rrt(tmp_path / "rrt"))
    for name in ("recursive", "onnx"):
        assert re.search(
            "a token takes [0-9.]+% more arithmetic and saves no KV cache. It passes through 6 layers",
            " ".join(FORMATS[name].limits({}, config).split()),
        )
    monkeypatch.setattr(Plan, "kv_bytes", lambda plan, context, width: context * width)
    assert re.search("saves [0-9.]+% of the KV cache", FORMATS["recursive"].limits({}, config))
    assert "saves no KV cache" in FORMATS["onnx"].limits({}, config)  # its graph keeps all of it


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda file: file.stem)
def test_importing_a_program_that_checks_exports_does_nothing(program):
    before = set(sys.modules)
    importlib.import_module(f"rrtc.export.fresh.{program.stem}")
    assert sys.modules["rrtc"] is rrtc
    assert not {"onnxruntime", "llama_cpp"} & (sys.modules.keys() - before)


UNTIL_ITS_JOB = """
import runpy, sys
program, sys.argv[1] = sys.argv[1], "no-such-job.json"
try:
    runpy.run_path(program, run_name="__main__")
except FileNotFoundError:
    assert not [name for name in sys.modules if name.startswith("rrtc.")]
    try:
        import rrtc
    except ModuleNotFoundError:
        print("rrtc cannot be imported")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda file: file.stem)
def test_a_program_that_checks_exports_cannot_import_rrtc(tmp_path, program):
    assert run_python(UNTIL_ITS_JOB, str(program), cwd=tmp_path).strip() == "rrtc cannot be imported"
