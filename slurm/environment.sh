# environment.sh: where a job of ours finds its folder, its site file and its Python. Read by every *.sbatch here.
#
# Sets python, job, AMCLIP_CONTAINER, AMCLIP_SRUN and the functions say, give_up and once. What is particular to a
# cluster (modules, conda, container, network) is in one file: slurm/sites/CLUSTERNAME.env, see sites/example.env, or
# ~/.config/amclip/CLUSTERNAME.env, where the package is installed and has no folder of yours.
set -u

job_file=${job_file:-$(basename "$0")}
say() { echo "$job_file: $*"; }
give_up() { say "$1"; exit "$2"; }

# One task of an array goes by ARRAY_TASK: the number of its last task is the array's own, and would mean all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

cd "$SLURM_SUBMIT_DIR" || give_up "cannot enter $SLURM_SUBMIT_DIR on $(hostname)" 2
AMCLIP_CONTAINER=() AMCLIP_SRUN=()
site=${AMCLIP_SITE:-$AMCLIP_HOME/slurm/sites/${SLURM_CLUSTER_NAME:-}.env}
[ -f "$site" ] || [ -n "${AMCLIP_SITE:-}" ] || site=${XDG_CONFIG_HOME:-$HOME/.config}/amclip/${SLURM_CLUSTER_NAME:-}.env
if [ -f "$site" ]; then
  # shellcheck source=sites/example.env
  . "$site"
elif [ -n "${AMCLIP_SITE:-}" ]; then
  give_up "no site file at $AMCLIP_SITE (AMCLIP_SITE)" 2
fi
venv=${AMCLIP_VENV:-$AMCLIP_HOME/.venv}
[ -n "${AMCLIP_VENV:-}" ] || [ -x "$venv/bin/python" ] || venv=${VIRTUAL_ENV:-$venv} # active where sbatch was called
python=${AMCLIP_PYTHON:-$venv/bin/python}
if [ ${#AMCLIP_CONTAINER[@]} = 0 ] && [ ${#AMCLIP_SRUN[@]} = 0 ] && ! command -v "$python" >/dev/null; then
  give_up "no Python at $python: run \`make setup\` in $AMCLIP_HOME, or set AMCLIP_VENV or AMCLIP_SITE" 2
fi
export PYTHONUNBUFFERED=1

once() { # runs one command in the run's environment, on this node
  if [ ${#AMCLIP_SRUN[@]} -gt 0 ]; then
    srun --overlap --nodes=1 --ntasks=1 "${AMCLIP_SRUN[@]}" "$@"
  else
    ${AMCLIP_CONTAINER[@]+"${AMCLIP_CONTAINER[@]}"} "$@"
  fi
}
