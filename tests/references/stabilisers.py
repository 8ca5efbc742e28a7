"""The four stabilisers, one matrix `(in, out)` at a time, in float64."""

import numpy as np


def cautious(update, gradient):
    """U masked by 1[u g > 0], scaled to the norm of u; and the share kept."""
    mask = update * gradient > 0
    masked = np.where(mask, update, 0.0)
    norm = np.linalg.norm(masked)
    scale = np.linalg.norm(update) / norm if norm > 0 else 0.0
    return masked * scale, mask.mean()


class SignalToNoiseGate:
    """max(min(1, |m^| / sqrt(v^))^p, floor), for each column or each entry."""

    def __init__(self, shape, *, decay, floor, power, by_neuron):
        self.decay, self.floor, self.power = decay, floor, power
        self.by_neuron = by_neuron
        self.average = np.zeros(shape)
        self.squares = np.zeros(shape[-1] if by_neuron else shape)
        self.steps = 0

    def next(self, gradient):
        """The gate of this step, to be multiplied into the update."""
        squares = gradient**2
        self.steps += 1
        self.average = self.decay * self.average + (1 - self.decay) * gradient
        if self.by_neuron:
            squares = squares.sum(axis=0)
        self.squares = self.decay * self.squares + (1 - self.decay) * squares
        correction = 1 - self.decay**self.steps
        signal = np.abs(self.average / correction)
        if self.by_neuron:
            signal = np.sqrt((signal**2).sum(axis=0))
        noise = np.sqrt(self.squares / correction)
        ratio = np.divide(signal, noise, out=np.zeros_like(noise), where=noise > 0)
        return np.maximum(np.minimum(ratio, 1.0) ** self.power, self.floor)


def hyperball(weight, update, radius, rate):
    """R W~ / |W~| with W~ = W - rate R u / |u|; the plain step where R is 0."""
    if radius == 0:
        return weight - rate * update
    moved = weight - rate * radius * update / np.linalg.norm(update)
    return radius * moved / np.linalg.norm(moved)


def cautious_decay(update, weight, rate):
    """U + rate 1[u w >= 0] w."""
    return update + rate * np.where(update * weight >= 0, weight, 0.0)
