import pytest
import torch
from runs import write_dataset

import train

torch.set_num_threads(1)  # the tensors of the tests are small: more threads only wait for each other


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(autouse=True, scope="session")
def no_estimate():
    """The only forwards of a run are those of iterations and evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "estimate", lambda run: "soon")
        yield
