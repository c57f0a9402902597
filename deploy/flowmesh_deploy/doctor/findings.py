"""One finding of one check, in words for people and fields for scripts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad it is: ``warn`` will hurt some day or after a further fault, ``fail`` hurts now or breaks a promise."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


_ORDER = (Severity.OK, Severity.WARN, Severity.FAIL)


@dataclass(frozen=True)
class Finding:
    """What a check found; ``why`` and ``mend`` are empty where all is well."""

    check: str
    severity: Severity
    finding: str
    why: str = ""
    mend: str = ""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the severity of the worst finding."""
    return max((finding.severity for finding in findings), key=_ORDER.index, default=Severity.OK)
