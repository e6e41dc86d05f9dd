"""The losses of uptraining are their definitions, in value and gradient, in however many pieces they are computed."""

import pytest
import torch
from loss_definitions import definitions
from pico import EVERY_ARCHITECTURE, pico_config
from transformers import AutoModelForCausalLM

from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.uptrain import DISTILLATIONS, UptrainRecipe
from rrtc.stock.architecture import read_architecture
from rrtc.stock.parts import Parts, states_of
from rrtc.uptrain import losses
from rrtc.uptrain.losses import chunked_losses
from rrtc.uptrain.student import Student
from rrtc.uptrain.teacher import LiveLesson, LiveTeacher

TOKENS, WIDTH, VOCABULARY = 60, 12, 40


class Lesson:
    """A teacher whose logits are known."""

    def __init__(self, logits: torch.Tensor, temperature: float):
        self.log = (logits / temperature).log_softmax(-1)

    def about(self, part: slice):
        return lambda rows, log_p: self.log[part][rows]


@pytest.mark.parametrize(("at_once", "compared"), [(1, 1), (7, 3), (TOKENS, 8), (TOKENS, TOKENS)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    "weights",
    [{name: 1.0} for name in ("next_token", *DISTILLATIONS)]
    + [{"next_token": 0.5, "forward_kl": 2.0}, {"reverse_kl": 0.3, "total_variation": 1.0, "jensen_shannon": 4.0}],
    ids="+".join,
)
def test_values_and_gradients_are_those_of_the_definitions(weights, temperature, at_once, compared, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once * VOCABULARY)
    monkeypatch.setattr(losses, "COMPARED_AT_ONCE", compared * VOCABULARY)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    matrix, bias = torch.randn(VOCABULARY, WIDTH, requires_grad=True), torch.randn(VOCABULARY, requires_grad=True)
    teacher, targets = 3 * torch.randn(TOKENS, VOCABULARY), torch.randint(VOCABULARY, (TOKENS,))

    def head(part):  # capped, as Gemma 2's
        return 5 * torch.tanh((part @ matrix.T + bias) / 5)

    found = chunked_losses(
        hidden, head, [matrix, bias], VOCABULARY, targets, weights, temperature, Lesson(teacher, temperature)
    )
    expected = definitions(head(hidden), teacher, targets, temperature)
    objective = sum(
        weight * expected[name] * (1 if name == "next_token" else temperature**2) for name, weight in weights.items()
    )
    torch.testing.assert_close(found["objective"], objective)
    shown = {losses.REPORTED.get(name, name): value for name, value in expected.items()}
    assert found.keys() == {"objective", "loss", "kl", *(weights.keys() - {"next_token", "forward_kl"})}
    for name in found.keys() - {"objective"}:
        torch.testing.assert_close(found[name], shown[name])
    ours = torch.autograd.grad(found["objective"] / 3, (hidden, matrix, bias))
    torch.testing.assert_close(ours, torch.autograd.grad(objective / 3, (hidden, matrix, bias)), rtol=1e-4, atol=1e-6)


def test_in_bfloat16_logits_are_rounded_and_losses_are_not():
    torch.manual_seed(0)
    hidden, matrix = torch.randn(TOKENS, WIDTH).bfloat16(), torch.randn(VOCABULARY, WIDTH).bfloat16()
    targets, lesson = torch.randint(VOCABULARY, (TOKENS,)), Lesson(torch.randn(TOKENS, VOCABULARY), 1.0)
    given = [matrix], VOCABULARY, targets, {"next_token": 1.0, "forward_kl": 1.0}, 1.0, lesson
    low = chunked_losses(hidden, lambda part: part @ matrix.T, *given)
    high = chunked_losses(hidden, lambda part: (part @ matrix.T).float(), *given)
    torch.testing.assert_close(low, high, rtol=0, atol=0)
    assert low["loss"].dtype == torch.float32


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_a_student_is_the_model_with_losses_for_logits(architecture, batch, tmp_path, monkeypatch):
    """Whatever the architecture does to its logits: its own model and its own teacher are asked whole."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * 128)
    config = pico_config(architecture)
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    teacher.save_pretrained(tmp_path / "dense")
    plan = make_plan(read_architecture(config), InitRecipe(rank=2))
    model = RrtForCausalLM(RrtConfig.of(plan, config)).eval()
    model.save_pretrained(tmp_path / "small")

    ids, targets = batch
    recipe = UptrainRecipe(losses={"next_token": 0.5, "forward_kl": 1.0, "jensen_shannon": 2.0, "hidden": 0.25})
    live = LiveTeacher(tmp_path / "dense", torch.float32, torch.device("cpu"), recipe.temperature, keep_states=True)
    student = Student.from_pretrained(tmp_path / "small").eval()
    found = student(ids, targets, recipe, live(ids))

    logits, theirs = (m(ids, use_cache=False).logits.flatten(0, 1) for m in (model, teacher))
    expected = definitions(logits, theirs.detach(), targets.flatten(), 1.0)
    states, goals = (list(map(states_of, Parts(m).run(ids, range(6))[1])) for m in (model.stock, teacher))
    assert len(states) == len(goals) == config.num_hidden_layers
    relative = [((h - g).norm(dim=-1) / g.norm(dim=-1)).square().mean() for h, g in zip(states, goals, strict=True)]
    hidden = sum(relative) / len(relative)
    objective = 0.5 * expected["next_token"] + expected["forward_kl"] + 2 * expected["jensen_shannon"] + 0.25 * hidden
    torch.testing.assert_close(found["objective"], objective, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["hidden"], hidden.detach(), rtol=1e-4, atol=1e-5)

    found["objective"].backward()
    (objective).backward()
    for (name, ours), (other, whole) in zip(student.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        if whole.grad is not None or ours.grad is not None:
            torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("spread", [0.02, 0.1, 1.0])
def test_what_is_reported_is_float32_under_autocast(spread):
    """A KL of 2e-4, 5e-3 or 0.5 of logits that the head makes in bfloat16 is what float64 makes of these logits."""
    torch.manual_seed(0)
    hidden, matrix = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    weights = {"next_token": 0.5, "forward_kl": 1.0, "reverse_kl": 1.0, "jensen_shannon": 1.0, "total_variation": 1.0}
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, matrix)
        teacher = logits.float() + spread * torch.randn(TOKENS, VOCABULARY)
        found = chunked_losses(
            hidden, lambda part: torch.nn.functional.linear(part, matrix), [matrix], VOCABULARY, targets, weights, 1.0,
            Lesson(teacher, 1.0),
        )  # fmt: skip
    assert logits.dtype == torch.bfloat16 and {value.dtype for value in found.values()} == {torch.float32}
    expected = definitions(logits.double(), teacher.double(), targets, 1.0)
    for name, value in expected.items():
        torch.testing.assert_close(found[losses.REPORTED.get(name, name)].double(), value, rtol=1e-3, atol=1e-7)


def test_a_lesson_is_taken_at_its_temperature(batch, tmp_path):
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(pico_config("llama")).eval()
    teacher.save_pretrained(tmp_path)
    lesson = LiveTeacher(tmp_path, torch.float32, torch.device("cpu"), 4.0, keep_states=False)(batch[0])
    assert isinstance(lesson, LiveLesson) and lesson.states == []
    expected = (teacher(batch[0]).logits.flatten(0, 1)[3:8] / 4).log_softmax(-1)
    torch.testing.assert_close(lesson.about(slice(3, 8))(slice(None), None), expected)
