"""Several processes for one command, by accelerate's launcher. Imports nothing heavy before it starts them."""

from pathlib import Path
from typing import NamedTuple


LAUNCH_FILES = Path(__file__).parent / "accelerate"
OWN_FLAGS = ("--num_processes", "--accelerate_config")


class Launch(NamedTuple):
    """
    What accelerate's launcher is to start.

    Attributes:
        num_processes (`int`, *optional*): By default that of the configuration.
        config (`Path`, *optional*): A configuration of accelerate; by default as many plain processes.
    """

    num_processes: int | None = None
    config: Path | None = None


def split_launch(arguments: list[str], is_shared: bool) -> tuple[Launch | None, list[str]]:
    """
    Takes what is for the launcher out of the arguments of a command.

    Args:
        arguments (`list[str]`): Of the command.
        is_shared (`bool`): Whether several processes may share its work.

    Returns:
        `tuple[Launch | None, list[str]]`: What to launch, or `None` if one process will do, and the other arguments.

    Raises:
        ValueError: If a value is missing or unusable, or the command is one of a single process.
    """
    found, rest, waiting = {}, [], list(arguments)
    while waiting:
        flag, has_value, value = waiting.pop(0).partition("=")
        if flag not in OWN_FLAGS:
            rest.append(flag + has_value + value)
            continue
        if not has_value and not waiting:
            raise ValueError(f"{flag} needs a value.")
        found[flag] = value if has_value else waiting.pop(0)
    if not found:
        return None, rest
    if not is_shared:
        raise ValueError(f"this command runs in one process: leave out {' and '.join(found)}.")
    number, config = (found.get(flag) for flag in OWN_FLAGS)
    if number is not None and not (number.isdecimal() and int(number)):
        raise ValueError(f"`num_processes` must be at least 1, but it is {number}.")
    if config is None and number == "1":
        return None, rest
    return Launch(number and int(number), config and _launch_file(config)), rest


def launch_files() -> list[str]:
    """The names of the configurations of accelerate that are installed with the recipes."""
    return sorted(path.stem for path in LAUNCH_FILES.glob("*.yaml"))


def _launch_file(name: str) -> Path:
    path = Path(name) if Path(name).is_file() else LAUNCH_FILES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"`accelerate_config`={name!r} is no file, and none of {', '.join(launch_files())}.")
    return path


def start_processes(launch: Launch, arguments: list[str]) -> int:
    """
    Runs this command line in several processes, by accelerate's launcher.

    Args:
        launch ([`Launch`]): What to start.
        arguments (`list[str]`): The command and its arguments.

    Returns:
        `int`: The exit status of the first process that failed, or 0. Why it failed, it has said itself.
    """
    from subprocess import CalledProcessError

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = [] if launch.num_processes is None else ["--num_processes", str(launch.num_processes)]
    if launch.config:
        flags += ["--config_file", str(launch.config)]
    else:
        # On a CPU too, where `accelerate launch --cpu` starts one process; and on any port that is free.
        flags += ["--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
        flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    # Where there is no GPU, the Trainer looks for one unless it is told, and no process knows of the others.
    variables = {} if torch.accelerator.is_available() else {"ACCELERATE_USE_CPU": "true"}
    try:
        with patch_environment(**variables):
            launch_command(launch_command_parser().parse_args([*flags, "--module", "soul_recipes", *arguments]))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except CalledProcessError as error:
        return error.returncode
    except SignalException as error:
        return 128 + error.sigval
    return 0
