"""`evaluate`: pictures of captions in several ways, shared out over processes, then figures, tables and a page."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import WrongArgument, WrongFile, XAdapterError
from ..headless.bars import Bars
from ..headless.generate import choose_placement, load_models
from ..headless.models import Placement
from ..headless.options import say
from ..headless.pipeline import RELEASED_RULES, WEBUI_RULES, no_progress
from ..saving import write_whole
from .evaluate_command import Evaluation, Item
from .made_with import difference, made_with
from .maps import extractor
from .measuring import Measured, Measuring, Sample
from .page import page
from .processes import Processes
from .report import Report, Row
from .ways import Maker, UnusablePicture, folder_of, measured_ways, ways_of

logger = logging.getLogger(__name__)

MADE_WITH, PAGE, TABLE, FIGURES = "made-with.json", "index.html", "table.txt", "figures.json"
EXIT_NOTHING = 1


def evaluate(options: argparse.Namespace, evaluation: Evaluation) -> int:
    """Make what is missing, measure what was asked for; status 1 where nothing at all could be measured."""
    _check_rows(evaluation)
    processes = Processes(options.device)
    try:
        placement = choose_placement(processes.device, options.dtype, options.low_memory)
        facts = made_with(evaluation, str(placement.dtype).removeprefix("torch."))
        if processes.is_first:
            facts = _claim(evaluation, facts)
        processes.wait()
        _make(evaluation, options, processes, placement)
        processes.wait()
        return _measure_and_report(evaluation, processes.device, facts) if processes.is_first else 0
    finally:
        processes.leave()


def _check_rows(evaluation: Evaluation) -> None:
    """Raises: WrongArgument: two rows of the table would have one name."""
    names = [way.name for way in measured_ways(evaluation)]
    if (twice := next((name for place, name in enumerate(names) if name in names[:place]), None)) is not None:
        raise WrongArgument(f"--beside: the table already has a row '{twice}'; choose another name.")


def _claim(evaluation: Evaluation, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write down what the pictures of the folder are made with; gives what they were made with.

    Args:
        facts: what they are made with.

    Raises:
        WrongArgument: it holds pictures that were made with something else.
    """
    path = evaluation.out / MADE_WITH
    if path.is_file() and any((evaluation.out / "pictures").glob("*/*.png")):
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            if _is_made(evaluation):
                # what is measured alone may be so on another machine, whose usual type is another
                facts = {**facts, "dtype": there.get("dtype", facts["dtype"])}
            different = difference(there, facts)
        except (ValueError, AttributeError) as error:
            raise WrongFile(f"{path} is not what evaluate wrote there.") from error
        if different is not None:
            raise WrongArgument(
                f"--out: the pictures in {evaluation.out} were made with '{different}' {there.get(different)!r}, not "
                f"{facts[different]!r}; name another folder."
            )
    for item in evaluation.items if evaluation.upgraded_captions is not None else ():
        if (folder := folder_of(evaluation.out, item)).path.is_dir():
            folder.note_upgraded_caption(item.caption, evaluation.upgraded_captions[item.caption])
    write_whole(path, lambda to: to.write_text(_json(facts), encoding="utf-8"))
    return facts


def _is_made(evaluation: Evaluation) -> bool:
    """Whether every picture is there."""
    ways = ways_of(evaluation)
    return not any(folder_of(evaluation.out, item).missing(ways) for item in evaluation.items)


def _make(evaluation: Evaluation, options: argparse.Namespace, processes: Processes, placement: Placement) -> None:
    """The pictures that this process has to make."""
    ways = ways_of(evaluation)
    ours = processes.share(evaluation.items)
    unfinished = {item: len(folder_of(evaluation.out, item).missing(ways)) for item in ours}
    missing = [item for item, pictures in unfinished.items() if pictures]
    if not missing:
        return
    models = load_models(evaluation.files, replace(placement, mapping=options.mapping), options.tokenizer)
    extractors = {kind: extractor(kind, evaluation.measures.depth, processes.device) for kind in evaluation.kinds}
    rules = RELEASED_RULES if evaluation.reference else WEBUI_RULES
    works = len(missing) < len(ours)
    bars: AbstractContextManager[Bars | None] = Bars(sum(unfinished.values())) if processes.is_first else nullcontext()
    with bars as shown:
        maker = Maker(evaluation, models, rules, extractors, shown.show if shown else no_progress)
        for start in range(0, len(missing), evaluation.batch):
            together = missing[start : start + evaluation.batch]
            works = _make_some(maker, together, evaluation, works) or works
            if shown:
                shown.finished(sum(unfinished[item] for item in together))


