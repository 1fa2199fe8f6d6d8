"""One file per algorithm; each class is found here by its paper's short name."""

import datamodules.core  # noqa: F401  (prepares torchvision and memory before torchmetrics is imported)
from models.baselines.baseline import Baseline
from models.baselines.gaussian_process import GaussianProcess
from models.baselines.nearest_neighbour import NearestNeighbour
from models.bayesian.abml import ABML
from models.bayesian.bmaml import BMAML
from models.bayesian.weight_generator import WeightGenerator
from models.conditioning.alfa import ALFA
from models.conditioning.caml import CAML
from models.conditioning.cnaps import CNAPs
from models.conditioning.conditioned import Conditioned
from models.conditioning.initialization import Attenuation, EmbeddingRows, Experts, LowRank
from models.conditioning.modulation import Modulation
from models.conditioning.optimization import Rates, UpdateRule
from models.conditioning.simple_cnaps import SimpleCNAPs
from models.conditioning.tadam import TADAM
from models.continual.alpaca import ALPaCA
from models.continual.anml import ANML
from models.continual.continual_maml import ContinualMAML
from models.continual.ewc import EWC
from models.continual.experience_replay import ExperienceReplay
from models.continual.fine_tune import FineTune
from models.continual.ftml import FTML
from models.continual.gem import AGEM, GEM
from models.continual.gemcl import GeMCL
from models.continual.lamaml import LaMAML
from models.continual.learner import ContinualLearner
from models.continual.mann import MANN
from models.continual.nearest_class_mean import NearestClassMean
from models.continual.oml import OML
from models.continual.online import Online
from models.continual.online_sgd import OnlineSGD
from models.continual.rare_events import RareEvents
from models.continual.task_memory import TaskMemory
from models.core.learner import MetaLearner
from models.core.pretrained import Pretrained, TrainedEmbedding
from models.generative.attentive_neural_process import ANP
from models.generative.conditional_neural_process import CNP
from models.generative.metagan import MetaGAN, MetaGANRelation
from models.generative.neural_process import NP
from models.generative.transformer_neural_process import TNP
from models.memory.snail import SNAIL
from models.metric.matching_net import MatchingNet
from models.metric.protonet import ProtoNet
from models.metric.relation_net import RelationNet
from models.networks.backbones import MLP, Conv2, Conv4, ConvNet, Learn2Learn, Network, ResNet
from models.networks.convolutional import ConvEncoder
from models.networks.wrappers import Averaged, Pixels, UnitLength
from models.optimization.anil import ANIL
from models.optimization.imaml import IMAML
from models.optimization.learned_optimizer import LearnedOptimizer
from models.optimization.leo import LEO
from models.optimization.maml import MAML
from models.optimization.meta_lstm import MetaLSTM
from models.optimization.meta_sgd import MetaSGD
from models.optimization.reptile import Reptile
from models.reinforcement.bandit_strategies import BanditStrategy
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.maml_policy import MAMLPolicy
from models.reinforcement.mdp_strategies import MDPStrategy
from models.reinforcement.pearl import PEARL
from models.reinforcement.rl2 import RL2
from models.reinforcement.varibad import VariBAD
from models.task_embedding.bigan import BiGAN
from models.task_embedding.cavia import CAVIA
from models.task_embedding.encoders import (
    ConstantEmbedding,
    GradientMeans,
    PrototypeMean,
    RecurrentEncoder,
    SetEncoder,
    TaskLabel,
)
from models.task_embedding.gradient_pca import GradientPCA
from models.task_embedding.hsml import HSML
from models.task_embedding.neural_statistician import NeuralStatistician
from models.task_embedding.probabilistic_task_model import ProbabilisticTaskModel
from models.task_embedding.task2vec import Task2Vec

ALGORITHMS: tuple[type[MetaLearner], ...] = (
    MAML,
    ANIL,
    MetaSGD,
    Reptile,
    IMAML,
    ALFA,
    MetaLSTM,
    LearnedOptimizer,
    BMAML,
    ABML,
    HSML,
    CAVIA,
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
    TADAM,
    CNAPs,
    SimpleCNAPs,
    CAML,
    CNP,
    NP,
    ANP,
    TNP,
    RL2,
    MAMLPolicy,
    PEARL,
    Conditioned,
    VariBAD,
    NeuralStatistician,
    ProbabilisticTaskModel,
    BiGAN,
    NearestClassMean,
    MANN,
    RareEvents,
    OML,
    ANML,
    GeMCL,
    ALPaCA,
    FineTune,
    FTML,
    ContinualMAML,
    TaskMemory,
)
# Learners without parameters, which are evaluated and not trained.
STRATEGIES: tuple[type[MetaLearner], ...] = (
    BanditStrategy,
    MDPStrategy,
    GaussianProcess,
    OnlineSGD,
    ExperienceReplay,
    EWC,
    GEM,
    AGEM,
    LaMAML,
)

load = MetaLearner.load_from_checkpoint
"""A trained learner, of whatever algorithm, from its checkpoint alone."""

__all__ = [
    "ABML",
    "AGEM",
    "ALFA",
    "ALGORITHMS",
    "ANIL",
    "ANML",
    "ANP",
    "BMAML",
    "CAML",
    "CAVIA",
    "CNP",
    "EWC",
    "FTML",
    "GEM",
    "HSML",
    "IMAML",
    "LEO",
    "MAML",
    "MANN",
    "MLP",
    "NP",
    "OML",
    "PEARL",
    "RL2",
    "SNAIL",
    "STRATEGIES",
    "TADAM",
    "TNP",
    "ALPaCA",
    "Attenuation",
    "Averaged",
    "BanditStrategy",
    "Baseline",
    "BiGAN",
    "CNAPs",
    "Conditioned",
    "ConstantEmbedding",
    "ContinualLearner",
    "ContinualMAML",
    "Conv2",
    "Conv4",
    "ConvEncoder",
    "ConvNet",
    "EmbeddingRows",
    "ExperienceReplay",
    "Experts",
    "FineTune",
    "GaussianProcess",
    "GeMCL",
    "GradientMeans",
    "GradientPCA",
    "LaMAML",
    "Learn2Learn",
    "LearnedOptimizer",
    "LowRank",
    "MAMLPolicy",
    "MDPStrategy",
    "MatchingNet",
    "MetaGAN",
    "MetaGANRelation",
    "MetaLSTM",
    "MetaLearner",
    "MetaSGD",
    "Modulation",
    "NearestClassMean",
    "NearestNeighbour",
    "Network",
    "NeuralStatistician",
    "Online",
    "OnlineSGD",
    "Pixels",
    "Pretrained",
    "ProbabilisticTaskModel",
    "ProtoNet",
    "PrototypeMean",
    "RareEvents",
    "Rates",
    "RecurrentEncoder",
    "ReinforcementLearner",
    "RelationNet",
    "Reptile",
    "ResNet",
    "SetEncoder",
    "SimpleCNAPs",
    "Task2Vec",
    "TaskLabel",
    "TaskMemory",
    "TrainedEmbedding",
    "UnitLength",
    "UpdateRule",
    "VariBAD",
    "WeightGenerator",
    "load",
]
