"""A profile compared with the live cluster: a finding for each question, with the reason when the answer isn't yes.

What a login node can't see and what Slurm doesn't keep is `unknown`, neither right nor wrong.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.cluster.containers import RUNTIMES
from launcher.cluster.profile import ClusterProfile
from launcher.common import words
from launcher.errors import Fault, UsageError
from launcher.planning import jobs
from launcher.planning.plan import Ask, Axes, JobPlan
from launcher.script import lint, render
from launcher.slurm import client, inventory, sbatch_options
from launcher.slurm.inventory import Inventory, Kind, Partition

Verdict = Literal["ok", "failed", "unknown"]
PROBE = 'for p; do [ -e "$p" ] && [ -r "$p" ] && echo r || echo -; done'
# The nearest existing parent folder, and whether the missing folders can be made in it.
WRITABLE = """
for p; do
  while [ ! -e "$p" ]; do p=$(dirname "$p"); done
  [ -d "$p" ] && [ -w "$p" ] && echo "w$p" || echo "-$p"
done
"""
TEST_ONLY = 'printf "%s" "$1" | sbatch --test-only 2>&1'
STARTS = re.compile(r"Job \d+ to start at (\S+)")


@dataclass(frozen=True, kw_only=True)
class ProfileFinding:
    """One question and its answer."""

    what: str
    verdict: Verdict
    why: str


def check(profile: ClusterProfile) -> Iterator[ProfileFinding]:
    """Every finding about `profile`, in order; `Fault` if Slurm can't be asked."""
    there = not profile.is_local
    if there and profile.slurm_conf:
        seen = _readable(profile, {"slurm_conf": profile.slurm_conf})
        there = all(finding.verdict == "ok" for finding in seen)  # else nobody answers, after a long wait
        yield from seen
    if there:
        yield from _of_slurm(profile, inventory.ask(profile.host))
    yield from _paths(profile)
    yield from _script(profile)
    if there:
        yield _test_only(profile)


def _ok(what: str, why: str) -> ProfileFinding:
    return ProfileFinding(what=what, verdict="ok", why=why)


def _failed(what: str, why: str) -> ProfileFinding:
    return ProfileFinding(what=what, verdict="failed", why=" ".join(why.split()))


def _unknown(what: str, why: str) -> ProfileFinding:
    return ProfileFinding(what=what, verdict="unknown", why=" ".join(why.split()))


def _of_slurm(profile: ClusterProfile, cluster: Inventory) -> Iterator[ProfileFinding]:
    yield _version(profile, cluster)
    names: list[str | None] = [*profile.partition.split(",")] if profile.partition else [None]
    for name in names:
        partition = cluster.partition(name)
        yield _partition(name, partition, cluster)
        if partition:
            yield from _node(profile, cluster, partition)
            yield _time(profile, partition)
    yield _account(profile, cluster)
    yield from _qos(profile, cluster)
    if profile.reservation:
        yield _reservation(profile.reservation, profile)
    if profile.constraint:
        yield _constraint(profile.constraint, cluster, names)


def _version(profile: ClusterProfile, cluster: Inventory) -> ProfileFinding:
    what = "Slurm version"
    ours, theirs = sbatch_options.number(profile.slurm_version), sbatch_options.number(cluster.version)
    if theirs == (0, 0):
        return _unknown(what, "the controller doesn't say")
    if theirs < sbatch_options.number(sbatch_options.OLDEST):
        return _failed(
            what, f"the cluster runs {cluster.version}; mixlaunch needs {sbatch_options.OLDEST} or newer"
        )
    if ours > theirs:
        return _failed(what, f"the cluster runs {cluster.version}; slurm_version {profile.slurm_version} is newer")
    gone = sorted(set(profile.extra) - sbatch_options.known_options(cluster.version))
    if gone:
        return _failed(what, f"sbatch {cluster.version} has no --{gone[0]}, which `extra` asks for")
    older = "" if ours == theirs else f"; slurm_version {profile.slurm_version} is older than the cluster"
    return _ok(what, f"{cluster.version}{older}")


def _near(name: str, there: Iterable[str]) -> str:
    return words.choices(name, sorted(set(there)))