def _make_some(maker: Maker, items: Sequence[Item], evaluation: Evaluation, works: bool) -> bool:
    """Make the pictures of some items in one batch, or of one after the other; gives whether any are made.

    Args:
        works: whether any were made before; if not, what is wrong is wrong for all.

    Raises:
        XAdapterError: it is.
    """
    if len(items) > 1:
        try:
            maker.make(items)
            return True
        except XAdapterError as error:
            # what is wrong with one of them is found and told below
            logger.info("one after the other: %s", error)
    for item in items:
        works = _make_one(maker, item, evaluation, works) or works
    return works


def _make_one(maker: Maker, item: Item, evaluation: Evaluation, works: bool) -> bool:
    """Make the pictures of an item, or write down why not; gives whether they are made."""
    try:
        maker.make([item])
    except XAdapterError as error:
        if not works and not isinstance(error, UnusablePicture):
            raise
        reason = " ".join(str(error).split())
        logger.warning("%s is left out: %s", item.key, reason)
        write_whole(folder_of(evaluation.out, item).left_out, lambda to: to.write_text(reason, encoding="utf-8"))
        return False
    return True


def _measure_and_report(evaluation: Evaluation, device: str, facts: Mapping[str, Any]) -> int:
    """Measure and write the report; gives the exit status."""
    sample = Sample.of(evaluation)
    if not sample.items:
        raise WrongArgument(_why_nothing(evaluation, sample))
    measured = Measuring(evaluation, sample, device).measured()
    report = Report(
        ways=tuple(way.name for way in sample.ways),
        captions=sample.captions,
        seeds=sample.seeds,
        measured=measured,
        made_with=facts,
        left_out=_left_out(evaluation),
        skipped=evaluation.captions.skipped,
        pictures=tuple(_rows(evaluation, sample, measured)),
    )
    text = report.text()
    written: Mapping[str, Callable[[], str]] = {
        TABLE: lambda: text,
        FIGURES: lambda: _json(report.as_json()),
        PAGE: lambda: page(report),
    }
    for name, content in written.items():
        write_whole(evaluation.out / name, lambda to, content=content: to.write_text(content(), encoding="utf-8"))
    say(f"{text}\n  page:   {evaluation.out / PAGE}\n  json:   {evaluation.out / FIGURES}")
    return 0 if measured.figures else EXIT_NOTHING


def _rows(evaluation: Evaluation, sample: Sample, measured: Measured) -> Sequence[Row]:
    rows = []
    for place, (item, folder) in enumerate(zip(sample.items, sample.folders, strict=True)):
        given = {"picture": folder.source}
        given |= {f"{kind} map": folder.map_of(kind) for kind in evaluation.kinds}
        paths = given | {way.name: folder.of(way) for way in sample.ways}
        rows.append(
            Row(
                item.caption.text,
                item.seed,
                {name: _relative(path, evaluation.out) for name, path in paths.items() if path.is_file()},
                {
                    figure.name: {way: round(float(values[place]), 6) for way, values in figure.values.items()}
                    for figure in measured.figures
                    if figure.values
                },
            )
        )
    return rows


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _left_out(evaluation: Evaluation) -> Mapping[str, str]:
    found = ((item, folder_of(evaluation.out, item).left_out) for item in evaluation.items)
    return {item.key: path.read_text(encoding="utf-8") for item, path in found if path.is_file()}


def _why_nothing(evaluation: Evaluation, sample: Sample) -> str:
    """Why no caption can be measured."""
    if any(sample.lacking.values()):
        lacking = ", ".join(f"'{name}' lacks {captions}" for name, captions in sample.lacking.items())
        return f"--beside: no caption has a picture in every row: of the {sample.made} that are made, {lacking}."
    some = next((f"; {key}: {reason}" for key, reason in _left_out(evaluation).items()), ".")
    return f"--captions: no caption has all its pictures{some}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
