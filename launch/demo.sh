#!/usr/bin/env bash
# The demo: train on digits in JAX, convert the weights to PyTorch, sample both from the same noise, prove them equal.
#   launch/demo.sh [DIR]      finished training is not repeated; delete DIR to start over
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
dir=${1:-runs/demo}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

echo "== 1/6 training in JAX"
time $python -m jax_impl.main --config=configs/digits.py --workdir="$dir/jax"
echo "== 2/6 evaluating the one-step samples"
$python -m jax_impl.evaluate --workdir="$dir/jax"
echo "== 3/6 converting the weights to PyTorch"
$python parity/convert.py "$dir/jax" "$dir/weights.safetensors"
echo "== 4/6 sampling both in one step, from the same noise"
$python -m jax_impl.sample --workdir="$dir/jax" --labels=0,1,2,3,4,5,6,7,8,9 --output="$dir/samples_jax"
$python torch_impl/sample.py --weights="$dir/weights.safetensors" --config=configs/digits.py \
    --labels=0,1,2,3,4,5,6,7,8,9 --output="$dir/samples_torch"
$python parity/compare.py "$dir/samples_jax/samples.npz" "$dir/samples_torch/samples.npz" --bound=1e-4
echo "== 5/6 checking that the two implementations of this system are equal (all systems: parity/check.py)"
$python parity/check.py --report "$dir/parity.html" \
    --only '^(float|bfloat)[0-9]+/(?!unet|imf|dmf|edm2|dit/|vae|inception)|golden/(sit_torch|meanflow_dit_flax|ema_lr_optim)'
echo "== 6/6 100 steps in JAX, in PyTorch, and in runs that change framework half-way"
$python parity/train.py --config=configs/digits.py --steps=100 --noyardstick --output="$dir"
echo "Samples: $dir/samples_jax/samples.png  Report: $dir/parity.html  Curves: $dir/train.html"
