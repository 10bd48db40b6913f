# environment.sh: where a job of ours finds its folder, its site file and its Python. Read by every *.sbatch here.
#
# Sets python, job, AMCLIP_CONTAINER, AMCLIP_SRUN and the functions say, give_up, once and requeue_job. What is
# particular to a cluster (modules, conda, container, network) is in one file: slurm/sites/CLUSTERNAME.env, see
# sites/example.env, or ~/.config/amclip/CLUSTERNAME.env, where the package is installed and has no folder of yours.
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

requeue_job() { # $1: why. Puts the job back into the queue; status 1: it cannot be, for what $refusal says
  # Only a RUNNING job: one that completes was cancelled by its owner or is already being requeued by Slurm, and
  # `scontrol requeue` would bring the cancelled one back to life. A controller that is busy or starts anew does not
  # answer for a while (connect failure, socket timed out): that is no refusal, and it is asked again.
  local attempt shown said='' asked=''
  for attempt in {1..20}; do
    [ "$attempt" = 1 ] || sleep 15
    [ "$attempt" != 2 ] || say "Slurm's controller does not answer: asked again every 15 s${said:+ ($said)}"
    shown=$(scontrol --oneliner show job "$job" 2>/dev/null)
    case $shown in
    *JobState=RUNNING* | *JobState=COMPLETING*Reason=TimeLimit*) ;;
    *JobState=*)
      [ -z "$asked" ] || return 0 # the request had arrived, and its answer was lost
      refusal="not requeued: Slurm is ending this job itself ($(echo "$shown" | grep -o 'JobState=[A-Z_]*'))"
      return 1
      ;;
    *) continue ;;
    esac
    [ -n "$asked" ] || say "requeue of job $job: $1"
    asked=1 requeued=1 # a script that sources train.sbatch may read it when it ends
    trap '' TERM
    said=$(scontrol requeue "$job" 2>&1) && return 0
    case $said in
    *failure* | *"timed out"* | *"Zero Bytes"* | *"temporarily"* | *standby* | *"Connection refused"*) ;;
    *)
      refusal="Slurm refuses the requeue ($said); submit again to continue: every argument the same"
      return 1
      ;;
    esac
  done
  refusal="not requeued: Slurm's controller does not answer; submit again to continue: every argument the same"
  return 1
}
