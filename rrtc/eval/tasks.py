"""Tasks of lm-evaluation-harness, driven from Python: which of them can be run, and the score of each of their items.

The harness makes the prompts, asks the model and marks the answers. Here is what it leaves open: which metric is
reported, the scores item by item (so that two models can be compared on the same items), task files whose data lie in
a folder of the user's, a quick and clear end where there is no network, and progress.
"""

import difflib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from rrtc.console import warn
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.folder import file_hash
from rrtc.recipe.eval import EvalRecipe
from rrtc.text.tokens import begin_and_end

if TYPE_CHECKING:
    import numpy as np

PAPER = {
    "lambada_openai": "acc", "hellaswag": "acc_norm", "piqa": "acc_norm", "winogrande": "acc",
    "arc_easy": "acc_norm", "arc_challenge": "acc_norm", "openbookqa": "acc_norm",
}  # fmt: skip
METRICS = ("acc_norm", "acc", "exact_match", "f1")  # of another task: the first that it has, or else its own first
DATA = re.compile(r"(?<!\{)\{data\}(?!\})")  # in a task file: the folder given as tasks_data; {{data}} is a field
SECONDS_TO_FIND_THE_HUB = 3


@dataclass(frozen=True)
class Task:
    """A task that can be run. metric: what its score is; items: how many are scored; fewshot: solved examples before
    each; loaded: the harness's own task, with its data; code: a hash of the user's Python that it may run."""

    name: str
    metric: str
    items: int
    fewshot: int
    seed: int
    loaded: Any
    code: str | None

    @functools.cached_property
    def fingerprint(self) -> dict:
        """Plain data that differs where a score of this task would be of other items, or other than it was."""
        import lm_eval

        config = json.loads(json.dumps(self.loaded.dump_config(), default=_name))
        config.get("metadata", {}).pop("config_source", None)  # where its files lie does not matter
        config.pop("dataset_kwargs", None)  # but what is in them does
        seen = list(itertools.islice(self.loaded.eval_docs, self.items))
        if self.fewshot:
            seen += self.loaded.fewshot_docs()
        content = json.dumps(seen, sort_keys=True, default=_name)
        return {
            "task": self.name,
            "metric": self.metric,
            "harness": lm_eval.__version__,
            **({"code": self.code} if self.code else {}),
            "config": config,
            "items": self.items,
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
            "fewshot": self.fewshot,
            "seed": self.seed if self.fewshot else None,
        }


def find_tasks(recipe: EvalRecipe) -> tuple[list[Task], list[dict]]:
    """(the tasks of `recipe` that can be run, with their data; {task, why} for each of the others).

    A group or tag of the harness stands for its tasks. Raises RrtcError where the harness is not installed, a task is
    unknown, or a file of the user's is missing or wrong.
    """
    if not recipe.tasks:
        return [], []
    _check_installed()
    asked = list(dict.fromkeys(n for name in recipe.tasks for n in (PAPER if name == "paper" else (name,))))
    tasks: dict[str, Task] = {}
    not_run = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        if recipe.tasks_dir:
            _write_with_data(Path(recipe.tasks_dir), recipe.tasks_data, Path(folder))
        managers = {name: _manager(name, folder) for name in asked}
        for name, manager in managers.items():
            if _is_local(name, manager, folder):
                _check_data(name, manager.task_index[name].cfg)
        with _network() as reachable:
            for name, manager in managers.items():
                try:
                    loaded = manager.load([name])["tasks"]
                except Exception as error:  # the harness, datasets and the code of a task raise what they like
                    offline = not reachable and isinstance(error, ConnectionError)  # a local task can ask the hub too
                    if _is_local(name, manager, folder) and not offline:
                        sentence = f"The task {name} of {recipe.tasks_dir} does not load: {_first_line(error)}"
                        raise RrtcError(sentence) from error
                    not_run.append({"task": name, "why": _why_not_loaded(error, reachable)})
                    continue
                own = recipe.tasks_dir if _is_local(name, manager, folder) else None
                code = _hash_of_code(Path(own)) if own else None
                for one in loaded.values():
                    found = _ready(one, recipe, code)
                    if isinstance(found, Task):
                        tasks[found.name] = found
                    else:
                        not_run.append({"task": one.task_name, "why": found})
    return list(tasks.values()), not_run


