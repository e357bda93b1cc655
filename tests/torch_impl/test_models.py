"""The DiT: layouts, initial state, dtypes and errors.  What it computes is the parity suite's matter."""

import pytest
import torch

from configs import digits
from meanflow import tables
from torch_impl.models import layers
from torch_impl.models.dit import DiT
from torch_impl.step import build_net

SIZES = {"input_size": 8, "channels": 3, "num_classes": 5, "patch_size": 2, "depth": 1, "width": 16, "num_heads": 2}


def inputs(dtype=torch.float32):
    y = torch.tensor([0, 5])
    return torch.ones(2, 3, 8, 8, dtype=dtype), torch.tensor([0.5, 1.0], dtype=dtype), torch.zeros(2, dtype=dtype), y


def test_the_output_is_zero_at_initialisation():
    config = digits.get_config()
    config.model.update(SIZES)
    assert not build_net(config)(*inputs()).any()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(dtype, expected):
    config = digits.get_config()
    config.model.update(SIZES | {"compute_dtype": dtype})
    net, output = build_net(config), getattr(torch, expected)
    assert {p.dtype for p in net.parameters()} == {output}
    assert net(*inputs(output)).dtype == output


def test_a_fresh_network_is_a_function_of_the_seed():
    config = digits.get_config()
    config.model.update(SIZES)
    first, same = (build_net(config).state_dict() for _ in range(2))
    config.seed = 1
    other = build_net(config).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("change", [{"patch_size": 3}, {"num_heads": 3}, {"width": 18, "num_heads": 2}])
def test_sizes_that_do_not_divide(change):
    with pytest.raises(ValueError, match="multiple"):
        DiT(**SIZES | change)


def test_unpatchify_puts_channels_fastest_and_rows_first():
    patch, channels, grid = 2, 3, 2
    image = torch.arange(channels * 16).reshape(1, channels, 4, 4)
    tokens = image.reshape(1, channels, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
    tokens = tokens.reshape(1, grid * grid, patch * patch * channels)
    assert torch.equal(layers.unpatchify(tokens, channels), image)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gelu_compiled(backend):
    """Value, gradient and tangent are those of PyTorch's own, far from zero too."""

    def official(x):
        return torch.nn.functional.gelu(x, approximate="tanh")

    x = torch.cat([torch.linspace(-9, 9, 99, dtype=torch.float64), torch.tensor([-1e4, 1e4], dtype=torch.float64)])
    compiled = torch.compile(layers.gelu, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), official(x), rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    found, expected = (torch.autograd.grad(gelu(x).sum(), x)[0] for gelu in (compiled, official))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    both = torch.compile(lambda x: torch.func.jvp(layers.gelu, (x,), (x,)), backend=backend, fullgraph=True)
    torch.testing.assert_close(both(x.detach())[1], (x * expected).detach(), rtol=1e-12, atol=1e-12)


def test_layer_norm():
    x = torch.randn(2, 3, 64, dtype=torch.float64) * 3 + 5
    y = layers.layer_norm(x)
    assert float(y.mean(-1).abs().max()) < 1e-12
    assert float((y.square().mean(-1) - 1).abs().max()) < 1e-6
    assert layers.layer_norm(x.bfloat16()).dtype == torch.float32


def test_time_features_are_cosines_then_sines():
    features = layers.timestep_features(torch.tensor([0.5], dtype=torch.float64))[0]
    assert float(features[0]) == pytest.approx(float(torch.cos(torch.tensor(0.5, dtype=torch.float64))))
    assert float(features[128]) == pytest.approx(float(torch.sin(torch.tensor(0.5, dtype=torch.float64))))
    slowest = 0.5 * 10_000 ** (-127 / 128)
    assert float(features[255]) == pytest.approx(slowest, rel=1e-6)


def test_the_position_table_has_the_column_first():
    table = tables.position_table(3, 8).reshape(3, 3, 8)
    assert (table[:, 1, :4] == table[0, 1, :4]).all() and (table[1, :, 4:] == table[1, 0, 4:]).all()
    assert (table[0, 0] == [0, 0, 1, 1, 0, 0, 1, 1]).all()
