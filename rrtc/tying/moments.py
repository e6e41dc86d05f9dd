"""Second moments E[x x^T] of what enters a matrix, or of the gradients at what leaves it, in three forms.

    FullMoment      the matrix (size, size)
    SampledMoment   level I + X^T X, with one row of X for each token, where there are fewer tokens than size: what it
                    is used for is worked out on the side of the tokens, and no (size, size) matrix is made
    DiagonalMoment  the diagonal, where no more is known

All are symmetric and positive definite. With X X^T = U diag(s) U^T, a function of a sampled one is
f(level I + X^T X) = f(level) I + X^T U diag((f(level + s) - f(level)) / s) U^T X.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

BLOCK = 512  # rows or columns that are turned to float64 at a time


class Moment:
    """What the three forms have in common. Matrices that read the same input share one, so that it is taken apart once.

    Every form has: diagonal, (size,); times: M x for x (size, n), in the dtype of x; root_times,
    transposed_root_times and inverse_root_times: likewise R x, R^T x and R^-1 x, for an R with R^T R = M; of: the
    moment of some entries, in the order of an index, each times its sign. Full and sampled ones also have: solve: M^-1
    x in float64; inverse: for taking entries away (see FullInverse).
    """

    if TYPE_CHECKING:
        matrix: Tensor
        samples: Tensor
        level: float

        def __init__(self, matrix: Tensor): ...
        @property
        def diagonal(self) -> Tensor: ...
        def times(self, x: Tensor) -> Tensor: ...
        def root_times(self, x: Tensor) -> Tensor: ...
        def inverse_root_times(self, x: Tensor) -> Tensor: ...
        def solve(self, x: Tensor) -> Tensor: ...
        def of(self, index: Tensor, signs: Tensor | None = None) -> "Moment": ...
        def inverse(self) -> "FullInverse | SampledInverse": ...

    def transposed_root_times(self, x: Tensor) -> Tensor:
        return self.root_times(x)  # the root of two forms is the symmetric one

    @staticmethod
    def estimated(gathered: Tensor, samples: int) -> "Moment":
        """From what was gathered of `samples` tokens: the mean of x x^T, (size, size), or of x^2, (size,), or all x,
        (samples, size), where samples < size. The first and the last are moved towards the multiple of the identity
        with their trace as far as so few samples call for (oracle approximating shrinkage; Chen et al., arXiv
        0907.4698, equation 23)."""
        if gathered.dim() == 1:
            return DiagonalMoment(gathered.clamp_min(1e-6 * gathered.mean()).clamp_min(1e-12))
        size, is_mean = gathered.shape[1], len(gathered) == gathered.shape[1]
        gram = gathered if is_mean else _square(gathered) / samples  # of the same energy and trace
        energy = sum(block.double().square().sum() for block in gram.split(BLOCK)).item()
        trace = gram.diagonal().double().sum().item()
        spread = (samples + 1 - 2 / size) * (energy - trace**2 / size)
        share = min(max(((1 - 2 / size) * energy + trace**2) / spread, 0.0), 1.0) if spread > 0 else 1.0
        level = max(share * trace / size, 1e-12)  # an input that is always zero has no trace
        if not is_mean:
            return SampledMoment(gathered * ((1 - share) / samples) ** 0.5, level)
        matrix = gathered * (1 - share)
        matrix.diagonal().add_(level)
        return FullMoment(matrix)

    @staticmethod
    def pooled(moments: Sequence["Moment"]) -> "Moment":
        """The mean of several of one form."""
        count = len(moments)
        if isinstance(moments[0], SampledMoment):
            level = sum(moment.level for moment in moments) / count
            return _sampled(torch.cat([moment.samples for moment in moments]) * count**-0.5, level)
        total = moments[0].matrix.clone()
        for moment in moments[1:]:
            total += moment.matrix
        return type(moments[0])(total.div_(count))

    @staticmethod
    def parallel(first: "Moment", second: "Moment") -> "Moment":
        """The parallel sum C_1 (C_1 + C_2)^-1 C_2 of two of one form, full or sampled."""
        if isinstance(first, SampledMoment) and isinstance(second, SampledMoment):
            if len(first.samples) + len(second.samples) < first.samples.shape[1]:
                return _parallel_of_samples(first, second)
            first, second = first.full(), second.full()
        factor = _cholesky(lambda: first.matrix.double().add_(second.matrix))
        found = torch.empty_like(first.matrix)
        # C_1 (C_1 + C_2)^-1 C_2 = C_1 - C_1 (C_1 + C_2)^-1 C_1, some columns at a time
        for columns in _blocks(len(found)):
            part = first.matrix[:, columns].double()
            found[:, columns] = part - first.times(torch.cholesky_solve(part, factor))
        return FullMoment(found)


class Gathering:
    """What `Moment.estimated` takes, put together batch by batch over `tokens` tokens: what enters a matrix, or the
    gradients at what leaves it. It is kept in float32, in the form that takes least.

    only_diagonal: no more than the mean of x^2, (size,), is wanted. always_full: the mean of x x^T, (size, size), is
    wanted even where the rows themselves, (tokens, size), would take less.
    """

    def __init__(self, tokens: int, only_diagonal: bool = False, always_full: bool = False):
        self._tokens, self._only_diagonal, self._always_full = tokens, only_diagonal, always_full
        self._kept: Tensor | None = None
        self._filled = 0  # rows that were added

    def add(self, rows: Tensor) -> None:
        """rows: (tokens of a batch, size), float32."""
        size, end = rows.shape[1], self._filled + len(rows)
        keeps_rows = self._tokens < size and not self._always_full
        if self._kept is None:
            shape = (size,) if self._only_diagonal else (self._tokens if keeps_rows else size, size)
            self._kept = rows.new_zeros(shape)
        if self._only_diagonal:
            self._kept += rows.square().sum(0)
        elif keeps_rows:
            self._kept[self._filled : end] = rows
        else:
            self._kept.addmm_(rows.T, rows)
        self._filled = end

    def finish(self) -> Tensor:
        """The mean over all tokens, or all rows, once every token was added. To be called once: it is the memory in
        which they were gathered."""
        kept, self._kept = self._kept, None
        assert kept is not None  # tokens were added
        is_sum = kept.dim() == 1 or len(kept) == kept.shape[1]
        return kept.div_(self._tokens) if is_sum else kept


class FullMoment(Moment):
    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    @cached_property
    def _factor(self) -> Tensor:
        return _cholesky(self.matrix.double)

    @property
    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def times(self, x: Tensor) -> Tensor:
        if x.dtype == self.matrix.dtype:
            return self.matrix @ x
        return torch.cat([rows.to(x.dtype) @ x for rows in self.matrix.split(BLOCK)])

    def root_times(self, x: Tensor) -> Tensor:
        return self._factor.T.to(x.dtype) @ x  # a Cholesky factor takes a small part of the symmetric root's time

    def transposed_root_times(self, x: Tensor) -> Tensor:
        return self._factor.to(x.dtype) @ x

    def inverse_root_times(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._factor.T.to(x.dtype), x, upper=True)

    def solve(self, x: Tensor) -> Tensor:
        return torch.cholesky_solve(x.double(), self._factor)

    def of(self, index: Tensor, signs: Tensor | None = None) -> "FullMoment":
        part = self.matrix[index][:, index]
        return FullMoment(part if signs is None else part.mul_(signs).mul_(signs[:, None]))

    def inverse(self) -> "FullInverse":
        return FullInverse(self)


class DiagonalMoment(Moment):
    def __init__(self, matrix: Tensor):
        self.matrix = matrix  # (size,)

    @property
    def diagonal(self) -> Tensor:
        return self.matrix

    def times(self, x: Tensor) -> Tensor:
        return self.matrix.to(x.dtype)[:, None] * x

    def root_times(self, x: Tensor) -> Tensor:
        return self.matrix.to(x.dtype).sqrt()[:, None] * x

    def inverse_root_times(self, x: Tensor) -> Tensor:
        return self.matrix.to(x.dtype).rsqrt()[:, None] * x

    def of(self, index: Tensor, signs: Tensor | None = None) -> "DiagonalMoment":
        return DiagonalMoment(self.matrix[index])


class SampledMoment(Moment):
    """level I + X^T X, with X = `samples` (tokens, size) and fewer tokens than size."""

    def __init__(self, samples: Tensor, level: float):
        self.samples, self.level = samples, level

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(_square(self.samples))
        return values.clamp_min(0), vectors

    @property
    def diagonal(self) -> Tensor:
        return self.samples.square().sum(0) + self.level

    def times(self, x: Tensor) -> Tensor:
        samples = self.samples.to(x.dtype)
        return self.level * x + samples.T @ (samples @ x)

    def root_times(self, x: Tensor) -> Tensor:
        level = self.level
        # (sqrt(level + s) - sqrt(level)) / s, without the difference
        return self._function_times(level**0.5, lambda s: 1 / ((level + s).sqrt() + level**0.5), x)

    def inverse_root_times(self, x: Tensor) -> Tensor:
        level = self.level
        return self._function_times(
            level**-0.5, lambda s: -1 / (((level + s).sqrt() + level**0.5) * (level * (level + s)).sqrt()), x
        )

    def _function_times(self, at_level: float, slope: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f(M) x, where f(level) = `at_level` and (f(level + s) - f(level)) / s = `slope(s)`."""
        values, vectors = self._parts
        vectors, samples = vectors.to(x.dtype), self.samples.to(x.dtype)
        inner = vectors @ (slope(values).to(x.dtype)[:, None] * (vectors.T @ (samples @ x)))
        return at_level * x + samples.T @ inner

    @cached_property
    def _factor(self) -> Tensor:
        """Of level I + X X^T."""

        def gram() -> Tensor:
            square = _square(self.samples)
            square.diagonal().add_(self.level)
            return square

        return _cholesky(gram)

    def solve(self, x: Tensor) -> Tensor:
        x, samples = x.double(), self.samples.double()
        return (x - samples.T @ torch.cholesky_solve(samples @ x, self._factor)) / self.level

    def of(self, index: Tensor, signs: Tensor | None = None) -> "SampledMoment | FullMoment":
        part = self.samples[:, index]
        return _sampled(part if signs is None else part.mul_(signs), self.level)

    def full(self) -> FullMoment:
        matrix = self.samples.T @ self.samples
        matrix.diagonal().add_(self.level)
        return FullMoment(matrix)

    def inverse(self) -> "SampledInverse":
        return SampledInverse(self)


