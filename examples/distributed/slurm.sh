#!/bin/bash
# Train on several machines of a Slurm cluster, 8 GPUs each:  sbatch --nodes 8 examples/distributed/slurm.sh
# Resubmit it after a failure: --resume goes on from the newest checkpoint, also on another number of nodes.
#SBATCH --job-name=qwen-image
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

MODEL=${MODEL:?the folder of Qwen-Image}
DATA=${DATA:?a folder of pictures with captions}
RUN=${RUN:-outputs/full}                    # on a file system that every node sees
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}                       # the first

# What `qwen-image-fast train full/text-to-image --plan --gpus 64 --memory 80` prints, or your own layout.
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m qwen_image_fast.training full/text-to-image \
  model.folder="$MODEL" data.source="$DATA" \
  parallel.dp_replicate="$SLURM_NNODES" parallel.dp_shard=8 batch=$((8 * SLURM_NNODES)) accumulate=1 \
  --out "$RUN" --resume
