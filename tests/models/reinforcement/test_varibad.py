"""VariBAD: how its belief moves, what bound it is learned by, and that beliefs and policy learn apart."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import models.reinforcement.varibad
from app.cli.builder import main
from datamodules import Bandits, PointRobot, TabularMDPs
from datamodules.core.errors import ConfigError
from models import VariBAD
from models.core.checkpoint_io import load_checkpoint
from models.reinforcement.belief import BeliefEncoder, Decoder, Experience, TrialAutoencoder, features, kl_to_previous
from models.reinforcement.policies import Gaussian
from models.reinforcement.replay_buffer import RecentTrials
from models.reinforcement.trials import run_trial
from tests.support.environments import Ledges
from tests.support.gradients import assert_is_gradient, gradients_of
from tests.support.toy import command, train_for, weights

SIZES_OF = {
    "bandit": lambda **more: Bandits(arms=3, episodes=5, **more),
    "mdp": lambda **more: TabularMDPs(states=4, actions=3, horizon=3, episodes=3, **more),
    "navigation": lambda **more: PointRobot(horizon=4, episodes=3, train_tasks=None, **more),
    "ends": lambda **more: Ledges(horizon=4, episodes=3, **more),
}
EVERY = pytest.mark.parametrize("family", SIZES_OF)
SMALL = {
    **{"latents": 2, "encoder_hidden": 6, "embeddings": (4, 3, 2), "decoder_hidden": [6, 5], "embedding": 5},
    **{"hidden": [7, 6], "vae_batch": 4, "vae_updates": 2, "minibatches": 2, "buffer": 20},
}


def learner(data, seed: int = 1, **settings) -> VariBAD:
    """For the environments, in double precision; its actions differ from state to state, unlike at first."""
    torch.manual_seed(seed)
    e = data.environment
    made = VariBAD(e.seen_size, e.actions, e.discrete, **{**SMALL, **settings}).double()
    with torch.no_grad():
        made.policy.head.linear.weight.mul_(50)
    return made


def tasks(data, indices=range(6)):
    batch = data.distribution("train").sample(list(indices))
    batch.meta_batch = len(batch)
    batch.task = {name: v.double() if v.is_floating_point() else v for name, v in batch.task.items()}
    return batch


def trial_of(made: VariBAD, batch):
    with torch.no_grad(), mock.patch.object(VariBAD, "total", lambda self, value: value):
        made.take_in(run_trial(batch, made.agent()))  # without which no belief is seen
        return run_trial(batch, made.agent())


def some(steps: int = 5, trials: int = 3, observations: int = 2, actions: int = 2, seed: int = 0) -> Experience:
    """Made up, with steps at which nothing happened."""
    g = torch.Generator().manual_seed(seed)

    def numbers(*shape: int):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    alive = torch.ones(steps, trials, dtype=torch.float64)
    alive[2:4, 0] = 0
    alive[-1, 1] = 0
    return Experience(
        numbers(steps, trials, observations),
        numbers(steps, trials, observations),
        numbers(steps, trials, actions),
        numbers(steps, trials),
        alive,
    )


def autoencoder(**settings) -> TrialAutoencoder:
    torch.manual_seed(3)
    return TrialAutoencoder(2, 2, 3, 6, (4, 3, 2), [6, 5], **{"states": True, **settings}).double()


# Beliefs ------------------------------------------------------------------------------------------------------------


def test_the_divergence_of_successive_beliefs():
    """Catches a divergence the wrong way round, deviations taken for variances, and a first belief that is free or that
    is compared with the last: against torch.distributions and the closed form."""
    g = torch.Generator().manual_seed(1)
    mean, log_deviation = (torch.randn(5, 4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    got = kl_to_previous(Gaussian(mean, log_deviation))
    for t in range(5):
        m, s = (mean[t - 1], log_deviation[t - 1].exp()) if t else (torch.zeros(4, 3), torch.ones(4, 3))
        new, old = Independent(Normal(mean[t], log_deviation[t].exp()), 1), Independent(Normal(m, s), 1)
        torch.testing.assert_close(got[t], kl_divergence(new, old).double(), rtol=1e-12, atol=1e-12)
        v, w = (2 * log_deviation[t]).exp(), s**2
        closed = 0.5 * ((w / v).log() - 1 + v / w + (m - mean[t]) ** 2 / w).sum(-1)
        torch.testing.assert_close(got[t], closed, rtol=1e-12, atol=1e-12)


def test_a_policy_sees_mean_and_log_variance():
    """Catches the log-deviation in place of the log-variance."""
    belief = Gaussian(torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(features(belief), torch.tensor([1.0, 2.0, 1.0, -1.0]))


def test_the_encoder_is_torchs_own():
    """Catches embeddings in another order than the layers', a prior that is not of the state of zeros, and a state
    that changes where nothing happens: against nn.GRU over the steps that count alone."""
    torch.manual_seed(0)
    encoder = BeliefEncoder(2, 2, 3, 6, (4, 3, 2)).double()
    e = some()
    found = encoder(e)
    gru = torch.nn.GRU(9, 6).double()
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(gru, f"{name}_l0").copy_(getattr(encoder.cell, name).add_(0.1))
        found = encoder(e)
        layers = [part.layer for part in encoder.parts]
        for n in range(3):
            live = e.alive[:, n].bool()
            parts = (e.reached[live, n], e.action[live, n], e.reward[live, n, None])
            x = torch.cat([layer(part).clamp(min=0) for layer, part in zip(layers, parts, strict=True)], -1)
            states = torch.cat([torch.zeros(1, 6).double(), gru(x[:, None])[0][:, 0]])
            of_step = torch.cat([torch.zeros(1), e.alive[:, n]]).cumsum(0).long()
            states = states[of_step]
            mean, log_variance = encoder.mean(states), encoder.log_variance(states)
            torch.testing.assert_close(found.mean[:, n], mean, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(2 * found.log_deviation[:, n], log_variance, rtol=1e-10, atol=1e-10)


@EVERY
def test_what_acted_had_the_belief_that_is_learned(family):
    """Catches a belief that is a step late or early, that is reset between episodes, or that meets another trial's; an
    action that is not yet encoded; the state that an episode starts from in place of the one that the last ended in;
    steps after an early end as evidence: beliefs in acting are those before each step along the trial."""
    data = SIZES_OF[family]()
    made = learner(data)
    trial = trial_of(made, tasks(data))
    with torch.no_grad():
        beliefs = made.vae.encoder(made.scaled(made.experience(trial)))
    for acted, along in zip(trial.extras.belief, beliefs, strict=True):
        torch.testing.assert_close(acted, along[:-1], rtol=1e-10, atol=1e-10)
    moved = trial.extras.belief.mean.diff(dim=0).abs().amax(-1) > 0
    assert torch.equal(moved, trial.seen.alive[:-1].bool())
    if family == "ends":
        assert not moved.all()


@EVERY
def test_what_learns_is_what_acted(family):
    """Catches an observation or belief in another unit or order than the policy acted by: every first ratio is 1, and
    values are the same."""
    data = SIZES_OF[family]()
    made = learner(data)
    trial = trial_of(made, tasks(data))
    rollout = made.rollout(trial)
    with torch.no_grad():
        now, value = made.policy(rollout.inputs)
    for one, other in zip(now, rollout.old, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(value, rollout.old_value, rtol=1e-10, atol=1e-10)
    size = data.environment.seen_size
    torch.testing.assert_close(rollout.inputs[..., :size], trial.seen.observation)
    expected = made.beliefs.observation(features(trial.extras.belief))
    torch.testing.assert_close(rollout.inputs[..., size:], expected)
    assert rollout.inputs[..., size:].std(0).max() > 0.1  # trials differ in their beliefs


def test_a_belief_knows_the_past_alone():
    """Catches an encoder that looks ahead: transitions from step 3 on change, beliefs up to then do not."""
    made, e = autoencoder(), some()
    changed = Experience(*(torch.cat([part[:3], part[3:].flip(1) + 1]) for part in e[:4]), e.alive)
    with torch.no_grad():
        one, other = made.encoder(e), made.encoder(changed)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a[:4], b[:4])
        assert not torch.equal(a[4:], b[4:])


def test_a_belief_lasts_through_a_trial_and_no_longer():
    """Catches a belief that is reset with an episode, and one kept from another trial: all arms pay, or none does."""
    data = SIZES_OF["bandit"]()
    made = learner(data)
    batch = tasks(data)
    told = []
    for p in (0.0, 1.0, 0.0):
        batch.task = {"arms": torch.full((6, 3), p, dtype=torch.float64)}
        with torch.no_grad():
            told.append(run_trial(batch, made.agent()).extras.belief.mean)
    none, all_of_them, none_again = told
    assert torch.equal(none, none_again)
    with torch.no_grad():
        prior = made.vae.encoder.belief(torch.zeros(6).double()).mean
    assert torch.equal(none[0], prior.expand(6, -1)) and torch.equal(all_of_them[0], none[0])
    assert ((none[1:] - all_of_them[1:]).abs().amax(-1) > 1e-4).all()


# The bound ----------------------------------------------------------------------------------------------------------


def written_out(made: TrialAutoencoder, e: Experience, noise, reached_only: bool, terms=None, decoded=None):
    """Squared errors of rewards and states and divergences of each trial, in loops over t and the decoded steps."""

    def linear(layer, x):
        return layer.weight.detach().numpy() @ x + (0 if layer.bias is None else layer.bias.detach().numpy())

    def decode(decoder: Decoder, m, parts):
        given = [np.maximum(0, linear(decoder.parts[name].layer, x)) for name, x in parts]
        both = np.concatenate([decoder.of_latents.weight.detach().numpy(), decoder.of_given.weight.detach().numpy()], 1)
        x = both @ np.concatenate([m, *given]) + decoder.of_latents.bias.detach().numpy()
        for layer in decoder.layers:
            x = linear(layer, np.maximum(0, x))
        return x

    steps, trials = e.reward.shape
    with torch.no_grad():
        beliefs = made.encoder(e)
    found = np.zeros((3, trials))
    for n in range(trials):
        for t in range(steps + 1) if terms is None else terms[:, n].tolist():
            if t and not e.alive[t - 1, n]:
                continue
            mean, deviation = beliefs.mean[t, n].numpy(), beliefs.log_deviation[t, n].exp().numpy()
            before = beliefs.mean[t - 1, n].numpy() if t else np.zeros(3)
            spread = beliefs.log_deviation[t - 1, n].exp().numpy() if t else np.ones(3)
            ratio = (deviation / spread) ** 2
            found[2, n] += 0.5 * (ratio + ((mean - before) / spread) ** 2 - 1 - np.log(ratio)).sum()
            m = mean + deviation * noise[t, n].numpy()
            for s in range(steps) if decoded is None else decoded[:, n].tolist():
                if not e.alive[s, n]:
                    continue
                before_, after, action = e.observation[s, n].numpy(), e.reached[s, n].numpy(), e.action[s, n].numpy()
                parts = [("observation", after)]
                if not reached_only:
                    parts += [("action", action), ("observation", before_)]
                found[0, n] += (decode(made.reward, m, parts)[0] - e.reward[s, n].item()) ** 2
                state = decode(made.state, m, [("observation", before_), ("action", action)])
                found[1, n] += ((state - after) ** 2).mean()
    return found


@pytest.mark.parametrize("reached_only", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_bound_is_the_one_written_out(reached_only, drawn):
    """Catches a sum over the past alone, a prior's term that is left out, a mean in place of a sum, one sample of the
    latents for all t, steps that never happened, another belief's divergence, and parts of a transition that are
    swapped; of all terms, and of those that were drawn."""
    made, e = autoencoder(reached_only=reached_only), some()
    g = torch.Generator().manual_seed(5)
    noise = torch.randn(6, 3, 3, generator=g, dtype=torch.float64)
    terms = torch.stack([torch.randperm(6, generator=g)[:4] for _ in range(3)], 1) if drawn else None
    decoded = torch.stack([torch.randperm(5, generator=g)[:3] for _ in range(3)], 1) if drawn else None
    with torch.no_grad():
        got = made.bound(e, noise, terms, decoded)
    expected = written_out(made, e, noise, reached_only, terms, decoded)
    np.testing.assert_allclose(torch.stack(list(got)).numpy(), expected, rtol=1e-10)
    assert (expected > 0).all()


def test_the_loss_weighs_its_parts():
    """Catches a weight that is ignored, or given to another part."""
    made = learner(SIZES_OF["mdp"](), reward_weight=2.0, state_weight=3.0, kl_weight=5.0)
    parts = torch.tensor([[1.0], [10.0], [100.0]])
    assert made.vae_loss(models.reinforcement.varibad.Bound(*parts)).item() == 2 + 30 + 500


def test_the_gradient_of_the_bound_is_that_of_finite_differences():
    """Catches a part of the bound that is cut from the graph, as a belief before would be that is taken for a
    constant."""
    made, e = autoencoder(), some()
    noise = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss():
        return sum(part.sum() for part in made.bound(e, noise))

    loss().backward()
    assert_is_gradient(gradients_of(made), made.named_parameters(), loss, rel=1e-5, abs=1e-6)


def test_one_trial_does_not_meet_another():
    """Catches a latent, a mask or a draw of another trial of the batch."""
    made, e = autoencoder(), some()
    noise = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        together = made.bound(e, noise)
        for n in range(3):
            alone = made.bound(Experience(*(part[:, [n]] for part in e)), noise[:, [n]])
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(a[0], b[n], rtol=1e-12, atol=1e-12)


def test_what_is_foreseen_is_the_mean_of_past_and_future():
    """Catches a bound by which the decoder foresees the past alone, or the future alone, and an encoder that does not
    learn by it. Of an arm that pays r = mu + noise, both of deviation 1, a trial has H pulls; the constant with least
    expected squared error of all H, from the first t with sum S, is (S + (H - t) S / (t + 1)) / H, since E[mu] is
    S / (t + 1). Of the past alone it would be S / t, of the future alone S / (t + 1). There is no noise of the latents
    and no KL, which shrink it."""
    torch.manual_seed(0)
    steps = 4
    made = TrialAutoencoder(0, 1, 1, 16, (1, 1, 16), [32])
    optimizer = torch.optim.Adam(made.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)

    def drawn(trials: int) -> Experience:
        reward = torch.randn(trials) + torch.randn(steps, trials)
        nothing = torch.zeros(steps, trials, 0)
        return Experience(nothing, nothing, torch.ones(steps, trials, 1), reward, torch.ones(steps, trials))

    for _ in range(300):
        bound = made.bound(drawn(128), torch.zeros(steps + 1, 128, 1))
        optimizer.zero_grad()
        bound.reward.mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        e = drawn(4000)
        told = made.rewards(made.encoder(e).mean[:, None], Experience(*(part[:1] for part in e)))[:, 0]
    for t in range(1, steps):
        total = e.reward[:t].sum(0)
        slope = ((told[t] * total).mean() / total.square().mean()).item()
        assert slope == pytest.approx((1 + (steps - t) / (t + 1)) / steps, rel=0.06), t
    assert told[0].abs().max() < 0.15


# The policy ---------------------------------------------------------------------------------------------------------


def test_what_the_policy_minimises_is_written_out():
    """Catches a sign, a value in another unit than its target, values that are clipped the optimistic way, and a half
    that is left out; after a step, so that ratios and values are clipped."""
    data = SIZES_OF["mdp"]()
    made = learner(data, discount=0.9, decay=0.7, clip=0.1, entropy=0.05, value_weight=0.8)
    trial = trial_of(made, tasks(data))
    rollout = made.rollout(trial)
    steps, trials = trial.reward.shape
    unit = sum(0.9**t for t in range(steps))
    values = unit * trial.extras.value
    for n in range(trials):
        for t in range(steps):
            advantage = 0.0
            for k in range(t, steps):
                following = values[k + 1, n].item() if k + 1 < steps else 0.0
                gained = trial.reward[k, n].item() + 0.9 * following - values[k, n].item()
                advantage += (0.9 * 0.7) ** (k - t) * gained
            assert rollout.advantage[t, n].item() == pytest.approx(advantage, rel=1e-9)
            assert rollout.value_target[t, n].item() == pytest.approx(
                (advantage + values[t, n].item()) / unit, rel=1e-9
            )
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        got = made.losses(rollout)
        now, value = made.policy(rollout.inputs)
    clipped = 0
    for t in range(steps):
        for n in range(trials):
            p, q = (torch.softmax(x.logits[t, n], -1).numpy() for x in (now, rollout.old))
            action, advantage = rollout.action[t, n].item(), rollout.advantage[t, n].item()
            ratio = p[action] / q[action]
            gain = min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
            old, v, target = (x[t, n].item() for x in (rollout.old_value, value, rollout.value_target))
            errors = []
            for guess in (v, old + min(max(v - old, -0.1), 0.1)):
                d = abs(guess - target)
                errors.append(0.5 * d * d if d < 1 else d - 0.5)
            clipped += errors[1] > errors[0]
            expected = 0.8 * 0.5 * max(errors) - gain + 0.05 * float((p * np.log(p)).sum())
            assert got[t, n].item() == pytest.approx(expected, rel=1e-9)
    assert clipped


def test_no_gradient_passes_between_policy_and_beliefs():
    """Catches returns that change the encoder, and a bound that changes the policy."""
    data = SIZES_OF["navigation"]()
    made = learner(data, state_weight=1.0)
    trial, parameters = trial_of(made, tasks(data)), dict(made.named_parameters())
    rollout = made.rollout(trial)
    of_policy = torch.autograd.grad(made.losses(rollout).sum(), parameters.values(), allow_unused=True)
    e = made.experience(trial)
    bound = made.vae.bound(e, torch.zeros(len(e.reward) + 1, 6, 2).double())
    of_vae = torch.autograd.grad(made.vae_loss(bound).sum(), parameters.values(), allow_unused=True)
    for name, a, b in zip(parameters, of_policy, of_vae, strict=True):
        assert (a is None) == name.startswith("vae.") and (b is None) == name.startswith("policy."), name


# A meta-update ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stepped(monkeypatch):
    """Names of the parameters with a gradient, at each step of SGD."""
    events: list[tuple[set[int], float]] = []
    step = torch.optim.SGD.step

    def recorded(self, *arguments, **more):
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        events.append(({id(p) for p in moved}, math.sqrt(sum(p.grad.square().sum().item() for p in moved))))
        return step(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    return events


def sgd(rate: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def test_policy_and_autoencoder_have_steps_of_their_own(stepped):
    """Catches a step of one that moves the other by what its gradient was before, a norm that is of both, and
    a meta-update that counts as many: of each three meta-updates 2 · 3 steps of the policy, then 2 of the
    autoencoder."""
    data = SIZES_OF["navigation"](meta_batch_size=4)
    settings = {"epochs": 2, "minibatches": 3, "vae_updates": 2, "max_grad_norm": 1e-3, "state_weight": 1.0}
    made = learner(data, optimizer=sgd(0.1), **settings)
    train_for(made, data, 3, precision="64-true")
    assert made.trainer.global_step == 3
    of = [{id(p) for p in part.parameters()} for part in (made.policy, made.vae)]
    assert [moved for moved, _ in stepped] == 3 * (6 * [of[0]] + 2 * [of[1]])
    norms = [norm for _, norm in stepped]
    assert max(norms[:6]) == pytest.approx(1e-3, rel=1e-3) and min(norms[6:8]) > 1e-2


def test_moments_are_those_of_two_optimizers():
    """Catches moments that the other's steps wear off, and rates that are not each its own, or that the schedule passes
    by: counts of Adam's steps, and the rates after a schedule that has halved them."""
    data = SIZES_OF["navigation"](meta_batch_size=4)
    made = learner(
        data,
        optimizer=lambda p: torch.optim.Adam(p, lr=7e-4),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        vae_rate=2e-3,
        epochs=2,
        minibatches=3,
    )
    train_for(made, data, 3, precision="64-true")
    (optimizer,) = made.trainer.optimizers
    assert [g["lr"] for g in optimizer.param_groups] == [3.5e-4, 1e-3]
    counts = [{int(optimizer.state[p]["step"]) for p in part.parameters()} for part in (made.policy, made.vae)]
    assert counts == [{3 * 6}, {3 * 2}]


