"""MeanFlow on the 8x8 digits of scikit-learn, small enough for a laptop.

python -m jax_impl.main --config=configs/digits.py --workdir=runs/digits
torchrun torch_impl/train.py --config=configs/digits.py --workdir=runs/digits_torch
"""

from configs import base


def get_config() -> base.Config:
    """Return the config of the demo."""
    config = base.get_config()
    config.name = "digits"
    config.train.steps = 3000
    config.train.batch_size = 128
    config.train.learning_rate = 1e-3
    config.train.ema_decays = (0.99,)
    return config
