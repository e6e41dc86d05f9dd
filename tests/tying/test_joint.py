"""The mathematics of joint initialization, against brute force on small matrices."""

import math

import pytest
import torch
from pico import ARCHITECTURES, pico_config, pico_model

from rrtc.stock.trial import find_neurons
from rrtc.tying import joint as joint_module
from rrtc.tying import neurons
from rrtc.tying.joint import joint, joint_costs
from rrtc.tying.moments import DiagonalMoment, FullMoment, Moment
from rrtc.tying.neurons import Neurons, align, narrowed, refitted, removal, reordered, reordered_seen
from rrtc.tying.whiten import Seen, costs_by_rank, spectrum


def moment(size: int, seed: int, spread: float = 1.0) -> Moment:
    """The moment of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.linspace(0.2, 1 + spread, size)
    return FullMoment(mix @ mix.T / size + 0.01 * torch.eye(size))


def matrix(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def seen(outputs: int, inputs: int, seed: int, gradients: Moment | None = None) -> Seen:
    return Seen(matrix(outputs, inputs, seed), moment(inputs, seed + 100), gradients or moment(outputs, seed + 200))


def brute_truncation(one: Seen, rank: int) -> torch.Tensor:
    """The best approximation at `rank`, by full SVD of G^1/2 W C^1/2 in float64."""

    def root(m):
        values, vectors = torch.linalg.eigh(m.matrix.double())
        return vectors * values.sqrt() @ vectors.T

    g, c = root(one.gradients), root(one.inputs)
    u, s, v = torch.linalg.svd(g @ one.weight.double() @ c, full_matrices=False)
    return (torch.linalg.inv(g) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(c)).float()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_spectrum_is_the_best_approximation_and_predicts_its_cost(shape):
    one = seen(*shape, seed=1)
    costs = costs_by_rank(one.weight, one.inputs, one.gradients)
    assert len(costs) == min(shape) + 1 and costs[-1] == 0
    for rank in (1, 5, min(shape)):
        b, a = one.spectrum(rank).factors(slice(0, rank))
        assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
        expected = brute_truncation(one, rank)
        assert torch.allclose(b @ a, expected, atol=1e-4 * expected.abs().max().item())
        assert one.cost(one.weight - b @ a) == pytest.approx(costs[rank].item(), rel=1e-4, abs=1e-6)


def test_the_cost_is_the_mean_over_samples_of_half_the_squared_slope_times_change():
    # With inputs and gradients drawn independently, tr(G E C E^T) / 2 is the mean of (g^T E x)^2 / 2.
    x, g = matrix(4000, 6, 1) @ matrix(6, 6, 2), matrix(4000, 5, 3) @ matrix(5, 5, 4)
    change = matrix(5, 6, 5)
    one = Seen(torch.zeros(5, 6), FullMoment(x.T @ x / len(x)), FullMoment(g.T @ g / len(g)))
    brute = 0.5 * (g @ change @ x[:2000].T).square().mean().item()
    assert one.cost(change) == pytest.approx(brute, rel=0.1)


def test_a_diagonal_moment_is_the_diagonal_matrix():
    diagonal = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.1
    weight, inputs = matrix(12, 20, 3), moment(20, 5)
    vector, full = DiagonalMoment(diagonal), FullMoment(torch.diag(diagonal))
    assert torch.allclose(costs_by_rank(weight, inputs, vector), costs_by_rank(weight, inputs, full), rtol=1e-6)
    one, other = (
        spectrum(weight, inputs, vector, 4).factors(slice(0, 4)),
        spectrum(weight, inputs, full, 4).factors(slice(0, 4)),
    )
    assert torch.allclose(one[0] @ one[1], other[0] @ other[1], atol=1e-4)


def test_shrinkage_moves_a_poor_estimate_more_and_keeps_the_trace():
    x = matrix(40, 30, 1)
    mean = x.T @ x / 40
    few, many = Moment.estimated(mean, 40).matrix, Moment.estimated(mean, 40_000).matrix
    assert few.trace() == pytest.approx(mean.trace().item(), rel=1e-4)
    assert torch.linalg.eigvalsh(few)[0] > 10 * torch.linalg.eigvalsh(mean)[0].clamp_min(0)
    assert (few - mean).norm() > 100 * (many - mean).norm()


def group_of(count: int, shape=(14, 22), gradients=None) -> list[Seen]:
    return [seen(*shape, seed=10 * i, gradients=gradients) for i in range(count)]


def alternated(group: list[Seen], rank: int, start: torch.Tensor, sweeps: int) -> float:
    """The cost after minimizing over the factors and over W' in turn, by brute force."""
    shared = start
    for _ in range(sweeps):
        products = []
        for one in group:
            residual = Seen(one.weight - shared, one.inputs, one.gradients)
            products.append(brute_truncation(residual, rank))
        moments = [one.inputs.matrix.double() for one in group]
        total = sum((one.weight - p).double() @ m for one, p, m in zip(group, products, moments, strict=True))
        shared = (total @ torch.linalg.inv(sum(moments))).float()
    return sum(one.cost(one.weight - shared - p) for one, p in zip(group, products, strict=True))


