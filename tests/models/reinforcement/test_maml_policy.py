"""MAML for policies: the meta-gradient through sampling, the outer loss, the baseline, adaptation in evaluation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev
from torch.utils._pytree import tree_map

from datamodules.reinforcement.environments import Environments
from datamodules.reinforcement.mdps import TabularMDP
from datamodules.reinforcement.navigation import DenseNavigation, PointRobot
from models import MAMLPolicy
from models.core.base_learner import Parameters
from models.core.second_order import hessian_product, inner_product
from models.reinforcement.maml_policy import Rollouts, linear_baseline, policy_surrogate
from models.reinforcement.policies import Categorical, Gaussian
from models.reinforcement.trust_region import trust_region_step

TRANSITIONS = torch.tensor([[[0.9, 0.1], [0.3, 0.7]], [[0.4, 0.6], [0.8, 0.2]]], dtype=torch.float64)
REWARDS = torch.tensor([[0.3, -0.8], [2.0, -1.5]], dtype=torch.float64)
BASELINE = torch.tensor([[0.7, 0.0], [-0.4, 0.9]], dtype=torch.float64)  # by step and state: any will do


def tabular(**settings) -> MAMLPolicy:
    """A learner of decision processes with two states, two actions and two steps."""
    torch.manual_seed(4)
    settings = {
        "inner_rate": 3.0,
        "discount": 1.0,
        "normalize_advantages": False,
        "sampling_correction": True,
    } | settings
    learner = MAMLPolicy(2, 2, hidden=[3], activation="tanh", **settings).double()
    with torch.no_grad():  # unlike what it starts from, where all actions are alike
        learner.policy[-1].linear.weight.normal_()
        learner.policy[-1].linear.bias.normal_()
    return learner


def start(learner: MAMLPolicy) -> Parameters:
    return {name: p.detach().clone() for name, p in learner.policy.named_parameters()}


def log_policy(learner: MAMLPolicy, parameters: Parameters) -> Tensor:
    return functional_call(learner.policy, parameters, (torch.eye(2, dtype=torch.float64),)).logits.log_softmax(-1)


def expected_return(learner: MAMLPolicy, parameters: Parameters, discount: float = 1.0) -> Tensor:
    """In closed form, from state 0."""
    policy = log_policy(learner, parameters).exp()
    last = (policy * REWARDS).sum(1)
    return (policy[0] * (REWARDS[0] + discount * TRANSITIONS[0] @ last)).sum()


def all_episodes(learner: MAMLPolicy, parameters: Parameters, discount: float = 1.0) -> Rollouts:
    """The eight episodes there are; the mean of what is linear in the advantages is then its expectation."""
    with torch.no_grad():
        log_p = log_policy(learner, parameters)
    states, actions, advantages = [], [], []
    for first in range(2):
        for state in range(2):
            for second in range(2):
                p = log_p[0, first].exp() * TRANSITIONS[0, first, state] * log_p[state, second].exp()
                to_come = discount * REWARDS[state, second]
                of_episode = [REWARDS[0, first] + to_come - BASELINE[0, 0], REWARDS[state, second] - BASELINE[1, state]]
                states.append([0, state])
                actions.append([first, second])
                advantages.append([8 * p * a for a in of_episode])
    state = torch.tensor(states).T
    one_hot = torch.eye(2, dtype=torch.float64)[state]
    advantage = torch.tensor(advantages).double().T
    alive = torch.ones_like(advantage)
    return Rollouts(one_hot, torch.tensor(actions).T, Categorical(log_p[state]), advantage, alive)


def exact_path(learner: MAMLPolicy, parameters: Parameters, steps: int) -> list[Parameters]:
    """Parameters before and after steps along the gradient of the expected return; the mean is over both actions."""
    path = [parameters]
    for _ in range(steps):
        gradient = grad(lambda p: expected_return(learner, p))(path[-1])
        path.append({n: p + learner.inner_rate / 2 * gradient[n] for n, p in path[-1].items()})
    return path


def meta_gradient(learner: MAMLPolicy, *path: Rollouts) -> Tensor:
    """Of the expected return after adaptation, all parameters end to end."""
    loss, _ = learner.losses(dict(learner.policy.named_parameters()), *path)
    gradient = torch.autograd.grad(-2 * loss, list(learner.policy.parameters()))
    return torch.cat([g.flatten() for g in gradient])


def differences(function: Callable[[Parameters], float], at: Parameters, step: float = 1e-5) -> Tensor:
    """Central differences of a function by every number of its argument."""
    result = []
    for name, value in at.items():
        for place in range(value.numel()):
            ends = []
            for sign in (1, -1):
                moved = value.flatten().clone()
                moved[place] += sign * step
                ends.append(function(at | {name: moved.view_as(value)}))
            result.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2])
def test_meta_gradient_is_that_of_the_expected_return_after_adaptation(steps):
    """Catches a meta-gradient that leaves out how the episodes of the inner steps depend on the policy, and inner
    steps that are cut off from one another; episodes are all there are, by their probabilities."""
    learner = tabular(inner_steps=steps)
    theta = start(learner)
    path = exact_path(learner, theta, steps)
    rollouts = [all_episodes(learner, p) for p in path]

    def objective(parameters: Parameters) -> float:
        return expected_return(learner, exact_path(learner, parameters, steps)[-1]).item()

    expected = differences(objective, theta)
    torch.testing.assert_close(meta_gradient(learner, *rollouts), expected, rtol=1e-7, atol=1e-8)
    for step in range(steps):
        adapted = learner.inner_step(path[step], rollouts[step], step)
        for name, value in path[step + 1].items():
            torch.testing.assert_close(adapted[name], value, rtol=1e-12, atol=1e-12)
    learner.sampling_correction = False
    published = meta_gradient(learner, *rollouts)
    assert (published - expected).norm() > 0.1 * expected.norm()


def test_surrogate_has_both_derivatives_of_the_discounted_return():
    """Catches a weight of later steps that is not the discount's, and a baseline that biases either derivative."""
    learner, discount = tabular(), 0.8
    theta = start(learner)
    episodes = all_episodes(learner, theta, discount)

    def surrogate(parameters: Parameters, corrected: bool = True) -> Tensor:
        now = functional_call(learner.policy, parameters, (episodes.observation,))
        ratio = learner.log_ratio(now, episodes)
        return policy_surrogate(ratio, episodes.advantage, discount, 1.0, corrected).sum(0).mean()

    def exact(parameters: Parameters) -> Tensor:
        return expected_return(learner, parameters, discount)

    torch.testing.assert_close(grad(surrogate)(theta), grad(exact)(theta), rtol=1e-10, atol=1e-12)
    second, expected = (jacrev(grad(f))(theta) for f in (surrogate, exact))
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-12)
    published = grad(lambda p: surrogate(p, False))(theta)
    torch.testing.assert_close(published, grad(exact)(theta), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_surrogate_is_loaded_dice_step_by_step(decay):
    """Catches decayed sums of log-ratios that are off by a step: against the recursion of the paper's Algorithm 1."""
    g = torch.Generator().manual_seed(0)
    log_ratio = 0.3 * torch.randn(5, 3, generator=g, dtype=torch.float64)
    advantages = torch.randn(5, 3, generator=g, dtype=torch.float64)
    w, expected = torch.zeros(3, dtype=torch.float64), []
    for t in range(5):
        v = decay * w
        w = v + log_ratio[t]
        expected.append(0.9**t * advantages[t] * (w.exp() - v.exp()))
    got = policy_surrogate(log_ratio, advantages, 0.9, decay, True)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_first_order_is_the_gradient_at_the_adapted_parameters():
    """Catches an option that changes nothing, or that takes the gradient before adaptation."""
    learner = tabular(first_order=True)
    path = exact_path(learner, start(learner), 1)
    rollouts = [all_episodes(learner, p) for p in path]
    first = meta_gradient(learner, *rollouts)
    expected = grad(lambda p: expected_return(learner, p))(path[1])
    torch.testing.assert_close(first, torch.cat([g.flatten() for g in expected.values()]), rtol=1e-10, atol=1e-12)
    learner.first_order = False
    assert (meta_gradient(learner, *rollouts) - first).norm() > 0.1 * first.norm()


def test_sampled_meta_gradient_is_unbiased_with_the_correction_alone():
    """Catches a bias that only sampled episodes show: of the baseline fitted to them, or of episodes that are not
    independent. Also shows that of the published estimator."""
    learner, groups = tabular(rollouts=4000), 40
    facts = {"transitions": TRANSITIONS.expand(groups, 2, 2, 2), "rewards": REWARDS.expand(groups, 2, 2)}
    batch = Environments(TabularMDP(2, 2, 2), torch.arange(groups), 0, "train", 1, groups, facts)
    theta = start(learner)
    exact = differences(lambda p: expected_return(learner, exact_path(learner, p, 1)[-1]).item(), theta)
    sampled = [rollouts for rollouts, _ in learner.blocks(batch, 1)]
    gradients = {}
    for corrected in (True, False):
        learner.sampling_correction = corrected
        of_groups = [meta_gradient(learner, *tree_map(lambda t, k=k: t[k], sampled)) for k in range(groups)]
        gradients[corrected] = torch.stack(of_groups)
    direction = gradients[False].mean(0) - exact
    for corrected, of_groups in gradients.items():
        along = (of_groups - exact) @ direction
        errors = abs(along.mean().item()) / (along.std().item() / groups**0.5)
        assert errors < 3 if corrected else errors > 15
    corrected = gradients[True]
    errors = (corrected.mean(0) - exact).abs() / (corrected.std(0) / groups**0.5)
    assert (errors < 4).all()


def test_outer_loss_after_a_gaussian_inner_step_by_hand():
    """Catches a loss of the unadapted policy, wrong signs, clipping on the wrong side, and a mean over wrong axes."""
    learner = MAMLPolicy(2, 1, discrete=False, hidden=[], inner_rate=0.4, discount=1.0, clip=0.1).double()
    g = np.random.default_rng(0)
    weight, bias, log_deviation = g.normal(size=2), g.normal(), -0.3
    head = learner.policy[-1]
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(weight)[None])
        head.linear.bias.fill_(bias)
        head.log_deviation.fill_(log_deviation)
    steps, k = 3, 5
    path, parts = [], []
    for _ in range(2):
        o, a, advantage = g.normal(size=(steps, k, 2)), g.normal(size=(steps, k)), g.normal(size=(steps, k))
        old_mean, old_log = o @ weight + bias + 0.1 * g.normal(size=(steps, k)), log_deviation + 0.05
        parts.append((o, a, advantage, old_mean, old_log))
        old = Gaussian(torch.from_numpy(old_mean)[..., None], torch.full((steps, k, 1), old_log).double())
        alive = torch.ones(steps, k).double()
        path.append(
            Rollouts(torch.from_numpy(o), torch.from_numpy(a)[..., None], old, torch.from_numpy(advantage), alive)
        )
    o, a, advantage, *_ = parts[0]
    z = (a - o @ weight - bias) / np.exp(log_deviation)
    score = advantage * z / np.exp(log_deviation)
    adapted = weight + 0.4 * (score[..., None] * o).mean((0, 1)), bias + 0.4 * score.mean()
    adapted_log = log_deviation + 0.4 * (advantage * (z**2 - 1)).mean()
    o, a, advantage, old_mean, old_log = parts[1]
    mean = o @ adapted[0] + adapted[1]
    z, old_z = (a - mean) / np.exp(adapted_log), (a - old_mean) / np.exp(old_log)
    ratio = np.exp(old_log - adapted_log + (old_z**2 - z**2) / 2)
    gain = [min(r * x, min(max(r, 0.9), 1.1) * x) for r, x in zip(ratio.flat, advantage.flat, strict=True)]
    assert 0 < np.isclose(gain, (ratio * advantage).flatten()).sum() < len(gain)  # some are clipped
    apart = (np.exp(2 * old_log) + (old_mean - mean) ** 2) / (2 * np.exp(2 * adapted_log))
    loss, kl = learner.losses(start(learner), *path)
    assert loss.item() == pytest.approx(-np.mean(gain), rel=1e-10)
    assert kl.item() == pytest.approx(np.mean(adapted_log - old_log + apart - 0.5), rel=1e-10)


