"""What several test files need."""

import os

import pytest

from rebirth_caffe.engines.caffe import Caffe, find_caffe
from rebirth_caffe.errors import EngineError


@pytest.fixture(scope="session")
def caffe() -> Caffe:
    """Real Caffe. Where there is none the test is skipped, and fails in CI."""
    try:
        return find_caffe()
    except EngineError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
