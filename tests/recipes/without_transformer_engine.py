"""Lets Megatron-Bridge be imported on a machine without Transformer Engine.

Bridge's LoRA layers name classes of Transformer Engine when they are defined, and Bridge imports
them with everything else. Megatron itself does without where the package is missing, and takes a
partial one for a whole one: so the stand-in is there while that one file is imported, and gone
before any other file looks.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

from torch import nn

_NEEDS_IT = "megatron.bridge.peft.lora_layers"
_NAME = "transformer_engine"


def stand_in_where_it_is_missing():
    """Prepares the import of Bridge. Call it before; with Transformer Engine it does nothing."""
    if importlib.util.find_spec(_NAME) is None:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != _NEEDS_IT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        pytorch = ModuleType(f"{_NAME}.pytorch")
        vars(pytorch).update(
            Linear=_layer("Linear"),
            LayerNormLinear=_layer("LayerNormLinear"),
            ops=SimpleNamespace(Linear=_layer("Linear"), Sequential=_layer("Sequential")),
        )
        package = ModuleType(_NAME)
        vars(package)["pytorch"] = pytorch
        sys.modules |= {_NAME: package, f"{_NAME}.pytorch": pytorch}
        try:
            super().exec_module(module)
        finally:
            del sys.modules[_NAME], sys.modules[f"{_NAME}.pytorch"]


def _layer(name):
    return type(name, (nn.Module,), {})
