#!/bin/sh
# Writes locked.txt (what `make` installs) and oldest.txt (`make test OLDEST=1`: the lower ends of the ranges in
# pyproject.toml) anew; needs uv (pip install uv). PyTorch and what only it brings are left out: which build is right
# depends on the machine, so scripts/environment.py installs them, in the versions that pyproject.toml names.
set -eu
cd "$(dirname "$0")/.."

torch_alone=$(for name in torch triton cuda-bindings cuda-pathfinder cuda-toolkit \
    nvidia-cublas nvidia-cuda-cccl nvidia-cuda-crt nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime \
    nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
    nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx nvidia-nvvm; do
    echo "--no-emit-package $name"; done)

lock() {  # FILE ARGUMENTS...
    file=$1; shift
    uv pip compile --quiet --universal --python-version 3.11 --extra dev $torch_alone \
        --custom-compile-command requirements/make_locks.sh "$@" pyproject.toml --output-file "requirements/$file"
}
lock locked.txt --generate-hashes
lock oldest.txt --resolution lowest-direct --no-annotate
