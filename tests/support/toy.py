"""A small classification problem that is made in memory, and one command line to train on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from datamodules.core.base import EpisodicDataModule
from datamodules.images.tasks import ImageClasses, ImageDataModule
from models.core.learner import MetaLearner
from models.core.task_kinds import KINDS

FIRST = {"train": 0, "val": 100, "test": 200}


class ToyImages(ImageDataModule):
    """Twelve classes of noisy 16×16 patterns in each split."""

    def classes(self, split: str) -> ImageClasses:
        rng = np.random.default_rng(FIRST[split])
        patterns = rng.uniform(0, 255, (12, 1, 1, 4, 4)).repeat(4, -1).repeat(4, -2)
        images = np.clip(patterns + rng.normal(0, 60, (12, 20, 1, 16, 16)), 0, 255).astype(np.uint8)
        names = [f"{split}{k}" for k in range(12)]
        return ImageClasses(torch.from_numpy(images.reshape(-1, 1, 16, 16)), np.full(12, 20), names, names)

    def to_store(self, image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.convert("L").resize((16, 16))))[None]


class ToyAlphabets(ToyImages):
    """The same in three groups of four classes."""

    def classes(self, split: str) -> ImageClasses:
        classes = super().classes(split)
        return ImageClasses(classes.images, classes.counts, classes.names, [f"{split}{k // 4}" for k in range(12)])


BACKBONE = ["--model.backbone", "models.Conv4", "--model.backbone.hidden", "8", "--model.backbone.image_size", "16"]
DATA = [
    "--data",
    "tests.support.toy.ToyImages",
    "--data.ways",
    "3",
    "--data.queries",
    "2",
    "--data.meta_batch_size",
    "4",
]
SIZES = ["--data.val_tasks", "8", "--data.test_tasks", "12", "--data.eval_batch_size", "4"]
QUIET = ["--wandb", "off", "--pictures", "false", "--keep_precision", "true"]  # drawing takes longer than training
TRAINER = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", *QUIET]


def under(part: str, flags: list[str]) -> list[str]:
    """The flags of a learner for one that is a part of another."""
    return [flag.replace("--model.", f"--model.{part}.") for flag in flags]


MAML = ["--model", "models.MAML", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "2"]
ALGORITHMS = {
    "MAML": MAML,
    "FOMAML": [*MAML, "--model.first_order", "true"],
    "MAML++": [
        *MAML,
        *("--model.learned_rates", "true", "--model.per_step_norm", "true"),
        *("--model.multi_step_updates", "4", "--model.first_order_updates", "2"),
    ],
    "ANIL": ["--model", "models.ANIL", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "2"],
    "MetaSGD": ["--model", "models.MetaSGD", *BACKBONE, "--model.outputs", "3"],
    "Reptile": [
        *("--model", "models.Reptile", *BACKBONE, "--model.outputs", "3", "--model.eval_inner_steps", "4"),
        # Adam's first steps are signs of gradients, of rounding errors too where those are zero.
        *("--model.inner_optimizer", "sgd", "--model.inner_rate", "0.1"),
    ],
    "BMAML": [  # in a loop over tasks: a convolution mapped over on a CPU passes autocast by
        *("--model", "models.BMAML", *BACKBONE, "--model.outputs", "3"),
        *("--model.particles", "4", "--model.follow_steps", "2", "--model.chunk", "1"),
    ],
    "IMAML": ["--model", "models.IMAML", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "2"],
    "ABML": ["--model", "models.ABML", *BACKBONE, "--model.outputs", "3", "--model.kl_weight", "0.001"],
    "HSML": [
        *("--model", "models.HSML", *BACKBONE, "--model.outputs", "3", "--model.inner_rate", "0.01"),
        *("--model.inner_steps", "2", "--model.features", "8", "--model.hidden", "6"),
    ],
    "ALFA": [
        *("--model", "models.ALFA", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "2"),
        *("--model.inner_rate", "0.1", "--model.code_size", "2"),
    ],
    "MetaLSTM": [
        *("--model", "models.MetaLSTM", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "3"),
        *("--model.hidden", "4"),
    ],
    "LearnedOptimizer": [
        *("--model", "models.LearnedOptimizer", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "4"),
        *("--model.window", "2", "--model.eval_inner_steps", "6", "--model.scale", "0.1"),
    ],
    "LearnedOptimizerPES": [
        *("--model", "models.LearnedOptimizer", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "4"),
        *("--model.window", "2", "--model.eval_inner_steps", "6", "--model.scale", "0.01"),
        *("--model.estimator", "pes"),
    ],
    "CAVIA": [
        *("--model", "models.CAVIA", *BACKBONE, "--model.backbone.downsample", "pool", "--model.outputs", "3"),
        *("--model.conditioning", "film", "--model.context_size", "6", "--model.inner_steps", "2"),
    ],
    "Task2Vec": ["--model", "models.Task2Vec", *BACKBONE, "--model.iterations", "50"],
    "GradientPCA": [
        *("--model", "models.GradientPCA", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "2"),
        *(
            "--model.components",
            "4",
            "--model.records",
            "16",
            "--model.projected",
            "64",
            "--model.first_order",
            "false",
        ),
    ],
    "ProtoNet": ["--model", "models.ProtoNet", *BACKBONE],
    "Baseline": [
        *("--model", "models.Baseline", *BACKBONE, "--model.classes", "12"),
        *("--model.passes", "5", "--model.batch", "64", "--model.rate", "0.1"),
    ],
    "NearestNeighbour": ["--model", "models.NearestNeighbour"],
    "LEO": ["--model", "models.LEO", *BACKBONE, "--model.latents", "6", "--model.chunk", "1"],
    "WeightGenerator": [
        *("--model", "models.WeightGenerator", *BACKBONE, "--model.chunk", "1"),
        *("--model.latents", "6", "--model.hidden", "8"),
    ],
    "MatchingNet": ["--model", "models.MatchingNet", *BACKBONE],
    "RelationNet": [
        *("--model", "models.RelationNet", *BACKBONE, "--model.filters", "8"),
        *("--model.backbone.downsample", "pool", "--model.backbone.halvings", "2"),
    ],
    "MetaGAN": [
        *("--model", "models.MetaGAN", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "2"),
        *("--model.gan.hidden", "4", "--model.gan.latents", "6", "--model.gan.noise", "5"),
    ],
    "MetaGANRelation": [
        *("--model", "models.MetaGANRelation", *BACKBONE, "--model.filters", "8"),
        *("--model.backbone.downsample", "pool", "--model.backbone.halvings", "2"),
        *("--model.gan.hidden", "4", "--model.gan.latents", "6", "--model.gan.noise", "5"),
    ],
    "TADAM": ["--model", "models.TADAM", *BACKBONE, "--model.classes", "12"],
    "CNAPs": ["--model", "models.CNAPs", *BACKBONE, "--model.code", "6"],
    "SimpleCNAPs": ["--model", "models.SimpleCNAPs", *BACKBONE, "--model.code", "6"],
    "CAML": [
        *("--model", "models.CAML", *BACKBONE, "--model.max_ways", "4", "--model.code_size", "8"),
        *("--model.layers", "2", "--model.heads", "2", "--model.dense", "12"),
    ],
    "SNAIL": [
        *("--model", "models.SNAIL", *BACKBONE, "--model.labels", "4", "--model.filters", "8"),
        *("--model.attention", "[[8, 4], [8, 4], [8, 4]]", "--data.max_train_shots", "3"),
    ],
    "Conditioned": [
        *("--model", "models.Conditioned", "--model.learner", "models.MAML", *under("learner", MAML[2:])),
        *("--model.embedding", "models.SetEncoder", *under("embedding", BACKBONE), "--model.embedding.size", "6"),
        *("--model.conditioning", "models.Modulation"),
    ],
    "NeuralStatistician": [
        *("--model", "models.NeuralStatistician", "--model.backbone", "models.ConvEncoder"),
        *("--model.backbone.widths", "[6, 8]", "--model.backbone.convs", "1", "--model.backbone.image_size", "16"),
        *("--model.context", "6", "--model.latents", "3", "--model.hidden", "8", "--model.layers", "2"),
        *("--model.widths", "[6, 8]", "--model.convs", "2"),
        # As published; the loss is a sum over pixels.
        *("--trainer.gradient_clip_val", "0.5", "--trainer.gradient_clip_algorithm", "value"),
    ],
    "ProbabilisticTaskModel": [
        *("--model", "models.ProbabilisticTaskModel", *BACKBONE, "--model.latents", "4", "--model.themes", "3"),
        *("--model.widths", "[4, 6]", "--model.theme_rate", "0.01"),
    ],
    "BiGAN": [
        *("--model", "models.BiGAN", *BACKBONE, "--model.codes", "4", "--model.noise", "2", "--model.hidden", "8"),
        *("--model.widths", "[4, 6]"),
    ],
}
SINUSOIDS = [
    *("--data", "datamodules.Sinusoid", "--data.shots", "4", "--data.queries", "5", "--data.train_queries", "5"),
    *("--data.meta_batch_size", "4"),
]
PROCESS = ["--model.hidden", "8", "--model.encoder_layers", "3"]
# Learners of functions alone, each with its data.
REGRESSORS = {
    "CNP": ["--model", "models.CNP", *PROCESS, *SINUSOIDS],
    "NP": ["--model", "models.NP", *PROCESS, "--model.latents", "6", "--model.eval_samples", "7", *SINUSOIDS],
    "ANP": [
        *("--model", "models.ANP", *PROCESS, "--model.latents", "6", "--model.eval_samples", "7"),
        *("--model.heads", "2", *SINUSOIDS),
    ],
    "TNP": [
        *("--model", "models.TNP", "--model.size", "8", "--model.depth", "2", "--model.heads", "2"),
        *("--model.feedforward", "8", *SINUSOIDS),
    ],
}
BANDITS = ["--data", "datamodules.Bandits", "--data.arms", "3", "--data.episodes", "4", "--data.meta_batch_size", "8"]
CHAINS = [
    *("--data", "datamodules.TabularMDPs", "--data.states", "3", "--data.actions", "2", "--data.horizon", "3"),
    *("--data.episodes", "2", "--data.meta_batch_size", "8"),
]
MAML_POLICY = [
    *("--model", "models.MAMLPolicy", "--model.observations", "3", "--model.actions", "2", "--model.hidden", "[6]"),
    *("--model.rollouts", "4", "--model.sampling_correction", "true", "--model.discounted_steps", "true", *CHAINS),
]
# Learners of reinforcement learning, each with its environments.
AGENTS = {
    "RL2": [
        *("--model", "models.RL2", "--model.observations", "0", "--model.actions", "3", "--model.hidden", "6"),
        *("--model.epochs", "2", "--model.minibatches", "2", *BANDITS),
    ],
    "MAMLPolicy": [*MAML_POLICY, "--model.epochs", "2"],
    "MAMLPolicyTRPO": [*MAML_POLICY, "--model.outer", "trpo"],
    "PEARL": [
        *("--model", "models.PEARL", "--model.observations", "2", "--model.actions", "2", "--model.latents", "3"),
        *("--model.hidden", "8", "--model.encoder_hidden", "8", "--model.transitions", "6", "--model.context", "5"),
        *("--model.reward_scale", "1", "--model.discount", "0.9", "--model.steps_per_iteration", "5"),
        *("--model.tasks_per_collection", "2", "--model.initial_episodes", "2", "--model.posterior_episodes", "1"),
        *("--data", "datamodules.PointRobot", "--data.horizon", "4", "--data.episodes", "3"),
        *("--data.train_tasks", "5", "--data.meta_batch_size", "4"),
    ],
    "VariBAD": [
        *("--model", "models.VariBAD", "--model.observations", "2", "--model.actions", "2"),
        *("--model.discrete", "false", "--model.embedding", "5", "--model.minibatches", "2"),
        *("--model.latents", "3", "--model.encoder_hidden", "6", "--model.embeddings", "[4, 3, 2]"),
        *("--model.decoder_hidden", "[6, 5]", "--model.state_weight", "0.5", "--model.hidden", "[8, 7]"),
        *("--model.vae_batch", "5", "--model.vae_updates", "2", "--model.buffer", "10"),
        *("--model.elbo_terms", "7", "--model.decoded_steps", "6"),
        *("--data", "datamodules.PointRobot", "--data.horizon", "4", "--data.episodes", "2"),
        *("--data.meta_batch_size", "4"),
    ],
}
# Learners on streams of the toy images' classes.
STREAMS = [
    *("--data", "datamodules.ClassStreams", "--data.source", "tests.support.toy.ToyImages", "--data.experiences", "4"),
    *("--data.shots", "2", "--data.queries", "2", "--data.train_experiences", "3", "--data.meta_batch_size", "4"),
]
INSTANCES = [
    *("--data", "datamodules.InstanceStreams", "--data.source", "tests.support.toy.ToyImages", "--data.ways", "3"),
    *("--data.instances", "3", "--data.meta_batch_size", "4"),
]
REMEMBERING = [*STREAMS, "--data.remember", "3", "--data.remember_from", "others"]
CONV_NET = [
    *("--model.backbone", "models.ConvNet", "--model.backbone.hidden", "6", "--model.backbone.image_size", "16"),
    *("--model.backbone.strides", "[2, 2, 2]"),
]
RATES = ["--model.eval_rates", "[0.001, 0.01]"]
OSAKA_DOMAINS = """
{toy: {source: {class_path: tests.support.toy.ToyImages}},
 negative: {source: {class_path: tests.support.toy.ToyImages}, invert: true}}
