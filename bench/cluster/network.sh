#!/bin/sh
# Measures tensor and pipeline parallel on three simulated hosts of this machine, connected by a network with a given delay and rate.
#     bench/cluster/network.sh MODEL FOLDER        (run by make test-cluster)
#     bench/cluster/network.sh tinyllama-1.1b FOLDER        random int8 weights of a shape that build/bench knows
# Hosts are network namespaces with their own host names; bench/cluster/wire.c simulates the network; MPI uses TCP. Writes network.csv,
# network.md and, if matplotlib is installed, network.png to FOLDER. Needs root, namespaces and /dev/net/tun; without them it prints
# "skipped" and exits with 0. MBITS, DELAYS, PROMPT, TOKENS and ROUNDS select the measurements.
set -eu
cd "$(dirname "$0")/../.."
model=$1 folder=$2
mkdir -p "$folder"
if [ -z "${IN_NAMESPACE:-}" ]; then
    for what in 'ip -V' 'test -c /dev/net/tun' 'unshare --net --mount true'; do
        $what >/dev/null 2>&1 || { echo "skipped: '$what' fails, but it is needed to simulate hosts with a network"; exit 0; }
    done
    # Devices, mounts and processes disappear with these namespaces.
    IN_NAMESPACE=1 exec unshare --net --mount --pid --fork --mount-proc "$0" "$@"
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mount -t tmpfs none /run # ip stores the names of namespaces there
cc -O2 -o "$dir/wire" bench/cluster/wire.c
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# mpirun calls this instead of ssh:  HOST COMMAND...
cat >"$dir/reach" <<'END'
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=h${1##*.}
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
END
chmod +x "$dir/reach"
for i in 1 2 3; do ip netns add h$i; done

connect() { # DELAY_US MBIT_S
    "$dir/wire" "$1" "$2" 3 >"$dir/ready" &
    wire=$!
    until [ -s "$dir/ready" ]; do sleep 0.05; done
    for i in 1 2 3; do
        ip link set wire$i netns h$i
        ip -n h$i link set lo up
        ip -n h$i addr add 10.9.0.$i/24 dev wire$i
        ip -n h$i link set wire$i mtu 9000 up
    done
}
disconnect() {
    kill "$wire"
    wait "$wire" 2>/dev/null || true
    : >"$dir/ready"
}
on_hosts() { # N COMMAND...
    hosts=10.9.0.1
    [ "$1" -lt 2 ] || hosts=$hosts,10.9.0.2
    [ "$1" -lt 3 ] || hosts=$hosts,10.9.0.3
    n=$1
    shift
    ip netns exec h1 unshare --uts sh -c 'hostname h1; exec "$@"' sh mpirun -n "$n" --host $hosts --bind-to none \
        --mca plm rsh --mca plm_rsh_agent "$dir/reach" --mca oob_tcp_if_include 10.9.0.0/24 --mca btl self,tcp \
        --mca btl_tcp_if_include 10.9.0.0/24 --mca pml ob1 --mca mpi_yield_when_idle 1 "$@"
}
# Prints the round trip time in microseconds, the minimum of 20 pings.
round_trip() {
    ip netns exec h1 ping -q -c 20 -i 0.01 10.9.0.2 2>/dev/null | sed -n 's/.*= \([0-9.]*\)\/.*/\1/p' | awk '{ printf "%.0f", 1000 * $1 }'
}
rates() { # N OPTIONS...    tokens per second of decoding and of a prompt
    n=$1
    shift
    if [ -e "$model" ]; then set -- -m "$model" --dtype file "$@"; else set -- --random "$model" --dtype int8 "$@"; fi
    on_hosts "$n" build/mpi/bench -t 1 -p "${PROMPT:-128}" -n "${TOKENS:-32}" -r "${ROUNDS:-3}" -o csv "$@" 2>"$dir/log" |
        awk -F, 'NR == 2 { print $6 "," $5 }' | grep . || { cat "$dir/log" >&2; exit 1; }
}

echo "delay_us,mbit_s,round_trip_us,ranks,decode_tok_s,prefill_tok_s" >"$folder/network.csv"
for mbit in ${MBITS:-10000 1000}; do
    for delay in ${DELAYS:-0 50 500}; do
        connect "$delay" "$mbit"
        trip=$(round_trip)
        for ranks in alone tp pp; do
            options="--$ranks 2" n=2
            [ $ranks != alone ] || { options='' n=1; [ -z "${alone:-}" ] || continue; }
            row=$delay,$mbit,$trip,$ranks,$(rates $n $options)
            [ $ranks != alone ] || alone=$row
            echo "$row" | tee -a "$folder/network.csv"
        done
        disconnect
    done
done
picture=
! python3 -c 'import matplotlib' 2>/dev/null || picture=$folder/network.png
python3 bench/cluster/draw.py "$folder/network.csv" $picture >"$folder/network.md"
cat "$folder/network.md"
