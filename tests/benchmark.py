"""Measure the recipe, on the CIFAR-10 in ``data/``. Run by hand; pytest leaves it alone.

    python tests/benchmark.py                # this recipe and two public ones, same wall time
    python tests/benchmark.py --speed        # the training loop against the bare loop; a step's parts
    python tests/benchmark.py --ablation     # what each part of the recipe brings, cross-validated
    python tests/benchmark.py --ablation --pretrained    # optimisers and rates from trained weights
    python tests/benchmark.py --study tests/study.csv --seeds 1337 1338    # ReLU and three others

``--quick`` makes any of them short, on fewer images. Test images are read once per finished
training and choose nothing; the ablation uses the training images alone. The study appends each
finished training to its file and goes on where it stopped: on several machines, give each its own
seeds and the same ``--precision``, and put the rows together.
"""

import argparse
import contextlib
import csv
import dataclasses
import math
import platform
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy import stats
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models, transforms

import helpers

CLASS_NAMES = ["cat", "dog", "airplane"]
DEVICE = torch.device("cpu")


def load(data_dir):
    cifar10 = helpers.load_cifar10(data_dir, allow_stand_in=False, seed=0)
    id_mapping, _ = helpers.class_mapping(CLASS_NAMES)
    print(f"Data source: {cifar10.source}")
    return tuple(helpers.filter_and_relabel(images, labels, id_mapping) for images, labels in (
        (cifar10.train_images, cifar10.train_labels), (cifar10.test_images, cifar10.test_labels)))


def split(train, seed):
    images, labels = train
    return [(images[ids], labels[ids]) for ids in helpers.stratified_split(labels, 0.1, seed)]


def network(seed, pretrained=False, activation="SiLU", first=7):
    """ResNet-18 with its new head; ``activation`` "ReLU" leaves every nn.ReLU in place."""
    model = helpers.build_model("resnet18", seed)
    if pretrained:
        problem = helpers.load_imagenet_weights(model, "resnet18")
        if problem:
            raise SystemExit(f"--pretrained: {problem}")
    if activation != "ReLU":
        helpers.replace_relu(model, helpers.ACTIVATIONS[activation], first)
    helpers.replace_head(model, len(CLASS_NAMES), seed)
    return model


def usable_precisions():
    """bfloat16 only where its matrix products take at most twice as long as float32's."""
    seconds = {d: helpers.matmul_seconds(d) for d in (torch.float32, torch.bfloat16)}
    return [d for d in seconds if seconds[d] <= 2 * seconds[torch.float32]]


def processor():
    """Its name, and the rates of a product of two 512x512 matrices."""
    found = {"model name": platform.processor() or platform.machine()}
    if Path("/proc/cpuinfo").exists():
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        found.update((line[0].strip(), line[1].strip()) for line in lines if len(line) == 2)
    numbers = ", ".join(f"{key} {found[key]}" for key in ("cpu family", "model") if key in found)
    rates = ", ".join(
        f"{2 * 512**3 / helpers.matmul_seconds(d) / 1e9:.0f} GFLOP/s in {str(d)[6:]}"
        for d in (torch.float32, torch.bfloat16))
    return f"{found['model name']} ({numbers}); {rates}; {torch.get_num_threads()} threads"


def faster_precision():
    """bfloat16 where a step of the recipe is at least 1.2 times as fast with it, else float32."""
    seconds = {d: step_seconds(VARIANTS["recipe"], 64, d) for d in usable_precisions()}
    return min(seconds, key=lambda d: seconds[d] * (1.2 if d == torch.bfloat16 else 1))


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def accuracies(model, loader, dtype):
    """Which images a model gets right, by plain logits and averaged with the mirror image's."""
    right = []
    for mirror in (False, True):
        probabilities, targets = helpers.predict(model, loader, DEVICE, dtype, mirror)
        right.append(probabilities.argmax(1) == targets)
    return right


