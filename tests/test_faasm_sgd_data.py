"""Data of sgd: the synthetic set has the shape it claims; svmlight files are read, or refused with a reason."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from slosched.errors import InvalidConfig, UnknownName
from slosched.faasm.sgd.examples import SIZES, Rows, Size, examples_of, size_named
from slosched.faasm.sgd.svmlight import read_svmlight
from slosched.faasm.sgd.synthetic import MEAN_NONZEROS, synthetic

SMALL = synthetic(SIZES["small"], 1)


class TestSynthetic:
    def test_has_the_published_shape(self) -> None:
        assert (len(SMALL.train), SMALL.features) == (23_149, 47_236)
        assert len(SMALL.held_out) == 2_315
        assert SIZES["full"].train == 781_265
        mean = SMALL.train.nonzeros / len(SMALL.train)
        assert mean == pytest.approx(MEAN_NONZEROS, rel=0.01)
        assert (SMALL.train.labels > 0).mean() == pytest.approx(0.474, abs=0.005)

    def test_rows_are_sparse_vectors_of_length_1(self) -> None:
        rows = SMALL.train
        for row in (0, 7, len(rows) - 1):
            part = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
            assert (np.diff(rows.columns[part]) > 0).all(), "ascending, each feature once"
            assert (rows.values[part] > 0).all()
        lengths = np.add.reduceat(rows.values**2, rows.offsets[:-1])
        assert np.allclose(lengths, 1)
        assert rows.columns.min() >= 0 and rows.columns.max() < SMALL.features

    def test_features_are_as_uneven_as_words(self) -> None:
        top = np.sort(SMALL.counts)[::-1]
        assert top[0] > 0.3 * len(SMALL.train) and top[1000] < 0.1 * top[0]
        assert (SMALL.counts == np.bincount(SMALL.train.columns, minlength=47_236)).all()

    def test_is_the_same_for_a_seed_alone(self) -> None:
        size = Size(train=50, held_out=5, features=300)
        again = [synthetic(size, seed).digest() for seed in (1, 1, 2)]
        assert again[0] == again[1] != again[2]

    def test_facts_tell_what_it_is(self) -> None:
        facts = SMALL.facts()
        assert "synthetic" in str(facts["origin"])
        assert facts["nonzeros"] == SMALL.train.nonzeros and len(str(facts["sha256"])) == 64
        assert SMALL.nbytes == sum(
            each.nbytes
            for each in (
                SMALL.train.offsets,
                SMALL.train.columns,
                SMALL.train.values,
                SMALL.train.labels,
                SMALL.counts,
            )
        )

    def test_few_features_do_not_hang_it(self) -> None:
        few = synthetic(Size(train=20, held_out=0, features=3), 1)
        assert (np.diff(few.train.offsets) == 3).all() and len(few.held_out) == 0

    def test_an_unknown_size_is_refused(self) -> None:
        with pytest.raises(UnknownName, match="micro, small"):
            size_named("huge")


class TestSvmlight:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "data.txt"
        path.write_text(text)
        return path

    def test_reads_what_was_written(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path,
            "# a comment\n+1 1:0.5 4:2 # the first\n\n-1 qid:3 2:-1e-3\n0 3:0 50000:1\r\n2 1:1\n",
        )
        found = read_svmlight(path, held_out=0.25)
        rows = found.train
        assert rows.offsets.tolist() == [0, 2, 3, 4] and rows.columns.tolist() == [0, 3, 1, 49_999]
        assert rows.values.tolist() == [0.5, 2, -1e-3, 1]
        assert rows.labels.tolist() == [1, -1, -1] and found.held_out.labels.tolist() == [1]
        assert found.features == 50_000, "more than RCV1 has, since the file does"
        assert found.counts[0] == 1, "of what is trained on alone"

    def test_packed_files_and_other_tools(self, tmp_path: Path) -> None:
        sklearn = pytest.importorskip("sklearn.datasets")
        from scipy.sparse import csr_matrix

        rows = SMALL.train.part(0, 200)
        matrix = csr_matrix((rows.values, rows.columns, rows.offsets), shape=(200, 47_236))
        plain = tmp_path / "rcv1"
        sklearn.dump_svmlight_file(matrix, rows.labels, str(plain), zero_based=False)
        packed = tmp_path / "rcv1.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        for path in (plain, packed):
            found = read_svmlight(path, held_out=0).train
            assert (found.columns == rows.columns).all() and (found.offsets == rows.offsets).all()
            assert np.allclose(found.values, rows.values, rtol=1e-12)

    def test_indexes_from_0_and_two_labels_of_any_kind(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "\ufeff1 0:1 3:2\r\n2 3:1\r\n")
        rows = read_svmlight(path, held_out=0).train
        assert rows.columns.tolist() == [0, 3, 3], "scikit-learn writes indexes from 0 on"
        assert rows.labels.tolist() == [-1, 1]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("+1 1:0.5\n+1 2:x\n", "line 2: 'x' is not a number"),
            ("one 1:1\n", "'one' is not a number"),
            ("1 0:1 0:1\n", "index 0 stands behind 0"),
            ("1:1 2:1\n", "'1:1' is not a number"),
            ("2 1:1\n2 2:1\n", "all labels in .* are 2"),
            ("1 3:1 2:1\n", "index 2 stands behind 3"),
            ("1 3:1 3:1\n", "index 3 stands behind 3"),
            ("1 3=1\n", "'3=1' is not INDEX:VALUE"),
            ("1 99999999999:1\n", "not within"),
            ("1 1:nan\n", "not a finite number"),
            ("nan 1:1\n", "not a finite number"),
            ("1 -1:1\n", "is not INDEX:VALUE"),
            ("", "has no example"),
            ("# nothing\n", "has no example"),
            ("1\n-1\n", "no example to train on"),
            ("1_0 1:1\n-1 1:1\n", "'1_0' is not a number"),
        ],
    )
    def test_says_what_is_wrong_and_where(self, tmp_path: Path, text: str, words: str) -> None:
        with pytest.raises(InvalidConfig, match=words):
            read_svmlight(self.write(tmp_path, text), held_out=0)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidConfig, match="is not a file"):
            read_svmlight(tmp_path, held_out=0)
        broken = tmp_path / "x.gz"
        broken.write_bytes(b"1 1:1\n")
        with pytest.raises(InvalidConfig, match="cannot read"):
            read_svmlight(broken, held_out=0)


def test_examples_without_a_row_to_train_on_are_refused() -> None:
    rows = Rows(np.array([0, 1]), np.zeros(1, np.int32), np.ones(1), np.ones(1))
    with pytest.raises(InvalidConfig, match="no example to train on"):
        examples_of(rows, held_out=1, features=1, origin="it", counts=None)
