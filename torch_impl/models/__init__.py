"""Networks, one file per architecture."""

from torch_impl.models import dit, unet

ARCHITECTURES = {"dit": dit.DiT.from_config, "unet": unet.UNet.from_config}
