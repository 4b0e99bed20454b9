# What the jobs of this folder have in common: they are run in the folder that they were submitted from. Variables that are set
# when a job is submitted have effect:
MODEL=${MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
SAMPLES=${SAMPLES:-5}  # runs that are averaged
TOKENS=${TOKENS:-200}  # in each of them
HELLASWAG=${HELLASWAG:-} # more options of build/mpi/hellaswag, such as --limit 400
LAUNCH=${LAUNCH:-srun} # what starts a process on each machine; where Slurm's srun and MPI do not work together, mpirun
cd "${SLURM_SUBMIT_DIR:-.}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} OMP_PROC_BIND=true

# `module load gcc openmpi`, or what else brings compiler and MPI, goes here where there are modules.

echo "Job ${SLURM_JOB_ID:-none} on ${SLURM_JOB_NODELIST:-this machine}, started $((${SLURM_RESTART_COUNT:-0} + 1)) times"

run() { srun --ntasks=1 "$@"; }

# A process that has lost a machine ends before Slurm knows of it: the job asks to be put back itself, up to three times.
again() {
    [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] || exit 1
    scontrol requeue "$SLURM_JOB_ID"
}

# One process on each of the job's machines, on all of its cores.
ranks() {
    case $LAUNCH in
    srun) srun --mpi="${SLURM_MPI:-pmix}" "$@" ;;
    *) $LAUNCH -n "$SLURM_NTASKS" "$@" ;;
    esac
}
