# Requeue the job of this script if a restart can help, and exit: `source slurm/requeue.sh CODE ARGUMENTS…`.
#
# CODE is srun's exit code, the highest one of its tasks; ARGUMENTS are those of train.py. requeue.py decides.
# If the job was killed or exceeded its time, or its first node failed, SLURM itself decides.

timeout -k 60 600 "${LLAMESH_PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/requeue.py" "$@" \
    || echo "Error: slurm/requeue.py failed, and the job is not requeued; submit it again" >&2
exit "$1"
