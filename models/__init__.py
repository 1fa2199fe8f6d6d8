"""One file per algorithm; each class is found here by its paper's short name."""

import datamodules.core  # noqa: F401  (prepares torchvision and memory before torchmetrics is imported)
from models.baselines.baseline import Baseline
from models.baselines.nearest_neighbour import NearestNeighbour
from models.bayesian.abml import ABML
from models.bayesian.bmaml import BMAML
from models.bayesian.weight_generator import WeightGenerator
from models.core.learner import MetaLearner
from models.core.pretrained import Pretrained
from models.generative.metagan import MetaGAN, MetaGANRelation
from models.memory.snail import SNAIL
from models.metric.matching_net import MatchingNet
from models.metric.protonet import ProtoNet
from models.metric.relation_net import RelationNet
from models.networks.backbones import MLP, Conv2, Conv4, Learn2Learn, Network, ResNet
from models.networks.wrappers import Averaged, UnitLength
from models.optimization.anil import ANIL
from models.optimization.imaml import IMAML
from models.optimization.leo import LEO
from models.optimization.maml import MAML
from models.optimization.meta_sgd import MetaSGD
from models.optimization.reptile import Reptile
from models.reinforcement.bandit_strategies import BanditStrategy
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.maml_policy import MAMLPolicy
from models.reinforcement.mdp_strategies import MDPStrategy
from models.reinforcement.pearl import PEARL
from models.reinforcement.rl2 import RL2
from models.task_embedding.gradient_pca import GradientPCA
from models.task_embedding.hsml import HSML
from models.task_embedding.task2vec import Task2Vec

ALGORITHMS: tuple[type[MetaLearner], ...] = (
    MAML,
    ANIL,
    MetaSGD,
    Reptile,
    IMAML,
    BMAML,
    ABML,
    HSML,
    Task2Vec,
    GradientPCA,
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

load = MetaLearner.load_from_checkpoint
"""A trained learner, of whatever algorithm, from its checkpoint alone."""

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
    "GradientPCA",
    "Learn2Learn",
    "MAMLPolicy",
    "MDPStrategy",
    "MatchingNet",
    "MetaGAN",
    "MetaGANRelation",
    "MetaLearner",
    "MetaSGD",
    "NearestNeighbour",
    "Network",
    "Pretrained",
    "ProtoNet",
    "ReinforcementLearner",
    "RelationNet",
    "Reptile",
    "ResNet",
    "Task2Vec",
    "UnitLength",
    "WeightGenerator",
    "load",
]