def test_a_step_of_the_autoencoder_is_the_mean_over_its_trials(monkeypatch):
    """Catches a sum over trials, trials of another age than asked for, and noise that is not that of the update: the
    step restated from what was drawn."""
    data = SIZES_OF["navigation"](meta_batch_size=4)
    made = learner(data, optimizer=sgd(0.0), vae_rate=0.5, vae_updates=1, vae_batch=3)
    drawn, kept = VariBAD.drawn, []
    before = {n: p.detach().clone() for n, p in made.vae.named_parameters()}

    def recorded(self, *arguments):
        kept.append(drawn(self, *arguments))
        return kept[-1]

    monkeypatch.setattr(VariBAD, "drawn", recorded)
    train_for(made, data, 1, precision="64-true")
    ((e, noise, *_), trials), after = kept[0], dict(made.vae.named_parameters())
    assert trials == 3 == e.reward.shape[1]
    fresh = learner(data)
    losses = [
        fresh.vae_loss(fresh.vae.bound(Experience(*(p[:, [k]] for p in e)), noise[:, [k]])).sum() for k in range(3)
    ]
    expected = torch.autograd.grad(sum(losses) / 3, list(fresh.vae.parameters()))
    for (name, start), gradient in zip(before.items(), expected, strict=True):
        torch.testing.assert_close(after[name].detach(), start - 0.5 * gradient, rtol=1e-9, atol=1e-12)


