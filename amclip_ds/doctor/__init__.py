"""What this machine has and what would fail here; and why a run does not learn. Each finding names its fix."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from amclip_ds.errors import AmclipError, in_one_line

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    name: str
    status: str
    """ok | warn | fail"""
    found: str
    fix: str = ""
    """what to do, where it is not ok"""

    def line(self) -> str:
        """For people."""
        fix = f" -> {self.fix}" if self.fix else ""
        return f"{self.status:<5} {self.name}: {self.found}{fix}"

    def json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


Check = Callable[[], Iterable[Finding]]


def findings(checks: dict[str, Check]) -> Iterator[Finding]:
    """What the checks find, in turn. One that breaks is itself a finding: a doctor must not die of the disease."""
    for name, check in checks.items():
        try:
            yield from check()
        except AmclipError as error:
            yield Finding(name, FAIL, str(error), "what the line says")
        except Exception as error:  # of whatever library is broken here
            yield Finding(name, FAIL, f"{type(error).__name__}: {in_one_line(error, 300)}", "reinstall what it names")
