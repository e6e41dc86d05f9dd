"""A teacher cache teaches what the teacher would, down to the tail; it is filled once, survives kills, is never read
where it is damaged or for something else, and where it has everything the teacher need not be there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from loss_definitions import definitions
from pico import VOCABULARY, save_pico
from torch import Tensor
from uptraining import (
    BATCH,
    CONTEXT,
    ONE_STEP,
    SETTINGS,
    STEPS,
    curve,
    interrupt_at,
    make_rrt,
    settings,
    uptrain_on_two_processes,
    weights,
)

from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.provenance import read_provenance
from rrtc.io.source import content_hash
from rrtc.machine import process_group
from rrtc.recipe.schema import with_flags
from rrtc.recipe.uptrain import DISTILLATIONS, UptrainRecipe
from rrtc.uptrain import losses, teacher_cache
from rrtc.uptrain.data import given
from rrtc.uptrain.estimate import estimate
from rrtc.uptrain.job import prepare
from rrtc.uptrain.losses import chunked_losses
from rrtc.uptrain.stage import uptrain
from rrtc.uptrain.teacher import LiveTeacher
from rrtc.uptrain.teacher_cache import CachedLesson, CachedTeacher, TeacherCache, fill, key, pack

TOKENS, WIDTH, WORDS, TOP = 30, 12, 40, 7


# -- what a lesson says


def coarse(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits of the distribution over the tokens `ids` and all others as one."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, ids, False)
    tail = logits.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), tail], dim=1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DISTILLATIONS)
def test_divergences_are_those_with_the_tail_as_one_outcome(name, temperature, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 11 * WORDS)
    torch.manual_seed(0)
    hidden, matrix = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(WORDS, WIDTH, requires_grad=True)
    teacher, targets = 3 * torch.randn(TOKENS, WORDS), torch.randint(WORDS, (TOKENS,))
    highest, ids, tail = pack((teacher / temperature).log_softmax(-1), TOP)
    found = chunked_losses(
        hidden, lambda part: part @ matrix.T, [matrix], WORDS, targets, {name: 2.0}, temperature,
        CachedLesson(highest, ids, tail),
    )  # fmt: skip
    q = torch.cat([highest.float(), tail[:, None]], dim=1)
    p = coarse((hidden @ matrix.T / temperature).log_softmax(-1), ids)
    expected = definitions(p, q, torch.zeros(TOKENS, dtype=torch.long), 1.0)[name]
    shown = losses.REPORTED.get(name, name)
    torch.testing.assert_close(found[shown], expected.detach(), rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(found["objective"], (hidden, matrix))
    theirs = torch.autograd.grad(2 * temperature**2 * expected, (hidden, matrix))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_with_all_but_one_token_a_lesson_is_the_teachers():
    torch.manual_seed(0)
    whole, log_p = (3 * torch.randn(2, TOKENS, WORDS)).log_softmax(-1)
    log_q = CachedLesson(*pack(whole, WORDS - 1)).about(slice(2, 9))(slice(None), log_p[2:9])
    torch.testing.assert_close(log_q, whole[2:9], rtol=2**-10, atol=1e-3)


def test_a_lesson_is_a_distribution_although_it_was_rounded():
    torch.manual_seed(0)
    whole, log_p = (3 * torch.randn(2, TOKENS, WORDS)).log_softmax(-1)
    log_q = CachedLesson(*pack(whole, TOP)).about(slice(None))(slice(None), log_p)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(TOKENS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DISTILLATIONS)
@pytest.mark.parametrize("least", [-1000.0, -torch.inf], ids=str)
def test_a_tail_without_mass_gives_finite_losses(name, least):
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    teacher = torch.full((TOKENS, WORDS), least)
    teacher[:, 3:5] = 0.0  # so that the kept ones have no mass either
    matrix, targets = torch.randn(WORDS, WIDTH), torch.zeros(TOKENS, dtype=torch.long)
    lesson = CachedLesson(*pack(teacher.log_softmax(-1), TOP))
    found = chunked_losses(hidden, lambda part: part @ matrix.T, [matrix], WORDS, targets, {name: 1.0}, 1.0, lesson)
    found["objective"].backward()
    assert all(value.isfinite() for value in found.values()) and hidden.grad.isfinite().all()
    q = lesson.about(slice(None))(slice(None), torch.randn(TOKENS, WORDS).log_softmax(-1)).exp()
    torch.testing.assert_close(q[:, 3:5], torch.full((TOKENS, 2), 0.5))


# -- what is on the disk


@pytest.mark.parametrize("vocabulary", [WORDS, 70_000])
def test_lessons_are_read_as_they_were_written(vocabulary, tmp_path):
    torch.manual_seed(0)
    whole = (5 * torch.randn(3, TOKENS, vocabulary)).log_softmax(-1)
    whole[0, 0] = -30.0
    whole[0, 0, -1] = 0.0  # certain
    lessons = [pack(log_q, TOP) for log_q in whole]
    cache = TeacherCache(tmp_path / "c", "hash", vocabulary, 1.0, TOP, "float32")
    cache.begin()
    cache.write([b"a" * 16, b"b" * 16], lessons[:2])
    cache.write([b"c" * 16], lessons[2:])
    again = TeacherCache(tmp_path / "c", "hash", vocabulary, 1.0, TOP, "float32")
    for name, lesson in zip((b"c", b"a", b"b"), (lessons[2], *lessons[:2]), strict=True):
        assert name * 16 in again
        for found, written in zip(again.read(name * 16), lesson, strict=True):
            assert found.dtype == written.dtype and torch.equal(found, written)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "c").glob("*.arrow"))
    assert again.bytes_per_token == on_disk / (3 * TOKENS)
    with pytest.raises(RrtcError, match="not in the teacher cache"):
        again.read(b"d" * 16)


def test_whichever_byte_is_wrong_no_wrong_lesson_is_read(tmp_path):
    lesson = pack(torch.randn(TOKENS, WORDS, generator=torch.Generator().manual_seed(0)).log_softmax(-1), TOP)
    cache = TeacherCache(tmp_path / "c", "hash", WORDS, 1.0, TOP, "float32")
    cache.begin()
    cache.write([b"a" * 16], [lesson])
    (segment,) = segments(tmp_path / "c")
    whole, refusals = segment.read_bytes(), 0
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 0x81
        segment.write_bytes(changed)
        try:
            read = TeacherCache(tmp_path / "c", "hash", WORDS, 1.0, TOP, "float32").read(b"a" * 16)
            assert all(torch.equal(found, written) for found, written in zip(read, lesson, strict=True))
        except RrtcError:
            refusals += 1
    assert refusals * 5 > len(cache._encoded(*lesson))  # every byte of the lesson, and others


def test_windows_are_known_by_all_that_the_teacher_is_given():
    ids, positions = torch.arange(8), torch.arange(8)
    window = {"input_ids": ids, "position_ids": positions}
    assert key(window) == key({"position_ids": positions.int(), "input_ids": ids.int()})
    others = [
        {"input_ids": ids},
        {"input_ids": ids[:7], "position_ids": positions},
        {"input_ids": ids + 1, "position_ids": positions},
        {"input_ids": ids, "position_ids": positions % 4},
    ]
    assert len({key(window), *map(key, others)}) == 5


class Documents(torch.utils.data.Dataset):
    """Windows in which a second document begins somewhere; the fourth is the first again."""

    def __init__(self):
        self.ids = torch.randint(VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begins = torch.tensor(5 * (index % 3) + 1)
        positions = torch.arange(CONTEXT)
        return {"input_ids": self.ids[index % 3], "position_ids": positions - begins * (positions >= begins)}


def test_a_cached_teacher_says_what_a_live_one_would(dense, tmp_path):
    windows = Documents()
    cache = TeacherCache(tmp_path / "c", "hash", VOCABULARY, 2.0, VOCABULARY, "float32")
    found = fill(cache, windows, dense("llama"), torch.float32, process_group())
    assert (found["windows"], found["reused"]) == (3, 0) and cache.holds(windows)
    batch = given(torch.utils.data.default_collate([windows[2], windows[0]]))
    ids = batch.pop("input_ids")
    live = LiveTeacher(dense("llama"), torch.float32, torch.device("cpu"), 2.0, keep_states=False)
    log_p = torch.randn(2 * (CONTEXT - 1), VOCABULARY).log_softmax(-1)
    expected, said = (t(ids, **batch).about(slice(None))(slice(None), log_p) for t in (live, CachedTeacher(cache)))
    torch.testing.assert_close(said, expected, rtol=2**-10, atol=1e-3)
    assert (live(ids).about(slice(None))(slice(None), log_p) - expected).abs().max() > 0.1  # without the positions


# -- whole runs


@pytest.fixture(scope="module")
def rrt(tmp_path_factory) -> Path:
    """With an original of its own, which some tests take away."""
    folder = tmp_path_factory.mktemp("models")
    return make_rrt(folder / "rrt", save_pico(folder / "dense"))


@pytest.fixture(scope="module")
def filled(rrt) -> tuple[Path, Path]:
    """A run that filled a cache, and the cache."""
    cache = rrt.parent / "cache"
    uptrain(str(rrt), str(rrt.parent / "trained"), cached(cache))
    return rrt.parent / "trained", cache


def cached(cache: Path, **changes):
    return settings(teacher_cache=str(cache), **changes)


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Gathers how many windows the teacher is asked about at a time."""
    sizes, original = [], LiveTeacher.__call__

    def counted(self, ids, **kwargs):
        sizes.append(len(ids))
        return original(self, ids, **kwargs)

    monkeypatch.setattr(LiveTeacher, "__call__", counted)
    return sizes


