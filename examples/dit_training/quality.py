"""How good the generated images are, judged by models that saw only real ones.

Two figures, because one alone is easy to fool: the mean image of each class gets every
label right, but has a Fréchet distance far above any varied sample's.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.linalg import sqrtm
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from dit_training.data import Dataset

FEATURES = 64
RIDGE = 1e-6
"""Added to the covariances: features that never fire make their product singular."""


class Judge(NamedTuple):
    """Models of the real training images.

    Attributes:
        classifier: a support vector machine from pixels to labels.
        weight: `[pixels, 64]`, hidden layer of a small network trained to classify.
        bias: `[64]`.
        mean: `[64]`, feature mean of the held-out images.
        covariance: `[64, 64]`, their feature covariance.
    """

    classifier: SVC
    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray


def fit_judge(data: Dataset) -> Judge:
    """Train both models on the real training images; the seed is fixed."""
    pixels = flat(data.train_images)
    network = MLPClassifier((FEATURES,), max_iter=300, random_state=0)
    with warnings.catch_warnings():
        # A hidden layer that still improves a little is as good a yardstick.
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(pixels, data.train_labels)
    weight, bias = network.coefs_[0], network.intercepts_[0]
    held_out = features(data.held_out_images, weight, bias)
    return Judge(
        SVC().fit(pixels, data.train_labels),
        weight,
        bias,
        held_out.mean(0),
        np.cov(held_out, rowvar=False),
    )


def label_accuracy(judge: Judge, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that the classifier gives the label they were asked for."""
    return float(np.mean(judge.classifier.predict(flat(images)) == labels))


def frechet_distance(judge: Judge, images: np.ndarray) -> float:
    """Distance of two Gaussians in feature space: these images and the held-out ones.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), for means m and covariances C.
    """
    found = features(images, judge.weight, judge.bias)
    covariance = np.cov(found, rowvar=False)
    ridge = RIDGE * np.eye(FEATURES)
    root = np.real(sqrtm((covariance + ridge) @ (judge.covariance + ridge)))
    gap = found.mean(0) - judge.mean
    return float(gap @ gap + np.trace(covariance + judge.covariance - 2 * root))


def features(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The network's hidden layer, float64 `[N, 64]`."""
    return np.maximum(flat(images) @ weight + bias, 0)


def flat(images: np.ndarray) -> np.ndarray:
    """One row of pixels per image."""
    return np.asarray(images, np.float64).reshape(len(images), -1)
