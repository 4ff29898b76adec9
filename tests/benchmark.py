"""Measure the recipe, on the official CIFAR-10 in ``data/``. Run by hand; pytest leaves it alone.

    python tests/benchmark.py                   # this recipe and two public ones, same wall time
    python tests/benchmark.py --study FILE.csv --seeds 1 2   # train activations over seeds
    python tests/benchmark.py --table FILE.csv  # a study's tables and picture, from its file alone
    python tests/benchmark.py --speed           # the training loop against the bare loop
    python tests/benchmark.py --ablation        # the recipe with one part changed, cross-validated
    python tests/benchmark.py --probe           # what a swap breaks before any training

``--weights random`` measures the recipe for random initialisation. Test images are read once per
finished training and choose nothing; the ablation and the probe use the training images alone.
± is half of a 95% interval, everywhere.
"""

import argparse
import csv
import functools
import hashlib
import io
import itertools
import math
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from scipy import stats
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torchvision import transforms

import helpers

CLASS_NAMES = ["cat", "dog", "airplane"]
N_TEST_IMAGES = 3000  # of these classes
BATCH_SIZE = 128
GREY = "#767676"
SEED = 1337  # of what is trained once


# ==== Data, network, training ====================================================================


def load_data() -> Tuple[helpers.Split, helpers.Split, str]:
    """The training and the test images of the three classes, and where they come from.

    Raises RuntimeError if ``data/`` does not hold the official CIFAR-10.
    """
    cifar10 = helpers.load_cifar10(ROOT / "data", allow_stand_in=False, seed=0, urls=())
    id_mapping, _ = helpers.class_mapping(CLASS_NAMES)
    train = helpers.filter_and_relabel(*cifar10.train, id_mapping)
    test = helpers.filter_and_relabel(*cifar10.test, id_mapping)
    return train, test, cifar10.source


def split(train: helpers.Split, seed: int) -> Tuple[helpers.Split, helpers.Split]:
    """(nine tenths to train on, a tenth for validation)."""
    images, labels = train
    fit_ids, val_ids = helpers.stratified_split(labels, 0.1, seed)
    return (images[fit_ids], labels[fit_ids]), (images[val_ids], labels[val_ids])


def make_network(
    seed: int, pretrained: bool, activation: str = "SiLU", first: int = 7, frozen=()
) -> nn.Module:
    """ResNet-18 with its new head; ``activation`` "ReLU" leaves every nn.ReLU in place."""
    torch.manual_seed(seed)
    model, sha256, label = helpers.build_model("resnet18", pretrained)
    if pretrained and sha256 == "random":
        raise SystemExit(label)
    helpers.freeze(model, frozen, name_of_relu(model, first))
    if activation != "ReLU":
        helpers.replace_relu(model, helpers.ACTIVATIONS[activation], first)
    torch.manual_seed(seed)
    helpers.replace_head(model, len(CLASS_NAMES))
    return model


def name_of_relu(model: nn.Module, occurrence: int) -> str:
    return helpers.find_modules(model, nn.ReLU)[occurrence - 1][0]


make_adamw = helpers.make_optimizer


