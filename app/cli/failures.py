"""What ends a command: one line, which names the setting and the cure, or which says that the program is at fault."""

from __future__ import annotations

import errno
import inspect
import itertools
import linecache
import os
import re
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from datamodules.core.download import DownloadError
from datamodules.core.errors import ConfigError, DataError
from datamodules.core.runtime import memory_of_the_machine, memory_within_reach

try:
    import resource
except ImportError:  # Windows
    resource = None

# The complete configuration of the command that runs, by which an error is traced to a setting.
configuration: ContextVar[Any] = ContextVar("configuration", default=None)

# Never what the user can mend by a setting, when nobody refuses deliberately.
_NO_MEMORY = re.compile(
    r"can't allocate|not enough memory|out of memory|[Uu]nable to allocate|Storage size calculation overflowed|"
    r"numel: integer multiplication overflow|Overflow when unpacking|array is too big|Maximum allowed|"
    r"Cannot allocate memory"
)
# What a process hears whose peers in a distributed training are gone.
_LOST = re.compile(r"gloo|NCCL|ProcessGroup|Connection (reset|closed) by (remote )?peer", re.IGNORECASE)
# Whose code a file is: the project's, a library's, or else a user's own.
_ROOT = Path(__file__).resolve().parents[2]
_PROJECT = tuple(f"{_ROOT / part}{os.sep}" for part in ("app", "models", "datamodules", "benchmarks"))
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", sysconfig.get_path("stdlib") + os.sep)
_LIGHTNING = ("pytorch_lightning", "lightning_fabric")
# How the error of a process that loads data begins, before its traceback.
_LOADING = re.compile(r"Caught \w+ in DataLoader worker process")
# Of settings that say how long a run is, not how much of it is in memory at once.
_LENGTHS = re.compile(r"seed|steps|epochs|(val|test)_tasks|interval|checkpoint_every|horizon")


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Ends the process with one line: exit code 2 for what the user can mend, 1 for an error of the program.

    Interruptions and exits pass. While it lasts, the process may take no more memory than the machine has, so that what
    does not fit is an error of its own and not a kill by the system.

    Args:
        debug: the traceback comes first.
    """
    token = configuration.set(None)
    try:
        with _no_more_memory_than_there_is():
            yield
    except Exception as error:
        if debug:
            traceback.print_exc()
        line, code = told(error, configuration.get())
        sys.stderr.write(f"error: {_line(line, 2000)}\n")
        sys.exit(code)
    finally:
        configuration.reset(token)


def told(error: Exception, config: Any = None) -> tuple[str, int]:
    """The line for an error, and the exit code."""
    refused = refusal(error, config)
    if isinstance(refused, ConfigError):
        return str(refused), 2
    frames, name, text = _frames(refused), type(refused).__name__, _line(_said(refused))
    if (whose := _users_own(refused)) is not None:
        return f"{whose} raised {name}: {text}; --debug shows the traceback", 1
    where = f" in {Path(frames[-1][0].f_code.co_filename).name}:{frames[-1][1]}" if frames else ""
    return f"internal error ({name}{where}: {text}): run again with --debug for the traceback, and please report it", 1


def refusal(error: Exception, config: Any = None) -> Exception:
    """A ConfigError for what the user can mend, which names the setting; any other error as it is.

    Args:
        error: anything that was raised.
        config: the complete configuration, in which the setting is looked for.
    """
    met = {id(error)}  # causes may go in circles
    while isinstance(error.__cause__, Exception) and not isinstance(error, (ConfigError, DataError)):
        error = error.__cause__  # the parser wraps what a constructor says in an account of all that it tried
        if id(error) in met:
            break
        met.add(id(error))
    if isinstance(error, (ConfigError, DataError, DownloadError)):
        return ConfigError(_said(error))
    if _lost_peer(error):
        return ConfigError(
            f"another process of this training ended, or is out of reach ({_line(str(error), 120)}): see what it says "
            "itself, then go on with --ckpt_path last"
        )
    if not _mendable(error):
        return error
    settings = dict(flat(config)) if config is not None else {}
    key, text = _setting(error, settings), _line(_said(error)) or type(error).__name__
    told = f"{key} is {_line(str(settings[key]), 60)}: " if key in settings else f"{key}: " if key else ""
    if isinstance(error, UnicodeError):
        text, cure = f"a file is not UTF-8 text ({text})", "save it as UTF-8"
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        told, text = "", f"{place}{error.strerror or text}"
        first = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it usable"
        cure = f"{first}, or give another {f'--{key}' if key in settings else 'path'}"
    elif _out_of_memory(error):
        told = f"{key} is {_line(str(settings[key]), 60)}: " if (key := _largest(settings)) else ""
        text, cure = f"not enough memory ({text})", "lower it" if key else "give smaller settings"
    elif isinstance(error, ImportError):
        cure = "install what is missing, or leave it out"
    elif key and key.split(".")[-1] not in text:
        cure = "give another value, or leave it out"
    else:
        cure = ""
    return ConfigError(told + text + (f": {cure}" if cure else ""))


def _mendable(error: Exception) -> bool:
    """Whether settings, files or the machine are the reason, and not an error in the program or in a user's file."""
    frames = _frames(error)
    if isinstance(error, ImportError):
        return (error.name or "").split(".")[0] not in ("app", "models", "datamodules")
    if isinstance(error, (MisconfigurationException, OSError, UnicodeError)) or _out_of_memory(error):
        return True
    if _refusing(frames):
        return True
    if not frames or not linecache.getline(frames[-1][0].f_code.co_filename, frames[-1][1]).strip().startswith("raise"):
        return False
    deep = frames[-1][0].f_code.co_filename
    if isinstance(error, (ValueError, OverflowError)):
        # A library that a user's learner calls refuses what that computed; what a constructor passes on are settings.
        computed = "site-packages" in deep and not any(frame.f_code.co_name == "__init__" for frame, _ in frames)
        return not computed or _users_own(error) is None
    by_library = any(f"{part}/" in deep for part in ("pytorch_lightning", "lightning_fabric", "torch/optim"))
    state = "state_dict" in str(error) and isinstance(error, (RuntimeError, KeyError))
    return state or (by_library and isinstance(error, (RuntimeError, TypeError, KeyError, AttributeError)))


