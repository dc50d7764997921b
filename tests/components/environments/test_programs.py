"""Programs of `internal_api`, run in the real sandbox."""

import pytest

from components.environments.internal_api import runner
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