def make_sgd(model: nn.Module, recipe: helpers.Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum over the same groups of parameters."""
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]}
              for group in make_adamw(model, recipe).param_groups]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)


def set_augmentation(loader, augmentation: Sequence[nn.Module]) -> None:
    """Put other transforms in the place of a training loader's crop and flip."""
    loader.dataset.transform.transforms[:2] = augmentation


def train_network(
    fitting: helpers.Split, validating: helpers.Split, *, seed: int, pretrained: bool,
    recipe: helpers.Recipe, dtype: torch.dtype, activation: str = "SiLU", first: int = 7,
    batch_size: int = BATCH_SIZE, augmentation: Optional[Sequence[nn.Module]] = None,
    make_optimizer: Callable = make_adamw,
) -> Tuple[nn.Module, List[helpers.EpochMetrics], float]:
    """One training as in the notebook: (model, its epochs, seconds)."""
    train_loader = helpers.make_loader(
        *fitting, train=True, image_size=recipe.image_size, batch_size=batch_size)
    val_loader = helpers.make_loader(
        *validating, train=False, image_size=recipe.image_size, batch_size=batch_size)
    if augmentation is not None:
        set_augmentation(train_loader, augmentation)
    model = make_network(seed, pretrained, activation, first, recipe.frozen)
    helpers.set_determinism(seed)
    start = time.perf_counter()
    with mock.patch.object(helpers, "make_optimizer", make_optimizer):
        history = helpers.fit(
            model, train_loader, val_loader, recipe=recipe, dtype=dtype, on_epoch=log)
    return model, history, time.perf_counter() - start


def find_right(
    model: nn.Module, images, labels, image_size: int, dtype: torch.dtype
) -> np.ndarray:
    """Which of the images a model gets right, bool (N,)."""
    loader = helpers.make_loader(
        images, labels, train=False, image_size=image_size, batch_size=BATCH_SIZE)
    logits, targets = helpers.predict(model, loader, dtype)
    return (logits.argmax(1) == targets).numpy()


def log(text: str) -> None:
    """Progress goes to stderr: stdout holds the tables alone."""
    print("   ", text, file=sys.stderr, flush=True)


def name_processor() -> str:
    """The processor's name and kind."""
    info = Path("/proc/cpuinfo")
    found = dict(re.findall(r"(.*\S)\s*: (.*)", info.read_text())) if info.exists() else {}
    return (f"{found.get('model name') or platform.processor()} cpu family "
            f"{found.get('cpu family')} model {found.get('model')}")


# ==== A study's file =============================================================================

# What every row of a file has in common.
SHARED_COLUMNS = ("model", "classes", "images", "weights", "precision", "batch_size",
                  *(part.name for part in fields(helpers.Recipe)))
COLUMNS = ("swap", "seed", *SHARED_COLUMNS, "trainable", "processor", "threads", "torch",
           "torchvision", "minutes", "validation", "test", "right")


class StudyError(ValueError):
    """A study's file is not as it was written, or holds more than one study."""


@dataclass(frozen=True)
class Training:
    """A row: ``swap`` is "SiLU from 7", ``right`` tells which test images it gets right, bool (N,).

    ``row`` is all of it, as text.
    """

    swap: str
    seed: int
    trainable: str
    right: np.ndarray
    row: Dict[str, str]

    @property
    def is_control(self) -> bool:
        return re.fullmatch(r"ReLU from \d+", self.swap) is not None


def read_study(path) -> List[Training]:
    """The trainings in a CSV file that ``study`` wrote.

    Raises StudyError if a row is damaged, is there twice, or has another recipe, other images,
    weights, classes, precision or batch size than the first one.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text:
        return []
    reader = csv.DictReader(io.StringIO(text))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise StudyError(f"{path.name}, line {reader.line_num}: {error}.") from error
    absent = [name for name in COLUMNS if name not in reader.fieldnames]
    if absent:
        raise StudyError(f"{path.name}: there is no column {', '.join(absent)}.")
    if not text.endswith("\n"):
        raise StudyError(f"{path.name}, row {len(rows)}: it is cut short; delete it.")
    trainings = []
    for number, row in enumerate(rows, start=1):
        try:
            training = parse_row(row)
            check_fits(training, trainings)
        except ValueError as error:
            raise StudyError(f"{path.name}, row {number} ({row['swap']}, seed {row['seed']}): "
                             f"{error}.") from error
        trainings.append(training)
    return trainings


def parse_row(row: Dict[str, str]) -> Training:
    """Raises ValueError with what is wrong, if the row is damaged."""
    absent = [name for name in COLUMNS if not row[name]]
    if absent:
        raise ValueError(f"there is no {', '.join(absent)}")
    if None in row:
        raise ValueError("there are more fields than columns")
    if re.fullmatch(r"\w+ from \d+", row["swap"]) is None:
        raise ValueError('swap must be like "SiLU from 7"')
    accuracies = [float(accuracy) for accuracy in row["validation"].split()]
    if len(accuracies) != int(row["epochs"]):
        raise ValueError(f"validation has {len(accuracies)} accuracies, epochs is {row['epochs']}")
    right = unpack_right(row["right"])
    if f"{right.mean():.4f}" != row["test"]:
        raise ValueError(f"test is {row['test']}, but by right it is {right.mean():.4f}")
    return Training(row["swap"], int(row["seed"]), row["trainable"], right, row)


def pack_right(right: np.ndarray) -> str:
    """Bool (N,) as bits, in hexadecimal."""
    return np.packbits(right).tobytes().hex()


def unpack_right(text: str) -> np.ndarray:
    """Raises ValueError unless ``text`` holds the answers for all test images."""
    n_digits = 2 * math.ceil(N_TEST_IMAGES / 8)
    if re.fullmatch("[0-9a-f]*", text) is None:
        raise ValueError("right holds something else than hexadecimal digits")
    if len(text) != n_digits:
        raise ValueError(f"right has {len(text)} hexadecimal digits, not {n_digits}")
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(packed, count=N_TEST_IMAGES).astype(bool)


def check_fits(training: Training, trainings: Sequence[Training]) -> None:
    """Raises ValueError if a training does not belong to the ones before it, or is one of them."""
    for other in trainings:
        if (other.swap, other.seed) == (training.swap, training.seed):
            raise ValueError("this swap and seed are there twice")
    if trainings:
        check_shared(training.row, trainings[0].row)


def check_shared(row: Dict[str, str], first_row: Dict[str, str]) -> None:
    """Raises ValueError if two rows are not of the same study."""
    for name in SHARED_COLUMNS:
        if row[name] != first_row[name]:
            raise ValueError(f"{name} is {row[name]}, but in the first row {first_row[name]}")


# ==== What a study shows =========================================================================


@dataclass(frozen=True)
class Pairs:
    """A swap's right answers and those of its ReLU controls, both bool (seeds, images)."""

    seeds: Tuple[int, ...]
    right: np.ndarray
    relu_right: np.ndarray

    @property
    def gains(self) -> np.ndarray:
        """1 where only the swap is right, -1 where only ReLU is, otherwise 0."""
        return self.right.astype(float) - self.relu_right


def pair_up(trainings: Sequence[Training]) -> Dict[str, Pairs]:
    """{swap: its pairs}; a swap needs two."""
    found = {}
    for training in trainings:
        control = find_control(training, trainings)
        if not training.is_control and control is not None:
            found.setdefault(training.swap, []).append((training, control))
    return {
        swap: Pairs(tuple(training.seed for training, _ in pairs),
                    np.array([training.right for training, _ in pairs]),
                    np.array([control.right for _, control in pairs]))
        for swap, pairs in found.items() if len(pairs) > 1}


def find_control(training: Training, trainings: Sequence[Training]) -> Optional[Training]:
    """The ReLU network of the same seed and kind of processor, with the same parameters trained.

    "ReLU from 7" and "ReLU from 4" are the same if the same part is frozen; where both are there,
    it is the one with the training's own number.
    """
    controls = [other for other in trainings if other.is_control
                and (other.seed, other.trainable) == (training.seed, training.trainable)
                and other.row["processor"] == training.row["processor"]]
    for control in controls:
        if control.swap.split(" from ")[1] == training.swap.split(" from ")[1]:
            return control
    return controls[0] if controls else None


def find_interval(gains: np.ndarray) -> helpers.Difference:
    """The mean of (seeds S, images I) with its 95% interval over other seeds and other images.

    A gain is mean + seed's effect + image's effect + rest: random effects, crossed, with variances
    a, b and e. The variance of the mean is a/S + b/I + e/SI. The mean squares of the analysis of
    variance without replicates have the expectations e + Ia, e + Sb and e, so
    (MS_seeds + MS_images - MS_rest) / SI estimates it without bias (Searle, Casella and McCulloch
    1992, Variance Components, chapter 4). An estimate of a or b below 0 counts as 0, which makes
    the numerator the largest of that sum and of each mean square. Student's t has Satterthwaite's
    degrees of freedom (1946, Biometrics Bulletin 2), all three mean squares counted.

    The pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1) is wider: in expectation
    it counts e/SI three times.
    """
    n_seeds, n_images = gains.shape
    mean = gains.mean()
    seed_effects = gains.mean(axis=1, keepdims=True) - mean
    image_effects = gains.mean(axis=0, keepdims=True) - mean
    rest = gains - mean - seed_effects - image_effects
    squares = np.array([
        n_images * (seed_effects ** 2).sum(), n_seeds * (image_effects ** 2).sum(),
        (rest ** 2).sum()])
    freedom = np.array([n_seeds - 1, n_images - 1, (n_seeds - 1) * (n_images - 1)])
    mean_squares = squares / freedom
    of_seeds, of_images, of_rest = mean_squares
    total = max(of_seeds + of_images - of_rest, *mean_squares)
    if total == 0:
        return helpers.Difference(mean, mean, mean)
    freedom_of_total = total ** 2 / (mean_squares ** 2 / freedom).sum()
    half_width = stats.t.ppf(0.975, freedom_of_total) * math.sqrt(total / gains.size)
    return helpers.Difference(mean, mean - half_width, mean + half_width)


def judge(difference: helpers.Difference) -> str:
    """Whether a difference is within 1 point: by its whole interval."""
    if -0.01 < difference.low and difference.high < 0.01:
        return "yes"
    if difference.high < -0.01 or difference.low > 0.01:
        return "beyond"
    return "not shown"


def points(difference: helpers.Difference, digits: int = 2) -> str:
    """Such as ``-0.40 ± 0.30``."""
    mean = round(100 * difference.mean, digits) + 0.0  # never -0.00
    return f"{mean:+.{digits}f} ± {100 * (difference.high - difference.mean):.{digits}f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def study_table(pairs: Dict[str, Pairs]) -> str:
    """A row for each swap: its accuracy beside ReLU's over the same seeds."""
    rows = []
    for swap, pair in pairs.items():
        difference = find_interval(pair.gains)
        rows.append([swap, str(len(pair.seeds)), f"{pair.right.mean():.2%}",
                     f"{pair.relu_right.mean():.2%}", points(difference), judge(difference)])
    return format_table(
        ["swap", "seeds", "accuracy", "ReLU's", "difference, points", "within 1 point"], rows)


# The first's difference from ReLU minus the second's.
CONTRASTS = (
    ("GELU from 7", "SiLU from 7"),
    ("LeakyReLU from 7", "SiLU from 7"),
    ("SiLU from 4", "SiLU from 7"),
    ("SiLU from 1", "SiLU from 7"),
)


def find_contrast(a: Pairs, b: Pairs) -> Tuple[int, helpers.Difference]:
    """(number of seeds that both have, a's gains minus b's over these): each from its own control.

    Where both have the same control, that is a's accuracy minus b's.
    """
    seeds = [seed for seed in a.seeds if seed in b.seeds]
    a_gains = a.gains[[a.seeds.index(seed) for seed in seeds]]
    b_gains = b.gains[[b.seeds.index(seed) for seed in seeds]]
    return len(seeds), find_interval(a_gains - b_gains)


def contrast_table(pairs: Dict[str, Pairs]) -> str:
    """A row for each of the ``CONTRASTS`` whose swaps have two seeds in common; or nothing."""
    rows = []
    for a, b in CONTRASTS:
        if a in pairs and b in pairs and len({*pairs[a].seeds} & {*pairs[b].seeds}) > 1:
            n_seeds, difference = find_contrast(pairs[a], pairs[b])
            rows.append([f"{a} minus {b}", str(n_seeds), points(difference)])
    if not rows:
        return ""
    return format_table(["contrast of the differences from ReLU", "seeds", "points"], rows)


def recall_table(pairs: Dict[str, Pairs], labels: np.ndarray) -> str:
    """A row for each swap: for each class the difference from ReLU over that class's images."""
    class_names = list(helpers.class_mapping(CLASS_NAMES)[1])
    rows = []
    for swap, pair in pairs.items():
        differences = [find_interval(pair.gains[:, labels == new_id])
                       for new_id in range(len(class_names))]
        rows.append([swap, *(points(difference) for difference in differences)])
    return format_table(["recall minus ReLU's, points", *class_names], rows)


def describe_study(trainings: Sequence[Training]) -> str:
    """What all rows of a file have in common, and on what they were trained."""
    row = trainings[0].row
    processors = sorted({training.row["processor"] for training in trainings})
    return (f"{len(trainings)} trainings of {row['model']} on {row['classes']}: {row['epochs']} "
            f"epochs at {row['image_size']} px, {row['precision']}, weights {row['weights'][:8]}, "
            f"{row['images']}; {', '.join(processors)}.")


def list_left_out(trainings: Sequence[Training], pairs: Dict[str, Pairs]) -> List[str]:
    """The swaps' trainings that are in no pair, as text."""
    return [f"{training.swap}, seed {training.seed}" for training in trainings
            if not training.is_control
            and (training.swap not in pairs or training.seed not in pairs[training.swap].seeds)]


def report_study(path) -> None:
    """Print a study's tables, and draw its picture beside the file."""
    path = Path(path)
    trainings = read_study(path)
    pairs = pair_up(trainings)
    if not pairs:
        print(f"{path.name}: no swap has two pairs yet.")
        return
    print(describe_study(trainings))
    left_out = list_left_out(trainings, pairs)
    if left_out:
        print(f"Left out, for want of a ReLU network or a second pair: {'; '.join(left_out)}.")
    print("± is half of a 95% interval over seeds and images.\n")
    print(study_table(pairs))
    contrasts = contrast_table(pairs)
    if contrasts:
        print(f"\n{contrasts}")
    labels = read_test_labels(trainings[0].row["images"])
    if labels is None:
        print("\nRecall is left out: data/ does not hold the study's images.")
    else:
        print(f"\n{recall_table(pairs, labels)}")
    save_picture(draw_study(pairs, helpers.MODELS[trainings[0].row["model"]]), path)


def read_test_labels(source: str) -> Optional[np.ndarray]:
    """The new ids of the test images; None if ``data/`` does not hold these images."""
    try:
        _, (_, labels), found = load_data()
    except RuntimeError:
        return None
    return labels if found == source else None


# ==== A study's picture ==========================================================================


def ordinal(number: int) -> str:
    """Such as ``7th``, for 1 to 20."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{endings.get(number, 'th')}"


def list_swaps(swaps: Sequence[str]) -> str:
    """Such as ``SiLU, GELU from the 7th and SiLU from the 4th``."""
    activations = {}
    for swap in swaps:
        activation, first = swap.split(" from ")
        activations.setdefault(int(first), []).append(activation)
    return " and ".join(f"{', '.join(names)} from the {ordinal(first)}"
                        for first, names in activations.items())


def title_study(differences: Dict[str, helpers.Difference]) -> str:
    """What the intervals allow to say, no more."""
    within = [swap for swap, difference in differences.items() if judge(difference) == "yes"]
    beyond = [swap for swap, difference in differences.items() if judge(difference) == "beyond"]
    title = f"Within ±1 point of ReLU: {list_swaps(within) or 'none shown'}"
    if beyond:
        title += f"\nBeyond: {list_swaps(beyond)}"
    return title


def label_swap(swap: str, n_seeds: int, n_relu: int) -> str:
    """Such as ``SiLU, ReLUs 7–9 (12 seeds)``."""
    activation, first = swap.split(" from ")
    replaced = f"ReLU {first}" if int(first) == n_relu else f"ReLUs {first}–{n_relu}"
    return f"{activation}, {replaced} ({n_seeds} seeds)"


@helpers.in_default_style
def draw_study(pairs: Dict[str, Pairs], n_relu: int) -> Figure:
    """Each seed's difference from ReLU, the mean and its interval; ±1 point in grey."""
    differences = {swap: find_interval(pair.gains) for swap, pair in pairs.items()}
    title = title_study(differences)
    figure = Figure((9, 1.9 + 0.55 * len(pairs)), layout="constrained", label=title)
    figure.suptitle(title, wrap=True)
    axis = figure.add_subplot()
    axis.axvspan(-1, 1, color=GREY, alpha=0.15, linewidth=0, label="±1 point")
    axis.axvline(0, color=GREY)
    for y, (swap, pair) in enumerate(pairs.items()):
        mean = 100 * differences[swap].mean
        half_width = 100 * differences[swap].high - mean
        seed_gains = 100 * pair.gains.mean(axis=1)
        dots, = axis.plot(
            seed_gains, np.full(len(seed_gains), y - 0.17), "o", color=helpers.BLUE, alpha=0.5)
        diamond = axis.errorbar(
            mean, y + 0.17, xerr=half_width, fmt="D", color=helpers.ORANGE, capsize=5)
    dots.set_label("one seed")
    diamond.set_label("mean, 95% interval over seeds and images")
    labels = [label_swap(swap, len(pair.seeds), n_relu) for swap, pair in pairs.items()]
    axis.set_yticks(range(len(pairs)), labels=labels)
    axis.set(ylim=(len(pairs) - 0.5, -0.5),
             xlabel="points of test accuracy: fewer than ReLU ← → more")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


@helpers.in_default_style
def save_picture(figure: Figure, csv_path: Path) -> None:
    """Save it beside the study's file, whose SHA-256 becomes the picture's comment."""
    sha256 = hashlib.sha256(csv_path.read_bytes()).hexdigest()
    figure.savefig(csv_path.with_suffix(".png"), dpi=100, metadata={"Comment": sha256})


# ==== Study ======================================================================================


def study(
    path: Path, train: helpers.Split, test: helpers.Split, source: str, *, start: str,
    precision: str, seeds: Sequence[int], activations: Sequence[str], first: int,
) -> None:
    """Train every activation with every seed; each finished training becomes a row of the file.

    Rows that are there are not repeated. Raises StudyError for a file of another study, or in no
    folder.
    """
    if not path.parent.is_dir():
        raise StudyError(f"{path.parent} is not a folder: make it, or name another file.")
    recipe = helpers.RECIPES[start]
    dtype = helpers.pick_dtype(precision, torch.device("cpu"))
    _, weights, _ = helpers.build_model("resnet18", pretrained=start == "pretrained")
    shared = {
        "model": "resnet18", "classes": list(helpers.class_mapping(CLASS_NAMES)[1]),
        "images": source, "weights": weights, "precision": precision, "batch_size": BATCH_SIZE,
        **asdict(recipe)}
    shared = {name: str(value) for name, value in shared.items()}
    for seed, activation in itertools.product(seeds, activations):
        swap = f"{activation} from {first}"
        # Read each time: another process may add to the same file.
        trainings = read_study(path) if path.exists() else []
        if trainings:
            check_same_study(path, shared, trainings[0])
        if (swap, seed) in [(training.swap, training.seed) for training in trainings]:
            continue
        model, history, seconds = train_network(
            *split(train, seed), seed=seed, pretrained=start == "pretrained", recipe=recipe,
            dtype=dtype, activation=activation, first=first)
        right = find_right(model, *test, recipe.image_size, dtype)
        append_row(path, {
            "swap": swap, "seed": seed, **shared,
            "trainable": helpers.count_parameters(model)[1],
            "processor": name_processor(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "minutes": f"{seconds / 60:.1f}",
            "validation": " ".join(f"{metrics.val_accuracy:.4f}" for metrics in history),
            "test": f"{right.mean():.4f}", "right": pack_right(right)})
    report_study(path)


def check_same_study(path: Path, shared: Dict[str, str], training: Training) -> None:
    """Raises StudyError if the file's first training is of another study."""
    try:
        check_shared(shared, training.row)
    except ValueError as error:
        raise StudyError(f"{path.name}: {error}; use another file.") from error


def append_row(path: Path, row: Dict[str, object]) -> None:
    """Add a row to a study's file, which gets its header first if it is new."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


# ==== Ablation ===================================================================================


@dataclass(frozen=True)
class Variant:
    """What is changed: fields of the recipe, the batch size, the augmentation, the optimiser."""

    changes: Dict[str, object] = field(default_factory=dict)
    batch_size: int = BATCH_SIZE
    augmentation: Optional[Sequence[nn.Module]] = None
    make_optimizer: Callable = make_adamw


CROP = transforms.RandomCrop(32, padding=4, padding_mode="reflect")
FLIP = transforms.RandomHorizontalFlip()
JITTER = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
RESIZED_CROP = transforms.RandomResizedCrop(32, scale=(0.5, 1), antialias=True)
FROZEN_UP_TO_2 = ("conv1", "bn1", "layer1", "layer2")

# Beside helpers.RECIPES: 3 epochs at 80 px, and 18 at 48 px.
VARIANTS = {
    "pretrained": {
        "4 epochs, 96 px": Variant({"epochs": 4, "image_size": 96}),
        "3 epochs, 96 px": Variant({"image_size": 96}),
        "3 epochs, 88 px": Variant({"image_size": 88}),
        "4 epochs": Variant({"epochs": 4}),
        "2 epochs, 112 px": Variant({"epochs": 2, "image_size": 112}),
        "3 epochs, 128 px": Variant({"image_size": 128}),
        "rate 2e-4": Variant({"lr": 2e-4}),
        "rate 1e-3": Variant({"lr": 1e-3}),
        "SGD 0.03": Variant({"lr": 0.03, "weight_decay": 5e-4}, make_optimizer=make_sgd),
        "batch 64": Variant(batch_size=64),
        "nothing frozen, 2 epochs": Variant({"frozen": (), "epochs": 2}),
        "nothing frozen": Variant({"frozen": ()}),
        "layer2 frozen, too, 4 epochs": Variant({"frozen": FROZEN_UP_TO_2, "epochs": 4}),
        "no label smoothing": Variant({"label_smoothing": 0.0}),
        "ColorJitter": Variant(augmentation=[CROP, FLIP, JITTER]),
        "RandomResizedCrop": Variant(augmentation=[FLIP, RESIZED_CROP]),
    },
    "random": {
        "batch 64": Variant(batch_size=64),
        "14 epochs": Variant({"epochs": 14}),
        "14 epochs, SGD 0.1": Variant(
            {"lr": 0.1, "weight_decay": 5e-4, "epochs": 14}, make_optimizer=make_sgd),
        "64 px, 13 epochs": Variant({"image_size": 64, "epochs": 13}),
        "64 px, 13 epochs, SGD 0.1": Variant(
            {"lr": 0.1, "weight_decay": 5e-4, "image_size": 64, "epochs": 13},
            make_optimizer=make_sgd),
    },
}


def ablate(
    train: helpers.Split, *, start: str, names: Sequence[str], n_folds: int, dtype: torch.dtype
) -> None:
    """Cross-validate the recipe and each variant on the training images; print a row for each.

    Differences are paired over images: the interval leaves out the chance of training.
    """
    print(format_table(["variant", "min each", "accuracy",
                        "difference ± half of a 95% interval over images, points"], []))
    right_of_recipe, seconds = cross_validate(train, start, Variant(), n_folds, dtype)
    print(ablation_row("recipe", seconds, right_of_recipe, None), flush=True)
    for name in names:
        right, seconds = cross_validate(train, start, VARIANTS[start][name], n_folds, dtype)
        print(ablation_row(name, seconds, right, right_of_recipe), flush=True)


def cross_validate(
    train: helpers.Split, start: str, variant: Variant, n_folds: int, dtype: torch.dtype
) -> Tuple[np.ndarray, float]:
    """(which images are right in ``n_folds`` of three folds, bool (N,), seconds a training)."""
    images, labels = train
    recipe = replace(helpers.RECIPES[start], **variant.changes)
    folds = StratifiedKFold(3, shuffle=True, random_state=0).split(images, labels)
    right, seconds = [], []
    for fit_ids, score_ids in itertools.islice(folds, n_folds):
        scored = images[score_ids], labels[score_ids]
        few = images[score_ids[:128]], labels[score_ids[:128]]  # nothing is chosen by them
        model, _, seconds_of_fold = train_network(
            (images[fit_ids], labels[fit_ids]), few, seed=SEED, pretrained=start == "pretrained",
            recipe=recipe, dtype=dtype, batch_size=variant.batch_size,
            augmentation=variant.augmentation, make_optimizer=variant.make_optimizer)
        seconds.append(seconds_of_fold)
        right.append(find_right(model, *scored, recipe.image_size, dtype))
    return np.concatenate(right), float(np.mean(seconds))


def ablation_row(
    name: str, seconds: float, right: np.ndarray, right_of_recipe: Optional[np.ndarray]
) -> str:
    difference = ""
    if right_of_recipe is not None:
        difference = points(helpers.paired_difference(right, right_of_recipe))
    return f"| {name} | {seconds / 60:.1f} | {right.mean():.2%} | {difference} |"


# ==== Probe ======================================================================================

N_SPLITS = 5


def probe(train: helpers.Split, image_size: int, dtype: torch.dtype) -> None:
    """Print what a linear probe gets right behind each swap, before any training.

    With the batch norms' statistics as stored, and estimated again behind the first replaced
    activation from 600 training images. The probe is fitted on 1,000 training images and scored on
    1,000 validation images.
    """
    networks = {first: {f"{activation} from {first}": make_network(0, True, activation, first)
                        for activation in ("ReLU", *helpers.ACTIVATIONS)}
                for first in (7, 4, 1)}
    scores = {}
    for seed in range(N_SPLITS):
        fitting, validating = split(train, seed)
        score = functools.partial(
            helpers.linear_probe, dtype=dtype,
            train_loader=load_some(fitting, 1000, seed, image_size),
            test_loader=load_some(validating, 1000, seed, image_size))
        for first, of_first in networks.items():
            name = name_of_relu(of_first[f"ReLU from {first}"], first)
            rows = helpers.compare_statistics(
                of_first, load_some(fitting, 600, seed, image_size), name, score, dtype)
            for swap, accuracies in rows.items():
                scores.setdefault(swap, []).append(accuracies)
            log(f"split {seed + 1} of {N_SPLITS}, from {first}: done")
    print(f"± is half of a 95% interval over {N_SPLITS} splits (Student's t).\n")
    print(probe_table(scores))


def load_some(part: helpers.Split, n_images: int, seed: int, image_size: int):
    """A loader of some images without augmentation, in batches of 100."""
    images, labels = part
    ids = np.random.default_rng(seed).permutation(len(labels))[:n_images]
    return helpers.make_loader(
        images[ids], labels[ids], train=False, image_size=image_size, batch_size=100)


def probe_table(scores: Dict[str, List[Tuple[float, float]]]) -> str:
    """From {swap: (accuracy as stored, estimated again) of each split}, with "ReLU from 7" etc."""
    rows = []
    for swap, accuracies in scores.items():
        activation, first = swap.split(" from ")
        cells = [swap if activation != "ReLU" else f"ReLU, estimated again as from {first}"]
        own = np.array(accuracies)
        relu = np.array(scores[f"ReLU from {first}"])
        for column in (0, 1):
            difference = helpers.paired_difference(own[:, column], relu[:, column])
            cells.append(f"{own[:, column].mean():.1%}")
            cells.append("" if activation == "ReLU" else points(difference, digits=1))
        rows.append(cells)
    return format_table(["swap, not trained", "as stored", "minus ReLU's, points",
                         "estimated again", "minus ReLU's, points"], rows)


# ==== Two public recipes, with the same swap, in float32 =========================================


def public_recipe(n_steps: int):
    """From ImageNet weights: Adam 1e-3, a tenth after 70% of the steps, batch 64, 32x32."""
    model = make_network(SEED, pretrained=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, int(0.7 * n_steps))


def lightning_recipe(n_steps: int):
    """From random weights: 3x3 stem, no max-pool, SGD, one cycle up to 0.1, batch 64."""
    model = make_network(SEED, pretrained=False)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, n_steps)


def train_peer(make: Callable, fitting: helpers.Split, seconds: float):
    """Train a public recipe for about these seconds, without validation.

    Returns (model with the last weights, epochs, seconds).
    """
    criterion = nn.CrossEntropyLoss()
    loader = helpers.make_loader(*fitting, train=True, image_size=32, batch_size=64)
    set_augmentation(loader, [transforms.RandomCrop(32, padding=4), FLIP])

    few = list(itertools.islice(loader, 8))
    model, optimizer, scheduler = make(1000)
    start = time.perf_counter()
    helpers.train_one_epoch(model, criterion, optimizer, few, scheduler=scheduler)
    epoch_seconds = (time.perf_counter() - start) / len(few) * len(loader)
    epochs = max(1, round(seconds / epoch_seconds))

    helpers.set_determinism(SEED)
    model, optimizer, scheduler = make(len(loader) * epochs)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        loss, accuracy = helpers.train_one_epoch(
            model, criterion, optimizer, loader, scheduler=scheduler)
        log(f"Epoch {epoch}/{epochs} | Train Loss: {loss:.3f} | Train Acc: {accuracy:.1%}")
    return model, epochs, time.perf_counter() - start


def compare_recipes(
    train: helpers.Split, test: helpers.Split, *, start: str, dtype: torch.dtype
) -> None:
    """Print the accuracy table: this recipe, then its peers in the same wall time."""
    recipe = helpers.RECIPES[start]
    fitting, validating = split(train, SEED)
    print(format_table(["recipe", "epochs", "images/s", "min", "test, plain"], []))
    model, history, seconds = train_network(
        fitting, validating, seed=SEED, pretrained=start == "pretrained", recipe=recipe,
        dtype=dtype)
    right = find_right(model, *test, recipe.image_size, dtype)
    rate = len(history) * len(fitting[1]) / seconds
    print(recipe_row("this one (with validation)", len(history), rate, seconds, right), flush=True)
    for label, make in (
            ("public solution", public_recipe), ("Lightning tutorial", lightning_recipe)):
        model, epochs, peer_seconds = train_peer(make, fitting, seconds)
        right = find_right(model, *test, 32, torch.float32)
        rate = epochs * len(fitting[1]) / peer_seconds
        print(recipe_row(label, epochs, rate, peer_seconds, right), flush=True)


def recipe_row(label: str, epochs: int, rate: float, seconds: float, right: np.ndarray) -> str:
    return f"| {label} | {epochs} | {rate:.0f} | {seconds / 60:.1f} | {right.mean():.1%} |"


# ==== Speed ======================================================================================


def train_bare(model, criterion, optimizer, images, targets, dtype, n_steps: int) -> None:
    """Forward, backward and step on one batch in memory, nothing else."""
    for _ in range(n_steps):
        logits = helpers.compute_logits(model, images, dtype)
        optimizer.zero_grad()
        criterion(logits, targets).backward()
        optimizer.step()


def measure_speed(
    train: helpers.Split, *, start: str, dtype: torch.dtype, n_steps: int = 10, rounds: int = 5
) -> None:
    """Print images/s, the share of the bare loop's speed, and the share of time for loading.

    Medians over rounds.
    """
    recipe = helpers.RECIPES[start]
    fitting, _ = split(train, SEED)
    loader = helpers.make_loader(
        *fitting, train=True, image_size=recipe.image_size, batch_size=BATCH_SIZE)
    model = make_network(SEED, start == "pretrained", frozen=recipe.frozen)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = helpers.make_optimizer(model, recipe)
    images, targets = next(iter(loader))
    times = []
    # In turns, so that a machine that slows down or speeds up does so for all three.
    for _ in range(rounds + 1):
        started = time.perf_counter()
        batches = itertools.islice(loader, n_steps)
        helpers.train_one_epoch(model, criterion, optimizer, batches, dtype)
        trained = time.perf_counter()
        train_bare(model, criterion, optimizer, images, targets, dtype, n_steps)
        trained_bare = time.perf_counter()
        list(itertools.islice(loader, n_steps))
        loaded = time.perf_counter()
        times.append((trained - started, trained_bare - trained, loaded - trained_bare))
    full, bare, loading = np.median(times[1:], axis=0)  # the first round sets up kernels
    print(format_table(
        ["images/s", "of the bare loop", "loading"],
        [[f"{n_steps * BATCH_SIZE / full:.0f}", f"{bare / full:.1%}", f"{loading / full:.1%}"]]))


# ==== Command line ===============================================================================


def peak_memory() -> str:
    """Peak resident memory of this process, as text; unknown on Windows."""
    if sys.platform == "win32":
        return "unknown"
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_mutually_exclusive_group()
    command.add_argument("--study", metavar="FILE", type=Path,
                         help="a CSV file of trainings, to go on with")
    command.add_argument("--table", metavar="FILE", type=Path, help="a CSV file to report on")
    command.add_argument("--speed", action="store_true", help="only the speed of the loop")
    command.add_argument("--ablation", action="store_true", help="what each part brings")
    command.add_argument("--probe", action="store_true", help="what a swap breaks at once")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants of the ablation")
    parser.add_argument("--folds", type=int, default=3, choices=(1, 2, 3), help="of the ablation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[SEED], help="of the study")
    parser.add_argument("--activations", nargs="+", default=["ReLU", *helpers.ACTIVATIONS],
                        choices=["ReLU", *helpers.ACTIVATIONS], help="of the study")
    parser.add_argument("--first", type=int, default=7, choices=range(1, 10),
                        help="occurrence from which the study replaces")
    parser.add_argument("--weights", default="pretrained", choices=["pretrained", "random"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    unknown = [name for name in args.only or [] if name not in VARIANTS[args.weights]]
    if unknown:
        parser.error(f"--only {unknown}: choose from {list(VARIANTS[args.weights])}")
    return args


def run_command(args: argparse.Namespace) -> None:
    """Do what the command line asks for. Everything but --table needs the data."""
    if args.table is not None:
        report_study(args.table)
        return
    helpers.set_determinism(SEED)
    recipe = helpers.RECIPES[args.weights]
    dtype = helpers.pick_dtype(args.precision, torch.device("cpu"))
    print(f"{name_processor()}\n{args.precision}, "
          f"{helpers.environment_summary(SEED, 'cpu')}\n{recipe}")
    try:
        train, test, source = load_data()
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    print(f"Data source: {source}\n", flush=True)
    if args.probe:
        probe(train, recipe.image_size, dtype)
    elif args.ablation:
        names = args.only or list(VARIANTS[args.weights])
        ablate(train, start=args.weights, names=names, n_folds=args.folds, dtype=dtype)
    elif args.study is not None:
        study(args.study, train, test, source, start=args.weights, precision=args.precision,
              seeds=args.seeds, activations=args.activations, first=args.first)
    elif args.speed:
        measure_speed(train, start=args.weights, dtype=dtype)
    else:
        compare_recipes(train, test, start=args.weights, dtype=dtype)
    print(f"\nPeak resident memory: {peak_memory()}")


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # "±" has no place in some code pages
    args = parse_arguments()
    try:
        run_command(args)
    except (StudyError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