def _lost_peer(error: Exception) -> bool:
    """Whether a collective operation failed because of another process."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and torch.distributed.is_initialized() and bool(_LOST.search(str(error)))


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, ValueError, OverflowError, TypeError)) and bool(
        _NO_MEMORY.search(str(error))
    )


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """The frames of a traceback with their lines, the innermost last."""
    return list(traceback.walk_tb(error.__traceback__))


def _said(error: BaseException) -> str:
    """What an error says, without the traceback of another process that loads data."""
    text = str(error)
    return text.rstrip().rsplit("\n", 1)[-1].partition(": ")[2] if _LOADING.match(text) else text


def _users_own(error: BaseException) -> str | None:
    """The file and line of a user's own learner or data that an error comes from; None where none is involved.

    Where none of its lines runs, as in a backward pass, it is the class of the learner that does.
    """
    frames = _frames(error)
    files = [frame.f_code.co_filename for frame, _ in frames]
    called = [file.startswith(_PROJECT) and file != __file__ for file in files]
    frames = frames[called.index(True) :] if True in called else []  # what calls the project has done no wrong
    places = [(frame.f_code.co_filename, line) for frame, line in frames]
    places += re.findall(r'File "(.+)", line (\d+)', str(error)) if _LOADING.match(str(error)) else []
    for file, line in reversed(places):
        if _is_users(file):
            return f"{Path(file).name}:{line}"
    for frame, _ in reversed(frames):
        if isinstance(made := frame.f_locals.get("self"), pl.LightningModule):
            file = getattr(sys.modules.get(type(made).__module__), "__file__", None) or ""
            if _is_users(file):
                return f"{Path(file).name}:{inspect.getsourcelines(type(made))[1]} (class {type(made).__name__})"
    return None


def _is_users(file: str) -> bool:
    return file.endswith(".py") and not file.startswith(_PROJECT) and not any(part in file for part in _LIBRARIES)


def _refusing(frames: list[tuple[FrameType, int]]) -> bool:
    """Whether a library's constructor, optimizer or scheduler fails by itself, with whatever error comes first."""
    outwards = [frame for frame, _ in reversed(frames)]
    libraries = itertools.takewhile(lambda frame: "site-packages" in frame.f_code.co_filename, outwards)
    return next(_built(list(libraries)), None) is not None


