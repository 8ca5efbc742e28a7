"""Matrix products of operands in half precision, on every platform the same numbers."""

import math
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

HotDtype: TypeAlias = Literal["auto", "fp32", "bf16", "fp16", "fp16_safe"]

HOT_DTYPES: tuple[HotDtype, ...] = ("auto", "fp32", "bf16", "fp16", "fp16_safe")

_DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp16_safe": jnp.float16}

# Products of two stay in reach of fp32, and entries down to 1e-8 keep all their bits.
_LARGEST_UNIT = 4096.0


class Products(NamedTuple):
    """Matrix products of operands rounded to a dtype, with sums in fp32.

    Attributes:
        dtype: What operands are rounded to.
        storage: What the iterate X is kept in from one step to the next.
        unit: A power of two by which operands are multiplied before they are rounded;
            X comes and goes multiplied by it. fp16 rounds what is below 6e-5 to fewer
            bits or to zero, and the entries of an m × n matrix of norm 1 are near
            1/√(mn).
        simulated: Whether operands are kept in fp32, rounded to what `dtype` can hold:
            XLA has no half-precision product with fp32 accumulation on every CPU, and
            fp32 products of rounded operands are the same numbers.
    """

    dtype: jnp.dtype
    storage: jnp.dtype
    unit: float
    simulated: bool

    def __call__(self, A: Array, B: Array) -> Array:
        """A B."""
        return self._rounded_dot(A * self.unit, B * self.unit) / self.unit**2

    def onto(self, A: Array, X: Array) -> Array:
        """A X; of a tall X the transpose, X Aᵀ. X comes and goes in `unit`."""
        # Rounded, A isn't symmetric: the factor that came last, next to X, would spread
        # its large singular values over small ones, which the others then lift.
        if tall(X):
            sums = "...ij,...kj->...ik"
            return self._rounded_dot(X, A * self.unit, sums) / self.unit
        return self._rounded_dot(A * self.unit, X) / self.unit

    def gram(self, X: Array) -> Array:
        """XXᵀ, from X in `unit`."""
        sums = "...ji,...jk->...ik" if tall(X) else "...ij,...kj->...ik"
        return self._rounded_dot(X, X, sums) / self.unit**2

    def _rounded_dot(
        self, A: Array, B: Array, sums: str = "...ij,...jk->...ik"
    ) -> Array:
        return jnp.einsum(
            sums,
            self._rounded(A),
            self._rounded(B),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def _rounded(self, A: Array) -> Array:
        """A in the operands' dtype."""
        if not self.simulated:
            return A.astype(self.dtype)
        # A pair of casts would be optimised away.
        info = jnp.finfo(self.dtype)
        return jax.lax.reduce_precision(A.astype(jnp.float32), info.nexp, info.nmant)

    @classmethod
    def fitting(
        cls, hot_dtype: HotDtype, largest: float, *, simulated: bool
    ) -> "Products":
        """With the unit that keeps operands up to `largest` far below fp16's 65504."""
        dtype = jnp.dtype(_DTYPES.get(hot_dtype, jnp.float32))
        if dtype != jnp.float16:
            return cls(dtype, dtype, 1.0, simulated)
        unit = 2.0 ** math.floor(math.log2(65504 / (2 * largest)))
        storage = jnp.dtype(jnp.float32) if hot_dtype == "fp16_safe" else dtype
        return cls(dtype, storage, min(max(unit, 1.0), _LARGEST_UNIT), simulated)


def tall(X: Array) -> bool:
    """Whether the columns are the small side."""
    return X.shape[-2] > X.shape[-1]
