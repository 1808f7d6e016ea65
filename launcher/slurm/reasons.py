"""Why a job waits, in words, from the reason that Slurm gives: what it waits for, and whether that can ever come.

The names are those of Slurm 22.05 to 24.11; one that isn't here is shown as Slurm says it.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reason:
    """`name` is a regular expression over Slurm's word; `advice` where waiting alone isn't all one can do."""

    name: str
    words: str
    advice: str = ""


REASONS = (
    Reason(name="Resources", words="next in line, waits for nodes to become free"),
    Reason(
        name="Priority",
        words="jobs of higher priority go first",
        advice="a shorter --time lets the scheduler fill a gap with it",
    ),
    Reason(name="BeginTime", words="waits a moment before its start, as every requeued job does"),
    Reason(name="None|Cleaning|Prolog", words="the scheduler hasn't looked at it yet"),
    Reason(name="Dependency", words="waits for another job to end"),
    Reason(
        name="DependencyNeverSatisfied",
        words="the job that it depends on failed, so it can never start",
        advice="cancel it, mend what failed, and submit again",
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
        name="JobHoldMaxRequeue|.*requeued held|launch failed requeued held",
        words="held, because it was requeued too often or a node failed to start it",
        advice="`mixlaunch explain` names the node; leave it out and release the job, or cancel and resume the run",
    ),
    Reason(
        name="ReqNodeNotAvail.*",
        words="nodes that it needs are down, drained or reserved",
        advice="a maintenance window before the end of its time limit counts: a shorter --time may start it",
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
        name="BadConstraints",
        words="no node has what it asks for, so it can never start",
        advice="compare the profile with `sinfo -Nel`; the list of bad nodes may leave too few",
    ),
    Reason(
        name="(Assoc|QOS)Grp.*",
        words="the account's or the QoS's share is used up by running jobs",
        advice="it starts when one of them ends; `sacctmgr show assoc,qos` shows the limits",
    ),
    Reason(
        name="(QOS|Assoc)?Max(Wall|.*PerJob).*",
        words="asks for more than one job may have under its account or QoS",
        advice="cancel it and submit with fewer --nodes, a shorter --time or another QoS",
    ),
    Reason(
        name="(QOS|Assoc)?Max.*",
        words="the limit of jobs or resources per user is reached",
        advice="it starts when one of your jobs ends",
    ),
    Reason(
        name="InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|PartitionConfig",
        words="its account or QoS isn't allowed where it was sent",
        advice="`sacctmgr show assoc user=$USER` lists what is; mend the profile",
    ),
    Reason(name="Licenses|BurstBuffer.*", words="waits for a licence or a burst buffer"),
    Reason(name="NodeDown|FrontEndDown", words="a node that it was given went down"),
    Reason(name="SystemFailure|RaisedSignal.*", words="Slurm failed to start it"),
)


def find(name: str) -> Reason:
    """What Slurm's `name` means; unknown ones keep their name as their words."""
    plain = name.split(",")[0].strip()
    for reason in REASONS:
        if re.fullmatch(reason.name, plain):
            return reason
    return Reason(name=re.escape(plain), words=plain)
