"""PEARL: posterior, losses and their gradients restated, what is collected, and runs that are cut in two."""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

from app.cli.builder import MetaboltCLI, main
from app.evaluate import main as evaluate
from datamodules import Bandits, PointRobot
from datamodules.reinforcement.environments import Environments, normal
from models import PEARL
from models.reinforcement.context_encoder import ContextEncoder, Latents, product_of_gaussians
from models.reinforcement.off_policy import Transitions
from models.reinforcement.posterior_sampling import PosteriorSampling
from models.reinforcement.replay_buffer import FILE, Replay
from models.reinforcement.soft_actor_critic import Critics, TanhGaussian, follow
from models.reinforcement.trials import run_trial
from tests.support.gradients import assert_is_gradient, gradients_of
from tests.support.processes import kills, same_weights
from tests.support.toy import command, weights

TASKS, ROWS, CONTEXT, SIZE, ACTIONS, LATENTS = 3, 4, 5, 2, 2, 3


def learner(**settings) -> PEARL:
    """With weights large enough that everything depends on everything."""
    torch.manual_seed(0)
    settings = {"latents": LATENTS, "hidden": 6, "encoder_hidden": 7, "reward_scale": 3.0, "discount": 0.8} | settings
    model = PEARL(SIZE, ACTIONS, **settings).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn_like(p))
    return model


def transitions(*shape: int, seed: int = 0) -> Transitions:
    g = torch.Generator().manual_seed(seed)
    sizes = ((SIZE,), (ACTIONS,), (), (), (SIZE,))
    parts = [torch.randn(*shape, *s, generator=g, dtype=torch.float64) for s in sizes]
    return Transitions(*parts, terminated=(torch.rand(*shape, generator=g) < 0.3).double())


def inputs(seed: int = 0) -> tuple:
    """What the losses take."""
    g = torch.Generator().manual_seed(seed + 9)
    of_latents = torch.randn(TASKS, LATENTS, generator=g, dtype=torch.float64)
    of_actions = torch.rand(TASKS, ROWS, ACTIONS, generator=g, dtype=torch.float64)
    return transitions(TASKS, ROWS, seed=seed), transitions(TASKS, CONTEXT, seed=seed + 1), of_latents, of_actions


# The posterior ------------------------------------------------------------------------------------------------------


def test_product_of_gaussians_is_what_combining_two_at_a_time_gives():
    """Catches precisions that are averaged or variances that are added: the gain of a Kalman filter, restated."""
    g = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(6, 9, 2, generator=g).double(), torch.rand(6, 9, 2, generator=g).double() + 0.01
    m, v = mean[:, 0], variance[:, 0]
    for k in range(1, 9):
        gain = v / (v + variance[:, k])
        m, v = m + gain * (mean[:, k] - m), v * (1 - gain)
    product = product_of_gaussians(Latents(mean, variance))
    torch.testing.assert_close(product.mean, m)
    torch.testing.assert_close(product.variance, v)