class Ranks:
    """One of several processes, as far as a draw asks."""

    def __init__(self, rank: int, size: int) -> None:
        self.global_rank, self.world_size = rank, size


def test_processes_share_what_is_drawn(monkeypatch):
    """Catches a trial that two processes learn from, or none, noise that depends on how many they are, and a draw that
    is the same at every update, or of trials that were dropped."""
    made = learner(SIZES_OF["navigation"](), vae_batch=5, elbo_terms=4, decoded_steps=3)
    rows = torch.arange(30.0).double()[:, None, None].expand(30, 12, 8)
    made.recent.append(rows)

    def draw(rank: int, size: int, update: int):
        monkeypatch.setattr(VariBAD, "trainer", Ranks(rank, size), raising=False)
        (e, noise, terms, decoded), count = made.drawn(0, update)
        assert count == 5 and terms.shape[0] == 4 and decoded.shape[0] == 3
        return torch.stack([e.reward[0], noise.sum((0, 2)), (1.1 * terms.double()).exp().sum(0)], -1)

    alone, both = draw(0, 1, 7), [draw(rank, 2, 7) for rank in range(2)]
    assert [len(part) for part in both] == [3, 2]
    assert torch.equal(torch.cat(both)[[0, 3, 1, 4, 2]], alone)
    assert len(set(alone[:, 0].tolist())) == 5 and alone[:, 0].min() >= 10
    assert not torch.equal(draw(0, 1, 8), alone)
    seen = {v for update in range(40) for v in draw(0, 1, update)[:, 0].tolist()}
    assert seen == set(range(10, 30))


