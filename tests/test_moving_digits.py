"""The demo's data: no single frame tells the class, two frames do."""

import numpy as np
import pytest
from scipy.stats import ks_2samp
from sklearn.datasets import load_digits

from examples.moving_digits import CLASSES, poses, render

pytestmark = pytest.mark.compiled


def circular_centre(frame: np.ndarray) -> np.ndarray:
    """Angles (2,) of the centre of mass on the torus, along rows and columns."""
    phase = np.exp(2j * np.pi * np.arange(len(frame)) / len(frame))
    return np.angle([(frame.sum(axis=1) * phase).sum(), (frame.sum(axis=0) * phase).sum()])


def test_single_frames_have_one_distribution_and_pairs_of_frames_do_not():
    rng = np.random.default_rng(0)
    digits = load_digits().images
    statistics: dict[str, list] = {name: [] for name in CLASSES}
    steps: dict[str, list] = {name: [] for name in CLASSES}
    for name in CLASSES:
        for _ in range(250):
            at = rng.integers(35)
            first, second = render(digits[rng.integers(1000)], poses(name, 36, rng)[[at, at + 1]], 40).astype(float)
            centre, mass = circular_centre(first), first.sum()
            statistics[name].append((mass, (first > 100).mean(), *centre, (first**2).sum() / mass))
            step = np.angle(np.exp(1j * (circular_centre(second) - centre)))
            steps[name].append((*step, second.sum() / mass - 1))
    for name in CLASSES:
        others = np.concatenate([statistics[other] for other in CLASSES if other != name])
        for mine, rest in zip(np.array(statistics[name]).T, others.T, strict=True):
            assert ks_2samp(mine, rest).pvalue > 1e-3
    # The same statistics of two frames tell: so the test above is not blind.
    for name, column, sign in (("MoveRight", 1, 1), ("MoveLeft", 1, -1), ("MoveDown", 0, 1), ("MoveUp", 0, -1)):
        assert (np.sign(np.array(steps[name])[:, column]) == sign).mean() > 0.95
    grown = {name: (np.array(steps[name])[:, 2] > 0).mean() for name in ("Grow", "Shrink")}
    assert grown["Grow"] > 0.85 and grown["Shrink"] < 0.15


def test_every_class_has_its_reverse():
    motions = set(CLASSES.values())
    assert len(motions) == len(CLASSES) >= 8
    assert {(coordinate, -direction) for coordinate, direction in motions} == motions
