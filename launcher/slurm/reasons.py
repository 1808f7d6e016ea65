"""Why a job waits, in words, from Slurm's reason: what it waits for, and whether that can ever happen.

The names are those of Slurm 22.05 to 25.11, with the sentences that its controller writes in place of some. One
that isn't here is shown as Slurm says it.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reason:
    """`name` is a regular expression for Slurm's reason; `advice` says what helps besides waiting."""

    name: str
    words: str
    advice: str = ""


REASONS = (
    Reason(
        name="Resources|Nodes required for job are DOWN, DRAINED or reserved.*",
        words="next in line, waits for nodes to become free",
        advice="the cluster is busy, or some of its nodes are out of service; `sinfo` shows the states of nodes",
    ),
    Reason(
        name="Priority",
        words="jobs of higher priority go first",
        advice="a shorter --time lets the scheduler fill a gap with it",
    ),
    Reason(name="BeginTime", words="waits a moment before its start, as every requeued job does"),
    Reason(name="None|Cleaning|Prolog|SchedDefer|FedJobLock", words="the scheduler hasn't looked at it yet"),
    Reason(name="Dependency", words="waits for another job to end"),
    Reason(
        name="DependencyNeverSatisfied",
        words="the job that it depends on failed, so it can never start",
        advice="cancel it, correct what failed, and submit again",
    ),
    Reason(
        name="JobHeldUser",
        words="held by its owner",
        advice="`scontrol release ID` lets it go",
    ),
    Reason(
        name="JobHeldAdmin",
        words="held by an administrator, or by Slurm after failed starts",
        advice="ask the administrators; `scontrol show job ID` may say why",
    ),
    Reason(
        name="JobHoldMaxRequeue|MaxRequeue|.*requeued held|launch failed requeued held",
        words="held, because it was requeued too often or a node failed to start it",
        advice="`mixlaunch explain` names the node; exclude it and release the job, or cancel and resume the run",
    ),
    Reason(
        name="ReqNodeNotAvail.*",  # the nodes' names may follow
        words="nodes that it needs are down, drained or reserved",
        advice="a maintenance window before the end of its time limit counts: a shorter --time may start it",
    ),
    Reason(
        name="ReservationDeleted|ReservationInvalid",
        words="its reservation is gone, so it can never start",
        advice="cancel it, take `reservation` out of the profile, and submit again",
    ),
    Reason(name="Reservation.*", words="waits for its reservation to begin"),
    Reason(
        name="PartitionTimeLimit",
        words="asks for more time than the partition allows, so it can never start",
        advice="cancel it and submit with a shorter --time",
    ),
    Reason(
        name="PartitionNodeLimit",
        words="asks for more nodes than the partition allows or has up",
        advice="cancel it and submit with fewer --nodes or another partition",
    ),
    Reason(name="PartitionDown|PartitionInactive", words="the partition is closed"),
    Reason(
        name="DeadLine",
        words="its deadline is too near or past, so it can never start",
        advice="cancel it and submit without the deadline, or with a shorter --time",
    ),
    Reason(
        name="BadConstraints|Constraints",
        words="no node has what it asks for, so it can never start",
        advice="compare the profile with `sinfo -Nel`; the list of bad nodes may leave too few",
    ),
    Reason(
        name="(Assoc|QOS)Grp.*|QOSUsageThreshold|(Association|QOS)(Job|Resource|Time)Limit|AccountingPolicy",
        words="the account's or the QoS's share is used up by running jobs",
        advice="it starts when one of them ends; `sacctmgr show assoc,qos` shows the limits",
    ),
    Reason(
        name="MaxMemPerLimit",
        words="asks for more memory than the partition gives a job, so it can never start",
        advice="cancel it, lower node.memory_gb in the profile, and submit again",
    ),
    Reason(
        name="QOSMin.*",
        words="asks for less than a job of its QoS must have",
        advice="cancel it and submit with more --nodes or another QoS",
    ),
    Reason(
        name="(QOS|Assoc)?Max(Wall|.*PerJob|.*PerNode).*",
        words="asks for more than one job may have under its account or QoS",
        advice="cancel it and submit with fewer --nodes, a shorter --time or another QoS",
    ),
    Reason(
        name="(QOS)?Max.*PerAccount.*",
        words="the limit of jobs or resources per account is reached",
        advice="it starts when one of the account's jobs ends",
    ),
    Reason(name="MaxPoweredUpNodes", words="waits until fewer of the cluster's nodes are powered up"),
    Reason(name="JobArrayTaskLimit", words="waits for another task of its array to end"),
    Reason(
        name="(QOS|Assoc)?Max.*",
        words="the limit of jobs or resources per user is reached",
        advice="it starts when one of your jobs ends",
    ),
    Reason(
        name=(
            "InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|PartitionConfig"
            "|Job's (account|QOS|group) not permitted to use this partition.*"
        ),
        words="its account or QoS isn't allowed where it was sent",
        advice="`sacctmgr show assoc user=$USER` lists what is allowed; correct the profile",
    ),
    Reason(name="Licenses|BurstBuffer.*", words="waits for a licence or a burst buffer"),
    Reason(name="NvidiaImexChannels|MpiPortsBusy", words="waits for channels or ports that other jobs have"),
    Reason(name="NodeDown|FrontEndDown", words="a node that it was given went down"),
    Reason(
        name="SystemFailure|JobLaunchFailure|RaisedSignal.*",
        words="Slurm failed to start it",
        advice="`mixlaunch explain` names the node, if it was one; ask the administrators if it comes again",
    ),
    Reason(
        name="NonZeroExitCode|TimeLimit|InactiveLimit|OutOfMemory",
        words="its last start ended badly",
        advice="`mixlaunch explain` says why",
    ),
)


def find(name: str) -> Reason:
    """What Slurm's `name` or sentence means; unknown ones stay whole as their words."""
    plain = name.strip()
    for reason in REASONS:
        if re.fullmatch(reason.name, plain, re.DOTALL):
            return reason
    return Reason(name=re.escape(plain), words=plain)


def in_words(name: str) -> str:
    """The words of a reason, with the sentence that Slurm itself wrote, which holds names."""
    reason = find(name)
    told = name.strip()
    return f"{reason.words} ({told})" if " not permitted " in told else reason.words
