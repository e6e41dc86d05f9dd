"""The notebook in docs/ runs from its first cell to its last, on the text that it names and on six layers of the model
that it names."""

import json
import re
from pathlib import Path

import matplotlib
import pytest

from rrtc.init.baselines import write_shorter
from rrtc.io.dense import DenseModel
from rrtc.io.source import find_model

NOTEBOOK = Path(__file__).parents[1] / "docs" / "from_plan_to_picture.ipynb"
LAYERS = [0, 1, 10, 20, 28, 29]


@pytest.mark.slow
def test_it_runs_from_the_plan_to_the_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    named = re.search(r'MODEL = "(.+)"', sources[0])[1]
    short = tmp_path / "short"
    short.mkdir()
    write_shorter(DenseModel(find_model(named)), LAYERS, "float32", short)
    assert "TOKENS = 2048" in sources[0]
    sources[0] = sources[0].replace("TOKENS = 2048", "TOKENS = 256").replace(named, str(short))
    names: dict = {}
    for source in sources:
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert (tmp_path / "runs" / "notebook" / "report" / "report.html").exists()
    _, papers, joint = names["table"]["scores.kl.value"]
    assert 0 < joint < papers
    lines = names["axes"].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [len(LAYERS)] * 2
