"""CIFAR-10: sources, downloads, stand-in, filtering, splitting."""

import contextlib
import hashlib
import os
import pickle
import shutil
import socketserver
import tarfile
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

import helpers
from conftest import write_image_tree

ARCHIVE, BATCHES = helpers.ARCHIVE_NAME, datasets.CIFAR10.base_folder
REFUSED = "http://127.0.0.1:1/"  # a port on which nobody listens


def load(data_dir, allow_stand_in=True, urls=()):
    return helpers.load_cifar10(data_dir, allow_stand_in, seed=1, urls=urls)


@pytest.fixture
def archive(tmp_path_factory, monkeypatch):
    """A tiny archive in the official layout, whose MD5s are the ones that are checked for."""
    folder, rng = tmp_path_factory.mktemp("made") / BATCHES, np.random.default_rng(0)
    folder.mkdir()

    def save(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    for split, n in (("train", 5), ("test", 1)):
        files = [save(f"{split}_{i}", {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
                                       "labels": [*range(10)] * 2}) for i in range(n)]
        monkeypatch.setattr(datasets.CIFAR10, f"{split}_list", files)
    _, md5 = save("batches.meta", {"label_names": list(helpers.CIFAR10_CLASSES)})
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", md5)
    with tarfile.open(folder.parent / ARCHIVE, "w:gz") as tar:
        tar.add(folder, arcname=BATCHES)
    body = (folder.parent / ARCHIVE).read_bytes()
    for owner, name in ((helpers, "ARCHIVE_MD5"), (datasets.CIFAR10, "tgz_md5")):
        monkeypatch.setattr(owner, name, hashlib.md5(body).hexdigest())
    return folder.parent / ARCHIVE


def test_the_archive_is_the_official_one_and_the_official_host_comes_last():
    assert helpers.ARCHIVE_MD5 == "c58f30108f718f92721af3b95e74349a"
    assert helpers.DOWNLOAD_URLS[-1] == datasets.CIFAR10.url and len(helpers.DOWNLOAD_URLS) > 1


def test_the_archive_is_verified_unpacked_and_used_before_anything_else(archive, tmp_path):
    shutil.copy(archive, tmp_path)
    write_image_tree(tmp_path, 1, 1)
    data = load(tmp_path, urls=[REFUSED])
    assert data.source.startswith("official") and not data.is_stand_in and data.skipped == ()
    pixels = pickle.loads((archive.parent / BATCHES / "test_0").read_bytes())["data"]
    assert np.array_equal(data.test_images.transpose(0, 3, 1, 2).reshape(20, -1), pixels)
    assert data.train_images.shape == (100, 32, 32, 3) and data.train_images.dtype == np.uint8
    assert data.train_labels.tolist() == [*range(10)] * 10
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert set(os.listdir(tmp_path)) == {BATCHES, ARCHIVE, helpers.IMAGE_FOLDERS}


@pytest.mark.filterwarnings("error")
def test_numpy_warnings_on_unpacked_batches_are_silent(archive, tmp_path, monkeypatch):
    shutil.copytree(archive.parent / BATCHES, tmp_path / BATCHES)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: warnings.warn("align"))
    assert load(tmp_path).source.startswith("official")


@pytest.mark.parametrize("name", ["train_3", "test_0", "batches.meta"])
@pytest.mark.parametrize("damage", ["evil", "cut", "removed"])
def test_damaged_official_files_are_named_and_neither_unpickled_nor_replaced_by_the_stand_in(
        archive, tmp_path, name, damage):
    shutil.copytree(archive.parent / BATCHES, tmp_path / BATCHES)
    batch, good = tmp_path / BATCHES / name, (archive.parent / BATCHES / name).read_bytes()
    evil = f"cbuiltins\nopen\n(V{tmp_path / 'ran'}\nVw\ntR."  # would make a file
    batch.write_bytes(good[:-9] if damage == "cut" else evil.encode())
    if damage == "removed":
        batch.rename(batch.with_name("mine"))
    for what in (BATCHES, ARCHIVE):
        with pytest.raises(RuntimeError, match=rf"^{what} in .* damaged .*delete it"):
            load(tmp_path)
        (tmp_path / ARCHIVE).write_bytes(archive.read_bytes()[:-100])
    shutil.copy(archive, tmp_path)
    if name == "batches.meta":  # which torchvision does not unpack again
        with pytest.raises(RuntimeError, match=f"^{BATCHES} in .* damaged"):
            load(tmp_path)
        shutil.rmtree(tmp_path / BATCHES)
    assert len(load(tmp_path).train_labels) == 100 and batch.read_bytes() == good
    assert set(os.listdir(tmp_path)) == {BATCHES, ARCHIVE}


