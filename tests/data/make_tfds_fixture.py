"""Writes tests/data/tiny_pairs.zip: a TFDS data set of five rows in array_record files, read by test_sources.py.

Zipped, because each array_record file is filled with zeros to 128 KiB.

Writing needs TensorFlow, which rljax does not use, so this runs by hand in an environment of its own:

    pip install tensorflow-cpu tensorflow-datasets array_record
    python tests/data/make_tfds_fixture.py
"""

import pathlib
import shutil
import tempfile

import numpy as np
import tensorflow_datasets as tfds

TURNS = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
ROWS = {
    "train": [
        {"prompt": f"Q{i}: café 🙂?", "chosen": f" yes {i}", "rejected": "", "tags": ["a", f"b{i}"], "score": i / 4}
        for i in range(4)
    ],
    "test": [{"prompt": "Q9", "chosen": " yes", "rejected": " no", "tags": [], "score": -1.0}],
}


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """Made-up preference pairs."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    def _info(self):
        text = tfds.features.Text()
        features = {
            "prompt": text,
            "chosen": text,
            "rejected": text,
            "tags": tfds.features.Sequence(text),
            "score": tfds.features.Scalar(np.float64),
            "label": tfds.features.ClassLabel(num_classes=2),
            "messages": tfds.features.Sequence({"role": text, "content": text}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ROWS}

    def _generate_examples(self, name):
        for i, row in enumerate(ROWS[name]):
            yield i, {**row, "label": i % 2, "messages": TURNS}


def main() -> None:
    target = pathlib.Path(__file__).parent / "tiny_pairs"
    with tempfile.TemporaryDirectory() as folder:
        TinyPairs(data_dir=folder, file_format="array_record").download_and_prepare()
        print("wrote", shutil.make_archive(str(target), "zip", folder, "tiny_pairs"))


if __name__ == "__main__":
    main()
