"""Experience replay."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from models import MLP, ExperienceReplay
from models.core.chance import Chance
from tests.models.continual.test_online_sgd import KEY, experiences


def test_with_room_for_all_each_step_is_on_all_so_far():
    """Catches empty places that weigh, a batch that is replayed before it was met or counts twice, and old labels mixed
    up with other inputs: against descent on the batch and everything before it."""
    learner = ExperienceReplay(MLP(3, (5,)), memory=40, replay=40, rate=0.3, batch=3, glances=2).double().eval()
    state = learner.begin(4, Chance.of(KEY))
    weights = {n: p.clone().requires_grad_() for n, p in state.parameters.items()}
    optimizer, seen = torch.optim.SGD(weights.values(), 0.3), []
    for part in experiences(2):
        with torch.no_grad():
            state = learner.update(state, part)
        for x, y in zip(part.x.split(3), part.y.split(3), strict=True):
            seen.append((x, y))
            for _ in range(2):
                optimizer.zero_grad()
                all_x, all_y = (torch.cat(values) for values in zip(*seen, strict=True))
                F.cross_entropy(functional_call(learner.base, weights, (all_x,)), all_y).backward()
                optimizer.step()
    for name, value in weights.items():
        torch.testing.assert_close(state.parameters[name], value.detach())


def test_glances_replay_other_examples():
    """Catches chance that is drawn from again at the same place."""
    learner = ExperienceReplay(MLP(3, (5,)), memory=20, replay=2, batch=7).double().eval()
    state = learner.update(learner.begin(4, Chance.of(KEY)), experiences(1)[0])
    drawn = []
    for _ in range(6):
        (x, *_), chance = state.kept.drawn(2, state.chance)
        drawn.append(tuple(x[:, 0].tolist()))
        assert chance.drawn > state.chance.drawn
        state = state._replace(chance=chance)
    assert len(set(drawn)) > 3
    after = learner.step(state, *(v[:2] for v in (experiences(1)[0].x, experiences(1)[0].y)))
    assert after.chance.drawn > state.chance.drawn


@pytest.mark.parametrize("policy", ["balanced", "oldest"])
def test_other_memories(policy):
    """Catches a policy that is not passed on."""
    learner = ExperienceReplay(MLP(3, (5,)), memory=4, policy=policy).double().eval()
    part = experiences(1)[0]
    kept = learner.update(learner.begin(4, Chance.of(KEY)), part).kept
    if policy == "oldest":
        assert sorted(kept.x[:, 0].tolist()) == sorted(part.x[-4:, 0].tolist())
    else:
        last = {int(y): x for x, y in zip(part.x, part.y, strict=True)}
        assert all(torch.equal(kept.x[k], x) for k, x in last.items())
