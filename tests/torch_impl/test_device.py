"""A step and a sampler on a device that is not the CPU: `meta`, whose tensors have no values and cannot be read.

No operation mixes tensors of the host with those of the device: on a GPU that is an error, or a copy that waits.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meanflow.config.stages import stages
from meanflow.data import draws
from torch_impl import step, weights
from torch_impl.measures import FRACTION
from torch_impl.sample import make_sampler

META = torch.device("meta")
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}  # which are meant to join two devices
UNET = {
    "model.name": "unet", "model.width": 4, "model.channel_mult": (1, 2), "model.num_blocks": 1,
    "model.attn_resolutions": (4,), "model.dropout": 0.1, "model.augment_dim": 6,
}  # fmt: skip
CASES = {
    "meanflow": (None, {}),
    "meanflow_front": (None, {"method.flow_rows": "front", "method.label_drop": "front"}),
    "meanflow_coin": (None, {"method.flow_rows": "coin", "train.clip_norm": 0.5, "train.accumulate": 2}),
    "meanflow_bfloat16": (None, {"model.compute_dtype": "bfloat16", "model.qk_norm": True, "train.remat": True}),
    "meanflow_unet": (None, UNET),
    "meanflow_unet_fourier": (None, UNET | {
        "model.embedding_type": "fourier", "model.encoder_type": "residual", "model.decoder_type": "skip",
        "method.weighting": "adaptive_squared",
    }),
    "improved": ("improved", {}),
    "improved_unguided": ("improved", {"method.guidance": False, "method.flow_fraction": 0.0}),
    "flow": ("flow", {}),
    "flow_repa": ("flow", {"model.repa_dims": (8, 4), "model.repa_depth": 1, "model.projector_dim": 16}),
    "flow_edm2": ("flow", {"model.name": "edm2"}),
    "decoupled": ("decoupled", {}),
    "decoupled_pairs": ("decoupled", {"method.log_variance_pairs": "all", "method.path": "cosine"}),
    "decoupled_distill": ("decoupled", {"method.guidance_type": "distill", "method.teacher": "given"}),
    "rectified": ("rectified", {}),
    "rectified_uniform": ("rectified", {"method.time_sampler": "uniform", "method.distance_clip": 1.0}),
}  # fmt: skip


class OneDevice(TorchDispatchMode):
    """Fails where an operation is given tensors of two devices; counts the copies between devices."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {a.device.type for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        if func in COPIES and (len(devices) > 1 or (kwargs or {}).get("device", META) != META):
            self.copies += 1
        else:
            assert len(devices) < 2, f"{func} mixes {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=CASES)
def config(request, tiny):
    """Return the config of a case."""
    family, changes = CASES[request.param]
    return tiny((request.getfixturevalue(f"tiny_{family}") if family else {}) | changes)


def make_batch(config):
    """Return a batch of numpy arrays with all that a method may read."""
    c, rows = config.model, config.train.batch_size
    image = np.zeros((rows, c.input_size, c.input_size, c.channels), np.float32)
    batch = {
        "image": image,
        "noise": image,
        "label": np.zeros(rows, np.int32),
        "augment": np.zeros((rows, 6), np.float32),
    }
    if "repa_dims" in c and c.repa_dims:
        batch["features"] = np.zeros((rows, (c.input_size // c.patch_size) ** 2, sum(c.repa_dims)), np.float32)
    return batch | draws.of_process(config, 0)


@pytest.fixture
def read_backs(monkeypatch):
    """Let tensors without values be read, as zeros; return the list of their sizes, in order."""
    sizes = []

    def zeros(a):
        sizes.append(a.numel())
        return torch.zeros(a.shape, dtype=a.dtype)

    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "cpu", lambda a: zeros(a) if a.is_meta else a)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda a: tolist(a.cpu()))
    return sizes


def test_a_step_stays_on_its_device(config, read_backs, tiny, tiny_flow):
    """Forward, JVP, backward, optimizer, EMA and metrics; one window of metrics is one read-back."""
    batch = step.put_batch(make_batch(config), META)
    distilled = config.method.name == "decoupled" and config.method.guidance_type == "distill"
    teacher = step.build_net(tiny(tiny_flow)).to(META).requires_grad_(False) if distilled else None
    state = step.create_state(config, None, META, teacher=teacher)
    train_step, window = step.make_train_step(config), []
    with OneDevice() as mode:
        for stage in range(len(stages(config))):
            state, metrics = train_step(state, batch, stage)
            window += [metrics] * 2
        reduced = step.reduce_metrics(window)
    assert mode.copies == 0
    assert read_backs == [sum(torch.is_tensor(a) for metrics in window for a in metrics.values())]
    assert [list(m) for m in reduced] == [[name for name in m if not name.endswith(FRACTION)] for m in window]
    assert all(isinstance(a, float) for metrics in reduced for a in metrics.values())
    tensors = [*state.net.state_dict().values(), *(a for ema in state.emas for a in ema.values())]
    tensors += [a for moments in state.optimizer.state.values() for a in moments.values()]
    assert {a.device.type for a in tensors} == {"meta"}


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
def test_a_sampler_stays_on_its_device(config, read_backs):
    canonical = weights.to_canonical(net := step.build_net(config), dict(net.named_parameters()))
    sampler = make_sampler(config, META)
    batch = make_batch(config)
    with OneDevice():
        images = sampler(canonical, batch["noise"], batch["label"], config.sample)
    assert images.shape == batch["noise"].shape and read_backs == [images.size]