def _partition(name: str | None, found: Partition | None, cluster: Inventory) -> ProfileFinding:
    if found is None:
        if name is None:
            return _failed("partition", f"the cluster has no default one; {_near('', _names(cluster))}")
        return _failed("partition", f"there is no {name!r}; {_near(name, _names(cluster))}")
    if found.state != "UP":
        return _failed("partition", f"{found.name} is {found.state}")
    if cluster.is_closed(found):
        return _failed("partition", f"{found.name} takes jobs of {', '.join(found.groups) or 'root'} alone")
    most = f", at most {found.max_nodes} for a job" if found.max_nodes else ""
    return _ok("partition", f"{found.name}, {found.nodes} nodes{most}{'' if name else ' (the default)'}")


def _names(cluster: Inventory) -> list[str]:
    return [partition.name for partition in cluster.partitions]


def _node(profile: ClusterProfile, cluster: Inventory, partition: Partition) -> Iterator[ProfileFinding]:
    """Whether some nodes have all the GPUs, cores and memory that the profile says a node has."""
    node, kinds = profile.node, cluster.of(partition.name)
    where = partition.name
    if not kinds:
        yield _unknown("nodes", f"{where} has none now")
        return
    yield from _gpus(profile, kinds, where)
    fitting = [kind for kind in kinds if _has_gpus(kind, profile)]
    cpus = [min(kind.cpus, partition.max_cpus or kind.cpus) for kind in fitting]
    yield from _enough("cores a node", node.cpus, cpus, where, "node.cpus")
    if not profile.exclusive:  # whole nodes come with all they have
        yield from _memory(profile, fitting, cluster, partition)
    if fitting and not any(kind.usable for kind in fitting):
        yield _failed("nodes", f"all nodes of {where} that fit are down or drained")


def _has_gpus(kind: Kind, profile: ClusterProfile) -> bool:
    """Whether these nodes have the GPUs that the profile asks for."""
    if profile.gpu_request == "none" or not profile.node.gpus:
        return True
    return any(
        count >= profile.node.gpus for gpu_type, count in kind.counted if profile.node.gpu_type in (None, gpu_type)
    )


def _gpus(profile: ClusterProfile, kinds: list[Kind], where: str) -> Iterator[ProfileFinding]:
    node = profile.node
    counted = [(gpu_type, count, kind.nodes) for kind in kinds for gpu_type, count in kind.counted]
    most = max((count for _, count, _ in counted), default=0)
    if not node.gpus:
        return
    if profile.gpu_request == "none" and not most:
        yield _unknown("GPUs a node", f"Slurm counts none in {where}; gpu_request none asks for none")
        return
    if most < node.gpus:
        yield _failed("GPUs a node", f"nodes of {where} have {most} at most; node.gpus is {node.gpus}")
        return
    there = sum(kind.nodes for kind in kinds if any(count >= node.gpus for _, count in kind.counted))
    rest = f"; others have {most}" if most > node.gpus else ""
    yield _ok("GPUs a node", f"{node.gpus} on {there} nodes of {where}{rest}")
    types = sorted({gpu_type for gpu_type, count, _ in counted if count >= node.gpus and gpu_type})
    if node.gpu_type and node.gpu_type not in types:
        yield _failed("GPU type", f"{where} has no {node.gpu_type}; {_near(node.gpu_type, types)}")
    elif not node.gpu_type and len(types) > 1:
        yield _unknown(
            "GPU type", f"a job may get any of {', '.join(types)}, or several; node.gpu_type asks for one"
        )


def _memory(
    profile: ClusterProfile, kinds: list[Kind], cluster: Inventory, partition: Partition
) -> Iterator[ProfileFinding]:
    asked, what, key = profile.node.memory_gb, "memory a node", "node.memory_gb"
    if asked is None or not kinds:
        return
    most = max(kind.memory_gb for kind in kinds)
    if not most:
        yield _failed(what, f"Slurm doesn't know the memory of {partition.name}'s nodes; leave {key} out")
        return
    if not cluster.counts_memory and asked <= most:
        yield _ok(what, f"{asked} of {most} GB, though this Slurm doesn't count memory")
        return
    limit = (partition.max_memory_mb or most * 1024) // 1024
    yield from _enough(what, asked, [min(most, limit)], partition.name, key)


def _enough(what: str, asked: int | None, there: list[int], where: str, key: str) -> Iterator[ProfileFinding]:
    if asked is None or not there:
        return
    unit = " GB" if what.startswith("memory") else ""
    if max(there) < asked:
        yield _failed(what, f"nodes of {where} have {max(there)}{unit} at most; {key} is {asked}")
    else:
        yield _ok(what, f"{asked} of {max(there)}{unit}")


