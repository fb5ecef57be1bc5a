"""Models that come with the package, by name."""

from importlib.resources import files
from pathlib import Path

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import nearest, show
from megatron_mosaic.model.huggingface import read_huggingface
from megatron_mosaic.model.megatron_arguments import read_megatron_arguments
from megatron_mosaic.model.model_file import parse_model, read_model
from megatron_mosaic.model.spec import ModelSpec


def shipped_models() -> tuple[str, ...]:
    """Names of the models that ``load_model`` knows, sorted."""
    folder = files("megatron_mosaic.model") / "models"
    return tuple(
        sorted(
            file.name.removesuffix(".yaml")
            for file in folder.iterdir()
            if file.name.endswith(".yaml")
        )
    )


def load_model(name: str) -> ModelSpec:
    """Loads a shipped model, or one from a file.

    Args:
        name: One of ``shipped_models()``, or a path: of a model file (``.yaml``), of a Hugging
            Face ``config.json`` or the folder that holds it, or of a file with Megatron's
            command line (``.args``).

    Raises:
        PlanError: Neither exists, or the file cannot be read.
        LayoutError: The file's numbers contradict each other.
    """
    path = Path(name)
    if name in shipped_models():
        resource = files("megatron_mosaic.model") / "models" / f"{name}.yaml"
        return parse_model(resource.read_text(encoding="utf-8"), where=f"model {name}")
    if path.suffix in (".yaml", ".yml"):
        return read_model(path)
    if path.suffix == ".json" or (path / "config.json").is_file():
        return read_huggingface(path)
    if path.suffix == ".args":
        return read_megatron_arguments(path)
    advice = nearest(name, shipped_models(), otherwise="name a .yaml, .json or .args file")
    raise PlanError(
        f"model={show(name)} must be a file or one of {', '.join(shipped_models())}; {advice}"
    )
