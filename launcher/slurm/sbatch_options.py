"""The long options of sbatch in each Slurm version, from 22.05 on, the oldest supported.

They come from SchedMD's change logs and manual pages. tests/slurm compares them with the installed sbatch.
"""

import re

OLDEST = "22.05"
NEWEST = "25.05"
SLURM_22_05 = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
distribution error exclude exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq
gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name
kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus
network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu
ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer
priority profile propagate qos quiet reboot requeue reservation signal sockets-per-node spread-job switches
test-only thread-spec threads-per-core time time-min tmp uid use-min-nodes verbose wait wait-all-nodes wckey
wrap
"""
SINCE = {
    "23.02": ("container-id", "extra", "tres-per-task"),
    "23.11": ("tres-bind",),
    "24.05": ("resv-ports", "segment", "stepmgr"),
    "24.11": ("oom-kill-step",),
    "25.05": ("consolidate-segments", "spread-segments"),
}
UNTIL = {  # the first version without them
    "23.11": ("export-file",),
}


def known_options(slurm_version: str) -> frozenset[str]:
    """The long options that sbatch of this version takes."""
    version = number(slurm_version)
    later = [option for since, options in SINCE.items() if number(since) <= version for option in options]
    gone = [option for until, options in UNTIL.items() if number(until) <= version for option in options]
    return frozenset(SLURM_22_05.split()).union(later).difference(gone)


def number(version: str) -> tuple[int, ...]:
    """`23.11.4` as (23, 11), which decides capabilities; (0, 0) for what is no version."""
    match = re.match(r"(\d+)\.(\d+)", version, re.ASCII)
    return (int(match[1]), int(match[2])) if match else (0, 0)
