#!/bin/sh
# Runs the jobs of bench/slurm on a Slurm cluster of three nodes, all on this machine. Each job must print its figures, and one must
# resume after a node is killed.    bench/cluster/slurm.sh        (run by make test-cluster; prints TAP)
# Needs root, and the packages slurmctld, slurmd, slurm-client, munge and openmpi-bin. All daemons and their files are in separate
# namespaces and disappear with the script.
set -eu
cd "$(dirname "$0")/../.."
if [ -z "${IN_NAMESPACE:-}" ]; then
    unshare --net --mount true 2>/dev/null || { echo "1..0 # SKIP unshare fails: it needs root, and a kernel with namespaces"; exit 0; }
    IN_NAMESPACE=1 exec unshare --net --mount --uts --pid --fork --mount-proc "$0" "$@"
fi
. tests/tap.sh
dir=$(mktemp -d)
trap 'rm -rf "$dir" llm-*-[0-9]*.out "$answers"' EXIT
answers=llm-hellaswag.answers
model=${MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# ---- The cluster ----

hostname slurmhost
for place in /run /var/spool /var/log /var/lib/munge /etc/munge /etc/slurm; do mount -t tmpfs none $place; done
printf '127.0.0.1 localhost\n10.9.0.1 slurmhost\n' >"$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts
ip link set lo up
ip link add name out1 type veth peer name out2 # MPI does not use the loopback device
ip addr add 10.9.0.1/24 dev out1
ip link set out1 up
ip link set out2 up
mkdir -p /run/munge /var/log/munge /var/spool/slurmctld /var/spool/slurmd /run/slurm
dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 2>/dev/null
chown -R munge:munge /etc/munge /var/lib/munge /var/log/munge /run/munge
chmod 755 /run/munge
chmod 400 /etc/munge/munge.key
cat >/etc/slurm/slurm.conf <<'END'
ClusterName=test
SlurmctldHost=slurmhost(10.9.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd/%n
SlurmctldPidFile=/run/slurm/ctld.pid
SlurmdPidFile=/run/slurm/d-%n.pid
SlurmctldLogFile=/var/log/ctld.log
SlurmdLogFile=/var/log/d-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
NodeName=n[1-3] NodeHostname=slurmhost NodeAddr=10.9.0.1 Port=[17001-17003] CPUs=4 RealMemory=4000
PartitionName=all Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP
END
runuser -u munge -- /usr/sbin/munged
slurmctld
for i in 1 2 3; do slurmd -N n$i; done
is_idle() { [ "$(sinfo -h -N -n "$1" -o %T)" = idle ]; }
all_idle() { is_idle n1 && is_idle n2 && is_idle n3; }

# ---- Jobs ----

# srun's MPI does not work with several nodes on one host, so mpirun starts the processes through Slurm.
export LAUNCH="mpirun --oversubscribe --bind-to none --mca btl self,tcp --mca btl_tcp_if_include 10.9.0.0/24 --mca oob_tcp_if_include 10.9.0.0/24"
export MODEL="$model" SAMPLES=1 TOKENS=16
submit() { job=$(sbatch --parsable --exclusive "$@"); }
state() { scontrol show job "$job" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
is_over() { case $(state) in PENDING | RUNNING | COMPLETING | REQUEUED) return 1 ;; esac }
ends_well() { wait_until is_over && wait_until is_over && [ "$(state)" = COMPLETED ] || { cat "$output"; return 1; }; }
is_there() { grep -q "$1" "$output"; }
prints_figures() { # NAME
    submit "bench/slurm/run.$1.slurm"
    output=llm-$1-$job.out
    ends_well && is_there '^Average tokens/sec: [0-9]' && is_there '^Bandwidth achieved: [0-9]' && is_there '^Memory used: [0-9]'
}
each_rank() { # N NAME
    prints_figures "$2" && [ "$(grep -c '^rank [0-9]*: .* GB/s, .* GB' "$output")" = "$1" ] &&
        is_there "^Job $job on n\[1-$1\]"
}

has_answers() { grep -q '^[0-9]' "$answers" 2>/dev/null; }
was_restarted() { is_there 'started 2 times'; }
# Kills a node with all its processes. Slurm's daemons of a node have its name in their commands; the jobs are their children.
kill_node() { # NAME
    for daemon in $(pgrep -f "slurmd -N $1\$") $(pgrep -f "slurmstepd: .*") $(pgrep -x orted); do
        node=$(tr '\0' '\n' <"/proc/$daemon/environ" | sed -n 's/^SLURMD_NODENAME=//p')
        case $(tr '\0' ' ' <"/proc/$daemon/cmdline") in *"-N $1"*) node=$1 ;; esac
        [ "$node" = "$1" ] || continue
        pkill -9 -P "$daemon" || true
        kill -9 "$daemon" 2>/dev/null || true
    done
    scontrol update nodename="$1" state=down reason="killed by the test"
}
node_dies() {
    submit bench/slurm/run.hellaswag.slurm
    output=llm-hellaswag-$job.out
    wait_until has_answers && kill_node n2 && wait_until was_restarted && ends_well &&
        is_there "^Job $job on n\[1,3\], started 2 times"
}
same_answers() {
    build/mpi/hellaswag -m "$model" -d tests/hellaswag.jsonl --results "$dir/alone" >/dev/null 2>&1
    [ "$(sort "$dir/alone")" = "$(sort "$answers")" ]
}
comes_back() { slurmd -N n2 && wait_until is_idle n2; }

check "three nodes start" wait_until all_idle
for name in baseline compile quantize speculative; do check "job $name" prints_figures $name; done
check "tensor parallel over two nodes" each_rank 2 tp
check "a pipeline over three nodes" each_rank 3 pp
export HELLASWAG="-d tests/hellaswag.jsonl --batch 16"
check "after a node is killed, the job resumes on another" node_dies
check "its answers are the same as from one process" same_answers
check "the node comes back" comes_back
finish
