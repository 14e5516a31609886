"""Loading a causal language model and its tokenizer from the hub, a directory, a GGUF file or a Python package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import ModelError, reason
from losa.model.auto_class import auto_class, check_text_alone
from losa.model.finite import check_finite, check_rounded, is_finite
from losa.model.naming import Naming, check_names
from losa.model.processors import fetch_processors
from losa.model.skeleton import skeleton
from losa.storage.kinds import PEFT_ADVICE, is_packed, refuse_adapter
from losa.storage.tensor_files import checkpoint_tensors

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    model: str,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, object]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        model: Hugging Face id, local directory, .gguf file, or "package:NAME": the one .gguf file inside the installed
            Python package NAME, which is not imported.
        gguf_file: which GGUF file of the directory, repository or package; its weights are expanded to ``dtype``.
        dtype: "auto" (the checkpoint's own; GGUF: float32), "float32", "bfloat16" or "float16".
        device: "auto" (cuda if there is one, else cpu) or a torch device.

    Returns:
        (model, tokenizer)

    Raises:
        ModelError: not found, offline, quantised, packed, not a decoder-only model, incomplete weights or some that
            are not finite, a PEFT adapter beside the model, or no such device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

    target = torch_device(device)
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    source, gguf_file = locate_model(model, gguf_file)
    directory = Path(source) if os.path.isdir(source) else None
    refuse_other_kinds(model, source, gguf_file)
    trust = {"trust_remote_code": trust_remote_code}
    # transformers and its dependencies raise errors of many kinds here; the user needs one sentence.
    try:
        if gguf_file is None:
            config = AutoConfig.from_pretrained(source, **trust)
            check_config(model, config)
            tokenizer = AutoTokenizer.from_pretrained(source, **trust)
            options = {"config": config, "dtype": dtype if dtype == "auto" else getattr(torch, dtype), **trust}
            auto = auto_class(config)
        else:
            # A GGUF file describes its tokenizer in full; AutoTokenizer would parse the file's metadata twice.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source, gguf_file=gguf_file)
            auto = AutoModelForCausalLM
            options = {"gguf_file": gguf_file, "dtype": torch.float32 if dtype == "auto" else getattr(torch, dtype)}
            # Without this the model counts as quantised: it may keep packed weights, and cannot be saved.
            options["quantization_config"] = GgufConfig(dequantize=True)
        loading: Any = auto.from_pretrained(source, output_loading_info=True, **options)
        loaded, info = loading
    except ModelError:
        raise
    except Exception as error:
        if directory is not None and gguf_file is None:
            _name_what_is_damaged(directory, error)
        raise ModelError(f"model {model!r}: {explain_failure(source, error)}") from error
    check_text_alone(model, loaded)
    check_complete(model, sorted(info["missing_keys"]))
    if directory is None and auto is not AutoModelForCausalLM:
        fetch_processors(source)
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ModelError(f"model {model!r}: {PEFT_ADVICE}")
    _check_finite(loaded, model, None if gguf_file else directory)
    return loaded.to(target).eval(), tokenizer


def configured_model(
    model: str, gguf_file: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """The model that ``load_model`` would load, without weights: on the meta device, in the dtype that they would have.

    Raises:
        ModelError: the configuration cannot be had, or is of no decoder-only model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, gguf_file = locate_model(model, gguf_file)
    refuse_other_kinds(model, source, gguf_file)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)
        stored = config.dtype or config.get_text_config().dtype if gguf_file is None else None
        chosen = getattr(torch, dtype) if dtype != "auto" else stored or torch.float32
        auto = auto_class(config) if gguf_file is None else AutoModelForCausalLM
        with torch.device("meta"):
            made = auto.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"model {model!r}: {explain_failure(source, error)}") from error
    check_text_alone(model, made)
    return made


def refuse_other_kinds(model: str, source: str, gguf_file: str | None) -> None:
    """Raises ModelError for a directory that holds an adapter or a packed checkpoint.

    Args:
        model: what the user gave, for the message.
        source, gguf_file: what ``locate_model`` returned.
    """
    if gguf_file is None and os.path.isdir(source):
        refuse_adapter(Path(source))
        if is_packed(Path(source)):
            raise ModelError(f"model {model!r}: packed; `losa unpack` it first")


def _name_what_is_damaged(directory: Path, error: Exception) -> None:
    """Raises ModelError if the files are damaged or do not belong to the model, and names file and tensor, which the
    errors of transformers do not name."""
    if not any(directory.glob("*.safetensors")):
        return
    try:
        with checkpoint_tensors(directory):
            pass
        model = skeleton(directory)
    except ModelError as found:
        if "config.json" not in str(found):
            raise found from error
        return
    check_names(directory, model)


