"""Tasks of lm-evaluation-harness: the scores of pico models item by item, against scores worked out here without the
harness; what cannot be run is said, and says why."""

import copy
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import ready
import torch
import yaml
from exports import make_rrt
from pico import pico_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from windowed import by_brute_force, see_windows

from rrtc.errors import RrtcError, WrongUsage
from rrtc.eval.tasks import Harness, find_tasks
from rrtc.io.source import load_for_scoring
from rrtc.recipe.eval import EvalRecipe

pytestmark = pytest.mark.slow  # the harness alone takes seconds to import

FILES = Path(__file__).parents[2] / "recipes" / "tasks"
ITEMS = 13
SAID = ["a", "is", "the", "of", "in"]  # single tokens after a space
WORDS = ["rain", "wind", "slow", "river", "under", "bridge", "stone", "and", "nobody", "us", "day", "long", *SAID]
DRAW = random.Random(5)


def words(least: int, most: int) -> str:
    return " ".join(DRAW.choices(WORDS, k=DRAW.randint(least, most)))


ROWS = {
    "piqa": [
        {"query": f"Question: {words(3, 6)}\n", "choices": [words(1, 4), words(1, 4)], "gold": DRAW.randrange(2)}
        for _ in range(ITEMS)
    ],
    "arc_easy": [
        {"query": f"Question: {words(3, 6)}?", "choices": [words(1, 3) for _ in range(4)], "gold": DRAW.randrange(4)}
        for _ in range(ITEMS)
    ],
    "winogrande": [
        {"context_options": [words(3, 5), words(3, 5)], "continuation": words(2, 4), "gold": DRAW.randrange(2)}
        for _ in range(ITEMS)
    ],
    "lambada_openai": [{"context": words(8, 12), "continuation": SAID[n % 5]} for n in range(ITEMS)],
}