def _time(profile: ClusterProfile, partition: Partition) -> ProfileFinding:
    if partition.minutes is not None and client.seconds(profile.time) // 60 > partition.minutes:
        longest = f"{partition.minutes // 60}:{partition.minutes % 60:02}:00"
        return _failed("time limit", f"{profile.time} is more than {partition.name} gives: {longest}")
    return _ok("time limit", profile.time)


def _account(profile: ClusterProfile, cluster: Inventory) -> ProfileFinding:
    found = cluster.associations
    if found is None:
        return _unknown("account", "the cluster's accounting can't be asked")
    name = profile.account or cluster.charged
    mine = [a for a in found if a.account == name]
    if not mine:
        verdict = _failed if cluster.enforced else _unknown
        said = f"you have no association with {name!r}" if name else "you have no default account"
        return verdict("account", f"{said}; {_near(name, (a.account for a in found))}")
    wanted = set(profile.partition.split(",")) if profile.partition else set()
    bound = {a.partition for a in mine}
    if "" not in bound and wanted and not wanted & bound:
        return _failed("account", f"{name} may use {', '.join(sorted(bound))}, not {profile.partition}")
    for partition in filter(None, (cluster.partition(p) for p in wanted)):
        if _is_barred(name, partition, cluster, profile):
            return _failed("account", f"{name} may not use {partition.name}")
    return _ok("account", name if profile.account else f"{name} (your default)")


def _is_barred(account: str, partition: Partition, cluster: Inventory, profile: ClusterProfile) -> bool:
    """Whether the partition refuses the account; a list of accounts holds for those below them too."""
    if account in partition.denied:
        return True
    if not partition.accounts or account in partition.accounts:
        return False
    return not set(inventory.parents(account, cluster.name, profile.host)) & set(partition.accounts)


def _qos(profile: ClusterProfile, cluster: Inventory) -> Iterator[ProfileFinding]:
    partition = cluster.partition(profile.partition)
    account = profile.account or cluster.charged
    mine = [a for a in cluster.associations or () if a.account == account]
    allowed = {qos for a in mine for qos in a.qos}
    if not profile.qos:
        defaults = {a.default_qos for a in mine if a.default_qos}
        if partition and partition.qos and defaults and not defaults & set(partition.qos):
            usable = sorted(allowed & set(partition.qos))
            hint = f"; give qos: {' or '.join(usable)}" if usable else ""
            said = f"{partition.name} takes {', '.join(partition.qos)}, not your default {min(defaults)}"
            yield _failed("QoS", f"{said}{hint}")
    elif cluster.associations is None:
        yield _unknown("QoS", "the cluster's accounting can't be asked")
    elif profile.qos not in allowed:
        near = _near(profile.qos, allowed)
        yield _failed("QoS", f"{account or 'your account'} may not use {profile.qos!r}; {near}")
    elif partition and partition.qos and profile.qos not in partition.qos:
        yield _failed("QoS", f"{partition.name} takes {', '.join(partition.qos)}")
    else:
        yield _ok("QoS", profile.qos)


def _reservation(name: str, profile: ClusterProfile) -> ProfileFinding:
    try:
        told = profile.host.call("scontrol", "--oneliner", "show", "reservation")
    except Fault as fault:
        return _unknown("reservation", str(fault))
    all_of_them = {
        one["ReservationName"]: one for one in map(inventory.fields, told.splitlines()) if "ReservationName" in one
    }
    if name not in all_of_them:
        return _failed("reservation", f"there is no {name!r}; {_near(name, all_of_them)}")
    found = all_of_them[name]
    state = found.get("State", "")
    said = f"{name}, {state.lower()} until {found.get('EndTime', '?')}"
    return _ok("reservation", said) if state == "ACTIVE" else _unknown("reservation", f"{said}; jobs wait for it")


def _constraint(text: str, cluster: Inventory, names: list[str | None]) -> ProfileFinding:
    chosen = [p.name for p in (cluster.partition(name) for name in names) if p]
    there = {feature for name in chosen for kind in cluster.of(name) for feature in kind.features}
    for feature in _features(text):
        if feature not in there:
            return _failed("constraint", f"no node of {', '.join(chosen)} has {feature!r}; {_near(feature, there)}")
    return _ok("constraint", text)