def segments(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.arrow"))


@pytest.mark.slow
def test_where_the_cache_has_everything_the_teacher_can_be_gone(filled, tmp_path):
    trained, cache = filled
    for name in ("rrt", "cache"):
        shutil.copytree(trained.parent / name, tmp_path / name)
    away = trained.parent / "dense-away"
    (trained.parent / "dense").rename(away)
    try:
        measured = uptrain(str(tmp_path / "rrt"), str(tmp_path / "out"), cached(tmp_path / "cache"))
        with pytest.raises(RrtcError, match="no longer where it was"):
            uptrain(str(tmp_path / "rrt"), str(tmp_path / "longer"), cached(tmp_path / "cache", tokens=10_000))
    finally:
        away.rename(trained.parent / "dense")
    assert curve(tmp_path / "out") == curve(trained)
    ours, theirs = weights(tmp_path / "out"), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first = read_provenance(trained)["measured"]["uptrain"]
    assert measured["teacher"] == first["teacher"] == str(trained.parent / "dense")
    windows = STEPS * BATCH
    assert (first["teacher_cache"]["windows"], first["teacher_cache"]["reused"]) == (windows, 0)
    assert (measured["teacher_cache"]["windows"], measured["teacher_cache"]["reused"]) == (windows, windows)
    size = sum(file.stat().st_size for file in segments(cache))
    assert measured["teacher_cache"]["bytes_per_token"] == round(size / (windows * (CONTEXT - 1)), 1)


@pytest.mark.slow
def test_a_run_with_a_whole_vocabulary_is_the_live_one(rrt, tmp_path):
    uptrain(str(rrt), str(tmp_path / "live"), settings())
    uptrain(str(rrt), str(tmp_path / "cached"), cached(tmp_path / "c", teacher_cache_top=VOCABULARY))
    live, found = torch.tensor(curve(tmp_path / "live")), torch.tensor(curve(tmp_path / "cached"))
    torch.testing.assert_close(found, live, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_epochs_reuse_it_and_longer_runs_add_to_it(rrt, tmp_path, asked):
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"{i} and {i * i % 97}" for i in range(60)))
    short = {"data": str(text), "teacher_cache": str(tmp_path / "c")}
    distinct = prepare(rrt, settings(**short).uptrain).text.sources[0].count
    assert BATCH < distinct < STEPS * BATCH
    uptrain(str(rrt), str(tmp_path / "one"), settings(**short | {"tokens": CONTEXT * BATCH}))
    assert sum(asked) == BATCH
    found = uptrain(str(rrt), str(tmp_path / "two"), settings(**short))["teacher_cache"]
    assert sum(asked) == distinct
    assert (found["windows"], found["reused"]) == (distinct, BATCH)


