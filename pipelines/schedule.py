"""`sparseline schedule set|list|remove`: recurring runs, by name.

KFP has no call that changes a recurring run, so `set` creates the wanted one first and retires the old one then: a name
never stands for nothing. What it makes is marked in the description; what it did not make it does not touch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from components.runtime.errors import InputError
from pipelines import catalogue, profiles
from pipelines.kfp_server import Server, Version, connect, find_version, pages, requests_of
from pipelines.submit import EXPERIMENT

MARK = "made by sparseline schedule"
CONCURRENCY = 1
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
CRON_FIELDS = "second minute hour day-of-month month day-of-week"


@dataclass
class ScheduleOptions:
    """What the command line said."""

    name: str
    cron: str = ""
    pipeline: str = "retraining"
    profile: str = "nano"
    version: str = ""
    upload: bool = True
    endpoint: str = ""
    namespace: str = ""
    service_account: str = ""


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InputError(f"the schedule's name {name!r} must be lower-case letters, digits and -, at most 63")


def check_cron(cron: str) -> str:
    """The expression with single spaces. Raises InputError unless it has the six fields that KFP wants."""
    fields = cron.split()
    if len(fields) == 5:
        raise InputError(f"--cron {cron!r} has five fields; KFP's begin with the second: --cron '0 {' '.join(fields)}'")
    if len(fields) != 6:
        raise InputError(
            f"--cron {cron!r}: write six fields, {CRON_FIELDS}, e.g. --cron '0 0 3 * * *' (every day at 3)"
        )
    for field, name in zip(fields, CRON_FIELDS.split(), strict=True):
        if not re.fullmatch(r"[0-9A-Za-z*?/,-]+", field):
            raise InputError(f"--cron {cron!r}: the field {name} is {field!r}, which is no number, list, range or *")
    return " ".join(fields)


def existing(server: Server, name: str = "") -> list[Any]:
    """The recurring runs on the server, or those of this name."""
    with requests_of("list its recurring runs"):
        found = list(pages(server.client.list_recurring_runs, "recurring_runs", namespace=server.namespace or None))
    return [one for one in found if not name or one.display_name == name]


def arguments_of(pipeline: str) -> dict[str, Any]:
    """The arguments of each of the runs. Raises InputError for a pipeline that would do the same every time."""
    if pipeline == "retraining":
        return {"occasion": ""}
    if pipeline == "evaluation":
        return {"occasion": "", "checkpoint": ""}
    raise InputError(
        f"every run of a scheduled {pipeline} would have the same seed, and do the same again; schedule retraining or "
        "evaluation"
    )


def is_wanted(one: Any, version: Version, cron: str, arguments: dict[str, Any], service_account: str) -> bool:
    """Whether a recurring run on the server is just what is wanted."""
    reference = one.pipeline_version_reference
    schedule = one.trigger.cron_schedule if one.trigger else None
    return (
        one.mode == "ENABLE"
        and reference is not None
        and reference.pipeline_version_id == version.version_id
        and schedule is not None
        and schedule.cron == cron
        and int(one.max_concurrency or 0) == CONCURRENCY
        and bool(one.no_catchup)
        and (one.runtime_config.parameters or {} if one.runtime_config else {}) == arguments
        and (not service_account or one.service_account == service_account)
    )


def commanded(one: Any) -> tuple[str, str, str] | None:
    """Pipeline, profile and version's name of a recurring run that `set_schedule` made; None for another."""
    description = one.description or ""
    if not description.startswith(f"{MARK}; "):
        return None
    what, _, version = description.removeprefix(f"{MARK}; ").partition(", version ")
    pipeline, _, profile = what.partition(" of ")
    return pipeline, profile, version


