"""The walkthroughs of docs/ run as they stand, command by command, on a pico model in place of the one they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ready
from pico import save_pico
from transformers import AutoTokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "walkthroughs.md").read_text(encoding="utf8")
WAYS = dict(re.findall(r"^## (.+?)\n.*?```bash\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
LEAVES = {
    "I have conversations, and half the memory": "answers.jsonl",
    "I have read the paper, and want to see it on my model": "runs/rank/report/report.html",
    "I want it on a phone, in as few bytes as will do": "browser/README.md",
}
COMMAND = re.compile(r"python - <<'END'\n(?P<code>.*?)^END\n|(?P<line>[^\n]+)\n", re.DOTALL | re.MULTILINE)
CHATML = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"


def commands(block: str, model: Path) -> list[list[str]]:
    """What is run of `block`, with `model` in the place of the one that its first line names."""
    named, _, rest = block.replace("\\\n", " ").partition("\n")
    assert named.startswith("MODEL=")
    # 70 MB are as much of the model that the page names, in int4, as this part is of the pico model.
    rest = rest.replace("$MODEL", str(model)).replace("$SIZE", "0.18")
    found = []
    for match in COMMAND.finditer(rest):
        if match["code"]:
            found.append([sys.executable, "-c", match["code"]])
        else:
            name, *arguments = shlex.split(match["line"])
            found.append(
                [sys.executable, "-m", "rrtc", *arguments] if name == "rrtc" else ["bash", "-c", match["line"]]
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_command_of_a_walkthrough_runs(way, tmp_path):
    model = save_pico(tmp_path / "dense", max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    env = os.environ | {"RRTC_CACHE": str(tmp_path / "cache")}
    where = tmp_path / "here"
    where.mkdir()
    for command in commands(WAYS[way], model):
        if command[0] == "bash":
            subprocess.run(command, cwd=where, check=True)
        else:
            done = ready.run(command, env=env, cwd=where)
            assert done.returncode == 0, (command, done.stderr)
            assert "Traceback" not in done.stderr
    assert (where / LEAVES[way]).stat().st_size
