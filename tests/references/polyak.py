"""The two shared step sizes: FusionOpt's ratio and ScheduleFree+'s Polyak rule.

ratio:             clamp(EMA(f) / EMA(||g||), lowest, highest)
schedule_free_plus: max(0, f + b <g, z - x>) / (sqrt(pi/2) ||g||_1)

While b is annealed, the published code multiplies <g, z - x> by the coefficient of the
coming interpolation, although y was made with the previous one; with a constant b the
term is <g, z - y>.
"""

import numpy as np

from tests.references.schedule_free import Adam, Averaging


def l1(grads):
    """Sum of the absolute values of every entry of every gradient."""
    return sum(np.abs(g).sum() for g in grads.values())


def ratio_trajectory(losses, norms, *, decay, lowest, highest):
    """Step sizes of the ratio rule; both averages start at their first value."""
    loss_average = norm_average = None
    out = []
    for loss, norm in zip(losses, norms, strict=True):
        if loss_average is None:
            loss_average, norm_average = loss, norm
        else:
            loss_average = decay * loss_average + (1 - decay) * loss
            norm_average = decay * norm_average + (1 - decay) * norm
        out.append(np.clip(loss_average / norm_average, lowest, highest))
    return np.array(out)


def annealed_beta(step, *, first, last, anneal_steps):
    """Interpolation coefficient: geometric in 1 - beta, from first to last."""
    if anneal_steps == 0:
        return first
    p = min(step / anneal_steps, 1.0)
    return 1 - np.exp((1 - p) * np.log(1 - first) + p * np.log(1 - last))


def schedule_free_plus(
    params0,
    grads,
    losses,
    *,
    lr,
    betas,
    eps,
    weight_decay,
    weight_lr_power,
    r,
    sf_beta1,
    sf_beta1_max,
    sf_beta1_anneal_steps,
    c_warmup,
    polyak_beta,
    corrected_twice=False,
    look_ahead_beta=True,
):
    """ScheduleFree+ around Adam on a dict of parameters; y, z, x and scalars per step.

    With ``corrected_twice`` the average of the norm is stored bias-corrected and so
    corrected again each step, as the published code does. With ``look_ahead_beta`` the
    inner product uses the coming coefficient, as the published code does; without, it
    is <g, z - y> for the y at which the gradient was taken.
    """
    y = {n: np.asarray(p, np.float64) for n, p in params0.items()}
    z, x = dict(y), dict(y)
    adam = {
        n: Adam(p.shape, beta1=betas[0], beta2=betas[1], eps=eps) for n, p in y.items()
    }
    averaging = Averaging(power=weight_lr_power, r=r, averaging_warmup=c_warmup)
    norm_average = 0.0
    history = {"y": [], "z": [], "x": [], "lr": [], "norm": []}
    for k, loss in enumerate(losses):
        g = {n: np.asarray(stack[k], np.float64) for n, stack in grads.items()}
        beta = annealed_beta(
            k, first=sf_beta1, last=sf_beta1_max, anneal_steps=sf_beta1_anneal_steps
        )
        if look_ahead_beta:
            inner = beta * sum(np.sum(g[n] * (z[n] - x[n])) for n in g)
        else:
            inner = sum(np.sum(g[n] * (z[n] - y[n])) for n in g)
        norm_average = polyak_beta * norm_average + (1 - polyak_beta) * l1(g) * np.sqrt(
            np.pi / 2
        )
        norm = norm_average / (1 - polyak_beta ** (k + 1))
        if corrected_twice:
            norm_average = norm
        step = lr * max(0.0, loss + inner) / norm
        c = averaging.next(step)
        for n in g:
            z[n] = z[n] - step**2 * weight_decay * y[n]
            z[n] = z[n] - step * adam[n].direction(g[n])
            x[n] = (1 - c) * x[n] + c * z[n]
            y[n] = beta * x[n] + (1 - beta) * z[n]
        for key, value in (("y", y), ("z", z), ("x", x), ("lr", step), ("norm", norm)):
            history[key].append(dict(value) if isinstance(value, dict) else value)
    return history, averaging
