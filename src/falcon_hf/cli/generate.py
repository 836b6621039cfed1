"""``falcon-hf generate``: text from one's own target and drafter."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..tuning.trace import GenerationTrace
from .answer import Answer, answer, encode
from .console import DTYPE_HELP, fail, parse_device, parse_dtype, print_json, quiet, stderr, stdout
from .loading import load_drafter, load_target, require_repo

# Every option that limits what is drawn, at the value that limits nothing.
_UNLIMITED: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing: standard input.")] = None,
    *,
    target: Annotated[str, typer.Option(help="Target: Hub repo, folder, or 'demo' (SmolLM2-135M-Instruct).")],
    drafter: Annotated[str | None, typer.Option(help="Its Falcon drafter: Hub repo or folder.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without a drafter, for comparison.")] = False,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    system: Annotated[str | None, typer.Option(help="System message for the chat template.")] = None,
    chat_template: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, if it has one.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sample at this temperature.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest, of this mass.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many likeliest tokens.")] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from those this likely, next to the best.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{DTYPE_HELP} The checkpoint's by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; else cuda where there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code in the drafter's repo; not needed.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Colour accepted, rejected and the target's own tokens, once all is there.")
    ] = False,
    quiet_: Annotated[bool, typer.Option("--quiet", help="No statistics.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Generate text with a Falcon drafter.

    The text goes to standard output, statistics to standard error. Greedy, unless a sampling option is given.

    Example: falcon-hf generate --target demo --drafter ./drafter "Why is the sky blue?"
    """
    if drafter is None and not plain:
        fail("Give --drafter REPO_OR_PATH, or --plain to generate without one.")
    if trace and (plain or as_json):
        fail("--trace shows a drafter's rounds as text: drop --plain and --json.")
    sampling = _sampling(temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    if repetition_penalty is not None:
        sampling["repetition_penalty"] = repetition_penalty
    torch_device = parse_device(device)
    torch_dtype = parse_dtype(dtype, torch_device) if dtype is not None else None
    text = _read_prompt(prompt, file)
    if not text.strip():
        fail("The prompt is empty.")
    with quiet():
        source = None if plain or drafter is None else require_repo(drafter, "drafter")
        model, tokenizer = load_target(target, torch_dtype, torch_device)
        inputs = encode(tokenizer, text, system, chat_template)
        helper = None if source is None else load_drafter(source, model, trust_remote_code)
        if seed is not None:
            torch.manual_seed(seed)
        write = None if as_json or trace else _write
        rounds = GenerationTrace(helper) if trace and helper is not None else None
        with rounds or nullcontext():
            result = answer(model, tokenizer, inputs, helper, write, max_new_tokens=max_new_tokens, **sampling)
    if as_json:
        settings = {"target": target, "drafter": None if plain else drafter, "seed": seed}
        settings |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        print_json(_as_dict(result) | settings)
        return
    if rounds is not None and rounds.rounds:
        rounds.show(tokenizer, torch.tensor([result.ids]), console=stdout)
    elif rounds is not None:  # the answer's only token is the prefill's
        _write(result.text)
    _write("\n")
    if not quiet_:
        stderr.print(_summary(result), style="dim", soft_wrap=True)


def _sampling(temperature: float | None, **limits: float | None) -> dict[str, Any]:
    """All options of ``generate()`` that say how tokens are drawn: the model's own defaults do not sneak in."""
    given = {name: value for name, value in limits.items() if value is not None}
    if temperature == 0 and given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        fail(f"--temperature 0 is greedy: drop {names}, or raise the temperature.")
    if not temperature and not given:
        # Unused, but transformers warns of a top_k that is not its default.
        return {**_UNLIMITED, "do_sample": False, "top_k": 50}
    warmth = {} if temperature is None else {"temperature": temperature}
    return {**_UNLIMITED, "do_sample": True, **warmth, **given}


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from wherever it comes."""
    if file is not None:
        if prompt is not None:
            fail("Give a prompt or --file, not both.")
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"Cannot read the prompt from {str(file)!r}: {getattr(error, 'strerror', None) or error}")
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        fail("Give a prompt, --file FILE, or - to read standard input.")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        fail(f"Cannot read the prompt from standard input: {error}")


def _write(text: str) -> None:
    # As it is: no wrapping or styling in what may be a pipe.
    sys.stdout.write(text)
    sys.stdout.flush()


def _as_dict(result: Answer) -> dict[str, Any]:
    return {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.ids),
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "statistics": None if result.statistics is None else result.statistics.as_dict(),
    }


def _summary(result: Answer) -> str:
    parts = [f"{len(result.ids)} tokens in {result.seconds:.2f} s, {result.tokens_per_second:.1f} tokens/s"]
    if result.statistics is not None:
        statistics = result.statistics
        parts.append(f"tau {statistics.tau:.2f}, with bonus {statistics.tau_with_bonus:.2f}")
        parts.append(f"alpha {statistics.alpha:.2f}")
    return " · ".join(parts)
