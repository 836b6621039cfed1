"""``falcon-hf demo``: one prompt answered twice, by plain ``generate()`` and with Falcon, and the two compared."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from ..metrics import difference_gap, first_difference
from .answer import Answer, answer, encode
from .console import AUTO, DTYPE_HELP, fail, parse_dtype, print_json, quiet, set_threads, stderr, stdout
from .loading import DEMO, find_demo_drafter, load_drafter, load_target, require_repo
from .wrapping import WordWrapper

DEFAULT_PROMPT = "Explain in a few simple sentences why the sky is blue."
_WARM_UP_TOKENS = 12
# Rounding units, see ``metrics.difference_gap``: beyond these a difference is not a tie.
_TIE_UNITS = 8.0


def demo(
    prompt: Annotated[str, typer.Option(help="What to ask.")] = DEFAULT_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Another drafter: Hub repo or folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Answer a prompt with plain generate() and with Falcon.

    SmolLM2-135M-Instruct and its drafter, greedy, on the CPU: the same text, sooner. The first run fetches the model.

    Example: falcon-hf demo --prompt "Write a haiku about a falcon." --threads 2
    """
    torch_dtype = parse_dtype(dtype, torch.device("cpu"))
    dtype = str(torch_dtype).removeprefix("torch.")
    if not prompt.strip():
        fail("The prompt is empty.")
    used_threads = set_threads(threads)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    with quiet():
        name = find_demo_drafter() if drafter is None else require_repo(drafter, "drafter")
        # A line, no spinner: the first load shows the progress of pip and others.
        stderr.print("Loading SmolLM2-135M-Instruct and its drafter ...", style="dim")
        target, tokenizer = load_target(DEMO, torch_dtype)
        helper = load_drafter(name, target)
        inputs = encode(tokenizer, prompt)
        for used in (None, helper):  # the first calls pay for what later ones find ready
            answer(target, tokenizer, inputs, used, **options | {"max_new_tokens": _WARM_UP_TOKENS})
        if as_json:
            plain, falcon = (answer(target, tokenizer, inputs, used, **options) for used in (None, helper))
        else:
            stdout.print(f"[bold]{escape(prompt)}[/]", soft_wrap=True)
            plain = _streamed("generate()", target, tokenizer, inputs, None, options)
            falcon = _streamed("generate(assistant_model=drafter)", target, tokenizer, inputs, helper, options)
        verdict = _compare(plain, falcon, target, tokenizer, inputs)
    if as_json:
        settings = {"prompt": prompt, "drafter": name, "dtype": dtype, "threads": used_threads}
        print_json(settings | _as_dict(plain, falcon) | verdict)
    else:
        _show(plain, falcon, verdict, f"{dtype}, {used_threads} CPU thread{'s' * (used_threads > 1)}")


def _streamed(title: str, target: Any, tokenizer: Any, inputs: Any, drafter: Any, options: dict[str, Any]) -> Answer:
    """Answer under a rule with ``title``, word by word."""
    stdout.print(Rule(f"[dim]{title}[/]", style="dim", align="left"))
    wrapper = WordWrapper(stdout.file, stdout.width)
    result = answer(target, tokenizer, inputs, drafter, wrapper.write, **options)
    wrapper.end()
    return result


def _compare(
    plain: Answer, falcon: Answer, target: Any, tokenizer: Any, inputs: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Whether the texts are identical; if not, where they part, with what, and how near a tie that was."""
    place = first_difference(plain.ids, falcon.ids)
    if place is None:
        return {"identical": True, "first_difference": None}
    one, other = ((*ids, None)[place] for ids in (plain.ids, falcon.ids))  # None: that text is over
    difference: dict[str, Any] = {"token": place + 1}
    difference |= {"plain": _spelled(tokenizer, one), "falcon": _spelled(tokenizer, other)}
    if one is not None and other is not None:
        before = torch.cat((inputs["input_ids"], torch.tensor([plain.ids[:place]], dtype=torch.long)), dim=1)
        gap = difference_gap(target, before, one, other)
        difference |= {"logit_gap": gap.gap, "rounding_units": gap.units}
    return {"identical": False, "first_difference": difference}


def _spelled(tokenizer: Any, token: int | None) -> str:
    return "the end" if token is None else tokenizer.decode([token])


def _as_dict(plain: Answer, falcon: Answer) -> dict[str, Any]:
    """The figures of the demo as JSON values."""
    assert falcon.statistics is not None
    figures = {
        name: {
            "text": result.text,
            "new_tokens": len(result.ids),
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
        }
        for name, result in (("plain", plain), ("falcon", falcon))
    }
    figures["falcon"]["statistics"] = falcon.statistics.as_dict()
    return {**figures, "speedup": falcon.tokens_per_second / plain.tokens_per_second}


def _show(plain: Answer, falcon: Answer, verdict: dict[str, Any], where: str) -> None:
    """The figures as a table, and the verdict on the texts below it."""
    assert falcon.statistics is not None
    statistics = falcon.statistics
    speedup = falcon.tokens_per_second / plain.tokens_per_second
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for heading in ("", "tokens/s", "speedup", "tau", "with bonus", "alpha"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("plain", f"{plain.tokens_per_second:.1f}", "1.00", "", "1.00", "")
    table.add_row(
        "[bold]Falcon[/]",
        f"[bold]{falcon.tokens_per_second:.1f}[/]",
        f"[bold]{speedup:.2f}[/]",
        f"{statistics.tau:.2f}",
        f"{statistics.tau_with_bonus:.2f}",
        f"{statistics.alpha:.2f}",
    )
    stdout.print(Rule(style="dim"))
    stdout.print(table)
    if statistics.rounds:
        draft, verify, other = (
            1000 * seconds / statistics.rounds
            for seconds in (statistics.draft_seconds, statistics.verify_seconds, statistics.other_seconds)
        )
        stdout.print(
            f"[dim]{statistics.rounds} rounds of {draft + verify + other:.0f} ms: "
            f"draft {draft:.0f}, verify {verify:.0f}, other {other:.1f}. {where}.[/]"
        )
    stdout.print(_sentence(len(falcon.ids), verdict, where))


def _sentence(tokens: int, verdict: dict[str, Any], where: str) -> str:
    """The verdict on the texts, in words."""
    if verdict["identical"]:
        return f"[green]The two texts are identical[/], all {tokens} tokens."
    difference = verdict["first_difference"]
    parted = (
        f"The texts part at token {difference['token']}: {difference['plain']!r} without the drafter, "
        f"{difference['falcon']!r} with it."
    )
    if where.startswith("float32") or difference.get("rounding_units", _TIE_UNITS + 1) > _TIE_UNITS:
        return f"[red]{escape(parted)}[/] That is no rounding tie: please report it."
    return (
        f"[yellow]{escape(parted)}[/] A tie: the two logits are {abs(difference['logit_gap']):.2g} apart, "
        "which is within the rounding of half precision."
    )
