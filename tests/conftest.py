import logging
import warnings

import pytest
import torch

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture(autouse=True)
def _fixed_seed_and_default_dtype_left_alone():
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype


@pytest.fixture
def float64():
    """The default dtype of a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
