"""The transformer of decoupled MeanFlow, what flow models add to the DiT, and the kernels of attention."""

import numpy as np
import pytest
import tiny
import torch

from torch_impl.methods import common
from torch_impl.models import attention
from torch_impl.models.layers import timestep_features
from torch_impl.step import build_net

SIZES = {
    "name": "dmf_dit", "input_size": 8, "channels": 3, "num_classes": 5, "patch_size": 4, "depth": 2, "width": 16,
    "num_heads": 2,
}  # fmt: skip
OWN = {"dmf_dit": {"dmf_depth": 1}, "imf_dit": {"head_depth": 1}}  # options of one network alone
FLOW = {"name": "dit", "interval_embedder": False}
REPA = FLOW | {"repa_dims": (6, 7), "repa_depth": 1, "projector_dim": 8}
ROWS = common.Rows(groups=1, flow=0, jvp=2)


def fresh(**changes):
    """Return a network of the tiny sizes, in float64."""
    config = tiny.of_network(
        SIZES | {"compute_dtype": "float64"} | OWN.get(changes.get("name", "dmf_dit"), {}) | changes
    )
    return build_net(config)


def build(**changes):
    """Return a network whose parameters are zero nowhere: those of a name are the same in every network."""
    net = fresh(**changes).requires_grad_(False)
    for name, p in net.named_parameters():
        p.copy_(torch.from_numpy(0.3 * np.random.RandomState(sum(map(ord, name))).randn(*p.shape)))
    return net


def layer_of_attention(qk_norm):
    """Return a layer of random weights without biases; norms, if any, have scales of 1."""
    net, rng = attention.Attention(16, 2, qk_norm=qk_norm, dtype=torch.float64).double(), np.random.RandomState(1)
    for name, p in net.requires_grad_(False).named_parameters():
        if not name.endswith("bias"):
            p.copy_(torch.from_numpy(0.3 * rng.randn(*p.shape)) if name.endswith("weight") else torch.ones(p.shape))
    return net


def changed(net, begins, factor):
    """Return the network with parameters whose name begins so times a factor."""
    named = [p for name, p in net.named_parameters() if name.startswith(begins)]
    assert named
    for p in named:
        p.data.mul_(factor)
    return net


def inputs(dtype=torch.float64):
    z = torch.from_numpy(np.random.RandomState(0).randn(2, 3, 8, 8)).to(dtype)
    t, r = torch.tensor([[0.5, 1.0], [0.25, 0.5]], dtype=dtype)
    return z, t, r, torch.tensor([0, 5])


def distance(a, b):
    return float((a - b).abs().max())


def test_at_r_equal_to_t_it_is_the_flow_model_of_the_same_weights():
    z, t, r, y = inputs()
    u, v = build(), build(**FLOW)
    torch.testing.assert_close(u(z, t, t, y), v(z, t, t, y), rtol=0, atol=1e-12)
    assert distance(u(z, t, r, y), v(z, t, r, y)) > 1e-3


def test_a_flow_model_ignores_r_and_one_of_meanflow_does_not():
    z, t, r, y = inputs()
    for interval_embedder in (False, True):
        net = build(**FLOW | {"interval_embedder": interval_embedder})
        assert (distance(net(z, t, r, y), net(z, t, t, y)) > 1e-3) == interval_embedder


@pytest.mark.parametrize("dmf_depth", [0, 1, 2])
def test_early_blocks_see_t_and_late_ones_and_the_last_layer_r(dmf_depth):
    """Of two blocks and the last layer, all but one are told a constant."""
    z, t, r, y = inputs()
    layers = ["blocks.0.adaLN", "blocks.1.adaLN", "final_layer.adaLN"]
    for i, name in enumerate(layers):
        others = tuple(f"{other}_modulation.1.weight" for other in layers if other != name)
        net = changed(build(dmf_depth=dmf_depth), others, 0)
        u = net(z, t, r, y)
        sees_t, sees_r = (distance(u, net(z, *times, y)) > 1e-6 for times in ((t - 0.1, r), (t, r - 0.1)))
        assert (sees_t, sees_r) == (i < dmf_depth, i >= dmf_depth), name
        assert distance(u, net(z, t, r, (y - 1) % 6)) > 1e-6


def test_new_are_the_parameters_of_the_log_variance_alone():
    of_map, of_flow, of_meanflow = (set(fresh(**changes).state_dict()) for changes in ({}, FLOW, {"name": "dit"}))
    assert of_map - of_flow == {"logvar_linear.weight", "logvar_linear.bias"} and of_flow < of_map
    assert {name.split(".")[0] for name in of_meanflow ^ of_flow} == {"r_embedder"}


def test_the_log_variance_is_zero_at_first_and_then_a_function_of_both_times():
    _, t, r, _ = inputs()
    assert not fresh().log_variance(t, r).any()
    net = build()
    features = torch.cat([timestep_features(time, 128) for time in (t, r)], dim=1)
    weight, bias = net.logvar_linear.weight, net.logvar_linear.bias
    torch.testing.assert_close(net.log_variance(t, r), (features @ weight.T + bias)[:, 0])
    assert distance(net.log_variance(t, r), net.log_variance(t + 0.1, r)) > 1e-3
    assert distance(net.log_variance(t, r), net.log_variance(t, r + 0.1)) > 1e-3


