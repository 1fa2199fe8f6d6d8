"""Beliefs about a task, updated with every step of a trial, and what is foreseen of its transitions by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.recurrent import GRUCell
from models.reinforcement.policies import Gaussian, single


class Experience(NamedTuple):
    """Transitions of trials, in the order in which they happened: each part (steps, N, …).

    Attributes:
        observation, reached: before and after, (steps, N, observations).
        action: as networks take it, (steps, N, actions).
        reward: (steps, N).
        alive: (steps, N), 0 where the episode had ended before, so that nothing happened.
    """

    observation: Tensor
    reached: Tensor
    action: Tensor
    reward: Tensor
    alive: Tensor

    @classmethod
    def of(cls, rows: Tensor, observations: int, actions: int) -> Experience:
        """From how they are kept, (steps, N, 2 observations + actions + 2)."""
        observation, reached, action, more = rows.split([observations, observations, actions, 2], -1)
        return cls(observation, reached, action, *more.unbind(-1))

    def rows(self) -> Tensor:
        """How they are kept."""
        return torch.cat([*self[:3], self.reward[..., None], self.alive[..., None]], -1)

    def at(self, steps: Tensor) -> Experience:
        """Those at steps (D, N) of each trial alone."""

        def some(part: Tensor) -> Tensor:
            place = steps.view(*steps.shape, *(1,) * (part.dim() - 2))
            return part.gather(0, place.expand(*steps.shape, *part.shape[2:]))

        return Experience(*(some(part) for part in self))


class Embedding(nn.Module):
    """One layer of its own for a part of the input; nothing comes of no numbers."""

    def __init__(self, inputs: int, units: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.size, self.activation = units if inputs else 0, activation
        self.layer = nn.Linear(inputs, units) if inputs else None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.layer is None else self.activation(self.layer(x))


def standard(like: Gaussian) -> Gaussian:
    """N(0, I), of a belief's shape."""
    return Gaussian(torch.zeros_like(like.mean), torch.zeros_like(like.log_deviation))


def features(belief: Gaussian) -> Tensor:
    """What a policy sees of a belief: mean and log-variance, (…, 2 latents)."""
    return torch.cat([belief.mean, 2 * belief.log_deviation], -1)


def kl_to_previous(beliefs: Gaussian) -> Tensor:
    """KL of each belief (steps, N, latents) to the one before it, of the first to N(0, I): (steps, N), nats."""
    first = standard(Gaussian(*(part[:1] for part in beliefs)))
    before = Gaussian(*(torch.cat([a, b[:-1]]) for a, b in zip(first, beliefs, strict=True)))
    return beliefs.kl(before)


class BeliefEncoder(nn.Module):
    """A gated recurrent network takes the transitions of a trial one by one; a Gaussian is read off its state.

    The state of zeros, before the first transition, gives the learned prior. The network sees what an action led to:
    action, observation reached and reward, each through a layer of its own.

    Args:
        observations, actions: of the environments.
        latents: of the belief.
        hidden: units of the recurrent network.
        embeddings: units of the layers of observation, action and reward.
    """

    def __init__(self, observations: int, actions: int, latents: int, hidden: int, embeddings: Sequence[int]) -> None:
        super().__init__()
        sizes = (observations, actions, 1)
        self.parts = nn.ModuleList(Embedding(n, units, F.relu) for n, units in zip(sizes, embeddings, strict=True))
        self.cell = GRUCell(sum(part.size for part in self.parts), hidden)  # pyright: ignore
        for parameter in self.cell.parameters():
            nn.init.zeros_(parameter) if parameter.dim() == 1 else nn.init.orthogonal_(parameter)
        self.hidden = hidden
        self.mean, self.log_variance = (nn.Linear(hidden, latents) for _ in range(2))

    def embed(self, reached: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        """What the recurrent network takes of transitions (…)."""
        given = (reached, action, reward[..., None])
        return torch.cat([part(x) for part, x in zip(self.parts, given, strict=True)], -1)

    def begin(self, trials: int) -> Tensor:
        """States of so many trials before their first step, (N, hidden)."""
        return self.mean.weight.new_zeros(trials, self.hidden)

    def step(self, state: Tensor, reached: Tensor, action: Tensor, reward: Tensor, counts: Tensor) -> Tensor:
        """States (N, hidden) after a transition, where ``counts`` (N,) is 1; as they were elsewhere."""
        return torch.where(counts[:, None] > 0, self.cell(self.embed(reached, action, reward), state), state)

    def belief(self, state: Tensor) -> Gaussian:
        """By states (…, hidden): (…, latents)."""
        return Gaussian(single(self.mean(state)), 0.5 * single(self.log_variance(state)))

    def forward(self, t: Experience) -> Gaussian:
        """The beliefs before the first step and after each, (steps + 1, N, latents)."""
        x = self.embed(t.reached, t.action, t.reward)
        start = torch.zeros_like(x[:1, :, :1]).expand(-1, -1, self.hidden)
        return self.belief(torch.cat([start, self.cell.run(x, counts=t.alive)]))


class Decoder(nn.Module):
    """What it foresees of transitions in a task with latent z: a network of z and of what is given of a transition.

    Args:
        latents: of z.
        embeddings: name, numbers and units of each part that is given; parts of one name share a layer.
        hidden: units of the layers.
        outputs: numbers that are foreseen.
    """

    def __init__(
        self, latents: int, embeddings: Sequence[tuple[str, int, int]], hidden: Sequence[int], outputs: int
    ) -> None:
        super().__init__()
        self.names = [name for name, _, _ in embeddings]
        self.parts = nn.ModuleDict({name: Embedding(inputs, units, F.relu) for name, inputs, units in embeddings})
        given = sum(self.parts[name].size for name in self.names)  # pyright: ignore
        self.of_latents = nn.Linear(latents, hidden[0])
        self.of_given = nn.Linear(given, hidden[0], bias=False) if given else None
        sizes = list(zip(hidden, [*hidden[1:], outputs], strict=True))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)

    def forward(self, z: Tensor, given: Sequence[Tensor]) -> Tensor:
        """For latents (K, 1, N, latents) or (steps, N, latents) and parts (steps, N, numbers): (K, steps, N, outputs).

        The first layer, of latents and transitions side by side, is a sum over both, so pairs of them cost one sum.
        """
        x = self.of_latents(z)
        if self.of_given is not None:
            parts = [self.parts[name](part) for name, part in zip(self.names, given, strict=True)]
            x = x + self.of_given(torch.cat(parts, -1))
        for layer in self.layers:
            x = layer(F.relu(x))
        return single(x)