def set_schedule(options: ScheduleOptions, console: Console) -> int:
    """Make the recurring run of this name what the options say. Returns the exit code.

    Raises InputError for whatever is wrong before anything is created.
    """
    check_name(options.name)
    cron = check_cron(options.cron)
    pipeline = catalogue.named(options.pipeline)
    arguments = arguments_of(pipeline.name)
    profiles.load(options.profile)
    server = connect(options.endpoint, options.namespace)
    before = existing(server, options.name)
    foreign = [one for one in before if MARK not in (one.description or "")]
    if foreign:
        raise InputError(
            f"a recurring run named {options.name} is there that was not made here ({_ids(foreign)}); choose another "
            f"name, or remove it:\n  sparseline schedule remove {options.name} --id {foreign[0].recurring_run_id}"
        )
    version = find_version(server, pipeline, options.profile, wanted=options.version, upload=options.upload)
    good = [one for one in before if is_wanted(one, version, cron, arguments, options.service_account)]
    if len(before) > 1 and not good:
        raise InputError(
            f"{len(before)} schedules are named {options.name} ({_ids(before)}), and none is what you ask for; keep "
            f"one:\n  sparseline schedule remove {options.name} --id {before[-1].recurring_run_id}"
        )
    if good:
        kept, made = good[0], False
    else:
        with requests_of(f"make the schedule {options.name}"):
            experiment = server.client.create_experiment(EXPERIMENT, namespace=server.namespace or None)
            kept, made = server.client.create_recurring_run(
                experiment.experiment_id,
                options.name,
                description=f"{MARK}; {pipeline.name} of {options.profile}, version {version.name}",
                cron_expression=cron,
                max_concurrency=CONCURRENCY,
                no_catchup=True,
                params=arguments,
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                service_account=options.service_account or None,
            ), True  # fmt: skip
    for one in before:
        if one.recurring_run_id != kept.recurring_run_id:
            retire(server, one)
    word = ("replaced" if before else "made") if made else "unchanged"
    console.print(
        f"schedule {options.name}: {word}\nversion  {version.name}\ncron     {cron}\n"
        f"KFP      {server.ui}/#/recurringrun/details/{kept.recurring_run_id}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def _ids(found: list[Any]) -> str:
    return ", ".join(one.recurring_run_id for one in found)


def retire(server: Server, one: Any) -> None:
    """Disable and delete; the runs that it started stay."""
    with requests_of(f"remove the recurring run {one.recurring_run_id}"):
        server.client.disable_recurring_run(one.recurring_run_id)
        server.client.delete_recurring_run(one.recurring_run_id)


def remove_schedule(name: str, recurring_run_id: str, endpoint: str, namespace: str, console: Console) -> int:
    """Remove the recurring run of this name. Raises InputError when there is none, or several and no id is given."""
    server = connect(endpoint, namespace)
    everything = existing(server)
    found = [one for one in everything if one.display_name == name]
    if recurring_run_id:
        found = [one for one in found if one.recurring_run_id == recurring_run_id]
    if not found:
        there = ", ".join(sorted({one.display_name or "?" for one in everything})) or "none"
        raise InputError(f"no schedule {name}" + (f" with the id {recurring_run_id}" if recurring_run_id else "")
                         + f"; there are: {there} (`sparseline schedule list`)")  # fmt: skip
    if len(found) > 1:
        raise InputError(f"{len(found)} schedules are named {name}; give one by --id: {_ids(found)}")
    (one,) = found
    if MARK not in (one.description or "") and not recurring_run_id:
        raise InputError(
            f"the recurring run {name} was not made here; to remove it all the same:\n"
            f"  sparseline schedule remove {name} --id {one.recurring_run_id}"
        )
    retire(server, one)
    console.print(f"schedule {name}: removed", highlight=False, markup=False)
    return 0


def list_schedules(endpoint: str, namespace: str, console: Console) -> int:
    """Print every recurring run on the server."""
    server = connect(endpoint, namespace)
    made = Table(title_justify="left", show_edge=False, caption="times in KFP's time zone", caption_justify="left")
    for column in ("name", "cron", "state", "what", "id"):
        made.add_column(column, no_wrap=column in ("cron", "id"))
    for one in sorted(existing(server), key=lambda one: one.display_name or ""):
        schedule = one.trigger.cron_schedule if one.trigger else None
        command = commanded(one)
        what = f"{command[0]} of {command[1]}" if command else "not made by sparseline"
        made.add_row(
            one.display_name or "?",
            schedule.cron if schedule else "periodic",
            "on" if one.mode == "ENABLE" else "off",
            what,
            one.recurring_run_id,
        )
    console.print(made)
    return 0
