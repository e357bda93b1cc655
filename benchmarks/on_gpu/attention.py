"""Fused attention against plain, values and gradients: `python -m benchmarks.on_gpu.attention jax|torch`.

In bfloat16; errors are relative to plain attention in float32.  In PyTorch on a GPU also the tangent of the kernel
`flash`, if jvp_flash_attention is installed.
"""

import importlib.util
import json
import sys
from typing import Any

import numpy as np

SHAPES = [(4, 12, 256, 64), (4, 16, 256, 72), (2, 16, 346, 64)]  # B/2, XL/2 and iMF's, whose tokens are no power of 2
WORSE = 2  # a fused kernel's error may be this many times that of plain attention


def main(framework: str) -> dict:
    """Return the errors by shape, plain and fused.  Exits if a fused kernel's is too large."""
    measure = {"jax": with_jax, "torch": with_torch}[framework]
    found = {"x".join(map(str, shape)): measure(shape) for shape in SHAPES}
    for shape, errors in found.items():
        for name, error in errors.items():
            plain = errors[f"plain {name.partition(' ')[2]}"]
            if not error <= WORSE * plain:
                sys.exit(f"{name} at {shape} has error {error:.2g}, plain attention {plain:.2g}")
    return found


def draw(shape):
    """Return q, k, v, their tangents and a cotangent as float32."""
    rng = np.random.RandomState(0)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(7)]


def errors_of(results: dict, expected: list, kind: str) -> dict:
    """Return {"KERNEL KIND": the largest relative error of a kernel's results}."""
    return {
        f"{name} {kind}": max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(arrays, expected, strict=True)
        )
        for name, arrays in results.items()
    }


def with_jax(shape) -> dict:
    """Return the errors of JAX's kernels."""
    import jax
    import jax.numpy as jnp

    from jax_impl.models.attention import fused, plain

    *qkv, _, _, _, cotangent = draw(shape)

    def run(kernel, dtype):
        def value_and_gradients(*args):
            value, pull = jax.vjp(kernel, *args)
            return value, *pull(cotangent.astype(dtype))

        with jax.default_matmul_precision("highest"):
            results = jax.jit(value_and_gradients)(*(jnp.asarray(a, dtype) for a in qkv))
        return [np.asarray(a, np.float32) for a in results]

    exact = run(plain, jnp.float32)
    results = {name: run(kernel, jnp.bfloat16) for name, kernel in (("plain", plain), ("fused", fused))}
    return errors_of(results, exact, "gradients")


def with_torch(shape) -> dict:
    """Return the errors of PyTorch's kernels, and of their tangents."""
    import torch
    from torch.autograd import forward_ad

    from torch_impl.devices import choose_device
    from torch_impl.models.attention import attend

    device = choose_device()
    arrays = [torch.from_numpy(a).to(device) for a in draw(shape)]

    def run(kernel, dtype):
        q, k, v = qkv = [a.to(dtype).requires_grad_() for a in arrays[:3]]
        value = attend(q, k, v, kernel)
        return [
            a.detach().float().cpu().numpy() for a in (value, *torch.autograd.grad(value, qkv, arrays[6].to(dtype)))
        ]

    def tangent(kernel, dtype):
        parts = [a.to(dtype) for a in arrays[:6]]
        with torch.no_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(parts[:3], parts[3:], strict=True)]
            q, k, v = duals
            dual: Any = forward_ad.unpack_dual(attend(q, k, v, kernel))
        return [a.float().cpu().numpy() for a in dual]

    dtype = torch.bfloat16
    found = errors_of({name: run(name, dtype) for name in ("plain", "fused")}, run("plain", torch.float32), "gradients")
    kernels = ["plain"]
    if device.type == "cuda" and importlib.util.find_spec("jvp_flash_attention"):
        kernels.append("flash")
    exact = tangent("plain", torch.float32)
    return found | errors_of({name: tangent(name, dtype) for name in kernels}, exact, "tangent")


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
