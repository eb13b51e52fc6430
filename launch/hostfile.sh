#!/usr/bin/env bash
# Several machines over pdsh and ssh, one line each in the hostfile. Once, on the first of them:
#   cp launch/hostfile.example launch/hostfile            # which machines
#   cp launch/deepspeed_env.example launch/deepspeed_env  # what their ranks must know
# and then, each time, to begin as well as to go on:
#   launch/hostfile.sh --data /data/coco/data.yaml --model yolov5l --epochs 300 --name large
# This checkout, the virtual environment, the data and the run's folder must lie at the same paths on all machines
# (a shared disk), and ssh to each of them, the first too, must work without a password.
# Other paths in the arguments count from this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
# Of this shell's environment only PYTHON*, NCCL*, MV2*, UCX* and MLFLOW* reach the other machines; the rest stands in the
# file that DS_ENV_FILE names. The launcher cannot read comments there (one would swallow the command): they stay here.
env_file="${ENV_FILE:-launch/deepspeed_env}"
if [[ -f $env_file ]]; then
    export DS_ENV_FILE="$(dirname "$env_file")/.$(basename "$env_file")"
    grep -Ev '^[[:space:]]*(#|$)' "$env_file" > "$DS_ENV_FILE"
fi
# Where the first address that `hostname -I` says on the first machine is not that of the fast network, or its name is
# only known to an ssh configuration (PDSH_SSH_ARGS_APPEND="-F file"): MASTER_ADDR=10.0.0.1 launch/hostfile.sh ...
exec deepspeed --hostfile "${HOSTFILE:-launch/hostfile}" ${MASTER_ADDR:+--no_ssh_check --master_addr "$MASTER_ADDR"} \
    dsyolo/train.py --deepspeed_config "${CONFIG:-ds_configs/zero2.json}" --resume auto "$@"
