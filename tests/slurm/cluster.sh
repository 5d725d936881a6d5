#!/usr/bin/env bash
# A private SLURM of two nodes on this machine, for tests: cluster.sh up|down|env [FOLDER]
#
#   up    starts munge, MariaDB, slurmdbd, slurmctld and two slurmd, and waits until both nodes are
#         idle and sacct answers. Installs Debian's packages where they are missing. Exit 77: they
#         can't be had here (the last line says why). Exit 1: a daemon failed (its log is printed).
#   env   prints what a shell needs to talk to it: export SLURM_CONF=... and a folder before PATH
#   down  cancels its jobs, ends its own daemons (by recorded number and start time), removes FOLDER.
#
# Everything lies under FOLDER (build/slurm): keys, sockets, database, configuration, logs. Ports are
# free ones. Another SLURM, munge or MariaDB of this machine is neither read nor touched. `up` and
# `down` may be called again at any time. A node is declared with 4 CPUs, 8 GB and 2 GPUs (files that
# stand for devices), whatever the machine has; memory is watched each second and its limits kill.
set -euo pipefail

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
skip() { echo "cluster.sh: $*" >&2; exit 77; }
(($# == 1 || $# == 2)) || usage

ROOT="$(cd "$(dirname "$0")/../.." && pwd)"
FOLDER="$(realpath -m "${2:-$ROOT/build/slurm}")"
PATH="$PATH:/usr/sbin:/sbin"
MARK="$FOLDER/.headroom-cluster" # only a folder with it is ever removed
PROGRAMS=(slurmctld slurmd slurmdbd sbatch sacct munged mariadbd mariadb-install-db)
PACKAGES=(slurmctld slurmd slurmdbd slurm-client munge mariadb-server)
PATIENCE=90 # seconds

export SLURM_CONF="$FOLDER/slurm.conf"
for name in ${!SLURM_*} ${!SBATCH_*}; do [[ $name == SLURM_CONF ]] || unset "$name"; done

install_packages() {
    [[ $(uname -s) == Linux ]] || skip "SLURM runs on Linux alone"
    ((EUID == 0)) || skip "a private SLURM with memory limits needs root"
    local missing=0 program
    for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || missing=1; done
    ((missing)) || return 0
    command -v apt-get >/dev/null || skip "no apt-get to install ${PACKAGES[*]} with"
    # systemd would start the packages' own daemons on this machine.
    [[ ! -d /run/systemd/system ]] || skip "install ${PACKAGES[*]} yourself: systemd would start them"
    DEBIAN_FRONTEND=noninteractive apt-get update -qq >"$FOLDER/apt.log" 2>&1 || true
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${PACKAGES[@]}" >>"$FOLDER/apt.log" 2>&1 ||
        skip "the packages can't be had: $(grep '^E:' "$FOLDER/apt.log" | head -n 1)"
}

started() { # when a process began, its identity beside the number
    sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20
}

start() { # NAME COMMAND...: in a session of its own, so that it outlives the shell
    local name=$1
    shift
    setsid "$@" >"$FOLDER/log/$name.out" 2>&1 </dev/null &
    echo "$! $(started $!) $name" >>"$FOLDER/pids"
}

failed() { # WHAT: with the end of every log
    echo "cluster.sh: $*" >&2
    tail -n 15 "$FOLDER"/log/* >&2 || true
    end_all >&2
    exit 1
}

wait_for() { # WHAT COMMAND...
    local what=$1 end=$((SECONDS + PATIENCE))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || failed "$what did not come within $PATIENCE s"
        sleep 0.3
    done
}

free_ports() {
    python3 - "$1" <<'PYTHON'
import socket, sys
held = [socket.create_server(("", 0)) for _ in range(int(sys.argv[1]))]
print(*(one.getsockname()[1] for one in held))
PYTHON
}

configure() {
    local controller database first second host device
    read -r controller database first second < <(free_ports 4)
    host=$(hostname -s)
    mkdir -p "$FOLDER"/{bin,log,state,munge,mysql,dev,spool.one,spool.two}
    for device in one0 one1 two0 two1; do touch "$FOLDER/dev/$device"; done
    chmod 755 "$FOLDER" "$FOLDER/munge"
    head -c 128 /dev/urandom >"$FOLDER/munge/key"
    chmod 600 "$FOLDER/munge/key"
    cat >"$FOLDER/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge/socket
DbdHost=localhost
DbdPort=$database
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
PidFile=$FOLDER/slurmdbd.pid
LogFile=$FOLDER/log/slurmdbd.log
CONF
    chmod 600 "$FOLDER/slurmdbd.conf"
    cat >"$FOLDER/gres.conf" <<CONF
AutoDetect=off
NodeName=one Name=gpu File=$FOLDER/dev/one[0-1]
NodeName=two Name=gpu File=$FOLDER/dev/two[0-1]
CONF
    cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=headroom
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=20
CredType=cred/munge
MpiDefault=none
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool.%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.%n.log
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,sched_min_interval=0
DefMemPerCPU=1000
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$database
AccountingStoragePass=$FOLDER/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
GresTypes=gpu
KillWait=5
MinJobAge=600
SlurmdTimeout=30
ReturnToService=1
SlurmdParameters=config_overrides
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=$first CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=$second CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=all Nodes=one,two Default=YES MaxTime=INFINITE State=UP
CONF
}

# Snakemake's job step clears SLURM's variables before it calls srun, SLURM_CONF among them.
wrap_srun() {
    printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' "$SLURM_CONF" "$(command -v srun)" \
        >"$FOLDER/bin/srun"
    chmod +x "$FOLDER/bin/srun"
}

start_all() {
    start munged munged --foreground --force --num-threads=4 --socket="$FOLDER/munge/socket" \
        --key-file="$FOLDER/munge/key" --pid-file="$FOLDER/munge/pid" \
        --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/munge/seed"
    mariadb-install-db --no-defaults --user=root --datadir="$FOLDER/mysql" --skip-test-db \
        >"$FOLDER/log/install-db.out" 2>&1 || failed "the database could not be made"
    # Without passwords: its socket lies in a folder of root's, and it listens nowhere else.
    chmod 700 "$FOLDER/mysql"
    start mariadbd mariadbd --no-defaults --user=root --datadir="$FOLDER/mysql" --skip-networking \
        --skip-grant-tables --socket="$FOLDER/mysql/socket" --pid-file="$FOLDER/mysql/pid" \
        --innodb-buffer-pool-size=32M --innodb-lock-wait-timeout=900
    wait_for "munge" test -S "$FOLDER/munge/socket"
    wait_for "the database" test -S "$FOLDER/mysql/socket"
    start slurmdbd env SLURM_CONF="$FOLDER/slurmdbd.conf" \
        MYSQL_UNIX_PORT="$FOLDER/mysql/socket" slurmdbd -D
    wait_for "slurmdbd" sacctmgr -n show cluster
    sacctmgr -i -Q add cluster headroom >"$FOLDER/log/sacctmgr.out" 2>&1 || true
    start slurmctld slurmctld -D -f "$SLURM_CONF"
    wait_for "slurmctld" scontrol ping
    start slurmd.one slurmd -D -N one -f "$SLURM_CONF"
    start slurmd.two slurmd -D -N two -f "$SLURM_CONF"
    wait_for "idle nodes" idle
    wait_for "accounting" accounted
}

idle() { [[ $(sinfo -h -o "%T %D") == "idle 2" ]]; }

accounted() { # a job of no work is found by sacct
    local job
    job=$(timeout 20 sbatch --parsable --wait -o /dev/null --wrap true) || return 1
    [[ $(sacct -n -X -P -o State -j "$job") == COMPLETED ]]
}

stepds() { # the processes that watch this cluster's jobs, and none of another's
    local process
    for process in /proc/[0-9]*; do
        [[ $(cat "$process/comm" 2>/dev/null) == slurmstepd ]] || continue
        grep -qzxF "SLURM_CONF=$SLURM_CONF" "$process/environ" 2>/dev/null && echo "${process##*/}"
    done
    return 0
}

end_all() {
    [[ -f $FOLDER/pids ]] || return 0
    local pid since name end left
    timeout 20 scancel -u root >/dev/null 2>&1 || true
    end=$((SECONDS + 10))
    while [[ -n $(stepds) ]] && ((SECONDS < end)); do sleep 0.3; done
    for pid in $(stepds); do kill -9 "$pid" 2>/dev/null || true; done
    tac "$FOLDER/pids" | while read -r pid since name; do
        [[ -n $since && $(started "$pid") == "$since" ]] || continue
        kill "$pid" 2>/dev/null || true
        end=$((SECONDS + 15))
        while [[ $(started "$pid") == "$since" ]]; do
            ((SECONDS < end)) || kill -9 "$pid" 2>/dev/null || true
            sleep 0.1
        done
    done
    rm -f "$FOLDER/pids"
}

alive() {
    local pid since name
    [[ -f $FOLDER/pids ]] || return 1
    while read -r pid since name; do
        [[ -n $since && $(started "$pid") == "$since" ]] || return 1
    done <"$FOLDER/pids"
    timeout 10 sinfo >/dev/null 2>&1
}

up() {
    ! alive || return 0
    down
    if [[ -e $FOLDER ]]; then
        echo "cluster.sh: $FOLDER is not this script's: name another folder" >&2
        exit 2
    fi
    ((${#FOLDER} < 90)) || skip "the name of $FOLDER is too long for a socket in it"
    mkdir -p "$FOLDER"
    touch "$MARK"
    install_packages
    configure
    wrap_srun
    start_all
}

down() {
    [[ -f $MARK ]] || return 0
    end_all
    rm -rf "$FOLDER"
}

case $1 in
up) up ;;
down) down ;;
env) printf 'export SLURM_CONF=%q PATH=%q:"$PATH"\n' "$SLURM_CONF" "$FOLDER/bin" ;;
*) usage ;;
esac