def test_product_of_gaussians_is_the_normalised_product_of_densities():
    """Catches a product that is right up to a factor of the variance: moments by quadrature."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    mean, deviation = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([0.8, 1.5, 0.6]).double()
    log_density = sum(Normal(m, s).log_prob(x) for m, s in zip(mean, deviation, strict=True))
    p = (log_density - log_density.max()).exp()
    p = p / p.sum()
    product = product_of_gaussians(Latents(mean[:, None], deviation.square()[:, None]))
    assert product.mean.item() == pytest.approx((p * x).sum().item(), rel=1e-9)
    assert product.variance.item() == pytest.approx((p * (x - (p * x).sum()).square()).sum().item(), rel=1e-9)


def test_posterior_knows_no_order_and_goes_on_from_an_earlier_one():
    """Catches an encoder that reads the context as a sequence, and one that forgets the episodes before."""
    encoder = learner().encoder
    context = torch.randn(TASKS, 12, SIZE + ACTIONS + 1, dtype=torch.float64)
    whole = encoder(context)
    shuffled = encoder(context[:, torch.randperm(12)])
    in_parts = encoder(context[:, 7:], encoder(context[:, 3:7], encoder(context[:, :3])))
    for other in (shuffled, in_parts):
        torch.testing.assert_close(other.mean, whole.mean)
        torch.testing.assert_close(other.variance, whole.variance)
    assert (encoder(context[:, :11]).variance > whole.variance).all()


def test_variance_of_a_factor_and_kl_to_the_prior():
    """Catches a variance that is not the softplus or may vanish, and a KL of the wrong direction or sign."""
    encoder = ContextEncoder(2, 4, 2).double()
    with torch.no_grad():
        for p in encoder.network[-1].parameters():
            p.zero_()
        encoder.network[-1].bias[2:] = torch.tensor([0.4, -50.0])
    factors = encoder.factors(torch.randn(3, 2, dtype=torch.float64))
    expected = torch.tensor([math.log1p(math.exp(0.4)), 1e-7], dtype=torch.float64).expand(3, 2)
    torch.testing.assert_close(factors.variance, expected)
    g = torch.Generator().manual_seed(0)
    q = Latents(torch.randn(4, 3, generator=g), torch.rand(4, 3, generator=g) + 0.1)
    prior = Normal(torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(q.kl(), kl_divergence(Normal(q.mean, q.variance.sqrt()), prior).sum(-1))


# Soft actor-critic --------------------------------------------------------------------------------------------------


def test_density_of_a_squashed_gaussian():
    """Catches a change of variables left out, halved or added to the wrong side, against torch's own."""
    g = torch.Generator().manual_seed(0)
    mean, log_deviation = torch.randn(2, 50, 3, generator=g, dtype=torch.float64).unbind(0)
    draws = torch.rand(50, 3, generator=g, dtype=torch.float64)
    choice = TanhGaussian(mean, log_deviation)
    action, log_prob = choice.sample_with_log_prob(draws)
    base = Normal(mean, log_deviation.exp())
    torch.testing.assert_close(action, base.icdf(draws).tanh(), rtol=1e-6, atol=1e-9)
    expected = TransformedDistribution(base, TanhTransform()).log_prob(action).sum(-1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(choice.sample(draws), action)
    torch.testing.assert_close(choice.mode(), mean.tanh())


def test_density_where_tanh_is_one():
    """Catches log(1 - tanh²) computed as it is written, which is infinite in single precision from 9 on."""
    choice = TanhGaussian(torch.tensor([[18.0]]), torch.tensor([[0.0]]))
    _, log_prob = choice.sample_with_log_prob(torch.tensor([[0.5]]))
    # 1 - tanh² u is 4 / (e^u + e^-u)².
    expected = -0.5 * math.log(2 * math.pi) - (math.log(4) - 2 * math.log(math.exp(18) + math.exp(-18)))
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)


def test_critics_are_two_networks():
    """Catches critics that share weights or see each other, and a constant that still learns or stops its inputs."""
    torch.manual_seed(0)
    critics = Critics(5, 4).double()
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    both = critics(x)
    for k in range(2):
        y = x
        for i, (weight, bias) in enumerate(zip(critics.weights, critics.biases, strict=True)):
            y = F.linear(y, weight[k].T, bias[k, 0])
            y = y.clamp(min=0) if i < 3 else y
        torch.testing.assert_close(both[k], y.squeeze(-1))
    assert not torch.allclose(both[0], both[1])
    by_inputs = torch.autograd.grad(both.sum(), x, retain_graph=True)[0]
    constant = critics(x, constant=True)
    torch.testing.assert_close(constant, both)
    torch.testing.assert_close(torch.autograd.grad(constant.sum(), x, retain_graph=True)[0], by_inputs)
    assert all(g is None for g in torch.autograd.grad(constant.sum(), list(critics.parameters()), allow_unused=True))


