"""TFDS as a source, on tiny data sets that TFDS's own builder writes here, without TensorFlow."""

import json
import shutil
import sys

import numpy as np
import pytest

from jaxreward.data import formats, points, sources


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with tiny_pairs 1.0.0 (train and test) and tiny_rows 1.9.0, 1.10.0."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfds")
    text, number = tfds.features.Text(), tfds.features.Scalar(np.float32)

    def write(name, version, features, splits):
        class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version(version)
            __module__ = "nowhere"  # TFDS looks for files beside the module of a builder

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, manager):
                return {split: iter(enumerate(rows)) for split, rows in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

        Tiny.name = name
        Tiny(data_dir=root, file_format="array_record").download_and_prepare()

    turns = tfds.features.Sequence({"role": text, "content": text})
    pairs = [
        {
            "prompt": [user(f"q{i}")],
            "chosen": [user(f"q{i}"), assistant("ß\u2028")],
            "rejected": [user(f"q{i}"), assistant("b")],
            "margin": i / 2,
        }
        for i in range(5)
    ]
    features = {"prompt": turns, "chosen": turns, "rejected": turns, "margin": number}
    write("tiny_pairs", "1.0.0", features, {"train": pairs, "test": pairs[:1]})
    features = {
        "prompt": text,
        "answer": text,
        "scores": {"helpful": number, "safe": number},
        "label": tfds.features.ClassLabel(names=["bad", "good"]),
        "ok": np.bool_,
        "raw": tfds.features.Tensor(shape=(), dtype=np.object_),
        "words": tfds.features.Sequence(text),
        "counts": tfds.features.Tensor(shape=(2,), dtype=np.int32),
    }
    row = dict(
        prompt="p",
        answer="a",
        scores=dict(helpful=0.5, safe=float("nan")),
        label="good",
        ok=True,
        raw=b"\xff",
        words=["one"],
        counts=[1, 2],
    )
    write("tiny_rows", "1.9.0", features, {"train": [row]})
    write("tiny_rows", "1.10.0", features, {"train": [{**row, "raw": b"r"}]})
    return root


@pytest.fixture
def root(written, monkeypatch):
    """The same folder, set as TFDS_DATA_DIR."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(written))
    return written


def test_rows_are_plain(root):
    """Catches bytes, arrays and NumPy's scalars in rows, a NaN, and a wrong choice of version."""
    ((number, row),) = formats.rows("tfds:tiny_rows")
    assert number == 1
    assert row == {
        "prompt": "p",
        "answer": "a",
        "scores": {"helpful": 0.5, "safe": None},
        "label": 1,
        "ok": True,
        "raw": "r",
        "words": ["one"],
        "counts": [1, 2],
    }
    assert type(row["ok"]) is bool and type(row["counts"][0]) is int
    json.dumps(row)
    assert "tensorflow" not in sys.modules
    del row["label"]
    (record,), _ = points.read("tfds:tiny_rows", corpus=lambda rows: iter([(1, row)]))
    assert record["scores"] == {"helpful": 0.5, "safe": None}


def test_pairs_of_messages(root):
    """Catches sequences of dicts that come as a dict of sequences, and rows lost or twice."""
    records, report = sources.read_pairs("tfds:tiny_pairs:1.0.0")
    assert report == {"read": 5, "kept": 5, "skipped": {}}
    first = min(records, key=lambda r: r["margin"])
    assert first["prompt"] == [user("q0")] and first["chosen"] == [assistant("ß\u2028")]
    assert sorted(r["margin"] for r in records) == [0, 0.5, 1, 1.5, 2]
    assert [r["id"] for r in records] == ["1", "2", "3", "4", "5"]


def test_splits(root):
    """Catches a split that is not the one asked for, and parts that overlap or leave rows out."""
    read = lambda split: sources.read_pairs(f"tfds:tiny_pairs@{split}")[0]
    assert len(read("test")) == 1 and len(read("train")) == 5
    prompts = lambda records: [r["prompt"][0]["content"] for r in records]
    assert prompts(read("train[:40%]")) + prompts(read("train[40%:]")) == prompts(read("train"))
    with pytest.raises(ValueError, match=r"tfds:tiny_pairs@dev: .*Unknown split 'dev'.*train"):
        read("dev")
    for split in ("train[", "train[:0%]"):
        with pytest.raises(ValueError, match=r"tfds:tiny_pairs@train\["):
            read(split)


def test_text_that_is_none_is_counted(root):
    """Catches bytes that are no UTF-8 and stop the run without a place, or pass as something."""
    with pytest.raises(ValueError, match=r"tfds:tiny_rows:1.9.0:1: text must be UTF-8; .*0xff"):
        points.read("tfds:tiny_rows:1.9.0")
    with pytest.raises(ValueError, match=r"no usable .*: text must be UTF-8 \(1\)"):
        points.read("tfds:tiny_rows:1.9.0", on_bad="skip")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tfds:tiny_pair", r"tiny_pair is not there; did you mean tiny_pairs"),
        ("tfds:tiny_rows:2.0.0", r"tiny_rows holds the versions 1\.10\.0, 1\.9\.0\. Set"),
        ("tfds:tiny_rows/english", r"tiny_rows/english is not there"),
        ("tfds:other/config:1.0.0@test", r": tfds build other/config --data_dir=.*array_record"),
    ],
)
def test_what_is_not_prepared_is_named(root, path, words):
    """Catches a download that starts by itself, and an error that does not say what to do."""
    for act in (formats.exists, sources.data_hash, sources.read_pairs):
        with pytest.raises(FileNotFoundError, match=f"{path} is not prepared: .*{words}"):
            act(path)


