"""Plain ``generate()`` with its decoding forward compiled: the baseline that launch-bound machines must be shown."""

from __future__ import annotations

from .compiling import MODE_SETTING, CompilingMethod
from .plain import Plain


class PlainCompiled(CompilingMethod, Plain):
    """``generate(cache_implementation="static")`` with ``torch.compile`` as transformers applies it."""

    name = "plain_compiled"
    settings = {"mode": MODE_SETTING}


METHOD = PlainCompiled