def restated(model: PEARL, seen: Transitions, context: Transitions, of_latents, of_actions) -> torch.Tensor:
    """The four losses of each task, (T, 4), transition by transition, with torch's distributions."""

    def critic(k: int, x: torch.Tensor) -> torch.Tensor:
        for i, (weight, bias) in enumerate(zip(model.critics.weights, model.critics.biases, strict=True)):
            x = x @ weight[k] + bias[k, 0]
            x = x.clamp(min=0) if i < 3 else x
        return x[0]

    results = []
    for t in range(TASKS):
        precision, weighted = torch.zeros(LATENTS).double(), torch.zeros(LATENTS).double()
        for c in range(CONTEXT):
            one = torch.cat([context.observation[t, c], context.action[t, c], context.reward[t, c][None]])
            mean, rho = model.encoder.network(one).split(LATENTS)
            precision = precision + 1 / F.softplus(rho)
            weighted = weighted + mean / F.softplus(rho)
        posterior = Normal(weighted / precision, precision**-0.5)
        z = posterior.mean + posterior.stddev * of_latents[t]
        kl = kl_divergence(posterior, Normal(torch.zeros(LATENTS).double(), 1.0)).sum()
        parts = []
        for b in range(ROWS):
            o, a, reached = seen.observation[t, b], seen.action[t, b], seen.reached[t, b]
            target = 3.0 * seen.shaped[t, b]
            if not seen.terminated[t, b]:
                target = target + 0.8 * model.target_value(torch.cat([reached, z]))[0]
            of_critic = sum((critic(k, torch.cat([o, a, z])) - target.detach()) ** 2 for k in range(2))
            mean, log_deviation = model.policy.network(torch.cat([o, z])).split(ACTIONS)
            log_deviation = log_deviation.clamp(-20, 2)
            base = Normal(mean, log_deviation.exp())
            u = base.icdf(of_actions[t, b])
            log_prob = (base.log_prob(u) - torch.log(1 - u.tanh() ** 2)).sum()
            worth = min(critic(k, torch.cat([o, u.tanh(), z])) for k in range(2))
            of_value = (model.value(torch.cat([o, z]))[0] - (worth - log_prob)) ** 2
            regular = 1e-3 * (mean**2).mean() + 1e-3 * (log_deviation**2).mean()
            parts.append(torch.stack([of_critic, of_value, log_prob - worth + regular]))
        results.append(torch.cat([torch.stack(parts).mean(0), kl[None]]))
    return torch.stack(results)


def test_losses_are_those_of_the_paper():
    """Catches a wrong target, critic, sign or reward: sparse ones are the encoder's, shaped ones the critics'."""
    model = learner()
    arguments = inputs()
    losses, expected = torch.stack(model.losses(*arguments), 1), restated(model, *arguments)
    torch.testing.assert_close(losses, expected, rtol=1e-7, atol=1e-7)
    encoder = list(model.encoder.parameters())
    own, its = (torch.autograd.grad(t[:, 0].sum(), encoder) for t in (losses, expected))
    for a, b in zip(own, its, strict=True):
        torch.testing.assert_close(a, b)


NETWORKS = ("encoder", "policy", "critics", "value", "target_value")
OWN = {"critic": ("encoder", "critics"), "value": ("value",), "policy": ("policy",), "kl": ("encoder",)}


@pytest.mark.parametrize("loss", OWN)
def test_each_loss_reaches_its_own_networks_alone(loss):
    """Catches a latent that is not cut off in the policy's or the value's loss, critics that follow the policy, and a
    gradient that is wrong: finite differences of each loss by each of its own networks. The next value, a constant to
    the critics' gradient, is left out."""
    model = learner(discount=0.0)
    arguments = inputs()
    model.target_value.requires_grad_(True)

    def value() -> torch.Tensor:
        return getattr(model.losses(*arguments), loss).sum()

    value().backward()
    for name in NETWORKS:
        network = getattr(model, name)
        gradients = gradients_of(network)
        if name not in OWN[loss]:
            assert not gradients, name
            continue
        assert_is_gradient(gradients, network.named_parameters(), value, abs=1e-6)
        assert any(g.abs().max() > 1e-6 for g in gradients.values())


def test_training_loss_weighs_the_losses(monkeypatch):
    """Catches a share of the meta-batch that is averaged by itself, and a KL that is averaged instead of summed."""
    model = learner(kl_weight=0.3)
    model.trainer = SimpleNamespace(world_size=2)
    arguments = inputs()
    monkeypatch.setattr(model, "drawn", lambda batch: arguments)
    loss = model.training_step(SimpleNamespace(meta_batch=5, index=torch.arange(TASKS)), 0)
    sums = restated(model, *arguments).sum(0).tolist()
    assert loss.item() == pytest.approx(2 * (sum(sums[:3]) / 5 + 0.3 * sums[3]), rel=1e-7)
    metrics = model.stage_metrics("train").compute()
    for name, total in zip(("q_loss", "v_loss", "policy_loss", "kl"), sums, strict=True):
        assert metrics[name] == pytest.approx(total / TASKS, rel=1e-6)


