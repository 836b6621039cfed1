"""What the commands share: consoles, one-line errors, quiet libraries, and the options that several have.

Text and JSON go to standard output, everything else to standard error. A problem the user can solve is one line
there and exit code 2. Loading of models is in ``loading.py``.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import typer
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..runtime.half_precision import multiplies_fast

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
DTYPE_HELP = "float32, bfloat16, float16, or auto: bfloat16 where the device multiplies it fast, else float32."
_LONGEST_LINE = 400


def pipe_utf8() -> None:
    """Make standard output UTF-8 unless it is a terminal: on Windows a pipe has a code page that lacks most letters."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", errors=sys.stdout.errors)


def fail(message: str) -> NoReturn:
    """Print ``error: message`` as one line on standard error and leave with exit code 2."""
    stderr.print(f"[bold red]error:[/] {escape(one_line(message))}", soft_wrap=True)
    raise typer.Exit(2)


def warn(message: str) -> None:
    """Print ``warning: message`` as one line on standard error."""
    stderr.print(f"[yellow]warning:[/] {escape(one_line(message))}", soft_wrap=True)


def one_line(message: str) -> str:
    """``message`` on one line; of a long one, its first line."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()] or ["unknown error"]
    whole = " ".join(lines)
    return whole if len(whole) <= _LONGEST_LINE else lines[0]


def print_json(value: dict[str, Any]) -> None:
    """Print ``value`` as JSON, and nothing else, on standard output."""
    stdout.file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block: no chatter or weight-loading bars of the libraries, and our own warnings as one line each."""
    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    # Other libraries' deprecations are for their developers. By name: a drafter's remote code has its own class.
    if category.__name__ in ("TargetMismatchWarning", "CodeStampWarning"):
        warn(str(message))


def parse_dtype(name: str, device: torch.device | None = None, option: str = "--dtype") -> torch.dtype:
    """A dtype by its name; for ``auto`` bfloat16 where ``device`` multiplies it fast, else float32.

    Any other name ends the command. Without a device ``auto`` is no name.
    """
    if name == AUTO and device is not None:
        return torch.bfloat16 if multiplies_fast(device, torch.bfloat16) else torch.float32
    if name not in DTYPES:
        names = [AUTO] * (device is not None) + list(DTYPES)
        fail(f"{option} must be one of {', '.join(names)}, got {name!r}.")
    return DTYPES[name]


def parse_device(name: str | None) -> torch.device:
    """A torch device; for None CUDA if there is one, else the CPU. A bad or absent device ends the command."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device  # asks the device itself
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name!r} cannot be used: {error}")


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers of a comma-separated list; anything else ends the command with the option's name."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        fail(f"{option} is a comma-separated list of whole numbers, got {text!r}.")


def parse_named_values(texts: list[str], option: str) -> dict[str, Any]:
    """Values of a repeated ``NAME=JSON`` option by name; anything else ends the command with the option's name."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            fail(f"{option} is NAME=JSON, such as min_p=0.1, got {text!r}.")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            fail(f"{option} {name}: {value!r} is not JSON (a string needs double quotes).")
    return values


def set_attention(target: PreTrainedModel, name: str | None) -> None:
    """Give a target the attention implementation of ``--attention`` (None: leave it); a bad name ends the command."""
    if name is None:
        return
    try:
        target.set_attn_implementation(name)
    except (ValueError, ImportError, KeyError) as error:
        fail(f"--attention {name!r} cannot be used: {error}")


def refuse_options(command: typer.Context, names: Collection[str], why: str) -> None:
    """End the command if any of these options was given: it would be silently ignored.

    Args:
        command: the running command's context.
        names: parameter names, such as ``check_prompts``.
        why: ends the message behind the options' names, such as "needs --check".
    """
    given = [
        parameter.opts[0]
        for parameter in command.command.params
        if parameter.name in names
        and getattr(command.get_parameter_source(parameter.name), "name", None) not in (None, "DEFAULT", "DEFAULT_MAP")
    ]
    if given:
        fail(f"{', '.join(given)}: {why}.")


def set_threads(threads: int | None) -> int:
    """Give torch ``threads`` CPU threads (None: leave them) and return how many it has."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
