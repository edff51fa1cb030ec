# Prepare the environment of a job and its tasks: `source slurm/environment.sh` in the root of the checkout.
#
# Sets LLAMESH_PYTHON to a Python that has Llamesh's dependencies, and puts its folder first in PATH. It is
# LLAMESH_PYTHON if set; otherwise the first of: the active virtual environment, .venv in the checkout, the
# active conda environment, the one in PATH (a module, a container). In a job submitted with --export=NONE
# only .venv and the PATH of a login shell are left.

# Tasks get the variables of this script, also if `sbatch --export` withholds those of the submitting shell.
export SLURM_EXPORT_ENV=ALL
# srun's exit code for its own errors, as of a node that does not answer (requeue.py); 1 by default.
export SLURM_EXIT_ERROR=79

own=$PWD/.venv
pythons=("${VIRTUAL_ENV:-$own}/bin/python" "$own/bin/python" "${CONDA_PREFIX:-$own}/bin/python" python python3)
[[ -z ${LLAMESH_PYTHON:-} ]] || pythons=("$LLAMESH_PYTHON")
imports='from importlib.util import find_spec as find; assert all(map(find, ("torch", "lightning_fabric", "hydra")))'
python=
while read -r candidate; do  # each of a name in PATH, where that of a conda base may come first
    [[ $candidate == /* ]] || candidate=$PWD/$candidate
    "$candidate" -c "$imports" </dev/null &>/dev/null && python=$candidate && break
done < <(type -aP "${pythons[@]}")
if [[ -z $python ]]; then
    echo "Error: no Python with Llamesh's dependencies on $HOSTNAME among ${pythons[*]}; install them into" \
        "$own (see README.md), or add --export=ALL,LLAMESH_PYTHON=/path/to/python to sbatch" >&2
    exit 1
fi
export LLAMESH_PYTHON=$python PATH="${python%/*}:$PATH"
