"""Inception features of images, for the Fréchet distance and the Inception score."""

from jax_impl import weights
from jax_impl.batches import in_batches
from jax_impl.models.inception import Inception, resized
from meanflow.metrics import preprocessing
from meanflow.metrics.extractor import Extractor


def make_inception(weights_path, convention, batch_size=64):
    """Return extract(images uint8 [b h w c], grey or RGB) -> {"pool": [b 2048], "logits": [b 1008]}, float32, numpy.

    The logits omit the last layer's bias.
    weights_path: a .safetensors with torch-fidelity's names, which python -m parity.convert makes from its .pth.
    convention: a name in `preprocessing.CONVENTIONS`.  At most `batch_size` images are computed at once; each image
    size compiles once.
    Raises UserError for an unknown convention, weights that are not Inception's, and other images.
    """
    convention = preprocessing.get(convention)

    def features(net, images):
        out = net(resized(images, convention))
        return out["2048"], out["logits_unbiased"]

    run = in_batches(Inception, weights.load(weights_path), features, batch_size)

    def extract(images):
        preprocessing.check_images(images)
        return dict(zip(("pool", "logits"), run(images), strict=True))

    return Extractor(extract, preprocessing.WIDTHS)