@pytest.mark.parametrize("name", ["data", f"data/{helpers.IMAGE_FOLDERS}/test/cat"])
def test_files_that_the_disk_does_not_give_are_one_sentence_and_not_the_stand_in(tmp_path, name):
    write_image_tree(tmp_path / "data", 1, 1)
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).symlink_to((tmp_path / name).name)  # to itself
    with pytest.raises(RuntimeError, match="cannot be read .*: make room|/test: .* cat"):
        load(tmp_path / "data")


def test_batches_on_another_disk_or_given_themselves_are_found_and_unpacked_into(
        archive, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / BATCHES).symlink_to(tmp_path / "disk")
    shutil.copy(archive, tmp_path)
    assert load(tmp_path).source.startswith("official") and (tmp_path / "disk/test_0").exists()
    assert load(tmp_path / BATCHES).source.startswith("official")


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg"])
def test_image_folders_are_read_class_by_class_in_the_order_of_their_names(tmp_path, suffix):
    digits = write_image_tree(tmp_path, 3, 2, suffix)
    (tmp_path / helpers.IMAGE_FOLDERS / "train/cat/Thumbs.db").write_bytes(b"no image")
    data = load(tmp_path, urls=[REFUSED])
    for split, n in (("train", 3), ("test", 2)):
        images, labels = (getattr(digits, f"{split}_{part}") for part in ("images", "labels"))
        expected = np.concatenate([images[labels == label][:n] for label in range(10)])
        difference = np.abs(getattr(data, f"{split}_images") - expected.astype(float)).mean()
        assert difference == 0 if suffix == ".png" else difference < 5
        assert getattr(data, f"{split}_labels").tolist() == np.repeat(range(10), n).tolist()
    assert "not verified" in data.source and not data.is_stand_in
    assert len(data.skipped) == 1 and "no official" in data.skipped[0]
    shutil.rmtree(tmp_path / helpers.IMAGE_FOLDERS / "train/ship")
    for folder in (tmp_path / helpers.IMAGE_FOLDERS, tmp_path):  # of the copy itself, or above it
        some = helpers.load_cifar10(folder, False, 1, ["cat", "dog"], urls=())
        assert np.unique(some.train_labels).tolist() == [3, 5]


BROKEN_FOLDERS = {
    "/train: .*frog": lambda f: shutil.rmtree(f / "train/frog"),
    "/test: .*ship": lambda f: [p.unlink() for p in (f / "test/ship").iterdir()],
    "/train/cat/n.png is .*not 32": lambda f: Image.new("RGB", (31, 32)).save(f / "train/cat/n.png"),
    "/train/cat/a.png is damaged": lambda f: (f / "train/cat/a.png").write_bytes(b"no image"),
    "/test/cat/00001.png is": lambda f: os.truncate(f / "test/cat/00001.png", 90)}


@pytest.mark.parametrize("message", BROKEN_FOLDERS)
def test_a_broken_image_folder_is_named_and_never_replaced_by_the_stand_in(tmp_path, message):
    write_image_tree(tmp_path, 2, 2)
    BROKEN_FOLDERS[message](tmp_path / helpers.IMAGE_FOLDERS)
    with pytest.raises(RuntimeError, match=message):
        load(tmp_path)


class Handler(socketserver.StreamRequestHandler):
    """Answers a request for /<fault>/<name> as that fault demands."""

    def handle(self):
        request = b"".join(iter(self.rfile.readline, b"\r\n")).decode()
        self.server.requests.append(request)
        ok, body = b"HTTP/1.0 200 OK\r\n", self.server.body
        head, moved = ok + b"Content-Length: %d\r\n\r\n" % len(body), b"HTTP/1.0 302 Found\r\n"
        fault, _, name = request.split()[1].removeprefix("http://nowhere.invalid")[1:].partition("/")
        pieces, pause = {
            "good": ([head + body], 0), "wrong": ([head + body[::-1]], 0),
            "redirect": ([moved + f"Location: /good/{name}\r\n\r\n".encode()], 0),
            "missing": ([b"HTTP/1.0 404 Not Found\r\n\r\n"], 0),
            "stall": ([head + body[:100], b""], 60), "headers": ([ok] + [b"X: y\r\n"] * 900, 0.1)}[fault]
        with contextlib.suppress(OSError):  # the client hung up
            for piece in pieces:
                self.wfile.write(piece)
                self.server.stopped.wait(pause)


