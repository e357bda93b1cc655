"""Networks, one file per architecture."""

from torch_impl.models import dit

ARCHITECTURES = {"dit": dit.DiT.from_config}
