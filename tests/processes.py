"""Processes for the tests, forked from one that has everything imported, and ranks of them."""

import datetime
import multiprocessing
import os
import runpy
import socket
import sys

import torch
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_run", "test_zimage", "zimage.precompute", "zimage.rehearse"])


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


def command(words, told):
    """What `python WORDS` does. told: what torchrun tells a rank."""
    os.environ.update(told)
    sys.argv = words[words[0] in ("-m", "-c") :]
    if words[0] == "-c":
        exec(words[1], {})
    run = runpy.run_module if words[0] == "-m" else runpy.run_path
    run(sys.argv[0], run_name="__main__")


def forked(gpus, words, log):
    """What `python WORDS` prints on so many ranks, as under torchrun; it goes to the end of log."""
    ranks, words, text = [], [*map(str, words)], ""
    with socket.create_server(("localhost", 0)) as free:
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    for k in range(gpus):
        told = {**place, "RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": str(gpus)}
        ranks.append(Child(log.with_name(f"{log.name}-{k}"), command, words, told))
    for process in ranks:
        code, printed = process.ended()
        assert code == 0, printed
        text += printed
        process.log.unlink()
    with open(log, "a") as file:
        file.write(text)
    return text
