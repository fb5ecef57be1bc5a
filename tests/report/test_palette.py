"""Colours are told apart by all readers."""

from itertools import combinations

import numpy as np
import pytest

from megatron_mosaic.report.palette import MEMORY_COLORS, TIME_COLORS, module_colors

MODULES = ("language", *(f"encoder_{n}" for n in range(5)))
# What is left of linear red, green and blue without one kind of cones: Machado, Oliveira and
# Fernandes, A physiologically-based model for simulation of color vision deficiency, 2009, table 1.
SIGHTS = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue cones": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(color):
    """Linear red, green and blue of a colour, each from 0 to 1."""
    parts = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(parts):
    """CIE 1976 L*a*b* of linear red, green and blue, for D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ parts / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest_pair(colors, sight):
    """Smallest distance between two colours; about 2 is just visible side by side."""
    seen = [lab(np.clip(np.array(SIGHTS[sight]) @ linear(color), 0, 1)) for color in colors]
    return min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2))


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(
    ("colors", "least"),
    [
        ([forward for forward, _ in module_colors(MODULES).values()], 15),
        ([color for pair in module_colors(MODULES[:3]).values() for color in pair], 15),
        ([color for pair in module_colors(MODULES).values() for color in pair], 8),
        ([*MEMORY_COLORS.values()], 12),
        ([*TIME_COLORS.values()], 12),
    ],
    ids=["forward", "three modules", "all modules", "memory", "time"],
)
def test_colors_differ_for_every_kind_of_sight(colors, least, sight):
    assert nearest_pair(colors, sight) >= least


@pytest.mark.parametrize("module", MODULES)
def test_white_numbers_are_legible_on_forward_tasks(module):
    forward, _ = module_colors(MODULES)[module]

    luminance = float(np.array([0.2126, 0.7152, 0.0722]) @ linear(forward))

    # WCAG 2.1, contrast of large or bold text.
    assert 1.05 / (luminance + 0.05) >= 3
