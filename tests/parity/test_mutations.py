"""Tests of the tests: each mistake put into an implementation or a fixture is seen, and its case named.

Where PyTorch's implementation has the mistake, JAX's has none and would only compile: PyTorch's own with the mistake
undone stands in for it, as the cases without a mistake find both equal.
"""

import contextlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch

from jax_impl import step as jax_step
from jax_impl.methods import common as jax_common
from jax_impl.methods import decoupled as jax_decoupled
from jax_impl.methods import flow as jax_flow
from jax_impl.methods import improved as jax_improved
from jax_impl.methods import meanflow as jax_method
from jax_impl.methods import rectified as jax_rectified
from jax_impl.methods import reflow as jax_reflow
from jax_impl.methods import samplers as jax_samplers
from jax_impl.models import dit as jax_dit
from jax_impl.models import dmf_dit as jax_dmf_dit
from jax_impl.models import edm2 as jax_edm2
from jax_impl.models import imf_dit as jax_imf_dit
from jax_impl.models import unet as jax_unet
from meanflow.sampling import steps
from meanflow.weights import initial
from parity import check
from parity.adapters.frameworks import FRAMEWORKS
from parity.cases import objectives, settings
from torch_impl import step as torch_step
from torch_impl.methods import common as torch_common
from torch_impl.methods import decoupled as torch_decoupled
from torch_impl.methods import flow as torch_flow
from torch_impl.methods import improved as torch_improved
from torch_impl.methods import meanflow as torch_method
from torch_impl.methods import rectified as torch_rectified
from torch_impl.methods import reflow as torch_reflow
from torch_impl.methods import samplers as torch_samplers
from torch_impl.models import dit as torch_dit
from torch_impl.models import dmf_dit as torch_dmf_dit
from torch_impl.models import edm2 as torch_edm2
from torch_impl.models import imf_dit as torch_imf_dit
from torch_impl.models import unet as torch_unet

METHODS = {"jax": jax_method, "torch": torch_method}
COMMON = {"jax": jax_common, "torch": torch_common}
STEPS = {"jax": jax_step, "torch": torch_step}


def expect_failure(capsys, only, case, *flags):
    """Run the command; it must fail and name the case."""
    assert check.main(["--only", only, "--jobs=1", *flags]) == 1
    out = capsys.readouterr().out
    assert f"FAILED: {case} " in out, out
    return out


class Mutation:
    """Sets attributes as pytest's monkeypatch does, and can undo that for a while."""

    def __init__(self):
        self._changes = []  # (where, name, original, mutated)

    def setattr(self, where, name, value):
        self._changes.append((where, name, getattr(where, name), value))
        setattr(where, name, value)

    def undo(self):
        for where, name, original, _ in reversed(self._changes):
            setattr(where, name, original)
        self._changes = []

    @contextlib.contextmanager
    def undone(self):
        changes = self._changes
        self.undo()
        yield
        for where, name, _, mutated in changes:
            self.setattr(where, name, mutated)


class StandIn:
    """PyTorch's adapter, without the mutation."""

    def __init__(self, mutation):
        self._mutation = mutation

    def __getattr__(self, name):
        def call(*args, **kwargs):
            with self._mutation.undone():
                return getattr(FRAMEWORKS["torch"], name)(*args, **kwargs)

        return FRAMEWORKS["torch"].full_precision if name == "full_precision" else call


@pytest.fixture
def mutate():
    """Return the `Mutation` of one test."""
    mutation = Mutation()
    yield mutation
    mutation.undo()


@pytest.fixture(params=["jax", "torch"])
def framework(request, mutate, monkeypatch):
    """Which implementation has the mistake."""
    if request.param == "torch":
        monkeypatch.setitem(FRAMEWORKS, "jax", StandIn(mutate))
    return request.param


def test_unchanged_passes():
    assert check.main(["--only", "float64/(jvp|difference|forward)$|golden/sit_torch/time", "--jobs=1"]) == 0


def test_flipped_sign_of_the_jvp(framework, mutate, capsys):
    common = COMMON[framework]
    original = common.total_derivative
    mutate.setattr(common, "total_derivative", lambda *args: -original(*args))
    out = expect_failure(capsys, "float64/(jvp|difference)", "float64/jvp")
    assert f"FAILED: float64/difference {framework} du_dt" in out


