"""The command line: builds learner, data and trainer from a configuration, and runs them."""

from __future__ import annotations

import inspect
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt
from pytorch_lightning.callbacks import ProgressBar, StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from app.cli.base_configs import config_files, with_bases
from app.cli.failures import configuration, flat, one_line_errors, refusal, refuse_nulls
from app.cli.precision import instead_of
from app.cli.suggestions import Parser, command_line
from app.dashboard.callback import Dashboard
from app.dashboard.wandb import WandbRun, wandb_logger
from app.runs.checkpoints import BestCheckpoint, LastCheckpoint, saved_at
from app.runs.claim import count, release, shared_with_children
from app.runs.directory import RESULTS, choose_run, config_file
from app.runs.leaks import KEY, as_tensor, of_parts, refuse_leaks, trained_classes
from app.runs.metrics_csv import MetricsCSV
from app.runs.progress import TaskProgress
from app.runs.recorder import Recorder
from app.runs.results import print_results, results, write_results
from app.runs.resume import cosine_shorter_than, reconcile
from app.runs.stopwatch import Stopwatch
from datamodules.core.base import NETWORK_SETTINGS, EpisodicDataModule
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from datamodules.core.metric import Metric
from models.core.checkpoint_io import CHECKPOINTS, AtomicCheckpointIO, load_checkpoint
from models.core.learner import MetaLearner
from models.core.metrics import as_results
from models.core.pretrained import load_pretrained
from models.core.shapes import fits_task
from models.core.task_kinds import KINDS

Stage = Literal["fit", "validate", "test"]


# Lightning still calls what jsonargparse has deprecated; nothing that a user here could change.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


