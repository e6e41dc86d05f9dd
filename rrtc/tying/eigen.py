"""The leading eigenvectors of a symmetric positive semidefinite matrix: all that a truncation to a low rank needs.

Where few of many are asked for, a subspace of a few more is multiplied by the matrix until it holds them (randomized
subspace iteration; Halko et al., arXiv 0909.4061), each time after taking off a multiple of the identity that makes
what is not wanted smaller beside what is (shifted power iteration; Feng et al., arXiv 2404.09276). That is a small part
of the arithmetic of taking the whole matrix apart, and loses less than a per cent of the best truncation's error even
on flat spectra, of which random matrices have the flattest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 3  # of multiplication


def leading_eigenvectors(
    size: int, rank: int, times: Callable[[Tensor], Tensor], whole: Callable[[], Tensor], like: Tensor
) -> tuple[Tensor, Tensor]:
    """(values, vectors): the `rank` largest eigenvalues, (rank,), float64, descending, and eigenvectors, (size, rank).

    times(x): the matrix times x (size, n), in the dtype and on the device of `like`. whole(): the matrix
    itself, (size, size), in any format, asked for where the rank is a large share of the size, and then taken apart.
    The same matrix gives the same bits.
    """
    columns = rank + max(32, rank // 4)
    if 2 * columns > size:
        values, vectors = torch.linalg.eigh(whole())
        return values[-rank:].flip(0).double(), vectors[:, -rank:].flip(1).to(like)
    start = torch.randn(size, columns, generator=torch.Generator().manual_seed(0))
    basis = start.to(like) * size**-0.5  # nearly orthonormal
    shift = next_shift = 0.0
    for _ in range(ROUNDS):
        shift = next_shift
        basis, triangle = torch.linalg.qr(times(basis) - shift * basis)
        # Half the smallest eigenvalue in the subspace: all that are smaller, wanted by no one, come to lie around zero.
        next_shift = (shift + triangle.diagonal().abs().min().item()) / 2
    triangle = triangle.double()
    squares, turns = torch.linalg.eigh(triangle @ triangle.T)
    return squares[-rank:].flip(0).clamp_min(0).sqrt() + shift, basis @ turns[:, -rank:].flip(1).to(like)
