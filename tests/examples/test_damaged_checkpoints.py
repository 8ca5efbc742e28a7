"""A damaged checkpoint never restores other numbers, and is always named in one line.

Every trial damages a file of the newest of two checkpoints, in every third trial one of
the older as well. What comes back must be one of the two states, bit for bit; the older
only with a line on standard error that names what was skipped.
"""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dit_training import checkpoints, optimizers
from dit_training.errors import RunError
from dit_training.training import TrainState

import fusionopt_jax as fo

CONFIG = {"optimizer": "fusion", "steps": 9}
OLDER, NEWER = 2, 4
# Every file with every kind of damage several times; a share of them by default.
TRIALS = 400
EVERY = 20


def flip_a_bit(content, rng):
    """One bit anywhere; the commonest damage of a disk or a wire."""
    content[rng.integers(len(content))] ^= np.uint8(1 << rng.integers(8))
    return content


def cut_off(content, rng):
    """The start alone, as a full disk leaves it."""
    return content[: rng.integers(len(content))]


def zero_a_range(content, rng):
    """A block that was never written."""
    start = rng.integers(len(content))
    content[start : start + 1 + rng.integers(512)] = 0
    return content


def scramble(content, rng):
    """Bytes of something else in the place of a few."""
    start = rng.integers(len(content))
    place = content[start : start + 1 + rng.integers(16)]
    place[:] = rng.integers(0, 256, len(place), dtype=np.uint8)
    return content


def delete(content, rng):
    """No file at all."""
    return None


KINDS = (flip_a_bit, cut_off, zero_a_range, scramble, delete)


def files_of(folder):
    """What going on reads: everything but the weights that are there for others."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and "deployed" not in path.parts
    )


def spoil(path, kind, rng):
    """Change a file in one way."""
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    changed = kind(content, rng) if len(content) else delete(content, rng)
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed.tobytes())


def damage(folder, trial, rng):
    """Change one file of a checkpoint; each file and each kind has its turn."""
    files = files_of(folder)
    path = files[trial % len(files)]
    kind = KINDS[trial // len(files) % len(KINDS)]
    spoil(path, kind, rng)
    return f"{kind.__name__} {path.relative_to(folder.parent)}"


def state_at(step):
    """A small state, another one at each step."""
    rng = np.random.default_rng(step)
    params = {
        "layer": {"kernel": rng.normal(size=(16, 8)), "bias": rng.normal(size=8)},
        "head": rng.normal(size=(8, 3)),
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    opt_state = optax.adam(1e-3).init(params)
    opt_state = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(step), opt_state)
    return TrainState(jnp.int32(step), params, opt_state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of a run."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "ROUTING", fo.Routing())
        with contextlib.closing(checkpoints.Checkpoints(folder, CONFIG)) as kept:
            for step in (OLDER, NEWER):
                state = state_at(step)
                assert kept.save(state, state.params)
    return folder


def bits(state):
    """Every leaf's bytes."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def restored(folder):
    """The state to go on from, or None and the refusal."""
    try:
        with contextlib.closing(checkpoints.Checkpoints(folder, CONFIG)) as kept:
            return kept.restore(state_at(0)), ""
    except RunError as error:
        return None, str(error)


def check(saved, folder, trial, capsys):
    """Damage a copy and restore it; what came of it."""
    shutil.copytree(saved, folder)
    rng = np.random.default_rng(trial)
    done = damage(folder / str(NEWER), trial, rng)
    # Drawn, for a period could be that of the files.
    both = rng.random() < 1 / 5
    if both:
        # All of its files: few bytes matter, and it is the newer one that is tried.
        for path in files_of(folder / str(OLDER)):
            spoil(path, KINDS[trial % len(KINDS)], rng)
        done += f", {KINDS[trial % len(KINDS)].__name__} all of {OLDER}"
    capsys.readouterr()
    state, refusal = restored(folder)
    if state is None:
        assert both, f"{done}: the older one is good, but {refusal}"
        assert "\n" not in refusal, done
        assert f"step {NEWER}" in refusal, done
        return "refused"
    lines = capsys.readouterr().err.splitlines()
    if int(state.step) == NEWER:
        assert not lines, done
        assert bits(state) == bits(state_at(NEWER)), done
        return "unharmed"
    assert int(state.step) == OLDER, done
    assert bits(state) == bits(state_at(OLDER)), done
    assert len(lines) == 1, (done, lines)
    assert f"{folder / str(NEWER)} is damaged (" in lines[0], done
    assert f"going on from step {OLDER}" in lines[0], done
    # The run will write that step again.
    assert not (folder / str(NEWER)).exists(), done
    return "older"


@pytest.mark.parametrize("trial", range(0, TRIALS, EVERY))
def test_a_damaged_checkpoint_is_noticed(trial, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimizers, "ROUTING", fo.Routing())
    # The stride would take the same kind of damage to the same files.
    check(saved, tmp_path / "copy", trial + trial // EVERY, capsys)


@pytest.mark.exhaustive
def test_no_damage_goes_unnoticed(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimizers, "ROUTING", fo.Routing())
    outcomes = []
    for trial in range(TRIALS):
        outcomes.append(check(saved, tmp_path / "copy", trial, capsys))
        shutil.rmtree(tmp_path / "copy")
    # About a quarter of the bytes of a checkpoint matter to who reads it with a target.
    # Were it few trials that are noticed, the others would test nothing.
    assert outcomes.count("older") > TRIALS / 8
    assert outcomes.count("refused") > TRIALS / 80, outcomes.count("refused")
