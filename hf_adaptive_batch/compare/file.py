"""The compare file, or the command line that stands for one, checked before anything runs."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..flags import SUFFIXES, read_settings
from .plan import ComparePlan, Schedule
from .rules import check_program, check_schedule_settings, check_shared
from .values import CHECKS, as_flags, as_mapping, as_rates, refuse_equal


_MAX_NAME = 100  # of a file system's 255 bytes

_EPILOG = """\
All other flags are those of `hf-adaptive-batch pretrain`. They are shared by all runs, and win over
those under `shared` in the file. The file and the schedules come before any flag.
"""


def read_plan(arguments: Sequence[str]) -> ComparePlan:
    """Read and check what is to be compared.

    Args:
        arguments: The words of the command line: a file, or schedules; then flags.

    Returns:
        The plan.

    Raises:
        ValueError: If the file or the command line does not fit.
    """
    words = list(arguments)
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, flags = words[:first_flag], words[first_flag:]
    given, others = _parser().parse_known_args(flags)
    shared = shared_flags(others)
    if not names:
        raise ValueError(
            "compare must be given a file, or schedules, before any flag, because it is them that "
            "are compared; write such as: compare runs.yaml, or: compare constant norm_test."
        )
    files = [name for name in names if name.lower().endswith(SUFFIXES)]
    if files and len(names) > 1:
        raise ValueError(
            f"compare ({' '.join(names)}) must be given one file or a list of schedules, because a "
            "file has all schedules of a comparison; leave out the others."
        )
    if files:
        settings = read_settings(files[0])
    else:
        refuse_equal("schedules", names)
        settings = {"schedules": {name: {"batch_schedule": name} for name in names}}
    settings.update((name, value) for name, value in vars(given).items() if value is not None)
    if shared:
        settings["shared"] = {**as_mapping("shared", settings.get("shared") or {}), **shared}
    return plan_of(settings)


def plan_of(settings: Mapping[str, Any]) -> ComparePlan:
    """Check settings, and make them a plan.

    Args:
        settings: As in the file.

    Returns:
        The plan.

    Raises:
        ValueError: If a name is unknown, or a value does not fit.
    """
    unknown = [str(name) for name in settings if name not in CHECKS]
    if unknown:
        raise ValueError(
            f"names in the compare file ({', '.join(unknown)}) must be among {', '.join(CHECKS)}, "
            "because others mean nothing here; flags of all runs go under shared."
        )
    values = {name: check(name, settings.get(name)) for name, check in CHECKS.items()}
    values["tuning_seeds"] = values["tuning_seeds"] or values["seeds"][:1]
    common_rates = values.pop("learning_rates")
    schedules = [
        _schedule(name, value, common_rates) for name, value in values["schedules"].items()
    ]
    slugs: dict[str, str] = {}
    for schedule in schedules:
        other = slugs.setdefault(schedule.slug, schedule.name)
        if other != schedule.name:
            raise ValueError(
                f"names of schedules ({other!r} and {schedule.name!r}) must differ in letters or "
                f"digits, because both would run in the folder {schedule.slug}; rename one."
            )
    plan = ComparePlan(**{**values, "schedules": schedules})
    check_shared(plan, common_rates)
    check_program(plan)
    return plan


def _schedule(name: Any, value: Any, common_rates: Sequence[float]) -> Schedule:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"name of a schedule ({name!r}) must be text, because it names a curve and a folder; "
            "put it into quotes."
        )
    if not isinstance(value, Mapping):
        raise ValueError(
            f"schedule {name!r} ({value!r}) must be a mapping of flags, because they make it "
            "differ; write such as {batch_schedule: constant}."
        )
    settings = dict(value)
    rates = as_rates(f"learning_rates of {name!r}", settings.pop("learning_rates", None))
    settings = as_flags(f"schedule {name!r}", settings)
    check_schedule_settings(name, settings)
    schedule = Schedule(name=name, settings=settings, learning_rates=rates or common_rates)
    if not schedule.slug or len(name) > _MAX_NAME:
        raise ValueError(
            f"name of a schedule ({name!r}) must have a letter or a digit, and at most {_MAX_NAME} "
            "characters, because it names a folder; choose another."
        )
    return schedule


def _parser() -> argparse.ArgumentParser:
    # No prefixes of flags: `--seed` would become `--seeds`, instead of being refused.
    parser = argparse.ArgumentParser(
        prog="hf-adaptive-batch compare",
        usage="%(prog)s FILE.yaml | SCHEDULE ... [--flag value ...]",
        description="Train with several batch schedules, and report which was better by how much.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--title", help="of the report")
    parser.add_argument("--note", help="a remark on it")
    parser.add_argument("--seeds", nargs="+", type=int, help="runs of each schedule (0)")
    parser.add_argument(
        "--learning_rates", nargs="+", type=float, help="to choose from for each schedule (none)"
    )
    parser.add_argument(
        "--tuning_seeds", nargs="+", type=int, help="to choose them by (the first seed)"
    )
    parser.add_argument(
        "--target_loss", type=float, help="validation loss (the first schedule's highest final one)"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time (1)")
    parser.add_argument("--output_dir", help="where everything goes (runs/compare)")
    return parser


def shared_flags(words: Sequence[str]) -> dict[str, Any]:
    """Take words of a command line for settings: `--name value ...`, `--name=value`, `--name`.

    Args:
        words: Of the command line.

    Returns:
        Values by the names of their flags: text, lists of it, or True.

    Raises:
        ValueError: If a word belongs to no flag.
    """
    collected: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            collected[name] = [value] if value else []
        elif not name:
            raise ValueError(
                f"word ({word}) must come after a flag, or before all flags if it is a schedule, "
                "because else it belongs to none; move it."
            )
        else:
            collected[name].append(word)
    return {
        name: (value[0] if len(value) == 1 else value) if value else True
        for name, value in collected.items()
    }
