#!/usr/bin/env bash
# Merge three 13B-shaped float16 checkpoints in a memory cgroup of 1 GiB, page cache counted.
#
#     scripts/prove_low_memory.sh                      task_arithmetic, ties and slerp; 27 GB of disk
#     scripts/prove_low_memory.sh --shape llama-0.1b   the same with small models, in seconds
#
# Inputs are sparse files (zeros that take no disk), outputs are real and deleted one by one.
# For every method it prints the time, the peaks of process and cgroup, and what `plan` said.
# Exit 1 if a run is killed or fails, or takes more memory than its limit or the plan allows.
#
# Options:
#   --shape NAME       of scripts/make_synthetic_checkpoint.py (default: llama2-13b)
#   --methods "A B"    (default: "task_arithmetic ties slerp")
#   --limit MIB        of the cgroup (default: 1024)
#   --memory SIZE      what lazymerge is allowed (default: 700MiB); "default": it decides itself
#   --work DIR         where the files go, in a folder of their own (default: $TMPDIR or /tmp)
#   --no-fsync         do not wait until the output is on disk
#   --without-cgroup   judge by the peak resident set alone
#   -- SIZES           more for make_synthetic_checkpoint.py, such as --layers 2
#   PYTHON             the interpreter that has lazymerge (default: .venv's, or python3)
#
# The cgroup is made below the one that this shell is in (or, with cgroup v2, where it may be made
# next), and removed at the end. Where none can be made the script says so.

set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
shape=llama2-13b
methods="task_arithmetic ties slerp"
limit_mib=1024
memory=700MiB
work=${TMPDIR:-/tmp}
fsync=()
sizes=()
use_cgroup=yes

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

wrong() {
    echo "prove_low_memory: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --shape | --methods | --limit | --memory | --work)
            [ $# -ge 2 ] || wrong "$1 needs a value"
            case $1 in
                --shape) shape=$2 ;;
                --methods) methods=$2 ;;
                --limit) limit_mib=$2 ;;
                --memory) memory=$2 ;;
                --work) work=$2 ;;
            esac
            shift 2
            ;;
        --no-fsync) fsync=(--no-fsync) && shift ;;
        --without-cgroup) use_cgroup=no && shift ;;
        --) shift && sizes=("$@") && break ;;
        -h | --help) usage && exit 0 ;;
        *) wrong "unknown option $1; --help lists them" ;;
    esac
done
[[ $limit_mib =~ ^[1-9][0-9]*$ ]] || wrong "--limit is a number of MiB, not $limit_mib"

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$repository/.venv/bin/python" ] && PYTHON=$repository/.venv/bin/python
fi
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

# ------------------------------------------------------------------------------- cleaning up

folder=""
cgroup=""
child=""

remove_cgroup() {
    [ -n "$cgroup" ] || return 0
    local attempt
    for attempt in 1 2 3 4 5 6 7 8 9 10; do # a process that has just ended is still in it
        rmdir "$cgroup" 2>/dev/null && break
        sleep 0.1
    done
    [ "$attempt" -lt 10 ] || [ ! -d "$cgroup" ] || echo "cannot remove $cgroup" >&2
    cgroup=""
}

clean_up() {
    trap - EXIT INT TERM HUP
    if [ -n "$child" ] && kill -KILL "$child" 2>/dev/null; then
        wait "$child" 2>/dev/null || true
    fi
    remove_cgroup
    [ -z "$folder" ] || rm -rf "$folder"
}

trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

mkdir -p "$work"
folder=$(mktemp -d "$work/prove-low-memory-XXXXXX")

# ------------------------------------------------------------------------------------ cgroup

# The mount point of the memory controller and our place below it, by version.
mount_v1=$(awk '$3 == "cgroup" && "," $4 "," ~ /,memory,/ { print $2; exit }' /proc/mounts 2>/dev/null || true)
mount_v2=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts 2>/dev/null || true)
place_v1=$(awk -F: '"," $2 "," ~ /,memory,/ { print $3; exit }' /proc/self/cgroup 2>/dev/null || true)
place_v2=$(awk -F: '$1 == "0" { print $3; exit }' /proc/self/cgroup 2>/dev/null || true)
limit_bytes=$((limit_mib << 20))
cgroup_version=""