class MetaboltCLI(LightningCLI):
    """Builds learner, data and trainer from configuration files and flags; runs nothing by itself.

    Args:
        args: of the command line; None for those of the process.
        runs: whether a run follows, which takes its directory; otherwise nothing is created.
        **kwargs: of LightningCLI.
    """

    prog: ClassVar[str] = "train.py"
    description: ClassVar[str] = "Train, validate or test a meta-learner."

    def __init__(self, args: Sequence[str] | None = None, runs: bool = False, **kwargs: Any) -> None:
        self.takes_folder = runs
        args = sys.argv[1:] if args is None else args
        self.config_files = config_files(args)
        super().__init__(
            MetaLearner,
            EpisodicDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": self.prog, "description": self.description, "allow_abbrev": False},
            trainer_defaults={
                "use_distributed_sampler": False,
                "check_val_every_n_epoch": None,
                "val_check_interval": 500,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 50,
                "enable_model_summary": False,
                "max_epochs": -1,
            },
            args=with_bases(args),
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="The run's name; it lives in <runs>/<name>/.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument("--stage", type=Stage, default="fit", help="fit ends by testing the best checkpoint.")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="last (safe when there is none), best, or a file."
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="Meta-updates between saves of last.ckpt."
        )
        parser.add_argument(
            "--wandb",
            type=Literal["auto", "online", "offline", "off"],
            default="auto",
            help="Weights & Biases; auto is online with an API key and offline without.",
        )
        parser.add_argument("--project", type=str, default="metabolt", help="Weights & Biases project.")
        parser.add_argument(
            "--keep_precision",
            type=bool,
            default=False,
            help="Compute in bfloat16 also where the processor only emulates it.",
        )
        parser.add_argument(
            "--allow_overlap",
            type=bool,
            default=False,
            help="Validate and test also on classes that the learner, or its backbone, was trained on.",
        )
        parser.add_argument(
            "--open_set_tasks",
            type=NonNegativeInt,
            default=600,
            help="Test tasks that are also asked about queries of classes that they do not have; 0 for none.",
        )
        parser.add_argument(
            "--select",
            type=str | None,
            default=None,
            help="Metric of meta-validation that best.ckpt is chosen by; null for the algorithm's own.",
        )
        parser.add_argument(
            "--pictures", type=bool, default=True, help="Draw at validations and after the test; false for sweeps."
        )
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error, too.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command_line.set(args)
        self.config = parser.parse_args(args)  # without Lightning's warning where a caller gives the arguments
        configuration.set(self.config)
        refuse_nulls(self.config)

    def setting(self, name: str) -> Any:
        return self._get(self.config_init, name)

    @property
    def learns(self) -> bool:
        """Whether there are parameters, be they frozen."""
        return any(True for _ in self.model.parameters())

    def yaml(self) -> str:
        """The complete configuration, which runs again as it is."""
        self._dump_config()  # once: every further one would take as long as building the learner
        left_out = {"config", "ckpt_path", "debug", *(["stage"] if self.learns else [])}
        kept = {key: value for key, value in self.config_dump.items() if key not in left_out}
        header = "".join(f"# {line}\n" for line in self.parser.dump_header or ())
        return header + yaml.safe_dump(kept, default_flow_style=False, allow_unicode=True, sort_keys=False)

    def take_from_data(self) -> None:
        """Fill in what is None in the model's settings and the data knows, see EpisodicDataModule.network_settings."""
        unknown = [
            key
            for key, value in flat(self._get(self.config, "model"))
            if value is None and key.rpartition(".")[2] in NETWORK_SETTINGS
        ]
        if not unknown:
            return
        parser = ArgumentParser()
        parser.add_subclass_arguments(EpisodicDataModule, "data")
        settings = parser.parse_object({"data": self._get(self.config, "data").as_dict()})
        data = parser.instantiate_classes(settings).data
        known = data.network_settings()
        data.teardown("fit")
        for key in unknown:
            name = key.rpartition(".")[2]
            if name in known:
                self.config[f"model.{key}"] = known[name]

    def instantiate_classes(self) -> None:
        try:
            self.take_from_data()
            super().instantiate_classes()
        except Exception as error:
            if (refused := refusal(error, self.config)) is error:
                raise
            raise refused from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        learner, data = self.model, self.datamodule
        if data.kind not in learner.tasks:
            raise ConfigError(
                f"{type(learner).__name__} learns {' or '.join(sorted(learner.tasks))}, but {type(data).__name__} "
                f"gives {data.kind}: choose another algorithm or another task distribution"
            )
        stage = self.setting("stage")
        self.run_dir, self.ckpt_path = self.choose_folder(stage)
        selecting, metric = self.selecting_metric()
        trainer_settings = self._get(self.config_init, "trainer")
        devices, most = str(trainer_settings.get("devices")), 1024
        if devices.isdecimal() and int(devices) > most:  # Lightning makes a list of them first
            raise ConfigError(f"trainer.devices is {devices}, but a machine has no more than {most}: give fewer")
        own: list[pl.Callback] = [RunFiles(self)]
        self.stopwatch = Stopwatch()
        refuse_ignored(trainer_settings)
        given = as_list(trainer_settings.get("callbacks"))
        own_bar = any(isinstance(callback, ProgressBar) for callback in given)
        if trainer_settings.get("enable_progress_bar") is not False and not own_bar:
            own.append(TaskProgress(selecting, metric))
        if stage == "fit" and not trainer_settings.get("fast_dev_run"):
            folder = self.run_dir / CHECKPOINTS
            own.append(self.stopwatch)
            if trainer_settings.get("limit_val_batches") != 0 and data.selects:
                own.append(BestCheckpoint(folder, f"val/{selecting}", metric.better))
            # After all others: what it saves has the state that a validation left them in.
            own.append(LastCheckpoint(folder, self.setting("checkpoint_every")))
        plugins = as_list(trainer_settings.get("plugins"))
        loggers: list[Any] = [] if trainer_settings.get("fast_dev_run") else self.loggers(own)
        logger = trainer_settings.get("logger")
        if logger is False:
            loggers = []
        elif logger not in (None, True):  # beside ours
            loggers += logger if isinstance(logger, list) else [logger]
        precision = None if self.setting("keep_precision") else instead_of(trainer_settings)
        if precision is not None:
            kwargs["precision"] = precision
            rank_zero_info(
                f"this processor emulates bfloat16, some ten times as slowly: computing in {precision} in place of "
                f"{trainer_settings['precision']} (--keep_precision true keeps it)"
            )
        trainer = super().instantiate_trainer(
            **kwargs,
            callbacks=[*given, *own],
            logger=loggers or False,
            default_root_dir=str(self.run_dir),
            plugins=[*plugins, AtomicCheckpointIO()],
        )
        self._check(trainer)
        return trainer

    def selecting_metric(self) -> tuple[str, Metric]:
        """What meta-validation chooses the best checkpoint by, and progress shows.

        Raises:
            ConfigError: it is none that is measured, or none is better.
        """
        learner, data = self.model, self.datamodule
        declared = {m.pooled or name: m for name, m in (learner.declared_metrics() | data.own_metrics).items()}
        fit = sorted(name for name, m in declared.items() if m.better != "neither" and not m.curve)
        name = self.setting("select") or learner.selects_by or KINDS[data.kind].headline
        if name not in fit:
            raise ConfigError(f"--select is {name!r} but validation can choose by one of {', '.join(fit)}")
        return name, declared[name]

    def choose_folder(self, stage: str) -> tuple[Path, Path | None]:
        """The run directory, and the checkpoint that the run starts from."""
        take = self.takes_folder and not self._get(self.config_init, "trainer").get("fast_dev_run")
        name, ckpt_path = self.setting("name"), self.setting("ckpt_path")
        return choose_run(Path(self.setting("runs")), name, ckpt_path, stage, take, self.config_files)

    def loggers(self, callbacks: list[pl.Callback]) -> list[Any]:
        """Where metrics are logged; loggers may add callbacks."""
        return [MetricsCSV(self.run_dir), *self.dashboards(callbacks)]

    def dashboards(self, callbacks: list[pl.Callback]) -> list[Any]:
        """Loggers beyond the CSV file, and the callback that draws for them and for the run directory."""
        recorder = Recorder(self.run_dir, self.setting("open_set_tasks"))  # before what draws from it
        callbacks += [recorder, Dashboard(self.run_dir, recorder, pictures=self.setting("pictures"))]
        config = yaml.safe_load(self.yaml())
        logger = wandb_logger(self.setting("wandb"), self.setting("project"), self.run_dir.name, self.run_dir, config)
        return [] if logger is None else [logger]

    def _check(self, trainer: pl.Trainer) -> None:
        """Refuse impossible combinations before any work."""
        if (problem := self.model.check(self.datamodule)) is not None:
            raise ConfigError(problem)
        trainer_settings = self._get(self.config_init, "trainer")
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ConfigError(
                f"what is measured would be lost with the processes of --trainer.strategy "
                f"{trainer_settings.get('strategy')}: give ddp"
            )
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
            raise ConfigError(
                "StochasticWeightAveraging averages over epochs, and a run is one stream of tasks: give "
                "EMAWeightAveraging, or WeightAveraging"
            )
        own = trainer_settings.get("gradient_clip_val") or (trainer_settings.get("accumulate_grad_batches") or 1) > 1
        if own and not self.model.automatic_optimization:
            raise ConfigError(
                f"{type(self.model).__name__} takes several steps of its own in a meta-update: leave out "
                f"--trainer.gradient_clip_val and accumulate_grad_batches{clip_instead(self.model)}"
            )
        if str(trainer_settings.get("precision")) in ("16", "16-mixed") and not self.model.automatic_optimization:
            raise ConfigError(
                f"{type(self.model).__name__} takes several steps of its own in a meta-update, which the scaling of "
                "gradients in half precision does not reach: give --trainer.precision bf16-mixed"
            )
        tasks, size = self.datamodule.test_tasks, self.datamodule.eval_batch_size
        limit = trainer.limit_test_batches
        if self.setting("stage") != "validate" and int(limit if limit > 1 else -(-tasks // size) * limit) < 1:
            raise ConfigError(
                f"trainer.limit_test_batches is {limit}, which leaves no task for the meta-test that a run ends with: "
                "leave it out, and give --data.init_args.test_tasks"
            )
        if self.setting("stage") == "fit":
            if not self.learns:
                raise ConfigError(f"{type(self.model).__name__} has nothing to train: evaluate it, with --stage test")
            if trainer.max_steps < 0:
                raise ConfigError(
                    "the stream of tasks has no end: give --trainer.max_steps, the number of meta-updates"
                )
            outputs, ways = getattr(self.model, "outputs", None), getattr(self.datamodule, "train_ways", None)
            if outputs and ways and outputs != ways:
                raise ConfigError(
                    f"the model's head has {outputs} outputs but training tasks have {ways} ways: "
                    f"give --model.init_args.outputs {ways}"
                )
        if (steps := trainer.log_every_n_steps) < 1:
            raise ConfigError(f"trainer.log_every_n_steps is {steps} but must be at least 1: leave it out for 50")
        # By the clock ("00:01:00:00") there is no such number.
        every, accumulate = getattr(trainer, "val_check_interval", None), trainer.accumulate_grad_batches
        if isinstance(every, int) and every % accumulate:
            raise ConfigError(
                f"validation every {every} meta-batches would fall within an accumulation of {accumulate}: make "
                f"--trainer.val_check_interval a multiple of {accumulate}"
            )

    def set_threads(self) -> None:
        """Share the cores among the processes of this machine; each alone would take them all."""
        started = "LOCAL_WORLD_SIZE" in os.environ
        here = count(os.environ, "LOCAL_WORLD_SIZE") if started else self.trainer.num_devices
        if self.trainer.strategy.root_device.type == "cpu" and here > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))


