"""An agent that acts through each episode by a sample from its posterior over tasks."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from datamodules.reinforcement.environments import Environment, Facts, normal
from models.reinforcement.context_encoder import ContextEncoder, Latents
from models.reinforcement.normalization import RunningScale
from models.reinforcement.soft_actor_critic import Policy
from models.reinforcement.trials import Seen


class LatentLearner(Protocol):
    """Has a policy that knows latents beside what it observes, and infers them by an encoder; None infers nothing.

    It takes observations and rewards by a scale of its own.
    """

    latents: int
    actions: int | None
    policy: Policy
    encoder: ContextEncoder | None
    normalizer: RunningScale


class Memory(NamedTuple):
    """Of an agent that samples from its posterior.

    Attributes:
        horizon: of the environments.
        latents: what z is drawn from now, (N, latents).
        posterior: by the context of the episodes before this one; None before there is any.
        step: of the trial.
        z: (N, latents), for this episode.
        context: the transitions of this episode, each (N, inputs), and whether they count, (N,).
        observation, alive: that the previous action was taken on.
    """

    horizon: int
    latents: Latents
    posterior: Latents | None = None
    step: int = 0
    z: Tensor | None = None
    context: tuple[tuple[Tensor, Tensor], ...] = ()
    observation: Tensor | None = None
    alive: Tensor | None = None


class PosteriorSampling:
    """Acts through each episode by one z, first from the prior, then from the posterior by all episodes before.

    Args:
        learner: whose policy and encoder.
        explore: episodes by the prior.
        context: episodes that the posterior is inferred from, the first ones; None for all.
        deterministic: the mode of the policy's actions, not a sample.
    """

    def __init__(
        self, learner: LatentLearner, explore: int, context: int | None = None, deterministic: bool = False
    ) -> None:
        self.learner, self.explore, self.context, self.deterministic = learner, explore, context, deterministic
        assert learner.actions is not None
        self.draws = learner.latents + learner.actions

    def begin(self, environment: Environment, task: Facts) -> Memory:
        like = next(self.learner.policy.parameters())
        mean = like.new_zeros(len(next(iter(task.values()))), self.learner.latents)
        return Memory(environment.horizon, Latents(mean, torch.ones_like(mean)))

    def act(self, memory: Memory, seen: Seen, draws: Tensor) -> tuple[Memory, Tensor, Any]:
        """See Agent; of each step it leaves z."""
        of_latents, of_action = draws.split([self.learner.latents, draws.shape[1] - self.learner.latents], 1)
        observation = self.learner.normalizer.observation(seen.observation)
        if memory.observation is not None and memory.alive is not None:
            reward = self.learner.normalizer.reward(seen.reward)
            taken = torch.cat([memory.observation, seen.action, reward[:, None]], 1)
            memory = memory._replace(context=(*memory.context, (taken, memory.alive)))
        if memory.step % memory.horizon == 0:
            memory = self._next_episode(memory, memory.step // memory.horizon)
            memory = memory._replace(z=memory.latents.sample(normal(of_latents)))
        assert memory.z is not None
        choice = self.learner.policy(torch.cat([observation, memory.z], 1))
        action = choice.mode() if self.deterministic else choice.sample(of_action)
        return memory._replace(step=memory.step + 1, observation=observation, alive=seen.alive), action, memory.z

    def _next_episode(self, memory: Memory, episode: int) -> Memory:
        posterior, encoder = memory.posterior, self.learner.encoder
        if encoder is not None and episode > 0 and (self.context is None or episode <= self.context):
            context, counts = (torch.stack(part, 1) for part in zip(*memory.context, strict=True))
            posterior = encoder(context, posterior, counts)
        known = posterior is not None and episode >= self.explore
        return memory._replace(posterior=posterior, context=(), latents=posterior if known else memory.latents)
