"""`rrtc export --push-to-hub`: what can be known before the work, and the upload of the folder after it.

huggingface_hub does all of it. The endpoint and the token are those of its own settings (HF_ENDPOINT, HF_TOKEN, the
file that 'hf auth login' writes).
"""

import os
import shutil
import tempfile
from pathlib import Path

import yaml

from rrtc import __version__
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.provenance import PROVENANCE, read_provenance, without_places

MADE_WITH_THE_REPOSITORY = {".gitattributes", "README.md"}


def check_push(repo_id: str, private: bool) -> None:
    """Raises WrongUsage where `repo_id` is no name of a repository, and RrtcError where the hub cannot be reached or
    does not take this user's token, where there are files in that repository already, or where others see it although
    it is to be `private`."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise WrongUsage(f"'{repo_id}' is no name of a repository.", "Write it as user/name.") from error
    login = "Run 'hf auth login', or set HF_TOKEN, to a token that may write."
    if get_token() is None:
        raise RrtcError("There is no Hugging Face token on this machine, so nothing can be pushed.", login)
    api = HfApi()
    try:
        owner = api.whoami()["name"]
    except Exception as error:  # no network, offline mode, a wrong token: huggingface_hub has a class for each
        raise RrtcError(f"The hub does not let you in: {_reason(error)}.", login) from error
    full_name = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
    try:
        there = set(api.list_repo_files(full_name)) - MADE_WITH_THE_REPOSITORY
        is_public = not api.repo_info(full_name).private
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise RrtcError(f"The hub does not say what is in {full_name}: {_reason(error)}.") from error
    if there:
        raise RrtcError(
            f"There are files in {full_name} on the hub already, such as {min(there)}.",
            "Name a new repository: rrtc overwrites nothing.",
        )
    if private and is_public:
        raise RrtcError(
            f"{full_name} is on the hub already, where everybody sees it.", "Make it private there, or name a new one."
        )


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads the export in `folder` into the repository, which is made where there is none; returns its URL. What is
    uploaded does not say where on this machine anything is.

    private: make it so that nobody else sees it (otherwise as the owner's settings have it, usually public). Raises
    RrtcError where that fails; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="rrtc", library_version=__version__)
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="rrtc-push-") as scratch:
            public = _public(Path(folder), Path(scratch) / "public")
            api.upload_folder(repo_id=url.repo_id, folder_path=public, commit_message=f"Exported by rrtc {__version__}")
    except Exception as error:  # as above
        raise RrtcError(
            f"The export in {folder} is whole, but was not pushed to {repo_id}: {_reason(error)}.",
            f"Push it with: hf upload {repo_id} {folder}{' --private' if private else ''} --exclude {PROVENANCE} "
            "(which says where things are here).",
        ) from error
    return str(url)


def _public(folder: Path, place: Path) -> Path:
    """`place`, made a folder of links to the files of `folder`, with another rrtc.yaml."""
    shutil.copytree(folder, place, copy_function=lambda file, link: os.symlink(os.path.abspath(file), link))
    provenance = without_places(read_provenance(folder))
    provenance["base"]["relative_path"] = provenance["base"]["path"]
    (place / PROVENANCE).unlink()
    (place / PROVENANCE).write_text(yaml.safe_dump(provenance, sort_keys=False, allow_unicode=True), encoding="utf8")
    return place


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