def _check_finite(loaded: nn.Module, model: str, directory: Path | None) -> None:
    """Raises ModelError with the name of the first weight that is NaN or infinite. Where the weight in the file is
    finite, the message says that the type does not hold it."""
    for name, parameter in loaded.named_parameters():
        if not parameter.is_floating_point() or is_finite(parameter):
            continue
        where = f"model {model!r}: {name}"
        stored = None if directory is None else _stored_weight(loaded, directory, name)
        if stored is not None and is_finite(stored):
            check_rounded(where, stored, parameter)
        check_finite(where, parameter)


def _stored_weight(loaded: nn.Module, directory: Path, name: str) -> Tensor | None:
    try:
        with checkpoint_tensors(directory) as files:
            naming = Naming(loaded, files.names)
            source = next((source for source, target in naming.renamed.items() if target == name), None)
            return None if source is None else files.get(source)
    except ModelError:  # files of another kind, which transformers loads too
        return None


def torch_device(device: str) -> torch.device:
    """ "auto" is cuda if there is one, else cpu. Raises ModelError for a device that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Reading a number back shows that the device computes; tensors on meta hold no numbers.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch raises all three: no such kind, a build without it, a backend that lacks the operator.
        raise ModelError(f"device {device!r}: not available here ({reason(error)})") from error
    if torch.device(device).type == "meta":
        raise ModelError("device 'meta': holds no numbers; expected auto, cpu, cuda or another kind that computes")
    return torch.device(device)


def locate_model(model: str, gguf_file: str | None) -> tuple[str, str | None]:
    """What to load: (directory or Hugging Face id, GGUF file in it or None). Arguments of ``load_model``."""
    if model.startswith("package:"):
        return _locate_package(model, gguf_file)
    path = Path(model).expanduser()
    # os.path, not pathlib: it raises no error for a name that no file can have.
    if path.suffix == ".gguf" and os.path.isfile(path):
        return str(path.parent), path.name
    if os.path.isdir(path):
        if gguf_file is not None and not (path / gguf_file).is_file():
            found = _names(path.glob("*.gguf"))
            raise ModelError(f"gguf_file {gguf_file!r}: no such file in {model!r}; found {found}")
        return str(path), gguf_file
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"model {model!r}: no such directory")
    return model, gguf_file


def _locate_package(model: str, gguf_file: str | None) -> tuple[str, str]:
    name = model.removeprefix("package:")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model {model!r}: no Python package {name!r} is installed (give its import name)")
    files = sorted(f for place in spec.submodule_search_locations for f in Path(place).rglob("*.gguf"))
    chosen = [f for f in files if gguf_file in (None, f.name)]
    if len(chosen) != 1:
        expected = "exactly one .gguf file (else set gguf_file)" if gguf_file is None else repr(gguf_file)
        raise ModelError(f"model {model!r}: expected {expected} in the package, found {_names(files)}")
    return str(chosen[0].parent), chosen[0].name


def _names(files: Iterable[Path]) -> str:
    return ", ".join(sorted(f.name for f in files)) or "none"


def check_complete(model: str, absent: Sequence[str]) -> None:
    """Raises ModelError if a checkpoint lacks weights of its architecture, by name; ``model``: what the user gave."""
    if absent:
        shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise ModelError(f"model {model!r}: the checkpoint lacks {len(absent)} weight(s) of its architecture: {shown}")


def check_config(model: str, config) -> None:
    """Raises ModelError for the configuration of an encoder-decoder or of quantised weights; ``model``: what the user
    gave."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {model!r}: expected a decoder-only language model, got an encoder-decoder")
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            if not isinstance(settings, dict):
                if not hasattr(settings, "to_dict"):
                    raise ModelError(f"model {model!r}: config.json: quantization_config: expected an object")
                settings = settings.to_dict()
            method = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
            raise ModelError(f"model {model!r}: quantised ({method}); give the checkpoint with floating-point weights")


def explain_failure(source: str, error: Exception) -> str:
    """One sentence that tells the user why transformers could not load ``source``."""
    text = str(error)
    if "trust_remote_code" in text:
        return "needs its own code; if you trust it, set trust_remote_code: true"
    if os.path.isdir(source):
        return f"cannot be loaded from {source} ({reason(error)})"
    return (
        f"not a local directory, and cannot be loaded from the Hugging Face hub ({reason(error)}). Check the name and "
        "the network (and HF_TOKEN for a gated model), or download it elsewhere and give the directory"
    )