def test_linear_baseline_is_ridge_regression_within_each_task():
    """Catches a fit over several tasks, a time or clipping other than rllab's, and too little precision."""
    g = torch.Generator().manual_seed(0)
    steps, tasks, k = 7, 3, 4
    observation = 6 * torch.randn(steps, tasks, k, 2, generator=g)
    returns = torch.randn(steps, tasks, k, generator=g)
    got = linear_baseline(observation, returns)
    for task in range(tasks):
        o = np.clip(observation[:, task].double().numpy(), -10, 10)
        t = np.arange(steps)[:, None] / 100 * np.ones((steps, k))
        x = np.stack([*o.transpose(2, 0, 1), *(o**2).transpose(2, 0, 1), t, t**2, t**3, np.ones_like(t)], -1)
        x = x.reshape(-1, 8)
        # Ridge regression is least squares with a row for each weight.
        rows = np.r_[x, np.sqrt(1e-5) * np.eye(8)]
        targets = np.r_[returns[:, task].double().numpy().ravel(), np.zeros(8)]
        values = x @ np.linalg.lstsq(rows, targets, rcond=None)[0]
        np.testing.assert_allclose(got[:, task].numpy().ravel(), values, rtol=1e-5, atol=1e-5)


def navigation(tasks: int, episodes: int = 3) -> Environments:
    data = PointRobot(horizon=4, episodes=episodes, train_tasks=None)
    return data.distribution("val").sample(range(tasks)).apply(lambda t: t.double() if t.is_floating_point() else t)


