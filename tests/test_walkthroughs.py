"""The walkthroughs of docs/ run as they stand, on a pico model in place of the one that they name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pico import save_pico
from transformers import AutoTokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "walkthroughs.md").read_text(encoding="utf8")
WAYS = dict(re.findall(r"^## (.+?)\n.*?```bash\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
LEAVES = {
    "I have conversations, and half the memory": "answers.jsonl",
    "I have read the paper, and want to see it on my model": "runs/rank/report/report.html",
    "I want it on a phone, in as few bytes as will do": "browser/README.md",
}
CHATML = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_command_of_a_walkthrough_runs(way, tmp_path):
    model = save_pico(tmp_path / "dense", max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    # 70 MB are as much of the model that the page names, in int4, as this part is of the pico model.
    commands, replaced = re.subn(r"^MODEL=.*", f"MODEL={model} SIZE=0.18", WAYS[way], count=1, flags=re.MULTILINE)
    assert replaced
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    env = os.environ | {"PATH": os.pathsep.join(paths), "RRTC_CACHE": str(tmp_path / "cache")}
    where = tmp_path / "here"
    where.mkdir()

    done = subprocess.run(["bash", "-euxc", commands], cwd=where, env=env, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert (where / LEAVES[way]).stat().st_size
