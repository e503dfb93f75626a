#!/usr/bin/env bash
# Installs what compiles the kernels, CUDA 13.0's compiler and headers, from PyPI into DIR (default target/cuda), and
# prints where it is, for machines without a toolkit:
#
#     export CUDA_HOME=$(kernels/cuda/toolkit.sh)
#
# It takes 270 MiB and a few seconds, once; no GPU, no driver and no libraries. Running the kernels takes a driver of
# release 580 or later, and cuBLAS of CUDA 13.
set -euo pipefail
directory=${1:-$(dirname "$0")/../../target/cuda}
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85)

mkdir -p "$directory" && directory=$(cd "$directory" && pwd)
if [ "$(cat "$directory/installed" 2>/dev/null)" != "${packages[*]}" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-compile --no-deps \
        --upgrade --target "$directory" "${packages[@]}" >&2
    echo "${packages[*]}" >"$directory/installed"
fi
echo "$directory/nvidia/cu13"
