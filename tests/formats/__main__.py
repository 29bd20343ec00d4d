"""Writes the small files of other programs that the default run reads: ``python -m tests.formats``.

It needs the packages of ``tox -e formats``.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

from tests.formats.makers import MAKERS, PACKAGES, peft_folder, samples_json

SAMPLES = Path(__file__).parents[1] / "io" / "formats" / "samples"


def main() -> None:
    digests = {}
    for name, make in MAKERS.items():
        values = make(SAMPLES / name, seed=0)
        digests[name] = {key: hashlib.sha256(value.contiguous().numpy()).hexdigest() for key, value in values.items()}
    peft_folder(SAMPLES / "peft")
    text = samples_json(digests, {package: version(package) for package in PACKAGES})
    (SAMPLES / "samples.json").write_text(text)


if __name__ == "__main__":
    main()
