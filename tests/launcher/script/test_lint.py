"""The lint of scripts: each trap is caught with its line, and a good script passes."""

import pytest

from launcher.script import lint

GOOD = """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --exclusive

# a comment that isn't code: don't stop at quotes
echo "it's $HOME" 'plain' \\'
cat <<'END_OF_CONFIG'
price: '$HOME' stays in data
END_OF_CONFIG
srun bash -s <<'END_OF_RANK'
echo "$RANK: $(basename "$0") isn't 'quoted $here'"
END_OF_RANK
srun bash -s <<'END_OF_HEALTH'
echo "$SLURM_PROCID"
END_OF_HEALTH
"""


def found(script: str, version: str = "22.05") -> str:
    return "\n".join(lint.findings(script, version))


def test_a_good_script_passes():
    assert found(GOOD) == ""
    lint.check(GOOD)
    with pytest.raises(lint.LintError, match="line 3"):
        lint.check(GOOD.replace("--exclusive", "--x"))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('echo "it', 'if "it', "syntax error"),
        ('echo "$RANK', 'if "$RANK', "syntax error"),  # also inside the rank's body
        (
            "#SBATCH --exclusive\n",
            "echo hi\n#SBATCH --exclusive\n",
            "line 4: '#SBATCH --exclusive' comes after code",
        ),
        ("--exclusive", "--exclusiv", "line 3: sbatch of Slurm 22.05 has no --exclusiv"),
        ("--exclusive", "-x", "line 3: '#SBATCH -x' isn't"),
        ("'plain'", "'$PLAIN'", "line 6: $PLAIN inside single quotes"),
        ("'plain'", "'a ${PLAIN} b'", "line 6: ${PLAIN inside single quotes"),
        ("'plain'", "'pl\ain'", r"line 6: control character '\x07'"),
        ("'plain'", "'pl\rain'", r"line 6: control character '\r'"),
        ("$(basename", "'$0' '$RANK' $(basename", ""),  # inside double quotes nothing is single-quoted
        ('echo "$RANK', "echo '$RANK' \"$RANK", "$RANK inside single quotes"),
        ('echo "$SLURM', 'if "$SLURM', "syntax error"),  # and inside a node's check
        ('echo "$SLURM', "echo '$LIKE' \"$SLURM", "$LIKE inside single quotes"),
    ],
)
def test_each_trap_is_caught(before, after, said):
    assert before in GOOD
    text = found(GOOD.replace(before, after, 1))
    assert said in text if said else text == ""


def test_a_later_slurm_knows_more_options():
    script = GOOD.replace("--exclusive", "--oom-kill-step=1")
    assert "line 3: sbatch of Slurm 24.05 has no --oom-kill-step" in found(script, "24.05")
    assert found(script, "24.11") == ""
