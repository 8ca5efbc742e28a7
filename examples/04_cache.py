"""Cache the modulation of your own adaLN model, written in NNX and in Linen.

    python examples/04_cache.py

The two models below have nothing to do with this library's DiT. All they do for the
cache is to take `mods` from outside when it is given. Each is sampled with and without
a table of its modulations; the images are the same, and a table of other weights is
refused.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from fusionopt_jax import dit

WIDTH, CLASSES, STEPS = 64, 10, 8


def condition(times, labels):
    """A conditioning vector for each pair of time and label."""
    angles = times[:, None] / 1000.0 * jnp.arange(1.0, WIDTH // 2 + 1)[None, :]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves + jax.nn.one_hot(labels, WIDTH)


def gated(x, mods, inner):
    """The adaLN branch: normalise, shift and scale, transform, gate, add."""
    shift, scale, gate = jnp.split(mods[:, None, None, :], 3, axis=-1)
    return x + gate * inner(x * (1.0 + scale) + shift)


class NNXBlock(nnx.Module):
    """One adaLN block on images of `WIDTH` channels, in NNX."""

    def __init__(self, rngs):
        self.modulation = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, cond, mods=None):
        """Modulation from outside if there is one; this is all that the cache needs."""
        if mods is None:
            mods = self.modulation(cond)
        return gated(x, mods, self.inner)


class LinenBlock(nn.Module):
    """The same block in Linen."""

    def setup(self):
        """Two layers."""
        self.modulation = nn.Dense(3 * WIDTH)
        self.inner = nn.Dense(WIDTH)

    def modulate(self, cond):
        """What the cache replaces, as a method that can be applied alone."""
        return self.modulation(cond)

    def __call__(self, x, cond, mods=None):
        """Modulation from outside if there is one."""
        if mods is None:
            mods = self.modulate(cond)
        return gated(x, mods, self.inner)


def compare(name, block, modulate, weights, noise, labels):
    """Sample with and without a table; return the largest difference.

    `block(x, cond, mods)` runs the model. `modulate(weights, times, labels)` is the one
    function that a user writes; `weights` are those that it reads.
    """
    sampler = dit.Sampler.euler(STEPS)
    times = sampler.eval_times()
    table = dit.ModulatorTable.build(modulate, weights, times, labels)
    table.check(weights, times=times, labels=labels)
    rows = table.rows(labels)

    @jax.jit
    def cached(noise, mods):
        # The table is scanned: every step sees its own slice.
        def denoise(x, _time, step):
            return block(x, None, dit.take_rows(step, rows))

        return dit.run_sampler(sampler, denoise, noise, conditions=mods).images

    @jax.jit
    def fresh(noise):
        def denoise(x, time, _step):
            return block(x, condition(jnp.full(labels.shape, time), labels), None)

        return dit.run_sampler(sampler, denoise, noise).images

    difference = float(jnp.abs(cached(noise, table.mods) - fresh(noise)).max())
    print(f"{name}: largest difference {difference:.1e}")
    try:
        changed = jax.tree.map(lambda leaf: leaf + 1e-6, weights)
        table.check(changed)
    except dit.StaleCacheError as error:
        print(f"{name}: {error}")
    else:
        raise RuntimeError("a table of other weights was accepted")
    return difference


def run_nnx(noise, labels):
    """The table of an NNX block."""
    block = NNXBlock(nnx.Rngs(0))
    graph, weights = nnx.split(block.modulation)

    def modulate(weights, times, labels):
        return nnx.merge(graph, weights)(condition(times, labels))

    return compare("NNX", block, modulate, weights, noise, labels)


def run_linen(noise, labels):
    """The table of a Linen block."""
    block = LinenBlock()
    start = condition(jnp.zeros(1), jnp.zeros(1, jnp.int32))
    variables = block.init(jax.random.key(0), noise[:1], start)

    def run(x, cond, mods):
        return block.apply(variables, x, cond, mods)

    def modulate(weights, times, labels):
        params = {"params": {"modulation": weights}}
        return block.apply(params, condition(times, labels), method="modulate")

    weights = variables["params"]["modulation"]
    return compare("Linen", run, modulate, weights, noise, labels)


def main():
    """Run both; return the two differences."""
    noise = jax.random.normal(jax.random.key(1), (6, 4, 4, WIDTH))
    labels = jnp.array([3, 7, 3, 1, 7, 7])
    return run_nnx(noise, labels), run_linen(noise, labels)


if __name__ == "__main__":
    main()
