"""An infotext's way through the WebUI, without the WebUI."""

from __future__ import annotations

import json
import re


def pasted(written: dict[str, str]) -> dict[str, str]:
    """What the WebUI hands back after writing and parsing (infotext_utils.quote, parse_generation_parameters)."""
    parsed = {}
    for key, value in written.items():
        text = json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
        text = json.loads(text) if text.startswith('"') and text.endswith('"') else text
        size = re.match(r"^(\d+)x(\d+)$", text)
        parsed |= {f"{key}-1": size.group(1), f"{key}-2": size.group(2)} if size else {key: text}
    return parsed
