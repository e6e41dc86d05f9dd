"""The one door: what the commands do, as functions.

    from rrtc import api

    api.plan("SmolLM2-135M", loops=2)                        # what would be made of it; no weights are read
    api.init("SmolLM2-135M", "small", budget=0.7)
    api.uptrain("small", "healed", data="corpus.jsonl", tokens=10_000_000)
    report = api.evaluate("healed", output="report")
    api.export("healed", "release", report="report")
    model, tokenizer = api.load("healed")

Keywords are the fields of the recipe's section (`rrtc recipe` lists them) and say what the command's flags say.
`recipe` is where they start from: a file, a dictionary or a Recipe. A keyword that is None counts as not given. Places
may begin with ~. What is returned is described in rrtc/results.py.

Nothing is printed. With verbose=True, notes, warnings and progress go to stderr, as on the command line; without, what
must not be missed is a Python warning (rrtc.console.RrtcWarning). What cannot be done raises an RrtcError, or its kind
WrongUsage where the call itself is wrong, before any work as far as it can be known by then.

Importing this module imports no torch: what takes seconds to import waits until the cheap checks have passed.
"""

from rrtc.api.models import env, inspect, load, tie
from rrtc.api.runs import plan_run, run, sweep
from rrtc.api.speaking import chat, generate, generate_file, serve
from rrtc.api.stages import estimate, evaluate, export, init, plan, uptrain

__all__ = [
    "chat",
    "env",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "generate_file",
    "init",
    "inspect",
    "load",
    "plan",
    "plan_run",
    "run",
    "serve",
    "sweep",
    "tie",
    "uptrain",
]
