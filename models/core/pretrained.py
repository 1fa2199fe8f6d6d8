"""A backbone that another learner's checkpoint trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import load_checkpoint, refuse_missing
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNorm
from models.networks.wrappers import Around


class Pretrained(Around):
    """The backbone of another learner's checkpoint, frozen or as a start.

    Frozen it is one function of one image for all tasks: no gradient reaches it, and batch norm is by the running
    averages, whatever the learner's mode. The checkpoint is read when meta-training starts (train.py calls ``load``);
    those written from then on hold the backbone, and the file that it came from is not needed again.

    Args:
        backbone: the network, with the settings that it was trained with.
        ckpt_path: of a learner that has it.
        frozen: leave the weights as they are; otherwise they are meta-learned from there on.
    """

    def __init__(self, backbone: Backbone, ckpt_path: str, frozen: bool = True) -> None:
        super().__init__(backbone)
        self.ckpt_path, self.frozen = Path(ckpt_path), frozen
        self.loaded = False
        self.trained_classes: frozenset[int] = frozenset()  # by their digests, once it is loaded from its checkpoint
        self.register_load_state_dict_post_hook(_mark_loaded)
        if frozen:
            backbone.requires_grad_(False).eval()
            for layer in backbone.modules():
                if isinstance(layer, BatchNorm):
                    layer.fixed = True

    def load(self) -> None:
        """Take the weights from the checkpoint, unless there are trained ones already.

        Raises:
            ConfigError: no such file, or none with this network in it.
        """
        if self.loaded:
            return
        refuse_missing(self.ckpt_path, "train the backbone first")
        content = load_checkpoint(self.ckpt_path)
        state: dict[str, Tensor] = content.get("state_dict", {}) if isinstance(content, dict) else {}
        own = {name: tuple(value.shape) for name, value in self.backbone.state_dict().items()}
        for prefix in sorted({name[: name.rindex("backbone.") + 9] for name in state if "backbone." in name}):
            found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if {name: tuple(value.shape) for name, value in found.items()} == own:
                self.backbone.load_state_dict(found)
                self.loaded = True
                if (known := content.get("trained_classes")) is not None:
                    self.trained_classes = frozenset(known.tolist())
                return
        raise ConfigError(f"{self.ckpt_path} holds no backbone of these settings: give those that it was trained with")

    def train(self, mode: bool = True) -> Pretrained:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.loaded:
            raise ConfigError(f"the weights of {self.ckpt_path} are not loaded: call load, or load a state_dict")
        return self.backbone(x)


def _mark_loaded(module: nn.Module, incompatible: Any) -> None:
    cast(Pretrained, module).loaded = True


def load_pretrained(module: nn.Module) -> None:
    """Give every ``Pretrained`` inside the weights that it starts from.

    Raises:
        ConfigError: see ``Pretrained.load``.
    """
    for part in module.modules():
        if isinstance(part, Pretrained):
            part.load()
