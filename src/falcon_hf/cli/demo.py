"""``falcon-hf demo``: prompts answered twice each, by plain ``generate()`` and with Falcon, and the two compared."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from .answer import Answer, answer, encode
from .answer_pair import AnswerPair, compare
from .console import AUTO, DTYPE_HELP, fail, parse_dtype, print_json, quiet, set_threads, stderr, stdout
from .loading import DEMO, find_demo_drafter, load_drafter, load_target, require_repo
from .wrapping import WordWrapper

DEFAULT_PROMPTS = (
    "Explain in a few simple sentences why the sky is blue.",
    "Write a Python function that counts the vowels of a word.",
    "A bakery sells 24 rolls an hour. How many does it sell from 7 to 11 o'clock? Show your steps.",
)
_WARM_UP_TOKENS = 12
_SHOWN_OF_PROMPT = 28  # characters


def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to ask; may be given repeatedly. Three prompts by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 96,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Another drafter: Hub repo or folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Answer prompts with plain generate() and with Falcon.

    SmolLM2-135M-Instruct and its drafter, greedy, on the CPU: the same text, sooner. The first run fetches the model.

    Example: falcon-hf demo --prompt "Write a haiku about a falcon." --threads 2
    """
    torch_dtype = parse_dtype(dtype, torch.device("cpu"))
    dtype = str(torch_dtype).removeprefix("torch.")
    prompts = prompt or list(DEFAULT_PROMPTS)
    if not all(one.strip() for one in prompts):
        fail("A prompt is empty.")
    used_threads = set_threads(threads)
    with quiet():
        name = find_demo_drafter() if drafter is None else require_repo(drafter, "drafter")
        # A line, no spinner: the first load shows the progress of pip and others.
        stderr.print("Loading SmolLM2-135M-Instruct and its drafter ...", style="dim")
        target, tokenizer = load_target(DEMO, torch_dtype)
        helper = load_drafter(name, target)
        warm_up = encode(tokenizer, prompts[0])
        for used in (None, helper):  # the first calls pay for what later ones find ready
            answer(target, tokenizer, warm_up, used, max_new_tokens=_WARM_UP_TOKENS, do_sample=False)
        pairs = [_ask(one, target, tokenizer, helper, max_new_tokens, not as_json) for one in prompts]
    if as_json:
        settings = {"drafter": name, "dtype": dtype, "threads": used_threads}
        print_json(settings | {"speedup": _speedup(pairs), "answers": [pair.as_dict() for pair in pairs]})
    else:
        _show(pairs, dtype, used_threads)


def _ask(prompt: str, target: Any, tokenizer: Any, drafter: Any, max_new_tokens: int, shown: bool) -> AnswerPair:
    """Both answers to a prompt, streamed if they are ``shown``."""
    inputs = encode(tokenizer, prompt)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if shown:
        stdout.print(f"[bold]{escape(prompt)}[/]", soft_wrap=True)
        plain = _streamed("generate()", target, tokenizer, inputs, None, options)
        falcon = _streamed("generate(assistant_model=drafter)", target, tokenizer, inputs, drafter, options)
        stdout.print()
    else:
        plain, falcon = (answer(target, tokenizer, inputs, used, **options) for used in (None, drafter))
    return AnswerPair(prompt, plain, falcon, compare(plain, falcon, target, tokenizer, inputs))


def _streamed(title: str, target: Any, tokenizer: Any, inputs: Any, drafter: Any, options: dict[str, Any]) -> Answer:
    """Answer under a rule with ``title``, word by word."""
    stdout.print(Rule(f"[dim]{title}[/]", style="dim", align="left"))
    wrapper = WordWrapper(stdout.file, stdout.width)
    result = answer(target, tokenizer, inputs, drafter, wrapper.write, **options)
    wrapper.end()
    return result


def _speedup(pairs: list[AnswerPair]) -> float:
    """Of all prompts together: tokens per second over plain's, which tie by tie may have written other lengths."""
    plain, falcon = (
        sum(len(one.ids) for one in answers) / sum(one.seconds for one in answers)
        for answers in ([pair.plain for pair in pairs], [pair.falcon for pair in pairs])
    )
    return falcon / plain


def _show(pairs: list[AnswerPair], dtype: str, threads: int) -> None:
    """The figures as a table, a row a prompt, and the verdicts on the texts below it."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("prompt", no_wrap=True)
    for heading in ("plain\ntokens/s", "Falcon\ntokens/s", "speedup", "tau", "with\nbonus", "alpha"):
        table.add_column(heading, justify="right")
    for pair in pairs:
        statistics = pair.statistics
        table.add_row(
            escape(_shortened(pair.prompt)),
            f"{pair.plain.tokens_per_second:.1f}",
            f"{pair.falcon.tokens_per_second:.1f}",
            f"[bold]{pair.speedup:.2f}x[/]",
            f"{statistics.tau:.2f}",
            f"{statistics.tau_with_bonus:.2f}",
            f"{statistics.alpha:.2f}",
        )
    if len(pairs) > 1:
        table.add_row("together", "", "", f"[bold]{_speedup(pairs):.2f}x[/]", "", "", "")
    stdout.print(Rule(style="dim"))
    stdout.print(table)
    _show_rounds(pairs, f"{dtype}, {threads} CPU thread{'s' * (threads > 1)}")
    different = [pair for pair in pairs if pair.difference is not None]
    if different or len(pairs) == 1:
        for pair in different or pairs:
            asked = f"[dim]{escape(_shortened(pair.prompt))}[/] " if len(pairs) > 1 else ""
            stdout.print(asked + pair.sentence(half_precision=dtype != "float32"))
    else:
        tokens = sum(len(pair.falcon.ids) for pair in pairs)
        stdout.print(f"[green]Both texts of every prompt are identical[/], all {tokens} tokens.")


def _show_rounds(pairs: list[AnswerPair], where: str) -> None:
    """The mean round's time, part by part."""
    done = [pair.statistics for pair in pairs]
    if rounds := sum(one.rounds for one in done):
        draft, verify, other = (
            1000 * sum(getattr(one, f"{phase}_seconds") for one in done) / rounds
            for phase in ("draft", "verify", "other")
        )
        stdout.print(
            f"[dim]{rounds} rounds of {draft + verify + other:.0f} ms: "
            f"draft {draft:.0f}, verify {verify:.0f}, other {other:.1f}. {where}.[/]"
        )


def _shortened(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _SHOWN_OF_PROMPT else line[: _SHOWN_OF_PROMPT - 3].rstrip() + "..."