@pytest.mark.slow
def test_micro_batches_and_losses_do_not_matter_to_it(rrt, filled, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "LiveTeacher", lambda *_, **__: pytest.fail("all is there"))
    trained, cache = filled
    uptrain(str(rrt), str(tmp_path / "out"), cached(cache, micro_batch=4))
    torch.testing.assert_close(torch.tensor(curve(tmp_path / "out")), torch.tensor(curve(trained)), rtol=0, atol=1e-5)
    uptrain(str(rrt), str(tmp_path / "other"), cached(cache, losses={"jensen_shannon": 1.0}, tokens=ONE_STEP, seed=0))


@pytest.mark.slow
def test_what_was_asked_before_a_kill_is_not_asked_again(rrt, filled, tmp_path, asked, monkeypatch):
    trained, _ = filled
    monkeypatch.setattr(teacher_cache, "TOKENS_AT_ONCE", 4 * CONTEXT)
    monkeypatch.setattr(teacher_cache, "SEGMENT_TOKENS", 8 * CONTEXT)
    cache = tmp_path / "c"
    with monkeypatch.context() as patched:
        counted = LiveTeacher.__call__

        def killed(self, ids, **kwargs):
            if len(asked) == 5:
                raise KeyboardInterrupt
            return counted(self, ids, **kwargs)

        patched.setattr(LiveTeacher, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(tmp_path / "out"), cached(cache))
    assert not (tmp_path / "out.partial").exists()
    assert len(segments(cache)) == 2 and asked == [4] * 5
    (cache / "cut-off.arrow.tmp").write_bytes(segments(cache)[0].read_bytes()[:100])
    found = uptrain(str(rrt), str(tmp_path / "out"), cached(cache))["teacher_cache"]
    assert (found["windows"], found["reused"], sum(asked[5:])) == (24, 16, 8)
    torch.testing.assert_close(torch.tensor(curve(tmp_path / "out")), torch.tensor(curve(trained)), rtol=0, atol=2e-3)