"""
# Tasks of the toy images that change without a word, at times to their negatives.
CHANGING = [
    *("--data", "datamodules.OsakaStreams", "--data.domains", OSAKA_DOMAINS, "--data.trained", "toy"),
    *("--data.stay", "0.5", "--data.ways", "3"),
    *("--data.shots", "2", "--data.queries", "2", "--data.experiences", "5", "--data.train_experiences", "1"),
    *("--data.meta_batch_size", "4"),
]
RETURNING = [
    *("--data", "datamodules.ReturningStreams", "--data.source", "tests.support.toy.ToyAlphabets"),
    *("--data.groups", "2", "--data.ways", "2", "--data.experiences", "4", "--data.queries", "2"),
]
CONTINUAL = {
    "NearestClassMean": ["--model", "models.NearestClassMean", *BACKBONE, *STREAMS],
    "MANN": [
        *("--model", "models.MANN", "--model.backbone", "models.Pixels", "--model.backbone.size", "4"),
        *("--model.backbone.image_size", "16", "--model.slots", "7", "--model.width", "5", "--model.heads", "2"),
        *("--model.hidden", "16", "--model.ways", "3", *INSTANCES),
    ],
    "RareEvents": [
        *("--model", "models.RareEvents", *BACKBONE, "--model.size", "6", "--model.slots", "8", *INSTANCES),
    ],
    "OML": ["--model", "models.OML", *CONV_NET, *RATES, *REMEMBERING],
    "ANML": [
        *("--model", "models.ANML", *CONV_NET, *RATES, "--model.modulator", "models.ConvNet"),
        *("--model.modulator.hidden", "4", "--model.modulator.image_size", "16", "--model.modulator.pooled", "2"),
        *("--model.modulator.strides", "[2, 1]", "--model.modulator.instance_norm", "true"),
        *(*REMEMBERING, "--data.remember_from", "all", "--data.train_experiences", "1", "--data.train_queries", "0"),
    ],
    "GeMCL": ["--model", "models.GeMCL", *BACKBONE, *STREAMS],
    "ALPaCA": [  # in a loop over streams: a convolution mapped over on a CPU passes autocast by
        *("--model", "models.ALPaCA", *BACKBONE, "--model.chunk", "1", *STREAMS, "--data.own_labels", "false"),
    ],
    "TaskMemory": [
        *("--model", "models.TaskMemory", *BACKBONE, "--model.keep", "6", "--model.retrieve", "3"),
        *("--model.steps", "2", *RETURNING, "--data.meta_batch_size", "4"),
    ],
    "FineTune": ["--model", "models.FineTune", *CONV_NET, *RATES, "--model.eval_adapts", "network", *STREAMS],
    "ContinualMAML": [
        *("--model", "models.ContinualMAML", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "2"),
        *("--model.threshold", "0.1", "--model.outer_rate", "0.01", "--model.learned_rates", "true", *CHANGING),
        *("--model.outer", "sgd"),  # see Reptile
    ],
}
# The toy images turned: learners that have nothing to train before a stream.
TURNED = [
    *("--data", "datamodules.TransformedStreams", "--data.source", "tests.support.toy.ToyImages"),
    *("--data.experiences", "3", "--data.shots", "8", "--data.queries", "4", "--data.classes", "3"),
]
ONLINE = [
    *("--model.backbone", "models.MLP", "--model.backbone.in_features", "256", "--model.backbone.hidden", "[6]"),
    *("--model.batch", "4", *TURNED),
]
# Learners along a sequence of tasks, of the toy images in colours.
SEQUENCES = {
    "FTML": [
        *("--model", "models.FTML", *BACKBONE, "--model.outputs", "3", "--model.inner_steps", "2"),
        *("--data", "datamodules.RainbowImages", "--data.source", "tests.support.toy.ToyImages", "--data.ways", "3"),
        *("--data.held_out", "2", "--data.arrival_steps", "2", "--data.task_steps", "5"),
        *("--data.meta_batch_size", "4"),
    ],
}
LEARNERS = ALGORITHMS | REGRESSORS | AGENTS | CONTINUAL | SEQUENCES
# What has nothing to train.
STRATEGIES = {
    "BanditStrategy": [
        *("--model", "models.BanditStrategy", "--model.actions", "3", "--model.strategy", "thompson", *BANDITS),
    ],
    "MDPStrategy": [
        *("--model", "models.MDPStrategy", "--model.observations", "4", "--model.actions", "3"),
        *("--model.strategy", "psrl", "--data", "datamodules.TabularMDPs", "--data.states", "4", "--data.actions", "3"),
        *("--data.horizon", "3", "--data.episodes", "4"),
    ],
    "GaussianProcess": ["--model", "models.GaussianProcess", "--data", "datamodules.GaussianProcesses"],
    "OnlineSGD": ["--model", "models.OnlineSGD", *ONLINE],
    "ExperienceReplay": ["--model", "models.ExperienceReplay", "--model.memory", "6", "--model.replay", "3", *ONLINE],
    "EWC": ["--model", "models.EWC", "--model.fisher_examples", "3", *ONLINE],
    "GEM": ["--model", "models.GEM", "--model.experiences", "3", "--model.memory", "2", *ONLINE],
    "AGEM": [
        *("--model", "models.AGEM", "--model.experiences", "3", "--model.memory", "2", "--model.replay", "3", *ONLINE),
    ],
    "LaMAML": [
        *("--model", "models.LaMAML", "--model.memory", "6", "--model.replay", "3", "--model.glances", "1", *ONLINE),
    ],
}
# For comparisons of runs that draw differently: flags that make what a learner draws at random vanish, and statistics
# other than a first step's running ones, by which all classes may tie.
NOISELESS = {
    "ABML": [
        *("--model.deviation", "1e-12", "--model.kl_weight", "0", "--model.inner_kl_weight", "0"),
        *("--model.hyperprior_weight", "0"),
    ],
    "LEO": ["--model.stochastic", "false", "--model.dropout", "0"],
    "BiGAN": ["--model.stochastic", "false"],
    "NeuralStatistician": ["--model.stochastic", "false"],
    "ProbabilisticTaskModel": ["--model.stochastic", "false"],
    "LearnedOptimizer": ["--model.random_start", "false"],
    # What estimates a gradient by noise is compared by the gradient.
    "LearnedOptimizerPES": ["--model.random_start", "false", "--model.estimator", "gradient"],
    "RL2": ["--model.minibatches", "1"],
    "VariBAD": ["--model.minibatches", "1"],
    # Along flat directions conjugate gradients make rounding errors grow.
    "MAMLPolicyTRPO": ["--model.damping", "0.1"],
    "MetaGAN": ["--model.gan.stochastic", "false"],
    "MetaGANRelation": ["--model.gan.stochastic", "false"],
    "NP": ["--model.stochastic", "false"],
    "ANP": ["--model.stochastic", "false"],
    "WeightGenerator": ["--model.stochastic", "false", "--model.batch_norm", "transductive"],
}


def command(algorithm: str, runs: Path, *flags: str, steps: int = 12) -> list[str]:
    """Arguments of train.py: so many meta-updates on toy tasks, validated twice."""
    return [
        *(DATA if algorithm in ALGORITHMS else []),
        *LEARNERS[algorithm],
        *SIZES,
        *TRAINER,
        *("--runs", str(runs), "--name", algorithm.lower()),
        *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", "6", "--checkpoint_every", "2"),
        *flags,
    ]


def evaluation(strategy: str, runs: Path, *flags: str) -> list[str]:
    """Arguments of train.py: a test of what has nothing to train."""
    place = ("--runs", str(runs), "--name", strategy.lower(), "--stage", "test")
    return [*STRATEGIES[strategy], *SIZES, *TRAINER, *place, *flags]


def headline(algorithm: str) -> str:
    """The metric that a learner's checkpoints are chosen by."""
    kinds = {"classification": ALGORITHMS | SEQUENCES, "regression": REGRESSORS}
    kinds |= {"reinforcement": AGENTS, "stream": CONTINUAL}
    return next(KINDS[kind].headline for kind, learners in kinds.items() if algorithm in learners)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The state_dict of a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def train_for(learner: MetaLearner, data: EpisodicDataModule, steps: int, **settings: Any) -> MetaLearner:
    """Meta-train, and leave nothing behind."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        **dict.fromkeys((*quiet, "use_distributed_sampler"), False),
        **{"max_steps": steps, "accelerator": "cpu", "limit_val_batches": 0, "max_epochs": -1} | settings,
    )
    trainer.fit(learner, datamodule=data)
    return learner
