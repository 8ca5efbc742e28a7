"""The tasks: what they learn from, the model, the loss, how they are judged."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dit_training import data as images_data
from dit_training import quality
from dit_training.training import batch_rows

import fusionopt_jax as fo
from fusionopt_jax import dit
from fusionopt_jax.dit.routing import ROUTING as DIT_ROUTING
from study import away, convnet, glyphs, sources, transformer

WIDTH, DEPTH = 128, 2
"""Both sides of every hidden matrix are at least 128, where spectral starts."""

CONTEXT = 64
"""Bytes that the language model sees."""

PATCH = 4

STEPS, EVAL_EVERY = 800, 50
"""Length of a run, and the steps between two validations."""

TUNING_EVAL_EVERY = 200
"""The same on the seed that is tuned on; validation is a tenth of the cost."""


class Workload(NamedTuple):
    """One task.

    Attributes:
        name: How the command line calls it.
        init: `seed -> params`.
        loss: `(params, train, step, seed) -> loss` of the batch of that step.
        validate: `(params, held_out) -> loss`; the same draws at every call.
        train: Arrays to learn from.
        held_out: Arrays to validate on.
        routing: Which weights are matrices, fused ones in chunks.
        unchunked: The same without chunks.
        digest: A hash of the data.
        judge: `params -> figures` of generated images, where there are any.
    """

    name: str
    init: Callable[[int], Any]
    loss: Callable[[Any, Any, jax.Array, jax.Array], jax.Array]
    validate: Callable[[Any, Any], jax.Array]
    train: Any
    held_out: Any
    routing: fo.Routing
    unchunked: fo.Routing
    digest: str
    judge: Callable[[Any], dict[str, float]] | None = None


NAMES = ("lm", "vit", "glyphs", "digits")

SIZES = {"lm_256": 256, "lm_448": 448, "lm_640": 640}
"""The language model at other widths: 1.7, 5 and 10 million parameters."""

SHAPES = {"digits_3x192": (3, 192), "digits_2x192": (2, 192), "digits_3x156": (3, 156)}
"""The digits' DiT with other numbers of blocks and widths.

The second and the third take two thirds of the arithmetic of the first.
"""

AWAY = {
    f"away_{name}_{weight:g}": (name, weight)
    for name in ("digits", "glyphs")
    for weight in (0.9, 3.0)
}
"""A DiT that is pushed away from a trained one, and with what weight."""

OTHERS = (*SIZES, *SHAPES, *AWAY, "conv")
"""Tasks beside the four."""


@lru_cache
def get(name: str) -> Workload:
    """The workload of that name, its data read."""
    if name in SIZES:
        return _lm(name, SIZES[name])
    if name in SHAPES:
        return _flow(name, "digits", *SHAPES[name])
    if name in AWAY:
        return _away(name, *AWAY[name])
    made = {"lm": _lm, "vit": _vit, "conv": _conv}
    made |= {"glyphs": _glyphs, "digits": _digits}
    return made[name]()


def keys_of(seed: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A key for the whole run, which orders the data, and one for this step."""
    order, noise = jax.random.split(jax.random.key(seed))
    return order, jax.random.fold_in(noise, step)


def _lm(name: str = "lm", width: int = WIDTH) -> Workload:
    """A byte-level language model of Python's own library; some files held out."""
    text = sources.load()
    batch = 8

    def cross_entropy(params: Any, windows: jax.Array) -> jax.Array:
        windows = windows.astype(jnp.int32)
        logits = transformer.apply(params, windows[:, :-1], causal=True)
        return _cross_entropy(logits, windows[:, 1:])

    def loss(params: Any, train: Any, step: jax.Array, seed: jax.Array) -> jax.Array:
        _, key = keys_of(seed, step)
        first = jax.random.randint(key, (batch, 1), 0, len(train) - CONTEXT - 1)
        return cross_entropy(params, train[first + jnp.arange(CONTEXT + 1)[None]])

    # Windows spread evenly over the files that are held out.
    first = np.linspace(0, len(text.held_out) - CONTEXT - 1, 256).astype(int)[:, None]
    return Workload(
        name=name,
        init=lambda seed: transformer.init(
            jax.random.key(seed), 256, 256, CONTEXT, width, DEPTH
        ),
        loss=loss,
        validate=cross_entropy,
        train=jnp.asarray(text.train),
        held_out=jnp.asarray(text.held_out[first + np.arange(CONTEXT + 1)]),
        routing=transformer.routing(),
        unchunked=transformer.routing(chunks=False),
        digest=text.digest,
    )


