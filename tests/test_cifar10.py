"""CIFAR-10: where it is found, downloads, damage, the stand-in, filtering and splitting."""

import errno
import pickle
import re
import shutil
import socket
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

import helpers
from helpers import ARCHIVE_NAME, BATCHES
from server import serve

NOBODY = "http://127.0.0.1:1/"  # a port on which nobody listens
EVIL = b"cbuiltins\nopen\n(Vran.txt\nVw\ntR."  # a pickle that makes the file ran.txt
DAMAGES = ["removed", "cut short", "evil"]
BATCH_FILES = ["data_batch_1", "test_batch", "batches.meta"]


def load(data_dir, urls=(), allow_stand_in=False):
    return helpers.load_cifar10(data_dir, allow_stand_in, seed=1, urls=urls)


def put(path, folder):
    """Copy a file or a folder into a folder, under its own name."""
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, folder / path.name)
    else:
        shutil.copy(path, folder)


def damage(path, how):
    if how == "removed":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.write_bytes(EVIL)


def contents(folder):
    """{path: bytes, or None for a folder} of all that is in a folder."""
    found = {}
    for path in folder.rglob("*"):
        found[path.relative_to(folder)] = path.read_bytes() if path.is_file() else None
    return found


def assert_is_official(data, official_files):
    """Both splits are what the official batches hold, pixel by pixel."""
    for (images, labels), name in ((data.train, "data_batch_1"), (data.test, "test_batch")):
        written = pickle.loads((official_files / BATCHES / name).read_bytes())
        n = len(written["labels"])
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8
        assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(n, 3072), written["data"])
        assert labels.tolist() == written["labels"] and labels.dtype == np.int64
    assert data.source.startswith("official CIFAR-10 batches, MD5 verified")
    assert not data.is_stand_in


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Whatever proxy the machine uses, it is not asked for this machine's own addresses."""
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server(official_files, monkeypatch):
    """A server of the archive, and a client that gives up after half a second of silence."""
    monkeypatch.setattr(helpers, "STALL_TIMEOUT", 0.5)
    with serve((official_files / ARCHIVE_NAME).read_bytes()) as server:
        yield server


# ---- Found on the disk ----


def test_batches_on_the_disk_are_read_and_nothing_is_written_or_asked_for(
        official_files, tmp_path, server):
    put(official_files / BATCHES, tmp_path)
    before = contents(tmp_path)
    data = load(tmp_path, [f"{server.url}/good/{ARCHIVE_NAME}"], allow_stand_in=True)
    assert_is_official(data, official_files)
    assert data.source == "official CIFAR-10 batches, MD5 verified" and data.skipped == ()
    assert contents(tmp_path) == before and server.requests == []


def test_an_archive_on_the_disk_is_unpacked_beside_itself(official_files, tmp_path):
    put(official_files / ARCHIVE_NAME, tmp_path)
    assert_is_official(load(str(tmp_path)), official_files)
    assert contents(tmp_path) == contents(official_files)


def test_the_archive_is_unpacked_through_a_linked_batches_folder(official_files, tmp_path):
    put(official_files / ARCHIVE_NAME, tmp_path)
    (tmp_path / "disk").mkdir()
    try:
        (tmp_path / BATCHES).symlink_to("disk", target_is_directory=True)
    except OSError as error:
        pytest.skip(f"symbolic links are refused here: {error}")
    assert_is_official(load(tmp_path), official_files)
    assert contents(tmp_path / "disk") == contents(official_files / BATCHES)


@pytest.mark.parametrize("what, folder, data_dir", [
    (BATCHES, "disk", f"disk/{BATCHES}"),
    (ARCHIVE_NAME, "disk", f"disk/{ARCHIVE_NAME}"),
    (BATCHES, BATCHES, BATCHES),
    (ARCHIVE_NAME, BATCHES, BATCHES),
    (ARCHIVE_NAME, "disk", "~/disk")],
    ids=["the batches' own", "the archive's own", "a folder named so that holds the batches",
         "a folder named so that holds the archive", "one in the home folder"])
