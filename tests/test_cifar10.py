"""CIFAR-10: sources, download, stand-in, filtering, splitting."""

import dataclasses
import hashlib
import http.server
import os
import pickle
import shutil
import socket
import tarfile
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchvision import datasets

import helpers
from conftest import write_image_tree

NO_URLS = ()


# --- a small archive in the official layout, and torchvision told its checksums ----------


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A tiny official-looking archive whose MD5s are the ones that are checked for."""
    folder = tmp_path / "made" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lists = {"train_list": [f"data_batch_{i}" for i in range(1, 6)], "test_list": ["test_batch"]}
    for attribute, names in lists.items():
        for name in names:
            pixels = rng.integers(0, 256, size=(20, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]}))
        monkeypatch.setattr(datasets.CIFAR10, attribute, [[name, md5(folder / name)] for name in names])
    meta = folder / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": list(helpers.CIFAR10_CLASSES)}))
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": meta.name, "key": "label_names", "md5": md5(meta)})
    path = tmp_path / "made" / helpers.ARCHIVE_NAME
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    monkeypatch.setattr(helpers, "ARCHIVE_MD5", md5(path))
    return path


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def load(data_dir, allow_stand_in=False, urls=NO_URLS):
    return helpers.load_cifar10(data_dir, allow_stand_in, seed=1, urls=urls)


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


# --- source 1: official files -------------------------------------------------------------


def test_torchvision_knows_the_same_archive():
    assert datasets.CIFAR10.tgz_md5 == helpers.ARCHIVE_MD5 == "c58f30108f718f92721af3b95e74349a"
    assert datasets.CIFAR10.filename == helpers.ARCHIVE_NAME
    assert datasets.CIFAR10.url == helpers.DOWNLOAD_URLS[-1]


def test_the_archive_is_verified_unpacked_and_used(archive, data_dir):
    shutil.copy(archive, data_dir)
    data = load(data_dir)
    assert data.source == "official CIFAR-10 batches, MD5 verified" and not data.is_stand_in
    assert data.train_images.shape == (100, 32, 32, 3) and data.train_images.dtype == np.uint8
    assert data.test_images.shape == (20, 32, 32, 3) and data.test_labels.dtype == np.int64
    assert contents(data_dir) == [datasets.CIFAR10.base_folder, helpers.ARCHIVE_NAME]


def test_unpacked_batches_are_used_without_the_archive(archive, data_dir):
    shutil.copytree(archive.parent / datasets.CIFAR10.base_folder, data_dir / datasets.CIFAR10.base_folder)
    assert load(data_dir).train_labels.tolist() == list(range(10)) * 10


def test_official_files_come_before_image_folders(archive, data_dir):
    shutil.copy(archive, data_dir)
    write_image_tree(data_dir, 1, 1)
    assert load(data_dir).source.startswith("official")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_batches_are_never_unpickled_and_are_restored_from_the_archive(archive, data_dir, damage):
    shutil.copytree(archive.parent / datasets.CIFAR10.base_folder, data_dir / datasets.CIFAR10.base_folder)
    batch = data_dir / datasets.CIFAR10.base_folder / "data_batch_3"
    good = batch.read_bytes()
    if damage == "remove":
        batch.unlink()
    else:
        batch.write_bytes(good[:-10] if damage == "truncate" else good[:-1] + b"!")
    with pytest.raises(RuntimeError, match="cifar-10-batches-py in .* is incomplete or damaged"):
        load(data_dir, allow_stand_in=True)
    shutil.copy(archive, data_dir)
    assert len(load(data_dir).train_labels) == 100 and batch.read_bytes() == good


def test_a_truncated_archive_is_named_and_never_replaced_by_the_stand_in(archive, data_dir):
    (data_dir / helpers.ARCHIVE_NAME).write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=r"cifar-10-python.tar.gz in .* incomplete or damaged .*delete it"):
        load(data_dir, allow_stand_in=True)


def test_a_full_disk_while_unpacking_leaves_nothing_half_written(archive, data_dir, monkeypatch):
    shutil.copy(archive, data_dir)

    def full(source, folder):
        with open(os.path.join(folder, "half"), "w") as file:
            file.write("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(helpers, "extract_archive", full)
    with pytest.raises(RuntimeError, match="cannot be unpacked in .*No space left on device.*make room"):
        load(data_dir)
    assert contents(data_dir) == [helpers.ARCHIVE_NAME]


# --- source 2: image folders --------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".PNG"])
def test_image_folders_are_read_in_the_order_of_their_names(data_dir, suffix):
    shapes = write_image_tree(data_dir, 3, 2, suffix)
    data = load(data_dir)
    assert np.array_equal(data.train_images, shapes.train_images)
    assert np.array_equal(data.train_labels, shapes.train_labels)
    assert np.array_equal(data.test_images, shapes.test_images)
    assert "image folders" in data.source and "not verified" in data.source and "50 files, PNG, INCOMPLETE: CIFAR-10 has 60,000)" in data.source
    assert data.skipped == (f"no official CIFAR-10 batches or archive in '{data_dir}'",)


def test_jpeg_folders_are_read_too(data_dir):
    write_image_tree(data_dir, 1, 1, ".jpg")
    assert "JPG" in load(data_dir).source


def test_other_files_and_folders_are_left_alone(data_dir):
    write_image_tree(data_dir, 1, 1)
    train = data_dir / helpers.IMAGE_FOLDERS / "train"
    (train / "cat" / "Thumbs.db").write_bytes(b"x")
    (train / "cat" / "._00003.png").write_bytes(b"x")
    (train / ".ipynb_checkpoints").mkdir()
    assert len(load(data_dir).train_labels) == 10


def replace_image(folder, **kwargs):
    next((folder / "train" / "dog").iterdir()).unlink()
    Image.new(kwargs.pop("mode", "RGB"), kwargs.pop("size", (32, 32))).save(folder / "train" / "dog" / "new.png")


BROKEN_FOLDERS = {
    "has no folder for the class 'frog'": lambda f: shutil.rmtree(f / "train" / "frog"),
    "cifar10-images/test has no folder for the class 'airplane'": lambda f: shutil.rmtree(f / "test"),
    "cifar10-images/test/ship holds no PNG or JPEG image": lambda f: [p.unlink() for p in (f / "test" / "ship").iterdir()],
    "train/dog/new.png is 31x32 RGB, not 32x32 RGB": lambda f: replace_image(f, size=(31, 32)),
    "train/dog/new.png is 32x32 L, not 32x32 RGB": lambda f: replace_image(f, mode="L"),
    "train/cat/a.png cannot be read as an image": lambda f: (f / "train" / "cat" / "a.png").write_bytes(b"no image"),
    "train/cat/00006.png cannot be read as an image": lambda f: (f / "train" / "cat" / "00006.png").write_bytes(
        (f / "train" / "cat" / "00006.png").read_bytes()[:200]),
    "train/cat/b.jpg cannot be read as an image": lambda f: (f / "train" / "cat" / "b.jpg").touch(),
}


@pytest.mark.parametrize("message", BROKEN_FOLDERS)
def test_a_broken_image_folder_is_named_and_never_replaced_by_the_stand_in(data_dir, message):
    write_image_tree(data_dir, 2, 2)
    BROKEN_FOLDERS[message](data_dir / helpers.IMAGE_FOLDERS)
    with pytest.raises(RuntimeError) as error:
        load(data_dir, allow_stand_in=True)
    assert message in str(error.value) and "Mend what is named above" in str(error.value)


# --- source 3: download -------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    body = b""

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.path == "/wrong":
            self.wfile.write(self.body[::-1])
        elif self.path == "/cut":
            self.wfile.write(self.body[: len(self.body) // 2])
        elif self.path == "/stall":
            self.wfile.write(self.body[: len(self.body) // 2])
            self.wfile.flush()
            self.server.released.wait(20)
        else:
            self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(archive):
    """Serves the archive on loopback, well and badly."""
    handler = type("ArchiveHandler", (Handler,), {"body": archive.read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.paths, server.released = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("path", ["/good", "/redirect"])
def test_the_archive_is_downloaded_verified_and_used(server, data_dir, path):
    data = load(data_dir, urls=[server.url + path])
    assert data.source == "official CIFAR-10 batches, MD5 verified, downloaded from 127.0.0.1"
    assert len(data.train_labels) == 100 and len(data.skipped) == 2
    assert contents(data_dir) == [datasets.CIFAR10.base_folder, helpers.ARCHIVE_NAME]
    assert load(data_dir).source == "official CIFAR-10 batches, MD5 verified"  # and is there the next time


def test_a_source_that_cannot_serve_gives_way_to_the_next(server, data_dir, monkeypatch):
    monkeypatch.setattr(helpers, "STALL_TIMEOUT", 0.5)
    with socket.socket() as closed:  # a port on which nobody listens
        closed.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    bad = [server.url + path for path in ("/missing", "/wrong", "/cut", "/stall")] + [refused]
    data = load(data_dir, urls=bad + [server.url + "/good", server.url + "/never"])
    assert server.paths == ["/missing", "/wrong", "/cut", "/stall", "/good"]
    reasons = "\n".join(data.skipped)
    for text in ("HTTP 404", "the file has MD5", "the connection was cut after|IncompleteRead", "timed out after", "refused"):
        assert any(part in reasons for part in text.split("|")), (text, reasons)
    assert contents(data_dir) == [datasets.CIFAR10.base_folder, helpers.ARCHIVE_NAME]


@pytest.mark.parametrize("path", ["/missing", "/wrong", "/cut", "/stall"])
def test_a_failed_download_leaves_nothing_behind(server, data_dir, monkeypatch, path):
    monkeypatch.setattr(helpers, "STALL_TIMEOUT", 0.3)
    with pytest.raises(helpers.SourceError, match=r"^127\.0\.0\.1: "):
        helpers.download_archive(server.url + path, data_dir / "file", helpers.ARCHIVE_MD5)
    assert contents(data_dir) == []


def test_a_server_that_accepts_but_never_answers_is_given_up(data_dir, monkeypatch):
    monkeypatch.setattr(helpers, "STALL_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(helpers.SourceError, match="timed out"):
            helpers.download_archive(f"http://127.0.0.1:{silent.getsockname()[1]}/", data_dir / "file", "0")
        assert time.monotonic() - start < 5


def test_the_connect_time_out_is_handed_to_the_opener(data_dir, monkeypatch):
    seen = []

    class Opener:
        def open(self, request, timeout):
            seen.append(timeout)
            raise TimeoutError("timed out")

    monkeypatch.setattr(helpers.urllib.request, "build_opener", lambda *handlers: Opener())
    with pytest.raises(helpers.SourceError, match="host: timed out"):
        helpers.download_archive("http://host/file", data_dir / "file", "0")
    assert seen == [helpers.CONNECT_TIMEOUT] == [15]


def test_an_old_partial_file_never_counts(server, data_dir):
    (data_dir / (helpers.ARCHIVE_NAME + ".part")).write_bytes(b"old")
    assert len(load(data_dir, urls=[server.url + "/good"]).train_labels) == 100
    assert contents(data_dir) == [datasets.CIFAR10.base_folder, helpers.ARCHIVE_NAME]


def test_a_download_replaces_a_damaged_archive(server, archive, data_dir):
    (data_dir / helpers.ARCHIVE_NAME).write_bytes(b"damaged")
    assert "downloaded" in load(data_dir, urls=[server.url + "/good"]).source
    assert md5(data_dir / helpers.ARCHIVE_NAME) == md5(archive)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(helpers.SourceError, match="cannot write to .*set DATA_DIR"):
        helpers.download_archive(server.url + "/good", tmp_path / "file" / "archive", helpers.ARCHIVE_MD5)


def test_a_full_disk_while_downloading_leaves_nothing_behind(server, data_dir, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(helpers.os, "replace", full)
    with pytest.raises(helpers.SourceError, match="No space left on device"):
        helpers.download_archive(server.url + "/good", data_dir / "file", helpers.ARCHIVE_MD5)
    assert contents(data_dir) == []


def test_a_download_that_cannot_be_stored_is_not_tried_elsewhere_nor_replaced_by_the_stand_in(
        server, data_dir, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(helpers.os, "replace", full)
    with pytest.raises(RuntimeError, match="cannot write to .*No space left on device.*make room.*\nMend"):
        helpers.load_cifar10(data_dir, True, 1, urls=[server.url + "/good", server.url + "/redirect"])
    assert server.paths == ["/good"] and contents(data_dir) == []


@pytest.mark.parametrize("name, what", [
    ("_read_batches", "cifar-10-batches-py in"), ("check_integrity", "cifar-10-python.tar.gz in")])
def test_official_files_that_cannot_be_read_are_one_sentence(archive, data_dir, monkeypatch, name, what):
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    shutil.copy(archive, data_dir)
    monkeypatch.setattr(helpers, name, denied)
    with pytest.raises(RuntimeError, match=f"{what} .* cannot be read .Permission denied"):
        load(data_dir, allow_stand_in=True)


def test_an_image_folder_that_cannot_be_read_is_one_sentence(data_dir, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    write_image_tree(data_dir, 1, 1)
    monkeypatch.setattr(helpers.Path, "iterdir", denied)
    with pytest.raises(RuntimeError, match="cifar10-images/train/airplane cannot be read .Permission denied"):
        load(data_dir, allow_stand_in=True)


def test_a_good_download_that_cannot_be_unpacked_is_not_fetched_again_nor_replaced_by_the_stand_in(
        server, data_dir, monkeypatch):
    def full(source, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(helpers, "extract_archive", full)
    with pytest.raises(RuntimeError, match="cannot be unpacked in .*No space left on device.*make room"):
        helpers.load_cifar10(data_dir, True, 1, urls=[server.url + "/good", server.url + "/redirect"])
    assert server.paths == ["/good"] and contents(data_dir) == [helpers.ARCHIVE_NAME]


def test_numpy_warnings_on_the_old_pickles_stay_out_of_the_outputs(archive, data_dir, monkeypatch):
    class Loud(datasets.CIFAR10):
        def __init__(self, *args, **kwargs):
            warnings.warn("dtype(): align should be passed as Python or NumPy boolean")
            super().__init__(*args, **kwargs)

    shutil.copy(archive, data_dir)
    load(data_dir)
    monkeypatch.setattr(helpers.datasets, "CIFAR10", Loud)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        helpers._read_batches(data_dir)
    assert caught == []


def test_the_last_error_lists_every_source_and_why_it_failed(server, data_dir):
    with pytest.raises(RuntimeError) as error:
        load(data_dir, urls=[server.url + "/missing", server.url + "/wrong"])
    message = str(error.value)
    for text in ("no official", "no image folders", "HTTP 404", "has MD5", "ALLOW_STAND_IN", str(data_dir)):
        assert text in message


# --- source 4: stand-in -------------------------------------------------------------------


def test_the_stand_in_comes_last_and_says_what_it_is(data_dir):
    data = load(data_dir, allow_stand_in=True)
    assert data.is_stand_in and "STAND-IN" in data.source and "not CIFAR-10" in data.source
    assert len(data.skipped) == 2 and contents(data_dir) == []
    with pytest.raises(RuntimeError, match="could not be loaded"):
        load(data_dir, allow_stand_in=False)


def test_the_stand_in_is_the_same_for_the_same_seed_and_quick():
    start = time.monotonic()
    one = helpers.make_stand_in(1)
    assert time.monotonic() - start < 5
    same, other = helpers.make_stand_in(1), helpers.make_stand_in(2)
    assert one.train_images.tobytes() == same.train_images.tobytes()
    assert one.test_images.tobytes() == same.test_images.tobytes()
    assert one.train_images.tobytes() != other.train_images.tobytes()
    assert np.bincount(one.train_labels).tolist() == [800] * 10
    assert np.bincount(one.test_labels).tolist() == [100] * 10


def test_the_figures_of_the_stand_in_are_lighter_or_darker_than_their_ground():
    data = helpers.make_stand_in(1)
    discs = data.train_images[data.train_labels == 0].astype(float)
    lighter = discs[:, 14:18, 14:18].mean((1, 2, 3)) > discs[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean((1, 2))
    assert 0.4 < lighter.mean() < 0.6


def test_the_default_network_learns_the_stand_in():
    data = helpers.make_stand_in(1)
    mapping, _ = helpers.class_mapping(["cat", "dog", "airplane"])
    train = helpers.filter_and_relabel(data.train_images, data.train_labels, mapping)
    test = helpers.filter_and_relabel(data.test_images, data.test_labels, mapping)
    loaders = [helpers.make_loader(*part, transform, 32, 128, seed=1)
               for part, transform in ((train, helpers.train_transform), (test, helpers.eval_transform))]
    model = helpers.build_model("resnet18", 1)
    helpers.replace_head(model, 3, 1)
    recipe = dataclasses.replace(helpers.RECIPES["random"], epochs=5)
    cpu = torch.device("cpu")
    helpers.fit(model, recipe, *loaders, 32, cpu, torch.float32, 1, on_epoch=lambda line: None)
    assert helpers.evaluate(model, loaders[1], cpu)[1] > 0.95


@pytest.mark.parametrize("names", [("cat", "dog", "airplane"), helpers.CIFAR10_CLASSES])
def test_a_linear_model_stays_under_90_percent_on_the_stand_in(names):
    data = helpers.make_stand_in(1)
    keep = [np.isin(y, [helpers.CIFAR10_CLASSES.index(n) for n in names]) for y in (data.train_labels, data.test_labels)]
    flat = [x[k].reshape(k.sum(), -1) / 255 for x, k in zip((data.train_images, data.test_images), keep)]
    linear = LogisticRegression(max_iter=1000, C=0.001).fit(flat[0], data.train_labels[keep[0]])
    assert linear.score(flat[1], data.test_labels[keep[1]]) < 0.9


# --- filtering, relabelling, splitting ------------------------------------------------------


def test_new_ids_follow_ascending_cifar10_ids():
    assert helpers.class_mapping(["cat", "dog", "airplane"]) == (
        {0: 0, 3: 1, 5: 2}, {"airplane": 0, "cat": 1, "dog": 2})
    assert helpers.class_mapping(("truck", "bird"))[0] == {2: 0, 9: 1}


@pytest.mark.parametrize("names, message", [(["cat", "unicorn"], "unicorn"), (["cat", "cat"], "repeat")])
def test_unknown_and_repeated_class_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        helpers.class_mapping(names)


def test_filtering_keeps_the_order_and_relabels():
    labels = np.array([5, 1, 3, 0, 5, 9])
    images = np.arange(6)
    kept, new = helpers.filter_and_relabel(images, labels, {0: 0, 3: 1, 5: 2})
    assert kept.tolist() == [0, 2, 3, 4] and new.tolist() == [2, 1, 0, 2] and new.dtype == np.int64


def test_filtering_refuses_a_class_without_images_and_unequal_lengths():
    with pytest.raises(ValueError, match=r"original class id \[3\]"):
        helpers.filter_and_relabel(np.zeros(2), np.array([0, 5]), {0: 0, 3: 1, 5: 2})
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        helpers.filter_and_relabel(np.zeros(2), np.zeros(3), {0: 0})


def test_the_split_is_stratified_disjoint_complete_and_repeatable():
    labels = np.repeat([0, 1, 2], [100, 60, 40])
    train, val = helpers.stratified_split(labels, 0.1, seed=1)
    assert sorted([*train, *val]) == list(range(200))
    assert np.bincount(labels[val]).tolist() == [10, 6, 4]
    assert np.array_equal(helpers.stratified_split(labels, 0.1, seed=1)[1], val)
    assert not np.array_equal(helpers.stratified_split(labels, 0.1, seed=2)[1], val)
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0)


@pytest.mark.parametrize("labels, fraction", [([0, 0, 1], 0.5), ([0] * 50 + [1] * 2, 0.04)])
def test_a_split_that_would_lose_a_class_is_refused(labels, fraction):
    with pytest.raises(ValueError, match=f"val_fraction {fraction}"):
        helpers.stratified_split(np.array(labels), fraction, seed=1)


def test_counts_per_class_name_empty_classes_too():
    assert helpers.count_per_class(np.array([2, 0, 2]), 3) == {0: 1, 1: 0, 2: 2}
