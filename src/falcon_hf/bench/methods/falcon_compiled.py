"""Falcon with its verification compiled: to be compared with ``plain_compiled``."""

from __future__ import annotations

from .compiling import MODE_SETTING, CompilingMethod
from .falcon import Falcon


class FalconCompiled(CompilingMethod, Falcon):
    """``generate(assistant_model=drafter, cache_implementation="static")`` with ``torch.compile``."""

    name = "falcon_compiled"
    settings = {**Falcon.settings, "mode": MODE_SETTING}


METHOD = FalconCompiled
