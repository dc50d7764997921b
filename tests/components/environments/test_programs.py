"""Programs of `internal_api`, run in the real sandbox."""

import random

import pytest

from components.environments.internal_api import runner
from components.environments.internal_api.library import NAMES, build_library, chain
from components.environments.internal_api.programs import code_words, programs
from components.environments.sandbox import Sandbox, SandboxLimits
from tests.components.environments.marks import runs_code

pytestmark = runs_code


def test_a_program_that_a_busy_machine_made_late_is_tried_again(monkeypatch):
    library = "import time\n\ndef wait():\n    time.sleep(1)\n    return 7\n"
    for seconds, said in ((0.05, "error time"), (60.0, "7")):
        box = Sandbox(SandboxLimits(wall_seconds=seconds, cpu_seconds=1, memory_bytes=128 << 20))
        monkeypatch.setattr(runner, "_SANDBOX", box)
        assert runner.run_program(library, "print ( wait ( ) )") == said
        box.close()


@pytest.mark.parametrize("number", range(4))
def test_a_program_that_computes_too_long_is_out_of_time(number):
    """Several, because the kernel ends them a tick before or after the second is full."""
    assert runner.run_program(f"def spin():\n    while True: {number}\n", "spin ( )") == "error time"


def test_programs_of_the_scripted_players_print_the_same_in_this_process_as_in_the_sandbox():
    rng = random.Random(0)
    heard = set()
    for program in rng.sample([*programs(1), *programs(2)], 12):
        library = build_library(rng.getrandbits(48), program.path, program.traps)
        right = [one.name for one in chain(library, program.path)]
        for names in (right, right[::-1], [rng.choice(NAMES)], rng.sample(sorted(library.functions), 2)):
            words = code_words(names, rng.randrange(100))
            said = runner.run_program(library.source, words)
            assert runner.run_trusted(library.source, words) == said, words
            heard.add(said)
        assert runner.run_trusted(library.source, "x = ;") == runner.run_program(library.source, "x = ;")
    assert "error program" in heard
    assert len(heard) > 10
