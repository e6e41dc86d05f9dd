"""Shared by all tests: no hub, no colors, no progress bars of other libraries; the dense pico models."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUBLAS_WORKSPACE_CONFIG=":4096:8")
# Hundreds of processes import the same modules: whoever comes first compiles them for the others.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
gc.set_threshold(200_000, 20, 20)  # looking through all that torch has imported takes a sixth of the time otherwise
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores share them


def pytest_collection_modifyitems(items):
    """The quickstart takes longest, so it begins first; then all that is slow. What is fast evens out the end."""
    items.sort(key=lambda item: ("quickstart" not in item.fixturenames, item.get_closest_marker("slow") is None))


@pytest.fixture(scope="session", autouse=True)
def cache_of_all_tests(tmp_path_factory):
    """Text is tokenized once for all tests, and none of it stays in the user's own cache; models that were dequantized
    before are found there."""
    from rrtc.io.cache import cache_folder

    models, cache = cache_folder() / "gguf", tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (cache / "gguf").symlink_to(models.absolute())
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RRTC_CACHE", str(cache))
        yield


@pytest.fixture(scope="session", autouse=True)
def ready_processes():
    """The fresh processes in which rrtc reloads its exports and measures memory start ready; with `cold`, as they do
    for users."""
    import ready

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess, "run", ready.run_isolated)
        yield


@pytest.fixture
def cold(monkeypatch):
    from warm import cold_run

    monkeypatch.setattr(subprocess, "run", cold_run)


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A folder with the dense pico model of an architecture, made once."""
    from pico import save_pico  # after the environment is set

    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_pico(tmp_path_factory.mktemp(architecture) / "dense", architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def rrt(dense):
    """An rrtc folder that can be trained, beside the dense pico model it is made from."""
    from uptraining import make_rrt

    return make_rrt(dense("llama").parent / "rrt", dense("llama"))


def pytest_collection_finish():
    """What imports have left lives as long as the tests: a collection, of which rrtc asks for many, need not look at it
    each time."""
    gc.collect()
    gc.freeze()
