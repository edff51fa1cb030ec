# Set the CPUs of each task that srun starts: `source slurm/cpus_per_task.sh`.
#
# Since SLURM 22.05, srun no longer inherits --cpus-per-task from sbatch. Without that option the tasks
# share the CPUs of the job on this node, which with --exclusive are all; srun would give each task one.

cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / ${SLURM_NTASKS_PER_NODE:-1}))}
export SRUN_CPUS_PER_TASK=$((cpus > 0 ? cpus : 1))
