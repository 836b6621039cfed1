"""What reports and cards call the processor of a machine that a result was measured on."""

from __future__ import annotations

from typing import Any


def processor_name(machine: dict[str, Any]) -> str:
    """Name of a noted machine's CPU and, where noted, the widest instructions that torch uses there.

    Two processors of one name may differ in these, and a bfloat16 run without AVX-512 is another thing.
    """
    capability = machine.get("cpu_capability")
    return machine["cpu"] + (f" ({capability})" if capability else "")