# Recent trials ------------------------------------------------------------------------------------------------------


def test_recent_trials_are_the_newest():
    """Catches a ring that loses, repeats or keeps trials too long, when filled by more than it has room for too; and a
    state that goes on elsewhere."""
    g, ring, everything = torch.Generator().manual_seed(0), RecentTrials(7), []
    for n in (3, 2, 4, 1, 20, 6, 7, 5):
        trials = torch.randn(n, 2, 3, generator=g)
        ring.append(trials)
        everything += list(trials)
        newest = sorted(part.flatten().tolist() for part in everything[-7:])
        assert len(ring) == len(newest) == min(7, len(everything))
        for capacity in (7, 7, 4, 30):
            other = RecentTrials(capacity)
            other.load_state_dict(ring.state_dict())
            found = sorted(part.flatten().tolist() for part in other.at(torch.arange(len(other))))
            kept = everything[-7:][-capacity:]
            assert found == sorted(part.flatten().tolist() for part in kept)
        same = RecentTrials(7)
        same.load_state_dict(ring.state_dict())
        for r in (ring, same):
            r.append(everything[0][None])
        assert torch.equal(ring.at(torch.arange(len(ring))), same.at(torch.arange(len(ring))))
        everything.append(everything[0])
    with pytest.raises(ConfigError, match="leave the data as it was"):
        ring.append(torch.zeros(1, 3, 3))


