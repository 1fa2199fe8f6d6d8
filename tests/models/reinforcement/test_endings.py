"""Episodes that end before their horizon: what agents are told, what is learned from, what counts; and units of any
size."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules import PointRobot
from models import PEARL, RL2, MAMLPolicy
from models.reinforcement.context_encoder import ContextEncoder
from models.reinforcement.normalization import RunningScale
from models.reinforcement.policies import mean_where
from models.reinforcement.replay_buffer import Replay
from models.reinforcement.trials import run_trial
from tests.support.environments import Ledges
from tests.support.toy import train_for


class Scripted:
    """Acts by its draws alone: below the edge one time in eight."""

    draws = 1

    def begin(self, environment, task):
        return None

    def act(self, memory, seen, draws):
        return None, (draws - 0.02).float(), ()


def trial_of(data: Ledges, tasks: int = 40):
    batch = data.distribution("train").sample(range(tasks))
    batch.meta_batch = tasks
    return batch, run_trial(batch, Scripted())


def test_an_end_lasts_to_the_horizon_and_no_longer():
    """Catches steps after an end that count, an end that reaches into the next episode, agents that are not told."""
    data = Ledges(horizon=6, episodes=3)
    batch, trial = trial_of(data)
    fell = 0
    for n in range(40):
        for episode in range(3):
            up = True
            for t in range(6 * episode, 6 * episode + 6):
                assert trial.seen.alive[t, n] == up
                if t:
                    assert trial.seen.done[t, n] == (t == 6 * episode or not up)
                assert trial.reward[t, n] == up
                up = up and bool(trial.action[t, n, 0] >= batch.task["edge"][n])
                assert trial.terminated[t, n] == (not up)
            fell += not up
    assert 20 < fell < 100


def test_what_a_trial_tells_is_of_its_last_episode():
    """Catches numbers of steps after the end, or of other episodes, and successes that count once they are lost."""
    data = Ledges(horizon=6, episodes=3)
    _, trial = trial_of(data)
    told = trial.last_info(3)
    for n in range(40):
        steps = [t for t in range(12, 18) if trial.seen.alive[t, n]]
        assert told["height"][n].item() == pytest.approx(np.mean([trial.info["height"][t, n] for t in steps]))
        assert told["success"][n] == max(trial.info["success"][t, n] for t in steps)


def test_what_comes_after_an_end_is_never_drawn():
    """Catches a replay buffer that hands out transitions that were none, or some of those that were more often."""
    g = torch.Generator().manual_seed(3)
    lengths = [torch.tensor([2, 4, 1]), torch.tensor([3]), torch.tensor([4, 1])]
    episodes = [torch.randn(len(n), 4, 2, generator=g) for n in lengths]
    replay, context = Replay(None, 2, 4, 2, torch.float32), 2
    for task, e, n in zip((0, 1, 0), episodes, lengths, strict=True):
        replay.append(task, e, min(context, len(e)), n)
    live = [e[i, :k] for j in (0, 2) for e, n in [(episodes[j], lengths[j])] for i, k in enumerate(n.tolist())]
    rows = torch.cat(live)
    draws = (torch.arange(len(rows))[None].double() + 0.5) / len(rows)
    assert torch.equal(replay.rows(torch.tensor([0]), draws)[0], rows)
    newest = torch.cat([episodes[2][0, :4], episodes[2][1, :1]])
    both = torch.tensor([0, 1])
    draws = ((torch.arange(15).double() + 0.5) / 15).expand(2, -1)
    found = replay.context(both, draws)
    assert torch.equal(found[0], newest.repeat_interleave(3, 0))
    assert torch.equal(found[1], episodes[1][0, :3].repeat_interleave(5, 0))
    again = Replay(None, 2, 4, 2, torch.float32)
    state = replay.state_dict()
    assert state["length"].tolist() == [2, 4, 1, 3, 4, 1]
    replay.close()
    again.close()


def test_a_posterior_leaves_out_what_does_not_count():
    """Catches transitions after an end as evidence, which would sharpen a posterior by steps that tell nothing."""
    torch.manual_seed(0)
    encoder = ContextEncoder(3, 8, 2).double()
    context, weight = torch.randn(4, 5, 3).double(), torch.tensor([[1.0, 1, 0, 1, 0]]).double().expand(4, -1)
    for some, whole in zip(encoder(context[:, [0, 1, 3]]), encoder(context, weight=weight), strict=True):
        torch.testing.assert_close(some, whole, rtol=1e-12, atol=1e-12)


def test_the_mean_of_what_counts():
    """Catches a mean over all, and one that rounds where all counts."""
    values, counts = torch.randn(7, 9), (torch.rand(7, 9) < 0.6).float()
    counts[0] = 1
    torch.testing.assert_close(mean_where(values, counts), values[counts.bool()].mean())
    torch.testing.assert_close(
        mean_where(values, counts, (0,)), torch.stack([values[counts[:, k].bool(), k].mean() for k in range(9)])
    )
    assert torch.equal(mean_where(values, torch.ones_like(values)), values.mean())


def test_pearl_does_not_bootstrap_through_ends(tmp_path):
    """Catches a target that has a value after an end: then falling costs nothing, and the actor falls as it pleases."""
    data = Ledges(
        horizon=8, episodes=1, train_tasks=4, meta_batch_size=4, val_tasks=2, test_tasks=64, eval_batch_size=64
    )
    sizes = {"hidden": 32, "latents": 0, "transitions": 64, "steps_per_iteration": 50, "tasks_per_collection": 4}
    torch.manual_seed(0)
    learner = PEARL(2, 1, **sizes, optimizer=lambda p: torch.optim.Adam(p, 3e-3))
    train_for(learner, data, 600, default_root_dir=tmp_path)
    falls = torch.tensor([[1.0, k / 8, a] for k in range(7) for a in (-0.9, -0.5, -0.1)])
    with torch.no_grad():
        worth = learner.critics(falls).mean()
    assert worth == pytest.approx(5.0, rel=0.15), "what the step pays; with a value after the end it is 9.5 to 11"


def rl2(**settings) -> RL2:
    torch.manual_seed(1)
    made = RL2(2, 1, False, hidden=6, epochs=2, minibatches=1, normalize=True, **settings).double()
    made.optimizer = lambda p: torch.optim.SGD(p, 0.1)
    return made


def maml(**settings) -> MAMLPolicy:
    torch.manual_seed(1)
    made = MAMLPolicy(2, 1, False, hidden=[6], rollouts=4, epochs=2, normalize=True, **settings).double()
    made.optimizer = lambda p: torch.optim.SGD(p, 0.1)
    return made


@pytest.mark.parametrize("make", [rl2, maml])
def test_units_do_not_matter(make, tmp_path):
    """Catches a learner that learns otherwise where rewards and observations are a thousand times as large."""
    found = []
    for pay in (1.0, 1000.0):
        data = Ledges(pay=pay, offset=2.0, meta_batch_size=6, val_tasks=2, test_tasks=2)
        learner = train_for(make(), data, 3, default_root_dir=tmp_path, precision="64-true")
        found.append(learner)
    for (name, one), other in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=name)
    start = make()
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), found[0].parameters(), strict=True))


def test_steps_after_an_end_are_not_learned_from(tmp_path):
    """Catches a policy gradient that is diluted by actions without an effect: those of dead steps get none."""
    data = Ledges(meta_batch_size=6, val_tasks=2, test_tasks=2)
    learner = maml()
    learner.trainer = SimpleNamespace(world_size=1)
    batch = data.distribution("train").sample(range(6))
    batch.task = {n: v.double() for n, v in batch.task.items()}
    rollouts, _ = learner.collect(batch, {n: p.expand(6, *p.shape) for n, p in learner.policy.named_parameters()}, 0)
    one = type(rollouts)(*(p[0] if isinstance(p, torch.Tensor) else type(p)(*(q[0] for q in p)) for p in rollouts))
    dead = one.alive == 0
    assert dead.any() and not dead.all()
    other = one._replace(action=torch.where(dead[..., None], one.action + 1.0, one.action))
    parameters = {n: p.detach() for n, p in learner.policy.named_parameters()}
    steps = [learner.inner_step(parameters, r, 0) for r in (one, other)]
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in parameters)


# Normalisation ------------------------------------------------------------------------------------------------------


def made_trial(steps: int, n: int, seed: int, shift: float = 0.0):
    g = torch.Generator().manual_seed(seed)
    alive = (torch.rand(steps, n, generator=g) < 0.7).double()
    observation = 3 * torch.randn(steps, n, 2, generator=g).double() + shift
    reward, shaped = torch.randn(2, steps, n, generator=g).double()
    seen = SimpleNamespace(alive=alive, observation=observation)
    return SimpleNamespace(seen=seen, reward=reward, shaped=5 * shaped)


def test_running_scale_is_that_of_all_that_was_met():
    """Catches a mean of means, a variance that loses its digits far from 0, and steps after an end that count."""
    scale, trials = RunningScale(2), [made_trial(5, 7, 0, 1e4), made_trial(3, 4, 1, 1e4 + 5), made_trial(1, 30, 2, 1e4)]
    scale.on = True
    for trial in trials:
        scale.update(trial)
    kept = [t.seen.alive.bool() for t in trials]
    x = torch.cat([t.seen.observation[k] for t, k in zip(trials, kept, strict=True)]).numpy()
    r, s = (
        torch.cat([getattr(t, w)[k] for t, k in zip(trials, kept, strict=True)]).numpy() for w in ("reward", "shaped")
    )
    query = torch.from_numpy(x[:4])
    expected = (x[:4] - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(scale.observation(query).numpy(), expected, rtol=1e-8)
    np.testing.assert_allclose(scale.reward(torch.from_numpy(r)).numpy(), r / np.sqrt((r**2).mean()), rtol=1e-12)
    np.testing.assert_allclose(scale.shaped(torch.from_numpy(s)).numpy(), s / np.sqrt((s**2).mean()), rtol=1e-12)
    far = scale.observation(torch.full((1, 2), 1e9).double())
    assert (far == 10).all()


def test_running_scale_over_processes_and_checkpoints():
    """Catches processes that normalise differently, and a run that goes on with other units."""
    halves = [made_trial(4, 3, 5), made_trial(4, 6, 6)]
    joined = SimpleNamespace(
        seen=SimpleNamespace(
            alive=torch.cat([h.seen.alive for h in halves], 1),
            observation=torch.cat([h.seen.observation for h in halves], 1),
        ),
        reward=torch.cat([h.reward for h in halves], 1),
        shaped=torch.cat([h.shaped for h in halves], 1),
    )
    whole = RunningScale(2)
    whole.on = True
    whole.update(joined)
    alive, x = halves[1].seen.alive[..., None], halves[1].seen.observation
    squares = torch.stack([halves[1].reward, halves[1].shaped], -1).square()
    first = torch.cat([alive.sum((0, 1)), (alive * squares).sum((0, 1)), (alive * x).sum((0, 1))])
    mean = whole._state[3:5]
    sent = iter([first, (alive * (x - mean).square()).sum((0, 1))])
    part = RunningScale(2)
    part.on = True
    part.update(halves[0], lambda value: value + next(sent))
    torch.testing.assert_close(part._state, whole._state, rtol=1e-12, atol=1e-12)
    again = RunningScale(2).to(torch.bfloat16)
    again.load_state_dict(whole.to(torch.bfloat16).state_dict())
    assert again.on and torch.equal(again._state, joined_state(whole))
    off = RunningScale(2)
    off.update(joined)
    assert not off.begun and torch.equal(off.observation(x), x)


def joined_state(scale: RunningScale) -> torch.Tensor:
    return scale.get_extra_state()[1:]


def test_who_normalises_unless_told(tmp_path):
    """Catches our own environments in other units than the published ones, and a flag that is not heeded."""
    for unscaled, normalize, on in (
        (False, None, False),
        (True, None, True),
        (True, False, False),
        (False, True, True),
    ):
        data = Ledges(meta_batch_size=4, val_tasks=2, test_tasks=2)
        data.environment.unscaled = unscaled
        made = rl2()
        made.normalize = normalize
        train_for(made, data, 1, default_root_dir=tmp_path, precision="64-true")
        assert made.normalizer.on == made.normalizer.begun == on
    assert not PointRobot().environment.unscaled