class Harness:
    """A model, ready to be asked the items of tasks.

    model: a loaded causal language model, on the device where it is to run. Under torchrun or accelerate every process
    makes a Harness with a model of its own, and they share the items.
    """

    def __init__(self, model, tokenizer, recipe: EvalRecipe):
        from lm_eval.models.huggingface import HFLM

        self.seed = recipe.seed
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        with _quiet():
            self.lm = HFLM(
                model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=recipe.task_batch,
                max_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
                # Gemma is lost without its <bos>. A token that a tokenizer puts at the end would be in the wrong place.
                add_bos_token=bool(begin_and_end(tokenizer)[0]),
            )
        if self.processes > 1:
            from accelerate import Accelerator, InitProcessGroupKwargs

            # Processes that are done wait for the slowest, however long it takes; as in the harness.
            patient = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
            self.lm.accelerator = Accelerator(cpu=model.device.type == "cpu", kwargs_handlers=[patient])

    def run(self, task: Task, advance=lambda n: None) -> "dict[str, np.ndarray]":
        """{"score": the task's metric of each item, and each of its metrics by name}: float64 (items,), in the order
        of the task's documents and in every process. advance is called with the number of items that were done since.
        Raises RrtcError where the task does not work with this model."""
        import numpy as np
        from lm_eval.evaluator import evaluate
        from transformers import set_seed

        set_seed(self.seed)
        task.loaded.set_fewshot_seed(self.seed)
        shared = 1 < self.processes <= task.items  # a process without items is none to the harness
        self.lm._rank = self.lm.accelerator.process_index if shared else 0
        self.lm._world_size = self.processes if shared else 1
        progress = _Progress(task, advance)
        self.lm.set_cache_hook(progress)
        try:
            with _quiet():
                found = evaluate(self.lm, {"tasks": {task.name: task.loaded}}, limit=task.items, bootstrap_iters=0)
        except Exception as error:  # an item without a field, a prompt too long for the model, the task's own code
            raise RrtcError(f"The task {task.name} stopped: {_first_line(error)}") from error
        progress.reach(task.items)
        self._say_what_was_cut_off(task)
        scores = None
        if found is not None:  # as in every process but the first of those that share the items
            samples = found["samples"][task.name]
            samples = [s for s in samples if s["filter"] == samples[0]["filter"]]  # the first way to read an answer
            samples.sort(key=lambda sample: sample["doc_id"])
            metrics = {"score": task.metric} | {metric: metric for metric in _mean_metrics(task.loaded)}
            scores = {
                key: np.array([sample[metric] for sample in samples if metric in sample], dtype=np.float64)
                for key, metric in metrics.items()
            }
        if shared:
            from accelerate.utils import broadcast_object_list

            scores = broadcast_object_list([scores])[0]
        return scores

    def _say_what_was_cut_off(self, task: Task) -> None:
        """Warns where prompts were longer than what the model sees: the harness leaves out how they begin."""
        most, longest = self.lm.max_length, 0
        for request in task.loaded.instances:
            if request.request_type == "loglikelihood":
                tokens = len(self.lm.tok_encode("".join(request.args))) - 1  # the last one is only said
            elif request.request_type == "generate_until":
                answer = request.args[1].get("max_gen_toks", self.lm.max_gen_toks)
                tokens = len(self.lm.tok_encode(request.args[0])) + answer
            else:
                continue  # text that is scored in windows
            longest = max(longest, tokens)
        if longest > most:
            warn(
                f"The model sees {most:,} tokens, and prompts of the task {task.name} have up to {longest:,}: how "
                "these begin was cut off, solved examples first. Its scores are not those that others report."
            )