@pytest.mark.parametrize("rank", [0, 1, 3, 6, 7, 14])
def test_closed_form_for_two_loops_is_the_alternating_optimum(rank):
    gradients = moment(14, 7)  # one for the group, for which the closed form is exact
    group = group_of(2, gradients=gradients)
    found = joint(group, rank)
    predicted = joint_costs(group)[rank].item()
    assert found.cost(group) == pytest.approx(predicted, rel=1e-3, abs=1e-4)
    if rank in (1, 3):
        # Started at one of the layers: the mean of both is a saddle point.
        best = alternated(group, rank, group[0].weight, sweeps=400)
        assert predicted <= best * 1.0001
        assert best <= predicted * 1.05
    if 2 * rank >= 14:
        assert predicted == pytest.approx(0, abs=1e-6)


def test_joint_beats_average_and_svd_at_the_same_rank():
    group = group_of(2)
    mean = (group[0].weight + group[1].weight) / 2
    paper = 0.0
    for one in group:
        u, s, v = torch.linalg.svd(one.weight - mean, full_matrices=False)
        paper += one.cost(one.weight - mean - (u[:, :4] * s[:4]) @ v[:4])
    assert joint(group, 4).cost(group) < 0.5 * paper


@pytest.mark.parametrize("count", [3, 4])
def test_more_loops_are_improved_in_turn(count, monkeypatch):
    group = group_of(count, gradients=moment(14, 7))
    upper = joint_costs(group)
    costs = []
    for sweeps in (1, 2, 4, 8):
        monkeypatch.setattr(joint_module, "SWEEPS", sweeps)
        costs.append(joint(group, 4).cost(group))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] < upper[4].item()
    assert joint(group, 14).cost(group) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("count", [3, 4])
def test_momentum_gets_further_than_as_many_turns_without(count):
    group = group_of(count, gradients=moment(14, 7))
    gradients, shared = Moment.pooled([one.gradients for one in group]), joint_module._shared(group)
    for _ in range(joint_module.SWEEPS):
        found = [spectrum(one.weight - shared, one.inputs, gradients, 4).factors(slice(0, 4)) for one in group]
        shared = joint_module._shared(group, found)
    plain = joint_module.Joint(shared, found).cost(group)
    assert joint(group, 4).cost(group) < 0.995 * plain


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neurons_are_found_in_every_architecture(architecture):
    (found,) = find_neurons(pico_config(architecture))
    model = pico_model(architecture)
    layer = dict(model.named_modules())
    down = next(m for name, m in layer.items() if name.endswith(found.reader))
    weight = down.weight if type(down).__name__ == "Linear" else down.weight.T
    assert found.width == weight.shape[1] and found.width in (80, 192)
    # The activation is linear in `up` alone, where gate and up are apart.
    assert found.signed == (("mlp.up_proj",) if "mlp.up_proj" in found.producers else ())


def layer_of(seed: int, width: int = 24) -> dict[str, torch.Tensor]:
    return {
        "gate.weight": matrix(width, 10, seed), "up.weight": matrix(width, 10, seed + 1),
        "up.bias": matrix(width, 1, seed + 2)[:, 0], "down.weight": matrix(10, width, seed + 3),
    }  # fmt: skip


NEURONS = Neurons("down", ("gate", "up"), ("up",), 24)