# make_cgroup: sets cgroup to a new one with the limit; fails where that is not possible.
make_cgroup() {
    local parent candidate
    if [ -n "$mount_v1" ]; then
        parent=$mount_v1${place_v1%/}
        [ -d "$parent" ] || parent=$mount_v1 # a container that sees its own cgroup as the root
        candidate=$parent/lazymerge-proof-$$
        mkdir "$candidate" 2>/dev/null || return 1
        cgroup=$candidate cgroup_version=1
        { echo "$limit_bytes" >"$cgroup/memory.limit_in_bytes"; } 2>/dev/null || return 1
        # no help from swap, where the kernel counts it
        { echo "$limit_bytes" >"$cgroup/memory.memsw.limit_in_bytes"; } 2>/dev/null || true
        return 0
    fi
    [ -n "$mount_v2" ] || return 1
    parent=$place_v2
    [ -d "$mount_v2$parent" ] || parent=/
    while :; do # a cgroup with processes in it has no controllers to pass on: go up until one has
        candidate=$mount_v2${parent%/}/lazymerge-proof-$$
        if mkdir "$candidate" 2>/dev/null; then
            if [ -w "$candidate/memory.max" ] && (echo "$BASHPID" >"$candidate/cgroup.procs") 2>/dev/null; then
                cgroup=$candidate cgroup_version=2
                echo "$limit_bytes" >"$cgroup/memory.max"
                { echo 0 >"$cgroup/memory.swap.max"; } 2>/dev/null || true
                return 0
            fi
            rmdir "$candidate" 2>/dev/null || true
        fi
        [ "$parent" != / ] || return 1
        parent=$(dirname "$parent")
    done
}

counter() { # counter FILE KEY: the value behind a key of a cgroup's file, 0 where there is none
    awk -v key="$2" '$1 == key { value = $2 } END { print value + 0 }' "$cgroup/$1" 2>/dev/null || echo 0
}

cgroup_peak_bytes() {
    if [ "$cgroup_version" = 1 ]; then
        cat "$cgroup/memory.max_usage_in_bytes"
    else
        cat "$cgroup/memory.peak" 2>/dev/null || echo 0 # since Linux 5.19
    fi
}

cgroup_failures() { # how often the limit was reached (pages were then reclaimed)
    if [ "$cgroup_version" = 1 ]; then
        # where memory and swap are counted together, with the same limit, that is reached first
        cat "$cgroup/memory.failcnt" "$cgroup/memory.memsw.failcnt" 2>/dev/null |
            awk '{ sum += $1 } END { print sum + 0 }'
    else
        counter memory.events max
    fi
}

cgroup_kills() {
    if [ "$cgroup_version" = 1 ]; then
        counter memory.oom_control oom_kill
    else
        counter memory.events oom_kill
    fi
}

if [ "$use_cgroup" = no ]; then
    echo "No cgroup is used, as asked: judged by the peak resident set alone."
elif make_cgroup; then
    echo "Memory cgroup v$cgroup_version of $limit_mib MiB, page cache counted."
else
    remove_cgroup
    use_cgroup=no
    echo "Memory cgroups cannot be made here: judged by the peak resident set alone."
fi
remove_cgroup # every method gets a new one

# ------------------------------------------------------------------------------------ inputs

for name in base a b; do
    "$PYTHON" "$repository/scripts/make_synthetic_checkpoint.py" "$folder/$name" \
        --shape "$shape" --dtype float16 --shards 3 --sparse "${sizes[@]}" >/dev/null
done

# recipe METHOD: its YAML. Base, weights, density and t as the method's signature has them.
recipe() {
    "$PYTHON" - "$repository/scripts" "$folder" "$1" <<'PYTHON'
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, sys.argv[1])
import yaml
from lazymerge.methods import METHODS
from method_recipes import model_counts, recipe_for

if sys.argv[3] not in METHODS:
    sys.exit(f"there is no merge method {sys.argv[3]!r}")
