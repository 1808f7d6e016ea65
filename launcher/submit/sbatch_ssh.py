"""Submission through a login node: rsync copies the script there, and a POSIX shell gives it to sbatch.

The login node needs nothing of ours, so submitit isn't used. sbatch's answer is stored beside the script. If the
connection is lost, the next one reads the answer. If sbatch hasn't started, it takes the lock, so sbatch never
starts.
"""

import contextlib
import json
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path

from launcher.common import files
from launcher.errors import Fault, Interrupted, SubmitError, UncertainError
from launcher.host import copies, ssh
from launcher.host.base import Done, LostError
from launcher.host.login_node import LoginNode
from launcher.host.ssh import Login
from launcher.planning import requeue
from launcher.runs import states
from launcher.submit import answer
from megatron_mixtral.spec import rundir

GRACE = 30  # seconds more than sbatch gets, for the way there and back
GIVEN_UP, NO_SBATCH, UNDER_WAY = 75, 76, 77  # exit codes of ours
NEVER, UNKNOWN = "never", "unknown"
UPLOADS = (rundir.RECORD, rundir.CONFIG, rundir.SCRIPT, rundir.SECRETS)

MAKE = """
mkdir -p {parent} || exit
mkdir {run} || exit
mkdir -p {run}/logs {run}/submission
"""
# mkdir of this folder is the lock: the one who makes it decides, either sbatch here or a second connection that
# gives up.
SBATCH = """
cd {run} || exit
{find}
command -v sbatch >/dev/null || exit {no_sbatch}
for earlier in submission/*; do
  [ ! -d "$earlier" ] || [ -e "$earlier/code" ] || exit {under_way}
done
mkdir submission/{claim} || exit {given_up}
for name in {decided} $(env | sed -n 's/^\\(SLURM_[A-Za-z0-9_]*\\)=.*/\\1/p'); do
  case $name in SLURM_CONF | SLURM_JWT) ;; *) unset "$name" ;; esac
done
{exports}
rm -f {counts}
trap '' HUP PIPE
limit=
! command -v timeout >/dev/null || limit="timeout -k 5 {timeout}"
$limit sbatch {options} {script} >submission/{claim}/out 2>submission/{claim}/err
echo $? >submission/{claim}/code.new
mv submission/{claim}/code.new submission/{claim}/code
cat submission/{claim}/out
cat submission/{claim}/err >&2
exit "$(cat submission/{claim}/code)"
"""
SETTLE = """
cd {run} || exit
if mkdir submission/{claim} 2>/dev/null; then
  echo {given_up} >submission/{claim}/code
  echo {never}
  exit
fi
waited=0
while [ ! -e submission/{claim}/code ] && [ $waited -lt {seconds} ]; do
  sleep 1
  waited=$((waited + 1))
done
[ -e submission/{claim}/code ] || {{ echo {unknown}; exit; }}
cat submission/{claim}/out
cat submission/{claim}/err >&2
exit "$(cat submission/{claim}/code)"
"""


def submit(host: LoginNode, text: str, run: Path, *, options: Sequence[str] = ()) -> str:
    """Submit the copy `run` and return its job's id, or say in an error whether there is one.

    If a run's first submission fails, its folder on the login node is removed.
    """
    login = host.login
    files.write(run / rundir.SCRIPT, text)
    there = copies.original(run)
    record = json.loads((run / rundir.RECORD).read_text())
    first = not record["jobs"] and not record["resubmissions"]
    try:
        if first:
            _make(login, there)
        _upload(login, run, there, first=first)
    except Fault as fault:
        raise SubmitError(f"{fault}\nNothing was submitted.") from fault
    claim = f"{len(record['jobs'])}-{secrets.token_hex(2)}"  # a refused submission doesn't block the next one
    try:
        done = _sbatch(host, text, there, claim, options)
        return answer.job_of(done.code, done.out, done.err, there / rundir.SCRIPT, host)
    except (Interrupted, UncertainError):
        raise
    except BaseException:
        if first:
            _remove(login, there)
        raise