def test_repeated_environments_have_chance_of_their_own():
    """Catches episodes of a task that are all the same, and chance that depends on the other tasks of the batch."""
    batch = navigation(5).repeated(3)
    draws = batch.draws(2)
    assert batch.index.tolist() == [i for i in range(5) for _ in range(3)]
    assert len(draws.unique()) == 30
    assert torch.equal(batch.task["goal"][3:6], navigation(5).task["goal"][[1, 1, 1]])
    alone = navigation(5)
    alone.index, alone.task = alone.index[2:3], {"goal": alone.task["goal"][2:3]}
    assert torch.equal(alone.repeated(3).draws(2), draws[6:9])
    assert torch.equal(alone.repeated(2).draws(2), draws[6:8])


@pytest.mark.parametrize("discounted", [False, True])
def test_evaluation_adapts_to_each_task_step_by_step(discounted):
    """Catches tasks that share what they learn, episodes of another policy, a wrong rate after the trained steps,
    advantages normalised over all tasks, and graphs that evaluation keeps."""
    torch.manual_seed(0)
    rates = {"inner_rate": 0.5, "later_rate": 0.2, "discount": 0.9, "decay": 0.7, "discounted_steps": discounted}
    learner = MAMLPolicy(2, 2, discrete=False, hidden=[5], activation="tanh", rollouts=6, **rates).double().eval()
    batch = navigation(3)
    with torch.inference_mode():
        learner.evaluation_step(batch, "val")
    table = learner.stage_metrics("val").table()
    assert not any(v.requires_grad for v in table.values())
    environment = DenseNavigation(4)
    for task in range(3):
        parameters, goal = start(learner), batch.task["goal"][task].expand(6, 2)
        one = navigation(3)
        one.index, one.task = one.index[task : task + 1], {"goal": goal[:1]}
        for block, rate in enumerate((0.5, 0.2, 0.0)):
            starts, choices = (one.repeated(6).draws(n, 2, purpose=3 * block + p) for n, p in ((1, 1), (4, 3)))
            state, seen, acted, rewards = 2 * starts[:, 0] - 1, [], [], []
            for t in range(4):
                now = functional_call(learner.policy, parameters, (state,))
                deviation = parameters["2.log_deviation"].exp()
                noise = torch.special.ndtri(choices[:, t])
                seen.append(state)
                acted.append(now.mean + deviation * noise)
                state, reward, *_ = environment.step({"goal": goal}, state, acted[-1], starts)
                rewards.append(reward)
            reward = torch.stack(rewards)
            assert table["returns"][task, block].item() == pytest.approx(reward.sum(0).mean().item(), rel=1e-8)
            returns = torch.stack([sum(0.9 ** (j - t) * reward[j] for j in range(t, 4)) for t in range(4)])
            value = linear_baseline(torch.stack(seen)[:, None], returns[:, None])[:, 0]
            value = torch.cat([value, torch.zeros(1, 6).double()])
            delta = reward + 0.9 * value[1:] - value[:-1]
            advantage = torch.stack([sum(0.63 ** (j - t) * delta[j] for j in range(t, 4)) for t in range(4)])
            advantage = (advantage - advantage.mean()) / advantage.std(correction=0)
            leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
            now = functional_call(learner.policy, leaves, (torch.stack(seen),))
            log_p = torch.distributions.Normal(now.mean, now.log_deviation.exp()).log_prob(torch.stack(acted)).sum(-1)
            weights = 0.9 ** torch.arange(4)[:, None] if discounted else 1.0
            gain = (weights * advantage * log_p).mean()
            gradient = dict(zip(leaves, torch.autograd.grad(gain, list(leaves.values())), strict=True))
            parameters = {n: (p + rate * gradient[n]).detach() for n, p in leaves.items()}


