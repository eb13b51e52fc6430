#!/usr/bin/env bash
# The same training under torchrun, on one machine:
#   RANKS=8 launch/torchrun.sh --data data.yaml
# and on several: the same line on each of them, with the name of one as the place to meet.
#   NODES=2 MEET=node0:29400 RANKS=8 launch/torchrun.sh --data data.yaml --name large
# Each machine's own name (`hostname`) must be known to the others; where it is not, ADDRESS=10.0.0.2 gives its address.
# A variable that ranks need (launch/deepspeed_env.example) is set on each machine before.
set -euo pipefail
cd "$(dirname "$0")/.."
# Paths in the arguments count from this checkout.
ranks=${RANKS:-2}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || { echo "RANKS: $ranks given, but it must be a number from 1 on" >&2; exit 2; }
if [[ -n ${MEET:-} ]]; then
    place=(--nnodes "${NODES:?how many machines}" --rdzv_backend c10d --rdzv_endpoint "$MEET" --rdzv_id "${ID:-dsyolo}"
        ${ADDRESS:+--local_addr "$ADDRESS"})
else
    place=(--standalone)
fi
exec torchrun "${place[@]}" --nproc_per_node "$ranks" dsyolo/train.py \
    --deepspeed_config "${CONFIG:-ds_configs/zero2.json}" --resume auto "$@"
