#!/bin/bash
# sbatch launch/slurm.sh imagenet-256-xl --data.path /shared/latents --out /shared/runs/xl --parallel.shard
# The same command again, after a failure, goes on where the run stopped; at the time limit it does so by itself.
#SBATCH --job-name=ditmoe
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue

# One task a GPU and no agent between SLURM and the program: five minutes before the limit every process gets SIGUSR1,
# saves, and leaves with 143, which puts the job back into the queue. From 22.05 on srun does not take the CPUs of a task
# from sbatch, and would give it one.
set -uo pipefail
source .venv/bin/activate
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python train.py "$@"' ditmoe "$@"
code=$?
[ $code -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
