"""Model folders on disk, beside their weights: how one is written whole or not at all, and what goes along.

Everything rrtc writes is built in NAME.partial and renamed to NAME when it is complete, so that a killed run never
leaves something that looks finished.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.cache import cache_folder
from rrtc.io.trust import without_code
from rrtc.io.weights import disk_error

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# What goes along with the weights: the tokenizer, the generation defaults, the license.
COMPANION_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*.jinja", "generation_config.json", "spiece.model", *LICENSE_FILES,
)  # fmt: skip
RESUMABLE = {"checkpoints": "uptrain", "work": "init"}  # a folder in NAME.partial: the command that goes on from it
STARTED = "started.json"  # in it
MARK = ".made-by-rrtc"  # in NAME.partial, which is removed only where it has this


def check_target(target: Path, *sources: Path) -> None:
    """Raises RrtcError unless `target` can become a new folder: absent or empty, in a place that can be written to,
    with nothing that is not rrtc's in NAME.partial, and outside the folders `sources` that it is made from."""
    target = Path(target)
    check_outside(target, *sources)
    if target.resolve() == Path.cwd() or target.is_mount():
        raise RrtcError(f"The output folder {target} cannot be replaced by a new one.", "Name a folder inside it.")
    if target.is_symlink():
        raise RrtcError(f"The output {target} is a link.", "Name a folder beside the one that it leads to.")
    if target.is_dir() and any(target.iterdir()):
        raise RrtcError(f"The output folder {target} is not empty.", "Name a new folder: rrtc overwrites nothing.")
    if target.exists() and not target.is_dir():
        raise RrtcError(f"The output {target} is a file.", "Name a new folder.")
    parent = _nearest_parent(target)
    if not parent.is_dir():
        raise RrtcError(f"The output folder {target} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise RrtcError(f"The output folder {target} cannot be made: {parent} is read-only.")
    partial = partial_of(target)
    if not _is_ours(partial):
        sentence = f"{partial} is in the way: outputs are built under such names, and rrtc did not make what is there."
        raise RrtcError(sentence, "Name another output, or move it away.")


def check_outside(target: Path, *sources: Path) -> None:
    """Raises WrongUsage where `target` lies in one of the folders `sources` that it is made from: that would not be
    what it was any more, and a folder of text would have rrtc's own files among its documents."""
    for source in sources:
        if Path(target).resolve().is_relative_to(Path(source).resolve()):
            sentence = f"The output {target} lies in the folder {source}, from which it is made."
            raise WrongUsage(sentence, "Name a folder outside it.")


def _is_ours(partial: Path) -> bool:
    """Whether `partial` can be removed: it is not there, or empty, or says that rrtc made it."""
    if partial.is_symlink() or not partial.is_dir():
        return not os.path.lexists(partial)
    signs = [partial / MARK, *(partial / folder / STARTED for folder in RESUMABLE)]
    return any(sign.exists() for sign in signs) or not any(partial.iterdir())


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that it holds: its MARK last, so that a kill on the way leaves nothing that
    rrtc takes for somebody else's."""
    if path.is_file():
        path.unlink()
        return
    for inner in path.iterdir() if (path / MARK).exists() else ():
        if inner.is_dir() and not inner.is_symlink():
            shutil.rmtree(inner, ignore_errors=True)
        elif inner.name != MARK:
            with suppress(OSError):
                inner.unlink()
    shutil.rmtree(path, ignore_errors=True)


def check_space(target: Path, needed: int) -> None:
    """Raises RrtcError where the disk of `target` has less than `needed` bytes left."""
    free = shutil.disk_usage(_nearest_parent(target)).free
    if free < needed:
        raise RrtcError(
            f"This needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on the disk of {target}."
        )


def _nearest_parent(target: Path) -> Path:
    """The nearest of the folders around `target` that is there already."""
    return next(parent for parent in Path(target).absolute().parents if parent.exists())


def partial_of(target: Path) -> Path:
    """Where `target` is built before it is complete."""
    target = Path(target).absolute()
    return target.with_name(target.name + ".partial")


def check_not_interrupted(target: Path, own: str | None = None) -> None:
    """Raises RrtcError where `target`.partial holds what another command than the one whose folder is `own` has left
    to go on from."""
    partial = partial_of(target)
    for folder, command in RESUMABLE.items():
        if folder != own and (partial / folder).exists():
            raise RrtcError(
                f"{partial} holds the {folder} of an interrupted run.",
                f"Continue it with 'rrtc {command} --resume', or delete that folder.",
            )


@contextmanager
def whole_folder(target: Path, keep_partial: bool = False):
    """Yields the folder in which to build `target`; renames it to `target` when the block ends without an error.

    After an error the unfinished folder is removed, unless `keep_partial` is set: for a run that can be resumed, and
    that has made sure itself that it is the `only_run`. Raises RrtcError where another run is writing `target`.
    """
    target, partial = Path(target), partial_of(target)
    with nullcontext() if keep_partial else only_run(target):
        check_target(target)
        if not keep_partial:
            check_not_interrupted(target)
        new_parents = [parent for parent in partial.parents if not parent.exists()]
        try:
            if not keep_partial:
                remove(partial)
            partial.mkdir(parents=True, exist_ok=True)
            (partial / MARK).touch()
            yield partial
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
            (target / MARK).unlink(missing_ok=True)
        except BaseException as error:
            if not keep_partial:
                remove(partial)
            for parent in new_parents:
                with suppress(OSError):  # not empty: something of use stayed
                    parent.rmdir()
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise disk_error(target, error) from error
            raise


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer, generation defaults and license files of one model folder into another; no code, and
    nothing that asks for code."""
    for pattern in COMPANION_FILES:
        for file in Path(source).glob(pattern):
            if not file.is_file() or file.suffix == ".py":
                continue
            copy = Path(target) / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
            if file.name == "tokenizer_config.json":
                values = json.loads(file.read_text(encoding="utf8"))
                if values != (kept := without_code(values)):
                    text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
                    (Path(target) / file.name).write_text(text, encoding="utf8")


def file_hash(file: Path) -> str:
    """The SHA-256 of what `file` holds."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yields where to write `file`. It gets its name when the block ends and its contents are on the disk, so that a
    file is whole where there is one, whoever else writes it meanwhile. Raises RrtcError where the disk does not take
    it."""
    from safetensors import SafetensorError

    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        temporary.rename(file)
    except (OSError, SafetensorError) as error:
        raise disk_error(file, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def only_run(target: Path) -> Iterator[None]:
    """Keeps `target` from the other runs of this user on this machine until the block ends, or the process does.

    Raises RrtcError where one of them has it.
    """
    name = hashlib.sha256(os.fsencode(Path(target).resolve())).hexdigest()[:32]
    file = cache_folder() / "locks" / f"{name}.lock"
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RrtcError(f"Another run is writing {target}.", "Wait for its end, or name another folder.") from error
    except OSError:
        pass  # nobody can write to the cache; that is no reason not to work
    try:
        yield
    finally:
        lock.release()
