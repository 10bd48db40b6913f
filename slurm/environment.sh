# environment.sh: where a job of ours finds its folder, its site file and its Python. Read by every *.sbatch here.
#
# Sets python, job, AMCLIP_CONTAINER, AMCLIP_SRUN, bare_srun and the functions say, give_up, once, requeue_job and
# start_failed. What is particular to a cluster (modules, conda, container, network) is in one file:
# slurm/sites/CLUSTERNAME.env, see sites/example.env, or ~/.config/amclip/CLUSTERNAME.env, where the package is
# installed and has no folder of yours.
set -u

job_file=${job_file:-$(basename "$0")}
say() { echo "$job_file: $*"; }
give_up() { say "$1"; exit "$2"; }

# sbatch hands its caller's SLURM_* to the job, and Slurm replaces only those of which the job has its own: called within
# another job (salloc, a task of an array), the rest is that job's. The job's record says which are its own.
record=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID ")
own() { # $1: what the record has of it, a pattern; then its variables: unset where the record has no such thing
  [[ $record =~ $1 ]] || unset "${@:2}"
}
if [ -n "$record" ]; then # else Slurm's controller does not answer
  own ' ArrayJobId=' ${!SLURM_ARRAY_*}
  own ' TresPerJob=' SLURM_GPUS
  own ' TresPerNode=' SLURM_GPUS_PER_NODE
  own ' TresPerTask=' SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
  own ' CpusPerTres=' SLURM_CPUS_PER_GPU
  own ' NtasksPerN:B:S:C=[1-9]' SLURM_NTASKS_PER_NODE
  own ' MinMemoryNode=[1-9]' SLURM_MEM_PER_NODE # srun takes only one of these
  own ' MinMemoryCPU=[1-9]' SLURM_MEM_PER_CPU
  own ' MemPerTres=' SLURM_MEM_PER_GPU
  [[ ! $record =~ ' Restarts='([0-9]+) ]] || export SLURM_RESTART_COUNT="${BASH_REMATCH[1]}"
  if [ -n "${SLURM_NTASKS:-}" ] && [[ $record =~ ' NumTasks='([0-9]+) ]]; then
    export SLURM_NTASKS="${BASH_REMATCH[1]}" SLURM_NPROCS="${BASH_REMATCH[1]}"
  fi
fi
# A batch script is no step: called in one, its layout is here too
[ -z "${SLURM_STEP_ID:-}" ] || unset SLURM_DISTRIBUTION ${!SLURM_CPU_BIND*} ${!SLURM_STEP_*}

# One task of an array goes by ARRAY_TASK: the number of its last task is the array's own, and would mean all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

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
      requeued=''
      refusal="Slurm refuses the requeue ($said); submit again to continue: every argument the same"
      return 1
      ;;
    esac
  done
  requeued=''
  refusal="not requeued: Slurm's controller does not answer; submit again to continue: every argument the same"
  return 1
}

start_failed() { # $1: what failed before the attempt began (empty: the log says it), $2: the exit code
  # Where the job has started before, its set-up is proven, and this node or a file system is in trouble: it is
  # requeued, until as many starts in a row have failed as attempts may bring no checkpoint. They are counted in the
  # job's own log, to which Slurm appends: the run's folder may be what is not there.
  local failed log=/proc/$$/fd/1
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ ! -f "$log" ]; then
    [ -z "$1" ] || say "$1"
    exit "$2"
  fi
  say "the start failed on $(hostname)${1:+: $1}"
  failed=$(awk '/: the start failed on / {n++} /: job [^ ]+, restart [0-9]+: / {n = 0} END {print n}' "$log")
  [ "$failed" -lt "${AMCLIP_MAX_STALLS:-3}" ] || give_up "$failed starts in a row failed (AMCLIP_MAX_STALLS)" "$2"
  requeue_job "it has started before" || give_up "$refusal" "$2"
  exit 0
}

cd "$SLURM_SUBMIT_DIR" || start_failed "cannot enter $SLURM_SUBMIT_DIR on $(hostname)" 2
# Words of the environment are split at blanks. Kept by other names: sweep.sbatch reads this file twice
container_words=${container_words-${AMCLIP_CONTAINER:-}} srun_words=${srun_words-${AMCLIP_SRUN:-}}
unset AMCLIP_CONTAINER AMCLIP_SRUN
read -ra AMCLIP_CONTAINER <<<"$container_words"
read -ra AMCLIP_SRUN <<<"$srun_words"
site=${AMCLIP_SITE:-$AMCLIP_HOME/slurm/sites/${SLURM_CLUSTER_NAME:-}.env}
[ -f "$site" ] || [ -n "${AMCLIP_SITE:-}" ] || site=${XDG_CONFIG_HOME:-$HOME/.config}/amclip/${SLURM_CLUSTER_NAME:-}.env
if [ -f "$site" ]; then
  set +u # conda's and modules' own scripts read variables that are not set
  # shellcheck source=sites/example.env
  . "$site"
  set -u
elif [ -n "${AMCLIP_SITE:-}" ]; then
  start_failed "no site file at $AMCLIP_SITE (AMCLIP_SITE)" 2
fi
venv=${AMCLIP_VENV:-$AMCLIP_HOME/.venv}
[ -n "${AMCLIP_VENV:-}" ] || [ -x "$venv/bin/python" ] || venv=${VIRTUAL_ENV:-$venv} # active where sbatch was called
python=${AMCLIP_PYTHON:-}
[ -n "$python${AMCLIP_VENV:-}" ] || python=${submit_python:-} # which need be no environment's
python=${python:-$venv/bin/python}
if [ ${#AMCLIP_CONTAINER[@]} = 0 ] && [ ${#AMCLIP_SRUN[@]} = 0 ] && ! command -v "$python" >/dev/null; then
  start_failed "no Python at $python: run \`make setup\` in $AMCLIP_HOME, or set AMCLIP_VENV or AMCLIP_SITE" 2
fi
export PYTHONUNBUFFERED=1
export SLURM_EXPORT_ENV=ALL # submitted with --export=NONE, srun would hand the ranks nothing of what is set here

# The job's own words about GPUs and tasks are in srun's environment and would go into a small step's request too, which
# Slurm then refuses: all of `--gpus=N` on one node, a task for each GPU.
bare_srun=(env -u SLURM_GPUS -u SLURM_GPUS_PER_NODE -u SLURM_GPUS_PER_TASK -u SLURM_NTASKS_PER_GPU
  -u SLURM_TRES_PER_TASK -u SLURM_CPUS_PER_GPU srun --overlap)
once_gpus=(--gres=none)

once() { # runs one command in the run's environment, on this node; without GPUs, unless once_gpus is empty
  # once_exec=exec: in the place of the shell that calls it, so that a signal to `once ... &` reaches the command
  if [ ${#AMCLIP_SRUN[@]} -gt 0 ]; then
    ${once_exec:-} "${bare_srun[@]}" --nodes=1 --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
      ${once_gpus[@]+"${once_gpus[@]}"} "${AMCLIP_SRUN[@]}" "$@"
  else
    ${once_exec:-} ${AMCLIP_CONTAINER[@]+"${AMCLIP_CONTAINER[@]}"} "$@"
  fi
}
