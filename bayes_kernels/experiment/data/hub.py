"""Data sets of the Hugging Face hub, in the forms that the papers use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...task import LETTERS, Example, Task, Template
from .splits import choose_subset, hash_of, split_by_hash, validation_note


def convert_winogrande(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``allenai/winogrande``: sentence, option1, option2, answer ("1", "2" or "")."""
    answer = str(row["answer"])
    return Example(
        id=f"winogrande-{hash_of(row['sentence']):016x}",
        question=row["sentence"],
        label=int(answer) - 1 if answer in ("1", "2") else None,
        choices=(row["option1"], row["option2"]),
    )


def _convert_lettered(row: Mapping[str, Any], question: str) -> Example:
    """Rows with ``choices = {"text": [...], "label": [...]}`` and the right label's name."""
    labels = [str(label) for label in row["choices"]["label"]]
    key = str(row["answerKey"])
    if key and key not in labels:
        raise ValueError(f"answerKey: expected one of {labels} or '', got {key!r} in {row['id']!r}")
    return Example(
        id=str(row["id"]),
        question=row[question],
        label=labels.index(key) if key else None,
        choices=tuple(row["choices"]["text"]),
    )


def convert_arc(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``allenai/ai2_arc``: id, question, choices {text, label}, answerKey.

    Labels are "A" to "E" in some rows and "1" to "5" in others.
    """
    return _convert_lettered(row, "question")


def convert_obqa(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``allenai/openbookqa``: id, question_stem, choices {text, label}, answerKey."""
    return _convert_lettered(row, "question_stem")


def convert_boolq(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``google/boolq``: question, passage, answer (a Boolean). Classes: false, true."""
    return Example(
        id=f"boolq-{hash_of(row['question'] + chr(10) + row['passage']):016x}",
        question=row["question"],
        label=int(bool(row["answer"])),
        context=row["passage"],
    )


def convert_mmlu(row: Mapping[str, Any], index: int) -> Example:
    """A row of ``cais/mmlu``: question, subject, choices (four strings), answer (an index)."""
    return Example(
        id=f"{row['subject']}-{index}",
        question=row["question"],
        label=int(row["answer"]),
        choices=tuple(row["choices"]),
    )


@dataclass(frozen=True)
class HubDataset:
    """Where a data set lies on the hub and how its rows become examples."""

    repository: str
    configuration: str | None
    convert: Callable[[Mapping[str, Any], int], Example]
    template: Template
    train_split: str | None = "train"
    # The split with public labels that the papers report on.
    test_split: str = "test"
    label_names: tuple[str, ...] | None = None
    # The split that the papers score, where it is another.
    published_split: str | None = None

    def scored(self, split: str) -> str:
        """The split of the hub behind a word of `SPLITS`."""
        return (self.published_split if split == "published" else None) or self.test_split


# Which rows are the test examples: those of the public test split, or those that the papers score.
SPLITS = ("test", "published")

_ARC, _WINOGRANDE, _MMLU = "allenai/ai2_arc", "allenai/winogrande", "cais/mmlu"

HUB_DATASETS: dict[str, HubDataset] = {
    "wg_s": HubDataset(
        _WINOGRANDE, "winogrande_s", convert_winogrande, "winogrande", test_split="validation"
    ),
    "wg_m": HubDataset(
        _WINOGRANDE, "winogrande_m", convert_winogrande, "winogrande", test_split="validation"
    ),
    "arc_c": HubDataset(_ARC, "ARC-Challenge", convert_arc, "arc", published_split="validation"),
    "arc_e": HubDataset(_ARC, "ARC-Easy", convert_arc, "arc", published_split="validation"),
    "obqa": HubDataset(
        "allenai/openbookqa", "main", convert_obqa, "obqa", published_split="validation"
    ),
    "boolq": HubDataset(
        "google/boolq",
        None,
        convert_boolq,
        "boolq",
        test_split="validation",
        label_names=("false", "true"),
    ),
    "mmlu_chem": HubDataset(_MMLU, "college_chemistry", convert_mmlu, "mmlu", train_split=None),
    "mmlu_phys": HubDataset(_MMLU, "college_physics", convert_mmlu, "mmlu", train_split=None),
}

# The "small shift" and "large shift" sets of the papers, for models trained on OpenBookQA.
_HUB_OOD = {"obqa": ("arc_c", "arc_e", "mmlu_chem", "mmlu_phys")}


def convert_rows(
    rows: Iterable[Mapping[str, Any]], convert: Callable[[Mapping[str, Any], int], Example]
) -> list[Example]:
    """The examples of a split; a repeated id keeps its first example."""
    found: dict[str, Example] = {}
    for index, row in enumerate(rows):
        example = convert(row, index)
        found.setdefault(example.id, example)
    return list(found.values())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _hub_rows(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a split, through the ``datasets`` library and its cache."""
    entry = HUB_DATASETS[name]
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"load_hub: {name!r} needs the library datasets; "
            "run: pip install 'bayes-kernels[train]'"
        ) from None
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this question the library retries for half a minute before it uses its cache.
        huggingface_hub.HfApi().dataset_info(entry.repository, timeout=10)
        reason = ""
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        datasets.config.HF_HUB_OFFLINE = True
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            entry.repository, entry.configuration, split=split
        )
        return rows
    except Exception as error:
        # A dozen types are raised here (connection, missing cache, errors of the hub); all mean
        # the same to the user, and none of the tracebacks helps.
        reason = reason or f"{type(error).__name__}: {_first_line(error)}"
        raise ConnectionError(
            f"load_hub: {name!r} ({entry.repository}) is neither reachable nor in the cache "
            f"({reason}); connect to the hub once, or pass a file or folder instead, or "
            "use stdlib-docs, which needs no download"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def load_hub(
    name: str,
    *,
    ood: Sequence[str] | None = None,
    train_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    split: str = "test",
) -> Task:
    """A public data set of the LoRA-uncertainty papers, through the ``datasets`` library.

    Names: wg_s, wg_m (WinoGrande), arc_c, arc_e, obqa, boolq, and the test-only sets mmlu_chem,
    mmlu_phys. The test examples are those of the public split with labels (for WinoGrande and
    BoolQ the hub's validation split); validation examples are split off the training data by hash.

    Args:
        name: One of the names above.
        ood: Names of out-of-distribution sets (their test examples); for obqa arc_c, arc_e,
            mmlu_chem and mmlu_phys by default, else none.
        train_size, validation, seed: As in :func:`load_files`.
        split: "test", or "published": the code of BLoB and TFB scores the hub's validation split of ARC (299
            and 570 examples) and of OpenBookQA (500).

    Raises:
        ValueError: Unknown name, or sets of different kinds.
        ImportError: The ``datasets`` library is not installed (extra ``train``).
        ConnectionError: The hub cannot be reached and its cache has no copy.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {split!r}")
    names = _HUB_OOD.get(name, ()) if ood is None else tuple(ood)
    for wanted in (name, *names):
        if wanted not in HUB_DATASETS:
            raise ValueError(f"load_hub: expected one of {', '.join(HUB_DATASETS)}, got {wanted!r}")
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation: expected a fraction in [0, 1), got {validation!r}")
    entry = HUB_DATASETS[name]
    for wanted in names:
        if HUB_DATASETS[wanted].label_names != entry.label_names:
            raise ValueError(
                f"load_hub: ood set {wanted!r} must be of the kind of {name!r} (multiple choice "
                "or true/false), it is not"
            )

    def read(key: str, split: str) -> list[Example]:
        return convert_rows(_hub_rows(key, split), HUB_DATASETS[key].convert)

    train = read(name, entry.train_split) if entry.train_split else []
    test = read(name, entry.scored(split))
    known = {example.id for example in test}
    train = [example for example in train if example.id not in known]
    ood_sets = {key: read(key, HUB_DATASETS[key].scored(split)) for key in names}
    train, held_out = split_by_hash(train, validation, "validation")
    if entry.label_names is None:
        everything = [*train, *held_out, *test, *(e for part in ood_sets.values() for e in part)]
        count = max(len(example.choices) for example in everything)
        label_names = tuple(LETTERS[:count])
    else:
        label_names = entry.label_names
    return Task(
        name=name,
        kind="multiple_choice" if entry.label_names is None else "classification",
        label_names=label_names,
        train=choose_subset(train, train_size, seed) if train or train_size else [],
        validation=held_out,
        test=test,
        ood=ood_sets,
        template=entry.template,
        notes=(validation_note(validation),) if held_out else (),
    )
