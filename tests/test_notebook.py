"""The notebook in docs/ runs from its first cell to its last, on the model and text that it names."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "from_plan_to_picture.ipynb"


@pytest.mark.slow
def test_it_runs_from_the_plan_to_the_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict = {}
    for cell in cells:
        source = "".join(cell["source"])
        assert "TOKENS = 2048" in source or "TOKENS" in names
        exec(compile(source.replace("TOKENS = 2048", "TOKENS = 256"), str(NOTEBOOK), "exec"), names)
    assert (tmp_path / "runs" / "notebook" / "report" / "report.html").exists()
    bits = names["table"]["scores.bits_per_byte.value"]
    assert bits.iloc[0] == bits.min() and bits.iloc[1] == bits.max()  # the dense model; the paper's start
    lines = names["axes"].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [30] * 2