class _Progress:
    """Stands in the place of the harness's cache, which is handed every answer, and counts them."""

    def __init__(self, task: Task, advance):
        self.task, self.advance = task, advance
        self.answers = self.done = 0

    @functools.cached_property
    def expected(self) -> int:
        """Answers of this process, whose share stands for all."""
        return sum(request.repeats for request in self.task.loaded.instances)

    def add_partial(self, kind: str, request, answer) -> None:
        self.answers += 1
        self.reach(min(self.task.items, self.task.items * self.answers // self.expected))

    def reach(self, done: int) -> None:
        if done > self.done:
            self.advance(done - self.done)
            self.done = done


def _check_installed() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise RrtcError(
            f"Tasks need lm-evaluation-harness, and {error.name} is not installed.", "pip install 'rrtc[eval]'"
        ) from error


@contextmanager
def _quiet():
    """Without what the harness and its libraries say and draw on stderr."""
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.__init__
    logger.setLevel(logging.CRITICAL)
    # The harness draws one of its bars whatever it is told, and tqdm's own switch is read when tqdm is imported.
    tqdm.__init__ = lambda self, *given, **settings: start(self, *given, **(settings | {"disable": True}))
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = start


@contextmanager
def _network():
    """Yields whether the hub can be reached. Where it cannot, the libraries are told, for they would try for half a
    minute for each data set; what is in their caches they still find."""
    import datasets.config
    import huggingface_hub.constants as hub
    from huggingface_hub import get_session

    try:
        get_session().head(hub.ENDPOINT, timeout=SECONDS_TO_FIND_THE_HUB)
        reachable = True
    except Exception:  # no network, a proxy that refuses, or the user's own wish to stay offline
        reachable = False
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = (offline or not reachable for offline in before)
    try:
        yield reachable
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _manager(name: str, folder: str):
    """The index of tasks in which to look for `name`: that of the task files in `folder`, or the harness's own. Raises
    WrongUsage where it is in neither."""
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=folder, include_defaults=False)
    if name in local.all_subtasks:
        return local
    if name in local.task_index:  # a group or tag, which may refer to what is in the harness
        return TaskManager(include_path=folder)
    harness = _harness_manager()
    if name not in harness.task_index:
        close = difflib.get_close_matches(name, ["paper", *local.all_tasks, *harness.all_tasks], n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "'lm-eval ls tasks' lists them."
        raise WrongUsage(f"There is no task '{name}' in lm-evaluation-harness, nor in a tasks_dir.", hint)
    return harness


@functools.cache
def _harness_manager():
    """The index of the harness's own tasks, for which it reads thousands of files: seconds, and once is enough."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_local(name: str, manager, folder: str) -> bool:
    return str(manager.task_index[name].yaml_path).startswith(folder)


def _write_with_data(tasks: Path, data: str | None, target: Path) -> None:
    """Writes the task files of the folder `tasks` into `target`, with `data` in place of {data}, and links to the
    files beside them."""
    import yaml

    if not any(tasks.rglob("*.yaml")):
        raise RrtcError(f"There are no task files (.yaml) in the folder {tasks}.")
    for file in tasks.rglob("*"):
        place = target / file.relative_to(tasks)
        if file.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif file.suffix == ".yaml":
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                text = file.read_text(encoding="utf8")
                said = yaml.load(text, _task_loader())  # the harness passes over what it cannot read
                if isinstance(said, dict):
                    _TaskFile.model_validate(said)
            except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
                raise RrtcError(f"The task file {file} cannot be read: {' '.join(str(error).split())}") from error
            place.write_text(text if data is None else DATA.sub(lambda _: str(Path(data).absolute()), text), "utf8")
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file.absolute())


class _TaskFile(BaseModel):
    """What is looked at in a task file before the harness reads it."""

    task: str | list[str | dict] | None = None
    include: str | None = None
    dataset_kwargs: "_DatasetKwargs | None" = None


class _DatasetKwargs(BaseModel):
    data_files: str | list[str] | dict[str, str | list[str]] | None = None


@functools.cache
def _task_loader():
    """A YAML loader that takes the harness's own tags, such as !function, for None."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    return Loader


def _check_data(name: str, config: dict) -> None:
    """Raises where the local task `name` reads files that are not there."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    files = list(files.values()) if isinstance(files, dict) else [files]
    for file in itertools.chain.from_iterable([f] if isinstance(f, str) else f or [] for f in files):
        if DATA.search(file):
            raise WrongUsage(f"The task {name} reads {file}, and no folder stands for {{data}}.", "Give tasks_data.")
        if "://" not in file and not any(sign in file for sign in "*?[") and not Path(file).is_file():
            raise RrtcError(f"The task {name} reads {file}, and there is no such file.")


def _hash_of_code(folder: Path) -> str:
    """Of all Python files in the folder: a task may call any of them by way of another."""
    files = {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*.py")) if file.is_file()}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _ready(loaded, recipe: EvalRecipe, code: str | None) -> Task | str:
    """The harness's task as one of ours, or why it cannot be."""
    if getattr(loaded, "UNSAFE_CODE", False):
        return "It runs code that the model writes, which rrtc does not."
    if getattr(loaded, "MULTIMODAL", False):
        return "It asks about images or sounds."
    metrics = _mean_metrics(loaded)
    if not metrics:
        return f"It has no score of single items, only {', '.join(loaded.aggregation())} over all of them."
    preferred = [m for m in (PAPER.get(loaded.task_name), *METRICS) if m in metrics]
    if loaded.get_config("num_fewshot") != 0:  # 0 in the task's file: its prompt is complete as it is
        loaded.set_config("num_fewshot", recipe.fewshot)
    fewshot = loaded.get_config("num_fewshot")
    one_more = loaded.get_config("fewshot_split") == loaded.get_config("test_split")  # and then not the item itself
    if fewshot and len(loaded.fewshot_docs()) < fewshot + one_more:
        return f"It has too few solved examples to choose {fewshot} from."
    items = min(len(loaded.eval_docs), recipe.task_items or len(loaded.eval_docs))
    return Task(loaded.task_name, (preferred or metrics)[0], items, fewshot, recipe.seed, loaded, code)


def _mean_metrics(loaded) -> list[str]:
    """The metrics of the harness's task `loaded` that are means over its items, and better when higher."""
    from lm_eval.api.registry import get_aggregation

    mean, higher = get_aggregation("mean"), loaded.higher_is_better()
    return [name for name, function in loaded.aggregation().items() if function is mean and higher.get(name, True)]


def _why_not_loaded(error: Exception, reachable: bool) -> str:
    if isinstance(error, ImportError):
        return f"It needs a Python package that is not installed: {_first_line(error)}"
    if not reachable and isinstance(error, OSError):
        return "It needs data that are not in this machine's cache, and the hub cannot be reached."
    return f"It does not load: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."


def _name(thing) -> str:
    """What stands for code, and for anything else that JSON does not know, in a fingerprint."""
    return getattr(thing, "__qualname__", None) or str(thing)
