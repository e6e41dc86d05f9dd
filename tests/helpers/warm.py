"""Fresh Python processes that start warm: forked from one that has imported torch, and nothing of transformers or rrtc.

Most of what a pico model's export or evaluation takes is a fresh process importing torch. These have their own program,
arguments, environment, folder and import path all the same, and end in an exit code of their own.
"""

import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTED = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
            "safetensors.torch", "scipy.linalg", "scipy.optimize", "sympy"]  # fmt: skip
cold_run = subprocess.run


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


@functools.cache
def plain_path() -> list[str]:
    """sys.path of this Python where nothing is added to it."""
    code = "import sys; print(*sys.path, sep='\\n')"
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    return cold_run(command, env=without, capture_output=True, text=True, check=True).stdout.splitlines()


def run(command: list[str], *, cwd=None, env=None, check=False, **others) -> subprocess.CompletedProcess:
    """subprocess.run for `[sys.executable, ("-P",) (FILE or "-m" MODULE or "-c" CODE), *arguments]`, whose output is
    text and captured, and whose input is empty."""
    assert command[0] == sys.executable and others.keys() <= {"capture_output", "text", "errors", "stdin"}, others
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        own = [str(cwd or os.getcwd()), dict(env or os.environ), plain_path()]
        started = server().Process(target=program, args=([str(word) for word in command[1:]], *own, said))
        started.start()
        started.join()
        out, err = (file.read_text(errors="replace") for file in said)
    done = subprocess.CompletedProcess(command, started.exitcode, out, err)
    if check:
        done.check_returncode()
    return done


def program(arguments: list[str], cwd: str, env: dict[str, str], path: list[str], said: list[Path]) -> None:
    gc.freeze()  # what was imported
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if transformers := sys.modules.get("transformers.dynamic_module_utils"):  # it looked when it was imported
        transformers.HF_MODULES_CACHE = env.get("HF_MODULES_CACHE", transformers.HF_MODULES_CACHE)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    safe = arguments[0] == "-P"
    kind = arguments[safe]
    what, *sys.argv = arguments[safe + (kind in ("-m", "-c")) :]
    sys.argv.insert(0, "-c" if kind == "-c" else what)
    first = [] if safe else [""] if kind == "-c" else [cwd] if kind == "-m" else [str(Path(what).parent)]
    sys.path[:] = first + [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder] + path
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")
