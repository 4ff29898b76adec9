"""CIFAR-10 and loaders: sources, downloads, stand-in, filtering, splitting, batches."""

import os
import pickle
import shutil
import socketserver
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset
from torchvision import datasets

import helpers
from conftest import to_display, write_image_tree

ARCHIVE, BATCHES, FOLDERS = helpers.ARCHIVE_NAME, helpers.BATCHES, helpers.IMAGE_FOLDERS
REFUSED = "http://127.0.0.1:1/"  # a port on which nobody listens
EVIL = b"cbuiltins\nopen\n(Vran.txt\nVw\ntR."  # a pickle that would make the file "ran.txt"
IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)


def load(data_dir, urls=(), allow_stand_in=True):
    return helpers.load_cifar10(data_dir, allow_stand_in, seed=1, urls=urls)


@pytest.fixture
def archive(tmp_path_factory, monkeypatch):
    """A tiny archive in the official layout, whose MD5s are the ones that are checked for."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    (folder / BATCHES).mkdir()
    for name, n in (("train", 100), ("test", 20), ("batches.meta", 10)):
        content = {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
                   "labels": [*range(10)] * (n // 10), "label_names": []}
        (folder / BATCHES / name).write_bytes(pickle.dumps(content))
        md5 = helpers.hash_file(folder / BATCHES / name, "md5")
        monkeypatch.setattr(datasets.CIFAR10, f"{name}_list", [[name, md5]], raising=False)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", md5)
    shutil.make_archive(folder / ARCHIVE[:-7], "gztar", folder, BATCHES)
    for owner, name in ((helpers, "ARCHIVE_MD5"), (datasets.CIFAR10, "tgz_md5")):
        monkeypatch.setattr(owner, name, helpers.hash_file(folder / ARCHIVE, "md5"))
    return folder / ARCHIVE


@pytest.mark.filterwarnings("error")  # NumPy's on old pickles, here in torchvision's place, too
def test_the_archive_is_unpacked_also_into_a_link_and_used_first(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: warnings.warn("align"))
    (tmp_path / "disk").mkdir()
    (tmp_path / BATCHES).symlink_to("disk")
    shutil.copy(archive, tmp_path)
    write_image_tree(tmp_path, 1, 1)
    data = load(tmp_path, [REFUSED])
    assert data.source == "official CIFAR-10 batches, MD5 verified" and data.skipped == ()
    pixels = pickle.loads((tmp_path / "disk" / "test").read_bytes())["data"]
    assert np.array_equal(data.test[0].transpose(0, 3, 1, 2).reshape(20, -1), pixels)
    assert data.train[0].shape == (100, 32, 32, 3) and data.train[1].tolist() == [*range(10)] * 10
    assert data.train[0].dtype == np.uint8 and data.train[1].dtype == np.int64
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(f"~/{BATCHES}").source == data.source  # the batches' own folder


@pytest.mark.parametrize("name", ["train", "test", "batches.meta"])
@pytest.mark.parametrize("damage", [os.remove, lambda file: file.write_bytes(EVIL)])
def test_bad_batches_are_named_not_run_nor_replaced(archive, tmp_path, monkeypatch, name, damage):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(archive.parent / BATCHES, tmp_path / BATCHES)
    damage(tmp_path / BATCHES / name)
    for what in (BATCHES, ARCHIVE):
        with pytest.raises(RuntimeError, match=rf"^{what} in .* damaged .*delete it"):
            load(tmp_path)
        (tmp_path / ARCHIVE).write_bytes(archive.read_bytes()[:-100])
    shutil.copy(archive, tmp_path)
    if name == "batches.meta":  # which torchvision does not unpack again
        with pytest.raises(RuntimeError, match=f"^{BATCHES} in .* damaged"):
            load(tmp_path)
        shutil.rmtree(tmp_path / BATCHES)
    assert load(tmp_path).source.startswith("official")
    assert set(os.listdir(tmp_path)) == {BATCHES, ARCHIVE}


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg"])
def test_image_folders_are_read_class_by_class_in_the_order_of_their_names(tmp_path, suffix):
    digits, copy = write_image_tree(tmp_path, 3, 2, suffix), tmp_path / FOLDERS
    (copy / "train/cat/Thumbs.db").write_bytes(b"no image")
    data = load(tmp_path, [REFUSED])
    for split, n in (("train", 3), ("test", 2)):
        (images, labels), (found, ids) = getattr(digits, split), getattr(data, split)
        assert ids.tolist() == np.repeat(range(10), n).tolist() and ids.dtype == np.int64
        expected = np.concatenate([images[labels == label][:n] for label in range(10)])
        assert np.abs(found - expected.astype(float)).mean() <= (0 if suffix == ".png" else 5)
    assert "not verified" in data.source and not data.is_stand_in
    assert data.skipped == (f"no official CIFAR-10 batches or archive in '{tmp_path}'",)
    shutil.rmtree(copy / "train/ship")
    for folder in (copy, tmp_path):  # the copy itself, or above it
        some = helpers.load_cifar10(folder, False, 1, ["cat", "dog"], urls=())
        assert np.unique(some.train[1]).tolist() == [3, 5]


@pytest.mark.parametrize("message, damage", [
    ("^cifar10-images/test/cat/n.png", lambda f: Image.new("L", (9, 9)).save(f / "test/cat/n.png")),
    ("^cifar10-images/test/cat/00001.png", lambda f: os.truncate(f / "test/cat/00001.png", 90)),
    ("^CIFAR-10 cannot be read .* cat.*: add what", lambda f: [
        shutil.rmtree(f / "test/cat"), os.symlink("cat", f / "test/cat")]),
    ("^CIFAR-10 cannot be read .*: add what", lambda f: [
        shutil.rmtree(f.parent), os.symlink("data", f.parent)]),
    ("written .*one: .*No space.*make room", shutil.rmtree)])
def test_bad_images_and_disks_are_named_and_not_replaced(tmp_path, monkeypatch, message, damage):
    monkeypatch.setattr(helpers, "FETCH", "\nraise OSError(28, 'No space left on device')")
    write_image_tree(tmp_path / "data", 2, 2)
    damage(tmp_path / "data" / FOLDERS)
    with pytest.raises(RuntimeError, match=message):
        load(tmp_path / "data", ["http://one/", "http://two/"])
    assert not [*tmp_path.rglob(".*")]


class Handler(socketserver.StreamRequestHandler):
    """Answers a request for /<fault>/<name> as that fault demands."""

    def handle(self):
        request, body = b"".join(iter(self.rfile.readline, b"\r\n")), self.server.body
        self.server.requests.append(request)
        fault, name = request.split()[1].split(b"/")[-2:]
        head = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n" % len(body)
        answers = {
            b"good": [head, b"\r\n" + body], b"wrong": [head, b"\r\n" + body[::-1]],
            b"redirect": [b"HTTP/1.0 302 Found\r\nLocation: /good/%s\r\n\r\n" % name],
            b"missing": [b"HTTP/1.0 404 Not Found\r\n\r\n"], b"slow": [head, *[b"X: y\r\n"] * 90],
            b"stall": [head, b"\r\n" + body[:100], *[b""] * 600]}
        for piece in answers[fault]:
            self.wfile.write(piece)
            self.server.stopped.wait(0.1)


@pytest.fixture
def server(archive, monkeypatch):
    """A server on loopback, its ``url`` and the ``requests`` it got, and an impatient client."""
    monkeypatch.setattr(helpers, "STALL_TIMEOUT", 0.5)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.requests, server.stopped = archive.read_bytes(), [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.stopped.set()
        server.shutdown()


def test_faulty_servers_give_way_and_the_archive_stays(server, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "DOWNLOAD_LIMIT", 4)
    faults = dict(stall="timed out", slow="after 4 s", wrong="md5 is", missing="404", redirect="")
    urls = [f"{server.url}/{fault}/{ARCHIVE}" for fault in [*faults, "never"]]
    data = load(tmp_path / "new/er", [REFUSED, *urls])
    assert data.source == f"official CIFAR-10 batches, MD5 verified, from {server.url[7:]}"
    assert len(data.train[1]) == 100 and len(data.skipped) == 7
    for reason, said in zip(data.skipped[2:], ["refused", *faults.values()]):
        assert reason.startswith("127.0.0.1:") and said in reason and "\n" not in reason
    assert len(server.requests) == 6 and set(os.listdir(tmp_path / "new/er")) == {BATCHES, ARCHIVE}
    assert "127.0.0.1" not in load(tmp_path / "new/er", urls[-1:]).source


def test_a_proxy_set_late_and_a_file_url_serve(server, archive, tmp_path, monkeypatch):
    url = f"http://nowhere.invalid/good/{ARCHIVE}"
    with pytest.raises(RuntimeError, match="- nowhere.invalid: "):
        load(tmp_path / "one", [url], allow_stand_in=False)
    monkeypatch.setenv("http_proxy", server.url.replace("127.0.0.1", "localhost"))
    assert load(tmp_path / "one", [url]).source.endswith("from nowhere.invalid")
    assert load(tmp_path / "two", [archive.as_uri()]).source.endswith(f" {archive.as_uri()}")


def test_torchvision_itself_is_the_last_source(server, tmp_path, monkeypatch):
    assert helpers.DOWNLOAD_URLS[-1] == datasets.CIFAR10.url
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server.url}/good/{ARCHIVE}")
    patch = "\nfrom torchvision.datasets import CIFAR10\n" + "".join(
        f"CIFAR10.{name} = {getattr(datasets.CIFAR10, name)!r}\n"
        for name in ("url", "tgz_md5", "train_list", "test_list", "meta"))
    monkeypatch.setattr(helpers, "FETCH_BY_TORCHVISION", patch + helpers.FETCH_BY_TORCHVISION)
    assert len(load(tmp_path, [REFUSED, datasets.CIFAR10.url]).train[1]) == 100
    assert set(os.listdir(tmp_path)) == {BATCHES, ARCHIVE}
    assert b"torchvision" not in server.requests[0]


def test_the_stand_in_comes_last_if_allowed_and_is_every_digit_of_scikit_learn_enlarged(tmp_path):
    (tmp_path / "train").mkdir()  # of something else
    data, digits = load(tmp_path, [REFUSED]), load_digits()
    told = "(?s)\n- no official .*\n- no image folders .*\n- 127.* refused.*\nSet ALLOW_STAND_IN"
    with pytest.raises(RuntimeError, match=told) as error:
        load(tmp_path, [REFUSED], allow_stand_in=False)
    assert "\n- ".join(data.skipped) in str(error.value) and os.listdir(tmp_path) == ["train"]
    assert data.is_stand_in and data.source.startswith("STAND-IN: scikit-learn")
    for split, ids in zip("train test".split(), helpers.stratified_split(digits.target, 0.2, 1)):
        (images, labels), small = getattr(data, split), np.rint(digits.images[ids] * 255 / 16)
        assert np.array_equal(images, np.kron(small[..., None], np.ones((1, 4, 4, 3))))
        assert np.array_equal(labels, digits.target[ids])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize("as_given", [
    list, tuple, np.uint8, torch.from_numpy, lambda labels: np.int32(labels[:, None])])
def test_new_ids_follow_ascending_cifar10_ids_whatever_holds_the_labels(as_given):
    ids, names = helpers.class_mapping(["cat", "dog", "airplane"])
    assert ids == {0: 0, 3: 1, 5: 2} and str(names) == "{'airplane': 0, 'cat': 1, 'dog': 2}"
    assert [*helpers.class_mapping(helpers.CIFAR10_CLASSES)[0].values()] == [*range(10)]
    labels = as_given(np.array([5, 1, 3, 0, 5, 9]))
    kept, new = helpers.filter_and_relabel(list(IMAGES), labels, ids)
    assert kept[:, 0, 0, 0].tolist() == [0, 2, 3, 4] and kept.dtype == np.uint8
    assert new.tolist() == [2, 1, 0, 2] and new.dtype == np.int64
    assert len(helpers.stratified_split(as_given(np.arange(20) % 2), 0.1, seed=1)[1]) == 2


@pytest.mark.parametrize("names, images, labels, message", [
    ("cat unicorn", IMAGES, [3] * 6, "'unicorn'.*each once"), ("cat cat", IMAGES, [3] * 6, "once"),
    ("cat dog", IMAGES, range(5), r"int64 \(5,\): "), ("cat dog", IMAGES / 1.0, [3] * 6, "float64"),
    ("cat dog", IMAGES, [3.5] * 6, "labels float64"), ("cat dog", IMAGES, [3] * 6, r"id \[5\]"),
    ("cat dog", IMAGES[:, 1:], range(6), r"\(6, 31, 32, 3\)"),
    ("cat dog", IMAGES, np.full((6, 2), 3), r"int64 \(6, 2\)")])
def test_what_cannot_be_filtered_is_refused_with_its_value(names, images, labels, message):
    with pytest.raises(ValueError, match=message):
        helpers.filter_and_relabel(images, labels, helpers.class_mapping(names.split())[0])


@pytest.mark.parametrize("fraction, counts, expected", [
    (0.1, [50, 30, 10], [5, 3, 1]), (0.5, [40, 6, 2], [20, 3, 1]), (0.75, [40, 8, 4], [30, 6, 3])])
def test_a_split_is_stratified_complete_sorted_repeatable_or_refused(fraction, counts, expected):
    labels = np.repeat([0, 1, 2], counts)
    splits = [helpers.stratified_split(labels, fraction, seed) for seed in (1, 1, 2)]
    (rest, held_out), (_, same), (_, other) = [[part.tolist() for part in s] for s in splits]
    assert sorted(rest + held_out) == list(range(len(labels))) and held_out == same != other
    assert np.bincount(labels[held_out]).tolist() == expected
    assert rest == sorted(rest) and held_out == sorted(held_out)
    with pytest.raises(ValueError, match=f"fraction is {fraction}: .* {counts[2] - 1} images"):
        helpers.stratified_split(labels[:-1], fraction, seed=1)


@pytest.mark.parametrize("size", [16, 32, np.int64(48)])
def test_evaluation_images_are_resized_and_normalised_in_order_and_draw_nothing(
        labelled_images, size):
    images, labels = labelled_images
    before = torch.get_rng_state()
    batches = list(helpers.make_loader(images, labels, train=False, image_size=size,
                                       batch_size=np.int64(40)))
    assert torch.equal(torch.get_rng_state(), before)
    normalised = (images / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    expected = F.interpolate(torch.from_numpy(normalised).permute(0, 3, 1, 2), int(size),
                             mode="bilinear", antialias=True).float()
    assert torch.allclose(torch.cat([x for x, _ in batches]), expected, atol=1e-5)
    assert torch.cat([y for _, y in batches]).tolist() == labels.tolist()


@pytest.mark.parametrize("n, train, sizes", [
    (90, True, [40, 40]), (40, True, [40]), (10, True, [10]), (2, True, [2]), (1, True, None),
    (0, True, None), (0, False, None), (1, False, [1]), (41, False, [40, 1])])
def test_an_incomplete_last_batch_and_too_few_images(labelled_images, n, train, sizes):
    images, labels = (part[:n] for part in labelled_images)
    refusal = pytest.raises(ValueError, match=f"^{n} images are too few")
    with nullcontext() if sizes else refusal:
        loader = helpers.make_loader(images, labels, train=train, image_size=32, batch_size=40)
        assert [len(y) for _, y in loader] == sizes and len(loader) == len(sizes)


def test_each_training_image_is_drawn_cropped_and_flipped_by_torchs_global_generator():
    image = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    loader = helpers.make_loader(
        np.stack([image] * 64), range(64), train=True, image_size=32, batch_size=64)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[y:y + 32, x:x + 32][:, ::step].tobytes(): (y, x, step)
             for y in range(9) for x in range(9) for step in (1, -1)}
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        images, labels = next(iter(loader))
        seen.append((labels.tolist(), [crops[x.tobytes()] for x in to_display(images)]))
    order, drawn = seen[0]
    ys, xs, steps = map(set, zip(*drawn))  # each is one of the 162 possible ones
    assert ys == xs == set(range(9)) and steps == {1, -1} and len(set(drawn)) > 30
    assert seen[0] == seen[1] and order != seen[2][0] and drawn != seen[2][1]
    assert order != sorted(order) == list(range(64))


@pytest.mark.parametrize("train", [True, False])
def test_the_dataset_is_an_ordinary_one_and_grey_images_stay_grey(train):
    grey = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 1), np.uint8).repeat(3, axis=3)
    labels = torch.arange(48, dtype=torch.uint8)[:, None] % 3
    dataset = helpers.ImageDataset(grey, labels, train=train, image_size=40)
    image, label = dataset[np.int64(4)]
    assert image.shape == (3, 40, 40) and int(label) == 1 and len(dataset) == 48
    for loader in (
            DataLoader(Subset(dataset, range(24)), 12), DataLoader(dataset, 12, num_workers=1),
            DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 12, False))):
        for x, y in loader:
            assert np.ptp(to_display(x).astype(int), axis=-1).max() <= 1  # but for rounding
            assert (x.shape, y.shape) == ((12, 3, 40, 40), (12,))
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
