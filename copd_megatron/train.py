"""Co-Evolving Policy Distillation for one branch (docs/method.md, "Algorithm").

Every rank of a branch's gang runs `train`; `copd train configs/mini/text_image.yaml` starts the gangs. Everything that
is *how* (processes, engines, files) is in `branch.py`; what is done, and in which order, is here.
"""

from __future__ import annotations

from copd_megatron.branch import Branch
from copd_megatron.rhythm import FixedRhythm
from copd_megatron.steering.steered import SteeredRhythm


def train(branch: Branch, rhythm: FixedRhythm | SteeredRhythm) -> None:
    """Explore alone, then exchange with the peers, cycle after cycle.

    `branch.begin` raises `Interrupted`, with a checkpoint behind it, when the run is to stop. `branch.settle` ends
    every update: it measures drift and begins a checkpoint where that is due, and takes the last one further. A
    steered rhythm's phases end when `settle` has told it so. After a restart the loops go on from the first update not
    yet made.
    """
    branch.enter()
    for cycle in rhythm:
        for step in rhythm.explore(cycle, done=branch.version):  # Phase I: each branch on its own capability
            branch.begin(step)
            native = branch.grade(branch.rollouts(branch.own, branch.config.rl.prompts))
            branch.update(native)
            branch.settle()
        for step in rhythm.exchange(cycle, done=branch.version):  # Phase II: mutual distillation, RL does not pause
            branch.begin(step)
            branch.meet_teachers()
            native = branch.grade(branch.rollouts(branch.own, branch.config.native_prompts))
            cross = branch.lessons()
            branch.update(native, cross)
            branch.settle()
