"""The commands: one file each, with ``add_arguments(parser)`` and ``run(arguments) -> exit code``."""

from types import MappingProxyType

__all__ = ["COMMANDS"]

# name -> help text. The module of the same name is imported only when its command runs.
COMMANDS = MappingProxyType(
    {
        "stats": "what models cost: parameters, bytes, peak memory of a forward and a backward",
        "compare": "how close the outputs of models come to those of a base",
        "fit": "fine-tune a language model on text, or a variant on a classification task",
        "quantize": "convert a safetensors checkpoint or a Hugging Face folder to 4 or 8 bits, in bounded memory",
        "merge": "merge an adapter into the model that it was trained on, and say what that loses",
        "export": "write a model that lowmem stored as GGUF, or another program's folder, codes as they are",
        "report": "write a page: what every variant of a model costs, how fast it is, what it loses",
        "bundle": "write a directory as one reproducible, runnable zip",
        "info": "versions, processor and kernel: what a bug report needs",
    }
)
