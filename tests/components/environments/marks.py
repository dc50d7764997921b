"""Marks that several tests of environments carry."""

import pytest

from components.environments.sandbox import refusal

runs_code = pytest.mark.skipif(bool(refusal()), reason="this kernel refuses the sandbox's namespaces")
