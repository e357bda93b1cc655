"""The transformer of improved MeanFlow: layouts, initial state, rotary positions and errors."""

import numpy as np
import pytest
import tiny
import torch

from torch_impl.models import imf_dit
from torch_impl.step import build_net

SIZES = {
    "name": "imf_dit", "input_size": 8, "channels": 3, "num_classes": 5, "patch_size": 2, "depth": 2, "head_depth": 1,
    "width": 16, "num_heads": 2, "num_class_tokens": 3, "num_omega_tokens": 1, "num_interval_tokens": 2,
    "num_time_tokens": 2,
}  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(dtype=torch.float32):
    z, t, y = normal(2, 3, 8, 8).to(dtype), torch.tensor([0.5, 1.0], dtype=dtype), torch.tensor([0, 5])
    return [z, t, t / 2, y, 1 + 3 * t, t / 4, 1 - t / 4]


def build(**changes):
    """Return a network of the tiny sizes."""
    config = tiny.of_network(SIZES | changes)
    return build_net(config)


@pytest.fixture(scope="module")
def whole():
    """Return a network in float64 whose parameters are zero nowhere."""
    net = build(compute_dtype="float64").requires_grad_(False)
    for seed, p in enumerate(net.parameters()):
        p.copy_(0.3 * normal(*p.shape, seed=seed))
    return net


@pytest.fixture
def given():
    """Return inputs in float64."""
    return inputs(torch.float64)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.float32), ("float64", torch.float64)]
)
def test_dtypes(dtype, expected):
    net = build(compute_dtype=dtype)
    assert {p.dtype for p in net.parameters()} == {expected}
    u = net(*inputs(expected))
    assert u.dtype == expected and u.shape == (2, 3, 8, 8)


def test_both_outputs_are_zero_at_initialisation():
    u, v = build()(*inputs(), heads="uv")
    assert not u.any() and not v.any()


def test_heads_are_what_was_asked_for(whole, given):
    u, v = whole(*given, heads="uv")
    assert torch.equal(whole(*given), u) and torch.equal(whole(*given, heads="v"), v)
    assert (u - v).abs().max() > 1e-6


def test_only_the_length_of_the_interval_is_seen(whole, given):
    z, t, r, *rest = given
    u = whole(z, t, r, *rest)
    torch.testing.assert_close(whole(z, t - 0.125, r - 0.125, *rest), u, rtol=1e-10, atol=0)
    assert (whole(z, t, r - 0.125, *rest) - u).abs().max() > 1e-6


@pytest.mark.parametrize("which", range(3, 7))
def test_every_condition_is_seen_by_both_heads(whole, given, which):
    """Label, scale, start and end of the interval."""
    before = whole(*given, heads="uv")
    given[which] = (given[which] + 1) % 6 if which == 3 else given[which] + 0.2
    for a, b in zip(whole(*given, heads="uv"), before, strict=True):
        assert (a - b).abs().max() > 1e-6


def test_u_does_not_need_the_head_of_v(whole, given):
    trunk = build(compute_dtype="float64", v_heads=False)
    trunk.load_state_dict({n: a for n, a in whole.state_dict().items() if not n.startswith("v_heads.")})
    torch.testing.assert_close(trunk(*given), whole(*given), rtol=1e-10, atol=0)


def test_rotary_tables_are_not_in_the_state_dict(whole):
    assert not {"cos", "sin"} & set(whole.state_dict())
    assert whole.cos.dtype == torch.float64 and whole.cos.shape == (10 + 16, 4)


def test_rotation_is_the_product_of_complex_numbers():
    x = normal(2, 3, 7, 8)
    cos, sin = (torch.from_numpy(a) for a in imf_dit.rotary_table(7, 8))
    turned = imf_dit.rotate(x, cos, sin)
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.complex(cos, sin)
    torch.testing.assert_close(torch.complex(turned[..., 0::2], turned[..., 1::2]), pairs, rtol=1e-12, atol=0)


def test_rotated_products_depend_on_the_distance_of_tokens_alone():
    cos, sin = (torch.from_numpy(a) for a in imf_dit.rotary_table(9, 8))
    q, k = (imf_dit.rotate(a.expand(1, 1, 9, 8), cos, sin)[0, 0] for a in normal(2, 8))
    products = (q @ k.T).numpy()
    for distance in range(-3, 4):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-10)


@pytest.mark.parametrize("change", [{"patch_size": 3}, {"num_heads": 3}, {"num_heads": 16}, {"head_depth": 3}])
def test_sizes_that_do_not_fit(change):
    with pytest.raises(ValueError, match="multiple"):
        build(**change)
