"""The stores that need nothing but this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuckpt.errors import InvalidError
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.stores.opening import beside, is_url, open_store, split
from tests.stores_contract import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()

    @pytest.fixture
    def again(self, store: MemoryStore) -> MemoryStore:
        return store


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store(tmp_path / "root")

    @pytest.fixture
    def again(self, tmp_path: Path) -> Store:
        return open_store(f"file://{tmp_path}/root")


@pytest.mark.parametrize("root", ["runs/a", "/runs/a", "c:/runs", "a//b", "a:b", Path("s3://a")])
def test_whatever_is_no_url_is_a_path(root):
    assert not is_url(root)
    assert isinstance(open_store(root), LocalStore)


def test_a_file_url_is_a_local_directory(tmp_path):
    assert open_store(f"file://{tmp_path}/a%20b").root == f"{tmp_path}/a b"
    assert open_store(f"file://localhost{tmp_path}").root == str(tmp_path)
    with pytest.raises(InvalidError, match="names the host 'elsewhere'"):
        open_store("file://elsewhere/runs")


@pytest.mark.parametrize("root", ["s3://b/run", "s3://b/run?timeout=5s", "gs://b/a/c?x=1&y=2"])
def test_a_files_place_is_split_into_its_root_and_its_name(root):
    assert split(beside(root, "step-1.manifest.json")) == (root, "step-1.manifest.json")
