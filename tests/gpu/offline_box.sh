#!/usr/bin/env bash
# Prepare a GPU machine without network that has torch and transformers, then run a command on it.
#   tests/gpu/offline_box.sh WHEELS COMMAND [ARG ...]
# WHEELS: a folder with the packages that the machine lacks, as .whl (deepspeed, hjson, pydantic, …),
# and libaio as .deb. Needs root for the .deb.
set -euo pipefail
wheels=$1; shift
site=${SITE:-/tmp/zero-offload-site}
if [ ! -d "$site" ]; then
  for deb in "$wheels"/*.deb; do dpkg -x "$deb" /; done
  ldconfig
  packages=("$wheels"/*.whl)
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${packages[@]}"
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH" PYTHONUNBUFFERED=1 WANDB_MODE=disabled
# Some images set 9.0a, which DeepSpeed's builder cannot read.
export TORCH_CUDA_ARCH_LIST=${ARCH:-9.0}
exec "$@"