def ffn(layer: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    inner = torch.nn.functional.silu(x @ layer["gate.weight"].T) * (x @ layer["up.weight"].T + layer["up.bias"])
    return inner @ layer["down.weight"].T


def seen_layer(layer: dict[str, torch.Tensor], seed: int = 50) -> dict[str, Seen]:
    inputs = moment(10, seed)
    return {
        "gate": Seen(layer["gate.weight"], inputs, DiagonalMoment(moment(24, seed + 1).diagonal.clone())),
        "up": Seen(layer["up.weight"], inputs, DiagonalMoment(moment(24, seed + 2).diagonal.clone())),
        "down": Seen(layer["down.weight"], moment(24, seed + 3), moment(10, seed + 4)),
    }


def all_reordered(layer: dict[str, Seen], neurons: Neurons, *order) -> dict[str, Seen]:
    return {name: reordered_seen(name, one, neurons, *order) for name, one in layer.items()}


def test_reordering_with_signs_leaves_the_function_as_it_is():
    layer, x = layer_of(1), matrix(7, 10, 9)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    signs = torch.where(torch.arange(24) % 3 == 0, -1.0, 1.0)
    turned = reordered(layer, NEURONS, order, signs)
    assert not torch.allclose(turned["up.weight"], layer["up.weight"])
    assert torch.allclose(ffn(turned, x), ffn(layer, x), atol=1e-5)


def test_align_finds_the_order_and_signs_that_were_hidden():
    layer = layer_of(1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    signs = torch.where(torch.arange(24) % 2 == 0, -1.0, 1.0)
    first = seen_layer(layer)
    hidden = all_reordered(first, NEURONS, order, signs)
    index, found = align(first, hidden, NEURONS)
    back = all_reordered(hidden, NEURONS, index, found)
    for name in ("gate", "up", "down"):
        assert torch.allclose(back[name].weight, first[name].weight, atol=1e-6)
        assert torch.allclose(back[name].inputs.matrix, first[name].inputs.matrix, atol=1e-6)
        assert torch.allclose(back[name].gradients.matrix, first[name].gradients.matrix, atol=1e-6)


def test_aligned_layers_are_cheaper_to_tie():
    first = seen_layer(layer_of(1))
    noise = {n: t + 0.3 * matrix(*t.shape, 77) if t.dim() == 2 else t for n, t in layer_of(1).items()}
    second = all_reordered(
        seen_layer(noise), NEURONS, torch.randperm(24, generator=torch.Generator().manual_seed(5)), torch.ones(24)
    )
    apart = sum(joint_costs([first[n], second[n]])[2].item() for n in first)
    lined_up = all_reordered(second, NEURONS, *align(first, second, NEURONS))
    assert sum(joint_costs([first[n], lined_up[n]])[2].item() for n in first) < 0.5 * apart


def test_removal_predicts_what_the_refitted_reader_costs():
    one = seen(10, 24, seed=4)
    gone = removal([one])
    assert gone.removed[0] == 0 and gone.costs[0] == 0 and gone.removed[-1] == 18  # a quarter stays
    assert torch.equal(gone.costs.sort().values, gone.costs)
    for step in (1, 7, len(gone.removed) - 1):
        kept = gone.kept(step)
        change = one.weight.clone()
        change[:, kept] -= refitted(one, kept)
        assert one.cost(change) == pytest.approx(gone.costs[step].item(), rel=1e-3)


def test_what_is_left_of_a_real_ffn_is_a_multiple_of_32():
    gone = removal([seen(10, 768, seed=4)])
    assert len(gone.removed) == 19 and all((768 - removed) % 32 == 0 for removed in gone.removed)
    for width in (1536, 2048, 4864, 5632, 8192, 8960, 11008, 14336, 16384):
        step = neurons._step(width)
        assert step % 32 == 0 and 40 < width / step < 110
    assert [neurons._step(width) for width in (24, 80, 1000)] == [1, 2, 8]  # as fine as it has to be


def test_the_first_neuron_to_go_is_the_cheapest_of_all():
    one = seen(10, 24, seed=4)
    costs = []
    for neuron in range(24):
        kept = torch.tensor([n for n in range(24) if n != neuron])
        change = one.weight.clone()
        change[:, kept] -= refitted(one, kept)
        costs.append(one.cost(change))
    assert removal([one]).order[0].item() == min(range(24), key=costs.__getitem__)


def test_narrowed_keeps_rows_and_refits_the_reader():
    layer = seen_layer(layer_of(1))
    kept = torch.tensor([0, 3, 5, 20])
    few = {name: narrowed(name, one, NEURONS, kept) for name, one in layer.items()}
    assert torch.equal(few["gate"].weight, layer["gate"].weight[kept])
    assert torch.equal(few["down"].weight, refitted(layer["down"], kept))
    assert few["down"].inputs.matrix.shape == (4, 4) and few["up"].gradients.matrix.shape == (4,)
    assert not math.isnan(few["down"].cost(few["down"].weight))
