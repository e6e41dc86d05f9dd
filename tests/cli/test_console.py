"""The console: others' words are shown as they are, and nothing is shown that was not asked for."""

import re
import shlex
import subprocess
import sys
import warnings

import pytest
from rich.console import Console
from tqdm import tqdm
from tqdm.auto import tqdm as tqdm_auto

from rrtc import console, progress_line
from rrtc.errors import RrtcError

NASTY = "a[/x][red]\x1b[31m\u202eb\x07\x9b\udc80"
SHOWN = r"a[/x][red]\x1b[31m\u202eb\x07\x9b\udc80"


def test_control_characters_are_shown_as_escapes():
    assert console.visible(NASTY) == SHOWN
    assert console.visible("one\ntwo\r\tthree é 漢") == r"one\ntwo\r\tthree é 漢"
    assert console.plain("one\ntwo\r").plain == "one\ntwo\\r"


def test_nothing_in_a_table_is_markup():
    paper = Console(width=200, color_system=None)
    with paper.capture() as captured:
        paper.print(console.table(NASTY, ["[bold]", NASTY], [["[/x]", NASTY], [NASTY, 3]]))
    assert captured.get().count(SHOWN) == 4 and "[bold]" in captured.get() and "[/x]" in captured.get()


def test_nothing_in_notes_warnings_and_errors_is_markup(capsys):
    console.note(NASTY)
    console.warn(NASTY)
    console.show_error(RrtcError(NASTY, NASTY))
    assert capsys.readouterr().err.splitlines() == [SHOWN, f"Note: {SHOWN}", f"Error: {SHOWN}", f"Hint: {SHOWN}"]


def test_a_progress_bar_shows_its_description_as_it_is(monkeypatch, capsys):
    terminal = Console(stderr=True, force_terminal=True, color_system=None, width=200)
    monkeypatch.setattr(console, "notes", terminal)
    with console.progress(NASTY, total=2) as advance:
        advance()
    assert SHOWN in capsys.readouterr().err


def test_where_there_is_no_terminal_long_work_tells_a_line_now_and_then(monkeypatch, capsys):
    with console.progress("Reading", total=2) as advance:
        advance()
    assert capsys.readouterr().err == ""  # it takes less than a minute
    monkeypatch.setattr(progress_line, "EVERY", 0.0)
    with console.progress(NASTY, total=2) as advance:
        advance()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(re.escape(SHOWN) + r" 1/2 0:00:0\d left 0:00:0\d", line)
    with console.whole_progress({"Reading": 1, "Writing": 3}), console.progress("Reading", total=2) as advance:
        advance()
    assert capsys.readouterr().err.startswith("1/2 Reading 12% 0:00:0")
    with console.notes_shown(False), console.progress("Reading", total=2) as advance:
        advance()
    assert capsys.readouterr().err == ""


def test_bars_of_quantizers_are_not_shown_and_downloads_are(capsys):
    class Download(tqdm):
        pass

    Download.__module__ = "huggingface_hub.utils"
    with console.quiet_libraries():
        for kind in (tqdm, tqdm_auto):
            assert sum(kind(range(3), desc="Applying")) == 3
        assert capsys.readouterr().err == ""
        assert sum(Download(range(3), desc="Fetching")) == 3
    assert "Fetching" in capsys.readouterr().err
    assert sum(tqdm(range(3), desc="Applying")) == 3 and "Applying" in capsys.readouterr().err


def test_where_no_notes_are_shown_a_warning_is_pythons(capsys):
    with console.notes_shown(False), pytest.warns(console.RrtcWarning, match="mind the gap"):
        console.note("on the way")
        console.warn("mind the gap")
    assert capsys.readouterr() == ("", "")
    with console.notes_shown(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        console.note("on the way")
        console.warn("mind the gap")
    assert capsys.readouterr().err.splitlines() == ["on the way", "Note: mind the gap"]


@pytest.mark.parametrize("command", ["recipe", "--help"])
@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-", ">/dev/full"])
def test_a_closed_or_full_output_is_met_without_a_traceback(command, streams):
    line = f"exec {shlex.quote(sys.executable)} -m rrtc {command} {streams}"
    run = subprocess.run(line, shell=True, stderr=subprocess.PIPE, text=True)
    full = streams == ">/dev/full"
    assert run.returncode == (1 if full else 0)
    assert run.stderr == ("Error: No space left on device.\n" if full else "")