def test_dropped_interval(framework, mutate, capsys):
    mutate.setattr(METHODS[framework], "interval", lambda t, r, cfg: t * 0 + 1)
    out = expect_failure(capsys, "float64/coin/noguid", "float64/coin/noguid")
    assert f"{framework} target (formula)" in out and "jax-torch target" in out
    assert f"FAILED: float64/coin/noguid {framework} aux (reference)" in out
    assert f"FAILED: float64/coin/noguid {framework} grad (reference)" in out


def swap(mutate, framework):
    """Let a network embed t where t - r belongs, and the other way round."""
    cls, call = {"jax": (jax_dit.DiT, "__call__"), "torch": (torch_dit.DiT, "forward")}[framework]
    original = getattr(cls, call)

    def swapped(self, z, t, r, y, **options):
        self.t_embedder, self.r_embedder = self.r_embedder, self.t_embedder
        u = original(self, z, t, r, y, **options)
        self.t_embedder, self.r_embedder = self.r_embedder, self.t_embedder
        return u

    mutate.setattr(cls, call, swapped)


def test_swapped_embeddings(framework, mutate, capsys):
    swap(mutate, framework)
    expect_failure(capsys, "float64/forward", "float64/forward")


def test_the_same_mistake_in_both_frameworks_is_seen_by_the_fixtures(mutate, capsys):
    swap(mutate, "jax")
    swap(mutate, "torch")
    out = expect_failure(capsys, "golden/meanflow_dit_flax/fwd", "golden/meanflow_dit_flax/fwd jax")
    assert "FAILED: golden/meanflow_dit_flax/fwd torch u" in out


@pytest.mark.parametrize(
    ("pattern", "other", "quantity"),
    [
        ("blocks.*.mlp.*.weight", initial.xavier(1.1), "std"),
        ("blocks.*.attn.*.weight", lambda rng, shape: initial.normal((2 / sum(shape)) ** 0.5)(rng, shape), "range"),
        ("final_layer.linear.weight", initial.normal(1e-3), "mean"),
    ],
)
def test_another_distribution_of_initial_weights(pattern, other, quantity, monkeypatch, capsys):
    monkeypatch.setitem(initial.NETWORKS, "dit", {**initial.NETWORKS["dit"], pattern: other})
    case = "golden/sit_torch/init"
    out = expect_failure(capsys, case, f"{case} jax")
    for framework in ("jax", "torch"):
        assert f"FAILED: {case} {framework} initial {quantity} " in out