class FullInverse:
    """M^-1, float64, from which entries of x are taken away step by step: what is left is the inverse of the moment of
    the others, exactly. `diagonal`, (size,), is 1 where an entry is gone."""

    def __init__(self, moment: FullMoment):
        self._inverse = torch.cholesky_inverse(_cholesky(moment.matrix.double))  # not kept by the moment: it is large

    @property
    def diagonal(self) -> Tensor:
        return self._inverse.diagonal()

    def remove(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the entries J = `chosen` away. Returns ((M^-1)_JJ)^-1 and (M^-1)_J:, as they were before."""
        rows = self._inverse[chosen]
        schur = torch.linalg.inv(rows[:, chosen])
        self._inverse.addmm_(rows.T, schur @ rows, alpha=-1)
        self._inverse[chosen], self._inverse[:, chosen] = 0, 0
        self._inverse[chosen, chosen] = 1
        return schur, rows


class SampledInverse:
    """As FullInverse, of a sampled moment: M^-1 = (I - X^T Y) / level with Y = (level I + X X^T)^-1 X."""

    def __init__(self, moment: SampledMoment):
        self._level, self._samples = moment.level, moment.samples.double()
        self._solved = torch.cholesky_solve(self._samples, moment._factor)
        self.diagonal = (1 - (self._samples * self._solved).sum(0)) / self._level

    def remove(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._solved[:, chosen].T @ self._samples / -self._level
        rows[torch.arange(len(chosen), device=chosen.device), chosen] += 1 / self._level
        schur = torch.linalg.inv(rows[:, chosen])
        update = schur @ rows
        self.diagonal -= (rows * update).sum(0)
        self.diagonal[chosen] = 1
        self._solved.addmm_(self._solved[:, chosen], update, alpha=-1)
        self._solved[:, chosen], self._samples[:, chosen] = 0, 0
        return schur, rows


def _sampled(samples: Tensor, level: float) -> SampledMoment | FullMoment:
    """In the smaller form: entries may have been taken away, or samples put together."""
    moment = SampledMoment(samples, level)
    return moment if len(samples) < samples.shape[1] else moment.full()


def _parallel_of_samples(first: SampledMoment, second: SampledMoment) -> SampledMoment:
    """The parallel sum is h I, h that of the levels, wherever there is no sample; and as it grows with both moments,
    what it is more than h I can be taken for made of samples: a combination of the given ones."""
    samples = torch.cat([first.samples, second.samples])
    values, vectors = torch.linalg.eigh(_square(samples))
    spanned = values > 1e-12 * values[-1]
    values, vectors = values[spanned], vectors[:, spanned]
    # Q^T = basis @ samples has orthonormal rows that span them; in these coordinates the samples are X_i Q.
    basis = (vectors * values.rsqrt()).T
    placed = vectors * values.sqrt()
    one, other = placed[: len(first.samples)], placed[len(first.samples) :]
    one, other = one.T @ one, other.T @ other
    one.diagonal().add_(first.level)
    other.diagonal().add_(second.level)
    level = first.level * second.level / (first.level + second.level)
    found = one @ torch.linalg.solve(one + other, other)
    found.diagonal().sub_(level)
    energies, turns = torch.linalg.eigh((found + found.T) / 2)
    mix = (turns * energies.clamp_min(0).sqrt()).T @ basis
    return SampledMoment(mix.to(samples.dtype) @ samples, level)


def _square(samples: Tensor) -> Tensor:
    """X X^T in float64."""
    parts = (columns.double() for columns in samples.split(BLOCK, dim=1))
    return sum(part @ part.T for part in parts)


def _cholesky(make: Callable[[], Tensor]) -> Tensor:
    """The lower Cholesky factor of the matrix that make() gives anew, which is overwritten. Rounding can leave one
    whose smallest eigenvalues are below zero: as much as that is added to its diagonal."""
    added = 0.0
    while True:
        matrix = make()
        mean = matrix.diagonal().mean().item()
        matrix.diagonal().add_(added * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        added = max(10 * added, 1e-9)


def _blocks(size: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]
