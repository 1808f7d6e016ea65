"""Slurm's reasons in words: every name of its newest version has some, and no sentence is cut."""

import pytest

from launcher.slurm import reasons

# Of job_state_reason.c in Slurm 25.11; each limit of a kind of resource stands for the others.
NAMES = """
Priority Dependency Resources PartitionNodeLimit PartitionTimeLimit PartitionDown PartitionInactive JobHeldAdmin
BeginTime Licenses AssociationJobLimit AssociationResourceLimit AssociationTimeLimit Reservation ReqNodeNotAvail
JobHeldUser NvidiaImexChannels SchedDefer NodeDown BadConstraints SystemFailure JobLaunchFailure NonZeroExitCode
TimeLimit InactiveLimit InvalidAccount InvalidQOS QOSUsageThreshold QOSJobLimit QOSResourceLimit QOSTimeLimit
RaisedSignal Cleaning Prolog QOSNotAllowed AccountNotAllowed DependencyNeverSatisfied JobHoldMaxRequeue
JobArrayTaskLimit BurstBufferResources BurstBufferStageIn BurstBufferOperation DeadLine PartitionConfig
AccountingPolicy FedJobLock OutOfMemory MaxMemPerLimit ReservationDeleted ReservationInvalid Constraints
MaxPoweredUpNodes MpiPortsBusy QOSGrpCPUMinutesLimit QOSMinCpuNotSatisfied AssocMaxJobsLimit AssocMaxSubmitJobLimit
QOSMaxCpuMinutesPerJobLimit MaxRequeue
"""
RESOURCES = (
    "Cpu",
    "Mem",
    "Memory",
    "Node",
    "GRES",
    "Energy",
    "License",
    "BB",
    "Billing",
    "Unknown",
    "Jobs",
    "SubmitJobs",
)
LIMITS = (
    *("AssocGrp{}", "AssocGrp{}Minutes", "AssocGrp{}RunMinutes", "AssocMax{}PerJob", "AssocMax{}PerNode"),
    *("AssocMax{}MinutesPerJob", "QOSGrp{}", "QOSGrp{}Minutes", "QOSGrp{}RunMinutes", "QOSMax{}PerJob"),
    *("QOSMax{}PerNode", "QOSMax{}PerUser", "QOSMin{}", "Max{}PerAccount", "Max{}RunMinsPerAccount"),
    "Max{}RunMinsPerUser",
)
BUSY = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"
ACCOUNT = "Job's account not permitted to use this partition (gpu allows physics,shared not sandbox)"
QOS = "Job's QOS not permitted to use this partition (gpu allows high,long not normal)"


@pytest.mark.parametrize("name", [*NAMES.split(), *(limit.format(what) for limit in LIMITS for what in RESOURCES)])
def test_every_reason_has_words(name):
    assert reasons.find(name).words != name


@pytest.mark.parametrize(
    ("told", "words", "advice"),
    [
        (BUSY, "next in line, waits for nodes to become free", "the cluster is busy"),
        (ACCOUNT, f"its account or QoS isn't allowed where it was sent ({ACCOUNT})", "correct the profile"),
        (QOS, f"its account or QoS isn't allowed where it was sent ({QOS})", "correct the profile"),
        ("QOSMinGRES", "asks for less than a job of its QoS must have", "more --nodes"),
        ("MaxGRESPerAccount", "the limit of jobs or resources per account is reached", "account's jobs"),
        ("QOSMaxGRESPerNode", "asks for more than one job may have under its account or QoS", "cancel it"),
        ("DeadLine", "its deadline is too near or past, so it can never start", "--time"),
        ("ReqNodeNotAvail, UnavailableNodes:gpu[01-04,7]", "nodes that it needs are down, drained or reserved", ""),
        ("What a site writes, with commas, is whole", "What a site writes, with commas, is whole", ""),
    ],
)
def test_sentences_and_advice(told, words, advice):
    assert reasons.in_words(told) == words
    assert advice in reasons.find(told).advice
