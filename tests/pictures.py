"""Pictures for tests, and how far two are apart."""
import numpy as np
from PIL import Image


def colors(width, height, seed=0):
    """Smooth, different at every edge, and different for every seed."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = np.random.default_rng(seed).permutation([x, y, x * y, 1 - x * y])[:3]
    return Image.fromarray((np.stack(channels, -1) * 255).round().astype(np.uint8))


def levels_apart(a, b):
    """Of 255, at each value of two pictures."""
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