@contextlib.contextmanager
def serving(body, monkeypatch):
    """A server on loopback, its ``url`` and the ``requests`` it got, and an impatient client."""
    monkeypatch.setattr(helpers, "STALL_TIMEOUT", 0.5)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.requests, server.stopped = body, [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.stopped.set()
        server.shutdown()


@pytest.fixture
def server(archive, monkeypatch):
    with serving(archive.read_bytes(), monkeypatch) as server:
        yield server


def test_faulty_servers_give_way_in_one_line_each_and_the_archive_is_there_the_next_time(
        server, tmp_path):
    faults = {"stall": "timed out", "wrong": "the file's md5 is", "missing": "404", "redirect": ""}
    urls = [f"{server.url}/{fault}/{ARCHIVE}" for fault in [*faults, "never"]]
    data = load(tmp_path / "new", urls=[REFUSED, *urls])
    assert data.source == f"official CIFAR-10 batches, MD5 verified, from {server.url[7:]}"
    assert len(data.train_labels) == 100 and len(data.skipped) == 6
    for reason, said in zip(data.skipped[2:], ["refused", *faults.values()]):
        assert reason.startswith("127.0.0.1:") and said in reason and "\n" not in reason
    assert len(server.requests) == 5 and set(os.listdir(tmp_path / "new")) == {BATCHES, ARCHIVE}
    assert "127.0.0.1" not in load(tmp_path / "new", urls=[urls[-1]]).source


def test_a_download_ends_at_the_limit_whatever_the_server_does(server, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "DOWNLOAD_LIMIT", 2)
    with pytest.raises(helpers.SourceUnavailable, match="no file after 2 s"):
        helpers.download(f"{server.url}/headers/a", tmp_path / "file", "md5", "")
    assert server.requests and os.listdir(tmp_path) == []


def test_a_proxy_that_is_set_after_a_failure_is_used_and_a_file_url_is_named(
        server, archive, tmp_path, monkeypatch):
    url = f"http://nowhere.invalid/good/{ARCHIVE}"
    with pytest.raises(RuntimeError, match="- nowhere.invalid: "):
        load(tmp_path / "one", allow_stand_in=False, urls=[url])
    monkeypatch.setenv("http_proxy", server.url.replace("127.0.0.1", "localhost"))
    assert load(tmp_path / "one", urls=[url]).source.endswith("from nowhere.invalid")
    data = load(tmp_path / "two", urls=[archive.as_uri()])
    assert data.source.endswith(f"from {archive.as_uri()}")


def test_torchvision_itself_is_the_last_source(server, tmp_path, monkeypatch):
    url = f"{server.url}/good/{ARCHIVE}"
    monkeypatch.setattr(datasets.CIFAR10, "url", url)
    patch = "\nfrom torchvision.datasets import CIFAR10\n" + "".join(
        f"CIFAR10.{name} = {getattr(datasets.CIFAR10, name)!r}\n"
        for name in ("url", "tgz_md5", "train_list", "test_list", "meta"))
    monkeypatch.setattr(helpers, "FETCH_BY_TORCHVISION", patch + helpers.FETCH_BY_TORCHVISION)
    data = load(tmp_path, urls=[REFUSED, url])
    assert len(data.train_labels) == 100 and "official" in data.source
    assert set(os.listdir(tmp_path)) == {BATCHES, ARCHIVE} and "torchvision" not in server.requests[0]


def test_a_disk_that_cannot_take_the_archive_is_one_sentence_and_not_the_stand_in(
        tmp_path, monkeypatch):
    full = "\nraise OSError(28, 'No space left on device')"
    monkeypatch.setattr(helpers, "FETCH", full)
    with pytest.raises(RuntimeError, match="written .*one: .*No space.*make room"):
        load(tmp_path, urls=["http://one/", "http://two/"])
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RuntimeError, match="Not a directory.*make room"):
        load(tmp_path / "file" / "data", urls=["http://one/"])


