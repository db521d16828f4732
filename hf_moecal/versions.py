"""What differs between the releases of libraries that hf_moecal runs on, one entry for each fact.

Everything else in the package is the same on all of them; `setup.py` has their range. It imports neither library
until it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


CACHE_NAMES = ("cache", "past_key_values")
"""Under which a model is given its cache. transformers 5.24 calls it `cache`, and takes the older name too, from
callers and from models with code of their own; a hook sees the name that the caller used."""


def cache_name() -> str:
    """The argument under which the installed transformers gives a model its cache, and gets it back."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """The cache among a model's arguments, or in its output, under whichever name; `None` where there is none."""
    return next((inputs[name] for name in CACHE_NAMES if name in inputs and inputs[name] is not None), None)


def with_cache(inputs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments of a model with another cache, under the name that they have for it.

    Example:

    ```python
    >>> from hf_moecal.versions import with_cache
    >>> with_cache({"input_ids": [1], "past_key_values": "old"}, "new")
    {'input_ids': [1], 'past_key_values': 'new'}

    ```
    """
    name = next((name for name in CACHE_NAMES if inputs.get(name) is not None), None) or cache_name()
    return {**inputs, name: cache}


def http_errors() -> type[Exception]:
    """Base of the errors of the HTTP library that the installed huggingface_hub uses: requests, httpx."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
