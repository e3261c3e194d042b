"""What all tests share. Nothing that they do leaves the folders that pytest makes for them."""

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: all is small, and threads would wait for each other
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mora-tests-")  # before train.py reads it

import pytest
import torch

@pytest.fixture(autouse=True)
def same_random_numbers_for_every_test():
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a traceback for each device that is not there
