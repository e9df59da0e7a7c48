import pytest
from tiny_towers import make_inputs


@pytest.fixture(scope="package")
def inputs():
    """Three images and three captions, which no test changes."""
    return make_inputs()