def test_data_dir_may_be_any_of_these_paths(
        official_files, tmp_path, monkeypatch, what, folder, data_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    put(official_files / what, tmp_path / folder)
    assert_is_official(load(data_dir), official_files)
    assert contents(tmp_path / folder / BATCHES) == contents(official_files / BATCHES)


@pytest.mark.filterwarnings("error::UserWarning")
def test_numpys_warnings_on_old_pickles_are_not_shown(official_files, monkeypatch):
    def warn(self):
        warnings.warn("dtype(): align should be passed as Python or NumPy boolean")

    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", warn)
    assert_is_official(load(official_files), official_files)


# ---- Damage ----


@pytest.mark.parametrize("name", BATCH_FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_batches_are_unpacked_again_from_the_archive(official_files, tmp_path, name, how):
    put(official_files / BATCHES, tmp_path)
    put(official_files / ARCHIVE_NAME, tmp_path)
    damage(tmp_path / BATCHES / name, how)
    assert_is_official(load(tmp_path), official_files)
    assert contents(tmp_path) == contents(official_files)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_batches_are_replaced_by_a_download(official_files, tmp_path, server, how):
    put(official_files / BATCHES, tmp_path)
    damage(tmp_path / BATCHES / "test_batch", how)
    data = load(tmp_path, [f"{server.url}/good/{ARCHIVE_NAME}"])
    assert_is_official(data, official_files)
    assert data.skipped == (f"damaged (MD5) in '{tmp_path}': {BATCHES}",)
    assert contents(tmp_path) == contents(official_files)


@pytest.mark.parametrize("name", BATCH_FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_batches_without_a_source_are_named_and_no_digits_take_their_place(
        official_files, tmp_path, monkeypatch, name, how):
    put(official_files / BATCHES, tmp_path)
    damage(tmp_path / BATCHES / name, how)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)  # where the evil pickle would make its file
    with pytest.raises(RuntimeError) as error:
        load(tmp_path, [NOBODY], allow_stand_in=True)
    lines = str(error.value).split("\n")
    assert lines[1] == f"- damaged (MD5) in '{tmp_path}': {BATCHES}"
    assert lines[2].startswith("- 127.0.0.1:1: ")
    assert lines[3].endswith(f"{ARCHIVE_NAME} into '{tmp_path}', or delete the damaged files.")
    assert contents(tmp_path) == before
    pickle.loads(EVIL).close()  # it would have made its file, had it been read
    assert (tmp_path / "ran.txt").is_file()


def test_a_damaged_archive_is_named_or_replaced_by_a_download(official_files, tmp_path, server):
    put(official_files / ARCHIVE_NAME, tmp_path)
    damage(tmp_path / ARCHIVE_NAME, "cut short")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match=r"damaged \(MD5\) in '.*': cifar-10-python.tar.gz\n"):
        load(tmp_path, allow_stand_in=True)
    assert contents(tmp_path) == before
    data = load(tmp_path, [f"{server.url}/good/{ARCHIVE_NAME}"])
    assert_is_official(data, official_files)
    assert contents(tmp_path) == contents(official_files)


# ---- Downloads ----


@pytest.mark.parametrize("fault, said", [
    ("missing", "404"), ("html", "MD5"), ("wrong", "MD5"), ("cut", "MD5|IncompleteRead"),
    ("silent", "timed out")])
def test_a_faulty_server_gives_way_to_the_next_and_none_is_asked_after_that(
        official_files, tmp_path, server, fault, said):
    behaviours = [fault, "redirect", "missing"]
    urls = [f"{server.url}/{behaviour}/{ARCHIVE_NAME}" for behaviour in behaviours]
    host = server.url[len("http://"):]
    data = load(tmp_path / "new" / "folder", [NOBODY, *urls], allow_stand_in=True)
    assert_is_official(data, official_files)
    assert data.source.endswith(f", from {host}")
    nothing_there, nobody, faulty = data.skipped
    assert nothing_there.startswith("no official CIFAR-10 batches or archive in ")
    assert nobody.startswith("127.0.0.1:1: ") and "refused" in nobody
    assert faulty.startswith(f"{host}: ") and "\n" not in faulty
    assert re.search(said, faulty)
    assert server.requests == [
        f"/{fault}/{ARCHIVE_NAME}", f"/redirect/{ARCHIVE_NAME}", f"/good/{ARCHIVE_NAME}"]
    assert contents(tmp_path / "new" / "folder") == contents(official_files)


def test_a_slow_server_that_keeps_delivering_is_let_finish(official_files, tmp_path, server):
    data = load(tmp_path, [f"{server.url}/slow/{ARCHIVE_NAME}"])  # four times STALL_TIMEOUT
    assert_is_official(data, official_files)


def test_what_was_in_data_dir_stays_as_it_was_when_downloads_fail(tmp_path, server):
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    behaviours = ["missing", "html", "wrong", "cut", "silent"]
    urls = [f"{server.url}/{behaviour}/{ARCHIVE_NAME}" for behaviour in behaviours]
    with pytest.raises(RuntimeError, match="could not be loaded"):
        load(tmp_path, urls)
    assert len(server.requests) == len(urls)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("behaviour", ["good", "wrong", "missing"])
def test_a_download_leaves_the_default_timeout_of_sockets_as_it_was(tmp_path, server, behaviour):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    try:
        load(tmp_path, [f"{server.url}/{behaviour}/{ARCHIVE_NAME}"], allow_stand_in=True)
        assert socket.getdefaulttimeout() == 77
    finally:
        socket.setdefaulttimeout(before)


def test_a_file_url_works_and_is_named_as_the_source(official_files, tmp_path):
    url = (official_files / ARCHIVE_NAME).as_uri()
    data = load(tmp_path, [url])
    assert_is_official(data, official_files)
    assert data.source.endswith(f", from {url}")


def test_a_full_disk_is_named_and_no_digits_take_the_place(tmp_path, monkeypatch):
    urls_asked = []

    def fill_disk(url, dst, *args, **kwargs):
        urls_asked.append(url)
        Path(dst).write_bytes(b"as much as fits")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fill_disk)
    message = f"'{tmp_path}' cannot be read or written (No space left on device). Make room"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        load(tmp_path, ["http://one/", "http://two/"], allow_stand_in=True)
    assert urls_asked == ["http://one/"]
    assert contents(tmp_path) == {}


