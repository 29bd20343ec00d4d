"""Writes a folder of golden files: ``python -m tests.golden NAME``. One that exists is never written again."""

import json
import sys
import tempfile
from pathlib import Path

from tests.golden import FOLDER, write
from tests.golden.language_models import write_folders


def main() -> None:
    (name,) = sys.argv[1:]
    folder = FOLDER / name
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        found = write(folder, Path(scratch)) | write_folders(folder)
    (folder / "values.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
