"""What reports and cards call a measured run: its setting, how tokens were chosen, its processor.

All take what a result file notes under ``settings``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def stem_of_questions(settings: dict[str, Any]) -> str:
    """Name of the set of questions: its file's, without the ending."""
    return Path(settings["questions"]["file"]).stem


def setting_name(settings: dict[str, Any]) -> str:
    """Dtype, decoding and, where they are not one, batch and turns: ``bfloat16, greedy, batches of 4``."""
    batch, turns = settings.get("batch_size", 1), settings["questions"]["turns"]
    parts = [settings["target"]["dtype"], decoding_name(settings["options"])]
    parts += [f"batches of {batch}"] if batch > 1 else []
    parts += [turns_name(turns)] if turns > 1 else []
    return ", ".join(parts)


def decoding_name(options: dict[str, Any]) -> str:
    """How tokens are chosen, in words: ``greedy``, ``temperature 0.7, top_p 0.9``."""
    ruled_out = ("do_sample", "max_new_tokens", "temperature")
    others = [f"{name} {value}" for name, value in options.items() if name not in ruled_out]
    first = f"temperature {options.get('temperature', 'as configured')}" if options.get("do_sample") else "greedy"
    return ", ".join([first, *others])


def turns_name(count: int) -> str:
    """Which turns of the dialogues were run, ``count`` at most."""
    return "first turns" if count == 1 else f"up to {count} turns"


def processor_name(machine: dict[str, Any]) -> str:
    """Name of a noted machine's CPU and, where noted, the widest instructions that torch uses there.

    Two processors of one name may differ in these, and a bfloat16 run without AVX-512 is another thing.
    """
    capability = machine.get("cpu_capability")
    return machine["cpu"] + (f" ({capability})" if capability else "")
