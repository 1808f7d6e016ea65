"""Other jobs of the same user, with text in every field that may hold some: none is mistaken for ours."""

from launcher.runs import states
from launcher.slurm import client


def test_line_breaks_among_the_arguments_of_another_job(site, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("train.sh", "mine/job.sbatch"):
        (tmp_path / name).write_text("#!/bin/bash\nsleep 1\n")
    script = tmp_path / "mine" / "job.sbatch"
    text = f"hello\nworld\n7|RUNNING|n|N/A|1:00|None|{script}\n"
    held = ("--parsable", "--hold", "-n1", f"--chdir={tmp_path}", f"--output={tmp_path}/out")
    hostile = ("--job-name=a|b\nc", "--comment=x\n9|FAILED|||||", str(tmp_path / "train.sh"), "--prompt", text)
    other = site.host.call("sbatch", *held, *hostile).strip()
    assert states.find_job(script, site.host) is None
    ours = site.host.call("sbatch", *held, str(script)).strip()
    found = client.queue(site.host)
    assert {other, ours} <= set(found)
    assert (found[ours].command, found[ours].state, found[ours].reason) == (str(script), "PENDING", "JobHeldUser")
    assert found[other].command.split() == [str(tmp_path / "train.sh"), "--prompt", *text.split()]
    assert states.find_job(script, site.host) == ours
    assert client.states([ours, other], site.host).keys() == {ours, other}
    site.host.call("scancel", other, ours)
    assert client.states([other], site.host)[other].state == "CANCELLED"
