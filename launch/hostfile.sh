#!/usr/bin/env bash
# Several machines over pdsh and ssh, one line each in the hostfile. This checkout, the virtual environment and
# the data must lie at the same paths on all of them, and ssh to each must work without a password.
#   HOSTFILE=launch/hostfile launch/hostfile.sh --data data.yaml --model yolov5l --epochs 300
# Of the environment only variables that start with NCCL, PYTHON, MV2 or UCX reach the other machines;
# what else they need stands in ~/.deepspeed_env or ./.deepspeed_env: see deepspeed_env.example.
set -euo pipefail
cd "$(dirname "$0")/.."
exec deepspeed --hostfile "${HOSTFILE:-launch/hostfile}" dsyolo/train.py \
    --deepspeed_config "${CONFIG:-ds_configs/zero2.json}" "$@"