def write_rows(folder: Path, rows: dict[str, list[dict]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_task(folder: Path, name: str, rows: list[dict], **config) -> Path:
    """A task file of our own, with its data beside it."""
    write_rows(folder, {name: rows})
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{{data}}/{name}.jsonl"}},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | {"test_split": "test"} | config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_data_of_tests_in_the_users_cache(tmp_path_factory):
    import datasets.config

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(scope="module")
def model(rrt):
    """A model that often says one of the words in SAID."""
    model = load_for_scoring(rrt)
    with torch.no_grad():
        for word in SAID:
            model.lm_head.weight[pico_tokenizer().encode(f" {word}")] *= 4
    return model


def recipe(data: Path, **changes) -> EvalRecipe:
    given = {"tasks": list(ROWS), "tasks_dir": str(FILES), "tasks_data": str(data), "task_batch": 3}
    return EvalRecipe.model_validate(given | changes)


def own(folder: Path, name: str, **changes) -> EvalRecipe:
    return EvalRecipe(tasks=[name], tasks_dir=str(folder), tasks_data=str(folder), **changes)


def scored(model, settings: EvalRecipe, tokenizer=None) -> dict[str, dict[str, np.ndarray]]:
    harness = Harness(model, tokenizer or pico_tokenizer(), settings)
    return {task.name: harness.run(task) for task in find_tasks(settings)[0]}


@torch.no_grad()
def likelihood(model, context: str, continuation: str, begin: tuple[int, ...] = ()) -> tuple[float, bool]:
    """The log-likelihood of `continuation`, and whether the model would say it."""
    encode = pico_tokenizer().encode
    before = [*begin, *encode(context, add_special_tokens=False)]
    ids = torch.tensor([*begin, *encode(context + continuation, add_special_tokens=False)])
    logs = model(ids[None]).logits[0, :-1].double().log_softmax(-1)[len(before) - 1 :]
    return logs.gather(1, ids[len(before) :, None]).sum().item(), bool((logs.argmax(-1) == ids[len(before) :]).all())


def by_hand(model, name: str, begin: tuple[int, ...] = ()) -> dict[str, list[float]]:
    found = {"acc": [], "acc_norm": []}
    for row in ROWS[name]:
        if name == "lambada_openai":
            found["acc"].append(likelihood(model, row["context"], f" {row['continuation']}", begin)[1])
            continue
        if name == "winogrande":
            logs = [likelihood(model, text, f" {row['continuation']}", begin)[0] for text in row["context_options"]]
        else:
            prompt = row["query"] + ("Answer:" if name == "piqa" else "\nAnswer:")
            logs = [likelihood(model, prompt, f" {choice}", begin)[0] for choice in row["choices"]]
            norm = np.array(logs) / [len(choice) for choice in row["choices"]]
            found["acc_norm"].append(norm.argmax() == row["gold"])
        found["acc"].append(np.argmax(logs) == row["gold"])
    return {metric: list(map(float, values)) for metric, values in found.items() if values}


def test_every_item_of_the_four_task_files_is_scored_as_by_hand(model, data):
    found = scored(model, recipe(data))
    assert list(found) == list(ROWS)
    for name, scores in found.items():
        expected = by_hand(model, name)
        assert {metric: list(values) for metric, values in scores.items() if metric != "score"} == expected, name
        assert list(scores["score"]) == expected.get("acc_norm", expected["acc"]), name
        assert scores["score"].dtype == np.float64
        assert 0 < scores["score"].mean() < 1


def test_a_model_whose_visits_see_a_window_is_asked_with_it(data, tmp_path):
    folder, calls = see_windows(make_rrt(tmp_path / "rrt")), []
    model = load_for_scoring(folder)
    model.register_forward_hook(lambda module, args, output: calls.append((args[0], output.logits)))
    scored(model, recipe(data, tasks=["piqa"], task_items=3))
    assert calls
    for ids, logits in calls:
        torch.testing.assert_close(logits, by_brute_force(folder, ids), atol=1e-4, rtol=0)


def test_a_second_run_gives_the_same_and_progress_is_told_in_items(model, data):
    settings = recipe(data, tasks=["arc_easy", "lambada_openai"], task_items=7)
    harness = Harness(model, pico_tokenizer(), settings)
    for task in find_tasks(settings)[0]:
        steps: list[int] = []
        first, second = harness.run(task, steps.append), harness.run(task)
        assert sum(steps) == 7 and len(steps) > 3
        for metric, values in first.items():
            assert values.tolist() == second[metric].tolist() and len(values) == 7


def test_a_tokenizer_that_begins_every_text_does_so_here(model, data):
    """As Gemma's does, and is lost without; and one that would also end every text does not."""
    beginning = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(pico_tokenizer().backend_tokenizer), bos_token="<bos>", eos_token="<eos>"
    )
    beginning.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    ending = copy.deepcopy(beginning)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    different = False
    for name in ROWS:
        settings = recipe(data, tasks=[name])
        with_bos, plain = by_hand(model, name, (0,)), by_hand(model, name)
        assert list(scored(model, settings, beginning)[name]["acc"]) == with_bos["acc"]
        assert list(scored(model, settings, ending)[name]["acc"]) == plain["acc"]
        different |= with_bos != plain
    assert different


def test_prompts_that_are_cut_off_are_told(model, data, capfd):
    settings = recipe(data, tasks=["arc_easy"], fewshot=3, seed=4)
    (task,), _ = find_tasks(settings)
    harness = Harness(model, pico_tokenizer(), settings)
    harness.run(task)
    assert "cut off" not in capfd.readouterr().err
    texts = ["".join(request.args) for request in task.loaded.instances]
    longest = max(len(pico_tokenizer().encode(text, add_special_tokens=False)) for text in texts) - 1
    harness.lm._max_length = longest
    harness.run(task)
    assert "cut off" not in capfd.readouterr().err
    harness.lm._max_length = longest - 1
    harness.run(task)
    said = " ".join(capfd.readouterr().err.split())
    assert f"The model sees {longest - 1} tokens, and prompts of the task arc_easy have up to {longest}: how" in said


def test_solved_examples_come_before_an_item_and_are_never_itself(model, data):
    settings = recipe(data, tasks=["arc_easy"], fewshot=3, seed=4)
    (task,), _ = find_tasks(settings)
    first = Harness(model, pico_tokenizer(), settings).run(task)
    prompts = [request.args[0] for request in task.loaded.instances][::4]
    for row, prompt in zip(ROWS["arc_easy"], prompts, strict=True):
        assert prompt.endswith(f"{row['query']}\nAnswer:") and prompt.count(row["query"]) == 1
        assert prompt.count("Answer: ") == 3
    assert Harness(model, pico_tokenizer(), settings).run(task)["acc"].tolist() == first["acc"].tolist()
    assert [request.args[0] for request in task.loaded.instances][::4] == prompts
    (other,), _ = find_tasks(settings.model_copy(update={"seed": 5}))
    assert other.fingerprint != task.fingerprint
    assert find_tasks(recipe(data, tasks=["arc_easy"], fewshot=ITEMS))[1] == [
        {"task": "arc_easy", "why": f"It has too few solved examples to choose {ITEMS} from."}
    ]


def test_an_answer_that_is_written_is_marked(model, tmp_path):
    """A task of text to be generated: half of its answers are what the model says, and half are not."""
    tokenizer = pico_tokenizer()
    rows = [{"question": words(4, 8)} for _ in range(6)]
    for number, row in enumerate(rows):
        ids = torch.tensor([tokenizer.encode(row["question"])])
        said = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2, eos_token_id=1)
        row["answer"] = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) + "?" * (number % 2)
    write_task(
        tmp_path, "written", rows, output_type="generate_until", doc_to_text="{{question}}", doc_to_target="answer",
        generation_kwargs={"until": ["~~~"], "max_gen_toks": 3, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    steps: list[int] = []
    (task,), _ = find_tasks(own(tmp_path, "written"))
    found = Harness(model, tokenizer, own(tmp_path, "written")).run(task, steps.append)
    assert task.metric == "exact_match"
    assert found["score"].tolist() == [1, 0, 1, 0, 1, 0]
    assert sum(steps) == 6


def test_two_processes_share_the_items(rrt, data, tmp_path):
    """13 items, one of 1, which only one process could take, and every process has all scores in the end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom transformers import AutoTokenizer\nfrom rrtc.eval.tasks import Harness, find_tasks\n"
        "from rrtc.io.source import load_for_scoring\nfrom rrtc.recipe.eval import EvalRecipe\n"
        "folder, target, *recipes = sys.argv[1:]\n"
        "found, steps = [], []\n"
        "for settings in map(EvalRecipe.model_validate_json, recipes):\n"
        "    harness = Harness(load_for_scoring(folder), AutoTokenizer.from_pretrained(folder), settings)\n"
        "    for task in find_tasks(settings)[0]:\n"
        "        found.append(harness.run(task, steps.append))\n"
        "        asked = len(task.loaded.instances)\n"
        "torch.save([found, sum(steps), asked], target + str(torch.distributed.get_rank()))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    settings = [recipe(data), recipe(data, task_items=1), recipe(data, tasks=["arc_easy"])]
    run = ready.run_two([sys.executable, script, rrt, tmp_path / "found", *(one.model_dump_json() for one in settings)])
    assert run.returncode == 0, run.stderr
    model = load_for_scoring(rrt)
    alone = [scores for one in settings for scores in scored(model, one).values()]
    requests = 4 * ITEMS
    for rank in (0, 1):
        found, steps, asked = torch.load(tmp_path / f"found{rank}", weights_only=False)
        assert [{k: list(v) for k, v in one.items()} for one in found] == [
            {k: list(v) for k, v in one.items()} for one in alone
        ]
        assert steps == sum(len(one["score"]) for one in alone)
        requests -= asked
    assert requests == 0


def test_a_fingerprint_tells_other_items_and_other_ways_to_ask(data, tmp_path):
    def fingerprint(folder: Path = data, **changes) -> dict:
        (task,), _ = find_tasks(recipe(folder, tasks=["piqa"], **changes))
        return json.loads(json.dumps(task.fingerprint))

    same = fingerprint()
    assert fingerprint(write_rows(tmp_path / "elsewhere", ROWS)) == same
    assert str(data) not in json.dumps(same)
    changed = [ROWS["piqa"][0] | {"gold": 1 - ROWS["piqa"][0]["gold"]}, *ROWS["piqa"][1:]]
    task = yaml.safe_load((FILES / "piqa.yaml").read_text()) | {"doc_to_text": "{{query}}"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa.yaml").write_text(yaml.safe_dump(task))
    others = [
        fingerprint(write_rows(tmp_path / "changed", {"piqa": changed})),
        fingerprint(tasks_dir=str(tmp_path / "tasks")),
        fingerprint(task_items=5),
        fingerprint(fewshot=1),
    ]
    assert same not in others


def test_a_fingerprint_tells_other_code_however_a_task_comes_to_it(tmp_path):
    """A function of a task file that calls another: only the first is known to the harness."""
    write_task(
        tmp_path, "own", [{"text": words(4, 8), "gold": 0}] * 3, output_type="multiple_choice", doc_to_text="{{text}}",
        doc_to_target="gold", doc_to_choice=["a", "b"],
    )  # fmt: skip
    found = []
    for scale in (1.0, 0.0, 1.0):
        (tmp_path / "utils.py").write_text(f"def scaled(value):\n    return value * {scale}\n")
        (task,), _ = find_tasks(own(tmp_path, "own"))
        found.append(json.loads(json.dumps(task.fingerprint)))
    assert found[0] != found[1] and found[0] == found[2]


def test_a_field_called_data_is_a_field(tmp_path, model):
    rows = [{"data": f"Said {number}", "gold": 0} for number in range(3)]
    write_task(
        tmp_path, "own", rows, output_type="multiple_choice", doc_to_text="{{data}}", doc_to_target="gold",
        doc_to_choice=["a", "b"],
    )  # fmt: skip
    (task,), _ = find_tasks(own(tmp_path, "own"))
    Harness(model, pico_tokenizer(), own(tmp_path, "own")).run(task)
    assert [request.args[0] for request in task.loaded.instances][::2] == [row["data"] for row in rows]


def test_what_has_no_score_of_single_items_is_told(tmp_path):
    rows = [{"text": words(4, 8)} for _ in range(3)]
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    write_task(
        tmp_path, "prose", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[metric],
    )  # fmt: skip
    write_task(tmp_path, "unsafe", rows, doc_to_text="{{text}}", doc_to_target="text", unsafe_code=True)
    assert find_tasks(own(tmp_path, "prose"))[1] == [
        {"task": "prose", "why": "It has no score of single items, only word_perplexity over all of them."}
    ]
    assert "runs code" in find_tasks(own(tmp_path, "unsafe"))[1][0]["why"]


def test_the_papers_tasks_and_what_cannot_be_had_without_a_network(data, capfd):
    """conftest.py keeps the hub away. The four with local files win over the harness's own."""
    tasks, not_run = find_tasks(recipe(data, tasks=["piqa", "paper"]))
    assert {task.name: task.metric for task in tasks} == {
        "piqa": "acc_norm", "lambada_openai": "acc", "winogrande": "acc", "arc_easy": "acc_norm",
    }  # fmt: skip
    assert [entry["task"] for entry in not_run] == ["hellaswag", "arc_challenge", "openbookqa"]
    assert all("cannot be reached" in entry["why"] for entry in not_run)
    assert capfd.readouterr() == ("", "")


def test_the_harness_says_nothing_of_its_own(model, data, capfd):
    scored(model, recipe(data))
    assert capfd.readouterr() == ("", "")


def test_a_misspelled_task_is_told_before_anything_is_loaded(data):
    with pytest.raises(WrongUsage, match="There is no task 'hellswag'") as error:
        find_tasks(EvalRecipe(tasks=["hellswag"]))
    assert "'hellaswag'" in error.value.hint


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks_data": None}, "no folder stands for {data}"),
        ({"tasks_data": "nowhere"}, "there is no such file"),
        ({"tasks_dir": "nowhere"}, "There are no task files"),
    ],
)
def test_files_that_are_missing_are_told(data, changes, sentence):
    with pytest.raises(RrtcError) as error:
        find_tasks(recipe(data, tasks=["piqa"], **changes))
    assert sentence in error.value.sentence