def test_a_checkpoint_holds_the_recent_trials(tmp_path):
    """Catches a resume that learns from an empty buffer: the trials of the last updates are in the checkpoint, in the
    order of their tasks."""
    main(command("VariBAD", tmp_path, steps=6))
    run = tmp_path / "varibad" / "checkpoints" / "last.ckpt"
    state = load_checkpoint(run)["recent_trials"]
    assert state["added"] == 24 and state["rows"].shape == (10, 8, 2 + 2 + 2 + 2)
    alive = state["rows"][..., -1]
    assert (alive == 1).all() and state["rows"][..., :2].std() > 0.1
    assert "beliefs._extra_state" in weights(run)


# What is measured ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["navigation", "ends"])
def test_the_error_of_rewards_is_of_the_belief_before(family):
    """Catches a belief that knows the reward already, rewards of steps that never happened, another unit than the
    environment's, and curves whose tasks and steps are swapped."""
    data = SIZES_OF[family](**({"pay": 3.0} if family == "ends" else {}))
    made = learner(data).eval()
    made.normalizer.on = True
    batch = tasks(data)
    trial = trial_of(made, batch)
    with torch.no_grad():
        found = made.evaluation_metrics(batch)
    e, unit = made.scaled(made.experience(trial)), float(made.normalizer.reward(torch.tensor(1.0).double()))
    assert unit != 1
    for n in range(6):
        errors = []
        for t in range(len(trial.reward)):
            m = trial.extras.belief.mean[None, None, t, [n]]
            with torch.no_grad():
                told = made.vae.rewards(m, Experience(*(part[[t]][:, [n]] for part in e))).item() / unit
            error = (told - trial.reward[t, n].item()) ** 2
            if trial.seen.alive[t, n]:
                errors.append(error)
                assert found["reward_errors"][n, t].item() == pytest.approx(error, rel=1e-6)
            else:
                assert found["reward_errors"][n, t].isnan()
        assert found["reward_error"][n].item() == pytest.approx(np.mean(errors), rel=1e-6)
    deviation = trial.extras.belief.log_deviation.exp()
    torch.testing.assert_close(found["beliefs"], deviation.transpose(0, 1))
    torch.testing.assert_close(found["belief_deviation"], deviation[-1].mean(-1))


def test_greedy_is_of_evaluation_alone():
    """Catches training without exploration, and an evaluation that draws though it was asked not to."""
    data = SIZES_OF["navigation"]()
    made = learner(data)
    for modes in (True, False):
        trial = trial_of(made.train(not modes), tasks(data))
        assert torch.equal(trial.action, trial.extras.choice.mode()) == modes


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        ("--model.reward_weight 0 --model.state_weight 0", "there is nothing to learn a belief from"),
        ("--model.minibatches 100", "minibatches is 100 but a process has 32 steps"),
        ("--model.hidden [8,0]", "hidden[1] is 0 but must be at least 1"),
        ("--model.discrete true", "the environment has False: give --model.init_args.discrete false"),
        ("--trainer.gradient_clip_val 1", "leave out --trainer.gradient_clip_val"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_cure(flags, cure, tmp_path, capsys):
    """Catches a failure deep in a matrix product, and settings by which nothing is learned."""
    with pytest.raises(SystemExit):
        main(command("VariBAD", tmp_path, *flags.split(), steps=2))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and cure in error