def _features(constraint: str) -> list[str]:
    """The names in a constraint: what stands between Slurm's signs, without a count such as in `rack1*2`."""
    pieces = re.split(r"[&|,()\[\]]", constraint)
    return [name for piece in pieces if (name := re.sub(r"\*\d+$", "", piece.strip()))]


def _paths(profile: ClusterProfile) -> Iterator[ProfileFinding]:
    """Whether folders can be written and files read, from here or from the login node."""
    paths = profile.paths
    folders = {"paths.models": paths.models, "paths.data": paths.data, "paths.runs": paths.runs}
    said = profile.host.call("sh", "-c", WRITABLE, "sh", *folders.values())
    for (what, path), answer in zip(folders.items(), said.splitlines(), strict=True):
        base = answer[1:]
        if base == "/":
            yield _failed(what, f"no folder of {path} exists; is the file system mounted?")
        elif answer[0] != "w":
            yield _failed(what, f"{base} isn't a folder that you can write in")
        else:
            yield _ok(what, path if base == path else f"{path} (will be made in {base})")
    yield from _readable(profile, dict(_files(profile)))
    if profile.in_container:
        yield _runtime(profile)
    yield from _elsewhere(profile)


def _runtime(profile: ClusterProfile) -> ProfileFinding:
    name = profile.container.runtime
    if option := RUNTIMES[name].srun_option:
        there = option in profile.host.call("srun", "--help")
        return _ok(name, f"srun takes {option}") if there else _failed(name, f"srun has no {option}")
    try:
        return _ok(name, profile.host.call("sh", "-c", 'command -v "$1"', "sh", name).strip())
    except Fault:
        return _unknown(name, "isn't on PATH here; compute nodes may have it")


def _readable(profile: ClusterProfile, files: dict[str, str]) -> list[ProfileFinding]:
    """A finding for each file: whether it is there and can be read."""
    said = profile.host.call("sh", "-c", PROBE, "sh", *files.values())
    return [
        _ok(what, path) if seen == "r" else _failed(what, f"{path} isn't here or can't be read")
        for (what, path), seen in zip(files.items(), said.splitlines(), strict=True)
    ]


def _files(profile: ClusterProfile) -> Iterator[tuple[str, str]]:
    container = profile.container
    if container.image and container.image.startswith("/"):
        yield "image", container.image
    for mount in container.mounts:
        yield f"mount {mount}", mount.partition(":")[0]
    if not profile.in_container and profile.python.startswith("/"):
        yield "python", profile.python


def _elsewhere(profile: ClusterProfile) -> Iterator[ProfileFinding]:
    """Questions that only the compute nodes can answer."""
    if profile.container.image and not profile.container.image.startswith("/"):
        yield _unknown("image", f"{profile.container.image} is fetched when the job starts")
    if profile.in_container:
        yield _unknown("python", f"{profile.python} is in the container")
    elif not profile.python.startswith("/"):
        yield _unknown("python", f"{profile.python} is found on the compute nodes' PATH")
    for name in profile.secrets:
        seen = bool(os.environ.get(name))
        yield _ok(f"secret {name}", "set here") if seen else _unknown(f"secret {name}", "isn't set here now")


def _script(profile: ClusterProfile) -> Iterator[ProfileFinding]:
    """Whether the user's own templates make a valid script."""
    if profile.templates:
        try:
            lint.check(render.render(jobs.plan_finetune(profile)), profile.slurm_version)
        except UsageError as error:
            yield _failed("templates", str(error))
        else:
            yield _ok("templates", ", ".join(profile.templates))


def _test_only(profile: ClusterProfile) -> ProfileFinding:
    """What `sbatch --test-only` says to a job of one whole node."""
    what = "sbatch --test-only"
    try:
        text = render.render(_whole_node(profile))
    except UsageError as error:
        return _failed(what, str(error))
    try:
        said = profile.host.call("sh", "-c", TEST_ONLY, "sh", text)
    except Fault as fault:
        return _failed(what, re.sub(r"^sh: ", "", str(fault)))
    start = STARTS.search(said)
    return _ok(what, f"a node like that could start at {start[1]}" if start else said.strip())


def _whole_node(profile: ClusterProfile) -> JobPlan:
    gpus = max(1, profile.node.gpus)
    axes = Axes(tensor=1, pipeline=1, expert=1, expert_tensor=1, context=1)
    return jobs.plan_finetune(profile, axes=axes, ask=Ask(nodes=1), values={"global_batch": gpus})
