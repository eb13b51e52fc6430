#!/usr/bin/env bash
# All GPUs of this machine; on a CPU, RANKS gloo ranks that share its cores. Arguments go to train.py:
#   RANKS=2 launch/one_machine.sh --data data.yaml --model yolov5s --epochs 100 --name mine
# The same line goes on with a run that stopped. To stop it and lose nothing, send SIGTERM to it or to a rank. `deepspeed`
# ends at once by it, its ranks when they have saved, some seconds later. (launch/ranks.py waits for them.)
set -euo pipefail
cd "$(dirname "$0")/.."
# Paths in the arguments count from this checkout.
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
ranks=${RANKS:-$(( gpus > 0 ? gpus : 2 ))}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || { echo "RANKS: $ranks given, but it must be a number from 1 on" >&2; exit 2; }
exec deepspeed --num_gpus "$ranks" dsyolo/train.py \
    --deepspeed_config "${CONFIG:-ds_configs/zero2.json}" --resume auto "$@"
