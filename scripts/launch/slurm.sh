#!/usr/bin/env bash
# A job of 2 nodes with 8 GPUs each: sbatch scripts/launch/slurm.sh model=vgg16 data=image_folder ...
#SBATCH --job-name=hybridpar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
ranks=8 # of each node
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / ranks))
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # needed for --max-restarts on several nodes
# Where nodes have several networks, name the fast one (ip -br address): gloo takes a name, NCCL a prefix too.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

# The folder has the job's number, which a requeued job keeps: it goes on there.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$first:29400" --rdzv-id="$SLURM_JOB_ID" \
  -m hybridpar train run.dir="runs/slurm-$SLURM_JOB_ID" checkpoint.every=500 resume=auto "$@"