def test_a_depth_beyond_the_blocks():
    with pytest.raises(ValueError, match="dmf_depth 3 is more than the 2 blocks"):
        fresh(dmf_depth=3)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.float32), ("float64", torch.float64)]
)
def test_dtypes(dtype, expected):
    net, flow = fresh(qk_norm=True, compute_dtype=dtype), fresh(**REPA, compute_dtype=dtype)
    assert {p.dtype for p in [*net.parameters(), *flow.parameters()]} == {expected}
    u, (v, features) = net(*inputs(expected)), flow(*inputs(expected), features=True)
    assert {a.dtype for a in (u, v, *features)} == {expected}


def test_normed_queries_and_keys_have_no_scale():
    """Up to the epsilon of the norm; those of values do, and so do those of a network without it."""
    x = torch.from_numpy(np.random.RandomState(0).randn(2, 5, 16))
    scales = torch.tensor([3.0, 0.5, 1.0]).repeat_interleave(16)[:, None]
    for qk_norm in (True, False):
        net = layer_of_attention(qk_norm)
        before = net(x)
        net.qkv.weight.mul_(scales)
        assert (distance(net(x), before) < 1e-4) == qk_norm
        net.qkv.weight.mul_(scales.flip(0))
        assert distance(net(x), before) > 1e-2


def test_scales_of_the_norm_are_learnt():
    x = torch.from_numpy(np.random.RandomState(0).randn(2, 5, 16))
    net = layer_of_attention(qk_norm=True)
    before = net(x)
    for norm in (net.q_norm, net.k_norm):
        norm.scale[0] = 5.0
        assert distance(net(x), before) > 1e-4
        norm.scale[0] = 1.0


def test_fused_attention_is_the_plain_one():
    """And so is its gradient, in float32."""
    q, k, v, weight = (torch.from_numpy(a).float() for a in np.random.RandomState(0).randn(4, 2, 3, 7, 8))
    found = []
    for kernel in ("plain", "fused"):
        given = [a.clone().requires_grad_() for a in (q, k, v)]
        out = attention.attend(*given, kernel)
        (out * weight).sum().backward()
        found.append([out.detach(), *(a.grad for a in given)])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-6)
    by_hand = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q, k) / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(found[1][0], by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dit", "dmf_dit", "imf_dit"])
def test_a_kernel_is_used_where_no_tangent_passes(name, monkeypatch):
    used = []
    for kernel, attend in attention.KERNELS.items():
        monkeypatch.setitem(attention.KERNELS, kernel, lambda *a, k=kernel, f=attend: used.append(k) or f(*a))
    net, told = build(name=name, attention="fused", compute_dtype="float32"), torch.ones(2)
    given = {"omega": told, "t_min": 0 * told, "t_max": told} if name == "imf_dit" else {}
    z, t, r, y = inputs(torch.float32)
    _, tape = common.average_velocity(net, z, t, r, y, given, ROWS)
    assert set(used) == {"fused"} and len(used) >= 2
    used.clear()
    common.total_derivative(net, z, z, t, r, y, given, ROWS, tape)
    assert set(used) == {"plain"} and len(used) >= 2


def test_a_fused_network_has_the_plain_derivative():
    (z, t, r, y), derivatives = inputs(torch.float32), []
    plain, fused = (build(attention=kernel, compute_dtype="float32") for kernel in ("plain", "fused"))
    for net in (plain, fused):
        _, tape = common.average_velocity(plain, z, t, r, y, {}, ROWS)
        derivatives.append(common.total_derivative(net, z, torch.ones_like(z), t, r, y, {}, ROWS, tape))
    assert torch.equal(derivatives[0], derivatives[1])
    assert float(derivatives[0].abs().max()) > 1e-3


def test_features_are_projections_of_the_tokens_after_some_blocks():
    z, t, r, y = inputs()
    u, features = build(**REPA)(z, t, r, y, features=True)
    assert [a.shape for a in features] == [(2, 4, 6), (2, 4, 7)]
    assert torch.equal(u, build(**REPA)(z, t, r, y))
    for block, seen in (("blocks.0.", True), ("blocks.1.", False)):
        v, others = changed(build(**REPA), block, 1.5)(z, t, r, y, features=True)
        assert distance(v, u) > 1e-6
        assert all((distance(a, b) > 1e-6) == seen for a, b in zip(others, features, strict=True))
    _, others = changed(build(**REPA), "projectors.1.", 1.5)(z, t, r, y, features=True)
    assert distance(others[0], features[0]) == 0 and distance(others[1], features[1]) > 1e-6
    _, others = build(**REPA | {"repa_depth": 2})(z, t, r, y, features=True)
    assert all(distance(a, b) > 1e-6 for a, b in zip(others, features, strict=True))
