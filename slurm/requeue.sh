# Exit from a job script, or requeue its job: `source slurm/requeue.sh EXIT_CODE`.
#
# EXIT_CODE is srun's exit code, the highest one of its tasks. The job is requeued if
#   75: the run saved and stopped in order to be restarted (SIGUSR1 or the time limit);
#   71: the run lost a process or a node after saving. Each launch makes progress, so a permanent
#       fault eventually ends with 72;
#   143: SIGTERM stopped the run because SLURM preempts the job. A job that exits by itself within
#       the partition's GraceTime would otherwise count as failed. After scancel the job ends.
# For killed and timed-out jobs this script does not run; SLURM itself decides.

# The last task of an array has the array's job ID, which would requeue all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
requeue=false
if [[ $1 == 75 || $1 == 71 ]]; then
    requeue=true
elif [[ $1 == 143 ]]; then
    [[ $(scontrol show job -o "$job") == *" PreemptTime="[0-9]* ]] && requeue=true
fi
if [[ $requeue == true ]]; then
    echo "Exit code $1: requeuing the job (scontrol requeue $job)."
    # After a node failure SLURM may have requeued the job already, which rejects the command.
    scontrol requeue "$job" || [[ $(scontrol show job -o "$job") == *" JobState=PENDING "* ]] \
        || echo "SLURM did not requeue the job; submit it again." >&2
fi
exit "$1"
