"""The factors of an adapter that come closest to a matrix, over the selected entries alone.

With `quantization.init: residual` (Eq. 3) an adapter starts as the fit to what quantization lost, and the base is
quantized again without what the adapter holds: LoftQ's alternation (arXiv 2310.08659, algorithm 1) under the mask S.
Under a mask there is no truncated SVD to take the factors from. But with A held, each row of B is a least squares
problem of its own in its selected entries, and so is each column of A with B held: alternating the two never
increases the error.
"""

import torch
from torch import Tensor

SWEEPS = 4  # of both halves; twice as many gain a thousandth of the error on SmolLM2's layers
_SOLVED_AT_ONCE = 2**22  # entries of normal equations in memory
_RIDGE = 1e-6  # of the mean diagonal: two rows of A that S makes parallel leave B undetermined


def fit_factors(
    target: Tensor, A: Tensor, B_selected: Tensor, A_selected: Tensor, A_fixed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, for which ‖target - B·A‖ (Frobenius) is low, starting from the given A.

    target: fp32 [out, in]. A_selected [r, in] and B_selected [out, r], bool: where the factors may differ from zero,
    A from `A_fixed` [r, in], which is zero at the selected entries. Where nothing is fixed, A's rows and B's columns
    come out with equal norms, as the halves of a singular value would.
    """
    for _ in range(SWEEPS):
        B = _solve(A @ A.t(), target @ A.t(), B_selected)
        gram, products = B.t() @ B, target.t() @ B
        if A_fixed is not None:
            products -= A_fixed.t() @ gram
        A = _solve(gram, products, A_selected.t()).t()
        if A_fixed is not None:
            A = A + A_fixed
    B = _solve(A @ A.t(), target @ A.t(), B_selected)
    if A_fixed is None:
        of_A, of_B = A.norm(dim=1), B.norm(dim=0)
        split = torch.where((of_A > 0) & (of_B > 0), (of_B / of_A).sqrt(), 1.0)
        A, B = A * split.unsqueeze(1), B / split
    return A, B


def _solve(gram: Tensor, products: Tensor, selected: Tensor) -> Tensor:
    """The x [n, r] that minimise xᵀ·gram·x - 2·xᵀ·products for each row, zero where not `selected` [n, r]."""
    rank = gram.shape[0]
    gram = gram + _RIDGE * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(rank, device=gram.device)
    found = []
    for rows, chosen in zip(
        products.split(_SOLVED_AT_ONCE // rank**2 or 1), selected.split(_SOLVED_AT_ONCE // rank**2 or 1), strict=True
    ):
        chosen = chosen.float()
        # The rows and columns that are not selected become those of the identity.
        equations = gram * chosen.unsqueeze(2) * chosen.unsqueeze(1)
        equations += torch.diag_embed(1 - chosen)
        factor, _ = torch.linalg.cholesky_ex(equations)
        found.append(torch.cholesky_solve((rows * chosen).unsqueeze(2), factor).squeeze(2))
    return torch.cat(found)