def quadratic(size: int = 4) -> tuple[Tensor, Tensor, Parameters]:
    g = torch.Generator().manual_seed(2)
    root, slope, at = (torch.randn(*shape, generator=g).double() for shape in ((size, size), (size,), (size,)))
    return root @ root.T + torch.eye(size), slope, {"a": at[:3], "b": at[3:]}


def joined(parameters: Parameters) -> Tensor:
    return torch.cat(list(parameters.values()))


def test_trust_region_step_solves_a_quadratic_problem():
    """Catches a step of the wrong direction or length, and parts of two processes that are not summed: where the loss
    is linear the best step within the region is known."""
    matrix, slope, at = quadratic()
    start_at, limit = joined(at), 0.02

    def loss(p: Parameters) -> Tensor:
        return slope @ joined(p)

    def divergence(p: Parameters) -> Tensor:
        away = joined(p) - start_at
        return away @ matrix @ away / 2

    natural = torch.linalg.solve(matrix, slope)
    expected = start_at - (2 * limit / (slope @ natural)).sqrt() * natural
    got = trust_region_step(loss, divergence, at, limit, damping=1e-9)
    torch.testing.assert_close(joined(got), expected, rtol=1e-6, atol=1e-7)

    def total(values):
        return tree_map(lambda v: 2 * v, values)

    halves = trust_region_step(lambda p: loss(p) / 2, lambda p: divergence(p) / 2, at, limit, total, damping=1e-9)
    torch.testing.assert_close(joined(halves), expected, rtol=1e-6, atol=1e-7)