def refuse_ignored(trainer: Any) -> None:
    """Refuse what a Trainer takes but a run would not heed.

    Raises:
        ConfigError: naming what to give instead.
    """
    if trainer.get("default_root_dir") is not None:
        raise ConfigError("a run lives in <runs>/<name>/: give these in place of --trainer.default_root_dir")
    if trainer.get("overfit_batches"):
        raise ConfigError(
            "every meta-batch has tasks of its own: to overfit few, give --data.init_args.train_tasks, where the data "
            "has it, in place of --trainer.overfit_batches"
        )


def as_list(given: Any) -> list[Any]:
    """What a setting of the Trainer holds that takes several, one or none."""
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def clip_instead(learner: MetaLearner) -> str:
    """How a learner that steps by itself clips gradients, as the end of a sentence; nothing where it does not."""
    own = "max_grad_norm" in inspect.signature(type(learner).__init__).parameters
    return ", and clip by --model.init_args.max_grad_norm" if own else ""


class RunFiles(pl.Callback):
    """Leaves the configuration in the run directory and in every checkpoint; results after a test."""

    def __init__(self, cli: MetaboltCLI) -> None:
        self.cli = cli
        self.config = cli.yaml()
        self.trained: frozenset[int] = frozenset()  # classes, see leaks

    def _leave_config(self, trainer: pl.Trainer) -> None:
        # Not before the run begins: what is refused leaves no run behind, which the next start would go on with.
        if trainer.is_global_zero and not trainer.fast_dev_run:
            write_atomically(config_file(self.cli.run_dir, self.config), self.config)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_config(trainer)
        for config in trainer.lr_scheduler_configs:
            if (length := cosine_shorter_than(config.scheduler, trainer.max_steps)) is not None:
                rank_zero_warn(
                    f"the rate's cosine has fallen after {length} of {trainer.max_steps} meta-updates and rises again: "
                    f"give --model.init_args.scheduler.init_args.T_max {trainer.max_steps}"
                )
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.start_at(trainer.global_step)

    def on_fit_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        data, allowed = trainer.datamodule, self.cli.setting("allow_overlap")
        fits_task(pl_module, data.on_device(data.distribution("train").sample([0])))
        self.trained |= of_parts(pl_module)
        for split in () if allowed else ("val", "test"):
            refuse_leaks(self.trained, data, split, "the backbone, or an earlier part of the run,")
        own = data.distribution("train").class_digests()
        for split in () if allowed else ("val", "test") if data.selects else ("test",):
            refuse_leaks(own, data, split, "the learner")
        self.trained |= own

    def on_test_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        fits_task(pl_module, trainer.datamodule.on_device(trainer.datamodule.distribution("test").sample([0])))
        if not self.cli.setting("allow_overlap"):
            refuse_leaks(self.trained, trainer.datamodule, "test", "the learner, or its backbone,")
        if not self.cli.learns:
            self._leave_config(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config
        checkpoint[KEY] = as_tensor(self.trained)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.trained |= trained_classes(checkpoint)
        if trainer.state.fn != "fit":
            return
        reconcile(trainer, pl_module, checkpoint, yaml.safe_load(self.config))


def program(*flags: str) -> str:
    """The command of a training with these flags, as it is typed where this one was."""
    script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    return shlex.join(["python", script, *flags])


@rank_zero_only
def write_run_results(cli: MetaboltCLI, checkpoint: Path | None) -> None:
    """results.json and the closing table."""
    facts = {
        "seed": cli.datamodule.seed,
        "seed_everything": cli.setting("seed_everything"),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "meta_steps": cli.trainer.global_step if checkpoint is None else load_checkpoint(checkpoint)["global_step"],
        "training": {name: round(value, 3) for name, value in cli.stopwatch.state_dict().items()},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    content = results(cli.model, cli.datamodule, cli.model.stage_metrics("test").everything(), facts)
    if not cli.trainer.fast_dev_run:
        write_results(content, cli.run_dir / RESULTS)
    config = config_file(cli.run_dir, cli.yaml())
    again = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
    if config.is_file():  # not after a test with other settings, or of what was never trained
        hints = [f"again: {program('--config', str(config), '--stage', 'test', *again)}"]
    else:
        hints = [f"again: {program(*sys.argv[1:])}"] if cli.setting("stage") == "test" else []
    hints += [hint for logger in cli.trainer.loggers if isinstance(logger, WandbRun) for hint in logger.hints()]
    print_results(
        content, as_results(cli.model.all_metrics()), None if cli.trainer.fast_dev_run else cli.run_dir, hints
    )


@rank_zero_only
def print_validation(cli: MetaboltCLI, metrics: dict[str, float]) -> None:
    """The table of a meta-validation by itself, which leaves nothing behind."""
    content = results(cli.model, cli.datamodule, metrics, {})
    declared = as_results(cli.model.declared_metrics() | dict(cli.datamodule.own_metrics))
    print_results(content, declared, None, [], split="meta-validation")


def run(cli: MetaboltCLI) -> None:
    """Do what ``--stage`` says."""
    trainer, stage = cli.trainer, cli.setting("stage")
    checkpoint = cli.ckpt_path or (None if stage == "fit" else _trained(cli))
    if checkpoint is None:
        load_pretrained(cli.model)
    common: dict[str, Any] = {"model": cli.model, "datamodule": cli.datamodule, "weights_only": True}
    cli.set_threads()
    if stage == "fit":
        if checkpoint:
            rank_zero_info(f"going on from {checkpoint}")
        elif cli.setting("ckpt_path"):
            rank_zero_info(f"no checkpoint of {cli.setting('name')!r} yet: starting from the beginning")
        with shared_with_children():
            trainer.fit(ckpt_path=checkpoint, **common)
        # These would put back the weights that were averaged, which a checkpoint of theirs has beside the average.
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, WeightAveraging)]  # pyright: ignore
        best = cli.run_dir / CHECKPOINTS / "best.ckpt"
        checkpoint = best if best.is_file() and not trainer.fast_dev_run else None
        trainer.test(ckpt_path=checkpoint, verbose=False, **common)
    elif stage == "validate":
        (logged,) = trainer.validate(ckpt_path=checkpoint, verbose=False, **common)
        print_validation(cli, {name.removeprefix("val/"): value for name, value in logged.items() if "/" in name})
    else:
        trainer.test(ckpt_path=checkpoint, verbose=False, **common)
    if stage != "validate":
        write_run_results(cli, checkpoint)


