"""Packages and dependencies of the MeanFlow reference implementation."""

from setuptools import setup

setup(
    name="meanflow",
    version="0.1.0",
    description="The MeanFlow family of one-step generative models, in JAX and PyTorch, proven equal",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "meanflow", "meanflow.commands", "meanflow.config", "meanflow.data", "meanflow.data.images",
        "meanflow.data.latents", "meanflow.metrics", "meanflow.sampling", "meanflow.weights", "jax_impl",
        "jax_impl.models", "jax_impl.methods", "torch_impl", "torch_impl.models", "torch_impl.methods", "parity",
        "parity.adapters", "parity.cases", "parity.golden",
    ],
    install_requires=[
        "clu>=0.0.12",
        "flax>=0.12",
        "grain>=0.2.12",
        "importlib_resources>=6.0",  # tensorflow-datasets forgets to ask for it
        "jax>=0.10",
        "matplotlib>=3.8",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pillow>=10.0",
        "safetensors>=0.4.5",
        "scikit-learn>=1.5",
        "tensorboard>=2.17",
        "tensorflow-cpu>=2.17",  # clu's TensorBoard writer
        "tensorflow-datasets>=4.9.7",
        "torch>=2.11",
        "tqdm>=4.66",
    ],
    extras_require={
        "flash": ["jvp_flash_attention>=0.14"],  # config.model.attention_jvp=flash
        "gpu": ["jax[cuda12]>=0.10"],
        "repa": ["transformers>=5.0"],
        "latents": ["huggingface_hub>=0.30", "lmdb>=1.4"],
        "dev": [
            "diffusers>=0.36", "huggingface_hub>=0.30", "jaxtyping>=0.2.34", "lmdb>=1.4", "pre-commit>=3.7",
            "pyright>=1.1.400", "pytest>=8.2", "pytest-xdist>=3.6", "ruff>=0.6", "scikit-image>=0.24",
            "transformers>=5.0",
        ],
    },
)  # fmt: skip