@pytest.mark.parametrize(
    "said",
    [
        "task: 5",
        "task: x\ndataset_kwargs: x",
        "task: x\ndataset_kwargs: {data_files: 5}",
        "task: x\ninclude: [1]",
        "a: [",
    ],
)
def test_a_task_file_of_other_kinds_is_told(said, tmp_path):
    (tmp_path / "x.yaml").write_text(said)
    with pytest.raises(RrtcError, match="The task file .*x.yaml cannot be read"):
        find_tasks(own(tmp_path, "x"))


def test_a_task_file_that_is_wrong_is_told(model, tmp_path):
    rows = [{"text": "rain"}, {"text": None}]
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    asks = {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "metric_list": [metric]}
    write_task(tmp_path, "wrong", rows, **asks, doc_to_target="{{answer}}")
    with pytest.raises(RrtcError, match="The task wrong of .* does not load: 'answer' is undefined"):
        find_tasks(own(tmp_path, "wrong"))
    write_task(tmp_path, "stops", rows, **asks, doc_to_target="text")
    (task,), _ = find_tasks(own(tmp_path, "stops"))
    with pytest.raises(RrtcError, match="The task stops stopped: "):
        Harness(model, pico_tokenizer(), own(tmp_path, "stops")).run(task)
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(RrtcError, match="broken.yaml cannot be read"):
        find_tasks(own(tmp_path, "wrong"))


def test_without_the_harness_its_extra_is_named(data, monkeypatch):
    assert find_tasks(recipe(data, tasks=[])) == ([], [])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    with pytest.raises(RrtcError, match="is not installed") as error:
        find_tasks(recipe(data))
    assert "rrtc[eval]" in error.value.hint
