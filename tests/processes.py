"""Processes for the tests, forked from one that has everything imported, and ranks of them."""

import datetime
import multiprocessing
import os
import sys

import torch
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")


class Child(FORKS.Process):
    """A process that prints into a file and ends with what `work(*args)` returns."""

    def __init__(self, log, work, *args):
        super().__init__(target=Child.begin, args=(log, work, args), daemon=True)
        self.log = log
        self.start()

    @staticmethod
    def begin(log, work, args):
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        sys.exit(work(*args))

    def ended(self):
        """(exit code, what it printed)."""
        self.join(300)
        return self.exitcode, self.log.read_text()


def as_rank(rank, size, folder, work, args):
    """One of `size` processes; one that waits in vain fails after a while."""
    meeting = f"file://{folder}/meeting-{work.__name__}-{size}"
    timeout = datetime.timedelta(seconds=120)
    options = {"init_method": meeting, "rank": rank, "world_size": size, "timeout": timeout}
    dist.init_process_group("gloo", **options)
    torch.save(work(rank, folder, *args), folder / f"{work.__name__}-{size}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def on_ranks(size, folder, work, *args):
    """What work(rank, folder, *args) returns on each of so many ranks."""
    logs = [folder / f"log-{rank}" for rank in range(size)]
    processes = [Child(log, as_rank, k, size, folder, work, args) for k, log in enumerate(logs)]
    for process in processes:
        code, printed = process.ended()
        assert code == 0, printed
    paths = [folder / f"{work.__name__}-{size}-{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) for path in paths]
