"""What another learner's checkpoint trained: a backbone, a task embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import load_checkpoint, refuse_missing
from models.core.learner import MetaLearner
from models.core.task_embedding import TaskEmbedding
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNorm
from models.networks.wrappers import Around


class FromCheckpoint(nn.Module):
    """A part whose weights another learner's checkpoint has, frozen or as a start.

    The checkpoint is read when meta-training starts (train.py calls ``load``); those written from then on hold the
    part, and the file that it came from is not needed again.
    """

    part: ClassVar[str]
    ckpt_path: Path
    frozen: bool
    loaded: bool
    trained_classes: frozenset[int]  # by their digests, once it is loaded from its checkpoint

    def from_checkpoint(self, ckpt_path: str, frozen: bool) -> None:
        """To be called by a constructor, once the part is there."""
        self.ckpt_path, self.frozen, self.loaded, self.trained_classes = Path(ckpt_path), frozen, False, frozenset()
        self.register_load_state_dict_post_hook(_mark_loaded)
        if frozen:
            self.requires_grad_(False).eval()
            for layer in self.modules():
                if isinstance(layer, BatchNorm):
                    layer.fixed = True

    def take(self, content: dict[str, Any]) -> bool:
        """Take the weights from what a checkpoint holds; False if they are not there."""
        raise NotImplementedError

    def load(self) -> None:
        """Take the weights from the checkpoint, unless there are trained ones already.

        Raises:
            ConfigError: no such file, or none with this part in it.
        """
        if self.loaded:
            return
        refuse_missing(self.ckpt_path, f"train the {self.part} first")
        content = load_checkpoint(self.ckpt_path)
        if not isinstance(content, dict) or not self.take(content):
            raise ConfigError(
                f"{self.ckpt_path} holds no {self.part} of these settings: give those that it was trained with"
            )
        self.loaded = True
        if (known := content.get("trained_classes")) is not None:
            self.trained_classes = frozenset(known.tolist())

    def train(self, mode: bool = True) -> FromCheckpoint:
        return super().train(mode and not self.frozen)

    def refuse_unloaded(self) -> None:
        """Refuse to compute with weights that nothing trained.

        Raises:
            ConfigError: neither was the checkpoint read nor a ``state_dict`` loaded.
        """
        if not self.loaded:
            raise ConfigError(f"the weights of {self.ckpt_path} are not loaded: call load, or load a state_dict")


class Pretrained(FromCheckpoint, Around):
    """The backbone of another learner's checkpoint, frozen or as a start.

    Frozen it is one function of one image for all tasks: no gradient reaches it, and batch norm is by the running
    averages, whatever the learner's mode.

    Args:
        backbone: the network, with the settings that it was trained with.
        ckpt_path: of a learner that has it.
        frozen: leave the weights as they are; otherwise they are meta-learned from there on.
    """

    part = "backbone"

    def __init__(self, backbone: Backbone, ckpt_path: str, frozen: bool = True) -> None:
        super().__init__(backbone)
        self.from_checkpoint(ckpt_path, frozen)

    def take(self, content: dict[str, Any]) -> bool:
        state: dict[str, Tensor] = content.get("state_dict", {})
        own = {name: tuple(value.shape) for name, value in self.backbone.state_dict().items()}
        for prefix in sorted({name[: name.rindex("backbone.") + 9] for name in state if "backbone." in name}):
            found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if {name: tuple(value.shape) for name, value in found.items()} == own:
                self.backbone.load_state_dict(found)
                return True
        return False

    def forward(self, x: Tensor) -> Tensor:
        self.refuse_unloaded()
        return self.backbone(x)


class TrainedEmbedding(FromCheckpoint, TaskEmbedding):
    """The task embedding of a learner that was trained before, frozen or as a start.

    Args:
        learner: with the settings that it was trained with; it must have an embedding, as CAVIA has.
        ckpt_path: its checkpoint.
        frozen: leave the weights as they are; otherwise they are trained along from there on.
    """

    part = "learner"

    def __init__(self, learner: MetaLearner, ckpt_path: str, frozen: bool = True) -> None:
        super().__init__()
        if not learner.embedding_size:
            raise ValueError(f"learner is {type(learner).__name__}, which has no task embedding: choose one that has")
        self.learner, self.embedding_size = learner, learner.embedding_size
        self.from_checkpoint(ckpt_path, frozen)

    def take(self, content: dict[str, Any]) -> bool:
        try:
            self.learner.on_load_checkpoint(content)
            self.learner.load_state_dict(content["state_dict"])
        except (KeyError, RuntimeError):
            return False
        return True

    def embed_task(self, support: Support) -> Tensor:
        self.refuse_unloaded()
        embedding = self.learner.embed_task(support)
        return embedding.detach() if self.frozen else embedding


def _mark_loaded(module: nn.Module, incompatible: Any) -> None:
    cast(FromCheckpoint, module).loaded = True


def load_pretrained(module: nn.Module) -> None:
    """Give every part that is from another checkpoint the weights that it starts from.

    Raises:
        ConfigError: see ``FromCheckpoint.load``.
    """
    for part in module.modules():
        if isinstance(part, FromCheckpoint):
            part.load()
