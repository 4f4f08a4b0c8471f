"""The share of a run's time that it waits for data is measured in the loader alone."""

import time

import pytest
from torch.utils.data import Dataset

from vlm_tune.data.datamodule import TimedLoader


class SlowRows(Dataset):
    """Rows that take a while to read."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 5

    def __getitem__(self, row):
        time.sleep(self.seconds)
        return row


@pytest.mark.parametrize("workers", [0, 2])
def test_waiting_is_the_time_in_the_loader_and_not_what_the_run_does_between(workers):
    loader = TimedLoader(SlowRows(0.05), batch_size=None, num_workers=workers)
    start = time.perf_counter()
    rows = []
    for row in loader:
        rows.append(row)
        time.sleep(0.1)  # a step, a validation
    everything = time.perf_counter() - start
    assert rows == list(range(5))
    assert loader.seconds_waited <= everything - 5 * 0.1
    assert workers > 0 or loader.seconds_waited >= 5 * 0.05