class Bound(NamedTuple):
    """Parts of the negative evidence lower bound of each trial, (N,): squared errors, and divergences in nats."""

    reward: Tensor
    state: Tensor
    kl: Tensor


class TrialAutoencoder(nn.Module):
    """Encodes a trial so far as a belief over latents m, and decodes the whole trial from m.

    Args:
        observations, actions: of the environments.
        latents: size of m.
        hidden: units of the encoder's recurrent network.
        embeddings: units of the encoder's and the decoders' layers of observation, action and reward.
        decoder_hidden: units of the decoders' layers.
        rewards, states: whether rewards and observations reached are decoded.
        reached_only: the reward decoder sees the observation reached alone, not also the one before and the action.
    """

    def __init__(
        self,
        observations: int,
        actions: int,
        latents: int,
        hidden: int,
        embeddings: Sequence[int],
        decoder_hidden: Sequence[int],
        rewards: bool = True,
        states: bool = False,
        reached_only: bool = False,
    ) -> None:
        super().__init__()
        self.reached_only = reached_only
        self.encoder = BeliefEncoder(observations, actions, latents, hidden, embeddings)
        state, action = ("observation", observations, embeddings[0]), ("action", actions, embeddings[1])
        seen = [state] if reached_only else [state, action, state]
        self.reward = Decoder(latents, seen, decoder_hidden, 1) if rewards else None
        self.state = Decoder(latents, [state, action], decoder_hidden, observations) if states else None

    def rewards(self, m: Tensor, e: Experience) -> Tensor:
        """As they are foreseen of transitions, by latents: see Decoder, without the last dimension."""
        assert self.reward is not None
        given = [e.reached] if self.reached_only else [e.reached, e.action, e.observation]
        return self.reward(m, given).squeeze(-1)

    def bound(self, e: Experience, noise: Tensor, terms: Tensor | None = None, decoded: Tensor | None = None) -> Bound:
        """The sum over t of -ELBO_t of each trial, with squared errors for negative log-densities.

        Args:
            e: whole trials (steps, N).
            noise: standard normal, of m after every step, (steps + 1, N, latents).
            terms: which t are summed over, (K, N), each in [0, steps]; None: all.
            decoded: which steps are foreseen, (D, N), each in [0, steps); None: all.
        """
        beliefs = self.encoder(e)
        kl = kl_to_previous(beliefs)
        m = beliefs.mean + beliefs.log_deviation.exp() * noise.to(beliefs.mean)
        # After a step in which nothing happened there is no further belief, and no term of it.
        counts = torch.cat([torch.ones_like(e.alive[:1]), e.alive])
        if terms is not None:
            kl, counts = (part.gather(0, terms) for part in (kl, counts))
            m = m.gather(0, terms[..., None].expand(*terms.shape, m.shape[-1]))
        e = e if decoded is None else e.at(decoded)
        m, pairs = m[:, None], counts[:, None] * e.alive
        reward = state = torch.zeros_like(kl[0])
        if self.reward is not None:
            reward = (pairs * (self.rewards(m, e) - e.reward).square()).sum((0, 1))
        if self.state is not None:
            missed = (self.state(m, [e.observation, e.action]) - e.reached).square().mean(-1)
            state = (pairs * missed).sum((0, 1))
        return Bound(reward, state, (counts * kl).sum(0))
