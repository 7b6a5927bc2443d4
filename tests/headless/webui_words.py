"""The WebUI's own prompt parser.

    python webui_words.py WEBUI FIGURES

To be run with the WebUI's own Python. FIGURES is JSON like tests/golden/webui_words.json; its prompts are read anew
and written to the standard output, each with what the parser gives.
"""

import importlib.util
import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1]) / "modules/prompt_parser.py"
    spec = importlib.util.spec_from_file_location("prompt_parser", path)
    parser = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parser)
    asked = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))

    def combined(prompt: str) -> list:
        indexes, texts, _ = parser.get_multicond_prompt_list([prompt])
        return [[texts[place], weight] for place, weight in indexes[0]]

    found = {
        "schedules": [
            [prompt, steps, parser.get_learned_conditioning_prompt_schedules([prompt], steps)[0]]
            for prompt, steps, _ in asked["schedules"]
        ],
        "and": [[prompt, combined(prompt)] for prompt, _ in asked["and"]],
        "attention": [[prompt, parser.parse_prompt_attention(prompt)] for prompt, _ in asked["attention"]],
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
