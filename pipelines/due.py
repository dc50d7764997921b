"""When a recurring run of Kubeflow Pipelines was last due: the times at which its controller starts runs.

KFP reads cron as Go's robfig/cron 1.2 does: the second first, `?` is `*`, and day-of-month and day-of-week both have to
match where one of them begins with a star, even as `*/2`; otherwise one of them is enough. The day-of-week may be left
away, and then the first of five fields is the second still.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, tzinfo
from typing import Any

from croniter import CroniterBadDateError, CroniterError, croniter

from components.runtime.errors import InputError


def last_due(recurring: Mapping[str, Any], last_run: datetime | None, until: datetime, zone: tzinfo) -> datetime | None:
    """The newest time, not after `until`, at which this recurring run had to start a run.

    `recurring`: as KFP's REST API tells of it. `last_run`: when its newest run was made, from which a period counts.
    None where it is switched off, or not due yet. Raises InputError for a cron expression that cannot be read.
    """
    trigger = recurring.get("trigger") or {}
    schedule = trigger.get("cron_schedule") or trigger.get("periodic_schedule") or {}
    if recurring.get("mode") != "ENABLE" or not schedule:
        return None
    starts = [when for text in (recurring.get("created_at"), schedule.get("start_time")) if (when := read_time(text))]
    ends = read_time(schedule.get("end_time"))
    until = min(until, ends) if ends else until
    if "cron" in schedule:
        found = last_cron_time(schedule["cron"], until, zone)
    else:
        found = last_period(int(schedule.get("interval_second") or 1), max(starts, default=None), last_run, until)
    return found if found and all(found > start for start in starts) else None


def read_time(text: str | None) -> datetime | None:
    """A time of KFP's API; None for the zero that stands for none."""
    when = datetime.fromisoformat(text) if text else None
    return when if when and when.timestamp() > 0 else None


def last_cron_time(expression: str, until: datetime, zone: tzinfo) -> datetime | None:
    """The newest time of the cron expression that is not after `until`. Raises InputError where it cannot be read."""
    fields = expression.replace("?", "*").split()
    if len(fields) == 5:
        fields.append("*")
    starred = len(fields) == 6 and any(
        one.startswith("*") for field in (fields[3], fields[5]) for one in field.split(",")
    )
    try:
        # The newest before the next second: a time is due in the second that it names.
        times = croniter(
            " ".join(fields),
            until.astimezone(zone).replace(microsecond=0) + timedelta(seconds=1),
            ret_type=datetime,
            day_or=not starred,
            second_at_beginning=True,
        )
        found: datetime = times.get_prev()
    except CroniterBadDateError:  # the 30th of February
        return None
    except CroniterError as error:
        raise InputError(f"the cron expression {expression!r} cannot be read: {error}") from error
    return found


def last_period(seconds: int, start: datetime | None, last_run: datetime | None, until: datetime) -> datetime | None:
    """The same for a run every so many seconds, which KFP counts from the run before, or from the start."""
    base = last_run or start
    if base is None:
        return None
    due = base + timedelta(seconds=seconds)
    return due if due <= until else last_run
