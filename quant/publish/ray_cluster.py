"""Jobs on a Ray cluster: Ray places them by cores and memory, and gives those of a dead node to another one."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import QuantError, printable
from ..units import GIB
from . import node as on_node
from .job import Job, Result, failed
from .processes import OnProgress, OnResults
from .worker import PACK

_RETRIES = 5
_SECONDS_FOR_FAULTS = 120
_SECONDS_TO_CONNECT = 20


class RayCluster:
    """A Ray cluster to which this process is connected, and what is wrong with its nodes."""

    def __init__(self, ray: ModuleType, address: str, seen: Sequence[Path], token: tuple[Path, str]) -> None:
        """Ask every node whether it can help.

        Args:
            seen: files that every node must see.
            token: a file in the folder of the results, and its text.

        Raises:
            QuantError: no node can help.
        """
        self._ray = ray
        ray.cloudpickle.register_pickle_by_value(on_node)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        faults = self._faults(nodes, seen, token)
        self.warnings = [
            printable(f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]}) {faults[node['NodeID']]}")
            for node in nodes
            if faults[node["NodeID"]]
        ]
        """A sentence for each node that cannot help."""
        self._fit = {node["NodeID"]: node["Resources"] for node in nodes if not faults[node["NodeID"]]}
        if not self._fit:
            first = self.warnings[0] if self.warnings else "it has no node with cores; start one"
            raise QuantError(f"Ray cluster {address}: no node can help: {first}")

    @property
    def cores(self) -> int:
        """The cores of all nodes that can help."""
        return sum(self._cores_of_nodes)

    @property
    def _cores_of_nodes(self) -> list[int]:
        return [int(resources["CPU"]) for resources in self._fit.values()]

    def run(self, jobs: Sequence[Job], on_progress: OnProgress, on_results: OnResults) -> None:
        """Make jobs, the first of them first; see `run_in_processes`."""
        ray = self._ray
        threads = max(1, min(self.cores // max(1, len(jobs)), *self._cores_of_nodes))
        board = ray.remote(on_node.Board).options(num_cpus=0, max_restarts=-1).remote()
        numbers: dict[Any, int] = {}
        for number, job in enumerate(jobs):
            teller = on_node.Teller(board, number)
            task = self._remote(on_node.make_on_node, threads, job.memory)
            numbers[task.remote(str(PACK), job.json(), threads, teller)] = number
        slots: dict[int, int] = {}
        while numbers:
            ready, waiting = ray.wait(list(numbers), timeout=on_node.SECONDS_BETWEEN)
            with suppress(ray.exceptions.RayError):
                for number, (done, total, name) in ray.get(board.news.remote(), timeout=10).items():
                    slot = slots.setdefault(number, min(set(range(len(slots) + 1)) - set(slots.values())))
                    on_progress(slot, done, total, f"{jobs[number].source.name} {name}")
            for task in ready:
                number = numbers.pop(task)
                slots.pop(number, None)
                on_results(self._results(task, jobs[number]))
            memory = self._largest_memory()
            for task in waiting:
                if (job := jobs[numbers[task]]).memory > memory:  # Ray would wait for such a node for ever
                    ray.cancel(task)
                    slots.pop(numbers.pop(task), None)
                    on_results(failed(job, _without_node(job, memory)))

    def _largest_memory(self) -> float:
        """Return the bytes of the largest node that can help, of those that are left; 0 without one."""
        left = (node["NodeID"] for node in self._ray.nodes() if node["Alive"])
        return max((self._fit[name].get("memory", 0.0) for name in left if name in self._fit), default=0.0)

    def _remote(self, function: Any, cores: int, memory: int) -> Any:  # noqa: ANN401
        # Nodes that join later were not asked whether they can help.
        selector = {"ray.io/node-id": f"in({','.join(self._fit)})"}
        remote = self._ray.remote(function)
        try:
            return remote.options(num_cpus=cores, memory=memory, max_retries=_RETRIES, label_selector=selector)
        except (TypeError, ValueError) as error:
            raise QuantError(
                f"Ray {self._ray.__version__}: cannot choose nodes ({error}); pip install --upgrade ray on all of them"
            ) from None

    def _results(self, task: Any, job: Job) -> Sequence[Result]:  # noqa: ANN401
        try:
            return [Result.from_json(result) for result in self._ray.get(task)]
        except self._ray.exceptions.TaskUnschedulableError:
            return failed(job, _without_node(job))
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            return failed(job, f"{job.source}: Ray gave up after {_RETRIES} more tries ({reason:.200}); start it again")

    def _faults(
        self, nodes: Sequence[Mapping[str, Any]], seen: Sequence[Path], token: tuple[Path, str]
    ) -> dict[str, str]:
        """Return what is wrong with each node, by its ID; an empty text for nothing."""
        expected = {
            "pack": str(PACK),
            "digest": on_node.digest_of_code(str(PACK)),
            "versions": on_node.versions_of_libraries(),
            "files": [(str(path), path.stat().st_size) for path in seen],
            "token": (str(token[0]), token[1]),
        }
        affinity = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        ask = self._ray.remote(on_node.fault_of_node)
        asked = {
            node["NodeID"]: ask.options(num_cpus=0, scheduling_strategy=affinity(node["NodeID"], soft=False))
            for node in nodes
        }
        answers = {name: task.remote(expected) for name, task in asked.items()}
        faults = {}
        for name, answer in answers.items():
            try:
                faults[name] = str(self._ray.get(answer, timeout=_SECONDS_FOR_FAULTS))
            except self._ray.exceptions.RayError as error:
                faults[name] = f"does not answer ({str(error).strip().splitlines()[-1]:.200}); start it again"
        return faults


def _without_node(job: Job, memory: float = 0) -> str:
    """Return why no node can make a job, given the memory in bytes of the largest one that is left."""
    if not memory:
        return f"{job.source}: no node is left that can help; start one, and then the same command again"
    needed = f"needs {job.memory / GIB:.2f} GiB of memory"
    return f"{job.source}: {needed}, the largest node has {memory / GIB:.2f} GiB; add a larger one"


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connect to a Ray cluster, without usage statistics and dashboard.

    Args:
        address: HOST:PORT, `auto` for the cluster that this machine belongs to, or `local` for one of this machine.

    Raises:
        QuantError: Ray is not installed, or there is no cluster.
    """
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.util.scheduling_strategies")
    except ImportError as error:
        raise QuantError(f"Ray cannot be imported ({error}); pip install ray, or leave out --ray") from None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own = {"include_dashboard": False} if address == "local" else {}
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray tries for minutes
            socket.create_connection((host, int(port)), _SECONDS_TO_CONNECT).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QuantError(
            f"Ray cluster {address}: cannot be reached ({reason:.200}); start it with `ray start`, or check the address"
        ) from None
    try:
        with redirect_stdout(sys.stderr):  # on which Ray shows the log of a node that dies
            yield ray
    finally:
        ray.shutdown()
