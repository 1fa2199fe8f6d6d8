"""RL²: what its agent sees and keeps, what it minimises, and how it makes one meta-update of several steps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import models.reinforcement.rl2
from app.cli.builder import main
from app.compare import main as compare
from app.evaluate import main as evaluate
from datamodules import Bandits, PointRobot, TabularMDPs
from datamodules.core.errors import ConfigError
from models import RL2
from models.reinforcement.policies import Categorical
from models.reinforcement.rl2 import Rollout
from models.reinforcement.trials import Trial, run_trial
from tests.support.gradients import assert_is_gradient, gradients_of
from tests.support.toy import BANDITS, command

SIZES_OF = {
    "bandit": lambda **more: Bandits(arms=3, episodes=5, **more),
    "mdp": lambda **more: TabularMDPs(states=4, actions=3, horizon=3, episodes=3, **more),
    "navigation": lambda **more: PointRobot(horizon=3, episodes=3, train_tasks=None, **more),
}
SEEING = {"readout": 7, "reward_prediction": 0.7}
EVERY = pytest.mark.parametrize("family", SIZES_OF)


def learner(data, seed: int = 1, scale: float = 1.0, **settings) -> RL2:
    """For the environments, in double precision; its actions differ from state to state, unlike at first."""
    torch.manual_seed(seed)
    e = data.environment
    made = RL2(e.seen_size, e.actions, e.discrete, **{"hidden": 6, **settings}).double()
    with torch.no_grad():
        made.head.linear.weight.mul_(100 * scale)
    return made


def distribution(made: RL2, inputs):
    """Over actions, along trials."""
    return made.head(made.readout(made.policy.run(inputs), inputs))


def tasks(data, indices=range(6), split: str = "train"):
    batch = data.distribution(split).sample(list(indices))
    batch.meta_batch = len(batch)
    batch.task = {name: v.double() if v.is_floating_point() else v for name, v in batch.task.items()}
    return batch


def trial_of(made: RL2, batch, **settings) -> Trial:
    with torch.no_grad():
        return run_trial(batch, made.agent(), **settings)


# What the agent sees and keeps --------------------------------------------------------------------------------------


@EVERY
def test_inputs_are_those_of_the_paper(family):
    """Catches an action, reward or end told a step late, none at the start of a later episode, or some at the start of
    a trial: state, previous action, the reward it brought, and 1 just where it was the last of an episode."""
    data = SIZES_OF[family]()
    made, environment = learner(data), data.environment
    trial = trial_of(made, tasks(data))
    inputs = made.inputs(trial.seen)
    assert inputs.shape == (len(trial.reward), 6, environment.seen_size + environment.actions + 2)
    size, actions = environment.seen_size, environment.actions
    for t in range(len(inputs)):
        for n in range(6):
            got = inputs[t, n].tolist()
            if t == 0:
                assert got[size:] == [0.0] * (actions + 2)
                continue
            taken = trial.action[t - 1, n]
            action = [float(a == taken) for a in range(actions)] if environment.discrete else taken.tolist()
            ended = float(t % environment.horizon == 0)
            assert got[size:] == pytest.approx([*action, trial.reward[t - 1, n].item(), ended])
            if not ended:
                assert got[:size] == trial.reached[t - 1, n].tolist()
    if family == "mdp":
        assert (inputs[:: environment.horizon, :, 0] == 1).all()  # every episode starts in state 0


@EVERY
@pytest.mark.parametrize("settings", [{}, {"activation": "relu", "weight_norm": True, "input_scale": 1.0}, SEEING])
def test_what_learns_is_what_acted(family, settings):
    """Catches a state that is reset between episodes, or between acting and learning: distributions along recorded
    trials are those that the actions were drawn from, so that every first ratio is 1."""
    data = SIZES_OF[family]()
    made = learner(data, **settings)
    trial = trial_of(made, tasks(data))
    again = distribution(made, made.inputs(trial.seen))
    for one, other in zip(again, trial.extras, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert again[0].detach().std(0).min() > 1e-4  # they do change along the trial


def test_the_state_lasts_through_a_trial_and_no_longer():
    """Catches a state that is reset with an episode, so that nothing can be learnt within a trial, and one that is kept
    from another trial. All arms pay, or none does: trials differ in their rewards alone."""
    data = SIZES_OF["bandit"]()
    made = learner(data)
    batch = tasks(data)
    told = []
    for p in (0.0, 1.0, 0.0):
        batch.task = {"arms": torch.full((6, 3), p, dtype=torch.float64)}
        told.append(trial_of(made, batch).extras.logits)
    none, all_of_them, none_again = told
    assert torch.equal(none, none_again)
    assert torch.equal(none[0], all_of_them[0])
    assert (none[0] == none[0, 0]).all()  # at the start nothing is known of a task
    assert ((none[1] - all_of_them[1]).abs().amax(-1) > 1e-3).all()


def test_later_choices_depend_on_the_first_episode():
    """Catches a memory of the last reward alone: the same inputs but for the first, four episodes ago."""
    data = SIZES_OF["bandit"]()
    made = learner(data)
    inputs = made.inputs(trial_of(made, tasks(data)).seen)
    changed = inputs.clone()
    changed[1, :, 3] = 1 - changed[1, :, 3]  # the first pull's reward
    with torch.no_grad():
        last, other = (distribution(made, x).logits[-1] for x in (inputs, changed))
    assert ((last - other).abs().amax(-1) > 1e-4).all()


def test_trials_at_the_same_time_do_not_meet():
    """Catches a state on the learner: two agents that act in turn do what each does alone."""
    data = SIZES_OF["mdp"]()
    made = learner(data)
    batches = [tasks(data, range(4)), tasks(data, range(4, 8))]
    alone = [trial_of(made, batch) for batch in batches]
    agents = [made.agent(), made.agent()]
    states = [agent.begin(data.environment, batch.task) for agent, batch in zip(agents, batches, strict=True)]
    with torch.no_grad():
        for t in range(len(alone[0].reward)):
            for k, agent in enumerate(agents):
                seen = type(alone[k].seen)(*(part[t] for part in alone[k].seen))
                draws = torch.zeros(4, 1, dtype=torch.float64)
                states[k], _, choice = agent.act(states[k], seen, draws)
                torch.testing.assert_close(choice.logits, alone[k].extras.logits[t], rtol=1e-12, atol=1e-12)


@EVERY
def test_greedy_is_of_evaluation_alone(family):
    """Catches training without exploration, and an evaluation that draws though it was asked not to."""
    data = SIZES_OF[family]()
    made = learner(data, greedy=True)
    batch = tasks(data, range(40))
    drawn, likeliest = trial_of(made.train(), batch), trial_of(made.eval(), batch)
    assert torch.equal(likeliest.action, likeliest.extras.mode())
    assert not torch.equal(drawn.action, drawn.extras.mode())
    assert not torch.equal(trial_of(learner(data).eval(), batch).action, likeliest.action)


# What is minimised --------------------------------------------------------------------------------------------------


def outputs(made: RL2, inputs):
    """Logits (steps, N, actions), values (steps, N) and foreseen rewards (steps, N, actions), by NumPy from states."""

    def features(layer, cell):
        states, x = cell.run(inputs).numpy(), inputs.numpy()
        if layer is None:
            return states
        weight, bias = layer.weight.numpy(), layer.bias.numpy()
        return np.maximum(0, states @ weight[:, :6].T + x @ weight[:, 6:].T + bias)

    def linear(layer, features):
        return features @ layer.weight.numpy().T + layer.bias.numpy()

    of_policy, of_critic = features(made.readout.layer, made.policy), features(made.critic_readout.layer, made.critic)
    foreseen = None if made.foreseen is None else linear(made.foreseen, of_policy)
    return linear(made.head.linear, of_policy), linear(made.value, of_critic)[..., 0], foreseen


def restated_loss(made: RL2, part: Rollout, logits, values, foreseen) -> tuple[float, float]:
    """Loss and divergence in loops, from what ``outputs`` gives."""
    steps, count = part.action.shape
    gain, entropy, error, kl = 0.0, 0.0, 0.0, 0.0
    for t in range(steps):
        for n in range(count):
            new, old = (np.exp(x[t, n]) / np.exp(x[t, n]).sum() for x in (logits, part.old.logits.numpy()))
            action, advantage = part.action[t, n].item(), part.advantage[t, n].item()
            ratio = new[action] / old[action]
            gain += min(ratio * advantage, min(max(ratio, 1 - made.clip), 1 + made.clip) * advantage)
            entropy -= float((new * np.log(new)).sum())
            kl += float((old * np.log(old / new)).sum())
            error += (values[t, n] - part.value_target[t, n].item()) ** 2
            if foreseen is not None:
                error += made.reward_prediction * (foreseen[t, n, action] - part.reward[t, n].item()) ** 2
    total = steps * count
    return (error - gain - made.entropy * entropy) / total, kl / total


@pytest.mark.parametrize(("discount", "decay", "settings"), [(0.9, 0.3, {}), (0.99, 1.0, {}), (0.9, 0.3, SEEING)])
def test_losses_are_those_written_out(discount, decay, settings):
    """Catches a mean over other steps, a sign, a value in another unit than its target, a divergence the wrong way
    round, an entropy that is not weighed, a reward foreseen of another action or of the step before, and a layer that
    policy and value share; after a step, so that ratios are clipped."""
    data = SIZES_OF["mdp"]()
    made = learner(data, discount=discount, decay=decay, entropy=0.05, clip=0.1, **settings)
    trial = trial_of(made, tasks(data))
    with torch.no_grad():
        rollout = made.rollout(trial)
        _, values, _ = outputs(made, rollout.inputs)
    steps = len(trial.reward)
    unit = sum(discount**t for t in range(steps))
    for n in range(6):
        rewards = trial.reward[:, n].tolist()
        for t in range(steps):
            advantage = 0.0
            for k in range(t, steps):
                following = unit * values[k + 1, n] if k + 1 < steps else 0.0
                advantage += (discount * decay) ** (k - t) * (rewards[k] + discount * following - unit * values[k, n])
            assert rollout.advantage[t, n].item() == pytest.approx(advantage, rel=1e-9, abs=1e-9)
            target = (advantage + unit * values[t, n]) / unit
            assert rollout.value_target[t, n].item() == pytest.approx(target, rel=1e-9, abs=1e-9)
            if decay == 1:  # the discounted return of the rest of the trial
                rest = sum(discount ** (k - t) * rewards[k] for k in range(t, steps))
                assert rollout.value_target[t, n].item() == pytest.approx(rest / unit, rel=1e-9)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        logits, values, foreseen = outputs(made, rollout.inputs)
        loss, kl = made.losses(rollout)
    ratio = (logits - rollout.old.logits.numpy()).max()
    assert ratio > 0.1
    expected = restated_loss(made, rollout, logits, values, foreseen)
    assert loss.item() == pytest.approx(expected[0], rel=1e-9)
    assert kl.item() == pytest.approx(expected[1], rel=1e-7)
    assert kl > 1e-3


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bandit", {}),
        ("mdp", {"activation": "relu", "weight_norm": True}),
        ("navigation", {"weight_norm": True}),
        ("mdp", SEEING),
        ("navigation", SEEING),
    ],
)
def test_the_gradient_is_that_of_finite_differences(family, settings):
    """Catches a part of the loss that is cut from the graph, or a target that is not a constant of it."""
    data = SIZES_OF[family]()
    made = learner(data, entropy=0.1, clip=0.3, **settings)
    with torch.no_grad():
        rollout = made.rollout(trial_of(made, tasks(data)))
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    made.losses(rollout)[0].backward()
    assert_is_gradient(gradients_of(made), made.named_parameters(), lambda: made.losses(rollout)[0], abs=2e-8)


def test_rewards_of_continuous_actions_are_foreseen_by_what_is_taken():
    """Catches a reward that does not depend on the action, and none where the action is 0."""
    data = SIZES_OF["navigation"]()
    made = learner(data, **SEEING)
    assert made.foreseen is not None
    features = torch.randn(3, 5, 7, dtype=torch.float64)
    action = torch.randn(3, 5, 2, dtype=torch.float64)
    x, y, nothing = (features @ made.foreseen.weight.T + made.foreseen.bias).unbind(-1)
    expected = x * action[..., 0] + y * action[..., 1] + nothing
    torch.testing.assert_close(made.rewards(features, action), expected, rtol=1e-12, atol=1e-12)


def known(made: RL2, probability: float) -> None:
    """The policy takes arm 0 of 2 with this probability, whatever it sees."""
    with torch.no_grad():
        made.head.linear.weight.zero_()
        made.head.linear.bias.copy_(torch.tensor([probability, 1 - probability]).log())


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_policy_gradient_of_one_pull_is_the_analytic_one(baseline):
    """Catches a score that is weighed wrongly: of an arm that pays and one that does not, pulled with probabilities p
    and 1 - p, the expected reward is p, and its gradient by the logits p (1 - p) and its negative, whatever is
    subtracted from the rewards. Four trials are drawn in just these proportions."""
    data = Bandits(arms=2, episodes=1)
    made = learner(data)
    known(made, 0.25)
    action = torch.tensor([[0, 1, 1, 1]])
    inputs = torch.zeros(1, 4, 4, dtype=torch.float64)
    old = Categorical(distribution(made, inputs).logits.detach())
    reward = (action == 0).double()
    loss, kl = made.losses(
        Rollout(inputs, action, reward, old, reward - baseline, *torch.stack([0 * reward, 0 * reward + 1]))
    )
    loss.backward()
    torch.testing.assert_close(made.head.linear.bias.grad, torch.tensor([-0.1875, 0.1875], dtype=torch.float64))
    assert kl.item() == pytest.approx(0, abs=1e-15)


# One meta-update ----------------------------------------------------------------------------------------------------


def train(made: RL2, data, steps: int = 1) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=steps,
        max_epochs=-1,
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(made, datamodule=data)
    return trainer


def sgd(rate: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


@pytest.fixture
def seen(monkeypatch):
    """What happens in training: the rows of each part, its divergence, and the trials."""
    events: dict[str, list] = {"rows": [], "kl": [], "trials": [], "rollouts": [], "steps": []}
    of, losses, trial, step = Rollout.of, RL2.losses, models.reinforcement.rl2.run_trial, torch.optim.SGD.step

    def recorded_losses(self, part):
        loss, kl = losses(self, part)
        events["kl"].append(kl.item())
        return loss, kl

    def recorded_trial(*arguments, **more):
        events["trials"].append(trial(*arguments, **more))
        return events["trials"][-1]

    def recorded_of(self, rows):
        events["rows"].append(rows.tolist())
        events["rollouts"].append(self)
        return of(self, rows)

    def recorded_step(self, *arguments, **more):
        events["steps"].append(
            math.sqrt(sum(p.grad.square().sum().item() for g in self.param_groups for p in g["params"]))
        )
        return step(self, *arguments, **more)

    monkeypatch.setattr(Rollout, "of", recorded_of)
    monkeypatch.setattr(RL2, "losses", recorded_losses)
    monkeypatch.setattr(models.reinforcement.rl2, "run_trial", recorded_trial)
    monkeypatch.setattr(torch.optim.SGD, "step", recorded_step)
    return events


FREE = {"kl_limit": math.inf, "max_grad_norm": None}


def test_one_meta_update_is_the_closed_form(seen):
    """Catches advantages that are not normalised over all trials and steps, a step that is left out or made twice, and
    a gradient that the tasks are counted in wrongly: the bias moves by the mean of advantage × score."""
    data = Bandits(arms=2, episodes=1, meta_batch_size=37)
    made = learner(data, optimizer=sgd(0.5), epochs=1, minibatches=1, **FREE)
    known(made, 0.3)
    before = made.head.linear.bias.detach().clone()
    train(made, data)
    (trial,) = seen["trials"]
    reward, first = trial.reward[0].double(), (trial.action[0] == 0).double()
    assert 0 < first.mean() < 1 and 0 < reward.mean() < 1
    rollout = seen["rollouts"][0]
    # At the start nothing is known of a task, so the value is the same for all and drops out.
    advantage = (reward - reward.mean()) / (reward.var(correction=0).sqrt() + 1e-8)
    torch.testing.assert_close(rollout.advantage[0], advantage)
    moved = 0.5 * (advantage * (first - 0.3)).mean()
    torch.testing.assert_close(made.head.linear.bias.detach() - before, torch.stack([moved, -moved]))
    assert len(seen["steps"]) == 1


def test_advantages_are_centred_at_each_step_and_of_one_deviation(seen):
    """Catches one mean for all steps, and a deviation of each step, or with another divisor."""
    data = SIZES_OF["mdp"](meta_batch_size=10)
    made = learner(data, optimizer=sgd(0.1), epochs=1, minibatches=1, **FREE)
    plain = learner(data)
    train(made, data)
    with torch.no_grad():
        plain = plain.rollout(seen["trials"][0]).advantage
    got = seen["rollouts"][0].advantage
    centred = torch.stack([of_step - of_step.mean() for of_step in plain])
    torch.testing.assert_close(got, centred / centred.pow(2).mean().sqrt(), rtol=1e-6, atol=1e-6)
    deviations = got.std(1)
    assert deviations.max() > 1.05 * deviations.min()


def test_every_epoch_meets_every_trial_once(seen):
    """Catches trials that are left out or met twice, parts in the same order, or of other sizes than alike."""
    data = SIZES_OF["bandit"](meta_batch_size=10)
    made = learner(data, optimizer=sgd(0.1), epochs=3, minibatches=4, **FREE)
    train(made, data, steps=2)
    assert len(seen["rows"]) == 2 * 3 * 4
    epochs = [seen["rows"][4 * e : 4 * e + 4] for e in range(6)]
    for parts in epochs:
        assert sorted(row for part in parts for row in part) == list(range(10))
        assert sorted(map(len, parts)) == [2, 2, 3, 3]
    assert len({str(parts) for parts in epochs}) == 6


def test_parts_of_unequal_sizes_count_by_their_trials(seen):
    """Catches the mean of a part of three taken for that of a part of two: without a change between the parts, their
    gradients add up to that of all trials."""
    data = SIZES_OF["bandit"](meta_batch_size=5)
    gradients = {}
    for minibatches in (1, 2):
        made = learner(data, optimizer=sgd(1e-9), epochs=1, minibatches=minibatches, **FREE)
        before = torch.cat([p.detach().flatten() for p in made.parameters()])
        train(made, data)
        after = torch.cat([p.detach().flatten() for p in made.parameters()])
        gradients[minibatches] = (before - after) / (1e-9 * minibatches)
    assert [len(r) for r in seen["rows"]] == [5, 3, 2]
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-4, atol=1e-6)


def test_one_meta_update_is_counted_whatever_the_epochs(seen):
    """Catches a step count that is that of the optimizer: --trainer.max_steps would mean something else."""
    data = SIZES_OF["bandit"](meta_batch_size=8)
    for epochs, minibatches in ((1, 1), (2, 3)):
        seen["steps"].clear()
        made = learner(data, optimizer=sgd(0.1), epochs=epochs, minibatches=minibatches, **FREE)
        trainer = train(made, data, steps=3)
        assert trainer.global_step == 3
        assert len(seen["steps"]) == 3 * epochs * minibatches
    batches = [trial.seen.observation.shape[1] for trial in seen["trials"]]
    assert batches == [8] * 6


def test_further_epochs_end_at_the_limit(seen):
    """Catches a limit that is not looked at, looked at after one part, or that throws away the step that was due."""
    data = SIZES_OF["bandit"](meta_batch_size=12)

    def divergences(limit: float) -> list[float]:
        seen["kl"].clear(), seen["steps"].clear()
        train(learner(data, optimizer=sgd(0.1), epochs=5, minibatches=3, kl_limit=limit, max_grad_norm=None), data)
        assert len(seen["steps"]) == len(seen["kl"])
        return [sum(seen["kl"][3 * e : 3 * e + 3]) / 3 for e in range(len(seen["kl"]) // 3)]

    free = divergences(math.inf)
    assert len(free) == 5
    assert 0 < free[0] < free[1] < free[2] < free[3]
    for ended in range(3):
        assert divergences(0.5 * (free[ended] + free[ended + 1])) == pytest.approx(free[: ended + 2])
    assert divergences(0.5 * free[0]) == pytest.approx(free[:1])


def test_gradients_are_clipped_together(seen):
    """Catches a norm of the policy alone, or a setting that is ignored; without it the same gradients are longer."""
    data = SIZES_OF["bandit"](meta_batch_size=8)
    norms = {}
    for limit in (None, 1e-3):
        seen["steps"].clear()
        settings = {"kl_limit": math.inf, "max_grad_norm": limit}
        train(learner(data, optimizer=sgd(1e-3), epochs=2, minibatches=2, **settings), data)
        norms[limit] = list(seen["steps"])
    assert min(norms[None]) > 1e-2
    assert norms[1e-3] == pytest.approx([1e-3] * 4, rel=1e-3)


def test_the_rate_changes_with_meta_updates():
    """Catches a schedule that goes by steps of the optimizer, or not at all."""
    data = SIZES_OF["bandit"](meta_batch_size=8)
    made = learner(
        data,
        optimizer=sgd(1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        epochs=2,
        minibatches=2,
    )
    trainer = train(made, data, steps=5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_trials_fewer_than_parts_are_refused():
    """Catches the mean of no trials, which is not a number, and weights that are lost to it."""
    data = SIZES_OF["bandit"](meta_batch_size=3)
    with pytest.raises(ConfigError, match=r"minibatches is 4 but a process has 3 .*--data.init_args.meta_batch_size 4"):
        train(learner(data, minibatches=4), data)


# Through the commands -----------------------------------------------------------------------------------------------


def error_of(capsys, arguments: list[str]) -> str:
    """The line that a command ends with, and code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in error)
    return error[-1]


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        ("--model.actions 4", "actions is 4 but the environment has 3: give --model.init_args.actions 3"),
        ("--model.observations 2", "the environment has 0: give --model.init_args.observations 0"),
        ("--data.revealed true", "observations is 0 but the environment has 3: give --model.init_args.observations 3"),
        ("--model.discrete false", "the environment has True: give --model.init_args.discrete true"),
        ("--data.arms 0", "arms is 0 but must be at least 1"),
        ("--model.hidden 0", "hidden is 0 but must be at least 1"),
        ("--model.minibatches 9", "minibatches is 9 but a process has 8 trials"),
        ("--trainer.gradient_clip_val 1", "leave out --trainer.gradient_clip_val"),
        ("--trainer.accumulate_grad_batches 2", "accumulate_grad_batches"),
        ("--trainer.precision 16-mixed", "give --trainer.precision bf16-mixed"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_cure(flags, cure, tmp_path, capsys):
    """Catches a failure deep in a matrix product, options that several updates of their own pass by, and scaled
    gradients of half precision that nothing scales back."""
    error = error_of(capsys, command("RL2", tmp_path, *flags.split(), steps=2))
    assert error.startswith("error: ") and cure in error


def test_learners_of_other_tasks_are_refused(tmp_path, capsys):
    """Catches a policy that is given images, or a classifier that is given environments."""
    images = command("RL2", tmp_path, "--data", "tests.support.toy.ToyImages", steps=2)
    assert "RL2 learns reinforcement, but ToyImages gives classification" in error_of(capsys, images)
    bandits = command("MAML", tmp_path, *BANDITS, steps=2)
    assert "MAML learns classification or regression, but Bandits gives reinforcement" in error_of(capsys, bandits)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained runs, of other seeds of the weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", "1"), ("two", "2")):
        flags = ("--name", name, "--seed_everything", seed, "--data.test_tasks", "30")
        main(command("RL2", folder, *flags, steps=6))
    return folder


def metrics(folder) -> dict:
    return json.loads((folder / "results.json").read_text())["metrics"]


def test_metrics_do_not_depend_on_the_size_of_batches(runs, tmp_path):
    """Catches chance that goes by places in a batch: 30 tasks at once, by 7 and one by one."""
    checkpoint = ["--ckpt_path", str(runs / "one" / "checkpoints" / "best.ckpt")]
    for size in ("30", "7", "1"):
        out = tmp_path / size
        evaluate([*checkpoint, "--out", str(out), "--data.init_args.eval_batch_size", size])
        assert metrics(out) == metrics(runs / "one")


def test_evaluates_trials_of_other_lengths(runs, tmp_path):
    """Catches --episodes that is ignored: 40 pulls bring more than the 4 of training, and the first is the same."""
    checkpoint = ["--ckpt_path", str(runs / "one" / "checkpoints" / "best.ckpt"), "--out", str(tmp_path)]
    evaluate([*checkpoint, "--episodes", "40"])
    longer, trained = metrics(tmp_path), metrics(runs / "one")
    assert longer["first_episode"]["mean"] == trained["first_episode"]["mean"]
    assert 5 < longer["return"]["mean"] / trained["return"]["mean"] < 20
    with np.load(tmp_path / "test_tasks.npz") as kept:
        assert kept["returns"].shape == (30, 40)
        np.testing.assert_allclose(kept["returns"].sum(1), kept["return"])


def test_two_runs_are_compared_on_the_same_environments(runs, tmp_path, capsys):
    """Catches environments that are taken for others though they are the same, or the reverse."""
    compare([str(runs / "one"), str(runs / "two"), "--out", str(tmp_path)])
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["tasks"] == 30 and content["episodes"] == 4
    told = {row["learner"]: row["metrics"]["return"]["mean"] for row in content["learners"]}
    (difference,) = content["differences"]
    assert difference["metrics"]["return"]["mean"] == pytest.approx(told["one"] - told["two"], abs=1e-9)
    regret = difference["metrics"]["regret"]["mean"]
    assert regret == pytest.approx(-difference["metrics"]["return"]["mean"], abs=1e-6)  # of the same optimum
    capsys.readouterr()
    checkpoint = ["--ckpt_path", str(runs / "two" / "checkpoints" / "best.ckpt"), "--out", str(tmp_path / "longer")]
    evaluate([*checkpoint, "--episodes", "5"])
    with pytest.raises(SystemExit):
        compare([str(runs / "one"), str(tmp_path / "longer")])
    assert "episodes 4 and 5; evaluate both with the same --episodes" in capsys.readouterr().err