signature = METHODS[sys.argv[3]].signature
folders = [Path(sys.argv[2]) / name for name in ("base", "a", "b")]
count = max(model_counts(signature, most=3))
print(yaml.safe_dump(recipe_for(signature, folders, count, random=Random(1)), sort_keys=False))
PYTHON
}

# field FILE PATH: a value of a JSON document, keys separated by dots.
field() {
    "$PYTHON" -c '
import json, sys
value = json.load(open(sys.argv[1]))
for key in sys.argv[2].split("."):
    value = value[key]
print(value)' "$1" "$2"
}

in_mib() { awk -v bytes="$1" 'BEGIN { printf "%.1f", bytes / 1048576 }'; }

# Input pages that another cgroup has been charged for would cost this one nothing.
forget_inputs() {
    local file
    for file in "$folder"/{base,a,b}/*.safetensors; do
        dd if="$file" iflag=nocache count=0 status=none 2>/dev/null || true
    done
}

memory_options=(--memory "$memory")
[ "$memory" != default ] || memory_options=()

# -------------------------------------------------------------------------------------- runs

failed=0
rows=()

prove() {
    local method=$1 verdict=ok code=0 began ended
    local peak=– failures=– kills=0 rss=– projected=– limit=– seconds
    recipe "$method" >"$folder/$method.yml"
    forget_inputs
    if [ "$use_cgroup" = yes ] && ! make_cgroup; then
        wrong "the cgroup could be made once and cannot be made again"
    fi
    began=$(date +%s.%N)
    (
        [ -z "$cgroup" ] || echo "$BASHPID" >"$cgroup/cgroup.procs"
        exec "$PYTHON" -m lazymerge run "$folder/$method.yml" -o "$folder/merged" --json \
            "${memory_options[@]}" "${fsync[@]}" >"$folder/report.json" 2>"$folder/messages"
    ) &
    child=$!
    wait "$child" || code=$?
    child=""
    ended=$(date +%s.%N)
    seconds=$(awk -v from="$began" -v to="$ended" 'BEGIN { printf "%.1f", to - from }')
    if [ -n "$cgroup" ]; then
        peak=$(in_mib "$(cgroup_peak_bytes)")
        failures=$(cgroup_failures)
        kills=$(cgroup_kills)
        remove_cgroup
    fi
    rm -rf "$folder/merged"
    if [ "$code" -ne 0 ]; then
        verdict="exit $code"
        [ "$code" -ne 137 ] || verdict="killed"
        sed "s/^/  $method: /" "$folder/messages" >&2
    else
        local rss_bytes projected_bytes allowed_bytes
        rss_bytes=$(field "$folder/report.json" measured_bytes)
        projected_bytes=$(field "$folder/report.json" memory.projected_bytes)
        allowed_bytes=$(field "$folder/report.json" memory.limit_bytes)
        rss=$(in_mib "$rss_bytes") projected=$(in_mib "$projected_bytes") limit=$(in_mib "$allowed_bytes")
        [ "$rss_bytes" -le "$projected_bytes" ] || verdict="more than projected"
        [ "$rss_bytes" -le "$allowed_bytes" ] || verdict="more than its limit"
        [ "$rss_bytes" -le "$limit_bytes" ] || verdict="more than $limit_mib MiB"
    fi
    [ "$kills" -eq 0 ] || verdict="killed"
    [ "$verdict" = ok ] || { verdict="**$verdict**" && failed=1; }
    rows+=("| $method | $seconds | $limit | $projected | $rss | $peak | $failures | $kills | $verdict |")
}

for method in $methods; do
    echo "$method ..." >&2
    prove "$method"
done

echo "Three checkpoints in float16, ${shape}-shaped${sizes[*]:+ (${sizes[*]})}; $(nproc) cores."
echo
echo "| method | seconds | limit MiB | projected MiB | peak resident MiB | cgroup's peak MiB | limit reached | kills | |"
echo "|---|---|---|---|---|---|---|---|---|"
printf '%s\n' "${rows[@]}"
exit $failed
