"""The models that an evaluation measures: the dense one, the stages of a folder or several folders, and their exits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.architectures import dense_of
from rrtc.io.provenance import earlier_stages, read_provenance
from rrtc.io.recursive import trained_exits
from rrtc.io.source import Source, content_hash, find_model, read_config
from rrtc.io.weights import Weights
from rrtc.model import RrtConfig
from rrtc.stock.architecture import read_architecture, read_plan

DENSE = "dense"  # what the dense model is called, and so no other


@dataclass(frozen=True)
class Candidate:
    """One model folder. exits: the places of the layers after which it is measured as well. throughout: whether by
    everything, and not by text alone, as the stages on the way to it are."""

    name: str
    kind: str
    folder: Path
    exits: tuple[int, ...] = ()
    throughout: bool = True

    @property
    def counted(self):
        """What it is made of: the Plan of a recursive model, the Architecture of a stock one."""
        config = read_config(self.folder)
        if isinstance(config, RrtConfig):
            return read_plan(config)
        if hasattr(config, "quantization_config"):
            return read_architecture(config)
        return dense_of(find_model(str(self.folder))).architecture  # as init counts it, a head of its own and all

    def fingerprint(self) -> str:
        return content_hash(self.folder)

    def sizes(self, width: int | None = None) -> dict:
        """The sizes of rrtc/io/report.py. width: bytes a parameter; by default those that the folder has on disk."""
        counted = self.counted
        return {
            "params_total": counted.parameters,
            "params_non_embedding": counted.non_embedding,
            "bytes": Weights(self.folder).bytes_on_disk if width is None else width * counted.parameters,
            "parts": counted.parts,
        }

    def layers_computed(self, place: int) -> float:
        """The share of its layers that has run when it is left after the one at `place`."""
        return (place + 1) / read_config(self.folder).get_text_config().num_hidden_layers


def dense_candidate(dense: Source) -> Candidate:
    return Candidate(DENSE, "dense", dense.folder)


def candidates_of(folders: Sequence[Path]) -> list[Candidate]:
    """Of one folder the stages it went through, as far as they are still there, and the folder itself as the last; of
    several these folders, by their names."""
    if len(folders) > 1:
        return [Candidate(name, "stage", path, trained_exits(path)) for name, path in _named(folders).items()]
    (folder,) = folders
    stages = [*earlier_stages(folder), (read_provenance(folder)["stage"], folder)]
    found = []
    for number, (stage, path) in enumerate(stages):
        before = [earlier for earlier, _ in stages[:number]].count(stage)
        name = f"after {stage} {before + 1}" if before else f"after {stage}"
        last = path == folder
        found.append(Candidate(name, "stage", path, trained_exits(path) if last else (), throughout=last))
    return found


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by as much of their paths as tells them apart, and from the dense model. Raises WrongUsage where one
    is there twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise WrongUsage("A folder is named twice.", "Name each model once.")
    short = {folder.name: folder for folder in folders}
    if len(short) < len(folders) or DENSE in short:  # as in a sweep, runs/rank=0/uptrain and runs/rank=64/uptrain
        paths = [folder.resolve().parts for folder in folders]
        before, after = (_in_common(ends) for ends in (paths, [path[::-1] for path in paths]))
        short = {"/".join(path[before : len(path) - after]): f for path, f in zip(paths, folders, strict=True)}
    if len(short) < len(folders) or not all(short) or DENSE in short:
        return {str(folder.resolve()): folder for folder in folders}
    return short


def _in_common(paths: Sequence[Sequence[str]]) -> int:
    """How many of their first parts all paths have in common."""
    return next((n for n, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths)))


def check_holds_model(folder: Path) -> dict:
    """What rrtc.yaml in `folder` says. Raises RrtcError where rrtc did not write it, or no model is in it, or a damaged
    one."""
    provenance = read_provenance(folder)
    if not (folder / "config.json").exists():
        raise RrtcError(f"{folder} is a '{provenance['stage']}' folder and holds no model to measure.")
    if isinstance(config := read_config(folder), RrtConfig):
        read_plan(config)
    return provenance


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that the weights in `folder` have; of a quantized export, those that are not quantized."""
    config = read_config(folder)
    return config.dtype if hasattr(config, "quantization_config") else getattr(torch, Weights(folder).dtype)
