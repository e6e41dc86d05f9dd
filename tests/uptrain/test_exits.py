"""Early exits: which layers have one, what it says, how it learns, and what eval reports of it."""

import copy
import math
from pathlib import Path

import pytest
import torch
from pico import EVERY_ARCHITECTURE, pico_config, pico_tokenizer, save_pico
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM
from uptraining import interrupt_at, metrics

from rrtc import scoring
from rrtc.api import run
from rrtc.cli import scores, tables
from rrtc.errors import WrongUsage
from rrtc.eval.stage import evaluate
from rrtc.export.stage import export
from rrtc.init.stage import init
from rrtc.io.provenance import read_provenance
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.graft_rrt import Visit, find_layers
from rrtc.patterns import make_plan
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.stock.architecture import decoder_layers, read_architecture
from rrtc.stock.parts import Parts
from rrtc.text.windows import Windows
from rrtc.uptrain import losses
from rrtc.uptrain.job import prepare
from rrtc.uptrain.stage import uptrain
from rrtc.uptrain.student import Student
from rrtc.uptrain.teacher import LiveLesson

CONTEXT = 32


def recursive(kind: type, architecture: str = "llama", **recipe) -> RrtForCausalLM:
    """A recursive pico model of class `kind` with random weights; in eval mode."""
    config = pico_config(architecture)
    plan = make_plan(read_architecture(config), InitRecipe(rank=3, **recipe))
    torch.manual_seed(0)
    model = kind(RrtConfig.of(plan, config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B") or parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def cut_off(model: RrtForCausalLM, place: int) -> RrtForCausalLM:
    """`model` with its list of layers ending at `place`."""
    shorter = copy.deepcopy(model)
    parent, name = find_layers(shorter.stock, len(model.config.visits))
    setattr(parent, name, nn.ModuleList(list(getattr(parent, name))[: place + 1]))
    return shorter


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


# -- which layers


@pytest.mark.parametrize(
    ("recipe", "exits"),
    [
        ({"loops": 2}, (2,)),
        ({"loops": 3}, (1, 3)),
        ({"loops": 2, "sharing": "middle_cycle"}, (2,)),  # slots 0 1 2 1 2 3
        ({"loops": 2, "keep": 2}, (2,)),  # one slot, between kept layers
        ({"loops": 6}, (0, 1, 2, 3, 4)),  # one slot: each visit is a loop
        ({"loops": 3, "sharing": "sequence"}, ()),
        ({"loops": 2, "sharing": "middle_sequence"}, ()),
        ({"loops": 1}, ()),
        ({"size": 0.9}, (2,)),  # middle_cycle
        ({"size": 0.9, "sharing": "auto"}, ()),  # which ties nothing before it has measured
    ],
)
def test_exits_are_where_a_loop_ends_and_another_begins(recipe, exits):
    assert make_plan(read_architecture(pico_config("llama")), InitRecipe(**recipe)).exits == exits


@pytest.mark.parametrize("loops", [1, 2, 6])
def test_the_layers_of_a_recursive_model_are_its_visits(loops):
    """Also where lists of slots or of loops are as long."""
    layers = decoder_layers(recursive(RrtForCausalLM, loops=loops))
    assert len(layers) == 6 and all(isinstance(layer, Visit) for layer in layers)


# -- what an exit says


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_an_exit_says_what_the_model_cut_off_there_says(architecture, ids):
    model = recursive(RrtForCausalLM, architecture, loops=3)
    with torch.no_grad():
        parts, final = Parts(model), model(ids, use_cache=False).logits
        _, outputs = parts.run(ids, (1, 3))
        for place, output in zip((1, 3), outputs, strict=True):
            expected = cut_off(model, place)(ids, use_cache=False).logits
            found = torch.stack([parts.head(row) for row in parts.after(ids, place, output)])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert (found - final).abs().max() > 0.1
        torch.testing.assert_close(model(ids, use_cache=False).logits, final, rtol=0, atol=0)  # nothing stays behind
        assert not any(layer._forward_hooks or "forward" in vars(layer) for layer in parts.layers)


def test_scores_at_the_exits_are_those_of_the_models_cut_off_there(ids):
    model, reference = recursive(RrtForCausalLM, loops=3), recursive(RrtForCausalLM, loops=2)
    windows = Windows(ids, 1.0)
    found = scoring.score_tokens(model, windows, (1, 3), reference)
    expected = [scoring.score(m, windows, reference) for m in (model, cut_off(model, 1), cut_off(model, 3))]
    for tokens, mean in zip(found, expected, strict=True):
        assert tokens.loss.shape == (len(ids), ids.shape[1] - 1)
        for key in ("loss", "kl", "top1_agreement"):
            assert getattr(tokens, key).mean().item() == pytest.approx(getattr(mean, key))
    assert len({scores.loss for scores in expected}) == 3


def test_a_model_that_is_left_says_what_the_model_cut_off_there_says(ids):
    model = recursive(RrtForCausalLM, loops=3)
    final = model(ids).logits
    for place in (1, 3):
        with Parts(model).left_after(place):
            left, said = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
        shorter = cut_off(model, place)
        torch.testing.assert_close(left, shorter(ids).logits, rtol=0, atol=0)
        assert torch.equal(said, shorter.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    torch.testing.assert_close(model(ids).logits, final, rtol=0, atol=0)


# -- how it learns


def whole_objective(model: RrtForCausalLM, ids: torch.Tensor, targets: torch.Tensor, recipe: UptrainRecipe) -> tuple:
    """(objective, loss and KL of each exit), by autograd over whole tables of logits; of models cut off at the exits
    1 and 3, which share the parameters of `model`."""
    temperature, parent = recipe.temperature, find_layers(model.stock, 6)
    logits = model(ids, use_cache=False).logits.flatten(0, 1)
    q = (logits.detach() / temperature).softmax(-1)
    layers, figures, extra = getattr(*parent), [], 0
    for place in (1, 3):
        setattr(*parent, nn.ModuleList(list(layers)[: place + 1]))
        at_exit = model(ids, use_cache=False).logits.flatten(0, 1)
        setattr(*parent, layers)
        loss = cross_entropy(at_exit, targets.flatten())
        kl = kl_div((at_exit / temperature).log_softmax(-1), q, reduction="batchmean")
        figures += [loss, kl]
        extra = extra + (loss + temperature**2 * kl) / 2
    return cross_entropy(logits, targets.flatten()) + recipe.exit_weight * extra, figures


@pytest.mark.parametrize(
    ("architecture", "checkpointing"),
    [("llama", False), ("gemma2", False), ("granite", False), ("gpt2", False), ("llama", True), ("gemma2", True)],
)
def test_the_objective_is_its_definition(architecture, checkpointing, ids, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * 320)
    recipe = UptrainRecipe(losses={"next_token": 1.0}, exits=True, exit_weight=0.3, temperature=1.5)
    student, model = recursive(Student, architecture, loops=3), recursive(RrtForCausalLM, architecture, loops=3)
    if checkpointing:
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable()
        student.train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    found = student(ids[:, :-1], ids[:, 1:], recipe)
    objective, figures = whole_objective(model, ids[:, :-1], ids[:, 1:], recipe)
    assert list(found) == ["objective", "loss", "exit_1_loss", "exit_1_kl", "exit_2_loss", "exit_2_kl"]
    torch.testing.assert_close(found["objective"], objective)
    torch.testing.assert_close([found[name] for name in list(found)[2:]], [figure.detach() for figure in figures])
    found["objective"].backward()
    objective.backward()
    pairs = zip(student.named_parameters(), model.named_parameters(), strict=True)
    for (name, ours), (other, whole) in pairs:
        assert name == other and ours.grad is not None
        torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_exits_that_learn_jointly_learn_from_the_teacher_and_from_the_end_and_later_ones_weigh_more(ids):
    student, model = recursive(Student, loops=3), recursive(RrtForCausalLM, loops=3)
    teacher, given, targets = recursive(RrtForCausalLM, loops=2), ids[:, :-1], ids[:, 1:]
    recipe = UptrainRecipe(losses={"forward_kl": 0.2}, exits="joint", exit_weight=0.3, temperature=1.5)
    lesson = LiveLesson(Parts(teacher.stock), teacher.model(given, use_cache=False)[0], recipe.temperature)
    found = student(given, targets, recipe, lesson)

    def kl(q, logits):
        return recipe.temperature**2 * kl_div((logits / recipe.temperature).log_softmax(-1), q, reduction="batchmean")

    parent = find_layers(model.stock, 6)
    layers, every = getattr(*parent), []
    for place in (1, 3, 5):
        setattr(*parent, nn.ModuleList(list(layers)[: place + 1]))
        every.append(model(given, use_cache=False).logits.flatten(0, 1))
        setattr(*parent, layers)
    q = (teacher(given, use_cache=False).logits.detach().flatten(0, 1) / recipe.temperature).softmax(-1)
    own = (every[-1].detach() / recipe.temperature).softmax(-1)
    first, second, end = kl((q + own) / 2, every[0]), kl((q + own) / 2, every[1]), 0.2 * kl(q, every[2])
    caps = [(end / distance).detach().clamp(max=1) for distance in (first, second)]
    assert max(caps) < 1
    objective = end + recipe.exit_weight * (caps[0] * first + caps[1] * 2 * second) / 3
    torch.testing.assert_close(found["objective"], objective)
    torch.testing.assert_close(found["exit_2_kl"], second.detach() / recipe.temperature**2)
    found["objective"].backward()
    objective.backward()
    for (name, ours), whole in zip(student.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_final_norm_and_head_learn_from_exits_and_not_from_being_imitated(ids):
    """The exits' weight moves their gradient; and where an exit only imitates, nothing after it gets one."""
    student = recursive(Student, loops=3)
    grads = []
    for weight in (0.1, 0.2, 0.3):
        student.zero_grad()
        student(ids[:, :-1], ids[:, 1:], UptrainRecipe(losses={"next_token": 1.0}, exits=True, exit_weight=weight))[
            "objective"
        ].backward()
        grads.append({name: parameter.grad.clone() for name, parameter in student.named_parameters()})
    first, second, third = grads
    for name in first:
        moved = (second[name] - first[name]).abs().max()
        torch.testing.assert_close(third[name] - second[name], second[name] - first[name], rtol=1e-3, atol=1e-6)
        only_in_last_loop = ".loops.2." in name
        assert (moved < 1e-7) if only_in_last_loop else (moved > 1e-5), name


# -- as a stage


def recipe(root: Path, **uptrain) -> Recipe:
    learned = {
        "data": [str(root / "text.txt")], "context": CONTEXT, "tokens": CONTEXT * 4 * 30, "batch_size": 4,
        "micro_batch": 2, "warmup": 0.0, "learning_rate": 3e-3, "precision": "float32", "save_every": 4,
        "losses": {"next_token": 1.0, "forward_kl": 1.0},
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "init": {"rank": 4, "measure_tokens": 0},
            "uptrain": learned | uptrain,
            "eval": {
                "context": CONTEXT, "tokens": 200, "sample_tokens": 4, "passkey_trials": 0, "speed_rounds": 0,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A folder with a dense Llama, its tied model, the healed one, and that with exits."""
    root = tmp_path_factory.mktemp("exits")
    save_pico(root / "dense")
    (root / "text.txt").write_text("It rained, and then it rained again. " * 90)
    init(str(root / "dense"), str(root / "tied"), recipe(root))
    uptrain(str(root / "tied"), str(root / "healed"), recipe(root))
    uptrain(str(root / "healed"), str(root / "exits"), recipe(root, exits=True))
    return root


@pytest.mark.slow
def test_the_exit_learns_and_the_end_does_not_suffer(stages):
    steps = metrics(stages / "exits")
    first, last = steps[0], steps[-1]
    for step in steps:
        exits = step["exit_1_loss"] + step["exit_1_kl"]
        assert step["objective"] == pytest.approx(step["loss"] + step["kl"] + 0.1 * exits, rel=1e-5)
    assert last["exit_1_loss"] < 0.7 * first["exit_1_loss"]
    assert last["loss"] < first["loss"] + 0.05
    measured = read_provenance(stages / "exits")["measured"]["uptrain"]
    assert measured["first_exit_1_loss"] == pytest.approx(first["exit_1_loss"], abs=1e-4)
    assert measured["last_exit_1_kl"] == pytest.approx(last["exit_1_kl"], abs=1e-4)
    assert not any("exit" in name for step in metrics(stages / "healed") for name in step)


def text_of(renderable) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


@pytest.mark.slow
def test_what_a_user_is_shown(stages):
    shown = text_of(tables.uptrain(read_provenance(stages / "exits")["measured"]["uptrain"], "exits"))
    assert "exit after loop 1, loss" in shown and "exit after loop 1, KL to the model's own end" in shown


@pytest.mark.slow
def test_a_step_with_exits_counts_their_heads(stages):
    plain, exits = (prepare(stages / "healed", recipe(stages, exits=on).uptrain) for on in (False, True))
    head = pico_config("llama").vocab_size * pico_config("llama").hidden_size
    assert exits.flops_per_token() - plain.flops_per_token() == 4 * 2 * head


@pytest.mark.slow
def test_a_resumed_run_with_exits_equals_a_straight_one(stages, tmp_path, monkeypatch):
    asked = recipe(stages, exits=True, tokens=CONTEXT * 4 * 8)
    uptrain(str(stages / "healed"), str(tmp_path / "straight"), asked)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 11)  # in the sixth step, of two micro-batches each
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(stages / "healed"), str(tmp_path / "out"), asked)
    for changes in ({"exits": False}, {"exit_weight": 0.2}):
        changed = recipe(stages, **{"exits": True, "tokens": CONTEXT * 4 * 8} | changes)
        with pytest.raises(Exception, match=f"{next(iter(changes))} was"):
            uptrain(str(stages / "healed"), str(tmp_path / "out"), changed, resume=True)
    uptrain(str(stages / "healed"), str(tmp_path / "out"), asked, resume=True)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [s["exit_1_loss"] for s in metrics(tmp_path / "out")] == [
        s["exit_1_loss"] for s in metrics(tmp_path / "straight")
    ]


# -- what is refused


@pytest.mark.slow
def test_a_model_without_exits_is_refused_before_it_is_loaded(stages, tmp_path, monkeypatch):
    for number, sharing in enumerate(({"sharing": "sequence"}, {"loops": 1})):
        folder = tmp_path / f"tied{number}"
        asked = Recipe.model_validate({"init": {"rank": 4, "measure_tokens": 0, "fold_norms": False} | sharing})
        init(str(stages / "dense"), str(folder), asked)
        with monkeypatch.context() as patched:
            patched.setattr(Student, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
            with pytest.raises(WrongUsage, match="has no exits, because no loop") as refused:
                uptrain(str(folder), str(tmp_path / "out"), recipe(stages, exits=True))
        assert "cycle or middle_cycle" in refused.value.hint
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_exits_are_for_a_healed_model(stages, tmp_path, capsys):
    prepare(stages / "tied", recipe(stages, exits=True).uptrain)
    assert "was not healed yet" in capsys.readouterr().err
    prepare(stages / "exits", recipe(stages, exits=True).uptrain)
    assert "was not healed yet" not in capsys.readouterr().err
    asked = recipe(stages, exits=True).model_copy(update={"model": str(stages / "dense")})
    with pytest.raises(WrongUsage, match="after the model is healed"):
        run(asked, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# -- what eval reports


@pytest.mark.slow
def test_eval_reports_the_exit(stages, tmp_path):
    report = evaluate(str(stages / "exits"), recipe(stages), output=str(tmp_path / "report"))
    rows = report["models"]
    assert [row["model"] for row in rows] == [
        "dense", "after init", "after uptrain", "after uptrain 2", "exit after loop 1",
    ]  # fmt: skip
    assert [row["layers_computed"] for row in rows] == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert len(report["samples"]) == 4
    assert {key: rows[4][key] for key in ("params_total", "bytes")} == {
        key: rows[3][key] for key in ("params_total", "bytes")
    }

    # By hand: on the held-out text, through the hidden state after the third layer.
    model, dense = (AutoModelForCausalLM.from_pretrained(stages / f).eval() for f in ("exits", "dense"))
    held_out = (stages / "text.txt").read_text()
    held_out = held_out[len(held_out) - len(held_out) // 10 :]
    tokenizer = pico_tokenizer()
    tokens = tokenizer(held_out)["input_ids"] + [tokenizer.eos_token_id]
    count = sum(report["tokens"].values()) // (CONTEXT - 1)
    windows = torch.tensor(tokens[: count * CONTEXT]).view(count, CONTEXT)
    letters = sum(len(t) for t in tokenizer.convert_ids_to_tokens(windows.flatten()) if t != tokenizer.eos_token)
    with torch.no_grad():
        state = model(windows, output_hidden_states=True).hidden_states[3]
        p = model.get_output_embeddings()(model.model.norm(state))[:, :-1].double().softmax(-1)
        q = dense(windows).logits[:, :-1].double().softmax(-1)
    loss = -p.gather(2, windows[:, 1:, None]).log().mean().item()
    found = {key: score["value"] for key, score in rows[4]["scores"].items()}
    assert found["loss"] == pytest.approx(loss, abs=1e-4)
    assert found["kl"] == pytest.approx((q * (q / p).log()).sum(-1).mean().item(), abs=1e-4)
    assert found["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    bits = loss * (CONTEXT - 1) * count / math.log(2) / (letters * (CONTEXT - 1) / CONTEXT)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-3)

    shown = text_of(scores.report(report))
    assert "exit after loop 1" in shown and "50%" in shown
    as_dense = recipe(stages).model_copy(update={"export": ExportRecipe(format="dense")})
    export(str(stages / "exits"), str(tmp_path / "stock"), as_dense, str(tmp_path / "report"))
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "| exit after loop 1 | 50% |" in card and "layers computed" in card
    # A dense form is a stock model: nothing in it says where its loops were.
    stock = evaluate(str(tmp_path / "stock"), recipe(stages))["models"]
    assert not any("exit" in row["model"] or "layers_computed" in row for row in stock)


@pytest.mark.slow
def test_a_model_without_trained_exits_reports_none(stages):
    healed = evaluate(str(stages / "healed"), recipe(stages))
    assert not any("exit" in row["model"] or "layers_computed" in row for row in healed["models"])