def test_a_data_dir_that_cannot_be_made_is_named_and_no_digits_take_the_place(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RuntimeError, match="cannot be read or written") as error:
        load(tmp_path / "file" / "data", [NOBODY], allow_stand_in=True)
    assert str(tmp_path / "file") in str(error.value)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.strerror in str(error.value)


def test_a_file_that_cannot_be_unpacked_is_named_and_no_digits_take_the_place(
        official_files, tmp_path):
    put(official_files / ARCHIVE_NAME, tmp_path)
    in_the_way = tmp_path / BATCHES / "test_batch"
    in_the_way.mkdir(parents=True)
    with pytest.raises(RuntimeError, match=re.escape(f"'{in_the_way}' cannot be read or written")):
        load(tmp_path, [NOBODY], allow_stand_in=True)


# ---- The stand-in ----


def test_the_stand_in_is_every_digit_of_scikit_learn_enlarged_and_split_by_the_seed(tmp_path):
    data = load(tmp_path, [NOBODY], allow_stand_in=True)
    assert data.is_stand_in and data.source.startswith("STAND-IN: scikit-learn")
    assert len(data.skipped) == 2 and contents(tmp_path) == {}

    digits = load_digits()
    train_ids, test_ids = helpers.stratified_split(digits.target, 0.2, seed=1)
    for (images, labels), ids in ((data.train, train_ids), (data.test, test_ids)):
        grey = np.rint(digits.images[ids] / 16 * 255)
        enlarged = np.kron(grey[..., None], np.ones((4, 4, 3)))
        assert np.array_equal(images, enlarged) and images.dtype == np.uint8
        assert np.array_equal(labels, digits.target[ids]) and labels.dtype == np.int64
    assert len(train_ids) + len(test_ids) == 1797


def test_if_the_stand_in_is_not_allowed_all_reasons_and_a_way_out_are_told(tmp_path):
    with pytest.raises(RuntimeError) as error:
        load(tmp_path, [NOBODY, "http://localhost:1/"], allow_stand_in=False)
    lines = str(error.value).split("\n")
    assert lines[0] == "CIFAR-10 could not be loaded."
    assert lines[1] == f"- no official CIFAR-10 batches or archive in '{tmp_path}'"
    assert lines[2].startswith("- 127.0.0.1:1: ")
    assert lines[3].startswith("- localhost:1: ")
    assert lines[4] == f"Put {ARCHIVE_NAME} into '{tmp_path}', or set ALLOW_STAND_IN to True."
    assert len(lines) == 5


# ---- Classes and splits ----

IMAGES = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(32, 1).repeat(32, 2).repeat(3, 3)
LABELS = [5, 1, 3, 0, 5, 9]


def test_new_ids_follow_the_original_ids_whatever_the_order_of_the_names():
    id_mapping, name_mapping = helpers.class_mapping(["cat", "dog", "airplane"])
    assert list(id_mapping.items()) == [(0, 0), (3, 1), (5, 2)]
    assert list(name_mapping.items()) == [("airplane", 0), ("cat", 1), ("dog", 2)]
    for names in (["cat", "unicorn"], ["cat", "dog", "cat"]):
        message = re.escape(f"class names are {names}: ") + ".* each once"
        with pytest.raises(ValueError, match=message):
            helpers.class_mapping(names)


