"""Route three kinds of model: a conv net, a scanned transformer, an Equinox model.

    python examples/02_route.py

A routing is data: it is printed, checked and compared before anything is trained. Each
model here prints its table and takes a few steps.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import fusionopt_jax as fo


def take_steps(params, loss_fn, routing, steps=5):
    """A few steps of the recipe; returns the loss before and after."""
    tx = fo.fusion_opt(8e-3, routing=routing)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    before = loss_fn(params)
    for _ in range(steps):
        params, state = step(params, state)
    return float(before), float(loss_fn(fo.eval_params(state, params)))


def conv_net():
    """Kernels of rank 4: a rule says which axes make the matrix."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "conv1": {"kernel": 0.1 * jax.random.normal(keys[0], (3, 3, 3, 128))},
        "conv2": {"kernel": 0.03 * jax.random.normal(keys[1], (3, 3, 128, 128))},
        "head": {"kernel": 0.1 * jax.random.normal(keys[2], (128, 10))},
    }
    routing = fo.Routing(
        [
            # Height, width and channels are summed over: a (3*3*128, 128) matrix.
            fo.Rule(
                "conv2/kernel",
                axes=fo.MatrixAxes(reduction_axis=(0, 1, 2), output_axis=3),
            ),
            # The first layer mixes three colours only; without a rule it would be
            # scalar too, and the table would say that nothing explains its rank.
            fo.Rule("conv1/kernel", "scalar"),
        ]
    )
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))

    def loss_fn(params):
        hidden = images
        for name in ("conv1", "conv2"):
            hidden = jax.lax.conv_general_dilated(
                hidden,
                params[name]["kernel"],
                window_strides=(2, 2),
                padding="SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            hidden = jax.nn.relu(hidden)
        return jnp.mean((hidden.mean((1, 2)) @ params["head"]["kernel"] - 1) ** 2)

    return params, loss_fn, routing


def scanned_transformer():
    """Layers stacked for scan: the leading axis counts layers, fused qkv splits."""
    layers, width = 3, 128
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (256, width))},
        "blocks": {
            "qkv": {
                "kernel": 0.05 * jax.random.normal(keys[1], (layers, width, 3 * width)),
                "bias": jnp.zeros((layers, 3 * width)),
            },
            "proj": {
                "kernel": 0.05 * jax.random.normal(keys[2], (layers, width, width))
            },
        },
    }
    routing = fo.Routing(
        [fo.Rule("qkv/kernel", axes=fo.MatrixAxes(chunks=3))], stacked=["blocks"]
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 256)

    def block(hidden, weights):
        fused = hidden @ weights["qkv"]["kernel"] + weights["qkv"]["bias"]
        query, key, value = (
            part[:, :, None, :] for part in jnp.split(fused, 3, axis=-1)
        )
        mixed = jax.nn.dot_product_attention(query, key, value)[:, :, 0, :]
        return hidden + mixed @ weights["proj"]["kernel"], None

    def loss_fn(params):
        embedding = params["embed"]["embedding"]
        hidden, _ = jax.lax.scan(block, embedding[tokens], params["blocks"])
        logits = hidden[:, :-1] @ embedding.T / width**0.5
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        ).mean()

    return params, loss_fn, routing


def equinox_model():
    """Equinox weights are (out, in); its arrays are split off from the functions."""
    model = eqx.nn.MLP(128, 128, width_size=256, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    routing = fo.Routing(layout="out_in")
    inputs = jax.random.normal(jax.random.key(1), (16, 128))

    def loss_fn(params):
        outputs = jax.vmap(eqx.combine(params, static))(inputs)
        return jnp.mean((outputs - inputs) ** 2)

    return params, loss_fn, routing


def main():
    """Print each model's table, and train it a little."""
    for build in (conv_net, scanned_transformer, equinox_model):
        params, loss_fn, routing = build()
        before, after = take_steps(params, loss_fn, routing)
        print(f"{build.__name__}: loss {before:.4f} -> {after:.4f}")
        print(routing.table(params), end="\n\n")


if __name__ == "__main__":
    main()
