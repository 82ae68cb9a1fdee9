"""Fixtures of the tests of lit_ft: the stand-ins for vLLM that a test starts, ended with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lit_ft.stub_vllm import Stubs


@pytest.fixture
def stubs() -> Iterator[Stubs]:
    made = Stubs()
    yield made
    for engine in made.engines:
        engine.stop()
