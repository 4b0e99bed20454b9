# Common part of the jobs in this folder. They run in the folder from which they were submitted. These variables can be set when a
# job is submitted:
MODEL=${MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
SAMPLES=${SAMPLES:-5}  # number of runs to average
TOKENS=${TOKENS:-200}  # tokens per run
HELLASWAG=${HELLASWAG:-} # more options of build/mpi/hellaswag, such as --limit 400
LAUNCH=${LAUNCH:-srun} # starts a process on each machine; if Slurm's srun and MPI do not work together, use mpirun
cd "${SLURM_SUBMIT_DIR:-.}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} OMP_PROC_BIND=true

# If the cluster has modules, load the compiler and MPI here, for example with `module load gcc openmpi`.

echo "Job ${SLURM_JOB_ID:-none} on ${SLURM_JOB_NODELIST:-this machine}, started $((${SLURM_RESTART_COUNT:-0} + 1)) times"

run() { srun --ntasks=1 "$@"; }

# If a machine fails, the processes end before Slurm notices the failure. So the job requeues itself, up to three times.
again() {
    [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] || exit 1
    scontrol requeue "$SLURM_JOB_ID"
}

# Starts one process on each of the job's machines, with all of its cores.
ranks() {
    case $LAUNCH in
    srun) srun --mpi="${SLURM_MPI:-pmix}" "$@" ;;
    *) $LAUNCH -n "$SLURM_NTASKS" "$@" ;;
    esac
}
