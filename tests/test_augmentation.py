"""The augmentation of clips: what it draws, that it holds for a whole clip, and that training takes it where asked."""

import colorsys

import numpy as np
import pytest
import torch

from examples import augmentation
from examples.augmentation import augment, colour_map, resized_crop

pytestmark = pytest.mark.compiled


def test_a_crop_is_a_rectangle_of_its_area_and_shape(monkeypatch):
    frames = torch.arange(40 * 60, dtype=torch.int32).view(1, 1, 40, 60).expand(2, 3, -1, -1).float()
    areas, ratios, corners = [], [], set()
    scale = torch.nn.functional.interpolate

    def seen(part, size, **options):
        h, w = part.shape[2:]
        areas.append(h * w / (40 * 60))
        ratios.append(w / h)
        corners.add(divmod(int(part[0, 0, 0, 0]), 60))
        assert torch.equal(part[0], part[1])
        return scale(part, size, **options)

    monkeypatch.setattr(augmentation.F, "interpolate", seen)
    for draw in range(300):
        assert resized_crop(frames, 16, np.random.default_rng(draw)).shape == (2, 3, 16, 16)
    assert 0.44 < min(areas) < 0.55 and 0.9 < max(areas) <= 1
    assert 0.7 < min(ratios) < 0.85 and 1.25 < max(ratios) <= 1.51
    assert len({top for top, _ in corners}) > 5 and len({left for _, left in corners}) > 10


def test_a_crop_of_everything_is_the_picture(monkeypatch):
    monkeypatch.setattr(augmentation, "AREA", (1, 1))
    monkeypatch.setattr(augmentation, "RATIO", (1, 1))
    frames = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    assert torch.equal(resized_crop(frames, 24, np.random.default_rng(0)), frames)


def only(monkeypatch, **draws):
    for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"):
        monkeypatch.setattr(augmentation, name, draws.get(name, 0))


def test_each_part_of_the_jitter(monkeypatch):
    """Permutation alone leaves the set of channels; the others do what their names say."""
    colour = torch.tensor([0.7, 0.4, 0.2])
    only(monkeypatch)
    orders = {tuple((colour_map(np.random.default_rng(n))[0] @ colour).tolist()) for n in range(40)}
    assert len(orders) == 6 and {tuple(sorted(order)) for order in orders} == {tuple(sorted(colour.tolist()))}

    class Sorted(np.random.Generator):
        def permutation(self, n):
            return np.arange(n)

    def drawn(seed):
        return colour_map(Sorted(np.random.PCG64(seed)))

    for seed in range(20):
        only(monkeypatch, BRIGHTNESS=0.4)
        bright = drawn(seed)[0] @ colour / colour
        assert bright.std() < 1e-5 and 0.6 <= bright[0] <= 1.4
        only(monkeypatch, SATURATION=0.4, HUE=0.1)
        torch.testing.assert_close(drawn(seed)[0] @ torch.ones(3), torch.ones(3))  # grey stays grey
        only(monkeypatch, SATURATION=0.4)
        assert (drawn(seed)[0] @ colour) @ augmentation.GREY == pytest.approx(float(colour @ augmentation.GREY))
        only(monkeypatch, HUE=0.1)
        turned = drawn(seed)[0] @ torch.tensor([0.8, 0.2, 0.2])
        hue = (colorsys.rgb_to_hsv(*turned.tolist())[0] + 0.5) % 1 - 0.5
        assert abs(hue) < 0.11 and turned.sum() == pytest.approx(1.2)
        only(monkeypatch, CONTRAST=0.4)
        matrix, contrast = drawn(seed)
        torch.testing.assert_close(matrix, torch.eye(3))
        assert 0.6 <= contrast <= 1.4


def test_contrast_keeps_the_mean_and_scales_the_distance_from_it(monkeypatch):
    only(monkeypatch, CONTRAST=0.4)
    monkeypatch.setattr(augmentation, "AREA", (1, 1))
    monkeypatch.setattr(augmentation, "RATIO", (1, 1))
    frames = torch.randint(100, 150, (2, 1, 16, 16), dtype=torch.uint8).expand(-1, 3, -1, -1)
    spreads = [augment(frames, 16, np.random.default_rng(n)).float() for n in range(20)]
    assert all(abs(x.mean() - frames.float().mean()) < 0.3 for x in spreads)  # of rounding
    factors = [float(x.std() / frames.float().std()) for x in spreads]
    assert 0.59 < min(factors) < 0.8 and 1.2 < max(factors) < 1.41


def test_all_frames_of_a_clip_change_alike():
    still = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8).expand(6, -1, -1, -1)
    first, again, other = (augment(still, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (6, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, first[:1].expand_as(first)) and torch.equal(first, again)
    assert not torch.equal(first, other)
