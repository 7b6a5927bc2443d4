"""How much of a condition a picture keeps: the map that was given against the map of the picture."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage.metrics import structural_similarity

WITHIN = 2.0
"""Pixels that an edge may be off."""
EDGE = 128
"""Grey levels from which a pixel is an edge."""


def map_similarity(found: Image.Image, given: Image.Image) -> float:
    """Structural similarity (Wang et al., 2004) of two maps of one size, 1 for equal ones."""
    return float(structural_similarity(_grey(found), _grey(given), data_range=255))


def edge_f1(found: Image.Image, given: Image.Image, within: float = WITHIN) -> float:
    """Harmonic mean of how many found edges are near a given one, and how many given ones are near a found one.

    Args:
        found, given: maps of one size, edges bright on dark.
        within: pixels that count as near.

    Returns:
        0 to 1; 1 where neither has edges, 0 where one of them has none.
    """
    ours, theirs = (_grey(one) >= EDGE for one in (found, given))
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (_distance_to(theirs)[ours] <= within).mean()
    recall = (_distance_to(ours)[theirs] <= within).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _distance_to(edges: NDArray[numpy.bool_]) -> NDArray[numpy.float64]:
    return distance_transform_edt(~edges)


def _grey(picture: Image.Image) -> NDArray[numpy.uint8]:
    return numpy.asarray(picture.convert("L"))