@pytest.mark.slow
def test_two_processes_fill_it_together(rrt, filled, tmp_path):
    said = uptrain_on_two_processes(rrt, tmp_path / "out", cached(tmp_path / "c", micro_batch=1))
    assert len(segments(tmp_path / "c")) == 2
    ours, theirs = torch.tensor(curve(tmp_path / "out")), torch.tensor(curve(filled[0]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert said.count("The teacher cache has all 24 windows") == 1


@pytest.mark.slow
def test_estimate_reads_the_cache_and_writes_none(rrt, filled, tmp_path, asked, capfd):
    live = estimate(str(rrt), cached(tmp_path / "c"))
    assert not (tmp_path / "c").exists() and asked
    asked.clear()
    found = estimate(str(rrt), cached(filled[1]))
    plan = prepare(rrt, settings().uptrain).plan
    assert (
        found["flops_per_token"]
        == 3 * plan.flops_per_token
        == live["flops_per_token"] - (plan.architecture.flops_per_token)
    )
    assert not asked and "lacks" not in capfd.readouterr().err
    estimate(str(rrt), cached(filled[1], tokens=2 * SETTINGS["tokens"]))
    assert not asked and "The teacher cache lacks 24 windows of this run at least" in capfd.readouterr().err


# -- resuming


@pytest.mark.slow
def test_a_resumed_run_reads_what_the_first_part_wrote(rrt, filled, tmp_path, monkeypatch):
    trained, _ = filled
    target, cache = tmp_path / "out", tmp_path / "c"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 8)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), cached(cache))
    with pytest.raises(RrtcError, match="teacher_cache was True and is now False"):
        uptrain(str(rrt), str(target), settings(), resume=True)
    with pytest.raises(RrtcError, match="another teacher_cache_top: 64, and this run's is 32"):
        uptrain(str(rrt), str(target), cached(cache, teacher_cache_top=32), resume=True)
    cache.rename(tmp_path / "moved")
    uptrain(str(rrt), str(target), cached(tmp_path / "moved"), resume=True)
    assert curve(target) == curve(trained) and content_hash(target) == content_hash(trained)


