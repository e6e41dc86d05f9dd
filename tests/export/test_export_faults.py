"""What happens to `rrtc export` from outside: kills, a full disk, a read-only place, a license that forbids it. (Faults
of the folder itself are in test_export.py, and folders that mean harm in test_malicious.py.)"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ready
import yaml
from huggingface_hub import ModelCard

from rrtc.export import stage
from rrtc.io.folder import partial_of
from rrtc.io.license import find_license, forbids_derivatives
from rrtc.recipe.schema import Recipe

KILL = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import kill
kill.load_again = kill.subprocess.run
source, target = map(Path, sys.argv[2:4])
for operation in (0, 4, 60, None):  # the first ones are of its lock, in the cache
    command = ["export", str(source), "--format", "recursive", "--max-shard-size", "100KB"]
    _, status = os.waitpid(kill.start(command, target, target.with_name("log"), operation), 0)
    print(status, target.exists(), kill.partial_of(target).exists())
print(sorted(kill.contents(target)))
"""


def run(*arguments, limit: int | None = None, prefix: tuple = ()) -> subprocess.CompletedProcess:
    """The command line in a process of its own; limit: bytes that a file may have, which is how a full disk looks."""
    limited = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))" if limit else "pass"
    code = f"import resource; {limited}; from rrtc.cli.app import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run([*prefix, *command], capture_output=True, text=True) if prefix else ready.run(command)


def error_of(result: subprocess.CompletedProcess) -> str:
    """The one sentence that a command failed with."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    (sentence,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    return sentence


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_under_the_final_name_and_the_next_one_succeeds(rrt, tmp_path):
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    command = [sys.executable, "-c", KILL, str(benchmarks), str(rrt), str(tmp_path / "out")]
    done = ready.run(command)
    assert done.returncode == 0, done.stderr
    *killed, whole, files = done.stdout.splitlines()
    assert killed == ["9 False False", "9 False True", "9 False True"] and whole == "0 True False"
    assert "'model.safetensors.index.json'" in files and "'tokenizer.json'" in files


@pytest.mark.slow
def test_a_full_disk(rrt, tmp_path):
    sentence = error_of(run("export", rrt, "-o", tmp_path / "out", limit=50_000))
    assert re.search(r"Writing .*tmp failed: File too large\.$", sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_read_only_place(rrt, tmp_path):
    prefix: tuple = ()
    if os.geteuid() == 0:  # root may write everywhere, but can do without that right
        powers = "-dac_override,-dac_read_search"
        prefix = ("setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}")
        if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], check=False).returncode:
            pytest.skip("this root cannot give up its right to write everywhere")
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o500)
    sentence = error_of(run("export", rrt, "-o", place / "out", prefix=prefix))
    assert sentence == f"Error: The output folder {place / 'out'} cannot be made: {place} is read-only."


CARD = "---\nlicense: {}\n---\n"
NAMED = "other\nlicense_name: acme-nc-nd-1.0\nlicense_link: https://acme.test/license"
BY_ND = "Attribution-NonCommercial-NoDerivatives 4.0 International\n====\n"


@pytest.mark.parametrize(
    ("file", "text", "forbidden"),
    [
        ("README.md", CARD.format("cc-by-nd-4.0"), True),
        ("README.md", CARD.format("cc-by-nc-nd-4.0"), True),
        ("README.md", CARD.format(NAMED), True),
        ("LICENSE", BY_ND, True),
        ("README.md", CARD.format("apache-2.0"), False),
        ("README.md", CARD.format("cc-by-nc-4.0"), False),
        ("README.md", CARD.format("andreessen-1.0"), False),
        ("LICENSE", "Attribution-NonCommercial 4.0 International", False),
        ("LICENSE", "No such thing as a license.", False),
    ],
)
def test_licenses_that_forbid_what_an_export_is(tmp_path, file, text, forbidden):
    (tmp_path / file).write_text(text)
    assert forbids_derivatives(find_license(tmp_path)) is forbidden


@pytest.mark.slow
def test_a_folder_that_is_older_than_the_note_of_its_license_says_so(rrt, tmp_path, capfd):
    source = shutil.copytree(rrt, tmp_path / "rrt")
    said = yaml.safe_load((source / "rrtc.yaml").read_text())
    del said["base"]["license"]
    (source / "rrtc.yaml").write_text(yaml.safe_dump(said))
    stage.export(str(source), str(tmp_path / "out"), Recipe())
    assert capfd.readouterr().err.count("Note: The license of ") == 1
    assert "Not known: this model was made by an rrtc that" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_license_that_forbids_derivatives_is_one_warning_and_a_word_in_the_card(rrt, tmp_path, capfd):
    source, base = shutil.copytree(rrt, tmp_path / "rrt"), tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(CARD.format(NAMED))
    (source / "LICENSE").write_text("All ours.")  # as `init` copies it from the base
    said = yaml.safe_load((source / "rrtc.yaml").read_text())
    said["base"] |= {"uri": "maker/model", "path": str(tmp_path / "gone"), "license": find_license(base)}
    (source / "rrtc.yaml").write_text(yaml.safe_dump(said))
    stage.export(str(source), str(tmp_path / "out"), Recipe())
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Note: ")]
    assert notes == ["Note: The license of maker/model (acme-nc-nd-1.0) forbids passing on what is made of it."]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "acme-nc-nd-1.0")
    assert "maker/model: acme-nc-nd-1.0, see https://acme.test/license. It does not allow changed versions" in card.text
    assert not partial_of(tmp_path / "out").exists()
