"""Libraries that save models in a way of their own: their integration is imported when such a model is converted.

A converted model that ``save_pretrained`` of transformers wrote without it could not be loaded again: nothing would
say how its weights are stored. Each integration has a function ``adopt``, which is called with a model that was
converted, restored, or has other adapters than before.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import MappingProxyType

from torch import nn

__all__ = ["INTEGRATIONS", "tell_integrations"]

INTEGRATIONS = MappingProxyType({"transformers": "lowmem.integrations.transformers"})
"""Library whose classes a model may have -> the module that makes it save converted models, and whose
``adopt(model)`` each of them is given to."""


def tell_integrations(model: nn.Module) -> None:
    """Let the integrations of the libraries that have made a model, or parts of it, know what it is now.

    Warns:
        UserWarning: the library is too old for its integration, so that it cannot save what is converted.
    """
    libraries = {kind.__module__.partition(".")[0] for module in model.modules() for kind in type(module).__mro__}
    for library in libraries & INTEGRATIONS.keys() & sys.modules.keys():
        try:
            integration = import_module(INTEGRATIONS[library])
        except ImportError as reason:
            warnings.warn(
                f"{type(model).__name__}.save_pretrained would write what nothing can load: {reason}. lowmem.save "
                "and lowmem.load need no integration",
                UserWarning,
                stacklevel=4,
            )
        else:
            integration.adopt(model)
