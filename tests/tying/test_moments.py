"""The forms of a second moment against the matrix written out, and truncations of low rank against the full SVD."""

import pytest
import torch

from rrtc.tying.joint import joint, joint_costs
from rrtc.tying.moments import FullMoment, Gathering, Moment, SampledMoment
from rrtc.tying.neurons import Neurons, align, narrowed, removal, reordered_seen
from rrtc.tying.tie import truncated_svd
from rrtc.tying.whiten import Seen, costs_by_rank, spectrum

TOKENS, SIZE = 9, 24


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sampled(size: int = SIZE, tokens: int = TOKENS, seed: int = 0) -> SampledMoment:
    """Of few correlated inputs of unequal size, one token twice."""
    rows = normal(tokens, size, seed=seed) * torch.linspace(0.2, 3, size)
    rows[-1] = rows[0]
    moment = Moment.estimated(rows, tokens)
    assert isinstance(moment, SampledMoment)
    return moment


def close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> bool:
    return (found - expected).norm().item() <= relative * expected.norm().item()


@pytest.mark.parametrize(
    ("tokens", "wanted", "expected"),
    [
        (TOKENS, {}, lambda rows: rows),  # fewer than inputs: the rows themselves take less
        (TOKENS, {"always_full": True}, lambda rows: rows.T @ rows / TOKENS),
        (40, {}, lambda rows: rows.T @ rows / 40),
        (40, {"only_diagonal": True}, lambda rows: rows.square().mean(0)),
    ],
)
def test_batches_are_gathered_in_the_form_that_takes_least(tokens, wanted, expected):
    rows, gathering = normal(tokens, SIZE), Gathering(tokens, **wanted)
    for batch in rows.split(4):
        gathering.add(batch)
    found = gathering.finish()
    assert found.shape == expected(rows).shape and close(found, expected(rows))