def _trained(cli: MetaboltCLI) -> Path | None:
    """What is tested where no checkpoint was named: the best, or else the last.

    Raises:
        ConfigError: the run left results of a training, whose checkpoints are gone.
    """
    for name in ("best", "last"):
        if (file := cli.run_dir / CHECKPOINTS / f"{name}.ckpt").is_file():
            return file
    if cli.learns:
        if (cli.run_dir / RESULTS).is_file():
            raise ConfigError(
                f"{cli.run_dir} has results, but no checkpoint to test again: bring it back, or give another --name"
            )
        rank_zero_info("no checkpoint: the learner is as it was initialised")
    return None


def main(args: Sequence[str] | None = None) -> None:
    """``python train.py``: parse, build, run; what the user can mend is told in one line."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    quiet_lightning()
    cli = None
    try:
        with one_line_errors("--debug" in (sys.argv[1:] if args is None else args)):
            cli = MetaboltCLI(args, runs=True)
            run(cli)
    except SIGTERMException:
        assert cli is not None
        if rank_zero_only.rank == 0:
            if cli.setting("stage") != "fit" or cli.trainer.testing:
                sys.stderr.write("stopped in the test, of which nothing is kept; what was trained is as it was\n")
            else:
                again = program("--config", str(config_file(cli.run_dir, cli.yaml())), "--ckpt_path", "last")
                step, saved = cli.trainer.global_step, saved_at(cli.trainer)
                what = "saved" if saved == step else f"of which {max(saved, 0)} are saved"
                sys.stderr.write(f"stopped at meta-update {step}, {what}; go on with: {again}\n")
        sys.exit(128 + signal.SIGTERM)
    except SystemExit as failed:
        if _among_others():  # to leave the process group properly may wait for ever for a process that is gone
            release()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(failed.code or 0))
        raise
    finally:
        release()
        # Left to the interpreter's exit, the threads of the process group now and then abort it.
        if _among_others():
            torch.distributed.destroy_process_group()


def _among_others() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def quiet_lightning() -> None:
    """Leave out advice of Lightning's that does not apply here."""
    for advice in (
        ".*does not have many workers.*",  # episodes take microseconds
        ".*dataloader is not resumable.*",  # it is: an episode is a function of its number
        ".*Checkpoint directory .* exists and is not empty.*",  # resuming is why
        ".*The dirpath has changed.*",
        ".*callbacks used to create the checkpoint.*",  # testing needs none of them
        ".*in eval mode at the start of training.*",  # a frozen backbone
        ".*LeafSpec.*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", advice)
    noise = ("💡", "TPU available", "GPU available", "`weights_only` was not set", "Seed set to")
    for name in (
        "pytorch_lightning.utilities.rank_zero",
        "lightning_fabric.utilities.seed",
        "pytorch_lightning.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(noise))