# -- what is refused


@pytest.fixture
def copy(filled, tmp_path) -> Path:
    return shutil.copytree(filled[1], tmp_path / "copy")


def refused(rrt: Path, recipe, sentence: str, monkeypatch) -> RrtcError:
    monkeypatch.setattr(teacher_cache, "LiveTeacher", lambda *_, **__: pytest.fail("loaded too early"))
    monkeypatch.setattr("rrtc.uptrain.trainer.Student.from_pretrained", lambda *_, **__: pytest.fail("too early"))
    with pytest.raises(RrtcError, match=sentence) as error:
        uptrain(str(rrt), str(rrt.parent / "refused"), recipe)
    assert "\n" not in error.value.sentence
    assert not list(rrt.parent.glob("refused*"))
    return error.value


@pytest.mark.slow
def test_a_cache_made_for_something_else(rrt, copy, tmp_path, monkeypatch):
    monkeypatch.setattr("rrtc.uptrain.job.training_text", lambda *_: pytest.fail("text was read"))
    other = save_pico(tmp_path / "other", hidden_size=32)
    refused(rrt, cached(copy, teacher=str(other)), f"another teacher: .*{content_hash(other)[:12]}", monkeypatch)
    refused(rrt, cached(copy, temperature=2.0), "another temperature: 1.0, and this run's is 2.0", monkeypatch)
    refused(rrt, cached(copy, teacher_cache_top=8), "another teacher_cache_top: 64, and this run's is 8", monkeypatch)
    wide = cached(copy, precision="bfloat16")
    refused(rrt, wide, "another arithmetic: float32, and this run's is bfloat16", monkeypatch)
    values = json.loads((copy / "teacher.json").read_text())
    (copy / "teacher.json").write_text(json.dumps(values | {"format": 99}))
    refused(rrt, cached(copy), "another format: 99, and this run's is 2", monkeypatch)
    (copy / "teacher.json").write_text("{")
    refused(rrt, cached(copy), "cannot be read", monkeypatch)
    (copy / "teacher.json").unlink()
    refused(rrt, cached(copy), "is not empty and is no teacher cache", monkeypatch)
    refused(rrt, cached(segments(copy)[0]), "is a file", monkeypatch)


@pytest.mark.slow
def test_a_segment_that_is_cut_off(rrt, copy, monkeypatch):
    (segment,) = segments(copy)
    whole = segment.read_bytes()
    for length in (0, 20, len(whole) // 2, len(whole) - 1):
        segment.write_bytes(whole[:length])
        error = refused(rrt, cached(copy), f"{segment.name} of the teacher cache is damaged", monkeypatch)
        assert "Delete it" in error.hint


@pytest.mark.slow
def test_a_run_that_met_a_wrong_byte_goes_on_without_that_segment(rrt, filled, copy, tmp_path):
    (segment,) = segments(copy)
    contents = bytearray(segment.read_bytes())
    contents[len(contents) // 2] ^= 1
    segment.write_bytes(contents)
    with pytest.raises(RrtcError, match=f"{segment.name} of the teacher cache is damaged"):
        uptrain(str(rrt), str(tmp_path / "out"), cached(copy))
    segment.unlink()
    uptrain(str(rrt), str(tmp_path / "out"), cached(copy), resume=True)
    assert len(segments(copy)) == 1 and curve(tmp_path / "out") == curve(filled[0])


def test_hidden_states_are_not_kept(tmp_path):
    with pytest.raises(WrongUsage, match="keeps no hidden states"):
        with_flags(
            UptrainRecipe(),
            {"teacher_cache": str(tmp_path), "losses": ["hidden=1", "forward_kl=1"]},
            "the command line",
        )


def test_a_disk_that_is_too_small(rrt, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 2 * 10**6))
    monkeypatch.setattr("rrtc.uptrain.job.Job.checkpoint_bytes", lambda _: 0)
    refused(rrt, cached(tmp_path / "c", tokens=50_000), "only 0.0 GB are free", monkeypatch)
