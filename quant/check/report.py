"""The report of a check of the installation: what was tried, what came of it, and what would make it faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import QuantError, printable, printable_lines
from ..units import counted

_HELP = "update WanQuant, and if that does not help, report this message with the version of ComfyUI and PyTorch"


@dataclass(frozen=True)
class Finding:
    """What a part of the check found: a sentence, and a sentence for each thing that would make the pack faster."""

    text: str
    faster: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A part of the check that ran."""

    name: str
    text: str
    """What was found, or what failed and what to do."""
    ok: bool = True
    faster: tuple[str, ...] = ()


Part = tuple[str, Callable[[], Finding]]
"""The name of a part of the check, and the function that runs it and raises if it fails."""


def run_parts(parts: Sequence[Part]) -> Iterator[Step]:
    """Run the parts in turn and yield a step for each; a part that fails is the last, as the others need it."""
    for name, run in parts:
        try:
            found = run()
        except QuantError as error:
            yield Step(name, str(error), ok=False)
            return
        # A broken installation may raise anything, and the check exists to say so in a sentence.
        except Exception as error:  # noqa: BLE001
            reason = str(error).partition("\n")[0]
            yield Step(name, printable(f"{type(error).__name__}: {reason}; {_HELP}"), ok=False)
            return
        yield Step(name, found.text, faster=found.faster)


@dataclass
class CheckReport:
    """The steps of a check, and what it could not check."""

    steps: list[Step] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    """A sentence each, with what to do."""

    @property
    def ok(self) -> bool:
        return all(step.ok for step in self.steps)

    @classmethod
    def from_json(cls, content: Any) -> CheckReport:  # noqa: ANN401
        """Return the report of another process, from the result of its `json`."""
        steps = [Step(s["name"], s["text"], s["ok"], tuple(s["faster"])) for s in content["steps"]]
        return cls(steps, list(content["not_checked"]))

    def name_skipped(self, parts: Sequence[Part]) -> None:
        """Say which of these parts did not run, because one before them failed."""
        ran = {step.name for step in self.steps}
        if skipped := [name for name, _ in parts if name not in ran]:
            self.not_checked.append(f"{', '.join(skipped)}: not run after a failure; solve it first")

    def text(self) -> str:
        """Return the report: a summary, what to do, and then what is fine."""
        failed = [step for step in self.steps if not step.ok]
        faster = [text for step in self.steps for text in step.faster]
        checks = counted(len(self.steps), "check")
        lines = [f"WanQuant: {len(failed)} of {checks} failed" if failed else f"WanQuant: {checks} passed"]
        lines += [f"FAILED {step.name}: {step.text}" for step in failed]
        lines += [f"not checked: {text}" for text in self.not_checked]
        lines += [f"faster: {text}" for text in faster]
        if not (failed or self.not_checked or faster):
            lines.append("nothing is missing for more speed")
        lines += [f"ok {step.name}: {step.text}" for step in self.steps if step.ok]
        return printable_lines(lines)

    def json(self) -> dict[str, Any]:
        return {"ok": self.ok, "steps": [asdict(step) for step in self.steps], "not_checked": self.not_checked}
