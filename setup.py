"""Packages and dependencies of the MeanFlow reference implementation."""

from setuptools import find_packages, setup

PACKAGES = ("meanflow", "jax_impl", "torch_impl", "parity")

setup(
    name="meanflow",
    version="0.1.0",
    description="The MeanFlow family of one-step generative models, in JAX and PyTorch, proven equal",
    license="MIT",
    python_requires=">=3.11",
    # Relative to the root, so that an editable install adds the root to the path: benchmarks/ and configs/, which are
    # for the checkout alone, can then import what is beside them.
    package_dir={"": "."},
    packages=find_packages(include=[f"{name}{rest}" for name in PACKAGES for rest in ("", ".*")]),
    package_data={"parity.golden": ["*.npz"]},
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
        "orbax-checkpoint>=0.11.15",  # has PLACEHOLDER, which leaves an array unread
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
        # JAX's compiler for NVIDIA GPUs without their libraries, for benchmarks/rehearse.py.  Where there is no GPU,
        # every JAX program then complains at its start: `make install` keeps it apart.
        "rehearse": ["jax-cuda12-plugin>=0.10", "jax-cuda12-pjrt>=0.10", "nvidia-cuda-nvcc-cu12>=12.9"],
        "repa": ["transformers>=5.0"],
        "latents": ["huggingface_hub>=0.30", "lmdb>=1.4"],
        "dev": [
            "diffusers>=0.40", "huggingface_hub>=0.30", "ipykernel>=7.0", "lmdb>=1.4", "nbclient>=0.10",
            "pre-commit>=3.7", "pyright>=1.1.400", "pytest>=8.2", "pytest-xdist>=3.6", "ruff>=0.6",
            "scikit-image>=0.24", "transformers>=5.0",
        ],
    },
)  # fmt: skip
