"""The noise levels of EDM's sampler, which makes the couplings.  Source: arXiv:2206.00364, eq. 5."""

from typing import NamedTuple

from meanflow.errors import UserError


class Schedule(NamedTuple):
    """Noise levels sigma of x = data + sigma noise, see `noise_levels`."""

    steps: int = 32
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0


def noise_levels(schedule: Schedule) -> tuple[float, ...]:
    """Return schedule.steps + 1 levels: from sigma_max to sigma_min, uniform in sigma^(1/rho), then 0.

    One step: sigma_max and 0, where the official code divides by zero.  Raises UserError unless the levels decrease.
    """
    steps, sigma_min, sigma_max, rho = schedule
    if steps < 1 or not 0 < sigma_min < sigma_max or rho <= 0:
        raise UserError(
            f"{schedule}: the sampler needs --steps of at least 1, 0 < --sigma_min < --sigma_max and a --rho above 0"
        )
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    fractions = (i / max(steps - 1, 1) for i in range(steps))
    return *((first + fraction * (last - first)) ** rho for fraction in fractions), 0.0
