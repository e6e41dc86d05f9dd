"""Fresh Python processes that start ready: forked from one that has imported what rrtc imports already.

They are for what processes of rrtc do together, or leave behind when they are killed, and for the processes that rrtc
itself starts; nothing of rrtc is imported in them. How one starts is for a cold one, and where what transformers reads
of the environment matters, for warm.py. Here too each has its own program, arguments, environment, folder and end.
"""

import atexit
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import warm

IMPORTED = [*warm.IMPORTED, "accelerate", "datasets", "matplotlib.figure", "pydantic.main", "rich.progress", "typer",
            "transformers.conversion_mapping", "transformers.models.llama.modeling_llama",
            "transformers.trainer"]  # fmt: skip


known: list[Path] = []  # where the server is told of jobs


def orders() -> Path:
    """Where folders of jobs are named to the process that forks the others. It is started when it is first asked for,
    ends with this process, and is known in those that it forks, so that what they start starts ready, too."""
    if not known:
        made = Path(tempfile.mkdtemp(prefix="rrtc-ready-"), "orders")
        os.mkfifo(made)
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        command = [sys.executable, "-P", __file__, made]
        given = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "env": os.environ | {"PYTHONPATH": path}}
        server = subprocess.Popen(command, **given)
        atexit.register(lambda: (server.stdin.close(), shutil.rmtree(made.parent)))
        known.append(made)
    return known[0]


class Ready:
    """A running process, like subprocess.Popen([sys.executable, FILE or "-m", MODULE or "-c", CODE, *arguments])."""

    def __init__(self, command: list, env: dict[str, str] | None = None, cwd: Path | None = None):
        assert command[0] == sys.executable
        self.args, self._folder = command, Path(tempfile.mkdtemp(prefix="rrtc-ready-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        for name in "12":
            (self._folder / name).touch()
        own = [str(cwd or os.getcwd()), dict(env or os.environ), warm.plain_path()]
        (self._folder / "job").write_text(json.dumps([[str(word) for word in command[1:]], *own]))
        with open(orders(), "w") as named:
            named.write(f"{self._folder}\n")  # in one piece, whoever else writes
        self.pid = self._told("pid", 300)

    def _told(self, name: str, timeout: float) -> int:
        until = time.monotonic() + timeout
        while not (self._folder / name).exists():
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return int((self._folder / name).read_text())

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.wait() if (self._folder / "status").exists() else None

    returncode = property(poll)

    def wait(self, timeout: float = 300) -> int:
        return os.waitstatus_to_exitcode(self._told("status", timeout))

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    @property
    def stdout(self) -> str:
        """What it has said until now."""
        return (self._folder / "1").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self._folder / "2").read_text(errors="replace")


def run(command: list, *, check: bool = False, **others) -> subprocess.CompletedProcess:
    """subprocess.run, of a command as Ready takes it, whose output is text and captured, and whose input is empty."""
    process = Ready(command, **others)
    done = subprocess.CompletedProcess(command, process.wait(), process.stdout, process.stderr)
    if check:
        done.check_returncode()
    return done


def run_isolated(command: list, **kwargs) -> subprocess.CompletedProcess:
    """In place of subprocess.run: what rrtc starts (with -P, or a converter's file) starts ready, all else as ever."""
    if command[0] == sys.executable and (command[1] == "-P" or "convert_hf_to_gguf" in str(command[1])):
        return run(command, **{name: value for name, value in kwargs.items() if name in ("cwd", "env", "check")})
    return warm.cold_run(command, **kwargs)


def run_two(command: list) -> subprocess.CompletedProcess:
    """A command on two processes of one thread each that find each other as torchrun's do. What both say is in one
    text; where one fails, the other is stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    both = [Ready(command, os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    until = time.monotonic() + 300
    while any(process.poll() is None for process in both):
        if time.monotonic() > until or any(process.poll() for process in both):
            for process in both:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.01)
    codes = [process.wait() for process in both]
    said = ["".join(getattr(process, name) for process in both) for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), *said)


# -- in the server


def serve() -> None:
    """Forks a process for every folder that is named in orders(), until the input ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    warm.plain_path()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    named, text = os.open(orders(), os.O_RDWR), b""  # somebody always has it open for writing, so that it never ends
    while sys.stdin not in select.select([sys.stdin, named], [], [])[0]:
        *folders, text = (text + os.read(named, 1 << 16)).split(b"\n")
        for folder in folders:
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                keep(Path(folder.decode()))


def keep(folder: Path) -> None:
    """Runs the job in `folder` in a process of its own, and writes down its number and how it ended. Returns in
    neither."""
    child = os.fork()
    if not child:
        subprocess.run = run_isolated
        try:
            warm.program(*json.loads((folder / "job").read_text()), [folder / "1", folder / "2"])
            code = 0
        except SystemExit as end:
            if not isinstance(end.code, int | None):
                raise
            code = end.code or 0
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # half a second earlier than after everything that was imported has been taken apart
    for name, value in (("pid", lambda: child), ("status", lambda: os.waitpid(child, 0)[1])):
        (folder / f"{name}.tmp").write_text(str(value()))
        (folder / f"{name}.tmp").rename(folder / name)
    os._exit(0)


if __name__ == "__main__":
    known.append(Path(sys.argv[1]))
    serve()