def test_the_stand_in_comes_last_if_allowed_or_each_source_and_its_fault_is_named(tmp_path):
    data = load(tmp_path, urls=[REFUSED])
    assert data.is_stand_in and "STAND-IN" in data.source
    with pytest.raises(RuntimeError, match="Set ALLOW_STAND_IN") as error:
        load(tmp_path, allow_stand_in=False, urls=[REFUSED])
    for part, reason in zip(("no official", "no image folders", "refused"), data.skipped):
        assert part in reason and reason in str(error.value)
    assert len(data.skipped) == 3 and os.listdir(tmp_path) == []


def test_the_stand_in_is_every_digit_of_scikit_learn_once_enlarged_split_by_the_seed():
    data, same, other = map(helpers.make_stand_in, (1, 1, 2))
    assert data.test_images.tobytes() == same.test_images.tobytes() != other.test_images.tobytes()
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    small, digits = images[:, ::4, ::4, 0], load_digits()
    assert np.array_equal(images, np.kron(small[..., None], np.ones((1, 4, 4, 3))))
    original = np.rint(digits.images * 255 / 16).astype(np.uint8)
    assert sorted((x.tobytes(), y) for x, y in zip(small, labels)) == sorted(
        (x.tobytes(), y) for x, y in zip(original, digits.target))
    assert np.allclose(np.bincount(data.test_labels) / np.bincount(labels), 0.2, atol=0.005)


IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("as_given", [
    list, tuple, lambda x: x.astype(np.uint8), lambda x: x.astype(np.int32)[:, None],
    torch.from_numpy])
def test_new_ids_follow_ascending_cifar10_ids_whatever_holds_the_labels(as_given):
    ids, names = helpers.class_mapping(["cat", "dog", "airplane"])
    assert ids == {0: 0, 3: 1, 5: 2} and names == {"airplane": 0, "cat": 1, "dog": 2}
    labels = as_given(np.array([5, 1, 3, 0, 5, 9]))
    kept, new = helpers.filter_and_relabel(list(IMAGES), labels, ids)
    assert kept[:, 0, 0, 0].tolist() == [0, 2, 3, 4] and kept.dtype == np.uint8
    assert new.tolist() == [2, 1, 0, 2] and new.dtype == np.int64
    assert len(helpers.stratified_split(as_given(np.arange(20) % 2), 0.1, seed=1)[1]) == 2


@pytest.mark.parametrize("refused, message", [
    (lambda: helpers.class_mapping(["cat", "unicorn"]), "unicorn'.*each once"),
    (lambda: helpers.class_mapping(["cat", "cat"]), "'cat', 'cat'.*each once"),
    (lambda: helpers.filter_and_relabel(IMAGES, range(6), {0: 0, 9: 1}), r"id \[9\]"),
    (lambda: helpers.filter_and_relabel(IMAGES, [0] * 5, {0: 0}), r"\(5,\): .* each of 6 images"),
    (lambda: helpers.filter_and_relabel(IMAGES / 1.0, [0] * 6, {0: 0}), "images are float64"),
    (lambda: helpers.filter_and_relabel(IMAGES[:, 1:], [0] * 6, {0: 0}), r"\(6, 31, 32, 3\)"),
    (lambda: helpers.filter_and_relabel(IMAGES, [0.5] * 6, {0: 0}), "labels are float64"),
    (lambda: helpers.filter_and_relabel(IMAGES, np.zeros((6, 2), int), {0: 0}), r"\(6, 2\)")])
def test_what_cannot_be_filtered_is_refused_with_its_value(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


def test_the_split_is_stratified_disjoint_complete_sorted_and_repeatable():
    labels = np.tile(np.repeat([0, 1, 2], [5, 3, 2]), 20)
    train, val = helpers.stratified_split(labels, 0.1, seed=1)
    assert sorted([*train, *val]) == list(range(200))
    assert np.bincount(labels[val]).tolist() == [10, 6, 4]
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0)
    assert np.array_equal(helpers.stratified_split(labels, 0.1, seed=1)[1], val)
    assert not np.array_equal(helpers.stratified_split(labels, 0.1, seed=2)[1], val)


@pytest.mark.parametrize("fraction, smallest", [(0.1, 10), (0.5, 2), (0.75, 4)])
def test_a_class_needs_an_image_on_each_side_of_the_split(fraction, smallest):
    labels = np.array([0] * 50 + [1] * smallest)
    for part in helpers.stratified_split(labels, fraction, seed=1):
        assert set(labels[part]) == {0, 1}
    with pytest.raises(ValueError, match=f"val_fraction is {fraction}: .* {smallest - 1} images"):
        helpers.stratified_split(labels[:-1], fraction, seed=1)
