"""Do more with fewer visual tokens: prune, in place, in one line, undone bit for bit.

    att = vistoken.prune_visual_tokens(llava, ratio=0.89)
    out = llava.generate(**inputs, max_new_tokens=64)
    print(att.report())
    att.detach()

Importing this package loads nothing heavy: torch and model libraries load when they are needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from vistoken.errors import (
    AttachError,
    BackendUnavailable,
    DataError,
    MethodError,
    ModelNotSupported,
    VistokenError,
)

if TYPE_CHECKING:
    from vistoken.attachment import Attachment, attach, attachments, detach
    from vistoken.inspection import inspect, inspect_dominance
    from vistoken.method import Method
    from vistoken.registry import (
        MethodInfo,
        list_methods,
        load_recipe,
        method_class,
        method_names,
    )
    from vistoken.report import Report
    from vistoken.shipped import list_shipped, load_shipped

__all__ = [
    "DEFAULT_PRUNING",
    "AttachError",
    "Attachment",
    "BackendUnavailable",
    "DataError",
    "Method",
    "MethodError",
    "MethodInfo",
    "ModelNotSupported",
    "Report",
    "VistokenError",
    "attach",
    "attachments",
    "detach",
    "inspect",
    "inspect_dominance",
    "list_methods",
    "list_shipped",
    "load_recipe",
    "load_shipped",
    "method_class",
    "method_names",
    "prune_visual_tokens",
]

# Public name -> the module that holds it, loaded when the name is first asked for.
_HOMES = {
    "vistoken.attachment": ("Attachment", "attach", "attachments", "detach"),
    "vistoken.inspection": ("inspect", "inspect_dominance"),
    "vistoken.method": ("Method",),
    "vistoken.registry": (
        "MethodInfo",
        "list_methods",
        "load_recipe",
        "method_class",
        "method_names",
    ),
    "vistoken.report": ("Report",),
    "vistoken.shipped": ("list_shipped", "load_shipped"),
}
_LAZY = {name: home for home, names in _HOMES.items() for name in names}
DEFAULT_PRUNING = "spread"


def prune_visual_tokens(
    model: Any,
    ratio: float | None = None,
    *,
    keep: int | None = None,
    method: str = DEFAULT_PRUNING,
    **options: Any,
) -> Attachment:
    """Make a vision-language model read each image with fewer visual tokens.

    Give exactly one of `ratio`, the share removed (0 <= ratio < 1; of N tokens
    N - floor(ratio * N + 0.5) stay, at least 1), and `keep`, the tokens that stay per image.
    `ratio=0` and `keep >= N` leave the outputs bit-identical. `method` and its `options` are those
    of `vistoken.list_methods("pruning")`. Raises `MethodError`, `ModelNotSupported` or
    `AttachError` before anything is edited.
    """
    from vistoken.attachment import attach
    from vistoken.registry import method_class, method_names

    chosen = method_class(method)
    if chosen.family != "pruning":
        raise MethodError(
            f"{method} is a {chosen.family} method, not a pruning method. "
            f"Pruning methods: {', '.join(method_names('pruning'))}."
        )
    budget = {"ratio": ratio, "keep": keep}
    return attach(model, chosen.from_options({**budget, **options}))


def __getattr__(name: str) -> Any:
    """Load heavy parts, and method classes such as `vistoken.HoloV`, when first asked for."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name[:1].isupper():
        from vistoken.registry import method_class, method_names

        for method in method_names():
            cls = method_class(method)
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'vistoken' has no attribute {name!r}")