def test_target_follows():
    """Catches a target that jumps, moves the wrong way or takes the value along."""
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * p + 0.1 * q for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    before = [q.clone() for q in b.parameters()]
    follow(a, b, 0.1)
    for p, e in zip(a.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e)
    assert all(torch.equal(q, was) for q, was in zip(b.parameters(), before, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_target_moves_once_a_gradient_step(accumulate, tmp_path):
    """Catches a target that moves before the step, at every accumulated batch, or after the checkpoint is written."""
    flags = ("--model.target_rate", "0.25", "--trainer.accumulate_grad_batches", str(accumulate))
    start = MetaboltCLI(command("PEARL", tmp_path, *flags)).model.state_dict()
    main(command("PEARL", tmp_path, *flags, "--checkpoint_every", "1", steps=1))
    end = weights(tmp_path / "pearl" / "checkpoints" / "last.ckpt")
    for name in (n for n in end if n.startswith("target_value")):
        value = end[name.removeprefix("target_")]
        torch.testing.assert_close(end[name], 0.75 * start[name] + 0.25 * value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, start[name])


# Exploration --------------------------------------------------------------------------------------------------------


def environments(episodes: int, index: range = range(3), **settings) -> Environments:
    data = PointRobot(horizon=4, episodes=episodes, train_tasks=6, **settings)
    batch = data.distribution("train").sample(list(index))
    return batch.apply(lambda t: t.double() if t.is_floating_point() else t)


@pytest.mark.parametrize(("explore", "context"), [(1, None), (2, None), (2, 3)])
def test_latents_are_of_the_prior_and_then_of_all_that_was_seen(explore, context):
    """Catches a posterior of the last episode alone, of shifted transitions or too early; and z drawn at each step."""
    model, batch = learner(), environments(5)
    with torch.no_grad():
        trial = run_trial(batch, PosteriorSampling(model, explore, context))
        draws = batch.draws(20, LATENTS + ACTIONS, purpose=3)
        rows = torch.cat([trial.seen.observation, trial.action, trial.reward[..., None]], -1)
        for episode in range(5):
            noise = normal(draws[:, 4 * episode, :LATENTS])
            if episode < explore:
                z = noise
            else:
                known = episode if context is None else min(episode, context)
                posterior = model.encoder(rows[: 4 * known].transpose(0, 1))
                z = posterior.mean + posterior.variance.sqrt() * noise
            for t in range(4 * episode, 4 * episode + 4):
                torch.testing.assert_close(trial.extras[t], z)
                choice = model.policy(torch.cat([trial.seen.observation[t], z], -1))
                torch.testing.assert_close(trial.action[t], choice.sample(draws[:, t, LATENTS:]))


def test_latents_to_look_at_are_of_the_whole_trial():
    """Catches latents by a part of the trial, or by shaped rewards, and latents of a learner that has none."""
    model, batch = learner().eval(), environments(3, sparse=True, radius=0.9)
    with torch.no_grad():
        trial = run_trial(batch, model.agent())
        assert not torch.equal(trial.reward, trial.shaped)
        rows = torch.cat([trial.seen.observation, trial.action, trial.reward[..., None]], -1)
        mean, variance = model.encoder.factors(rows)
        torch.testing.assert_close(model.task_latents(batch), (mean / variance).sum(0) / (1 / variance).sum(0))
        assert learner(latents=0).eval().task_latents(batch) is None


def test_evaluation_acts_by_the_mode():
    """Catches evaluation that adds noise to the actions, and training that does not."""
    model, batch = learner(exploration_episodes=2), environments(3)
    with torch.no_grad():
        for training, deterministic in ((False, True), (True, False)):
            trial = run_trial(batch, model.train(training).agent())
            mode = model.policy(torch.cat([trial.seen.observation, trial.extras], -1)).mode()
            # Products are rounded by how many rows are computed together.
            assert torch.allclose(trial.action, mode, rtol=1e-9, atol=1e-12) == deterministic
        noisy = learner(deterministic=False).eval()
        trial = run_trial(batch, noisy.agent())
        mode = noisy.policy(torch.cat([trial.seen.observation, trial.extras], -1)).mode()
        assert not torch.allclose(trial.action, mode, rtol=1e-9, atol=1e-12)


# Collections --------------------------------------------------------------------------------------------------------


def collector(sparse: bool = False, **settings) -> PEARL:
    """A learner that can collect, with nothing around it but data."""
    settings = {"initial_episodes": 2, "prior_episodes": 2, "posterior_episodes": 1, "extra_episodes": 2} | settings
    model = learner(tasks_per_collection=3, **settings)
    data = PointRobot(sparse=sparse, horizon=4, train_tasks=6, seed=3)
    convert = SimpleNamespace(
        convert_input=lambda batch: batch.apply(lambda t: t.double() if t.is_floating_point() else t)
    )
    model.trainer = SimpleNamespace(datamodule=data, precision_plugin=convert, world_size=1)
    model.replay = Replay(None, 6, 4, 2 * SIZE + ACTIONS + 3, torch.float64)
    return model


def collect(model: PEARL, *collections: int) -> torch.Tensor:
    """All rows, (episodes, horizon, numbers)."""
    with torch.no_grad():
        for k in collections:
            model.collect(model.training_tasks, k)
    return model.replay._rows.clone().unflatten(0, (-1, 4))


@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_collected_is_what_happened(sparse):
    """Catches columns that change places, rows of one task under another's name, and episodes cut in the middle."""
    model = collector(sparse)
    rows = collect(model, 0, 1)
    task = model.replay._task
    assert task[:12] == [k for k in range(6) for _ in range(2)]
    assert len(task) == 12 + 2 * 3 * 5
    goals = model.training_tasks.facts(np.asarray(task))["goal"].double()
    t = Transitions.of(rows, SIZE, ACTIONS)
    torch.testing.assert_close(t.reached, t.observation + 0.1 * t.action)
    torch.testing.assert_close(t.observation[:, 1:], t.reached[:, :-1])
    apart = (t.reached - goals[:, None]).norm(dim=-1)
    torch.testing.assert_close(t.shaped, -apart)
    expected = torch.where(apart <= 0.2, 1 - apart, 0.0) if sparse else -apart
    torch.testing.assert_close(t.reward, expected)
    if not sparse:  # there all episodes start at one place
        starts = t.observation[:, 0]
        assert len(starts.unique(dim=0)) == len(starts), "chance came twice"
    assert len(t.action.flatten(0, 1).unique(dim=0)) == t.action[..., 0].numel(), "chance came twice"


def test_context_is_of_the_last_collection_and_extra_episodes_are_none():
    """Catches a context that holds what older policies did, or what the posterior led to beyond the setting."""
    model = collector()
    rows = collect(model, 0, 1)
    task = model.replay._task
    for number in range(6):
        episodes = [i for i, t in enumerate(task) if t == number]
        kept = episodes[-5:-2] if len(episodes) > 2 else episodes
        expected = rows[kept].flatten(0, 1)
        draws = (torch.arange(len(expected))[None].double() + 0.5) / len(expected)
        torch.testing.assert_close(model.replay.context(torch.tensor([number]), draws)[0], expected)


def test_collection_is_a_function_of_weights_seed_and_number():
    """Catches the global generator, which processes and resumed runs do not share, and collections that repeat."""
    first, again, other = collector(), collector(), collector()
    torch.manual_seed(1)
    one = collect(first, 0, 1)
    torch.manual_seed(2)
    collect(again, 0)
    torch.rand(5)
    two = collect(again, 1)
    assert torch.equal(one, two)
    three = collect(other, 0, 2)
    assert torch.equal(three[:27], one[:27])
    assert not torch.equal(three[27:], one[27:])


def test_posterior_of_a_collection_knows_its_own_context_alone():
    """Catches extra episodes that are acted in by the prior, or by what other episodes of theirs told."""
    model = collector(initial_episodes=1)
    rows = collect(model, 0)
    blocks = rows[6:].unflatten(0, (3, 5))
    places = 6 + np.arange(3)
    batch = Environments(
        model.training_tasks.environment, torch.from_numpy(places), 3, "train", 5, task={"goal": torch.zeros(3, 2)}
    )
    draws = batch.draws(20, LATENTS + ACTIONS, purpose=3)
    for i, block in enumerate(blocks):
        t = Transitions.of(block, SIZE, ACTIONS)
        for episode, known in ((0, 0), (1, 0), (2, 2), (3, 3), (4, 3)):
            noise = normal(draws[i, 4 * episode, :LATENTS])
            z = noise
            if known:
                before = Transitions(*(part[:known].flatten(0, 1)[None] for part in t))
                posterior = model.infer(before)
                z = (posterior.mean + posterior.variance.sqrt() * noise)[0]
            choice = model.policy(torch.cat([t.observation[episode], z.expand(4, -1)], -1))
            of_action = draws[i, 4 * episode : 4 * episode + 4, LATENTS:]
            torch.testing.assert_close(t.action[episode], choice.sample(of_action))


def test_what_a_step_draws_is_each_tasks_own():
    """Catches rows and noise that depend on the other tasks of the batch: two processes would draw others."""
    model = collector(transitions=6, context=5)
    collect(model, 0)
    whole = model.drawn(environments(3, range(8, 13)))
    share = model.drawn(environments(3, range(9, 13, 2)))
    for all_tasks, some in zip(whole, share, strict=True):
        for a, b in zip(all_tasks, some, strict=True) if isinstance(some, Transitions) else [(all_tasks, some)]:
            assert torch.equal(a[1::2], b)
    seen, context, of_latents, of_actions = whole
    assert not torch.equal(seen.action[:, :5], context.action)
    assert len(of_latents.unique()) == of_latents.numel() and len(of_actions.unique()) == of_actions.numel()


# Runs ---------------------------------------------------------------------------------------------------------------


def test_goes_on_with_the_buffer_of_its_checkpoint(tmp_path, capsys):
    """Catches rows that a killed run left and a resumed one trusts, and a buffer that is missing, or not looked for
    beside the checkpoint; best checkpoints that need it to be evaluated."""
    main(command("PEARL", tmp_path / "whole"))
    whole = tmp_path / "whole" / "pearl"
    main(command("PEARL", tmp_path / "cut", steps=7))
    cut = tmp_path / "cut" / "pearl"
    shutil.copytree(tmp_path / "cut", tmp_path / "copy")
    with (cut / FILE).open("ab") as file:
        file.write(b"what came after the checkpoint" * 9)
    main(command("PEARL", tmp_path / "cut", "--ckpt_path", "last"))
    assert same_weights(whole / "checkpoints" / "last.ckpt", cut / "checkpoints" / "last.ckpt")
    kept = (whole / FILE).read_bytes()
    assert (cut / FILE).read_bytes()[: len(kept)] == kept

    other = tmp_path / "copy" / "pearl" / "checkpoints" / "last.ckpt"
    main(command("PEARL", tmp_path / "elsewhere", "--ckpt_path", str(other)))
    assert same_weights(whole / "checkpoints" / "last.ckpt", tmp_path / "elsewhere/pearl/checkpoints/last.ckpt")
    assert (tmp_path / "elsewhere" / "pearl" / FILE).read_bytes() == kept

    (tmp_path / "copy" / "pearl" / FILE).unlink()
    with pytest.raises(SystemExit):
        main(command("PEARL", tmp_path / "copy", "--ckpt_path", "last"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "not the replay buffer of the checkpoint (there is none)" in error
    evaluate(["--ckpt_path", str(other.with_name("best.ckpt")), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_survives_kills(tmp_path):
    """Catches a checkpoint that counts on rows which were not yet in the file when the process died."""
    kills(tmp_path, "PEARL", times=3, steps=200)


@pytest.mark.parametrize("revealed", [False, True])
def test_baseline_without_latents_and_oracle(revealed, tmp_path):
    """Catches baselines that need an encoder, and an oracle that is not shown the goal or has rows without it."""
    flags = ["--model.latents", "0", "--data.revealed", str(revealed).lower()]
    flags += ["--model.observations", "4"] if revealed else []
    cli = MetaboltCLI(command("PEARL", tmp_path, *flags))
    assert cli.model.encoder is None
    main(command("PEARL", tmp_path, *flags, steps=6))
    last = weights(tmp_path / "pearl" / "checkpoints" / "last.ckpt")
    assert not any(name.startswith("encoder") for name in last)
    kept = np.fromfile(tmp_path / "pearl" / FILE, np.float32).reshape(-1, 4, 13 if revealed else 9)
    if revealed:
        reached, goal = kept[..., 8:10], kept[..., 2:4]
        apart = np.linalg.norm(reached - goal, axis=-1)
        np.testing.assert_allclose(kept[..., 6], -apart, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(kept[:, 1:, :2], reached[:, :-1])


def test_refusals_are_one_line(tmp_path, capsys):
    """Catches endless tasks and discrete actions that end in a traceback."""
    model = learner()
    assert "choose models.RL2" in model.check(Bandits())
    with pytest.raises(SystemExit):
        main(command("PEARL", tmp_path, "--data.train_tasks", "null", steps=2))
    assert "give --data.init_args.train_tasks" in capsys.readouterr().err.strip().splitlines()[-1]
