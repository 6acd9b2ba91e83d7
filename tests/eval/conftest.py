import socket
from pathlib import Path

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("eval must not touch the network")

    connect = socket.socket.connect

    def only_here(self, address):  # the fork server of tests.processes listens on a file
        return connect(self, address) if self.family == socket.AF_UNIX else refuse()

    monkeypatch.setattr(socket.socket, "connect", only_here)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    """Real 8x8 digits: uint8 images (1497, 8, 8, 1) and labels (1497,)."""
    with np.load(REPO / "ditmoe" / "data_files" / "digits.npz") as arrays:
        return arrays["train_images"][..., None], arrays["train_labels"]
