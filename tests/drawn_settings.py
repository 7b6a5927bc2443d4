"""Settings drawn at random, by hypothesis."""

from __future__ import annotations

from hypothesis import strategies

from lib_xadapter.settings import defaults, json_schema


def of_schema(schema: dict) -> strategies.SearchStrategy:
    """Everything that a schema of the kinds that `json_schema` is made of allows."""
    if "const" in schema:
        return strategies.just(schema["const"])
    if "enum" in schema:
        return strategies.sampled_from(schema["enum"])
    if "anyOf" in schema:
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        return strategies.one_of([of_schema({**rest, **one}) for one in schema["anyOf"]])
    least, most, step = schema.get("minimum"), schema.get("maximum"), schema.get("multipleOf")
    return {
        "object": lambda: strategies.fixed_dictionaries(
            {}, optional={name: of_schema(one) for name, one in schema["properties"].items()}
        ),
        "array": lambda: strategies.lists(
            of_schema(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"]
        ),
        "boolean": strategies.booleans,
        "string": lambda: strategies.text(strategies.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        "number": lambda: strategies.floats(least, most, allow_nan=False, allow_infinity=False),
        "integer": lambda: (
            strategies.integers(least, most)
            if step is None
            else strategies.integers(least // step, most // step).map(lambda number: number * step)
        ),
    }[schema["type"]]()


def agrees(given: dict) -> bool:
    """Arguments that no schema can compare with each other."""
    whole = {**defaults(), **given}
    return whole["guidance_start"] <= whole["guidance_end"] and not (
        whole["single_stage"] and whole["base_start"] != "noise"
    )


SENT = of_schema(json_schema()).filter(agrees)
"""Arguments that the schema allows and that agree with each other."""
