#!/bin/bash
# Two Slurm nodes on one machine, for the tests: cluster.sh start|stop DIR (as root). Built from the project's shared slurm_cluster.sh.
set -eu
mkdir -p "$2"; D=$(readlink -f "$2"); H=$(hostname -s); export SLURM_CONF=$D/slurm.conf
case $1 in
start)
  mkdir -p $D/ctld $D/n1 $D/n2 $D/munge; chmod 755 $D $D/munge
  (umask 077; head -c 128 /dev/urandom > $D/munge/key)
  cat > $D/slurm.conf <<CONF
ClusterName=ci
SlurmctldHost=$H(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge/sock
StateSaveLocation=$D/ctld
SlurmdSpoolDir=$D/%n
SlurmctldPidFile=$D/ctld.pid
SlurmdPidFile=$D/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MailProg=/bin/true
NodeName=n1 NodeAddr=127.0.0.11 Port=16821 CPUs=1
NodeName=n2 NodeAddr=127.0.0.12 Port=16822 CPUs=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=p Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=hi Nodes=n1,n2 MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONF
  { grep -v -w -e n1 -e n2 /etc/hosts; echo 127.0.0.11 n1; echo 127.0.0.12 n2; } > $D/hosts
  munged -F --key-file=$D/munge/key --socket=$D/munge/sock --pid-file=$D/munge/pid --seed-file=$D/munge/seed --log-file=$D/munge/log >$D/munged.out 2>&1 & echo $! > $D/pids
  for i in $(seq 50); do [ -S $D/munge/sock ] && break; sleep .1; done
  slurmctld -D -c >$D/ctld.out 2>&1 & echo $! >> $D/pids
  for n in n1 n2; do
    unshare -m -u -p -f --kill-child --mount-proc bash -c "hostname $n; mount --bind $D/hosts /etc/hosts; slurmd -D; :" >$D/$n.out 2>&1 & echo $! >> $D/pids
  done
  for i in $(seq 100); do [ "$(sinfo -h -o '%D %T' 2>/dev/null)" = "2 idle" ] && exit 0; sleep .1; done
  echo "cluster did not come up" >&2; sinfo; exit 1 ;;
stop) tac $D/pids | while read p; do kill -9 $p 2>/dev/null || true; done ;;
esac