def _vit() -> Workload:
    """A patch classifier of drawn characters; a font family held out."""
    classes, tokens = len(glyphs.CHARACTERS), (glyphs.SIDE // PATCH) ** 2
    return _classifier(
        "vit",
        lambda seed: transformer.init(
            jax.random.key(seed), PATCH * PATCH, classes, tokens, WIDTH, DEPTH
        ),
        lambda params, images: transformer.apply(
            params, patches(images), causal=False
        ).mean(1),
        transformer.routing(),
        transformer.routing(chunks=False),
    )


def _conv() -> Workload:
    """A convolutional classifier of the same characters."""
    classes = len(glyphs.CHARACTERS)
    return _classifier(
        "conv",
        lambda seed: convnet.init(jax.random.key(seed), classes),
        convnet.apply,
        convnet.ROUTING,
        convnet.ROUTING,
    )


def _classifier(
    name: str,
    init: Callable[[int], Any],
    logits: Callable[[Any, jax.Array], jax.Array],
    routing: fo.Routing,
    unchunked: fo.Routing,
) -> Workload:
    """Which of the characters an image shows."""
    data, batch = glyphs.load(), 32

    def validate(params: Any, held_out: Any) -> jax.Array:
        images, labels = held_out
        return _cross_entropy(logits(params, images), labels)

    def loss(params: Any, train: Any, step: jax.Array, seed: jax.Array) -> jax.Array:
        order, _ = keys_of(seed, step)
        rows = batch_rows(order, step, len(train[1]), batch)
        return validate(params, (train[0][rows], train[1][rows]))

    return Workload(
        name=name,
        init=init,
        loss=loss,
        validate=validate,
        train=(jnp.asarray(data.train_images), jnp.asarray(data.train_labels)),
        held_out=(jnp.asarray(data.held_out_images), jnp.asarray(data.held_out_labels)),
        routing=routing,
        unchunked=unchunked,
        digest=data.digest,
    )


def _glyphs() -> Workload:
    """A DiT of drawn characters; a font family held out."""
    return _flow("glyphs", "glyphs")


def _digits() -> Workload:
    """A DiT of handwritten digits; 400 images held out."""
    return _flow("digits", "digits")


def _config(
    data: images_data.Dataset, patch: int, depth: int, width: int
) -> dit.DiTConfig:
    return dit.DiTConfig(
        input_size=data.train_images.shape[1],
        patch_size=patch,
        in_channels=1,
        hidden_size=width,
        depth=depth,
        num_heads=transformer.HEADS,
        num_classes=len(data.class_names),
        learn_sigma=False,
    )


def _away(name: str, task: str, weight: float) -> Workload:
    """A trained DiT that goes on under a loss with a negative term."""
    given = get(task)
    data, patch = _images(task)
    config = _config(data, patch, DEPTH, WIDTH)
    reference = _reference(task)

    def loss(params: Any, train: Any, step: jax.Array, seed: jax.Array) -> jax.Array:
        images, labels, reference = train
        # Other draws than those that the reference learnt from.
        order, key = keys_of(seed + 1000, step)
        rows = batch_rows(order, step, len(labels), 32)
        images, labels = images[rows], labels[rows]
        fit = dit.rectified_flow_loss(params, config, images, labels, key)
        apart = away.distance(params, reference, config, images, labels, key)
        return fit - weight * apart

    def judge(params: Any) -> dict[str, float]:
        images, labels = given.held_out
        key = jax.random.key(0)
        apart = away.distance(params, reference, config, images, labels, key)
        found = given.judge(params) if given.judge else {}
        return found | {"distance": float(apart)}

    return given._replace(
        name=name,
        init=lambda _: jax.tree.map(jnp.copy, reference),
        loss=loss,
        train=(*given.train, reference),
        judge=judge,
    )


@lru_cache
def _reference(task: str) -> Any:
    return away.trained(get(task))


def _images(task: str) -> tuple[images_data.Dataset, int]:
    """The images of a DiT, and the side of its patches."""
    if task == "glyphs":
        return glyphs.load(), PATCH
    return images_data.load("digits"), 2


def _flow(name: str, task: str, depth: int = DEPTH, width: int = WIDTH) -> Workload:
    """A small DiT that learns a rectified flow on the images of a task."""
    data, patch = _images(task)
    batch = 32
    config = _config(data, patch, depth, width)

    def loss(params: Any, train: Any, step: jax.Array, seed: jax.Array) -> jax.Array:
        order, key = keys_of(seed, step)
        rows = batch_rows(order, step, len(train[1]), batch)
        return dit.rectified_flow_loss(
            params, config, train[0][rows], train[1][rows], key
        )

    def validate(params: Any, held_out: Any) -> jax.Array:
        images, labels = held_out
        return dit.rectified_flow_loss(
            params, config, images, labels, jax.random.key(0), class_dropout_prob=0.0
        )

    def judge(params: Any) -> dict[str, float]:
        """Unguided samples of every class in turn, against the images held out."""
        labels = np.arange(248, dtype=np.int32) % config.num_classes
        noise = jax.random.normal(
            jax.random.key(0), (len(labels), *data.train_images.shape[1:])
        )
        sampler = dit.Sampler.euler(steps=25)
        images = dit.sample(params, config, None, noise, labels, sampler, cfg_scale=1.0)
        images, model = np.asarray(images), _judge(task)
        return {
            "frechet_distance": quality.frechet_distance(model, images),
            "label_accuracy": quality.label_accuracy(model, images, labels),
        }

    # Each image meets two fixed draws of time and noise.
    twice = (data.held_out_images, data.held_out_labels)
    return Workload(
        name=name,
        init=lambda seed: dit.init_params(config, seed),
        loss=loss,
        validate=validate,
        train=(jnp.asarray(data.train_images), jnp.asarray(data.train_labels)),
        held_out=tuple(jnp.asarray(np.concatenate([part, part])) for part in twice),
        routing=DIT_ROUTING,
        unchunked=_without_chunks(DIT_ROUTING),
        digest=data.digest,
        judge=judge,
    )


@lru_cache
def _judge(task: str) -> quality.Judge:
    return quality.fit_judge(_images(task)[0])


def _without_chunks(routing: fo.Routing) -> fo.Routing:
    """The same split with every fused kernel taken as one matrix."""
    rules = tuple(rule for rule in routing.rules if rule.label == "scalar")
    return fo.Routing(rules=rules, stacked=routing.stacked)


def patches(images: jax.Array) -> jax.Array:
    """`[N, 16, 16, 1]` as `[N, 16, 16]`: squares of 4 x 4 pixels, row by row."""
    count, side = images.shape[0], images.shape[1] // PATCH
    squares = images.reshape(count, side, PATCH, side, PATCH)
    return squares.swapaxes(2, 3).reshape(count, side * side, PATCH * PATCH)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all predictions, in nats."""
    chosen = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)
