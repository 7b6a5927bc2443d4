"""The base's LoRAs among the cards of the Extra Networks tab, which hides them while an SDXL checkpoint is selected.

The page of the built-in Lora extension is exchanged for one that lists them too. It marks every card with its model, as
one of the card's `data-sort-` attributes; style.css shows the marks, and the cards that were hidden before, only while
X-Adapter is ticked in the same tab (xadapter.js).
"""

from __future__ import annotations

import sys
from typing import Any

from modules import sd_models, ui_extra_networks

from ...errors import WrongFile
from ...families import BASE_FAMILIES
from ..base.plugins import known_lora, lora_base

MODEL_MARK = "xadapter-model"
"""Sort key whose value is the model of the card's LoRA: sd1, sd2, sdxl or unknown."""
ADDED_MARK = "xadapter-added"
"""Sort key of the cards that the WebUI would not show."""


def exchange_page() -> None:
    """Put our page in the place of the Lora extension's, before the WebUI makes its tabs from the list of pages."""
    lora_pages = sys.modules.get("ui_extra_networks_lora")
    if lora_pages is None:
        return
    pages = ui_extra_networks.extra_pages
    for place, page in enumerate(pages):
        # a page that another extension has put there is left to it
        if type(page) is lora_pages.ExtraNetworksPageLora:
            pages[place] = _page_of_both_models(type(page))()


def _page_of_both_models(hosts_page: type) -> type:
    """A class made here, as the Lora extension's modules are there only once the WebUI has loaded it."""

    class LorasOfBothModels(hosts_page):
        def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
            item, model = super().create_item(name, index), _model_of(name)
            added = item is None and model in BASE_FAMILIES and _sdxl_is_selected()
            # the WebUI asks without its filter for a card whose description was edited
            if added or (item is None and not enable_filter):
                item = super().create_item(name, index, enable_filter=False)
            if item is not None:
                item["sort_keys"] |= {MODEL_MARK: model} | ({ADDED_MARK: "yes"} if added else {})
            return item

        def create_tree_file_item_html(self, tabname: str, file_path: str, item: dict[str, Any]) -> str:
            entry = super().create_tree_file_item_html(tabname, file_path, item)
            return entry.replace("<li ", "<li data-xadapter-added ", 1) if ADDED_MARK in item["sort_keys"] else entry

    return LorasOfBothModels


def _model_of(name: str) -> str:
    on_disk = known_lora(name)
    try:
        return lora_base(on_disk.filename) if on_disk is not None else "unknown"
    except WrongFile:
        # one broken file must not empty the tab; naming it in a prompt tells what is wrong
        return "unknown"


def _sdxl_is_selected() -> bool:
    # not `shared.sd_model`, which would load a checkpoint
    return bool(getattr(sd_models.model_data.sd_model, "is_sdxl", False))
