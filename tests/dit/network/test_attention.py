"""Attention against float64 NumPy, its gradients against the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax.dit.network.attention import attention_in_fp32, self_attention

SHAPE = (2, 3, 7, 4)  # batch, heads, tokens, head width


def reference(q, k, v, weight):
    """The result, and the gradients of its inner product with `weight`."""
    scale = q.shape[-1] ** -0.5
    logits = scale * np.einsum("bnth,bnsh->bnts", q, k)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    result = np.einsum("bnts,bnsh->bnth", shares, v)
    back = np.einsum("bnth,bnsh->bnts", weight, v)
    back = shares * (back - (shares * back).sum(-1, keepdims=True))
    return result, (
        scale * np.einsum("bnts,bnsh->bnth", back, k),
        scale * np.einsum("bnts,bnth->bnsh", back, q),
        np.einsum("bnts,bnth->bnsh", shares, weight),
    )


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_result_and_gradients(rng, spread):
    """With a spread of 30, logits reach a thousand: their exponential is infinite."""
    q, k, v, weight = rng.normal(size=(4, *SHAPE))
    q, k = spread * q, spread * k
    narrow = [np.float32(array) for array in (q, k, v, weight)]
    result, gradients = reference(*map(np.float64, narrow))
    *inputs, weight = map(jnp.asarray, narrow)
    found, back = jax.vjp(attention_in_fp32, *inputs)
    # Logits of 2,000 are rounded to 1e-4, and so are the logarithms of the weights.
    atol = 1e-6 if spread == 1 else 1e-3 * spread
    np.testing.assert_allclose(found, result, atol=min(atol, 1e-3))
    for ours, exact in zip(back(weight), gradients, strict=True):
        np.testing.assert_allclose(ours, exact, atol=5 * atol)


def test_the_same_as_the_other_implementation(rng):
    fused = jnp.asarray(rng.normal(size=(2, 7, 3 * 12)), jnp.float32)
    # Sums of seven numbers of about 1 in another order.
    np.testing.assert_allclose(
        self_attention(fused, 3), self_attention(fused, 3, "xla"), atol=1e-6
    )


def test_half_precision_stays_half(rng):
    fused = jnp.asarray(rng.normal(size=(2, 7, 3 * 12)), jnp.bfloat16)
    assert self_attention(fused, 3).dtype == jnp.bfloat16
