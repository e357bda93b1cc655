"""Inception features of images, for the Fréchet distance and the Inception score."""

from meanflow.metrics import preprocessing
from meanflow.metrics.extractor import Extractor
from meanflow.torch_precision import full_float32
from torch_impl import weights
from torch_impl.batches import in_batches
from torch_impl.models.inception import Inception, resized


def make_inception(weights_path, convention, batch_size=64):
    """Return extract(images uint8 [b h w c], grey or RGB) -> {"pool": [b 2048], "logits": [b 1008]}, float32, numpy.

    The logits omit the last layer's bias.
    weights_path: a .safetensors with torch-fidelity's names, which python -m parity.convert makes from its .pth.
    convention: a name in `preprocessing.CONVENTIONS`.  At most `batch_size` images are computed at once.
    Raises UserError for an unknown convention, weights that are not Inception's, and other images.
    """
    convention = preprocessing.get(convention)

    def features(net, images):
        out = net(resized(images.permute(0, 3, 1, 2), convention))
        return out["2048"], out["logits_unbiased"]

    run = in_batches(Inception, weights.load(weights_path), features, batch_size)

    def extract(images):
        preprocessing.check_images(images)
        with full_float32():
            return dict(zip(("pool", "logits"), run(images), strict=True))

    return Extractor(extract, preprocessing.WIDTHS)