@pytest.mark.parametrize("images, labels", [
    (list(IMAGES), LABELS), (IMAGES, np.array(LABELS, dtype=np.uint8)),
    (torch.from_numpy(IMAGES), torch.tensor(LABELS)), (IMAGES, np.array(LABELS).reshape(6, 1))],
    ids=["lists", "arrays", "tensors", "a column of labels"])
def test_the_images_of_the_classes_are_kept_in_order_and_relabelled(images, labels):
    kept, new_labels = helpers.filter_and_relabel(images, labels, {0: 0, 3: 1, 5: 2})
    assert np.array_equal(kept, IMAGES[[0, 2, 3, 4]]) and kept.dtype == np.uint8
    assert new_labels.tolist() == [2, 1, 0, 2] and new_labels.dtype == np.int64


@pytest.mark.parametrize("images, labels, message", [
    (IMAGES / 255, LABELS, "images are float64 (6, 32, 32, 3)"),
    (IMAGES[:, 1:], LABELS, "images are uint8 (6, 31, 32, 3)"),
    (IMAGES[0], LABELS, "images are uint8 (32, 32, 3)"),
    (IMAGES, np.arange(5), "labels int64 (5,)"),
    (IMAGES, np.full((6, 2), 3), "labels int64 (6, 2)"),
    (IMAGES, [3.5] * 6, "labels float64 (6,)"),
    (IMAGES, [True] * 6, "labels bool (6,)"),
    (IMAGES, [3] * 6, "no image has the original class id 5")])
def test_what_cannot_be_filtered_is_refused_with_what_it_is(images, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        helpers.filter_and_relabel(images, labels, {3: 0, 5: 1})


@pytest.mark.parametrize("fraction, counts, expected", [
    (0.1, [50, 30, 10], [5, 3, 1]), (0.5, [40, 6, 2], [20, 3, 1]), (0.75, [40, 8, 4], [30, 6, 3])])
def test_a_split_is_stratified_complete_sorted_and_repeatable(fraction, counts, expected):
    labels = np.repeat([0, 1, 2], counts)
    rest, held_out = helpers.stratified_split(labels, fraction, seed=1)
    assert sorted([*rest, *held_out]) == list(range(len(labels)))
    assert list(rest) == sorted(rest) and list(held_out) == sorted(held_out)
    assert np.bincount(labels[held_out]).tolist() == expected

    _, same = helpers.stratified_split(labels.reshape(-1, 1), fraction, seed=np.int64(1))
    _, other = helpers.stratified_split(labels, fraction, seed=2)
    assert held_out.tolist() == same.tolist()
    assert held_out.tolist() != other.tolist()


@pytest.mark.parametrize("fraction", [np.float32(0.1), Fraction(1, 10)], ids=repr)
def test_a_fraction_of_another_type_splits_as_its_float_does(fraction):
    labels = np.repeat([0, 1], 30)
    rest, held_out = helpers.stratified_split(labels, fraction, seed=1)
    expected_rest, expected_held_out = helpers.stratified_split(labels, float(fraction), seed=1)
    assert np.array_equal(rest, expected_rest)
    assert np.array_equal(held_out, expected_held_out)


@pytest.mark.parametrize("fraction, smallest", [(0.1, 9), (0.5, 1), (0.75, 3), (0.1, 0)])
def test_a_class_too_small_to_be_on_both_sides_is_refused(fraction, smallest):
    labels = np.repeat([0, 1], [40, smallest]) if smallest else np.array([], dtype=int)
    message = f"the fraction is {fraction}: a class with {smallest} images"
    with pytest.raises(ValueError, match=message):
        helpers.stratified_split(labels, fraction, seed=1)


def test_a_network_that_goes_away_in_a_download_gives_way_to_the_next_source(
        tmp_path, monkeypatch):
    def fail(*args, **settings):
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    data = helpers.load_cifar10(tmp_path, True, seed=1, urls=["http://one/", "http://two/"])
    assert data.is_stand_in
    assert [reason.split(":")[0] for reason in data.skipped[1:]] == ["one", "two"]


def test_no_class_and_no_images_are_refused():
    with pytest.raises(ValueError, match="class names are \\[\\]"):
        helpers.class_mapping([])
    with pytest.raises(ValueError, match="images are int64"):
        helpers.as_arrays(3, 3)


def test_a_folder_whose_name_is_too_long_is_told_in_one_sentence():
    with pytest.raises(RuntimeError, match="cannot be read or written"):
        helpers.load_cifar10("x" * 300, True, seed=1, urls=["http://127.0.0.1:1/"])
