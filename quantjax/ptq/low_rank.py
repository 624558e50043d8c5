"""Which term of low rank, in float beside the codes, takes back most of what rounding lost?
Zhang et al., "LQER: Low-Rank Quantization Error Reconstruction for LLMs", 2024, arXiv:2402.02446;
with the exact weight of the inputs, S S' = E[x x'], as in Zhang et al. 2024, arXiv:2410.06040
(QERA, theorem 1). Without data the plain SVD of the error: Yao et al. 2023, arXiv:2303.08302
(ZeroQuant-V2, LoRC)."""

import dataclasses
import functools
import warnings
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from quantjax.affine import dequantize_array, find_scales
from quantjax.policy import Policy, Resolved
from quantjax.ptq.channels import factors_on_leaf, lead_of
from quantjax.ptq.factor import damped_cholesky
from quantjax.ptq.folded import Folded
from quantjax.ptq.layerwise import Layerwise, Problem, Solver
from quantjax.qtensor import QTensor

DAMPING = 1e-4  # of the mean of diag(H): inputs that depend on others leave H singular


def low_rank_matrix(
    e_OI: Float[Array, "o i"], h_II: Float[Array, "i i"] | None, *, rank: int
) -> tuple[Float[Array, "i r"], Float[Array, "o r"], Bool[Array, ""]]:
    """left, right of min ||(E - right left') X||^2, and whether H = E[x x'] could be factored.

    With H = S S' the error is |(E - right left') S|^2, so the SVD of E S, cut at `rank`, gives
    right left' = U_r D_r V_r' S^-1 (Eckart, Young). h_II None, or one that can not be factored:
    S = 1, the plain SVD.

    >>> e, h = jnp.array([[3.0, 0.0], [0.0, 2.0]]), jnp.diag(jnp.array([1.0, 9.0]))
    >>> best = jax.jit(low_rank_matrix, static_argnames="rank")
    >>> left, right, _ = best(e, h, rank=1)  # the second input is the larger one
    >>> abs(np.round(right @ left.T, 3)).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    if h_II is None:
        u_OK, d_K, vt_KI = jnp.linalg.svd(e_OI, full_matrices=False)
        ok = jnp.ones((), bool)
    else:
        factor = damped_cholesky(h_II, DAMPING)
        ok = factor.ok
        s_II = jnp.where(ok, factor.lower_II, jnp.eye(len(h_II)))
        weighted = jnp.matmul(e_OI, s_II, precision="highest")
        u_OK, d_K, vt_KI = jnp.linalg.svd(weighted, full_matrices=False)
        # V' S^-1: the solution of S' z = v for every row.
        vt_KI = jax.scipy.linalg.solve_triangular(s_II, vt_KI.T, trans="T", lower=True).T
    half_R = jnp.sqrt(d_K[:rank])
    return vt_KI[:rank].T * half_R, u_OK[:, :rank] * half_R, ok


@functools.partial(jax.jit, static_argnames="rank")
def _all(e_LOI, h_LII, *, rank):
    """One matrix after another."""
    return jax.lax.map(lambda a: low_rank_matrix(*a, rank=rank), (e_LOI, h_LII))


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The solver that rounds every weight to the nearest value, at the scales of its observer."""

    # Not `rtn`, which searches for scales by what a layer puts out: the term is to correct what
    # `quantize` gives for the same policy.
    paired: ClassVar[bool] = False

    def __call__(self, problem: Problem) -> QTensor:
        """The parameter rounded as its policy says."""
        return problem.stored(problem.w_BOI, find_scales(problem.w, problem.spec))


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The solver that corrects another's result; see `low_rank`."""

    solver: Solver
    rank: int
    weighted: bool = True
    dtype: np.dtype = np.dtype(jnp.bfloat16)

    @property
    def paired(self) -> bool:
        """As the other solver wants it."""
        return self.solver.paired

    def __call__(self, problem: Problem) -> QTensor:
        """The parameter as the other solver has it, and the factors."""
        form, shape = problem.form, problem.w.shape
        q = self.solver(problem)
        rest = dataclasses.replace(q, dtype=np.dtype(np.float32))
        e_BOI = problem.w_BOI - form.matrices(dequantize_array(rest))
        b, o, i = e_BOI.shape
        # The groups of a convolution share a kernel's axis of inputs, and so their left factor.
        e_LOI = e_BOI.reshape(b // form.groups, form.groups * o, i)
        h_LII = None
        if self.weighted:
            h_LII = problem.moments.h.reshape(len(e_LOI), form.groups, i, i).mean(1)
        rank = min(self.rank, *e_LOI.shape[1:])
        left, right, ok = _all(e_LOI, h_LII, rank=rank)
        if not bool(ok.all()):
            warnings.warn(
                f"{problem.name}: E[x x'] of its inputs could not be factored; its error is "
                f"corrected by the plain SVD, which knows nothing of them.",
                stacklevel=2,
            )
        left, right = factors_on_leaf(left, right, form, shape, lead_of(problem))
        return dataclasses.replace(q, left=left.astype(self.dtype), right=right.astype(self.dtype))


def low_rank(
    method: Layerwise | Folded | Policy | Resolved | str,
    *,
    rank: int,
    weighted: bool = True,
    dtype: np.dtype | type = jnp.bfloat16,
) -> Layerwise | Folded:
    """The method that adds to every quantized parameter a term of low rank, in float.

    left, right = argmin ||(W - D(Q(W)) - left @ right) X||^2 (`weighted`, by E[x x'] of the
    inputs), or without data the plain SVD of the error. method: what quantizes, such as
    `awq("w3")`, or a policy, which rounds to nearest. rank: of the term; it takes
    rank * (inputs + outputs) numbers of `dtype`, which count in bytes and bits per weight. Products
    add (x @ left) @ right to that of the codes. Raises ValueError for a rank below 1.
    Source: Zhang et al. 2024, arXiv:2402.02446.
    """
    if rank < 1:
        raise ValueError(f"low_rank: rank must be 1 or more, got {rank}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"low_rank: dtype must be a float, got {dtype}.")
    if isinstance(method, Folded):
        return Folded(_corrected(method.method, rank, weighted, np.dtype(dtype)))
    if not isinstance(method, Layerwise):
        method = Layerwise(method, Nearest(), sequential=False)
    return _corrected(method, rank, weighted, np.dtype(dtype))


def _corrected(method: Layerwise, rank: int, weighted: bool, dtype: np.dtype) -> Layerwise:
    return dataclasses.replace(method, solver=LowRank(method.solver, rank, weighted, dtype))
