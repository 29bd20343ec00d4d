"""The commands: one file each, with ``add_arguments(parser)`` and ``run(arguments) -> exit code``. A file
``COMMAND_part.py`` is a part of one command.

They may import all other folders. Begin with ``stats.py``.
"""

from types import MappingProxyType

__all__ = ["COMMANDS"]

# name -> help text. The module of the same name is imported only when its command runs.
COMMANDS = MappingProxyType(
    {
        "stats": "print the size of models and the peak memory of a forward and a backward",
        "compare": "compare the outputs of models with those of a base model",
        "fit": "fine-tune a language model on text, or a variant on a classification task",
        "generate": "let a language model continue a text, or chat with it",
        "serve": "start transformers' server with a model",
        "quantize": "convert a safetensors checkpoint or a Hugging Face folder to 4 or 8 bits, in bounded memory",
        "merge": "merge an adapter into its base model, and measure the loss",
        "export": "write a stored model as GGUF or as another program's folder, with the same codes",
        "report": "write an HTML page with the memory, speed and error of a model's variants",
        "bundle": "pack a directory into a reproducible, runnable zip",
        "info": "print versions, processor and kernel for a bug report",
    }
)