def _built(outwards: list[FrameType]) -> Iterator[type]:
    """The classes at fault for an error, which a configuration may name, the innermost first: those that a constructor
    builds, and optimizers and schedulers, which take settings as they are and fail when they use them.

    An optimizer also calls Lightning, for the training step and the backward pass, whose errors are not its own.

    Args:
        outwards: frames, the innermost first.
    """
    called_back = False
    for frame in outwards:
        called_back |= any(f"/{library}/" in frame.f_code.co_filename for library in _LIGHTNING)
        made = frame.f_locals.get("self")
        if isinstance(made, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
            if not called_back:
                yield type(made)
        elif frame.f_code.co_name == "__init__" and isinstance(made, (pl.Trainer, pl.Callback, torch.nn.Module)):
            yield type(made)


def _setting(error: Exception, settings: dict[str, Any]) -> str | None:
    """The key that an error speaks of, or the part of the configuration whose constructor raised it."""
    part = None
    for built in _built([frame for frame, _ in reversed(_frames(error))]):
        if issubclass(built, pl.Trainer):
            part = "trainer"
            break
        names = {cls.__name__ for cls in built.__mro__}
        of = [k for k, v in settings.items() if k.endswith(".class_path") and str(v).rsplit(".", 1)[-1] in names]
        if of:
            part = of[-1].removesuffix(".class_path")
            break
    inside = {k: v for k, v in settings.items() if part is None or k.startswith(part + ".")}
    text = str(error)
    path = str(error.filename) if isinstance(error, OSError) and error.filename else None
    if path:
        found = [k for k, v in inside.items() if isinstance(v, (str, Path)) and str(v) and _within(path, str(v))]
    else:
        words = set(re.findall(r"\w+", text))
        words |= {word + "s" for word in words}  # "Invalid beta parameter" is of betas
        found = [k for k, v in inside.items() if (leaf := k.rsplit(".", 1)[-1]) in words and len(leaf) > 2]
        found = [k for k in found if inside[k] is not None] or found
        if part is None:  # words such as "name" are in many a message
            found = [k for k in found if "_" in k.rsplit(".", 1)[-1]]
        if not found:
            found = [k for k, v in inside.items() if len(str(v)) > 2 and _mentions(text, str(v))]
    return max(found, key=lambda k: (len(k.rsplit(".", 1)[-1]), k)) if found else part


def _within(path: str, folder: str) -> bool:
    return folder != "." and Path(path).absolute().is_relative_to(Path(folder).absolute())


def _mentions(text: str, value: str) -> bool:
    """Whether a text speaks of a value: as a whole word, and of a number not as a part of another, or of an address."""
    return value not in ("None", "True", "False") and bool(
        re.search(rf"(?<![\w.-]){re.escape(value)}(?!\w|\.\d)", text)
    )


def _largest(settings: dict[str, Any]) -> str | None:
    """The key of the largest number that says how much is held at once; None where none is large."""
    large = {}
    for key, value in settings.items():
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
        if numbers and not _LENGTHS.search(key.rsplit(".", 1)[-1]):
            large[key] = max(map(abs, numbers))
    key = max(large, key=large.__getitem__, default=None)
    return key if key is not None and large[key] > 1000 else None


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, those of lists of classes included."""
    items = config.items() if isinstance(config, dict) else vars(config).items()
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, dict) or (hasattr(value, "__dict__") and type(value).__name__ == "Namespace"):
            yield from flat(value, name + ".")
        elif isinstance(value, list) and any(type(v).__name__ in ("Namespace", "dict") for v in value):
            for i, one in enumerate(value):
                yield from flat({str(i): one}, name + ".")
        else:
            yield name, value


def _line(text: str, most: int = 300) -> str:
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return text if len(text) <= most else text[:most] + " …"


def refuse_nulls(config: Any) -> None:
    """Refuse ``null`` for a setting whose type has no None; the parser lets it pass within classes.

    Raises:
        ConfigError: naming the setting, and its default.
    """
    settings = dict(flat(config))
    for key in [k for k, v in settings.items() if v is None]:
        path, _, name = key.rpartition(".")
        if path == "trainer":
            owner: Any = pl.Trainer
        elif path.endswith(".init_args"):
            owner = _class(settings.get(path.removesuffix("init_args") + "class_path"))
        else:
            continue
        parameter, hint = _parameter(owner, name) if owner is not None else (None, None)
        if parameter is None or hint is None or parameter.default is None or _takes_none(hint):
            continue
        without = "" if parameter.default is parameter.empty else f", or leave it out for {parameter.default!r}"
        raise ConfigError(f"{key} is null but must be {_name(hint)}: give a value{without}")


def _class(path: Any) -> type | None:
    from jsonargparse._util import import_object  # what the parser itself imports classes by

    try:
        found = import_object(path)
        return found if inspect.isclass(found) else None
    except (ImportError, ValueError, AttributeError, TypeError):
        return None


def _parameter(owner: type, name: str) -> tuple[inspect.Parameter | None, Any]:
    """A parameter of a constructor, be it handed on to a base, and its resolved type."""
    for base in inspect.getmro(owner):
        if "__init__" not in vars(base):
            continue
        found = inspect.signature(base.__init__).parameters.get(name)
        if found is not None:
            try:
                return found, typing.get_type_hints(base.__init__).get(name)
            except (NameError, TypeError):
                return found, None
    return None, None


def _takes_none(hint: Any) -> bool:
    if hint in (None, type(None), Any):
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_takes_none(one) for one in typing.get_args(hint))
    return typing.get_origin(hint) is typing.Literal and None in typing.get_args(hint)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


@contextmanager
def _no_more_memory_than_there_is() -> Iterator[None]:
    """Limits private memory to what there is: to take more fails at once, where Linux would promise it and kill later.

    What others take now is not there, up to half of the machine's. Not beside an accelerator, whose driver reserves
    more than it uses.
    """
    if resource is None or not sys.platform.startswith("linux") or torch.cuda.is_available():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = memory_of_the_machine()
    most = min(most, max(most // 2, memory_within_reach()))
    bounded = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([most, *bounded]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
