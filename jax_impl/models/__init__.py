"""Networks, one file per architecture."""

from jax_impl.models import dit

ARCHITECTURES = {"dit": dit.DiT.from_config}
