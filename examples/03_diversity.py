"""Train a model to differ from a frozen reference, warm-started from its own run.

    python examples/03_diversity.py    # about four minutes on two CPU cores
    python examples/03_diversity.py --reference-steps 100 --steps 40 --samples 100

First a small DiT learns scikit-learn's digits with SF-NorMuon: the reference. Then
copies of it go on under the loss

    mean |v - v_target|^2  -  weight * mean |v - v_reference|^2

where v is the predicted velocity: still a model of the digits, but pushed away from
what the reference says. The negative term makes the loss small and, in places,
negative, which is hard on step sizes. Three optimisers go on from the same point:

- AdamW, with a new state;
- SF-NorMuon, with its own state as it stands;
- the full set of components, whose state `warm_start` makes from that of SF-NorMuon.

For each the script says whether the run stayed finite, how many of its unguided samples
the classifier recognises, and how far its velocities are from the reference's.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dit_training import data as digits
from dit_training import optimizers, quality, training

import fusionopt_jax as fo
from fusionopt_jax import dit


class Setting(NamedTuple):
    """Everything that the runs share."""

    config: dit.DiTConfig
    data: digits.Dataset
    weight: float
    batch_size: int


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train the reference and the three copies; print and return the table's rows."""
    given = parse(arguments)
    data = digits.load("digits")
    setting = Setting(
        dit.DiTConfig(
            input_size=8,
            patch_size=2,
            in_channels=1,
            hidden_size=given.hidden_size,
            depth=given.depth,
            num_heads=4,
            num_classes=10,
            learn_sigma=False,
        ),
        data,
        given.weight,
        given.batch_size,
    )
    sf_normuon = fo.fusion_opt(
        8e-3,
        routing=optimizers.ROUTING,
        scalar_learning_rate=5e-3,
        polyak_rule="ratio",
    )
    params = dit.init_params(setting.config, seed=0)
    state = sf_normuon.init(params)
    params, state, _ = run(
        "reference", setting, sf_normuon, params, state, None, given.reference_steps
    )
    reference = fo.eval_params(state, params)

    full = fo.fusion_opt(
        8e-3,
        components=("ns5", "normuon", "sf", "mona", "shampoo"),
        routing=optimizers.ROUTING,
        scalar_learning_rate=5e-3,
        polyak_rule="ratio",
    )
    report = fo.warm_start_report(full, params, state)
    print(f"warm start: new are {', '.join(report.started)}; the rest is carried")
    adamw = optax.with_extra_args_support(optax.adamw(1e-3, b2=0.99))
    starts = {
        "AdamW": (adamw, reference, adamw.init(reference)),
        "SF-NorMuon": (sf_normuon, params, state),
        "full": (full, params, fo.warm_start(full, params, state)),
    }
    judge = quality.fit_judge(data)
    rows = [row("reference", setting, judge, reference, reference, True, given.samples)]
    for name, (tx, start, opt_state) in starts.items():
        end, opt_state, finite = run(
            name, setting, tx, start, opt_state, reference, given.steps
        )
        deployed = end if name == "AdamW" else fo.eval_params(opt_state, end)
        rows.append(
            row(name, setting, judge, deployed, reference, finite, given.samples)
        )
    print(f"{'optimiser':12s} {'finite':>6s} {'accuracy':>8s} {'distance':>8s}")
    for one in rows:
        print(
            f"{one['optimiser']:12s} {one['finite']!s:>6s} "
            f"{one['accuracy']:8.3f} {one['distance']:8.3f}"
        )
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a DiT to differ from a frozen reference.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--reference-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150, help="of each copy")
    parser.add_argument(
        "--weight",
        type=float,
        default=0.2,
        help="of the negative term; below 1 the loss stays bounded from below",
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--samples", type=int, default=500)
    return parser.parse_args(arguments)


def run(name, setting, tx, params, opt_state, reference, steps):
    """Take some steps; returns parameters, state, and whether losses were finite."""
    images = jnp.asarray(setting.data.train_images)
    labels = jnp.asarray(setting.data.train_labels)
    # Step functions donate what they are given, and the starts are shared.
    params, opt_state = jax.tree.map(jnp.copy, (params, opt_state))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, key):
        rows_key, loss_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (setting.batch_size,), 0, len(images))

        def loss_fn(params):
            fit = dit.rectified_flow_loss(
                params, setting.config, images[rows], labels[rows], loss_key
            )
            if reference is None:
                return fit
            apart = velocity_distance(
                params, reference, setting.config, images[rows], labels[rows], loss_key
            )
            return fit - setting.weight * apart

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    purpose = 0 if reference is None else 1
    keys = jax.random.split(jax.random.key(purpose), steps)
    # No bar where standard error is a file.
    for number, key in enumerate(bar := tqdm(keys, desc=name, disable=None)):
        params, opt_state, loss = step(params, opt_state, key)
        losses.append(loss)
        if number % 10 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    finite = bool(jnp.all(jnp.isfinite(jnp.stack(losses))))
    return params, opt_state, finite


def velocity_distance(params, reference, config, images, labels, key):
    """Mean square of the difference of two models' velocities on noisy images."""
    time_key, noise_key = jax.random.split(key)
    time = jax.nn.sigmoid(jax.random.normal(time_key, (len(images),)))
    noise = jax.random.normal(noise_key, images.shape)
    share = time[:, None, None, None]
    noisy = (1 - share) * images + share * noise
    own, other = (
        dit.apply(weights, config, noisy, 1000 * time, labels)
        for weights in (params, reference)
    )
    return jnp.mean(jnp.square(own - jax.lax.stop_gradient(other)))


def row(name, setting, judge, params, reference, finite, samples):
    """One line of the table."""
    config, data = setting.config, setting.data
    labels = np.arange(samples, dtype=np.int32) % config.num_classes
    sampler = dit.Sampler.euler(steps=25)
    # Forced: all classes of a small model take more memory than its modulators, but are
    # computed once for hundreds of images.
    cache = dit.build_cache(params, config, sampler.eval_times(), labels, force=True)
    side = config.input_size
    noise = jax.random.normal(jax.random.key(3), (samples, side, side, 1))
    images = dit.sample(params, config, cache, noise, labels, sampler, cfg_scale=1.0)
    apart = velocity_distance(
        params,
        reference,
        config,
        jnp.asarray(data.held_out_images),
        jnp.asarray(data.held_out_labels),
        jax.random.key(4),
    )
    usable = finite and bool(training.all_finite(images))
    return {
        "optimiser": name,
        "finite": usable,
        "accuracy": quality.label_accuracy(judge, np.asarray(images), labels)
        if usable
        else float("nan"),
        "distance": float(jnp.sqrt(apart)),
    }


if __name__ == "__main__":
    main()
