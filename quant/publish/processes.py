"""Jobs in worker processes of this machine."""

from __future__ import annotations

import json
import os
import queue
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from .job import Job, Result, failed
from .worker import COMMAND

OnProgress = Callable[[int, int, int, str], None]
"""Takes the number of the worker, the source bytes done, all source bytes and what it works on."""
OnResults = Callable[[Sequence[Result]], None]
_TRIES = 2


def run_in_processes(
    jobs: Sequence[Job], workers: int, threads: int, on_progress: OnProgress, on_results: OnResults
) -> None:
    """Make jobs in worker processes.

    Args:
        jobs: in the order in which they begin.
        workers: the number of processes.
        threads: of each process.
        on_progress: is called in the threads that listen to the workers.
        on_results: is called with the results of each job, in the thread of the caller.
    """
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    crew = [_Worker(number, threads, on_progress) for number in range(min(workers, len(jobs)))]
    for worker in crew:
        idle.put(worker)

    def make(job: Job) -> Sequence[Result]:
        worker = idle.get()
        try:
            return worker.make(job)
        except BaseException:
            worker.end()  # what it has yet to say would be taken for the next job's
            raise
        finally:
            idle.put(worker)  # whatever happens: the next job waits for a worker

    with ThreadPoolExecutor(max(1, len(crew))) as pool:
        try:
            for future in as_completed([pool.submit(make, job) for job in jobs]):
                on_results(future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in crew:
                worker.end()


class _Worker:
    """A process that makes one job after another, and is replaced when it dies."""

    def __init__(self, number: int, threads: int, on_progress: OnProgress) -> None:
        self._number, self._threads, self._on_progress = number, threads, on_progress
        self._process: subprocess.Popen[str] | None = None
        self._is_ended = False

    def end(self) -> None:
        """End the process, which leaves an unfinished file for the next run."""
        self._is_ended = True
        if self._process:
            self._process.kill()
            self._process.wait()

    def make(self, job: Job) -> Sequence[Result]:
        """Return what became of each file of a job, whatever happens to the process."""
        for _ in range(_TRIES):
            try:
                results = self._asked(job)
            except OSError as error:
                return failed(job, f"{job.source}: no process can be started ({error.strerror}); close other programs")
            if results is not None or self._is_ended:
                break
        if results is not None:
            return results
        code = self._process.wait() if self._process else None
        return failed(
            job,
            f"{job.source}: its process ended {_TRIES} times, at last with exit code {code}, as it does when memory"
            " is short; use fewer workers, or close other programs",
        )

    def _asked(self, job: Job) -> Sequence[Result] | None:
        """Return the results of a job, or None if the process died."""
        if self._is_ended:
            return None
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "PYTHONIOENCODING": "utf-8"}
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env=environment,
            )
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"job": job.json(), "threads": self._threads}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in self._process.stdout:
            said = json.loads(line)
            if "results" in said:
                return [Result.from_json(result) for result in said["results"]]
            done, total, name = said["progress"]
            self._on_progress(self._number, done, total, f"{job.source.name} {name}")
        self._process.wait()
        return None