def _make(login: Login, there: Path) -> None:
    try:
        done = ssh.run(login, MAKE.format(parent=shlex.quote(str(there.parent)), run=shlex.quote(str(there))))
    except LostError:
        _remove(login, there)  # the folder may exist now; its name is unique
        raise
    if done.code:
        raise SubmitError(f"run directory {login.host}:{there}: {done.said}")


def _upload(login: Login, run: Path, there: Path, *, first: bool) -> None:
    """New files keep their mode, so only the owner can read secrets. After the copy no secret is left here."""
    files = [str(run / name) for name in UPLOADS if (run / name).exists()]
    try:
        ssh.rsync(login, "-t", *files, ssh.far(login, f"{there}/"))
    except BaseException:
        if first:
            _remove(login, there)
        raise
    (run / rundir.SECRETS).unlink(missing_ok=True)


def _remove(login: Login, there: Path) -> None:
    with contextlib.suppress(Fault):  # whatever failed before is what matters
        # The script goes first, so a command that is still running there finds nothing to submit.
        run = shlex.quote(str(there))
        ssh.run(login, f"rm -f {run}/{rundir.SCRIPT}; exec rm -rf {run}")


def _sbatch(host: LoginNode, text: str, there: Path, claim: str, options: Sequence[str]) -> Done:
    """sbatch's answer, over a second connection if the first is lost."""
    body = SBATCH.format(
        run=shlex.quote(str(there)),
        find=ssh.FIND.format(program="sbatch"),
        no_sbatch=NO_SBATCH,
        given_up=GIVEN_UP,
        under_way=UNDER_WAY,
        claim=claim,
        decided=" ".join(sorted(answer.decided_by(text))),
        counts=" ".join(requeue.COUNTS),
        exports=ssh.exports(host.environment),
        timeout=answer.SBATCH_TIMEOUT,
        options=shlex.join(options),
        script=shlex.quote(str(there / rundir.SCRIPT)),
    )
    try:
        done = ssh.run(host.login, body, timeout=answer.SBATCH_TIMEOUT + GRACE)
    except LostError as lost:
        return _settled(host, there, claim, str(lost))
    except KeyboardInterrupt:
        done = _settled(host, there, claim, "interrupted")
        job_id = answer.job_of(done.code, done.out, done.err, there / rundir.SCRIPT, host)
        raise answer.interrupted(job_id) from None
    if done.code == NO_SBATCH:
        raise SubmitError(f"sbatch: not found on the PATH of {host.name}, nor on that of a login shell there")
    if done.code == UNDER_WAY:
        raise SubmitError(
            f"an earlier sbatch for {host.name}:{there} hasn't ended; nothing was submitted. "
            "`mixlaunch status` finds its job; if that sbatch is surely gone, remove its folder in submission/"
        )
    return done


def _settled(host: LoginNode, there: Path, claim: str, why: str) -> Done:
    """The outcome of a submission whose answer was lost: from the stored answer, or from Slurm. After this it can
    no longer start.
    """
    body = SETTLE.format(
        run=shlex.quote(str(there)),
        claim=claim,
        given_up=GIVEN_UP,
        never=NEVER,
        unknown=UNKNOWN,
        seconds=answer.SBATCH_TIMEOUT + 5,
    )
    try:
        done = ssh.run(host.login, body, timeout=answer.SBATCH_TIMEOUT + GRACE)
        if done.out.strip() != UNKNOWN:
            found = None
        elif (found := states.find_job(there / rundir.SCRIPT, host)) is None:
            raise Fault(f"sbatch hasn't ended on {host.name}, and Slurm has no such job yet")
    except Fault as fault:
        raise UncertainError(
            f"{why}\nWhether there is a job isn't known ({fault}). "
            f"`mixlaunch status {there.name}` finds it later; don't submit again before then."
        ) from fault
    if found:
        return Done(code=0, out=f"Submitted batch job {found}", err="")
    if done.out.strip() == NEVER:
        raise SubmitError(f"{why}\nNothing was submitted.")
    return done
