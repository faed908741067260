#!/bin/bash
# rlhf example lsf --num-nodes 4 --num-gpus 8 --accelerator cuda --actor-model facebook/opt-13b --reward-model facebook/opt-350m --actor-zero-stage 3 --data-path Dahoas/rm-static --output-dir /output --name opt13b
# Submit with: bsub < this file
#BSUB -J rlhf-opt13b
#BSUB -n 32
#BSUB -R "span[ptile=8]"
#BSUB -gpu "num=8"
#BSUB -o /output/lsf-%J.out
set -u
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
# One line for each slot, the hosts in order: every host once.
mapfile -t hosts < <(awk '!seen[$1]++ {print $1}' "$LSB_DJOB_HOSTFILE")
export MASTER_ADDR="${hosts[0]}" MASTER_PORT=$((20000 + LSB_JOBID % 20000))
export PROJECT="${PROJECT:-$PWD}"  # where train.py is, on every host
started=()
for node in "${!hosts[@]}"; do
  export NODE="$node"
  blaunch "${hosts[node]}" sh -c 'cd "$PROJECT" && exec python train.py --num-nodes 4 --num-gpus 8 --accelerator cuda --actor-model facebook/opt-13b --reward-model facebook/opt-350m --actor-zero-stage 3 --data-path Dahoas/rm-static --output-dir /output --name opt13b --deployment-type multi_node --launcher torchrun --node-rank "$NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"' &
  started+=($!)
done
# The first driver that fails ends the others; its exit code is the job's.
code=0
for _ in "${started[@]}"; do
  wait -n || { code=$?; kill "${started[@]}" 2>/dev/null; break; }
done
wait
exit "$code"
