"""A script that wraps the processing object's `sample`, as other people's extensions do."""

from typing import Any

from modules import processing, scripts


class Counted(scripts.Script):
    """The infotext tells how often the wrapped method was called."""

    def title(self) -> str:
        return "Counted"

    def run(self, p: processing.StableDiffusionProcessing) -> processing.Processed:
        sample = p.sample

        def counted(*args: Any, **kwargs: Any) -> Any:
            p.extra_generation_params["Counted"] = p.extra_generation_params.get("Counted", 0) + 1
            return sample(*args, **kwargs)

        p.sample = counted
        return processing.process_images(p)
