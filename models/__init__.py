"""One file per algorithm; each class is found here by its paper's short name."""

import app  # noqa: F401  (prepares torchvision and memory before torchmetrics is imported)
from models.abml import ABML
from models.anil import ANIL
from models.backbones import MLP, Conv4, Learn2Learn
from models.base import MetaLearner
from models.bmaml import BMAML
from models.imaml import IMAML
from models.maml import MAML
from models.matching import MatchingNet
from models.meta_sgd import MetaSGD
from models.protonet import ProtoNet
from models.relation import RelationNet
from models.reptile import Reptile
from models.snail import SNAIL

ALGORITHMS: tuple[type[MetaLearner], ...] = (
    MAML,
    ANIL,
    MetaSGD,
    Reptile,
    IMAML,
    BMAML,
    ABML,
    ProtoNet,
    MatchingNet,
    RelationNet,
    SNAIL,
)

__all__ = [
    "ABML",
    "ALGORITHMS",
    "ANIL",
    "BMAML",
    "IMAML",
    "MAML",
    "MLP",
    "SNAIL",
    "Conv4",
    "Learn2Learn",
    "MatchingNet",
    "MetaLearner",
    "MetaSGD",
    "ProtoNet",
    "RelationNet",
    "Reptile",
]