def test_trust_region_step_goes_back_as_far_as_it_must_or_stays():
    """Catches a line search that accepts what is outside the region or no better."""
    matrix, slope, at = quadratic()
    start_at, limit = joined(at), 0.02

    def away(p: Parameters) -> Tensor:
        return joined(p) - start_at

    def steeper(p: Parameters) -> Tensor:  # than its curvature at the start says
        square = away(p) @ matrix @ away(p) / 2
        return square + 40 * square**2

    natural = torch.linalg.solve(matrix, slope)
    full = (2 * limit / (slope @ natural)).sqrt() * natural
    # The divergence of a share s of the full step is limit s² + 40 limit² s⁴: first within the limit at 0.8².
    shares = [0.8**k for k in range(15)]
    share = next(s for s in shares if limit * s**2 + 40 * limit**2 * s**4 <= limit)
    assert 0.5 < share < 1
    got = trust_region_step(lambda p: slope @ joined(p), steeper, at, limit, damping=1e-9)
    torch.testing.assert_close(joined(got), start_at - share * full, rtol=1e-6, atol=1e-7)
    rising = trust_region_step(
        lambda p: slope @ away(p) + 1e9 * away(p).square().sum(), lambda p: away(p) @ matrix @ away(p) / 2, at, limit
    )
    assert torch.equal(joined(rising), start_at)


def test_divergence_of_adapted_policies_curves_as_finite_differences_have_it():
    """Catches a Hessian that stops at the adapted parameters instead of going on to the initial ones, and inner steps
    that are not those of the initial parameters that they are taken from, on episodes of others."""
    learner = tabular(outer="trpo")
    theta = start(learner)
    path = exact_path(learner, theta, 1)
    rollouts = [all_episodes(learner, p) for p in path]
    old = log_policy(learner, path[1])

    def exact(parameters: Parameters) -> Tensor:
        now = log_policy(learner, exact_path(learner, parameters, 1)[1])
        apart = (old.exp() * (old - now)).sum(1)
        return 0.75 * apart[0] + 0.25 * apart[1]  # of the states in all episodes, whatever their probability

    def divergence(parameters: Parameters) -> Tensor:
        return learner.losses(parameters, *rollouts)[1]

    g = torch.Generator().manual_seed(0)
    vector = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in theta.items()}
    ends = [{n: p + s * 1e-5 * vector[n] for n, p in theta.items()} for s in (1, -1)]
    gradients = [grad(exact)(p) for p in ends]
    product = hessian_product(divergence, theta)(vector)
    for name, value in product.items():
        expected = (gradients[0][name] - gradients[1][name]) / 2e-5
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    assert inner_product(vector, product) > 1e-2
    torch.testing.assert_close(divergence(ends[0]), exact(ends[0]), rtol=1e-6, atol=0)
