"""The sandbox's configuration: slurm.conf, gres.conf and slurmdbd.conf for a shape (pure).

Every path is inside the sandbox's folder and every port is explicit, so two sandboxes never conflict.
"""

from dataclasses import dataclass
from pathlib import Path

CLUSTER = "sandbox"
ACCOUNT = "sandbox"
DATABASE = "slurm_accounting"
NODE = "sandbox"  # nodes are called sandbox0, sandbox1, ...


@dataclass(frozen=True, kw_only=True)
class ClusterShape:
    """The cluster that the sandbox simulates. It may have more CPUs, memory and GPUs than this machine."""

    nodes: int = 4
    gpus: int = 8
    gpu_type: str = ""
    cpus: int = 64
    memory_gb: int = 512
    # (name, priority tier): a job of a higher tier preempts lower ones. The first is the default partition.
    partitions: tuple[tuple[str, int], ...] = (("low", 1), ("high", 10))
    features: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()

    def node_names(self) -> list[str]:
        return [f"{NODE}{index}" for index in range(self.nodes)]


@dataclass(frozen=True, kw_only=True)
class SlurmFiles:
    """Where the sandbox lives on this machine."""

    folder: Path
    sockets: Path  # folder of the sockets: `folder` itself, unless its path is too long for a socket
    user: str
    host: str
    version: tuple[int, int]
    controller_port: int
    database_port: int | None  # None: no accounting
    node_ports: tuple[int, ...]
    first_job_id: int


def slurm_conf(shape: ClusterShape, files: SlurmFiles) -> str:
    """The configuration that daemons and clients share."""
    return "\n".join(
        [*_controller(files), *_scheduling(), *_accounting(files), *_nodes(shape, files), *_partitions(shape), ""]
    )


def gres_conf(shape: ClusterShape, files: SlurmFiles) -> str:
    """GPUs are plain files; Slurm counts and allocates them like real ones."""
    if not shape.gpus:
        return "AutoDetect=off\n"
    kind = f" Type={shape.gpu_type}" if shape.gpu_type else ""
    return f"AutoDetect=off\nName=gpu{kind} File={files.folder}/gpus/gpu[0-{shape.gpus - 1}]\n"


def slurmdbd_conf(files: SlurmFiles) -> str:
    """The accounting daemon; MariaDB listens on a socket that MYSQL_UNIX_PORT names, not on a port."""
    folder = files.folder
    return f"""AuthType=auth/munge
AuthInfo=socket={files.sockets}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={files.database_port}
SlurmUser={files.user}
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/logs/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={files.user}
StorageLoc={DATABASE}
"""


def cgroup_conf(files: SlurmFiles) -> str:
    """From 24.05 slurmd needs its own cgroup unless this turns it off; older versions don't know the option."""
    return "CgroupPlugin=disabled\n" if files.version >= (24, 5) else ""


def _controller(files: SlurmFiles) -> list[str]:
    folder = files.folder
    return [
        f"ClusterName={CLUSTER}",
        f"SlurmctldHost={files.host}(127.0.0.1)",
        f"SlurmctldPort={files.controller_port}",
        f"SlurmUser={files.user}",
        f"SlurmdUser={files.user}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # A requeued job waits until its credential expires before it starts again; the default is two minutes.
        f"AuthInfo=socket={files.sockets}/munge.socket,cred_expire=10",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={files.sockets}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/logs/slurmctld.log",
        f"SlurmdLogFile={folder}/logs/slurmd-%n.log",
        f"PlugStackConfig={folder}/plugstack.conf",
        "MailProg=/bin/true",
        "MpiDefault=none",
        "ReturnToService=2",
        "TreeWidth=65533",
        "MessageTimeout=30",
        "KillWait=10",
        "PropagateResourceLimits=NONE",
        # A job's port follows from its id, and all sandboxes of a machine share 127.0.0.1.
        f"FirstJobId={files.first_job_id}",
    ]


def _scheduling() -> list[str]:
    return [
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "SlurmdParameters=config_overrides",
        "GresTypes=gpu",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5",
        "EnforcePartLimits=ALL",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
    ]


def _accounting(files: SlurmFiles) -> list[str]:
    if files.database_port is None:
        return ["AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePass={files.sockets}/munge.socket",  # with munge this is where the socket lies
        f"AccountingStoragePort={files.database_port}",
        "AccountingStorageEnforce=associations,limits,qos",
        "AccountingStorageTRES=gres/gpu",
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherFrequency=task=10",
    ]


def _nodes(shape: ClusterShape, files: SlurmFiles) -> list[str]:
    kind = f"{shape.gpu_type}:" if shape.gpu_type else ""
    gres = f" Gres=gpu:{kind}{shape.gpus}" if shape.gpus else ""
    features = f" Features={','.join(shape.features)}" if shape.features else ""
    return [
        f"NodeName={name} NodeHostname={files.host} NodeAddr=127.0.0.1 Port={port} CPUs={shape.cpus} "
        f"RealMemory={shape.memory_gb * 1024}{gres}{features} State=UNKNOWN"
        for name, port in zip(shape.node_names(), files.node_ports, strict=True)
    ]


def _partitions(shape: ClusterShape) -> list[str]:
    top = max(tier for _, tier in shape.partitions)
    lines = []
    for index, (name, tier) in enumerate(shape.partitions):
        mode = "OFF" if tier == top else "REQUEUE GraceTime=30"
        default = " Default=YES" if index == 0 else ""
        lines.append(
            f"PartitionName={name} Nodes=ALL MaxTime=INFINITE PriorityTier={tier} PreemptMode={mode}{default}"
        )
    return lines
