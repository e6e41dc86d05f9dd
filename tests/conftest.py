"""Shared by all tests: no hub, no colours, no progress bars of other libraries; the dense pico models."""

import os
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUBLAS_WORKSPACE_CONFIG=":4096:8")


@pytest.fixture(scope="session", autouse=True)
def cache_of_all_tests(tmp_path_factory):
    """Text is tokenised once for all tests, and nothing is written into the user's own cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RRTC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
