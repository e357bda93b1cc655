"""Networks, one file per architecture."""

from jax_impl.models import dit, dmf_dit, edm2, imf_dit, unet

ARCHITECTURES = {
    "dit": dit.DiT.from_config, "unet": unet.UNet.from_config, "imf_dit": imf_dit.IMFDiT.from_config,
    "dmf_dit": dmf_dit.DMFDiT.from_config, "edm2": edm2.EDM2.from_config,
}  # fmt: skip
# What is done to the weights before each step of training.
PROJECTIONS = {"edm2": edm2.normalize_weights}
