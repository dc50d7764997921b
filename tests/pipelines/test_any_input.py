"""Whatever is written into a configuration or behind an option: it is taken or refused, never a traceback.

Values are drawn by hypothesis, always the same ones. No run is started: another one holds the runs folder.
"""

import importlib
import json
import socket
import types
import typing
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from components.runtime.errors import InputError
from components.runtime.stage import parse_config
from pipelines import cli, profiles
from pipelines.run import only_run
from pipelines.stages import STAGES

pytestmark = pytest.mark.slow
DRAWN = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([0.0, 0.5, 1.0, float("inf"), float("-inf"), float("nan")]),
    st.text(max_size=20),
    st.sampled_from(["", "nan", "-1", "1e999", "true", "null", "kg_query"]),
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)


def config_class(stage):
    module, name = STAGES[stage].config.split(":")
    return getattr(importlib.import_module(module), name)


def fields_of(model, above=()):
    """Dotted places of all fields, those of nested models among them."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        annotation = field.annotation
        options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        for inner in options:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from fields_of(inner, (*above, name))


PLACES = [(stage, place) for stage in STAGES for place in fields_of(config_class(stage))]


def test_all_stages_have_fields():
    assert len(PLACES) > 100


@pytest.mark.parametrize("stage, place", PLACES, ids=lambda one: ".".join(one) if isinstance(one, tuple) else one)
@given(value=st.one_of(LEAVES, ANYTHING))
@DRAWN
def test_every_field_of_a_configuration(stage, place, value):
    """What is taken can be written as JSON and read again; what is refused is named."""
    values = value
    for name in reversed(place):
        values = {name: values}
    try:
        taken = parse_config(config_class(stage), values, "the configuration")
    except InputError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert place[0] in refused
        assert "known keys: " in refused
        return
    plain = json.loads(json.dumps(taken.model_dump(mode="json"), allow_nan=False))
    assert parse_config(config_class(stage), plain, "the same") == taken


@given(
    stage=st.one_of(st.sampled_from([*STAGES, "", "stages"]), st.text(max_size=8)),
    key=st.one_of(st.sampled_from(["steps", "dense.steps", "dense.steps.more", ".", ""]), st.text(max_size=8)),
    value=st.one_of(
        st.text(max_size=20), st.sampled_from(["[", "{a: b", "1", "!!python/object:os.system", "@", "2001-01-01"])
    ),
)
@settings(DRAWN, max_examples=300)
def test_every_setting_of_the_command_line(stage, key, value):
    with suppress(InputError):
        profiles.resolve(profiles.override(profiles.load("micro"), [f"{stage}.{key}={value}"]))


# -- the command line ------------------------------------------------------------------------------------------------

RUNS = "RUNS"  # stands for a folder that another run holds
# by command: arguments with which it would go as far as it gets without a server, a cluster or the runs folder
COMMANDS = {
    ("run",): ["--profile", "micro", "--runs", RUNS],
    ("compile",): ["--profile", "nothing", "--output", "OUTPUT"],
    ("submit",): ["--profile", "micro", "--endpoint", "CLOSED"],
    ("schedule", "set"): ["nightly", "--cron", "0 0 3 * * *", "--profile", "micro", "--endpoint", "CLOSED"],
    ("schedule", "list"): ["--endpoint", "CLOSED"],
    ("schedule", "remove"): ["nightly", "--endpoint", "CLOSED"],
    ("serve",): ["--runs", RUNS],
    ("verify",): ["champion", "--runs", RUNS],
    ("release",): ["values.yaml", "--runs", RUNS],
    ("backup",): ["OUTPUT", "--runs", RUNS],
    ("restore",): ["OUTPUT", "--runs", RUNS],
    ("replay",): ["latest", "1", "--runs", RUNS],
    ("doctor",): [],
    ("drill",): ["--profile", "nothing", "--output", "OUTPUT"],
    ("runs", "list"): ["--runs", RUNS],
    ("runs", "show"): ["--runs", RUNS],
    ("runs", "compare"): ["a", "b", "--runs", RUNS],
    ("runs", "rm"): ["a", "--runs", RUNS],
    ("gc",): ["--runs", RUNS],
    ("ui",): ["--runs", RUNS],
}
FLAGS = {
    "--rehearse",
    "--commit",
    "--upload",
    "--wait",
    "--champion",
    "--cache",
    "--cluster",
    "--delete",
    "--all",
    "--help",
}
# a folder or file of any name would be made there, or a server be looked for at any address
ELSEWHERE = {"--runs", "--output", "--store", "--endpoint", "--host"}


def options_of():
    import typer

    for path in COMMANDS:
        command = typer.main.get_command(cli.app)
        for name in path:
            command = command.commands[name]
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option not in FLAGS | ELSEWHERE:
                    yield path, option


def test_every_command_is_among_these():
    import typer

    root = typer.main.get_command(cli.app)
    found = {
        (name, *inner)
        for name, command in root.commands.items()
        for inner in ([(more,) for more in command.commands] if hasattr(command, "commands") else [()])
    }
    assert found == {*COMMANDS, ("profiles",)}


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """What stands for the capitals in `COMMANDS`."""
    folder = tmp_path_factory.mktemp("any_input")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch, only_run(folder / "runs"):
        for name in ("KFP_ENDPOINT", "MLFLOW_TRACKING_URI", "SPARSELINE_STORE", "KUBECONFIG"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.chdir(folder)
        yield {
            RUNS: str(folder / "runs"),
            "OUTPUT": str(folder / "output"),
            "CLOSED": f"http://127.0.0.1:{port}",
        }


@pytest.mark.parametrize(
    "path, option", list(options_of()), ids=lambda one: " ".join(one) if isinstance(one, tuple) else one
)
@given(
    value=st.one_of(
        st.text(max_size=12), st.sampled_from(["", "-1", "0", "nan", "1e999", "\x00", "\ud800", "☃", "x" * 3000])
    )
)
@DRAWN
def test_every_option(surroundings, capsys, path, option, value):
    arguments = [surroundings.get(one, one) for one in COMMANDS[path]]
    with pytest.raises(SystemExit) as ended:
        cli.main([*path, *arguments, f"{option}={value}"])
    told = capsys.readouterr().err
    assert ended.value.code in (0, 2), told
    assert "Traceback" not in told
    assert ended.value.code == 0 or len(told) > 20