@pytest.mark.parametrize(
    "path", ["tfds:", "tfds:../x", "tfds:a/../b", "tfds:kaggle:a", "tfds:a/b=1"]
)
def test_names_that_are_none(root, path):
    """Catches a name that leaves the folder, or that makes TFDS run something."""
    with pytest.raises(ValueError, match=r"expected tfds:NAME\[/CONFIG\]\[:VERSION\]\[@SPLIT\]"):
        formats.exists(path)


def test_a_config_is_named(root, tmp_path, monkeypatch):
    """Catches a config that cannot be read, or one that is chosen for the user."""
    shutil.copytree(root / "tiny_pairs", tmp_path / "sets" / "english")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"sets holds the configs english\."):
        formats.exists("tfds:sets")
    folder, split = formats.tfds_folder("tfds:sets/english@test")
    assert folder == tmp_path / "sets" / "english" / "1.0.0" and split == "test"
    assert sources.data_hash("tfds:sets/english") == sources.data_hash("tfds:sets/english:1.0.0")


def test_the_hash_is_of_the_contents(root, tmp_path, monkeypatch):
    """Catches a hash of a name or a place: it must change with a byte, and with nothing else."""
    before = sources.data_hash("tfds:tiny_pairs")
    shutil.copytree(root, tmp_path / "copy")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "copy"))
    assert sources.data_hash("tfds:tiny_pairs") == before and len(before) == 64
    assert sources.data_hash("tfds:tiny_rows") != before
    (shard,) = (tmp_path / "copy" / "tiny_pairs" / "1.0.0").glob("*-train.*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert sources.data_hash("tfds:tiny_pairs") != before


@pytest.mark.parametrize("damage", ["cut", "gone", "info", "features", "class", "format"])
def test_damage_is_named(root, tmp_path, monkeypatch, damage):
    """Catches half a data set that is read as a whole one, code that a data set asks to import,
    and an error of a library that names no data set."""
    shutil.copytree(root / "tiny_pairs", tmp_path / "tiny_pairs")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    folder = tmp_path / "tiny_pairs" / "1.0.0"
    (shard,) = folder.glob("*-train.*")
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif damage == "gone":
        shard.unlink()
    elif damage == "info":
        (folder / "dataset_info.json").write_text("{")
    elif damage == "features":
        (folder / "features.json").unlink()
    elif damage == "class":
        path = folder / "features.json"
        own = path.read_text().replace(
            "tensorflow_datasets.core.features.text_feature", "antigravity"
        )
        path.write_text(own)
    else:
        path = folder / "dataset_info.json"
        path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    words = "features.json names antigravity.Text, a class" if damage == "class" else "cannot be"
    with pytest.raises(ValueError, match=f"^tfds:tiny_pairs(:1)?: .*{words}"):
        sources.read_pairs("tfds:tiny_pairs")
    assert "antigravity" not in sys.modules