def test_sines_and_cosines_that_keep_their_places_in_both_frameworks(mutate, capsys):
    for module, roll in ((jax_unet, jnp.roll), (torch_unet, torch.roll)):
        original = module.UNet.embed_time

        def cosines_first(self, t, original=original, roll=roll):
            return roll(original(self, t), self.features // 2, -1)

        mutate.setattr(module.UNet, "embed_time", cosines_first)
    case = "golden/meanflow_unet_torch/fwd"
    out = expect_failure(capsys, case, f"{case} jax")
    assert f"FAILED: {case} jax u" in out and f"FAILED: {case} torch u" in out


def test_a_tangent_with_masks_of_its_own(framework, mutate, monkeypatch, capsys):
    monkeypatch.setitem(objectives.NETWORKS, "unet", settings.UNET | {"channel_mult": (1,)})
    common = COMMON[framework]
    original = common.total_derivative

    def other_masks(net, z, v, t, r, y, given, rows, tape):
        return original(net, z, v, t, r, y, given | {"dropout": ~given["dropout"]}, rows, tape)

    mutate.setattr(common, "total_derivative", other_masks)
    out = expect_failure(capsys, "float64/unet/difference", f"float64/unet/difference {framework}")
    assert "1 failed" in out


def test_a_second_time_that_is_not_cut_off(framework, mutate, capsys):
    method = METHODS[framework]
    original = method.sample_times

    def as_drawn(draws, cfg):
        second = ml_collections.ConfigDict(cfg)
        second.time_mean, second.time_std = (cfg.time_mean[1],) * 2, (cfg.time_std[1],) * 2
        (t, _), (r, _) = original(draws, cfg), original(draws._replace(times=draws.times[:, [1, 1]]), second)
        flow = COMMON[framework].is_flow(draws, cfg)
        return t, flow * t + ~flow * r

    mutate.setattr(method, "sample_times", as_drawn)
    case = "golden/meanflow_unet_torch/time/v1_default"
    out = expect_failure(capsys, case, f"{case} {framework}")
    assert f"FAILED: {case} {framework} r" in out and "1 failed" in out


IMPROVED = {"jax": jax_improved, "torch": torch_improved}
STOP = {"jax": jax.lax.stop_gradient, "torch": lambda a: a.detach()}


def test_rotary_positions_that_lose_the_tangent(framework, mutate, capsys):
    """As those of the official PyTorch code do: the fixture of its forward passes, that of its derivative does not."""
    module = {"jax": jax_imf_dit, "torch": torch_imf_dit}[framework]
    original = module.rotate
    mutate.setattr(module, "rotate", lambda x, cos, sin: original(STOP[framework](x), cos, sin))
    out = expect_failure(capsys, "golden/imf_dit_torch/(fwd|jvp)", f"golden/imf_dit_torch/jvp {framework}")
    assert f"FAILED: golden/imf_dit_torch/jvp {framework} 1 / distance of du_dt from du_dt_literal" in out
    assert "2 failed" in out


def test_the_velocity_of_the_path_as_the_tangent(framework, mutate, capsys):
    """In place of the predicted one: MeanFlow's own tangent."""
    method = IMPROVED[framework]
    original = method.guide

    def of_the_path(net, z, v, *args):
        return v, original(net, z, v, *args)[1]

    mutate.setattr(method, "guide", of_the_path)
    out = expect_failure(
        capsys, "golden/imf_dit_flax/loss/cfg_beta2", f"golden/imf_dit_flax/loss/cfg_beta2 {framework}"
    )
    assert f"FAILED: golden/imf_dit_flax/loss/cfg_beta2 {framework} du_dt" in out
    out = expect_failure(capsys, "float64/imf/split", "float64/imf/split")
    assert "FAILED: float64/imf/split jax-torch v_c:" in out
    assert f"FAILED: float64/imf/split {framework} compound (formula)" in out


def test_guidance_that_forgets_the_interval(framework, mutate, capsys):
    method = IMPROVED[framework]
    original = method.guide

    def everywhere(net, z, v, t, y, given, *args):
        whole = given | {"t_min": 0 * given["t_min"], "t_max": 0 * given["t_max"] + 1}
        return original(net, z, v, t, y, whole, *args)

    mutate.setattr(method, "guide", everywhere)
    out = expect_failure(capsys, "float64/imf/split", "float64/imf/split")
    assert "FAILED: float64/imf/split jax-torch v_g:" in out
    assert f"FAILED: float64/imf/split {framework} v_g (formula)" in out


DECOUPLED = {"jax": jax_decoupled, "torch": torch_decoupled}
FLOW = {"jax": jax_flow, "torch": torch_flow}
SAMPLERS = {"jax": jax_samplers, "torch": torch_samplers}


def test_blocks_that_are_told_the_other_time(framework, mutate, capsys):
    """The first blocks r and the last t; at r = t nothing is seen."""
    network = {"jax": jax_dmf_dit, "torch": torch_dmf_dit}[framework].DMFDiT
    name = {"jax": "__call__", "torch": "forward"}[framework]
    original = getattr(network, name)
    mutate.setattr(network, name, lambda self, z, t, r, y, **options: original(self, z, r, t, y, **options))
    out = expect_failure(capsys, "golden/dmf_dmft_torch/fwd", f"golden/dmf_dmft_torch/fwd {framework}")
    assert "1 failed" in out
    out = expect_failure(capsys, "float64/dmf/forward", "float64/dmf/forward")
    assert "FAILED: float64/dmf/forward jax-torch u:" in out and "1 failed" in out


def test_log_variances_that_are_paired_with_every_row(framework, mutate, capsys):
    """The official accident where each was to have its own row; and the other way round."""
    method = DECOUPLED[framework]
    original = method.log_loss

    def other(err, log_variance, cfg):
        second = ml_collections.ConfigDict(dict(cfg.items()))
        second.log_variance_pairs = {"row": "all", "all": "row"}[cfg.log_variance_pairs]
        result = original(err, log_variance, second)
        return result.mean(1) if result.ndim == 2 else result[:, None] + 0 * result

    mutate.setattr(method, "log_loss", other)
    out = expect_failure(capsys, "float64/dmf/mg", "float64/dmf/mg")
    assert f"FAILED: float64/dmf/mg {framework} row_loss (formula)" in out
    assert f"FAILED: float64/dmf/mg {framework} grad (formula)" in out
    case = "golden/dmf_dmft_torch/loss/default"
    out = expect_failure(capsys, case, f"{case} {framework}")
    assert f"FAILED: {case} {framework} mf_p_loss" in out


def test_a_teacher_that_guides_everywhere(framework, mutate, capsys):
    method = DECOUPLED[framework]
    original = method.distill

    def everywhere(teacher, states, times, y, cfg):
        whole = ml_collections.ConfigDict(dict(cfg.items()))
        whole.update(guidance_start=0.0, guidance_end=1.0)
        return original(teacher, states, times, y, whole)

    mutate.setattr(method, "distill", everywhere)
    case = "golden/dmf_dmft_torch/loss/distill"
    out = expect_failure(capsys, case, f"{case} {framework}")
    assert f"FAILED: {case} {framework} v_tgt_fm" in out and f"FAILED: {case} {framework} v_fm" not in out


def test_features_that_are_not_normed(framework, mutate, capsys):
    mutate.setattr(FLOW[framework], "unit", lambda a, eps=0: a)
    case = "golden/dmf_sit_torch/loss/repa"
    out = expect_failure(capsys, case, f"{case} {framework}")
    assert f"FAILED: {case} {framework} proj_loss" in out and f"FAILED: {case} {framework} v_fm" not in out
    out = expect_failure(capsys, "float64/dmf_sit/repa", "float64/dmf_sit/repa")
    assert f"FAILED: float64/dmf_sit/repa {framework} grad (formula)" in out


def change_steps(framework, mutate, change):
    """Let the samplers of one framework take changed steps."""
    for kind in ("flow_map_steps", "flow_steps"):
        original = getattr(SAMPLERS[framework], kind)
        mutate.setattr(SAMPLERS[framework], kind, lambda cfg, original=original: [*map(change, original(cfg))])


def test_fresh_noise_of_another_size(framework, mutate, capsys):
    """The official ctm's where the exact one was asked for; where the official one was, less of the state kept."""
    change_steps(framework, mutate, lambda step: step._replace(add=1 - step.keep))
    expect_failure(capsys, "float64/dmf/sample/ctm$", "float64/dmf/sample/ctm")
    mutate.undo()
    change_steps(framework, mutate, lambda step: step._replace(keep=0.9 * step.keep, move=0.9 * step.move))
    case = "golden/dmf_dmft_torch/sample/ctm_n2_s1.0"
    expect_failure(capsys, f"{case}$", f"{case} {framework}")


def test_shared_coefficients_that_are_wrong_in_both_frameworks(mutate, capsys):
    """The frameworks agree then, but not with the official code."""
    original = steps.renoise
    mutate.setattr(steps, "renoise", lambda *args: (0.9 * original(*args)[0], original(*args)[1]))
    case = "golden/dmf_dmft_torch/sample/ctm_n2_s1.0"
    out = expect_failure(capsys, f"{case}$", f"{case} jax")
    assert f"FAILED: {case} torch" in out


def test_a_guided_step_outside_of_the_interval(framework, mutate, capsys):
    change_steps(framework, mutate, lambda step: step._replace(guided=True))
    for case in ("golden/dmf_dmft_torch/sample/restart_n4_s1.0_cfg", "golden/dmf_sit_torch/sample/sde_n4_cfg"):
        expect_failure(capsys, f"{case}$", f"{case} {framework}")


EDM2 = {"jax": jax_edm2, "torch": torch_edm2}
RECTIFIED = {"jax": jax_rectified, "torch": torch_rectified}
REFLOW = {"jax": jax_reflow, "torch": torch_reflow}
STUDENT, COUPLINGS = "golden/remeanflow_edm2_torch", "golden/edm2_reflow_torch"


def latest(framework, mutate):
    """Let the network embed no time beyond 80/81, nor that one's derivative."""
    cls, where = EDM2[framework].UNet, {"jax": jnp.where, "torch": torch.where}[framework]
    original = cls.embed_times
    mutate.setattr(
        cls, "embed_times", lambda self, t, r, tape=None: original(self, where(t >= 80 / 81, 80 / 81, t), r, tape)
    )


def test_a_largest_time_without_a_derivative(framework, mutate, capsys):
    latest(framework, mutate)
    out = expect_failure(capsys, f"{STUDENT}/jvp", f"{STUDENT}/jvp {framework}")
    assert f"FAILED: {STUDENT}/jvp {framework} du_dt" in out and f"FAILED: {STUDENT}/jvp {framework} u:" not in out


def test_times_that_change_places(framework, mutate, capsys):
    cls = EDM2[framework].UNet
    original = cls.embed_times
    mutate.setattr(cls, "embed_times", lambda self, t, r, tape=None: original(self, r, t, tape))
    out = expect_failure(capsys, f"{STUDENT}/fwd", f"{STUDENT}/fwd {framework}")
    assert f"FAILED: {STUDENT}/fwd {framework} u_nolabel" in out


def test_weights_that_are_normalised_only_in_the_forward(framework, mutate, capsys):
    mutate.setattr(STEPS[framework], "PROJECTIONS", {})
    out = expect_failure(capsys, f"{COUPLINGS}/fwd", f"{COUPLINGS}/fwd {framework}")
    assert f"FAILED: {COUPLINGS}/fwd {framework} D:" not in out
    assert f"FAILED: {COUPLINGS}/fwd {framework} out_conv_after_train" in out


def test_an_interval_that_stops_short_of_the_data(framework, mutate, capsys):
    """Without the rule that r is 0 where t > 0.8 and r < 0.4."""
    module = RECTIFIED[framework]

    class Module:
        """The array library, but `where` with a number as its second argument changes nothing."""

        def __getattr__(self, name):
            library = {"jax": jnp, "torch": torch}[framework]
            if name != "where":
                return getattr(library, name)
            return lambda mask, a, b: b if isinstance(a, int) else library.where(mask, a, b)

    mutate.setattr(module, {"jax": "jnp", "torch": "torch"}[framework], Module())
    case = f"{STUDENT}/time/re2_truncate"
    out = expect_failure(capsys, case, f"{case} {framework}")
    assert f"FAILED: {case} {framework} r" in out and f"FAILED: {case} {framework} t:" not in out


def test_uniform_times_that_are_clamped_too(framework, mutate, capsys):
    original = RECTIFIED[framework].sample_times

    def clamped(draws, cfg):
        return original(draws._replace(times=draws.times.clip(max=80 / 81)), cfg)

    mutate.setattr(RECTIFIED[framework], "sample_times", clamped)
    case = "float64/extreme/rectified_uniform"
    out = expect_failure(capsys, f"{case}$", case)
    assert f"FAILED: {case} {framework} t (formula)" in out and f"{framework} r (formula)" in out


def test_a_coin_that_shows_its_share_itself(framework, mutate, capsys):
    mutate.setattr(COMMON[framework], "is_flow", lambda draws, cfg: draws.coin <= cfg.flow_fraction)
    case = "float64/extreme/meanflow_one_row"
    assert f"FAILED: {case} {framework} r (formula)" in expect_failure(capsys, f"{case}$", case)


def test_an_interval_longer_than_1(framework, mutate, capsys):
    mutate.setattr(METHODS[framework], "interval", lambda t, r, cfg: t - r)
    case = "float64/extreme/meanflow_clipped"
    out = expect_failure(capsys, f"{case}$", case)
    assert f"FAILED: {case} {framework} target (formula)" in out and f"{framework} du_dt (formula)" not in out


def test_far_couplings_that_are_learnt(framework, mutate, capsys):
    near = RECTIFIED[framework].is_near
    mutate.setattr(RECTIFIED[framework], "is_near", lambda x, noise, cfg: near(x, noise, cfg) | True)
    out = expect_failure(capsys, "float64/dit/remeanflow_clip", "float64/dit/remeanflow_clip")
    assert f"{framework} weight (formula)" in out and f"{framework} grad (formula)" in out


def test_guidance_towards_the_guide(framework, mutate, capsys):
    module = REFLOW[framework]
    original = module.couple
    mutate.setattr(
        module,
        "couple",
        lambda net, noise, y, grid, guidance, *guide: original(net, noise, y, grid, 1 - guidance, *guide),
    )
    expect_failure(capsys, f"{COUPLINGS}/sample/heun2$", f"{COUPLINGS}/sample/heun2 {framework}")


@pytest.mark.parametrize(
    ("name", "key", "case"),
    [
        ("dmf_dmft_torch", "out/tsteps/n7_s3.0", "golden/dmf_dmft_torch/tsteps"),
        ("dmf_dmft_torch", "out/time/cosine/t_fm", "golden/dmf_dmft_torch/time/cosine"),
        ("dmf_sit_torch", "out/score/cosine", "golden/dmf_sit_torch/score"),
        ("dmf_sit_torch", "out/diffusion/linear_elbo", "golden/dmf_sit_torch/diffusion"),
        ("dmf_sit_torch", "out/repa_loss", "golden/dmf_sit_torch/repa_loss"),
        ("dmf_dmft_qknorm_torch", "out/fwd/logvar", "golden/dmf_dmft_qknorm_torch/fwd"),
        ("ema_lr_optim", "out/lr/imf_warmup_cosine", "golden/ema_lr_optim/lr/imf_warmup_cosine"),
        ("ema_lr_optim", "out/ema/dmf_0.99", "golden/ema_lr_optim/ema"),
        ("ema_lr_optim", "out/opt/grad_norms", "golden/ema_lr_optim/opt"),
        ("sit_torch", "out/time/uniform/r", "golden/sit_torch/time/uniform"),
        ("meanflow_unet_torch", "out/time/v1_default/r", "golden/meanflow_unet_torch/time/v1_default"),
        ("meanflow_unet_torch", "out/ema/decay_0.9996", "golden/meanflow_unet_torch/ema"),
        ("imf_dit_flax", "out/time/omega_beta2.0", "golden/imf_dit_flax/time/omega_beta2.0"),
        ("imf_dit_torch", "out/rope_imag", "golden/imf_dit_torch/rope_imag"),
        ("meanflow_dit_flax", "out/pos_embed", "golden/meanflow_dit_flax/pos_embed"),
        ("meanflow_dit_flax", "out/fwd/t_freq", "golden/meanflow_dit_flax/fwd"),
        ("remeanflow_edm2_torch", "out/timeemb/loss", "golden/remeanflow_edm2_torch/timeemb"),
        ("remeanflow_edm2_torch", "out/time/uniform/r", "golden/remeanflow_edm2_torch/time/uniform"),
        ("edm2_reflow_torch", "out/tsteps/heun4", "golden/edm2_reflow_torch/tsteps"),
        ("edm2_reflow_torch", "out/fwd/logvar", "golden/edm2_reflow_torch/fwd"),
    ],
)
def test_one_percent_more_in_a_fixture(name, key, case, tmp_path, capsys, mutate, monkeypatch):
    monkeypatch.setitem(FRAMEWORKS, "jax", StandIn(mutate))
    with np.load(check.GOLDEN / f"{name}.npz") as file:
        arrays = {k: file[k] * (1.01 if k.startswith(key) else 1) if k != "config" else file[k] for k in file.files}
    np.savez(tmp_path / f"{name}.npz", **arrays)
    expect_failure(capsys, f"{case}$", case, "--golden", str(tmp_path))


def test_wrong_ema_decay(framework, mutate, capsys):
    step = STEPS[framework]
    original = step.apply_gradients

    def wrong(*args):
        c = ml_collections.ConfigDict(args[-1])
        c.ema_decays = tuple(d**2 for d in c.ema_decays)
        return original(*args[:-1], c)

    mutate.setattr(step, "apply_gradients", wrong)
    out = expect_failure(capsys, "golden/ema_lr_optim/ema", "golden/ema_lr_optim/ema")
    assert f"FAILED: golden/ema_lr_optim/ema {framework} " in out


def test_an_ema_that_never_waits(framework, mutate, capsys):
    step = STEPS[framework]
    original = step.apply_gradients

    def every_step(*args):
        c = ml_collections.ConfigDict(args[-1])
        c.ema_every = 1
        return original(*args[:-1], c)

    mutate.setattr(step, "apply_gradients", every_step)
    out = expect_failure(capsys, "golden/meanflow_unet_torch/ema", "golden/meanflow_unet_torch/ema")
    assert f"FAILED: golden/meanflow_unet_torch/ema {framework} " in out
