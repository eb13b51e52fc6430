#!/usr/bin/env bash
# The same training under torchrun, for schedulers that start it themselves.
#   RANKS=2 launch/torchrun.sh --data data.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
exec torchrun --standalone --nproc_per_node "${RANKS:-2}" dsyolo/train.py \
    --deepspeed_config "${CONFIG:-ds_configs/zero2.json}" "$@"
