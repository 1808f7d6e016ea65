"""Blends: every part by its weight in any stretch, its samples in their order, the same from any starting point."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from finetunes import finetuned, of_kind
from prepared_data import write_chats
from small_world import training
from spawn_ranks import ranks

from megatron_mixtral.data import blend
from megatron_mixtral.data.blend import Blend


@dataclass
class Counted:
    """A part whose samples are their own numbers."""

    name: str
    tokens: int = 100
    per_epoch: int = 10
    asked: list = field(default_factory=list)

    def sample(self, number):
        return self.name, number


def blended(*weights):
    return Blend([Counted(str(n)) for n in range(len(weights))], weights)


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (5, 3, 2), (1e-5, 1), (1, 1e-3, 1e-3, 7), (1 / 3, 2 / 3)])
def test_any_stretch_holds_every_part_by_its_weight_and_no_sample_is_left_out(weights):
    drawn = [blended(*weights).sample(n) for n in range(2 * blend.BLOCK + 100)]
    for part, share in enumerate(np.array(weights) / sum(weights)):
        own = [number for name, number in drawn if name == str(part)]
        assert own == list(range(len(own)))
        sofar = np.cumsum([name == str(part) for name, _ in drawn])
        assert np.abs(sofar - share * np.arange(1, len(drawn) + 1)).max() <= len(weights) / 2


def test_far_into_a_run_nothing_before_it_is_needed():
    whole, far = blended(2, 3, 5), 10**9 + 4095
    stretch = [whole.sample(n) for n in range(far, far + 20)]
    assert stretch == [blended(2, 3, 5).sample(n) for n in reversed(range(far, far + 20))][::-1]
    for part in "012":
        own = [number for name, number in stretch if name == part]
        assert all(b == a + 1 for a, b in itertools.pairwise(own))


def test_text_and_chats_train_together_and_a_resume_must_have_the_same_blend(world, tmp_path):
    write_chats(tmp_path / "chats", [40] * 30)
    mix = [f"{world}/data:0.75", f"{tmp_path}/chats:0.25"]
    raw = training(world, data=mix, steps=2, warmup_steps=0, eval_interval=2)
    told = ranks(1, finetuned, raw, {"blend": {}}, str(tmp_path))[0]["blend"]
    assert len(of_kind(told, "step", "loss")) == 2
    assert of_kind(told, "eval", "loss")[0] > 0
    other = raw | {"steps": 4, "data": [f"{world}/data:0.5", f"{tmp_path}/chats:0.5"]}
    with pytest.raises(AssertionError, match=r"weights \[0.5, 0.5\] in place of \[0.75, 0.25\]"):
        ranks(1, finetuned, other, {"blend": {}}, str(tmp_path))