def train_ours(train, test, seed, recipe, args, dtype, activation="SiLU"):
    """One training as in the notebook: (history, which test images are right: plain, mirrored)."""
    fitting, validating = split(train, seed)
    train_loader = helpers.make_loader(*fitting, True, args.image_size, args.batch_size, seed)
    val_loader, test_loader = (
        helpers.make_loader(*part, False, args.image_size, args.batch_size, seed)
        for part in (validating, test))
    model = network(seed, args.pretrained, activation, args.first)
    history = helpers.fit(
        model, recipe, train_loader, val_loader, args.image_size, DEVICE, dtype, seed,
        on_epoch=lambda line: print("   ", line, file=sys.stderr))
    return history, *accuracies(model, test_loader, dtype)


# ==== Study: the answer over seeds ===============================================================


def study(train, test, recipe, args, dtype):
    """Train what the file lacks, append each finished training, print the file's table."""
    path, common = Path(args.study), {
        "weights": "pretrained" if args.pretrained else "random",
        "recipe": f"{recipe}, {args.image_size} px, batch {args.batch_size}",
        "test_images": str(len(test[1]))}
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    for row in (row for row in rows if row["weights"] == common["weights"]):
        for name, value in (*common.items(), ("precision", str(dtype)[6:])):
            if row[name] != value:
                raise SystemExit(
                    f"{path} has {name} {row[name]}, not {value}: give another file or --precision.")
    done = {(row["weights"], row["activation"], row["first"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for activation in args.activations:
            first = "" if activation == "ReLU" else str(args.first)
            if (common["weights"], activation, first, str(seed)) in done:
                continue
            history, plain, mirrored = train_ours(
                train, test, seed, recipe, args, dtype, activation)
            rows.append({
                **common, "activation": activation, "first": first, "seed": str(seed),
                "val_accuracy": f"{history.epochs[-1].val_accuracy:.6f}",
                "right": str(mirrored.sum()), "right_plain": str(plain.sum()),
                "seconds": f"{history.seconds:.0f}", "precision": str(dtype)[6:],
                "torch": torch.__version__, "torchvision": torchvision.__version__,
                "processor": processor()})
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, rows[-1])
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(rows[-1])
    for part in study_parts(rows):
        print("\n".join([*study_table(part), *study_conclusion(part), ""]))


def study_parts(rows):
    """The rows replaced from the 7th ReLU on, and, on the same seeds, those of other depths."""
    def key(row):
        return row["weights"], row["activation"], row["seed"]

    deep = {key(row) for row in rows if row["first"] not in ("", "7")}
    deep |= {(weights, "ReLU", seed) for weights, _, seed in deep}
    parts = ([row for row in rows if row["first"] in ("", "7")],
             [row for row in rows if key(row) in deep])
    return [part for part in parts if part]


def study_arms(rows):
    """{(weights, activation, first): (test accuracies, differences to ReLU in points, interval)}.

    Differences are between trainings from the same initial weights on the same batches. Their 95%
    interval is Student's over seeds: it covers the chance of training, not that of the images.
    """
    accuracies = defaultdict(dict)  # arm -> seed -> accuracy
    for row in rows:
        arm = row["weights"], row["activation"], row["first"]
        accuracies[arm][row["seed"]] = int(row["right"]) / int(row["test_images"])
    arms = {}
    for (weights, activation, first), accuracy in accuracies.items():
        control = {} if activation == "ReLU" else accuracies.get((weights, "ReLU", ""), {})
        paired = [100 * (accuracy[seed] - control[seed]) for seed in accuracy if seed in control]
        interval = (stats.ttest_1samp(paired, 0).confidence_interval(0.95)
                    if len(paired) > 1 else None)
        arms[weights, activation, first] = list(accuracy.values()), paired, interval
    return arms


def study_table(rows):
    """Lines of a Markdown table: each arm's test accuracy and its difference to ReLU's."""
    lines = ["| weights | activation | from the nth ReLU | seeds | test accuracy | "
             "difference to ReLU, points (95% t interval) |", "| --- " * 6 + "|"]
    for arm, (accuracy, paired, interval) in study_arms(rows).items():
        text = f"{np.mean(paired):+.2f}" if paired else ""
        text += " ({:+.2f} to {:+.2f})".format(*interval) if interval else ""
        lines.append(f"| {' | '.join(arm)} | {len(accuracy)} | {np.mean(accuracy):.2%} | {text} |")
    return lines


def study_conclusion(rows):
    """A line for each kind of initial weights: where the interval lies, arm by arm."""
    said = defaultdict(lambda: defaultdict(list))
    for (weights, activation, first), (*_, interval) in study_arms(rows).items():
        if interval:
            low, high = interval
            verdict = ("better than ReLU" if low > 0 else "worse than ReLU" if high < 0
                       else "not told apart from ReLU")
            said[weights][verdict].append(f"{activation} ({first})")
    return [f"From {weights} weights: " + "; ".join(
        f"{', '.join(names)} {verdict}" for verdict, names in verdicts.items()) + "."
        for weights, verdicts in said.items()]


# ==== Ablation ===================================================================================


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train: the recipe, with one part changed. ``sizes`` has the pixels of each epoch.

    Where a step costs more or less than the recipe's, the number of epochs makes up for it.
    ``sgd_lr`` above 0: SGD with Nesterov momentum instead of Muon and AdamW. ``body_lr`` is the
    learning rate of all but the head, as a share. ``head_first``: in the first epoch only the head
    and the blocks with a replaced activation are trained.
    """

    what: str
    sizes: tuple = (64, 64, 64, 64)
    muon_lr: float = 5e-3
    adamw_lr: float = 3e-3
    batch_size: int = 128
    muon_side: int = helpers.RECIPES["random"].muon_side
    smoothing: float = helpers.RECIPES["random"].label_smoothing
    sgd_lr: float = 0.0
    body_lr: float = 1.0
    head_first: bool = False
    scratch: bool = False  # no trained weights
    zero_init: bool = False
    whitened: bool = False
    average: bool = False
    alternate: bool = False
    erase: bool = False
    base: str = "recipe"  # what it is compared with


LONG = (64,) * 6
VARIANTS = {
    "recipe": Variant("**the recipe in bfloat16**"),
    "half": Variant("half-size epochs first (**the recipe in float32**)", (32,) * 3 + (64,) * 3),
    "muon": Variant("Muon for the last stage, too", muon_side=10**9),
    "muon-less": Variant("AdamW for the last two stages", muon_side=128),
    "adamw": Variant("AdamW alone, 3e-3", muon_side=0),
    "batch": Variant("batch 256, rates 1.4 times as high", muon_lr=7e-3, adamw_lr=4.2e-3,
                     batch_size=256),
    "middle": Variant("every epoch at 48 px", (48,) * 5),
    "white": Variant("first convolution starts at whitening filters", whitened=True),
    "zero": Variant("residual branches that start at zero", zero_init=True),
    "average": Variant("moving average of the weights, 0.98 a step", average=True),
    "alternate": Variant("alternating instead of random flips", alternate=True),
    "long": Variant("**the recipe in bfloat16**, longer", LONG, base="long"),
    "long-half": Variant("half-size epochs first", (32,) * 4 + (64,) * 4, base="long"),
    "long-nosmooth": Variant("no label smoothing", LONG, smoothing=0.0, base="long"),
}

FIVE, ELEVEN = (64,) * 5, (64,) * 11
PRETRAINED_VARIANTS = {
    "recipe": Variant("Muon 4e-3, AdamW 1e-3 for the rest", FIVE, 4e-3, 1e-3),
    "muon-1": Variant("Muon 1e-3", FIVE, 1e-3, 1e-3),
    "muon-2": Variant("Muon 2e-3: **the recipe's rates**", FIVE, 2e-3, 1e-3),
    "adamw-0.3": Variant("AdamW 3e-4", FIVE, adamw_lr=3e-4, muon_side=0),
    "adamw-1": Variant("AdamW 1e-3", FIVE, adamw_lr=1e-3, muon_side=0),
    "adamw-3": Variant("AdamW 3e-3", FIVE, adamw_lr=3e-3, muon_side=0),
    "sgd-0.02": Variant("SGD 0.02", FIVE, sgd_lr=0.02),
    "sgd-0.06": Variant("SGD 0.06", FIVE, sgd_lr=0.06),
    "sgd-0.2": Variant("SGD 0.2", FIVE, sgd_lr=0.2),
    "sgd-0.6": Variant("SGD 0.6", FIVE, sgd_lr=0.6),
    "four": Variant("Muon 4e-3, an epoch less", (64,) * 4, 4e-3, 1e-3),
    "half": Variant("Muon 4e-3, half-size epochs first", (32,) * 3 + (64,) * 3, 4e-3, 1e-3),
    "large": Variant("Muon 4e-3 at 96 px", (96,) * 3, 4e-3, 1e-3),
    "body": Variant("Muon 4e-3, 0.3 times the rates below the head", FIVE, 4e-3, 1e-3,
                    body_lr=0.3),
    "head": Variant("Muon 4e-3, head and swapped blocks alone in the first epoch", FIVE, 4e-3,
                    1e-3, head_first=True),
    "long": Variant("**the recipe's rates**, longer", ELEVEN, 2e-3, 1e-3, base="long"),
    "long-adamw": Variant("AdamW 1e-3, longer", ELEVEN, adamw_lr=1e-3, muon_side=0, base="long"),
    "long-erase": Variant("the same, with patches erased at random", ELEVEN, 2e-3, 1e-3,
                          erase=True, base="long"),
    "long-random": Variant("from random initialisation, with its recipe", ELEVEN, scratch=True,
                           base="long"),
}


def whiten_stem(model, images, image_size):
    """First convolution: leading principal components of patches, and their negatives.

    After Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.2.
    """
    weight = model.conv1.weight
    sample = torch.from_numpy(images[:: max(1, len(images) // 500)]).permute(0, 3, 1, 2)
    inputs = helpers.make_transform(False, image_size)(sample)
    patches = F.unfold(inputs, weight.shape[2:], stride=8).transpose(1, 2).flatten(0, 1)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    filters = (components / (variances + 1e-3).sqrt()).T.flip(0)[: len(weight) // 2]
    with torch.no_grad():
        weight.copy_(torch.cat([filters, -filters]).view(weight.shape))


class AlternatingFlips(helpers.ImageBatches):
    """Each image is mirrored in every second epoch, beginning at random."""

    def prepare(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.first, self.epoch = torch.randint(0, 2, (len(self),), generator=generator), 0

    def set_image_size(self, image_size):
        super().set_image_size(image_size)
        self.transform.transforms = [
            t for t in self.transform.transforms if "Flip" not in repr(t)]

    def __getitem__(self, indices):
        images, targets = super().__getitem__(indices)
        mirrored = (self.first[torch.as_tensor(indices)] + self.epoch) % 2 == 1
        images[mirrored] = images[mirrored].flip(-1)
        return images, targets


class ErasedPatches(helpers.ImageBatches):
    """In half of the images, a rectangle of 5 to 25% is painted in the mean colour."""

    def set_image_size(self, image_size):
        super().set_image_size(image_size)
        colour = [round(255 * m) for m in helpers.MEAN]
        erase = transforms.RandomErasing(0.5, scale=(0.05, 0.25), value=colour)
        self.transform.transforms.insert(3, helpers.PerImage(erase))


def make_variant(variant, images, seed, dtype, pretrained=False):
    """(model, optimiser) of a variant."""
    model = network(seed, pretrained and not variant.scratch)
    if variant.zero_init:  # the same draws, then zeros
        for module in model.modules():
            if isinstance(module, models.resnet.BasicBlock):
                nn.init.zeros_(module.bn2.weight)
    if variant.whitened:
        whiten_stem(model, images, 64)
    recipe = dataclasses.replace(
        helpers.RECIPES["random"], muon_lr=variant.muon_lr, adamw_lr=variant.adamw_lr,
        muon_side=variant.muon_side)
    optimizer = helpers.make_optimizer(model, recipe, dtype)
    if variant.sgd_lr:
        optimizer = torch.optim.SGD(
            model.parameters(), variant.sgd_lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    groups, optimizer.param_groups = optimizer.param_groups, []
    head = set(model.fc.parameters())
    for group in groups:
        for share, chosen in ((1.0, head), (variant.body_lr, set(group["params"]) - head)):
            params = [p for p in group["params"] if p in chosen]
            if params:
                optimizer.add_param_group({**group, "params": params, "lr": share * group["lr"]})
    return model.to(memory_format=torch.channels_last), optimizer


def train_variant(variant, fitting, held_out, seed, dtype, pretrained=False):
    """Train on one part, and return which of the held-out images are right."""
    loader = helpers.make_loader(*fitting, True, 64, variant.batch_size, seed)
    held_out_loader = helpers.make_loader(*held_out, False, 64, 128, seed)
    if variant.alternate:
        loader.dataset.__class__ = AlternatingFlips
        loader.dataset.prepare(seed)
    if variant.erase:
        loader.dataset.__class__ = ErasedPatches
    model, optimizer = make_variant(variant, fitting[0], seed, dtype, pretrained)
    helpers.seed_everything(seed, [loader.generator])
    criterion = nn.CrossEntropyLoss(label_smoothing=variant.smoothing)
    n_steps, share = len(variant.sizes) * len(loader), helpers.RECIPES["random"].warmup_share
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: helpers.one_cycle(step, n_steps, share))
    averaged = AveragedModel(
        model, use_buffers=True,
        avg_fn=lambda a, p, n: torch.lerp(a, p, 0.02) if a.is_floating_point() else p)
    for epoch, size in enumerate(variant.sizes):
        loader.dataset.set_image_size(size)
        loader.dataset.epoch = epoch
        for name, p in model.named_parameters():
            first = ("fc", "layer3.1", "layer4")  # the head, the blocks with a new activation
            p.requires_grad_(epoch > 0 or not variant.head_first or name.startswith(first))
        helpers.train_one_epoch(
            model, criterion, optimizer, scheduler, loader, DEVICE, dtype,
            lambda step, n: variant.average and averaged.update_parameters(model))
    _, right = accuracies(averaged.module if variant.average else model, held_out_loader, dtype)
    return right


def step_seconds(variant, size, dtype, as_matmul=True, steps=6):
    """Median seconds of a step on one resident batch, the first left out."""
    model, optimizer = make_variant(variant, np.zeros((512, 32, 32, 3), np.uint8), 0, dtype)
    batch = (torch.randn(variant.batch_size, 3, size, size), torch.zeros(variant.batch_size).long())
    ends = []
    small_maps = helpers.small_maps_as_matmul
    if not as_matmul:
        helpers.small_maps_as_matmul = lambda *args: contextlib.nullcontext()
    try:
        helpers.train_one_epoch(
            model, nn.CrossEntropyLoss(), optimizer,
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), [batch] * steps, DEVICE, dtype,
            lambda step, n: ends.append(time.perf_counter()))
    finally:
        helpers.small_maps_as_matmul = small_maps
    return float(np.median(np.diff(ends)))


def ablate(train, args, dtype):
    """Cross-validated accuracy of each variant against the recipe's, on the training images."""
    images, labels = train
    folds = list(StratifiedKFold(3, shuffle=True, random_state=1337).split(images, labels))
    folds = folds[: args.folds]
    columns = " | ".join(f"min, {str(d)[6:]}" for d in usable_precisions())
    variants = PRETRAINED_VARIANTS if args.pretrained else VARIANTS
    print(f"| variant | image sides, px | {columns} | accuracy, {len(folds)} fold(s) | "
          f"difference ± s.e., points |\n{'| --- ' * (4 + len(usable_precisions()))}|")
    right = {}
    names = args.only or variants
    for name in dict.fromkeys(n for name in names for n in (variants[name].base, name)):
        variant = variants[name]
        n_steps = len(folds[0][0]) // variant.batch_size
        sizes = {size: n_steps * variant.sizes.count(size) for size in set(variant.sizes)}
        minutes = " | ".join(
            f"{sum(n * step_seconds(variant, size, d) for size, n in sizes.items()) / 60:.1f}"
            for d in usable_precisions())
        right[name] = np.concatenate([
            train_variant(variant, (images[a], labels[a]), (images[b], labels[b]), 1337 + i, dtype,
                          args.pretrained)
            for i, (a, b) in enumerate(folds)])
        paired = right[name].astype(float) - right[variant.base]
        error = paired.std(ddof=1) / math.sqrt(len(paired))
        epochs = ", ".join(
            f"{variant.sizes.count(size)} × {size}" for size in sorted(set(variant.sizes)))
        difference = "" if name == variant.base else f"{100 * paired.mean():+.2f} ± {100 * error:.2f}"
        print(f"| {variant.what} | {epochs} | {minutes} | {right[name].mean():.1%} | {difference} |",
              flush=True)


def compare_steps(rounds):
    """Print what a step of 128 images takes, in turns, with and without parts of the recipe."""
    print("\nMilliseconds a step, batch 128:\n\n| precision | image side | the recipe | convolutions as "
          "they are | Muon for the last stage, too | AdamW alone |\n" + "| --- " * 6 + "|")
    ways = ("recipe", True), ("recipe", False), ("muon", True), ("adamw", True)
    for d in usable_precisions():
        for size in (32, 64):
            times = np.median([[step_seconds(VARIANTS[name], size, d, as_matmul) for name, as_matmul
                                in ways] for _ in range(rounds)], axis=0)
            print(f"| {str(d)[6:]} | {size} px | " + " | ".join(f"{1000 * t:.0f}" for t in times) + " |",
                  flush=True)


# ==== Two public recipes, with the same swap: PIL transforms, DataLoader, float32 ================


class PILImages(torch.utils.data.Dataset):
    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def public_recipe(steps_per_epoch, epochs):
    """Adam 1e-3, a tenth of that after 70% of the epochs, batch 64, 32x32."""
    model = network(seed=1337)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(
        optimizer, int(0.7 * epochs * steps_per_epoch), 0.1)


def lightning_recipe(steps_per_epoch, epochs):
    """3x3 stride-1 stem, no max-pool, SGD with a one-cycle rate up to 0.1, decay 5e-4, batch 64."""
    model = network(seed=1337)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=steps_per_epoch * epochs)


PEERS = {"public solution": public_recipe, "Lightning tutorial": lightning_recipe}


def train_peer(make, train, test, seconds):
    """Train a public recipe for the given wall time, without validation; the last weights count."""
    normalise = [transforms.ToTensor(), transforms.Normalize(helpers.MEAN, helpers.STD)]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    fitting, _ = split(train, 1337)
    torch.manual_seed(1337)
    loader = torch.utils.data.DataLoader(
        PILImages(*fitting, transforms.Compose(augment + normalise)), 64, shuffle=True, drop_last=True)
    test_loader = torch.utils.data.DataLoader(PILImages(*test, transforms.Compose(normalise)), 256)

    def step(model, optimizer, schedule, images, labels):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()

    state, batches = make(len(loader), 1000), iter(loader)  # a few steps for the speed
    [step(*state, *next(batches)) for _ in range(3)]
    a_step = timed(lambda: [step(*state, *next(batches)) for _ in range(8)]) / 8
    epochs = max(1, round(seconds / (a_step * len(loader))))
    torch.manual_seed(1337)
    state = make(len(loader), epochs)
    seen, start = 0, time.perf_counter()
    state[0].train()
    for images, labels in (batch for _ in range(epochs) for batch in loader):
        step(*state, images, labels)
        seen += len(labels)
        if time.perf_counter() - start > 1.1 * seconds:
            break
    taken = time.perf_counter() - start
    return seen, taken, [right.mean() for right in accuracies(state[0], test_loader, torch.float32)]


def compare_recipes(train, test, recipe, args, dtype):
    """Print the accuracy table: this recipe, then its peers in the same wall time."""
    n_train = len(split(train, 1337)[0][1])

    def row(label, seen, seconds, tested):
        print(f"| {label} | {seen / n_train:.1f} | {seen / seconds:.0f} | {seconds / 60:.1f} min | "
              f"{tested[0]:.1%} | {tested[1]:.1%} |", flush=True)

    print("| recipe | epochs | images/s | training | test, plain | test, mirror-averaged |\n"
          "| --- | --- | --- | --- | --- | --- |")
    history, *right = train_ours(train, test, 1337, recipe, args, dtype)
    row("this one (with validation)", len(history.epochs) * n_train, history.seconds,
        [r.mean() for r in right])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before the peers raise it
    for label, make in PEERS.items():
        row(f"{label}, same wall time", *train_peer(make, train, test, history.seconds))
    unit = 2**30 if sys.platform == "darwin" else 2**20
    print(f"\nPeak resident memory of this recipe's training: {memory / unit:.2f} GiB")


# ==== Speed ======================================================================================


def measure_speed(train, recipe, size, batch_size, dtype, steps, rounds):
    """(images/s, share of the bare loop's speed, share of time that loading takes), medians.

    The bare loop is forward, backward and step on one resident batch, with the same convolutions.
    """
    fitting, _ = split(train, 1337)
    loader = helpers.make_loader(*fitting, True, size, batch_size, 1337)
    model = network(1337).to(memory_format=torch.channels_last).train()
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = helpers.make_optimizer(model, recipe, dtype)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    x, y = helpers.to_device(*next(iter(loader)), DEVICE)

    def few():
        return (batch for _, batch in zip(range(steps), loader))

    def real():
        helpers.train_one_epoch(
            model, criterion, optimizer, scheduler, few(), DEVICE, dtype)

    def bare():
        with helpers.small_maps_as_matmul(model, DEVICE, dtype):
            for _ in range(steps):
                with helpers.autocast(DEVICE, dtype):
                    loss = criterion(model(x).float(), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def loading():
        for batch in few():
            helpers.to_device(*batch, DEVICE)

    works = real, bare, loading
    [work() for work in works]
    # In turns, so that a machine that slows down or speeds up does so for all of them.
    times = np.median([[timed(work) for work in works] for _ in range(rounds)], axis=0)
    return steps * batch_size / times[0], times[1] / times[0], times[2] / times[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 epochs, an eighth of the images")
    parser.add_argument("--speed", action="store_true", help="only the speed of the loop")
    parser.add_argument("--ablation", action="store_true", help="what each part brings")
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help="variants of the ablation")
    parser.add_argument("--folds", type=int, default=3, help="of the ablation, 1 to 3")
    parser.add_argument("--study", metavar="CSV", help="the file to append trainings to")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337], help="of the study")
    parser.add_argument("--activations", nargs="+", default=["ReLU", *helpers.ACTIVATIONS],
                        choices=["ReLU", *helpers.ACTIVATIONS], help="of the study")
    parser.add_argument("--first", type=int, default=7, help="replaced ReLU, 1-based; of the study")
    parser.add_argument("--pretrained", action="store_true", help="start from torchvision's weights")
    parser.add_argument("--data-dir", default=str(Path(__file__).resolve().parent.parent / "data"))
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own number")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="the faster one")
    args = parser.parse_args()

    helpers.seed_everything(1337)
    dtype = getattr(torch, args.precision) if args.precision else faster_precision()
    variants = PRETRAINED_VARIANTS if args.pretrained else VARIANTS
    unknown = set(args.only or ()) - set(variants)
    if unknown or args.pretrained and not (args.study or args.ablation):
        parser.error(f"--only takes {list(variants)}; --pretrained goes with --study or --ablation")
    recipe = helpers.RECIPES["pretrained" if args.pretrained else "random"]
    if args.epochs or args.quick:
        recipe = dataclasses.replace(recipe, epochs=args.epochs or 2)
    print(f"{processor()}\n{str(dtype)[6:]}, {helpers.environment_summary(DEVICE)}")
    train, test = load(args.data_dir)
    if args.quick:
        train, test = (tuple(part[::8] for part in arrays) for arrays in (train, test))
    if args.study:
        return study(train, test, recipe, args, dtype)
    if args.ablation:
        return ablate(train, args, dtype)
    if not args.speed:
        compare_recipes(train, test, recipe, args, dtype)
    print("\n| image side | images/s | of the bare loop | loading |\n| --- | --- | --- | --- |")
    for size in (32, 64) if args.quick else (32, 48, 64, 96):
        rate, ratio, loading = measure_speed(
            train, recipe, size, args.batch_size, dtype, *((4, 3) if args.quick else (10, 5)))
        print(f"| {size} px | {rate:.0f} | {ratio:.1%} | {loading:.1%} |", flush=True)
    compare_steps(1 if args.quick else 3)


if __name__ == "__main__":
    main()