def test_samples_and_their_mean_are_shrunk_alike():
    rows = normal(TOKENS, SIZE) * torch.linspace(0.2, 3, SIZE)
    few, full = Moment.estimated(rows, TOKENS), Moment.estimated(rows.T @ rows / TOKENS, TOKENS)
    assert isinstance(few, SampledMoment) and isinstance(full, FullMoment)
    assert close(few.full().matrix, full.matrix, 1e-6)
    square = normal(SIZE, SIZE)
    assert isinstance(Moment.estimated(square.T @ square / SIZE, SIZE), FullMoment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_matrix(dtype):
    moment, x = sampled(), normal(SIZE, 5, seed=1).to(dtype)
    matrix = moment.full().matrix.double()
    diagonal = Moment.estimated(matrix.diagonal().float(), TOKENS)
    for form, whole in ((moment, matrix), (moment.full(), matrix), (diagonal, matrix.diagonal().diag())):
        assert form.times(x).dtype == form.root_times(x).dtype == form.inverse_root_times(x).dtype == dtype
        assert close(form.times(x).double(), whole @ x.double())
        root = form.root_times(torch.eye(SIZE, dtype=dtype))
        assert close((root.T @ root).double(), whole)
        assert close(form.root_times(x), root @ x) and close(form.transposed_root_times(x), root.T @ x)
        assert close(root @ form.inverse_root_times(x), x)
        if form is not diagonal:
            assert form.solve(x).dtype == torch.float64 and close(whole @ form.solve(x), x.double())


def test_diagonal_and_parts():
    moment, full = sampled(), sampled().full()
    assert close(moment.diagonal, full.diagonal)
    index = torch.tensor([20, 3, 7, 1, 2, 9, 11, 15, 14, 23, 0])
    signs = torch.where(torch.arange(len(index)) % 3 == 0, -1.0, 1.0)
    part = moment.of(index, signs)
    assert isinstance(part, SampledMoment) and close(part.full().matrix, full.of(index, signs).matrix)
    fewer = moment.of(index[:5])  # than tokens: the matrix is smaller
    assert isinstance(fewer, FullMoment) and close(fewer.matrix, full.of(index[:5]).matrix)


@pytest.mark.parametrize("combine", [lambda a, b: Moment.pooled([a, b]), Moment.parallel], ids=["mean", "parallel sum"])
def test_two_moments_together(combine):
    one, other = sampled(seed=1), sampled(seed=2)
    found, expected = combine(one, other), combine(one.full(), other.full())
    assert isinstance(found, SampledMoment) and isinstance(expected, FullMoment)
    assert close(found.full().matrix, expected.matrix)
    one, other = sampled(tokens=14, seed=1), sampled(tokens=14, seed=2)  # together more than the size
    found, expected = combine(one, other), combine(one.full(), other.full())
    assert isinstance(found, FullMoment) and close(found.matrix, expected.matrix)


def test_the_parallel_sum_is_that_of_the_inverses():
    one, other = sampled(seed=1).full(), sampled(seed=2).full()
    inverses = [moment.matrix.double().inverse() for moment in (one, other)]
    assert close(Moment.parallel(one, other).matrix.double(), sum(inverses).inverse())


def test_what_is_left_of_an_inverse_is_that_of_the_others():
    moment = sampled()
    few, full = moment.inverse(), moment.full().inverse()
    left = torch.ones(SIZE, dtype=torch.bool)
    for chosen in ([3, 17], [0, 5, 20], [1]):
        index = torch.tensor(chosen)
        for one, other in zip(few.remove(index), full.remove(index), strict=True):
            assert close(one, other)
        left[index] = False
        matrix = moment.full().matrix.double()[left][:, left]
        for inverse in (few, full):
            assert close(inverse.diagonal[left], matrix.inverse().diagonal())
            assert torch.equal(inverse.diagonal[~left], torch.ones(int((~left).sum())))


def views(seed: int, form) -> dict[str, Seen]:
    """How an FFN's matrices are seen, moments in the form that `form` gives them."""
    inputs, moment = form(sampled(10, 6, seed)), Moment.estimated(normal(24, seed=seed + 5).square(), TOKENS)
    return {
        "up": Seen(normal(24, 10, seed=seed + 1), inputs, moment),
        "down": Seen(normal(10, 24, seed=seed + 2), form(sampled(24, 9, seed + 3)), form(sampled(10, 6, seed + 4))),
    }


FORMS = (lambda moment: moment, lambda moment: moment.full())


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_spectra_and_costs_are_those_of_full_moments(shape):
    weight, inputs, gradients = normal(*shape), sampled(shape[1], seed=3), sampled(shape[0], seed=4)
    assert close(costs_by_rank(weight, inputs, gradients), costs_by_rank(weight, inputs.full(), gradients.full()))
    few, full = (
        spectrum(weight, *m, 5).factors(slice(0, 5)) for m in ((inputs, gradients), (inputs.full(), gradients.full()))
    )
    assert close(few[0] @ few[1], full[0] @ full[1], 1e-4)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rank", [0, 3])
def test_joint_is_that_of_full_moments(count, rank):
    few, full = ([views(20 * i, form)["down"] for i in range(count)] for form in FORMS)
    assert close(joint_costs(few), joint_costs(full))
    found, expected = joint(few, rank), joint(full, rank)
    assert close(found.shared, expected.shared, 1e-4)
    for (b, a), (c, d) in zip(found.factors, expected.factors, strict=True):
        assert rank == 0 or close(b @ a, c @ d, 1e-3)
    assert found.cost(few) == pytest.approx(expected.cost(full), rel=1e-5)


def test_neurons_are_lined_up_and_removed_as_with_full_moments():
    inner = Neurons("down", ("up",), ("up",), 24)
    found = []
    for form in FORMS:
        first, second = views(0, form), views(50, form)
        index, signs = align(first, second, inner)
        turned = reordered_seen("down", second["down"], inner, index, signs)
        gone = removal([first["down"], turned])
        few = narrowed("down", turned, inner, gone.kept(9))
        found.append((index, signs, gone.order, gone.costs, few.weight, few.inputs.diagonal))
    for one, other in zip(*found, strict=True):
        assert close(one.double(), other.double())


# Truncations


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (400, 400)])
@pytest.mark.parametrize("kind", ["flat", "slow", "fast", "outliers", "of low rank"])
@pytest.mark.parametrize("rank", [4, 32, 100])
def test_a_truncation_loses_at_most_a_per_cent_more_than_the_best(shape, kind, rank):
    flat = normal(*shape)
    u, s, v = torch.linalg.svd(flat.double(), full_matrices=False)
    place = torch.arange(1, len(s) + 1)
    values = {
        "flat": s, "slow": place**-0.5, "fast": place**-1.0, "of low rank": (place <= 20) * s,
        "outliers": torch.cat([1000 * s[:1], 100 * s[:1], s[2:]]),
    }[kind]  # fmt: skip
    matrix = ((u * values) @ v).float()
    b, a = truncated_svd(matrix, rank)
    best = values[rank:].square().sum().sqrt().item()
    assert (matrix.double() - b.double() @ a.double()).norm().item() <= 1.01 * best + 1e-5 * s[0].item()
    assert all(torch.equal(one, other) for one, other in zip(truncated_svd(matrix, rank), (b, a), strict=True))


@pytest.mark.parametrize("form", FORMS, ids=["sampled", "full"])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_so_does_one_in_a_whitened_space(shape, form):
    weight = normal(*shape)
    inputs, gradients = form(sampled(shape[1], 60, seed=3)), form(sampled(shape[0], 60, seed=4))
    costs = costs_by_rank(weight, inputs, gradients)
    for rank in (4, 60):
        b, a = spectrum(weight, inputs, gradients, rank).factors(slice(0, rank))
        # The cost is the square of the error.
        assert Seen(weight, inputs, gradients).cost(weight - b @ a) <= 1.01**2 * costs[rank].item()
