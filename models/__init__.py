"""One file per algorithm; each class is found here by its paper's short name."""

import app  # noqa: F401  (prepares torchvision and memory before torchmetrics is imported)
from models.abml import ABML
from models.anil import ANIL
from models.backbones import MLP, Averaged, Conv2, Conv4, Learn2Learn, Pretrained, ResNet, UnitLength
from models.bandit_strategies import BanditStrategy
from models.base import MetaLearner
from models.baseline import Baseline
from models.bmaml import BMAML
from models.hsml import HSML
from models.imaml import IMAML
from models.leo import LEO
from models.maml import MAML
from models.maml_policy import MAMLPolicy
from models.matching import MatchingNet
from models.mdp_strategies import MDPStrategy
from models.meta_sgd import MetaSGD
from models.metagan import MetaGAN, MetaGANRelation
from models.nearest import NearestNeighbour
from models.pearl import PEARL
from models.protonet import ProtoNet
from models.reinforcement import ReinforcementLearner
from models.relation import RelationNet
from models.reptile import Reptile
from models.rl2 import RL2
from models.snail import SNAIL
from models.weight_generator import WeightGenerator

ALGORITHMS: tuple[type[MetaLearner], ...] = (
    MAML,
    ANIL,
    MetaSGD,
    Reptile,
    IMAML,
    BMAML,
    ABML,
    HSML,
    ProtoNet,
    MatchingNet,
    RelationNet,
    MetaGAN,
    MetaGANRelation,
    SNAIL,
    Baseline,
    NearestNeighbour,
    LEO,
    WeightGenerator,
    RL2,
    MAMLPolicy,
    PEARL,
)
# Learners without parameters, which are evaluated and not trained.
STRATEGIES: tuple[type[MetaLearner], ...] = (BanditStrategy, MDPStrategy)

__all__ = [
    "ABML",
    "ALGORITHMS",
    "ANIL",
    "BMAML",
    "HSML",
    "IMAML",
    "LEO",
    "MAML",
    "MLP",
    "PEARL",
    "RL2",
    "SNAIL",
    "STRATEGIES",
    "Averaged",
    "BanditStrategy",
    "Baseline",
    "Conv2",
    "Conv4",
    "Learn2Learn",
    "MAMLPolicy",
    "MDPStrategy",
    "MatchingNet",
    "MetaGAN",
    "MetaGANRelation",
    "MetaLearner",
    "MetaSGD",
    "NearestNeighbour",
    "Pretrained",
    "ProtoNet",
    "ReinforcementLearner",
    "RelationNet",
    "Reptile",
    "ResNet",
    "UnitLength",
    "WeightGenerator",
]
