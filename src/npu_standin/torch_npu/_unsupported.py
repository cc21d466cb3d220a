"""Names that upstream uses at import, or on paths that the published recipe does not take."""

from __future__ import annotations

from typing import Any, NoReturn


class Unsupported:
    """Has every attribute, and raises NotImplementedError when it is called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Unsupported:
        if name.startswith("__"):  # Python's own questions, hasattr(…, "__iter__") for one
            raise AttributeError(name)
        return Unsupported(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{self._name} is not in the stand-in for torch_npu (src/npu_standin)")
