"""Attention by the package jvp_flash_attention, where a stand-in of its function checks what it is given."""

import importlib
import importlib.util
import sys

import make_draws
import pytest
import tiny
import torch

from configs import digits
from meanflow.errors import UserError
from torch_impl.methods import METHODS
from torch_impl.models import flash
from torch_impl.models.attention import attend, check_kernels
from torch_impl.step import build_net

WIDTHS = (64, 72, 80, 16)  # of heads: the first is the package's, of XL and of H, and one below the kernel's least


class StandIn:
    """The package's class, with plain attention; it asserts what the kernel takes for granted."""

    calls = 0

    @classmethod
    def forward(cls, q, k, v, q_t, k_t, v_t, *, attn_mask, sm_scale, USE_TMA, verify_attn_mask):
        tokens, width = q.shape[2:]
        assert width in (32, 64, 128, 256) and tokens % 32 == 0
        assert all(a.is_contiguous() and a.shape == q.shape and a.dtype == q.dtype for a in (q, k, v, q_t, k_t, v_t))
        assert not USE_TMA and not verify_attn_mask
        bias = torch.zeros(())
        if attn_mask is not None:
            assert attn_mask.shape == (*q.shape[:2], tokens, tokens) and attn_mask.dtype == torch.bool
            bias = torch.where(attn_mask, 0.0, -torch.inf)

        cls.calls += 1
        weights = torch.softmax(q @ k.mT * sm_scale + bias, dim=-1)
        rates = weights * (q_t @ k.mT + q @ k_t.mT) * sm_scale
        rates = rates - weights * rates.sum(-1, keepdim=True)
        return (weights @ v).detach(), ((rates @ v + weights @ v_t).detach(), None, None)


@pytest.fixture
def stand_in(monkeypatch):
    """Put the stand-in for the package, and return it."""
    monkeypatch.setattr(flash, "load", lambda: StandIn)
    monkeypatch.setattr(StandIn, "calls", 0)
    return StandIn


def heads(dim, tokens, dtype=torch.float64, device="cpu"):
    """Return q, k, v and their tangents [b heads n d] as a network has them: not contiguous."""
    generator = torch.Generator().manual_seed(dim + tokens)
    drawn = torch.randn(6, 2, tokens, 3, dim, generator=generator, dtype=torch.float64)
    return [a.transpose(1, 2) for a in drawn.to(device, dtype)]


def dual(kernel, a):
    with torch.no_grad():
        return torch.func.jvp(lambda *qkv: attend(*qkv, kernel), tuple(a[:3]), tuple(a[3:]))


@pytest.mark.parametrize("tokens", [32, 64, 16, 69])
@pytest.mark.parametrize("dim", WIDTHS)
def test_value_and_tangent_are_those_of_plain_attention(stand_in, dim, tokens):
    a = heads(dim, tokens)
    for found, expected in zip(dual("flash", a), dual("plain", a), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert stand_in.calls == 1


def test_what_has_no_tangent_is_constant(stand_in):
    q, k, v, q_t, *_ = heads(64, 32)
    found, expected = (
        torch.func.jvp(lambda q, kernel=kernel: attend(q, k, v, kernel), (q,), (q_t,)) for kernel in ("flash", "plain")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [72, 64])
def test_compiles_in_one_graph(stand_in, dim):
    a = heads(dim, 40)
    compiled = torch.compile(lambda a: dual("flash", a), backend="aot_eager", fullgraph=True, dynamic=False)
    for found, expected in zip(compiled(a), dual("plain", a), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert stand_in.calls == 1


def test_to_ask_it_for_a_gradient_is_an_error(stand_in):
    q, k, v, *tangents = heads(64, 32)
    q.requires_grad_()
    _, tangent = torch.func.jvp(lambda *a: attend(*a, "flash"), (q, k, v), tuple(tangents))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        tangent.sum().backward()


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize(("model", "method"), [("dit", "meanflow"), ("imf_dit", "improved"), ("dmf_dit", "decoupled")])
def test_the_gradients_of_a_loss_are_those_with_plain_attention(stand_in, float64, model, method, attention):
    """None passes through the kernel, which would lose it."""
    expected, found = (gradients(model, method, attention, kernel) for kernel in ("plain", "flash"))
    assert stand_in.calls >= 2  # once a block
    assert sum(bool(g.any()) for g in expected.values()) > 20
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def float64():
    """Draw in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(model, method, attention, kernel):
    """Return the gradients {name: tensor} of a loss, and the loss itself; heads have 72 channels."""
    config = tiny.compose({"model.name": model, "method.name": method})
    config.model.update(depth=2, width=144, num_heads=2, compute_dtype="float64")
    config.model.update({name: 1 for name in ("head_depth", "dmf_depth") if name in config.model})
    config.model.update(attention=attention, attention_jvp=kernel)
    changes = {"flow_fraction": 0.5, "omega": 0.5, "kappa": 0.25}
    config.method.update({name: value for name, value in changes.items() if name in config.method})
    net, generator = build_net(config), torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.normal_(0, 0.1, generator=generator)
    batch = {"image": torch.randn(8, 1, 8, 8, generator=generator), "label": torch.arange(8)}
    draws = make_draws.in_torch(config.method, batch["image"].shape)
    loss, aux = METHODS[method].loss(net, batch, draws, config.method)
    loss.backward()
    assert aux["du_dt"].any()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def test_without_the_package_training_does_not_start(monkeypatch):
    config = digits.get_config()
    config.model.attention_jvp = "flash"
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", None)
    with pytest.raises(UserError, match=r'jvp_flash_attention, which is not installed: pip .* -e "\.\[flash\]"'):
        check_kernels(config.model, torch.device("cuda"))


def test_without_a_cuda_device_training_does_not_start(stand_in):
    config = digits.get_config()
    check_kernels(config.model, torch.device("cpu"))
    config.model.attention_jvp = "flash"
    check_kernels(config.model, torch.device("cuda"))
    with pytest.raises(UserError, match="attention_jvp is flash, whose kernel needs a CUDA device, .* on the cpu"):
        check_kernels(config.model, torch.device("cpu"))


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_trainers_ask_before_they_read_or_write_anything(tiny, tmp_path, framework):
    config, workdir = tiny({"model.attention_jvp": "flash"}), tmp_path / "run"
    trainer = importlib.import_module(f"{framework}_impl.train")
    device = (torch.device("cpu"),) if framework == "torch" else ()
    message = "a CUDA device|not installed" if framework == "torch" else "flash, a kernel that PyTorch alone has"
    with pytest.raises(UserError, match=rf"config\.model\.attention_jvp is .*({message})"):
        trainer.train(config, workdir, *device)
    assert not workdir.exists()


REAL = torch.cuda.is_available() and importlib.util.find_spec("jvp_flash_attention") is not None


@pytest.mark.skipif(not REAL, reason="needs a CUDA device and the package jvp_flash_attention")
@pytest.mark.parametrize("tokens", [64, 69])
@pytest.mark.parametrize("dim", WIDTHS)
def test_the_kernel_itself(dim, tokens):
    """In bfloat16 it is no farther from float32 than plain attention is, but for a factor."""
    a = heads(dim, tokens, torch.bfloat16, "cuda")
    exact = dual("plain", [part.float() for part in a])
    for found, rounded, expected in zip(dual("flash", a), dual("plain", a), exact, strict=True):
        assert (found - expected).abs().max() < 4 * (rounded - expected).abs().max()
