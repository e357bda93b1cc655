"""Runs folders of `parity/convert.py RUN DEST --to diffusers` in diffusers, with its scheduler and our network.

    from parity.diffusers_pipeline import MeanFlowPipeline

    pipe = MeanFlowPipeline.from_pretrained("DEST").to("cuda")
    images = pipe([207, 360], num_inference_steps=1, generator=torch.Generator("cuda").manual_seed(0)).images

diffusers has no network of two times for images, and looks for the classes that a folder names here only if this module
is imported.  Source: diffusers, pipelines/anyflow, which drives another network with the same scheduler.
"""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMapEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.torch_utils import randn_tensor

import torch_impl
from meanflow.config import latents as conventions
from meanflow.config import store
from meanflow.sampling.steps import is_guided
from parity import diffusers_folder
from torch_impl.methods.rectified import TIME_MAX
from torch_impl.methods.samplers import full
from torch_impl.model import conditions
from torch_impl.weights import to_canonical


class MeanFlowTransformer(ModelMixin, ConfigMixin):
    """A network of this project, loaded by `from_pretrained`, as diffusers calls one."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int, num_classes: int, run: dict[str, Any]):
        """run: the stored config.  Its network is loaded, not made."""
        super().__init__()
        self.run = store.from_json(json.dumps(run), "transformer/config.json")
        self.net: Any = None
        self.model: Any = None

    @classmethod
    def from_pretrained(cls, path, *, subfolder="", torch_dtype=None, **_):
        """Load a folder that `diffusers_folder` wrote.

        torch_dtype: in which the network computes; its weights stay in float32.  Other arguments are diffusers' hints
        on where to load tensors, and have no effect: the network is loaded on the CPU.
        """
        dtype = None if torch_dtype is None else str(torch_dtype).removeprefix("torch.")
        model = torch_impl.load(pathlib.Path(path) / subfolder, device="cpu", dtype=dtype)
        self = cls(**diffusers_folder.transformer_settings(model.config))
        self.model, self.net = model, model.net
        return self

    def save_pretrained(self, save_directory, **_):
        """Write what `from_pretrained` reads.  Other arguments, such as the size of shards, have no effect."""
        weights = to_canonical(self.net, dict(self.net.named_parameters()))
        metadata = {"format": "canonical", "source": "diffusers"}
        diffusers_folder.write_transformer(pathlib.Path(save_directory), weights, metadata, self.run)

    def forward(self, hidden_states, timestep, r_timestep, class_labels, return_dict=True, **given):
        """Return the average velocity [b c h w] of hidden_states [b c h w].

        timestep, r_timestep: scalars in [0, 1000], 1000 is noise.  class_labels: [b].  given: what the network is
        conditioned on by name, such as omega, a number each.
        """
        z, latest = hidden_states, TIME_MAX if self.run.method.name == "rectified" else 1.0
        times = (min(float(time) / diffusers_folder.TIMESTEPS, latest) for time in (timestep, r_timestep))
        t, r = (full(z, time) for time in times)
        u = self.net(z, t, r, class_labels, **{name: full(z, value) for name, value in given.items()})
        return Transformer2DModelOutput(sample=u) if return_dict else (u,)


class MeanFlowPipeline(DiffusionPipeline):
    """Class-conditional images in the steps of the scheduler."""

    def __init__(self, transformer: MeanFlowTransformer, scheduler: FlowMapEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        **given: float,
    ) -> ImagePipelineOutput:
        """Return images of classes: a list for output_type pil, arrays [b h w c] in [0, 1] for np.

        num_inference_steps: by default as in the run.  sigmas: times instead of uniform steps, without the last, 0.
        latents: the noise [b c h w], drawn by `generator` if None.  output_type: also latent, for samples in data units
        [b c h w].  given: cfg_scale, or what the network is conditioned on, such as omega.
        """
        c = self.transformer.run
        y = torch.as_tensor(class_labels, device=self.device).reshape(-1)
        if latents is None:
            shape = (len(y), c.model.channels, c.model.input_size, c.model.input_size)
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        num_steps = None if sigmas is not None else num_inference_steps or c.sample.steps
        self.scheduler.set_timesteps(num_steps, device=self.device, sigmas=sigmas)
        times = self.scheduler.sigmas * self.scheduler.config.num_train_timesteps
        z = latents.to(self.device)
        for t, r in itertools.pairwise(times):
            u = self.velocity(z, t, r, y, given)
            z = self.scheduler.step(u, t, z, r_timestep=r).prev_sample
        if output_type == "latent":
            return ImagePipelineOutput(images=z)  # pyright: ignore[reportArgumentType]
        images = self.to_images(z)
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)

    def velocity(self, z, t, r, y, given):
        """Return the velocity of a step from t to r, guided as the run's config says; see `samplers.integrate`."""
        network, c = self.transformer, self.transformer.run.sample
        given = dict(given)
        scale = given.pop("cfg_scale", c.get("cfg_scale", 1.0))
        given = conditions(network.run) | given
        u = network(z, t, r, y, **given).sample
        if scale == 1 or not is_guided(float(t) / diffusers_folder.TIMESTEPS, c):
            return u
        u_null = network(z, t, r, torch.full_like(y, network.config.num_classes), **given).sample
        return u_null + scale * (u - u_null)

    def to_images(self, z):
        """Return samples [b c h w] as arrays [b h w c] in [0, 1]; latents are decoded by the autoencoder of the run."""
        images = z.permute(0, 2, 3, 1).float().cpu().numpy()
        if conventions.of(self.transformer.run) is not None:
            images = self.transformer.model.decode(images)
        return np.clip((images + 1) / 2, 0, 1)
