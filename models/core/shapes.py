"""Whether data and network fit each other."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor
from torch.func import functional_call

from datamodules.core.episodes import Episodes, MetaBatch
from datamodules.core.errors import ConfigError
from models.networks.backbones import Backbone


def fits(learner: torch.nn.Module, inputs: Tensor) -> None:
    """See whether inputs (N, *input) go through the learner's backbone.

    Raises:
        ConfigError: they do not.
    """
    backbone = next((m for m in learner.modules() if isinstance(m, Backbone)), None)
    if backbone is None:
        return
    tensors = {
        n: t[0] if backbone.particles else t for n, t in (*backbone.named_parameters(), *backbone.named_buffers())
    }
    like = next(chain(backbone.parameters(), learner.parameters()), torch.zeros(()))  # a backbone may have none
    try:
        with torch.no_grad():
            features = functional_call(backbone, tensors, like.new_zeros(2, *inputs.shape[1:])).shape[1]
    except RuntimeError:
        features = None
    # Another size may go through and give other features, which a learner without a head would take without a word.
    if features != backbone.out_features:
        its, wanted = ("×".join(map(str, shape)) for shape in (inputs.shape[1:], backbone.input_shape))
        raise ConfigError(
            f"the data's inputs are {its} but the network takes {wanted}: choose the data's settings accordingly, "
            "for images --data.size and --data.channels"
        )


def fits_task(learner: torch.nn.Module, tasks: MetaBatch) -> None:
    """See whether tasks are whole and go through the learner's backbone, and whether it fits inputs and targets.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(tasks, Episodes):
        return
    fits(learner, tasks.support_x[0])
    for what, x, y in (("support", tasks.support_x, tasks.support_y), ("query", tasks.query_x, tasks.query_y)):
        if x.is_floating_point() and not (x.isfinite().all() and (tasks.ways or y.isfinite().all())):
            raise ConfigError(f"a {what} set of the data holds what is no finite number: mend the data")
        if tasks.ways and not 0 <= int(y.min()) <= int(y.max()) < tasks.ways:
            wrong = int(y.min()) if y.min() < 0 else int(y.max())
            raise ConfigError(f"a {what} label is {wrong} but the tasks have {tasks.ways} ways: number classes from 0")
    if tasks.ways and (tasks.support_y.sort(1).values.diff(dim=1) > 0).sum(1).min() < tasks.ways - 1:
        raise ConfigError(f"a support set has no example of one of its {tasks.ways} classes: give each class one")
    inputs = getattr(learner, "inputs", None)
    if isinstance(inputs, int) and tasks.support_x.shape[2:] != (inputs,):
        shape = "×".join(map(str, tasks.support_x.shape[2:]))
        raise ConfigError(
            f"the data's inputs are {shape} but the learner takes {inputs} numbers: give --model.init_args.inputs "
            f"{tasks.support_x.shape[-1]}, or other data"
        )
    outputs = getattr(learner, "outputs", None)
    if not tasks.ways and outputs not in (None, wanted := tasks.query_y.shape[-1]):
        raise ConfigError(
            f"the model's head has {outputs} outputs but targets are of {wanted}: give --model.init_args.outputs "
            f"{wanted}"
        )
