# Ends a job's script, or sends the job back into the queue: `source slurm/requeue.sh EXIT_CODE`.
#
# The exit code is srun's, the highest of its tasks'. Back go runs that saved in order to be started
# again (75: SIGUSR1 or the time limit), those that lost a process or a node after they had saved
# (71: each start gets further, so a fault that always comes again ends with 72), and those that
# SIGTERM ended (143) because SLURM pre-empts the job: one that leaves within the partition's
# GraceTime would count as failed, not as pre-empted. After scancel the job ends. Killed and
# timed-out jobs never get here: SLURM itself decides.

# An array's last task has the array's own number, which would send back all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
again=false
if [[ $1 == 75 || $1 == 71 ]]; then
    again=true
elif [[ $1 == 143 ]]; then
    [[ $(scontrol show job -o "$job") == *" PreemptTime="[0-9]* ]] && again=true
fi
if [[ $again == true ]]; then
    echo "Exit code $1: back into the queue (scontrol requeue $job)."
    scontrol requeue "$job" || echo "SLURM did not take the job back: submit it again." >&2
fi
exit "$1"
