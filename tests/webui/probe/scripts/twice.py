"""A script that makes its pictures twice with one processing object, as scripts of other people do."""

from modules import processing, scripts


class Twice(scripts.Script):
    """The pictures of the second time are returned."""

    def title(self) -> str:
        return "Twice"

    def run(self, p: processing.StableDiffusionProcessing) -> processing.Processed:
        processing.process_images(p)
        return processing.process_images(p)
