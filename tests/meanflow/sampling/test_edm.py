"""The noise levels of EDM's sampler."""

import pytest

from meanflow.errors import UserError
from meanflow.sampling.edm import Schedule, noise_levels


def test_noise_levels():
    levels = noise_levels(Schedule(steps=3, sigma_min=1.0, sigma_max=9.0, rho=2))
    assert levels == pytest.approx((9, 4, 1, 0)) and levels[-1] == 0
    assert len(noise_levels(Schedule())) == 33
    official = (80, 9.723200798034668, 0.46997880935668945, 0.002, 0)  # of Re-MeanFlow's code, in float32
    assert noise_levels(Schedule(steps=4)) == pytest.approx(official, rel=1e-6)
    assert noise_levels(Schedule(steps=1)) == pytest.approx((80, 0))


@pytest.mark.parametrize("change", [{"steps": 0}, {"sigma_min": 0.0}, {"sigma_max": 0.001}, {"rho": 0}])
def test_noise_levels_that_do_not_decrease(change):
    with pytest.raises(UserError, match="--sigma_min < --sigma_max"):
        noise_levels(Schedule(**change))
