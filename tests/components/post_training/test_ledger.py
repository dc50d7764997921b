"""The ledger against every way to lose a group or to damage a file."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.post_training.ledger import Ledger, LedgerError, check_ledger, read_ledger


def write(path=None) -> Ledger:
    ledger = Ledger(path)
    for group in range(4):
        ledger.issued(group, f"task{group}", "family", 0)
    for group in (1, 0, 2):
        ledger.finished(group, (0, 1))
    ledger.trained(0, 0, 1, 1)
    ledger.dropped(1, "zero variance")
    ledger.dropped(2, "faulty: bad_reward: nan lies outside [0, 1]")
    return ledger


def test_counts_and_what_was_open_at_the_end(tmp_path):
    path = tmp_path / "ledger.jsonl"
    counts = write(path).close("not needed")
    records = read_ledger(path)
    checked = check_ledger(records)
    assert counts == {**checked, "hash": records[-1]["hash"]}
    assert checked == {
        "issued": 4,
        "finished": 3,
        "trained": 1,
        "dropped": 3,
        "dropped_zero_variance": 1,
        "dropped_faulty": 1,
        "dropped_not_needed": 1,
    }


def test_a_killed_run_leaves_a_whole_ledger_that_is_open(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path)
    records = read_ledger(path)
    assert check_ledger(records, ended=False)["issued"] == 4
    with pytest.raises(LedgerError, match="1 groups were neither trained nor dropped, the first is 3"):
        check_ledger(records)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_found(data):
    ledger = write()
    ledger.close("not needed")
    records = json.loads(json.dumps(ledger.records))
    kind = data.draw(st.sampled_from(["remove", "swap", "change", "repeat", "cut"]))
    at = data.draw(st.integers(0, len(records) - 1))
    if kind == "remove":
        del records[at]
    elif kind == "swap":
        other = data.draw(st.integers(0, len(records) - 1).filter(lambda x: x != at))
        records[at], records[other] = records[other], records[at]
    elif kind == "change":
        name = data.draw(st.sampled_from([name for name in records[at] if name != "event"]))
        records[at][name] = "changed"
    elif kind == "repeat":
        records.insert(at, records[at])
    else:
        records = records[:at]
    with pytest.raises(LedgerError):
        check_ledger(records)


@pytest.mark.parametrize(
    "events,message",
    [
        (["issued", "issued"], "issued after it was issued"),
        (["issued", "trained"], "trained after it was issued"),
        (["issued", "finished", "trained", "trained"], "trained after it was trained"),
        (["issued", "finished", "trained", "dropped"], "dropped after it was trained"),
        (["issued", "finished", "dropped", "trained"], "trained after it was dropped"),
        (["finished"], "finished after it was never issued"),
        (["issued", "finished"], "neither trained nor dropped"),
    ],
)
def test_a_wrong_way_is_found_even_in_a_whole_chain(events, message):
    ledger = Ledger()
    for event in events:
        arguments = {"issued": ("t", "f", 0), "finished": ((0, 0),), "trained": (0, 0, 0), "dropped": ("why",)}[event]
        getattr(ledger, event)(7, *arguments)
    ledger._open.clear()  # so that close does not repair it
    ledger.close("")
    with pytest.raises(LedgerError, match=message):
        check_ledger(ledger.records)


def test_groups_under_way_in_an_earlier_try_are_issued_again_and_not_lost():
    earlier = write()  # groups 1 and 2 are dropped, 0 is trained, 3 is out
    earlier.issued(4, "task4", "family", 1)
    earlier.finished(4, (1, 1))
    ledger = Ledger()
    assert ledger.go_on(earlier.records) == {3: "task3", 4: "task4"}
    for group in (4, 3):
        ledger.issued(group, f"task{group}", "family", 2)
        ledger.finished(group, (2, 2))
    ledger.trained(4, 1, 2, 0)
    ledger.close("not needed")
    assert {
        name: check_ledger(ledger.records)[name] for name in ("issued", "again", "trained", "dropped_not_needed")
    } == {**{"issued": 5, "again": 2, "trained": 2, "dropped_not_needed": 1}}
    ledger = Ledger()
    ledger.go_on(earlier.records)
    ledger.issued(3, "task3", "family", 2)
    ledger.issued(3, "task3", "family", 2)  # nobody lost it now
    with pytest.raises(LedgerError, match="group 3 is issued after it was again"):
        check_ledger(ledger.records, ended=False)


def test_a_torn_line_is_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(LedgerError, match=r"ledger.jsonl, line 10"):
        read_ledger(path)
