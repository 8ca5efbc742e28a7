"""The digest of an array changes with every bit of it, and with nothing else."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fusionopt_jax._digest import array_digest


class TestDigest:
    def test_every_bit_counts(self):
        values = np.random.default_rng(3).normal(size=5).astype(np.float32)
        seen = {array_digest(values).tobytes()}
        for element in range(values.size):
            for bit in range(32):
                flipped = values.copy()
                flipped.view(np.uint32)[element] ^= np.uint32(1 << bit)
                seen.add(array_digest(flipped).tobytes())
        assert len(seen) == 1 + 5 * 32

    def test_every_bit_of_eight_bytes_counts(self):
        with jax.enable_x64(True):
            values = np.arange(4.0).reshape(2, 1, 2)
            seen = {array_digest(values).tobytes()}
            for bit in range(64):
                flipped = values.copy()
                flipped.view(np.uint64)[1, 0, 1] ^= np.uint64(1 << bit)
                seen.add(array_digest(flipped).tobytes())
        assert len(seen) == 65

    def test_traced_is_the_same(self):
        values = np.random.default_rng(4).normal(size=(3, 4, 2)).astype(np.float32)
        traced = jax.jit(array_digest)(values)
        np.testing.assert_array_equal(traced, array_digest(values))

    def test_one_program_for_each_shape(self):
        compiled = []

        def listen(name: str, seconds: float, **_: object) -> None:
            if "backend_compile" in name:
                compiled.append(seconds)

        array_digest(jnp.zeros(3))
        array, other = jnp.ones((5, 7)), jnp.ones(11)
        jax.monitoring.register_event_duration_secs_listener(listen)
        array_digest(array)
        array_digest(other)
        assert len(compiled) == 2

    def test_does_not_depend_on_the_layout(self):
        values = np.random.default_rng(4).normal(size=(2, 16, 8)).astype(np.float32)
        mesh = jax.make_mesh((2, 4), ("a", "b"))
        sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
        sharded = jax.device_put(values, sharding)
        np.testing.assert_array_equal(array_digest(sharded), array_digest(values))

    def test_two_words_are_independent(self):
        digests = np.stack(
            [array_digest(np.full(3, value, np.float32)) for value in range(64)]
        )
        bits = np.unpackbits(digests.view(np.uint8).reshape(64, -1), axis=1)
        # 64 draws of fair bits: a share outside [0.2, 0.8] is beyond 4.8 sigmas.
        assert np.all(np.abs(bits.mean(0) - 0.5) < 0.3)
        assert np.all(digests[:, 0] != digests[:, 1])

    def test_dtype_counts(self):
        zeros = np.zeros(4, np.float16)
        half, brain = array_digest(zeros), array_digest(zeros.astype(jnp.bfloat16))
        assert not np.array_equal(half, brain)

    def test_every_kind_of_leaf_has_one(self):
        def differ(first, second):
            return not np.array_equal(array_digest(first), array_digest(second))

        flags = jnp.asarray([True, False])
        assert differ(flags, ~flags)
        numbers = jnp.asarray([1 + 2j, 3 - 1j])
        assert differ(numbers, numbers.conj())
        assert differ(jax.random.key(0), jax.random.key(1))
        # Without x64, JAX would round these to one number.
        assert differ(np.float64(1), np.nextafter(np.float64(1), 2))
        assert differ(np.int64(0), np.int64(1 << 40))
