"""The base's latent is where the sampler asks for it, whichever way the sampler walks."""

from __future__ import annotations

import math

import pytest
import torch

from lib_xadapter.trajectory import Point, Trajectory

SPREAD = 0.7
"""Standard deviation of the data; the ideal denoiser of normal data is known, and so is every path."""


def denoise(latent: torch.Tensor, sigma: float) -> torch.Tensor:
    return latent * SPREAD**2 / (SPREAD**2 + sigma**2)


def exact(latent: torch.Tensor, start: float, sigma: float) -> torch.Tensor:
    return latent * math.sqrt((SPREAD**2 + sigma**2) / (SPREAD**2 + start**2))


def levels(steps: int, start: float = 10.0, end: float = 0.1) -> list[float]:
    return [start * (end / start) ** (step / steps) for step in range(steps + 1)]


@pytest.fixture
def noise():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def walk(trajectory: Trajectory, sigmas: list[float]) -> torch.Tensor:
    for sigma in sigmas:
        latent = trajectory.latent_at(sigma)
        trajectory.add(Point(sigma, latent, denoise(latent, sigma)))
    return latent


def error(noise: torch.Tensor, steps: int, order: int) -> float:
    sigmas = levels(steps)
    end = walk(Trajectory(noise, order=order), sigmas)
    return float((end - exact(sigmas[0] * noise, sigmas[0], sigmas[-1])).abs().max())


@pytest.mark.parametrize("order", [1, 2])
def test_the_solver_is_of_its_order(noise, order):
    gain = error(noise, 40, order) / error(noise, 80, order)
    assert gain == pytest.approx(2**order, rel=0.15)


def test_it_starts_from_the_clean_latent_with_noise_of_the_first_level(noise):
    clean = torch.ones_like(noise)
    torch.testing.assert_close(Trajectory(noise, clean).latent_at(3.0), clean + 3 * noise)


def test_without_a_clean_latent_it_starts_from_noise(noise):
    torch.testing.assert_close(Trajectory(noise).latent_at(14.6), 14.6 * noise)


def test_the_first_step_is_that_of_ddim(noise):
    trajectory = Trajectory(noise)
    start = walk(trajectory, [8.0])
    slope = (start - denoise(start, 8.0)) / 8.0
    torch.testing.assert_close(trajectory.latent_at(5.0), start + (5.0 - 8.0) * slope)


def test_asking_twice_for_a_level_gives_the_same_latent(noise):
    trajectory = Trajectory(noise)
    once = walk(trajectory, levels(5))
    assert torch.equal(trajectory.latent_at(levels(5)[-1]), once)
    assert torch.equal(walk(trajectory, [levels(5)[-1]] * 3), once)


def test_a_level_between_two_others_does_not_bend_the_path(noise):
    """Second-order samplers look half a step ahead, then ask for a level above that."""
    straight = walk(Trajectory(noise), [10.0, 6.0, 4.0])
    probing = walk(Trajectory(noise), [10.0, 6.0, 3.0, 4.0])
    assert torch.equal(straight, probing)


def test_a_sampler_that_rises_finds_the_base_where_it_was(noise):
    """Restart and churn go back to more noise."""
    trajectory = Trajectory(noise)
    visited = {}
    for sigma in levels(8):
        visited[sigma] = walk(trajectory, [sigma])
    for sigma in levels(8)[3:]:
        assert torch.equal(walk(trajectory, [sigma]), visited[sigma])


def test_rising_above_the_start_begins_anew(noise):
    clean = torch.ones_like(noise)
    trajectory = Trajectory(noise, clean)
    walk(trajectory, [3.0, 2.0])
    torch.testing.assert_close(trajectory.latent_at(4.0), clean + 4 * noise)


def test_neighbouring_levels_are_not_magnified(noise):
    """A step much longer than the last one falls back on an older point, or on first order."""
    end = walk(Trajectory(noise), [10.0, 9.999, 5.0])
    torch.testing.assert_close(end, exact(10.0 * noise, 10.0, 5.0), rtol=0.05, atol=0)


def test_no_noise_is_left_at_level_zero(noise):
    trajectory = Trajectory(noise)
    last = walk(trajectory, levels(5))
    assert torch.equal(trajectory.latent_at(0.0), denoise(last, levels(5)[-1]))


def test_each_image_walks_its_own_path(noise):
    together = walk(Trajectory(noise), levels(6))
    alone = walk(Trajectory(noise[1:]), levels(6))
    assert torch.equal(together[1:], alone)
