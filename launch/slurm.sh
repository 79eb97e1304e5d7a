#!/usr/bin/env bash
#SBATCH --job-name=attnlab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180
#
# One process for each GPU; JAX reads the job from SLURM's variables.
#
#   sbatch launch/slurm.sh --config=lm_docs --workdir=/shared/runs/a --mesh=auto
#
# Options of sbatch before the script override those above. SLURM sends SIGUSR1 180 seconds before the
# time limit and SIGTERM at a preemption: attnlab saves a checkpoint and exits with 75, and the job
# is queued again to resume.
set -uo pipefail
PYTHON=${PYTHON:-.venv/bin/python}

srun --kill-on-bad-exit=0 "$PYTHON" run.py --distributed=on "$@"
code=$?
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
