"""What learners of reinforcement learning share: trials of an agent in environments, and their figures."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from app.metrics import FINGERPRINT
from datamodules.environments import Environment, Environments, Facts
from models.base import MetaLearner
from models.policies import encode


class Seen(NamedTuple):
    """What an agent knows when it acts, of each of N environments.

    Attributes:
        observation: (N, seen_size).
        action: the previous one, (N, actions), one-hot where discrete; zeros at the start of the trial.
        reward: that it brought, (N,).
        done: (N,), 1 where it was the last of an episode.
        reached: the observation that it led to, (N, seen_size): another than ``observation`` where an episode starts.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    done: Tensor
    reached: Tensor


class Trial(NamedTuple):
    """Episodes one after another in each of N environments.

    Attributes:
        seen: before each action, each part (steps, N, …).
        action: (steps, N), or (steps, N, actions) where continuous.
        reward, shaped: (steps, N).
        reached: the observation that each action led to, (steps, N, seen_size).
        told: what the agent left of each step, each tensor (steps, N, …).
    """

    seen: Seen
    action: Tensor
    reward: Tensor
    shaped: Tensor
    reached: Tensor
    told: Any

    def returns(self, episodes: int) -> Tensor:
        """Undiscounted returns of each episode, (N, episodes)."""
        return self.reward.unflatten(0, (episodes, -1)).sum(1).T


class Agent(Protocol):
    """Acts in N environments at a time.

    Attributes:
        draws: uniform numbers that an action takes.
    """

    draws: int

    def begin(self, environment: Environment, task: Facts) -> Any:
        """The memory at the start of a trial; only an oracle looks at facts (N, …) for more than their number."""
        ...

    def act(self, memory: Any, seen: Seen, draws: Tensor) -> tuple[Any, Tensor, Any]:
        """The next memory, actions (N,) or (N, actions), and tensors (N, …) to keep of the step, in any structure."""
        ...


def run_trial(batch: Environments, agent: Agent, episodes: int | None = None, purpose: int = 0) -> Trial:
    """A trial of so many episodes in each environment of the batch; the agent's memory lasts from end to end.

    Args:
        batch: the environments.
        agent: acts.
        episodes: None for those of the batch.
        purpose: tells trials of the same tasks apart: chance is a function of it and of the tasks' numbers.
    """
    environment, task, episodes = batch.environment, batch.task, episodes or batch.episodes
    steps = episodes * environment.horizon
    starts = batch.draws(episodes, environment.start_draws, purpose=3 * purpose + 1)
    moves = batch.draws(steps, environment.step_draws, purpose=3 * purpose + 2)
    choices = batch.draws(steps, agent.draws, purpose=3 * purpose + 3)
    memory, state, kept = agent.begin(environment, task), None, []
    observation, action, reward, done = None, None, None, None
    for t in range(steps):
        first = t % environment.horizon == 0
        reached = observation
        if first:
            state = environment.start(task, starts[:, t // environment.horizon])
            observation = environment.seen(task, state)
        assert observation is not None
        if action is None:
            action = observation.new_zeros(len(batch), environment.actions)
            reward, done, reached = *observation.new_zeros(2, len(batch)), observation
        assert reward is not None and done is not None and reached is not None
        seen = Seen(observation, action, reward, done, reached)
        memory, chosen, told = agent.act(memory, seen, choices[:, t])
        state, reward, shaped = environment.step(task, state, chosen, moves[:, t])
        observation = environment.seen(task, state)
        kept.append(Trial(seen, chosen, reward, shaped, observation, told))
        action = encode(chosen, environment.actions, environment.discrete).to(observation)
        done = torch.full_like(reward, float((t + 1) % environment.horizon == 0))
    return tree_map(lambda *parts: torch.stack(parts), *kept)


class ReinforcementLearner(MetaLearner):
    """Learns to act in environments. An algorithm overrides ``agent`` and its meta-training step.

    Args:
        observations, actions, discrete: of the environments, see Environment; None takes any.
        **others: see MetaLearner.
    """

    tasks = frozenset({"reinforcement"})

    def __init__(
        self, observations: int | None = None, actions: int | None = None, discrete: bool = True, **others: Any
    ) -> None:
        super().__init__(batch_norm="none", **others)
        self.observations, self.actions, self.discrete = observations, actions, discrete

    def agent(self) -> Agent:
        """That acts as the learner has it now."""
        raise NotImplementedError

    def task_latents(self, batch: Environments) -> Tensor | None:
        """What the learner has of each task for a latent, after a trial, (T, L), to be looked at; None without."""
        return None

    def misfit(self, environment: Environment) -> str | None:
        """Why the learner cannot act in this environment, and the cure; None if it can."""
        wanted = {
            "observations": environment.seen_size,
            "actions": environment.actions,
            "discrete": environment.discrete,
        }
        for name, value in wanted.items():
            if getattr(self, name) not in (None, value):
                return (
                    f"the model's {name} is {getattr(self, name)} but the environment has {value}: "
                    f"give --model.init_args.{name} {str(value).lower()}"
                )
        return None

    def trial_figures(self, batch: Environments, trial: Trial) -> dict[str, Tensor]:
        """Figures of each task: its returns, and how they compare with the best policy's where that is known."""
        return self.return_figures(batch, trial.returns(len(trial.reward) // batch.environment.horizon))

    def return_figures(self, batch: Environments, returns: Tensor) -> dict[str, Tensor]:
        """Figures of each task, from the returns of its episodes in order, (T, episodes)."""
        episodes, total = returns.shape[1], returns.sum(1)
        figures = {"return": total, "first_episode": returns[:, 0], "last_episode": returns[:, -1], "returns": returns}
        optimum = batch.environment.optimum(batch.task)
        if optimum is not None:
            figures["regret"] = episodes * optimum - total
            figures["of_optimum"] = torch.stack([total, episodes * optimum], 1)
        return figures

    def evaluation_figures(self, batch: Environments) -> dict[str, Tensor]:
        """Figures of each task, (T, …), of a trial in it."""
        return self.trial_figures(batch, run_trial(batch, self.agent()))

    def last_step(self) -> None:
        """The last of several steps of the optimizer that a learner takes by itself in a meta-update.

        It alone goes through Lightning, so that ``max_steps``, checkpoints and schedules count meta-updates.
        """
        self.optimizers().step()  # pyright: ignore
        if (scheduler := self.lr_schedulers()) is not None:
            scheduler.step()  # pyright: ignore

    def evaluation_step(self, batch: Environments, stage: str) -> None:
        facts = {FINGERPRINT: batch.fingerprint()} if stage == "test" else None
        self.task_figures(stage).update(batch.index, self.evaluation_figures(batch), facts)
